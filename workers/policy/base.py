"""The base: a language model with its tokenizer, rollout engine and scorer, loaded once and shared by several policies.

Its weights are frozen. Learners add their adapters to it (as many as there is memory for), or one learner trains all its
weights; that learner then cannot share the base.
"""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel

from service.spec.model import Full, ModelSpec
from workers.policy.adapters import Adapters
from workers.policy.load import Loaded, adapter_of, load_model, pick_device, unsupported_if_it_fails
from workers.policy.score.layout import auto_microbatch_tokens
from workers.policy.score.log_probs import Scorer
from workers.policy.shards import Shards
from workers.policy.text import Text
from workers.policy.trial import disagreement
from workers.rollout.local import LocalEngine

log = logging.getLogger(__name__)


class Base:
    """Made by `Base.load`. `full_from` is the checkpoint that these full weights come from; None: they are the source's."""

    def __init__(self, loaded: Loaded, *, source: str | None, full_from: Path | None) -> None:
        self.model: PreTrainedModel = loaded.model
        self.source, self.revision, self.full_from = source, loaded.revision, full_from
        self.device, self.dtype = self.model.device, self.model.dtype
        self.shards: Shards | None = None
        self.text = Text(loaded.tokenizer, self.model)
        self.scorer = Scorer(self.model)
        self.microbatch_tokens = auto_microbatch_tokens(self.model, self.device)
        # With up to twice the memory of so many tokens. Measured on a CPU; a GPU's has an end.
        self.long_prompts = self.device.type == "cpu"
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self._trainable = {name for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.model.requires_grad_(False)
        self.adapters = Adapters(self.model)
        self.engine = self._engine(slots=True)

    @classmethod
    def load(
        cls, model: ModelSpec, *, device: str, threads: int, checkpoint: Path | None = None, revision: str | None = None
    ) -> Self:
        """Load the model's source or, if all weights are trained, a checkpoint's weights.

        checkpoint  the folder to start from; if it holds an adapter, the source is loaded at the commit it was trained on
        revision    without a checkpoint: the commit of the source, if it is already known

        Raises PolicyFailed: model_not_found, model_pickled, model_unsupported, checkpoint_mismatch.
        """
        chosen = pick_device(device)
        _be_deterministic(chosen, threads)
        loaded = load_model(model, chosen, checkpoint, revision)
        full = isinstance(adapter_of(model), Full)
        with unsupported_if_it_fails(str(model.source), "it cannot be sampled"):
            base = cls(loaded, source=model.source, full_from=checkpoint if full else None)
            base._try_out()
        return base

    def _try_out(self) -> None:
        """Raises ValueError, or whatever the model does, where it cannot be sampled and scored alike."""
        if self.text.context < 1:
            raise ValueError(f"its context holds {self.text.context} tokens")
        self.text.decode(self.text.encode("a"))  # some of a tokenizer's settings are looked at when it is used, not before
        if self.engine.slotted:
            try:
                if self._disagreement() is None:
                    return
            except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
                log.info("the model %s takes no rows of several lengths at once: %r", self.source, error)
            self.engine = self._engine(slots=False)
        off = self._disagreement()
        if off is not None:
            raise ValueError(f"{off}: it keeps a state outside of its cache, or pads otherwise")

    def _disagreement(self) -> str | None:
        return disagreement(self.engine, self.scorer, vocabulary=self.text.rows, dtype=self.dtype, device=self.device)

    def _engine(self, *, slots: bool) -> LocalEngine:
        text, head_alone = self.text, self.scorer.head_on_answers_only
        return LocalEngine(
            self.model,
            self.adapters,
            eos_ids=text.eos_ids,
            pad_id=text.pad_id,
            decode=text.decode_all,
            show=text.show_all,
            frame=text.frame,
            head_alone=head_alone,
            slots=slots,
        )

    def take_over(self) -> dict[str, nn.Parameter]:
        """Give all weights to one learner to train. Its changes are never undone, so only this learner can use the base.

        Raises ValueError if the base already has a learner.
        """
        self.adapters.close()
        weights = {name: weight for name, weight in self.model.named_parameters() if name in self._trainable}
        for weight in weights.values():
            weight.requires_grad_(True)
        return weights

    def shard(self, *, trained: bool) -> None:
        """Keep a part of the weights only, before anything else is done with them: see `Shards`."""
        self.shards = self.scorer.shards = Shards(self.model, trained=trained)

    def whole(self) -> AbstractContextManager[None]:
        """Inside, the model can be called at will, without gradients. Where it is sharded, all ranks must come here."""
        return nullcontext() if self.shards is None else self.shards.whole()


def _be_deterministic(device: torch.device, threads: int) -> None:
    if threads > 1:
        # A row of a product then does not depend on how many rows there are and who computes them. With one thread the rollout
        # engine sees to it by itself, and faster. MKL reads this at a process's first product.
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    torch.set_num_threads(threads)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue] - costs time
