"""The schema of a loss request, for JSON and safetensors alike, and the check of its items.

Each item is checked by itself. An invalid item has an error in its place of the answer, and the others are computed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from service.errors import FieldError, InvalidRequest
from service.losses import needs, shapes
from service.losses.batch import TAKEN, LossBatch
from service.relay.tensors import BadTensors, Tensor, Tensors, decode
from service.spec.objective import ObjectiveSpec
from service.spec.section import Section
from service.validation import did_you_mean, escape, invalid, parse, shown, without_secrets

MAX_ITEMS = 1024
MAX_ERRORS = 20  # of one item

Dtype = Literal["float64", "float32", "bfloat16"]
OnNonfinite = Literal["refuse", "mask"]
Returned = Literal[
    "gradients",
    "token_loss",
    "log_importance_ratio",
    "ratio",
    "clipped",
    "clipped_low",
    "clipped_high",
    "clipped_dual",
    "advantages",
    "weights",
]
# From the dtype of log_probs to the default dtype of the computation and the answer.
DTYPES: Mapping[str, Dtype] = {"F64": "float64", "F32": "float32", "BF16": "float32"}


class LossItem(Section):
    """One loss: an objective, and the batch that it is computed of."""

    objective: Annotated[ObjectiveSpec, Field(description="a preset by its name, or with any of its axes overridden")]
    batch: Annotated[LossBatch, Field(description="in safetensors: the tensors `i/NAME`")]
    returns: Annotated[
        tuple[Returned, ...],
        Field(
            alias="return",
            strict=False,
            max_length=50,
            description="what is wanted beside loss and metrics; per token, as it was sent",
        ),
    ] = ()
    on_nonfinite: Annotated[
        OnNonfinite | None, Field(description="of NaN and infinities where the mask is 1; null: as the request says")
    ] = None
    on_singleton: Annotated[
        Literal["refuse", "zero"], Field(description="of groups of one where advantages are made of rewards; zero: 0 for them")
    ] = "refuse"
    seed: Annotated[int, Field(ge=0, lt=2**63, description="of the surrogates that draw tokens")] = 0


class _Request(Section):
    dtype: Annotated[
        Dtype | None,
        Field(description="computed and answered in it (bfloat16: inputs are rounded to it); null: float64, or as log_probs"),
    ] = None
    all_or_nothing: Annotated[bool, Field(description="when one item is wrong none is answered")] = False
    on_nonfinite: Annotated[
        OnNonfinite, Field(description="mask: leave rows out that are not finite where the mask is 1, and name them")
    ] = "refuse"


class LossRequest(_Request):
    """One or many losses, computed together."""

    items: Annotated[list[LossItem], Field(min_length=1, max_length=MAX_ITEMS, description="each is answered in its place")]


class _Envelope(_Request):
    items: Annotated[list[Any], Field(min_length=1, max_length=MAX_ITEMS)]


ENVELOPE, ITEM = TypeAdapter(_Envelope), TypeAdapter(LossItem)


@dataclass
class Checked:
    """The part of a request that a worker gets (see `orders`): all items in order, and the tensors of the valid ones."""

    all_or_nothing: bool
    items: list[dict[str, Any]] = field(default_factory=list)
    tensors: Tensors = field(default_factory=dict)
    errors: list[FieldError] = field(default_factory=list)

    @property
    def is_hopeless(self) -> bool:
        """Whether no worker is needed, because only errors can be answered."""
        wrong = sum("error" in item for item in self.items)
        return wrong == len(self.items) or (self.all_or_nothing and wrong > 0)


def withheld(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items of an answer without results: the errors, and a note on the others that they were not computed."""
    return [item if "error" in item else refused(item["index"], [_withheld(item["index"])]) for item in items]


def _withheld(index: int) -> FieldError:
    detail = "is not answered: another item is wrong, and all_or_nothing is set"
    return FieldError(f"/items/{index}", detail, "all_or_nothing")


