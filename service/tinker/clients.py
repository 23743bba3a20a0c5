"""Routes of the Tinker wire with which a client begins, shows that it lives, and ends."""

from datetime import datetime, timedelta
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse

from service.edge.auth import CallerDep
from service.edge.bodies import DocumentDep
from service.edge.context import Context, ContextDep
from service.edge.router import Router
from service.errors import Conflict, InvalidRequest, NotFound
from service.ids import new_id
from service.jobs import lifecycle
from service.sessions.codec import pack
from service.states import FINAL
from service.store import clock, jobs, operations, tinker
from service.store.operations import Asked
from service.store.tables import TinkerModel, TinkerSampler, TinkerSession
from service.tinker import base_models
from service.tinker.face import PREFIX
from service.tinker.requests import CreateSession, FinishSession, OfSession, SearchSessions
from service.validation import parse

router = Router(prefix=PREFIX, include_in_schema=False)

# How its client library behaves with this server; what is not named is at the library's own default.
CONFIG = {
    "pjwt_auth_enabled": False,
    "credential_default_source": "api_key",
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": True,
    "sample_use_retrieve_futures": False,
    "sample_join_sampling_session": False,
    "custom_loss_server_side": False,
}
DYNAMIC = {"refresh_interval_sec": 300, "sample_cancel_enabled": True}


@router.post("/client/config")
async def client_config(caller: CallerDep, document: DocumentDep) -> dict[str, Any]:
    return CONFIG


@router.post("/client/dynamic_config")
async def dynamic_config(caller: CallerDep, document: DocumentDep) -> dict[str, Any]:
    return DYNAMIC


@router.post("/telemetry")
async def telemetry(caller: CallerDep, document: DocumentDep) -> dict[str, Any]:
    """Taken and not kept."""
    return {"status": "accepted"}


@router.get("/healthz")
async def healthz() -> dict[str, Any]:
    return {"status": "ok"}


@router.get("/get_server_capabilities")
def capabilities(context: ContextDep, caller: CallerDep) -> dict[str, Any]:
    """The models that this server knows by name; hub ids and other folders may be named too."""
    return {
        "supported_models": [
            {"model_name": name, "max_context_length": length, "trainable": True, "sampleable": True}
            for name, length in base_models.offered(context.settings)
        ]
    }


# ---------------------------------------------------------------- sessions


@router.post("/create_session")
def create_session(context: ContextDep, caller: CallerDep, document: DocumentDep) -> dict[str, Any]:
    sent = parse(CreateSession, document.data)
    with context.store.begin() as session:
        now = clock.now(session)
        row = TinkerSession(
            id=new_id("tinker"),
            project=caller.project,
            display_name=sent.display_name,
            tags=sent.tags,
            user_metadata=sent.user_metadata or {},
            created_at=now,
            seen_at=now,
        )
        session.add(row)
    return {"type": "create_session", "session_id": row.id}


@router.post("/session_heartbeat")
def heartbeat(context: ContextDep, caller: CallerDep, document: DocumentDep) -> Response:
    """410, which ends the client's loop, for a session that was finished."""
    sent = parse(OfSession, document.data)
    with context.store.begin() as session:
        row = tinker.get(session, TinkerSession, caller.project, sent.session_id)
        if row.finished_at is not None:
            return JSONResponse({"detail": f"the session {row.id} was finished", "code": "session_over"}, 410)
        tinker.seen(session, row, clock.now(session))
    return JSONResponse({"type": "session_heartbeat"})


@router.post("/sessions/{session_id}/finish", status_code=204)
def finish_session(context: ContextDep, caller: CallerDep, session_id: str, document: DocumentDep) -> Response:
    """The first reason stays. Each of its models ends with a checkpoint; waiting operations are done before."""
    sent = parse(FinishSession, document.data)
    with context.store.begin() as session:
        row = tinker.get(session, TinkerSession, caller.project, session_id)
        how = {"type": sent.reason.type, "detail": sent.detail}
        ended = tinker.finish(session, row.id, how, clock.now(session))
        models = tinker.models_of(session, row.id) if ended else []
    for model in models:
        if model.job_id is not None:
            end(context, caller.project, model.job_id)
    return Response(status_code=204)


def end(context: Context, project: str, job_id: str) -> None:
    """Let a session succeed behind its last operation; if an operation before that never came, cancel it with a checkpoint."""
    with context.store.begin(readonly=True) as session:
        job = jobs.find(session, job_id, light=True)
        if job is None or job.status in FINAL:
            return
        seq = operations.next_seq(session, job_id)
        whole = operations.count(session, job_id) == seq - 1
    try:
        if whole:
            asked = Asked("finish", seq, pack({"kind": "finish"}, {}))
            lifecycle.append_operations(context.store, context.doorbell, context.settings, project, job_id, [asked])
        else:
            lifecycle.cancel(context.store, context.doorbell, project, job_id, save=True)
    except (Conflict, InvalidRequest, NotFound):  # it has ended meanwhile, or its client goes on after all
        return


