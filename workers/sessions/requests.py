"""The requests of operations: from logged bytes to checked tensors.

Whatever a client can do wrong is found here, before anything changes, and raises InvalidRequest: its code, what came, what is
allowed. The API has looked at structure and shapes; here are the values, and what depends on the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from service.errors import FieldError, InvalidRequest
from service.sessions.codec import unpack
from service.spec.objective import ObjectiveSpec
from service.spec.tensors import uses
from service.validation import did_you_mean, parse, shown
from service.validation.words import counted
from workers.loops.update import Answers
from workers.losses.batch import viewed
from workers.objectives.objective import Objective
from workers.objectives.sums import HIGH, LOSSES, LOW, Inputs, SumLoss
from workers.policy.errors import PolicyFailed, Subject
from workers.policy.optimizer import StepSettings
from workers.policy.score.layout import Items, Sequence
from workers.policy.text import Text

NAMED_PLACES = 4
# What the worker computes by itself when an objective needs it.
COMPUTED = frozenset({"old_log_probs", "ref_log_probs"})
NOT_PUBLIC = {
    "stable_reinforce": "its formula is not public, and it uses data of the sampler that its service alone has; "
    "use importance_sampling, or ppo, with the sampler's log_probs"
}


@dataclass(frozen=True)
class Request:
    """What an operation asks for."""

    head: dict[str, Any]
    tensors: dict[str, Tensor]  # read-only views of the request's bytes

    @classmethod
    def read(cls, raw: bytes) -> "Request":
        """Raises InvalidRequest for an operation that was refused before it was logged, and only uses up its place."""
        head, tensors = unpack(raw)
        if head["kind"] == "refused":
            error = head["error"]
            raise refused(error["code"], error["detail"], error.get("pointer", ""), hint=error.get("hint"))
        return cls(head, {name: viewed(tensor) for name, tensor in tensors.items()})


def refused(code: str, detail: str, pointer: str = "", *, hint: str | None = None) -> InvalidRequest:
    return InvalidRequest(detail, [FieldError(pointer, detail, code)], code=code, hint=hint)


# ---------------------------------------------------------------- rows with a named loss


@dataclass(frozen=True)
class Rows:
    """Items, the loss over them, and what it needs."""

    items: Items
    loss: SumLoss
    inputs: Inputs

    def of(self, log_probs: Tensor, places: Tensor) -> Tensor:
        """The loss of the tokens at these places. An item's tokens are there together or not at all."""
        whole = self.inputs
        part = Inputs(
            {name: tensor[places] for name, tensor in whole.tensors.items()}, whole.config, whole.items[places], whole.count
        )
        return self.loss.of(log_probs, part)


def rows_of(request: Request, text: Text, device: torch.device) -> Rows:
    """Raises InvalidRequest."""
    loss, config = _loss(request.head["loss"], request.head.get("config") or {})
    sent = dict(request.tensors)
    starts = _cuts(sent.pop("cu_seqlens"))
    _fit(starts, text, "/cu_seqlens")
    tokens = _tokens(sent.pop("tokens"), "tokens", text)
    targets = _tokens(sent.pop("target_tokens"), "target_tokens", text)
    tensors = _loss_tensors(request.head["loss"], loss, sent, targets)
    items = Items(tokens.to(device), targets.to(device), starts)
    inputs = Inputs(
        {name: tensor.to(device) for name, tensor in tensors.items()}, config, items.row_of_token(device), len(starts) - 1
    )
    return Rows(items, loss, inputs)