def check(sent: Any, tensors: Tensors | None = None) -> Checked:
    """Check a request. `tensors`: those of a safetensors body, whose metadata `request` is `sent`.

    Raises InvalidRequest if the items cannot even be separated."""
    request = parse(ENVELOPE, sent)
    checked = Checked(request.all_or_nothing)
    by_item = None if tensors is None else _by_item(tensors, len(request.items))
    for index, raw in enumerate(request.items):
        try:
            item = parse(ITEM, raw if by_item is None else _with_batch(raw, by_item[index], index), f"/items/{index}")
            entry, parts = _sound(request, item, index)
        except InvalidRequest as error:
            checked.items.append(refused(index, error.errors))
            checked.errors += error.errors
            continue
        checked.items.append(entry)
        checked.tensors.update((f"{index}/{name}", tensor) for name, tensor in parts.items())
    return checked


def refused(index: int, errors: list[FieldError]) -> dict[str, Any]:
    """A refused item in the answer."""
    said = [_said(error) for error in errors[:MAX_ERRORS]]
    return {"index": index, "status": "error", "error": said[0], **({"errors": said} if len(said) > 1 else {})}


def _said(error: FieldError) -> dict[str, Any]:
    text = {"code": error.code, "pointer": error.pointer, "detail": without_secrets(error.detail)}
    more = {"got": shown(error.got), "allowed": error.allowed}
    return text | {name: value for name, value in more.items() if value is not None}


# ---------------------------------------------------------------- tensors to items

_NAME = re.compile(r"(0|[1-9][0-9]{0,5})/(.+)", re.DOTALL)


def decoded(raw: bytes) -> tuple[Tensors, str]:
    """The tensors of a safetensors body, and its metadata `request`. Raises BadTensors with a pointer, InvalidRequest."""
    try:
        tensors, metadata = decode(raw)
    except BadTensors as error:
        if error.tensor is not None and (name := _NAME.fullmatch(error.tensor)):
            error.errors = [FieldError(f"/items/{name[1]}/batch/{escape(name[2])}", error.detail, error.code)]
        raise
    if "request" not in metadata:
        legal = "objective, return and so on"
        raise invalid([FieldError("", f"the header's metadata must hold `request`, JSON: {{items: [{{{legal}}}]}}", "missing")])
    return tensors, metadata["request"]


def _by_item(tensors: Tensors, items: int) -> list[Tensors]:
    """The tensors of each item, by the number that their names begin with. Raises InvalidRequest if there is no such item."""
    by_item: list[Tensors] = [{} for _ in range(items)]
    errors = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) >= items:
            last = f" to {items - 1}" if items > 1 else ""
            detail = f"the tensor {shown(name)!r} belongs to no item: names are i/NAME, i from 0{last}{_meant(name)}"
            errors.append(FieldError(f"/items/{match[1]}" if match else "/items", detail, "unknown_tensor", got=name))
        else:
            by_item[int(match[1])][match[2]] = tensor
    if errors:
        raise invalid(errors)
    return by_item


def _meant(name: str) -> str:
    return did_you_mean(name, [f"0/{tensor}" for tensor in TAKEN])


def _with_batch(raw: Any, tensors: Tensors, index: int) -> Any:
    if not isinstance(raw, dict):
        return raw
    if "batch" in raw:
        detail = f"in safetensors the batch is sent as tensors, {index}/log_probs and so on"
        raise invalid([FieldError(f"/items/{index}/batch", detail, "unknown_key")])
    return {**raw, "batch": tensors}


# ---------------------------------------------------------------- one item


def _sound(request: _Request, item: LossItem, index: int) -> tuple[dict[str, Any], Tensors]:
    """The item for the work order, and its tensors. Raises InvalidRequest with all errors."""
    sent = item.batch.sent()
    log_probs = sent["log_probs"]
    dtype = request.dtype or (DTYPES.get(log_probs.dtype, "float32") if isinstance(log_probs, Tensor) else "float64")
    batch = shapes.check(item.batch, "f" if dtype == "float32" else "d")
    if errors := batch.errors + needs.missing(item.objective, sent):
        raise invalid([replace(error, pointer=f"/items/{index}/batch{error.pointer}") for error in errors])
    objective, warnings = needs.resolved(item.objective, sent)
    if batch.layout == "padded" and "response_mask" not in sent:
        warnings.append("log_probs is padded and no response_mask came: every position counts")
    entry = {
        "index": index,
        "objective": objective,
        "dtype": dtype,
        "layout": batch.layout,
        "return": list(dict.fromkeys(item.returns)),
        "on_nonfinite": item.on_nonfinite or request.on_nonfinite,
        "on_singleton": item.on_singleton,
        "seed": item.seed,
        "warnings": warnings,
    }
    return entry, batch.tensors
