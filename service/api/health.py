"""Whether the service lives, and whether it can work. No key is asked for: nothing here is anybody's data."""

from collections.abc import Callable
from time import perf_counter
from typing import Annotated, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field
from sqlalchemy import select
from starlette.responses import JSONResponse

from service.edge.context import Context, ContextDep
from service.store import clock, workers
from service.store.tables import ApiKey

router = APIRouter(tags=["health"])

RETRY_AFTER_S = "5"


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class Check(BaseModel):
    ok: bool
    detail: Annotated[str | None, Field(description="what is wrong")] = None
    took_s: float


class WorkersCheck(BaseModel):
    alive: Annotated[int, Field(description="workers that were seen within the last minute")]
    detail: str | None = None


class Ready(BaseModel):
    """The service is ready if it reaches the database and Redis. Workers may come later: jobs wait for them."""

    status: Literal["ready", "unavailable"]
    database: Check
    redis: Check
    workers: WorkersCheck | None


@router.get("/livez")
async def livez() -> Alive:
    """The process answers."""
    return Alive()


@router.get("/readyz", response_model=Ready, responses={503: {"model": Ready, "description": "Something is away."}})
def readyz(context: ContextDep) -> Response:
    """Whether requests can be served: 200 or 503, and why."""
    database = _check(lambda: _ask_database(context), "the database does not answer, or was not migrated")
    redis = _check(context.doorbell.ping, "Redis does not answer")
    ready = database.ok and redis.ok
    answer = Ready(
        status="ready" if ready else "unavailable",
        database=database,
        redis=redis,
        workers=_workers(context) if database.ok else None,
    )
    return JSONResponse(answer.model_dump(mode="json"), 200 if ready else 503, {} if ready else {"Retry-After": RETRY_AFTER_S})


def _check(ask: Callable[[], bool], otherwise: str) -> Check:
    started = perf_counter()
    try:
        ok = ask()
    except Exception:  # the failing part logs the reason; here only the fact is reported
        ok = False
    return Check(ok=ok, detail=None if ok else otherwise, took_s=round(perf_counter() - started, 4))


def _ask_database(context: Context) -> bool:
    with context.store.begin(readonly=True) as session:
        session.execute(select(ApiKey.id).limit(1))
    return True


def _workers(context: Context) -> WorkersCheck:
    with context.store.begin(readonly=True) as session:
        alive = [worker for worker in workers.alive(session, clock.now(session)) if not worker.draining]
    trains = any(worker.resource_classes for worker in alive)  # others answer loss requests only
    return WorkersCheck(
        alive=len(alive), detail=None if trains else "no worker for jobs was seen lately: they wait in the queue"
    )
