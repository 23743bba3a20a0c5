"""The policy: a language model that samples, scores, learns, and saves itself. The five verbs over transformers models.

    sample(prompts) -> answers          score(sequences) -> log_probs         accumulate(sequences, loss) -> loss
    step() -> what the update did       save(folder), load(...)

Everything random derives from a seed and a step, so a loaded policy goes on bit for bit as the saved one would have.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import orjson
import peft
import torch
import transformers
from torch import Tensor, nn

from service.spec.model import ModelSpec
from service.spec.training import OptimizerSpec
from workers.policy.batching import Sequence, auto_microbatch_tokens, microbatches, pad, response_mask
from workers.policy.load import MODEL, TRAINED, Loaded, load_model, pick_device
from workers.policy.log_probs import Scorer
from workers.policy.optimizer import Optimizer
from workers.policy.reference import Reference, open_reference
from workers.policy.sampler import Completion, Sampler, Sampling
from workers.policy.text import Text
from workers.seeds import derive

__all__ = ["Completion", "Policy", "Sequence"]

TRAINER = "trainer.json"

# log_probs [b, T] of some rows, and their indices in the list -> their share of the loss (a scalar with a graph).
Loss = Callable[[Tensor, Tensor], Tensor]


class Policy:
    """Made by `Policy.load`. `facts` says what was resolved; `last_entropy` is [B, T], of the latest score or accumulate."""

    def __init__(
        self, loaded: Loaded, optimizer: Optimizer, reference: Reference | None, *, seed: int, source: str | None
    ) -> None:
        self._loaded, self._optimizer, self._reference, self._seed = loaded, optimizer, reference, seed
        self.tokenizer, self.adapter = loaded.tokenizer, loaded.adapter
        self.model, self._device = loaded.model, loaded.model.device
        self._text = Text(loaded.tokenizer, loaded.model)
        self._pad_id, self.context = self._text.pad_id, self._text.context
        self._sampler = Sampler(self.model, eos_ids=self._text.eos_ids, pad_id=self._pad_id, decode=self._text.decode_all)
        self._scorer = Scorer(self.model)
        modules = self.model.named_modules()
        self._dropouts = [m for name, m in modules if f"lora_dropout.{TRAINED}" in name and isinstance(m, nn.Dropout)]
        self._microbatch_tokens = auto_microbatch_tokens(self.model, self._device)
        self._accumulated, self._poisoned = 0, False  # since the last step
        self.last_entropy = torch.zeros(0, 0)
        self.facts = self._facts(source)

    @classmethod
    def load(
        cls,
        model: ModelSpec,
        *,
        optimizer: OptimizerSpec,
        optimizer_steps: int,
        seed: int,
        device: str,
        threads: int,
        reference: bool,
        reference_from: Path | None,
        weights_from: Path | None,
        optimizer_from: Path | None,
        new_schedule: bool = False,
    ) -> Self:
        """Load a model to train for `optimizer_steps` steps.

        weights_from    a checkpoint folder to take the weights from; none: the model's source
        optimizer_from  a checkpoint folder to go on from exactly: moments, masters, and the count of steps
        new_schedule    take moments and masters only; the learning rate starts anew (a fork with its optimizer)
        reference_from  the checkpoint folder that the job itself started from, also when it is resumed from another;
                        none: the source is the reference

        Raises JobFailed: model_not_found, model_unsupported, checkpoint_mismatch, lora_target_modules.
        """
        chosen = pick_device(device)
        _be_deterministic(chosen, threads)
        loaded = load_model(model, chosen, seed, weights_from)
        trainer: dict[str, Any] = {} if optimizer_from is None else orjson.loads((optimizer_from / TRAINER).read_bytes())
        loaded = replace(loaded, revision=loaded.revision or trainer.get("revision"))
        held = open_reference(loaded, model, chosen, reference_from) if reference else None
        trained = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
        adamw = Optimizer(trained, optimizer, optimizer_steps)
        if optimizer_from is not None:
            adamw.load(optimizer_from)
            adamw.steps_done = 0 if new_schedule else trainer["optimizer_steps"]
        return cls(loaded, adamw, held, seed=seed, source=model.source)

    def encode(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        return self._text.encode(prompt)

    def encode_answer(self, text: str) -> list[int]:
        return self._text.encode_answer(text)

    def decode(self, tokens: list[int]) -> str:
        return self._text.decode(tokens)

    def sample(
        self,
        prompts: list[list[int]],
        *,
        group_size: int,
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Iterable[str] = (),
        seed: int,
    ) -> list[list[Completion]]:
        """`group_size` answers to each prompt. The same arguments give the same answers; temperature 0 is greedy.

        The log_probs are of the distribution that was drawn from: at temperature 1 without top_p and top_k (and for greedy
        answers) the policy's own. Raises JobFailed non_finite_logits.
        """
        return self._sampler.sample(prompts, group_size, Sampling(max_tokens, temperature, top_p, top_k, tuple(stop)), seed)

    @torch.no_grad()
    def score(self, sequences: list[Sequence], *, reference: bool = False, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """log_probs [B, T] float32 of the answers' tokens, 0 where masked, and the response mask [B, T] bool."""
        if reference and self._reference is None:
            raise ValueError("this policy was loaded with reference=False")
        mask = response_mask(sequences, self._device)
        log_probs, entropy = torch.zeros((2, *mask.shape), device=self._device)
        with self._reference() if reference and self._reference else nullcontext(self._scorer) as scorer:
            for rows in microbatches(sequences, self._microbatch_tokens):
                batch = pad([sequences[row] for row in rows], self._pad_id, self._device)
                place = torch.tensor(rows, device=self._device)[batch.rows_N], batch.steps_N
                log_probs[place], entropy[place] = scorer(batch, temperature)
        self.last_entropy = entropy
        return log_probs, mask

    def accumulate(
        self,
        sequences: list[Sequence],
        loss: Loss,
        *,
        temperature: float = 1.0,
        microbatch_tokens: int | Literal["auto"] = "auto",
    ) -> float:
        """Add the gradient of the loss; returns the loss, summed over micro-batches.

        `loss` gets log_probs [b, T] (T is the longest answer of the whole list) of the rows [b] of it, and returns their
        share: the shares' sum must not depend on the split, so weights come from the whole list.
        """
        mask = response_mask(sequences, self._device)
        entropy = torch.zeros(mask.shape, device=self._device)
        shares: list[Tensor] = []
        with self._dropout():
            for rows in microbatches(sequences, self._microbatch_tokens if microbatch_tokens == "auto" else microbatch_tokens):
                batch = pad([sequences[row] for row in rows], self._pad_id, self._device)
                indices = torch.tensor(rows, device=self._device)
                chosen, entropy[indices[batch.rows_N], batch.steps_N] = self._scorer(batch, temperature)
                log_probs = chosen.new_zeros(len(rows), mask.shape[1]).index_put((batch.rows_N, batch.steps_N), chosen)
                share = loss(log_probs, indices)
                share.backward()
                shares.append(share.detach())
        total = math.fsum(map(float, shares)) if all(torch.isfinite(share) for share in shares) else math.nan
        self._accumulated += 1
        self._poisoned |= not math.isfinite(total)
        self.last_entropy = entropy
        return total

    def step(self) -> dict[str, float | bool]:
        """One optimizer step: grad_norm (before clipping), learning_rate, skipped. A non-finite loss or gradient is skipped."""
        result = self._optimizer.step(poisoned=self._poisoned)
        self._accumulated, self._poisoned = 0, False
        return result

    def save(self, folder: Path) -> None:
        """Write model/ (a plain transformers folder, or a plain peft adapter), the optimizer's state and trainer.json."""
        if self._loaded.peft is None:
            self.model.save_pretrained(folder / MODEL)
        else:
            # save_embedding_layers: "auto" would ask the hub about the base.
            self._loaded.peft.save_pretrained(str(folder / MODEL), selected_adapters=[TRAINED], save_embedding_layers=False)
        self.tokenizer.save_pretrained(str(folder / MODEL))
        self._optimizer.save(folder)
        trainer = {
            "optimizer_steps": self._optimizer.steps_done,
            "source": self.facts["source"],
            "revision": self.facts["revision"],
            "adapter": self.adapter,
        }
        (folder / TRAINER).write_bytes(orjson.dumps(trainer, option=orjson.OPT_INDENT_2))

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """The adapters' dropout, while learning; its draws derive from the optimizer step, so that a resumed run repeats them.

        A model's own dropout stays off: it would move the log_probs away from the old ones for no gain.
        """
        if not self._dropouts:
            yield
            return
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(derive(self._seed, self._optimizer.steps_done, f"dropout/{self._accumulated}"))
            try:
                for module in self._dropouts:
                    module.train()
                yield
            finally:
                for module in self._dropouts:
                    module.eval()

    def _facts(self, source: str | None) -> dict[str, Any]:
        parameters = list(self.model.parameters())
        return {
            "source": source,
            "revision": self._loaded.revision,
            "architecture": type(self.model).__name__,
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "adapter": self.adapter,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self._device),
            "threads": torch.get_num_threads(),
            "context": self.context,
            "eos_token_ids": self._text.eos_ids,
            "microbatch_tokens": self._microbatch_tokens,
            "head_on_answers_only": self._scorer.head_on_answers_only,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        }


def _be_deterministic(device: torch.device, threads: int) -> None:
    torch.set_num_threads(threads)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue] - costs time
