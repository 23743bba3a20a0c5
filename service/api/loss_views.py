"""The models of loss requests and answers for openapi.json. They do not parse or write the bodies themselves."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.api.examples import LOSS_REQUEST
from service.losses.batch import TAKEN
from service.losses.intake import JSON, TENSORS


class LossTicket(BaseModel):
    """A request that is not answered yet."""

    object: Literal["loss_request"] = "loss_request"
    id: str
    status: Literal["queued"] = "queued"
    url: Annotated[str, Field(description="where to fetch the answer; with `Prefer: wait=S` it is held until then")]
    expires_at: Annotated[datetime, Field(description="until then; there is nothing to be found afterwards")]


class LossError(BaseModel):
    """Why an item was not computed."""

    model_config = ConfigDict(extra="allow")

    code: str
    pointer: Annotated[str, Field(description="JSON pointer into the request; of tensors as if they stood in the batch")]
    detail: str
    got: Any = None
    allowed: Any = None


class LossResult(BaseModel):
    """One item's answer. The outputs that `return` names are further members; in safetensors they are tensors `i/NAME`."""

    model_config = ConfigDict(extra="allow")

    index: int
    status: Literal["ok", "error"]
    loss: Annotated[float | str | None, Field(description="of all rows; not finite: a string")] = None
    metrics: Annotated[dict[str, float | str] | None, Field(description="of the item alone, whatever it was merged with")] = (
        None
    )
    gradients: Annotated[dict[str, Any] | None, Field(description="of the loss, with respect to log_probs")] = None
    warnings: Annotated[list[str] | None, Field(description="settings that are valid but probably a mistake")] = None
    nonfinite_rows: Annotated[list[int] | None, Field(description="rows that were left out, or have no finite loss")] = None
    error: LossError | None = None
    errors: Annotated[list[LossError] | None, Field(description="all of them, where there are several")] = None


class LossResults(BaseModel):
    """The items' answers, in order."""

    object: Literal["list"] = "list"
    data: list[LossResult]


# ---------------------------------------------------------------- documentation

BINARY = {"type": "string", "format": "binary"}
TENSORS_SENT = BINARY | {
    "description": "A safetensors file. Item i's batch is its tensors `i/NAME`: flat [N] with `i/cu_seqlens` [B + 1], or "
    "padded [B, T]; "
    + ", ".join(f"{name} ({', '.join(dtypes)})" for name, dtypes in TAKEN.items())
    + ". Everything else of a LossRequest stands as JSON in the header's `__metadata__`, under `request`."
}
TENSORS_ANSWERED = BINARY | {
    "description": "A safetensors file: LossResults as JSON in the header's `__metadata__`, under `response`, and tensors "
    "`i/NAME` in the layout that was sent: `i/gradients/log_probs`, `i/ratio` and so on."
}
SENT = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {"schema": {"$ref": "#/components/schemas/LossRequest"}, "example": LOSS_REQUEST},
            TENSORS: {"schema": TENSORS_SENT},
        },
    }
}
ANSWERED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "At least one item was computed.",
        "content": {JSON: {"schema": {"$ref": "#/components/schemas/LossResults"}}, TENSORS: {"schema": TENSORS_ANSWERED}},
        "headers": {"Preference-Applied": {"description": "`wait`, where it was waited for", "schema": {"type": "string"}}},
    },
    202: {
        "description": "Not answered yet.",
        "content": {JSON: {"schema": {"$ref": "#/components/schemas/LossTicket"}}},
        "headers": {
            "Location": {"description": "where to fetch the answer", "schema": {"type": "string"}},
            "Retry-After": {"description": "seconds", "schema": {"type": "string"}},
        },
    },
}