def _loss(name: str, config: Mapping[str, float]) -> tuple[SumLoss, dict[str, float]]:
    if name not in LOSSES:
        why = f": {NOT_PUBLIC[name]}" if name in NOT_PUBLIC else did_you_mean(name, list(LOSSES))
        raise refused("unknown_loss", f"there is no loss {shown(name)!r}{why}; known are {', '.join(LOSSES)}", "/loss")
    loss = LOSSES[name]
    for key in config:
        if key not in loss.config:
            known = ", ".join(loss.config) or "none"
            meant = did_you_mean(key, list(loss.config))
            detail = f"the loss {name} has no setting {shown(key)!r}{meant}; known are {known}"
            raise refused("unknown_config", detail, f"/config/{key}")
    whole = {**loss.config, **config}
    for key, value in whole.items():
        if value is None:
            raise refused("missing_config", f"the loss {name} needs config.{key}, a number", f"/config/{key}")
    if LOW in whole and not 0 <= whole[LOW] <= whole[HIGH]:
        detail = f"{LOW} and {HIGH} bound the ratio itself, 0 <= low <= high, got {whole[LOW]:g} and {whole[HIGH]:g}"
        raise refused("invalid_config", detail, f"/config/{LOW}")
    return loss, {key: float(value) for key, value in whole.items()}


