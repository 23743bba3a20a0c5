"""Routes of the Tinker wire about training runs and their checkpoints."""

import hmac
import os
import shutil
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import Request, Response
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.edge.auth import Caller, CallerDep
from service.edge.bodies import DocumentDep, OptionalDocumentDep
from service.edge.context import Context, ContextDep
from service.edge.downloads import Download
from service.edge.problems import files_missing
from service.edge.router import Router
from service.errors import FieldError, InvalidRequest, NotFound
from service.ids import new_id
from service.jobs.discard import discard
from service.states import Status
from service.store import checkpoints, clock, jobs, keys, tinker
from service.store.tables import Checkpoint, TinkerModel, TinkerSession
from service.tinker import base_models, paths
from service.tinker.clients import page, texts
from service.tinker.face import PREFIX
from service.tinker.paths import TinkerPath
from service.tinker.requests import CopyWeights, OfPath, SetTtl
from service.validation import invalid, parse

router = Router(prefix=PREFIX, include_in_schema=False)

URL_S = 3600  # how long a file's URL is valid
OF_CHECKPOINT = "/training_runs/{model_id}/checkpoints/{kind}/{name}"


# ---------------------------------------------------------------- training runs


@router.get("/training_runs")
def list_training_runs(context: ContextDep, caller: CallerDep, limit: int = 20, offset: int = 0) -> dict[str, Any]:
    limit, offset = page(limit, offset)
    with context.store.begin(readonly=True) as session:
        found = tinker.listed(session, TinkerModel, caller.project, offset=offset, limit=limit)
        runs = [_run(session, model) for model in found.rows]
    return {"training_runs": runs, "cursor": {"offset": offset, "limit": limit, "total_count": found.total}}


@router.get("/training_runs/{model_id}")
def read_training_run(context: ContextDep, caller: CallerDep, model_id: str) -> dict[str, Any]:
    with context.store.begin(readonly=True) as session:
        return _run(session, tinker.get(session, TinkerModel, caller.project, model_id))


def _run(session: Session, model: TinkerModel) -> dict[str, Any]:
    job = None if model.job_id is None else jobs.find(session, model.job_id)
    shown = tinker.checkpoints_of(session, model)
    adapter = job.spec["model"]["adapter"] if job is not None else shown[0].model["adapter"] if shown else {"kind": "lora"}
    newest = {kind: next((row for row in shown if row.purpose == kind), None) for kind in ("training", "sampler")}
    return {
        "training_run_id": model.id,
        "base_model": model.base_model,
        "model_owner": model.project,
        "is_lora": adapter["kind"] == "lora",
        "lora_rank": adapter.get("rank"),
        "corrupted": job is not None and job.status == Status.FAILED,
        "last_request_time": model.created_at if job is None else job.updated_at,
        "last_checkpoint": newest["training"] and view(model, newest["training"]),
        "last_sampler_checkpoint": newest["sampler"] and view(model, newest["sampler"]),
        "user_metadata": texts(model.user_metadata),
    }


# ---------------------------------------------------------------- checkpoints


def view(model: TinkerModel, row: Checkpoint) -> dict[str, Any]:
    assert row.name is not None
    path = paths.path_of(model.id, row.purpose, row.name)
    return {
        "checkpoint_id": f"{path.kind}/{path.name}",
        "checkpoint_type": paths.KINDS[path.kind][0],
        "time": row.created_at,
        "tinker_path": str(path),
        "size_bytes": row.size_bytes,
        "public": row.id in model.published,
        "user_metadata": texts(row.user_metadata or {}),
        "expires_at": row.expires_at,
        "base_model": model.base_model,
    }


@router.get("/training_runs/{model_id}/checkpoints")
def list_checkpoints(context: ContextDep, caller: CallerDep, model_id: str) -> dict[str, Any]:
    with context.store.begin(readonly=True) as session:
        model = tinker.get(session, TinkerModel, caller.project, model_id)
        return {"checkpoints": [view(model, row) for row in tinker.checkpoints_of(session, model)]}


@router.get("/checkpoints")
def list_all_checkpoints(context: ContextDep, caller: CallerDep, limit: int = 100, offset: int = 0) -> dict[str, Any]:
    limit, offset = page(limit, offset)
    with context.store.begin(readonly=True) as session:
        found = tinker.checkpoints_of_project(session, caller.project, offset=offset, limit=limit)
        models = tinker.models_with(session, found.rows)
    shown = [view(models[row.id], row) for row in found.rows]
    return {"checkpoints": shown, "cursor": {"offset": offset, "limit": limit, "total_count": found.total}}


