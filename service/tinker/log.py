"""From a request of the Tinker wire to an operation of a session. What is refused uses up its place all the same, and the
client is told in the answer: it goes on counting, and what it sends later must not wait for ever."""

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy.orm import Session

from service.edge.auth import Caller
from service.edge.context import Context
from service.errors import Conflict, FieldError, InvalidRequest, NotFound
from service.jobs import lifecycle
from service.sessions.body import AdamStep
from service.sessions.codec import pack
from service.store import tinker
from service.store.operations import ORDERED, Asked
from service.store.tables import Operation
from service.store.tinker import Run
from service.tinker import paths
from service.tinker.requests import TTL, AdamParams, LoadWeights, OptimStep, SaveWeights
from service.tinker.tickets import Ticket
from service.validation import below, invalid, parse

REFUSED = "refused"  # an operation that does nothing but fail, with the error in its head
EPHEMERAL_S = 86_400  # weights that were saved for one sampling client are deleted after a day


def append(
    context: Context,
    caller: Caller,
    job_id: str,
    make: Callable[[], Asked],
    *,
    seq: int,
    lane: str = ORDERED,
    also: Callable[[Session], None] | None = None,
) -> str:
    """Log the operation that `make` builds; if that raises InvalidRequest or NotFound, one that is refused. Returns its id."""
    with_rows = None if also is None else lambda session, _: also(session)

    def log(asked: Asked) -> list[Operation]:
        return lifecycle.append_operations(
            context.store, context.doorbell, context.settings, caller.project, job_id, [asked], also=with_rows
        )

    try:
        try:
            rows = log(make())
        except (InvalidRequest, NotFound) as error:  # if it is not of `make`, logging this raises it, too
            rows = log(Asked(REFUSED, seq, pack({"kind": REFUSED, "error": _error(error)}, {}), lane=lane))
    except Conflict as error:
        raise InvalidRequest(error.detail, code=error.code, hint=error.hint) from error
    [row] = rows
    if lane == ORDERED and row.kind != REFUSED and row.status == "waiting":  # it is asked for next
        context.polled.put((caller.project, str(Ticket(operation_id=row.id))), (job_id, row.id))
    return row.id


def _error(error: InvalidRequest | NotFound) -> dict[str, Any]:
    said: dict[str, Any] = {"code": error.code, "detail": error.detail, "category": "user"}
    if error.hint:
        said["hint"] = error.hint
    if isinstance(error, InvalidRequest) and error.errors:
        said |= {"pointer": error.errors[0].pointer, "code": error.errors[0].code}
    return said


def model(context: Context, caller: Caller, model_id: str) -> tuple[Run, str]:
    """The model and its session's job id. Raises NotFound, and InvalidRequest for a copy, which cannot be trained."""
    with context.store.look() as connection:
        row = tinker.run(connection, caller.project, model_id)
    if row.job_id is None:
        raise InvalidRequest(f"{model_id} is a copy of weights; it cannot be trained", code="not_trainable")
    return row, row.job_id


# ---------------------------------------------------------------- what is logged


def optim_step(sent: OptimStep) -> Asked:
    if sent.optimizer_params is not None:
        raise not_adam("/optimizer_params/type", sent.optimizer_params)
    with below("/adam_params"):
        adam = parse(AdamParams, sent.adam_params or {})
    step = {
        "learning_rate": adam.learning_rate,
        "betas": (adam.beta1, adam.beta2),
        "eps": adam.eps,
        "weight_decay": adam.weight_decay,
        "max_grad_norm": adam.grad_clip_norm or None,
    }
    with below("/adam_params"):
        optimizer = parse(AdamStep, step)
    return Asked("optim_step", sent.seq_id, pack({"kind": "optim_step", "optimizer": optimizer.model_dump(mode="json")}, {}))


def not_adam(pointer: str, config: Any) -> InvalidRequest:
    kind = config.get("type") if isinstance(config, dict) else getattr(config, "type", config)
    detail = f"the optimizer {str(kind)[:60]!r} is not offered here; use adamw (AdamParams), the default"
    return invalid([FieldError(pointer, detail, "optimizer_not_offered", str(kind)[:60], ["adamw"])])


def save(sent: SaveWeights, name: str, purpose: str, *, ttl_s: float | None) -> Asked:
    """`name`: as it is stored."""
    head = {
        "kind": "save_checkpoint",
        "name": name,
        "purpose": purpose,
        "ttl_s": ttl_s,
        "overwrite": sent.overwrite,
        "metadata": sent.user_metadata or {},
    }
    return Asked("save_checkpoint", sent.seq_id, pack(head, {}))


def ttl_s(sent: SaveWeights) -> float | None:
    """Raises InvalidRequest."""
    return None if sent.ttl_seconds is None else float(parse(TTL, sent.ttl_seconds, "/ttl_seconds"))


def name_of(sent: SaveWeights, prefix: str = "") -> str:
    """The stored name; the seq if the client gives none. Raises InvalidRequest."""
    return prefix + (f"{sent.seq_id:06d}" if sent.path is None else paths.checked_name(sent.path))


def load(sent: LoadWeights) -> Asked:
    """The path is looked up once, when this is logged: what has its name may be overwritten before it is sent again."""
    assert sent.seq_id is not None
    path = paths.parse(sent.path, "/path")
    head = {"kind": "load_checkpoint", "checkpoint": str(path), "optimizer": sent.optimizer}

    def lookup(session: Session, project: str) -> bytes:
        _, row = paths.resolve(session, project, path)
        return pack({**head, "checkpoint": row.id}, {})

    return Asked("load_checkpoint", sent.seq_id, pack(head, {}), lookup=lookup)


def integers(values: Sequence[Any], pointer: str, least: int = 0) -> list[int]:
    """Raises InvalidRequest unless all are integers of 31 bits, none below `least`."""
    if not all(type(value) is int and least <= value < 2**31 for value in values):
        wrong = next(i for i, value in enumerate(values) if not (type(value) is int and least <= value < 2**31))
        detail = f"must be an integer from {least} to {2**31 - 1}, got {str(values[wrong])[:40]!r}"
        raise invalid([FieldError(f"{pointer}/{wrong}", detail, "invalid")])
    return list(values)
