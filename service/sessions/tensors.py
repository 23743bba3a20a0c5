"""Operations whose numbers come as tensors: a safetensors file as `service.sessions.codec` has it, with `seq` in the head.
Their dtypes, shapes and cuts are checked here; their values by the worker."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from service.edge.documents import parse_json
from service.errors import FieldError
from service.losses.numbers import integers
from service.relay.tensors import Tensor, Tensors, decode
from service.sessions.body import (
    HEADS,
    AdamStep,
    Finish,
    LoadCheckpoint,
    Number,
    OptimStep,
    Sample,
    SaveCheckpoint,
    Temperature,
    TrainStep,
    lookup_of,
)
from service.sessions.codec import HEAD, pack
from service.spec.objective import ObjectiveSpec
from service.spec.section import Section
from service.spec.tensors import FLOATS, INTEGERS
from service.store.operations import Asked
from service.validation import did_you_mean, escape, invalid, parse
from service.validation.words import counted

MOST_TARGETS = 1024  # of one token
FLAGS = (*FLOATS, *INTEGERS, "BOOL", "U8")


class _Numbered(Section):
    seq: Annotated[int, Field(ge=1, le=2**53)]


class _ForwardHead(_Numbered):
    kind: Literal["forward", "forward_backward"]
    loss: Annotated[str | None, Field(max_length=64)] = None
    config: dict[str, Number] = Field(default_factory=dict)
    objective: ObjectiveSpec | None = None
    temperature: Temperature = 1.0


class _TrainHead(_Numbered):
    kind: Literal["train_step"]
    objective: ObjectiveSpec
    optimizer: AdamStep = AdamStep()
    minibatches: Annotated[int, Field(ge=1, le=1024)] = 1
    epochs: Annotated[int, Field(ge=1, le=64)] = 1
    temperature: Temperature = 1.0
    microbatch_tokens: Any = TrainStep.model_fields["microbatch_tokens"].default


HEAD_OF = TypeAdapter(
    Annotated[
        _ForwardHead | _TrainHead | OptimStep | Sample | SaveCheckpoint | LoadCheckpoint | Finish, Field(discriminator="kind")
    ]
)

# What a tensor may be: dtypes, and its shape by letters: N tokens (of `cu_seqlens`), B rows, K and R any.
Forms = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
ROWS: Forms = {
    "tokens": (INTEGERS, ("N",)),
    "cu_seqlens": (INTEGERS, ("B+1",)),
    "target_tokens": (INTEGERS, ("N", "NK")),
    "weights": (FLOATS, ("N", "NK")),
    **dict.fromkeys(("log_probs", "advantages", "clip_low_threshold", "clip_high_threshold"), (FLOATS, ("N",))),
    "mask": (FLAGS, ("N",)),
}
GROUPS: Forms = {
    "prompt_tokens": (INTEGERS, ("M",)),
    "prompt_cu_seqlens": (INTEGERS, ("B+1",)),
    "completion_tokens": (INTEGERS, ("N",)),
    "completion_cu_seqlens": (INTEGERS, ("B+1",)),
    "group_ids": (INTEGERS, ("B",)),
    "rewards": (FLOATS, ("B", "BR")),
    "advantages": (FLOATS, ("B", "N")),
    "rollout_log_probs": (FLOATS, ("N",)),
    "response_mask": (FLAGS, ("N",)),
    "truncated": (FLAGS, ("B",)),
    "reward_weights": (FLOATS, ("R",)),
}
PROMPTS: Forms = {
    "prompt_tokens": (INTEGERS, ("M",)),
    "prompt_cu_seqlens": (INTEGERS, ("P+1",)),
    "target_tokens": (INTEGERS, ("MK",)),
}
NEEDED = {
    id(ROWS): ("tokens", "cu_seqlens", "target_tokens"),
    id(GROUPS): ("prompt_tokens", "prompt_cu_seqlens", "completion_tokens", "completion_cu_seqlens", "group_ids"),
    id(PROMPTS): ("prompt_tokens", "prompt_cu_seqlens"),
}
CUTS = {"cu_seqlens": "N", "completion_cu_seqlens": "N", "prompt_cu_seqlens": "M"}


def asked_of_tensors(raw: bytes) -> Asked:
    """The operation in a safetensors body. Raises BadTensors, Malformed, InvalidRequest."""
    tensors, metadata = decode(raw)
    if HEAD not in metadata:
        raise invalid([FieldError("", f"the header's metadata must hold `{HEAD}`, JSON: {{kind, seq, ...}}", "missing")])
    sent = parse_json(metadata[HEAD].encode())
    if isinstance(sent, dict) and sent.get("kind") == "sample" and "texts" not in sent:
        sent = {**sent, "prompts": [[0]]}  # stands for the tensors, which are checked below
    body = parse(HEAD_OF, sent)
    forms = _forms(body)
    sizes = check(tensors, forms)
    head = body.model_dump(mode="json", by_alias=True, include=HEADS.get(body.kind, None))
    if isinstance(body, _ForwardHead) and body.loss is not None:
        head = {"kind": body.kind, "loss": body.loss, "config": body.config}
    elif isinstance(body, _ForwardHead | _TrainHead) and body.objective is not None:
        head["objective"] = body.objective.model_dump(mode="json", by_alias=True)
    head.pop("seq", None)
    cost = sizes.get("N", 0) + sizes.get("M", 0)
    if isinstance(body, Sample):
        head["checkpoint"] = None
        if body.texts is not None:
            head["texts"] = body.texts
        cost += body.num_samples * body.sampling.max_tokens * max(1, sizes.get("P", len(body.texts or [])))
    if isinstance(body, _TrainHead):
        if sizes["B"] % body.minibatches:
            raise invalid(
                [FieldError("/minibatches", f"must divide the {counted(sizes['B'], 'answer')}", "invalid", body.minibatches)]
            )
        cost *= body.epochs
    return Asked(body.kind, body.seq, pack(head, tensors), max(1, cost), lookup=lookup_of(head))


def _forms(body: Any) -> Forms:
    if isinstance(body, _ForwardHead):
        if (body.loss is None) == (body.objective is None):
            raise invalid([FieldError("", "give either `loss` or `objective`", "invalid")])
        return ROWS if body.loss is not None else GROUPS
    if isinstance(body, _TrainHead):
        return GROUPS
    return PROMPTS if isinstance(body, Sample) and body.texts is None else {}


def check(tensors: Tensors, forms: Forms) -> dict[str, int]:
    """The sizes N, B, M, ... Raises InvalidRequest, naming each tensor at fault."""
    errors = [_unknown(name, forms) for name in tensors if name not in forms]
    errors += [
        FieldError(f"/{name}", "is missing from the tensors", "missing")
        for name in NEEDED.get(id(forms), ())
        if name not in tensors
    ]
    if errors:
        raise invalid(errors)
    sizes: dict[str, int] = {}
    for name, letter in CUTS.items():
        if name in tensors:
            errors += _cuts(name, tensors[name], sizes, letter, rows=forms[name][1][0][0])
    for name, value in tensors.items():
        errors += _form(name, value, *forms[name], sizes)
    if forms is GROUPS and ("rewards" in tensors) == ("advantages" in tensors):
        errors.append(FieldError("", "give either the tensor `rewards` or `advantages`", "invalid"))
    if "weights" in tensors and forms is ROWS and tensors["weights"].shape != tensors["target_tokens"].shape:
        errors.append(FieldError("/weights", "must have the shape of target_tokens", "invalid", list(tensors["weights"].shape)))
    if errors:
        raise invalid(errors)
    return sizes


def _unknown(name: str, forms: Forms) -> FieldError:
    known = ", ".join(forms) or "no tensors"
    return FieldError(
        f"/{escape(name)}", f"is no tensor of this operation; known are {known}{did_you_mean(name, list(forms))}", "unknown"
    )


def _cuts(name: str, value: Tensor, sizes: dict[str, int], letter: str, *, rows: str) -> list[FieldError]:
    """Where each row begins: from 0, rising, with at least one row. Sets the sizes."""
    if value.dtype not in INTEGERS or len(value.shape) != 1 or len(value) < 2:
        return [FieldError(f"/{name}", f"must be {' or '.join(INTEGERS)} of shape [{rows}+1], at least [2]", "invalid")]
    numbers = integers(value)
    if numbers[0] != 0 or any(begin >= end for begin, end in pairwise(numbers)):
        return [FieldError(f"/{name}", "must begin with 0 and rise: no row is empty", "invalid", numbers[:8].tolist())]
    if sizes.setdefault(rows, len(numbers) - 1) != len(numbers) - 1:
        return [FieldError(f"/{name}", f"has {counted(len(numbers) - 1, 'row')}; there are {sizes[rows]}", "invalid")]
    sizes[letter] = numbers[-1]
    return []


def _form(
    name: str, value: Tensor, dtypes: tuple[str, ...], shapes: tuple[str, ...], sizes: dict[str, int]
) -> list[FieldError]:
    if value.dtype not in dtypes:
        return [FieldError(f"/{name}", f"must be {', '.join(dtypes)}, got {value.dtype}", "invalid", value.dtype)]
    for letters in shapes:
        if name in CUTS:
            return []
        wanted = [sizes.get(letter) for letter in letters]
        if len(wanted) == len(value.shape) and all(
            size == want or (want is None and 1 <= size <= MOST_TARGETS) for size, want in zip(value.shape, wanted, strict=True)
        ):
            return []
    said = " or ".join("[" + ", ".join(str(sizes.get(letter, letter)) for letter in letters) + "]" for letters in shapes)
    return [FieldError(f"/{name}", f"must have the shape {said}, got {list(value.shape)}", "invalid", list(value.shape))]