@router.post("/weights_info")
def weights_info(context: ContextDep, caller: CallerDep, document: DocumentDep) -> dict[str, Any]:
    """What a checkpoint is made of."""
    with context.store.begin(readonly=True) as session:
        path = paths.parse(parse(OfPath, document.data).tinker_path, "/tinker_path")
        model, row = paths.resolve(session, caller.project, path)
    adapter = row.model["adapter"]
    lora = adapter["kind"] == "lora"
    parts = base_models.trained_parts(adapter["target_modules"]) if lora else {}
    about = {"base_model": model.base_model, "is_lora": lora, "lora_rank": adapter.get("rank")}
    return {**about, **parts, "optimizer_config": {"type": "adamw"}}


def _found(session: Session, caller: Caller, model_id: str, kind: str, name: str) -> tuple[TinkerModel, Checkpoint]:
    if kind not in paths.KINDS:
        raise NotFound(f"there are no checkpoints of the kind {kind[:40]!r}; known are {', '.join(paths.KINDS)}")
    return paths.resolve(session, caller.project, TinkerPath(model_id, kind, name))


@router.delete(OF_CHECKPOINT, status_code=204)
def delete_checkpoint(context: ContextDep, caller: CallerDep, model_id: str, kind: str, name: str) -> Response:
    """Its path is free at once. Its files stay as long as a session that has not ended needs them."""
    with context.store.begin(readonly=True) as session:
        _, row = _found(session, caller, model_id, kind, name)
        now = clock.now(session)
        promoted = " and ".join(checkpoints.aliases(session, [row.id]).get(row.id, []))
    kept = discard(context.store, context.doorbell, [row.id], now, by_hand=True)[1].get(row.id)
    if kept == "pinned":
        raise InvalidRequest(f"checkpoint {row.id} is pinned; unpin it first", code="checkpoint_pinned")
    if kept == "aliased":
        detail = f"checkpoint {row.id} is what {promoted or 'an alias'} points at; promote another one, or delete the alias"
        raise InvalidRequest(detail, code="checkpoint_aliased")
    return Response(status_code=204)


@router.put(f"{OF_CHECKPOINT}/ttl", status_code=204)
def set_ttl(
    context: ContextDep, caller: CallerDep, model_id: str, kind: str, name: str, document: OptionalDocumentDep
) -> Response:
    """Counted from now; null: it never expires."""
    ttl_s = parse(SetTtl, document.data).ttl_seconds
    with context.store.begin() as session:
        _, row = _found(session, caller, model_id, kind, name)
        row.expires_at = None if ttl_s is None else clock.now(session) + timedelta(seconds=ttl_s)
    return Response(status_code=204)


@router.post(f"{OF_CHECKPOINT}/publish", status_code=204)
def publish(context: ContextDep, caller: CallerDep, model_id: str, kind: str, name: str) -> Response:
    """A mark that lists show. Nobody outside of the project can read a checkpoint, published or not."""
    return _mark(context, caller, model_id, kind, name, public=True)


@router.delete(f"{OF_CHECKPOINT}/publish", status_code=204)
def unpublish(context: ContextDep, caller: CallerDep, model_id: str, kind: str, name: str) -> Response:
    return _mark(context, caller, model_id, kind, name, public=False)


def _mark(context: Context, caller: Caller, model_id: str, kind: str, name: str, *, public: bool) -> Response:
    with context.store.begin() as session:
        model, row = _found(session, caller, model_id, kind, name)
        model.published = [each for each in model.published if each != row.id] + [row.id] * public
    return Response(status_code=204)


# ---------------------------------------------------------------- files


@router.get(f"{OF_CHECKPOINT}/external_weights_urls")
def external_weights_urls(
    request: Request, context: ContextDep, caller: CallerDep, model_id: str, kind: str, name: str
) -> dict[str, Any]:
    """A URL for each file of the checkpoint: a plain folder of peft or transformers. They need no key, and hold for an hour."""
    with context.store.begin(readonly=True) as session:
        _, row = _found(session, caller, model_id, kind, name)
        secret = keys.sha256_of(session, caller.key_id)
    folder = context.store.blobs.fetch(row.path)
    if secret is None:
        raise InvalidRequest("URLs are signed with an API key: ask for them with one", code="not_offered")
    try:
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    except FileNotFoundError:  # it is deleted at this moment
        files = []
    if not files:
        raise files_missing(f"checkpoint {row.id}")
    until = int(datetime.now(UTC).timestamp()) + URL_S
    base = f"{str(request.base_url).rstrip('/')}{PREFIX}/files/{row.id}"
    urls = {}
    for file in files:
        signature = _signed(secret, row.id, file, until)
        urls[file] = f"{base}/{quote(file)}?key={caller.key_id}&until={until}&signature={signature}"
    return {"urls": urls, "expires": datetime.fromtimestamp(until, UTC)}