@router.get("/sessions")
def list_sessions(context: ContextDep, caller: CallerDep, limit: int = 20, offset: int = 0) -> dict[str, Any]:
    limit, offset = page(limit, offset)
    with context.store.begin(readonly=True) as session:
        found = tinker.listed(session, TinkerSession, caller.project, offset=offset, limit=limit)
    cursor = {"offset": offset, "limit": limit, "total_count": found.total}
    return {"sessions": [row.id for row in found.rows], "cursor": cursor}


@router.post("/sessions/search")
def search_sessions(context: ContextDep, caller: CallerDep, document: DocumentDep) -> dict[str, Any]:
    """Sessions that match everything that is given, newest first. Of projects there is the key's own alone."""
    sent = parse(SearchSessions, document.data)
    where: list[Any] = [] if sent.session_id is None else [TinkerSession.id == sent.session_id]
    if sent.project_ids is not None and caller.project not in sent.project_ids:
        return {"sessions": []}
    found: list[TinkerSession] = []
    with context.store.begin(readonly=True) as session:
        since = clock.now(session) - timedelta(seconds=context.settings.tinker_silence_s)
        rows = tinker.listed(session, TinkerSession, caller.project, *where, offset=0, limit=10_000).rows
        behind = None if sent.cursor is None else sent.cursor.last_session_id
        for row in rows:
            if behind is not None:
                behind = None if row.id == behind else behind
            elif _matches(row, sent, since):
                found.append(row)
        shown = found[: sent.limit]
        summaries = [_summary(row, caller.project, since, tinker.named_count(session, row.id)) for row in shown]
    answer: dict[str, Any] = {"sessions": summaries}
    if len(found) > sent.limit:
        answer["next_cursor"] = {"last_created_at": shown[-1].created_at, "last_session_id": shown[-1].id}
    return answer


def _matches(row: TinkerSession, sent: SearchSessions, since: datetime) -> bool:
    name = (row.display_name or "").lower()
    if any(word not in name for word in (sent.display_name or "").lower().split()):
        return False
    if any(str(row.user_metadata.get(key)) != value for key, value in sent.user_metadata.items()):
        return False
    status = _status(row, since)
    if sent.statuses is None:
        return True
    return status is not None and any(
        status["type"] == wanted.type and (wanted.reasons is None or status.get("reason", {}).get("type") in wanted.reasons)
        for wanted in sent.statuses
    )


def _status(row: TinkerSession, since: datetime) -> dict[str, Any] | None:
    """Active: heard of since then."""
    if row.finish is not None:
        return {"type": "client_finished", "reason": {"type": row.finish["type"]}, "detail": row.finish.get("detail")}
    return {"type": "active"} if row.seen_at > since else None


def _summary(row: TinkerSession, project: str, since: datetime, counted: tuple[int, int]) -> dict[str, Any]:
    return {
        "session_id": row.id,
        "created_at": row.created_at,
        "owner": project,
        "project_id": project,
        "status": _status(row, since),
        "checkpoints_count": counted[0],
        "checkpoint_storage_bytes": counted[1],
        "display_name": row.display_name,
        "user_metadata": texts(row.user_metadata),
    }


@router.get("/sessions/{session_id}")
def read_session(context: ContextDep, caller: CallerDep, session_id: str) -> dict[str, Any]:
    with context.store.begin(readonly=True) as session:
        row = tinker.get(session, TinkerSession, caller.project, session_id)
        models: list[TinkerModel] = tinker.models_of(session, row.id)
        samplers: list[TinkerSampler] = tinker.samplers_of(session, row.id)
    return {
        "training_run_ids": [model.id for model in models],
        "sampler_ids": [sampler.id for sampler in samplers],
        "user_metadata": texts(row.user_metadata),
        "display_name": row.display_name,
    }


@router.put("/sessions/{session_id}/project")
def assign_project(context: ContextDep, caller: CallerDep, session_id: str) -> None:
    raise InvalidRequest("a session belongs to the project of its API key; it cannot be moved", code="not_offered")


@router.get("/sessions/{session_id}/trace_export")
def export_trace(context: ContextDep, caller: CallerDep, session_id: str) -> None:
    raise NotFound("traces are not offered; `ratchet watch` and GET /v1/jobs/{id}/metrics show what ran", code="not_offered")


def page(limit: int, offset: int) -> tuple[int, int]:
    """Within bounds."""
    return max(1, min(limit, 1000)), max(0, min(offset, 2**31))


def texts(metadata: dict[str, Any]) -> dict[str, str]:
    """As the wire has it: texts only."""
    return {str(key): value if isinstance(value, str) else str(value) for key, value in metadata.items()}