def _loss_tensors(name: str, loss: SumLoss, sent: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
    """The tensors of the loss in float32, each of the shape that it must have."""
    known = (*loss.needs, *loss.takes)
    for key in loss.needs:
        if key not in sent:
            raise refused("missing_tensor", f"the loss {name} needs the tensor {key}", f"/{key}")
    for key in sent:
        if key not in known:
            meant = did_you_mean(key, list(known))
            detail = f"the loss {name} does not use the tensor {shown(key)!r}{meant}; it takes {', '.join(known)}"
            raise refused("unknown_tensor", detail, f"/{key}")
    if targets.dim() == 2 and name != "cross_entropy":
        raise refused("invalid_shape", f"several targets a token go with cross_entropy, not with {name}", "/target_tokens")
    for key, tensor in sent.items():
        if tensor.shape != targets.shape:
            detail = f"{key} must have the shape of target_tokens, {list(targets.shape)}, got {list(tensor.shape)}"
            raise refused("invalid_shape", detail, f"/{key}")
    mask = None if "mask" not in sent else _binary(sent["mask"], "mask")
    for key, tensor in sent.items():
        _finite(tensor, key, mask)
    return {key: tensor.float() for key, tensor in sent.items()}


# ---------------------------------------------------------------- groups of answers with an objective


@dataclass(frozen=True)
class Groups:
    """Answers and the objective over them."""

    objective: Objective
    answers: Answers
    cuts: Tensor  # [B + 1] where each answer begins in flat tensors
    needs_reference: bool

    @property
    def longest(self) -> int:
        return max(len(sequence.completion) for sequence in self.answers.sequences)

    def flat(self, values_B_T: Tensor) -> Tensor:
        """The answers' tokens, one after the other."""
        return torch.cat([row[: len(s.completion)] for row, s in zip(values_B_T, self.answers.sequences, strict=True)])


def groups_of(request: Request, text: Text) -> Groups:
    """Raises InvalidRequest."""
    sent = request.tensors
    spec = parse(ObjectiveSpec, request.head["objective"], "/objective")
    sequences, cuts = _sequences(sent, text)
    for name in ("rewards", "advantages", "rollout_log_probs", "reward_weights"):
        if name in sent:
            _finite(sent[name], name, None)
    lengths = cuts.diff().tolist()
    by_token = {name: sent[name] for name in ("rollout_log_probs", "response_mask") if name in sent}
    advantages = sent.get("advantages")
    if advantages is not None and advantages.shape[0] == int(cuts[-1]) != len(sequences):
        by_token["advantages"], advantages = advantages, None
    padded = {name: _padded(values, lengths) for name, values in by_token.items()}
    mask = padded.get("response_mask")
    if mask is not None:
        _binary(sent["response_mask"], "response_mask")
    if ("advantages" in sent) == ("rewards" in sent):
        raise refused("missing_tensor", "give either the tensor `rewards` or `advantages`", "/rewards")
    given = {*sent, "group_ids"}
    used = uses(spec, given)
    for name, why in used.needed.items():
        if name not in given and name not in COMPUTED:
            raise refused("missing_tensor", f"this objective needs {name}: {why}", f"/{name}")
    truncated = _binary(sent["truncated"], "truncated") if "truncated" in sent else torch.zeros(len(sequences))
    answers = Answers(
        sequences,
        rewards=sent["rewards"].double() if "rewards" in sent else None,
        group_ids=sent["group_ids"].long(),
        valid=torch.ones(len(sequences), dtype=torch.bool),
        truncated=truncated.bool(),
        reward_weights=sent["reward_weights"].double() if "reward_weights" in sent else None,
        rollout_log_probs=padded.get("rollout_log_probs"),
        response_mask=None if mask is None else mask.bool(),
        advantages=padded.get("advantages") if advantages is None else advantages.float(),
    )
    if mask is not None and not bool(mask.any()):
        raise refused("nothing_to_learn", "response_mask is 0 everywhere: there is nothing to learn from", "/response_mask")
    return Groups(Objective(spec.resolve()), answers, cuts, "ref_log_probs" in used.needed)


def _sequences(sent: Mapping[str, Tensor], text: Text) -> tuple[list[Sequence], Tensor]:
    prompts = _tokens(sent["prompt_tokens"], "prompt_tokens", text).tolist()
    completions = _tokens(sent["completion_tokens"], "completion_tokens", text).tolist()
    starts, ends = _cuts(sent["prompt_cu_seqlens"]), _cuts(sent["completion_cu_seqlens"])
    sequences = [
        Sequence(prompts[a:b], completions[c:d]) for (a, b), (c, d) in zip(pairwise(starts), pairwise(ends), strict=True)
    ]
    for row, (prompt, completion) in enumerate(sequences):
        if len(prompt) + len(completion) > text.context:
            raise refused(
                "sequence_too_long",
                f"row {row} has {len(prompt)} prompt and {len(completion)} answer tokens; the context holds {text.context}",
                "/completion_tokens",
            )
    return sequences, torch.tensor(ends)


def _padded(values: Tensor, lengths: list[int]) -> Tensor:
    """Flat values as [B, T] in float32, padded with 0."""
    return torch.nn.utils.rnn.pad_sequence(list(values.float().split(lengths)), batch_first=True)


# ---------------------------------------------------------------- prompts to sample from


@dataclass(frozen=True)
class Prompts:
    """What a sample continues, and what it wants to know of the prompts."""

    prompts: list[list[int]]
    targets: Tensor | None  # [M, K] over all prompts' tokens; -1 where nothing is wanted

    def items(self, device: torch.device) -> Items:
        """The prompts as items: at each token its own successor is the target."""
        tokens = torch.tensor([token for prompt in self.prompts for token in prompt], device=device)
        starts = [0]
        for prompt in self.prompts:
            starts.append(starts[-1] + len(prompt))
        return Items(tokens, tokens.roll(-1), starts)


def prompts_of(request: Request, text: Text) -> Prompts:
    """Raises InvalidRequest."""
    head, sent = request.head, request.tensors
    if texts := head.get("texts"):
        prompts = [_encoded(row, prompt, text) for row, prompt in enumerate(texts)]
    elif chats := head.get("chats"):
        prompts = [_rendered(chat, text) for chat in chats]
    else:
        tokens = _tokens(sent["prompt_tokens"], "prompt_tokens", text).tolist()
        prompts = [tokens[start:end] for start, end in pairwise(_cuts(sent["prompt_cu_seqlens"]))]
    wanted = head["sampling"]["max_tokens"]
    least = 1 if wanted is None else wanted
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise refused("prompt_empty", f"prompt {row} has no tokens", "/prompts")
        if len(prompt) + least > text.context:
            raise refused(
                "sequence_too_long",
                f"prompt {row} has {counted(len(prompt), 'token')} and may get {least} more; the context holds {text.context}",
                "/prompts",
                hint="shorten the prompt, or lower max_tokens",
            )
    for token in head["sampling"].get("stop_ids", ()):
        if not 0 <= token < text.rows:
            raise refused("token_unknown", f"the model knows tokens 0 to {text.rows - 1}, got {token}", "/sampling/stop_ids")
    targets = sent.get("target_tokens")
    if targets is not None and len(targets) != sum(map(len, prompts)):
        detail = f"target_tokens must have a row for each of the {sum(map(len, prompts))} prompt tokens, got {len(targets)}"
        raise refused("invalid_shape", detail, "/target_tokens")
    if targets is not None:
        _tokens(targets.clamp(min=0), "target_tokens", text)
        targets = targets.long()
    return Prompts(prompts, targets)


def _encoded(row: int, prompt: str, text: Text) -> list[int]:
    """The tokens of a text. What the tokenizer does not know is refused: the model would read every such place as the same."""
    tokens, unknown = text.encode(prompt), text.tokenizer.unk_token_id
    if unknown is None or unknown not in tokens or str(text.tokenizer.unk_token) in prompt:
        return tokens
    strange = [sign for sign in dict.fromkeys(prompt) if unknown in text.encode(sign)][:NAMED_PLACES]
    named = ", ".join(map(repr, strange)) or "some of its words"
    raise refused("text_unknown", f"the tokenizer does not know {named} in prompt {row}", "/texts")


def _rendered(chat: Mapping[str, Any], text: Text) -> list[int]:
    """The tokens of messages in the model's template. `tools` are left out if there are none, not every template takes them."""
    options = {**({"tools": chat["tools"]} if chat.get("tools") else {}), **(chat.get("chat_template_kwargs") or {})}
    try:
        return text.encode(chat["messages"], **options)
    except PolicyFailed as error:
        if error.subject != Subject.CHAT:
            raise
        raise refused(error.code, error.detail, "/messages") from error


# ---------------------------------------------------------------- the optimizer, and checks of values


def settings_of(head: Mapping[str, Any]) -> StepSettings:
    sent = head["optimizer"]
    low, high = sent["betas"]
    return StepSettings(sent["learning_rate"], (low, high), sent["eps"], sent["weight_decay"], sent["max_grad_norm"])


def _cuts(values: Tensor) -> list[int]:
    return [int(value) for value in values.tolist()]


def _fit(starts: list[int], text: Text, pointer: str) -> None:
    for row, (start, end) in enumerate(pairwise(starts)):
        if end - start > text.context:
            raise refused(
                "sequence_too_long", f"row {row} has {counted(end - start, 'token')}; the context holds {text.context}", pointer
            )


def _tokens(values: Tensor, name: str, text: Text) -> Tensor:
    if values.numel():
        least, greatest = (int(end) for end in values.aminmax())
        if least < 0 or greatest >= text.rows:
            wrong = least if least < 0 else greatest
            raise refused("token_unknown", f"{name}: the model knows tokens 0 to {text.rows - 1}, got {wrong}", f"/{name}")
    return values.long()


def _finite(values: Tensor, name: str, mask: Tensor | None) -> None:
    """Every number that counts must be finite."""
    _none(values, name, ~values.isfinite() if mask is None else ~values.isfinite() & (mask != 0), "nonfinite", "finite")


def _binary(values: Tensor, name: str) -> Tensor:
    _none(values, name, (values != 0) & (values != 1), "mask_not_binary", "0 or 1")
    return values


def _none(values: Tensor, name: str, wrong: Tensor, code: str, must_be: str) -> None:
    if not bool(wrong.any()):
        return
    places = wrong.nonzero()[:NAMED_PLACES].tolist()
    at = ", ".join(str(place if len(place) > 1 else place[0]) for place in places)
    more = int(wrong.sum()) - len(places)
    got = float(values[wrong][0])
    detail = f"{name} must be {must_be}, got {got:g} at {at}" + (f" and {more} more" if more else "")
    raise refused(code, detail, f"/{name}")