@router.get("/files/{checkpoint_id}/{file:path}")
def download_file(context: ContextDep, checkpoint_id: str, file: str, key: str, until: int, signature: str) -> Download:
    """One file, by a URL that `external_weights_urls` signed with the key of who asked for it."""
    with context.store.begin(readonly=True) as session:
        secret = keys.sha256_of(session, key)
        row = session.get(Checkpoint, checkpoint_id)
        expected = "" if secret is None else _signed(secret, checkpoint_id, file, until)
        valid = hmac.compare_digest(signature.encode(), expected.encode()) and expected != ""
        if not valid or until < datetime.now(UTC).timestamp():
            raise NotFound("this URL is not valid, or not any more; ask for another one", code="url_expired")
        if row is None or row.deleted_at is not None or row.project != keys.project_of(session, key):
            raise NotFound("this checkpoint was deleted")
    context.store.blobs.fetch(row.path)
    path = context.store.blobs.path(f"{row.path}/{file}")
    if not path.is_file():
        raise files_missing(f"checkpoint {checkpoint_id}")
    return Download(path, media_type="application/octet-stream", filename=Path(file).name)


def _signed(secret: str, checkpoint_id: str, file: str, until: int) -> str:
    return hmac.new(secret.encode(), f"{checkpoint_id}\n{file}\n{until}".encode(), sha256).hexdigest()


@router.post("/copy_weights")
def copy_weights(context: ContextDep, caller: CallerDep, document: DocumentDep) -> dict[str, Any]:
    """A copy under a training run of its own, which cannot be trained on. It shares the files, and outlives its source."""
    sent = parse(CopyWeights, document.data)
    if sent.destination_project_id not in (None, caller.project):
        raise NotFound(f"no project {sent.destination_project_id[:80]} for this key; its own is {caller.project}")
    with context.store.begin(readonly=True) as session:
        path = paths.parse(sent.source_path, "/source_path")
        origin, row = paths.resolve(session, caller.project, path)
        session_id, model_id = _destination(session, caller, sent)
        if tinker.find(session, TinkerModel, caller.project, model_id) is not None:
            return {"tinker_path": str(TinkerPath(model_id, path.kind, path.name))}
    copied, relative = _copy_files(context, row)
    try:
        with context.store.begin() as session:
            now = clock.now(session)
            columns = {column.key: getattr(row, column.key) for column in Checkpoint.__mapper__.column_attrs}
            expires_at = None if sent.ttl_seconds is None else now + timedelta(seconds=sent.ttl_seconds)
            changed = {"id": copied, "job_id": None, "path": relative, "created_at": now, "expires_at": expires_at}
            session.add(Checkpoint(**{**columns, **changed, "pinned_at": None}))
            if session_id is None:
                session_id, _, _ = model_id.partition(":")
                whose = {"id": session_id, "project": caller.project, "display_name": "copy of weights"}
                times = {"created_at": now, "seen_at": now, "finished_at": now}
                finish = {"type": "success", "detail": None}
                session.add(TinkerSession(**whose, **times, tags=[], user_metadata={}, finish=finish))
                session.flush()
            model = TinkerModel(
                id=model_id,
                project=caller.project,
                session_id=session_id,
                job_id=None,
                checkpoint_id=copied,
                base_model=origin.base_model,
                user_metadata={},
                published=[],
                created_at=now,
            )
            session.add(model)
    except IntegrityError:  # the same request came twice at once, unless it was something else
        context.store.blobs.delete(relative)
        with context.store.begin(readonly=True) as session:
            if tinker.find(session, TinkerModel, caller.project, model_id) is None:
                raise
    return {"tinker_path": str(TinkerPath(model_id, path.kind, path.name))}


def _copy_files(context: Context, row: Checkpoint) -> tuple[str, str]:
    """The id of a copy that has no row yet, and the path of its files, which are links to the same bytes."""
    blobs, copied = context.store.blobs, new_id("ckpt")
    relative = f"{row.path.rpartition('/')[0]}/{copied}"
    source, temporary = blobs.fetch(row.path), blobs.temporary_dir()
    try:
        shutil.copytree(source, temporary, copy_function=os.link, dirs_exist_ok=True)
    except (FileNotFoundError, shutil.Error):  # it may be deleted at this moment
        blobs.discard(temporary)
        raise files_missing(f"checkpoint {row.id}") from None
    blobs.commit_dir(temporary, relative)
    return copied, relative


def _destination(session: Session, caller: Caller, sent: CopyWeights) -> tuple[str | None, str]:
    """The client session that is there, if one is named, and the copy's model id."""
    if sent.session_id is None:
        return None, f"{new_id('tinker')}:train:0"
    if sent.model_seq_id is None:
        raise invalid([FieldError("/model_seq_id", "is missing: it goes with session_id", "missing")])
    return tinker.get(
        session, TinkerSession, caller.project, sent.session_id
    ).id, f"{sent.session_id}:train:{sent.model_seq_id}"
