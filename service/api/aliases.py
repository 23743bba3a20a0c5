"""Aliases: names such as digits@production that point at a checkpoint, promoted, rolled back and deleted (docs/aliases.md)."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from service.edge.auth import Caller, CallerDep
from service.edge.bodies import DocumentDep, OptionalDocumentDep, documented
from service.edge.context import ContextDep
from service.edge.idempotency import IdempotencyKeyDep, once
from service.edge.pages import Page, PageQuery
from service.edge.problems import BODY, responses
from service.edge.router import Router
from service.spec.aliases import wrong_alias
from service.spec.section import Section
from service.store import aliases, checkpoints, clock, keys
from service.store.aliases import Wish
from service.store.tables import Alias, AliasChange
from service.validation import invalid, parse

router = Router(prefix="/v1/aliases", tags=["aliases"])

EXPECTED = r"^(ckpt_[0-9a-z]+|none)$"
Expected = Annotated[
    str | None,
    Field(
        pattern=EXPECTED,
        description="the checkpoint that it must point at now, none: that it must not exist; else 409 alias_moved, "
        "unless it points at what is promoted. "
        "Default: whatever",
    ),
]
Note = Annotated[str | None, Field(max_length=1000, description="why, for people: it stands in the history")]
Action = Literal["promote", "rollback", "delete"]


class PromoteRequest(Section):
    """What the alias shall point at."""

    checkpoint: Annotated[
        str, Field(min_length=1, max_length=128, description="ckpt_..., or another alias: what that points at now")
    ]
    expected: Expected = None
    note: Note = None


class RollbackRequest(Section):
    """On which condition to roll back, and why."""

    expected: Expected = None
    note: Note = None


class DeleteAliasQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    expected: Expected = None
    note: Note = None


class AliasView(BaseModel):
    """A name that points at one checkpoint."""

    id: Annotated[str, Field(description="MODEL@ALIAS, for example digits@production")]
    object: Literal["alias"] = "alias"
    checkpoint_id: Annotated[str, Field(description="what it points at")]
    job_id: Annotated[str | None, Field(description="the checkpoint's job or session; null when that was deleted")]
    step: Annotated[int, Field(description="of the checkpoint")]
    previous_id: Annotated[str | None, Field(description="the checkpoint that a rollback promotes")]
    version: Annotated[int, Field(description="how often it was changed: `seq` of the newest change")]
    note: Annotated[str | None, Field(description="of the newest change")]
    changed_at: datetime
    changed_by: Annotated[str | None, Field(description="the name of the key; sso:USER for who came by the sign-on proxy")]
    created_at: datetime

    @classmethod
    def read(cls, session: Session, project: str, *rows: Alias) -> list[Self]:
        changes = aliases.newest_changes(session, project, rows)
        at = checkpoints.by_id(session, [row.checkpoint_id for row in rows])
        names = keys.names(session, {change.key_id for change in changes.values()})
        views: list[Self] = []
        for row in rows:
            change, checkpoint = changes[row.name], at[str(row.checkpoint_id)]
            views.append(
                cls(
                    id=row.name,
                    checkpoint_id=checkpoint.id,
                    job_id=checkpoint.job_id,
                    step=checkpoint.step,
                    previous_id=row.previous_id,
                    version=row.version,
                    note=change.note,
                    changed_at=change.created_at,
                    changed_by=names.get(change.key_id),
                    created_at=row.created_at,
                )
            )
        return views


class AliasPage(Page[AliasView]):
    pass


class AliasChangeView(BaseModel):
    """One change of what an alias points at."""

    id: str
    object: Literal["alias.change"] = "alias.change"
    alias: str
    seq: Annotated[int, Field(description="1, 2, 3 ...")]
    action: Action
    from_checkpoint_id: Annotated[str | None, Field(description="what it pointed at before; null: nothing")]
    checkpoint_id: Annotated[str | None, Field(description="what it points at from then on; null: it was deleted")]
    note: str | None
    key_id: Annotated[str, Field(description="who")]
    key_name: Annotated[str | None, Field(description="the key's name; sso:USER for who came by the sign-on proxy")]
    created_at: datetime

    @classmethod
    def all(cls, rows: Sequence[AliasChange], names: dict[str, str]) -> list[Self]:
        columns = cls.model_fields.keys() - {"object", "key_name"}
        return [cls(**{name: getattr(row, name) for name in columns}, key_name=names.get(row.key_id)) for row in rows]


class AliasHistoryPage(Page[AliasChangeView]):
    pass


@router.get("")
def list_aliases(context: ContextDep, caller: CallerDep, query: Annotated[PageQuery, Query()]) -> AliasPage:
    """Aliases of the project, those made last first."""
    with context.store.begin(readonly=True) as session:
        rows, has_more = aliases.page(session, caller.project, after=query.after, limit=query.limit)
        views = AliasView.read(session, caller.project, *rows)
    return AliasPage.of(views, [row.name for row in rows], has_more)


@router.get("/{alias}", responses=responses(404))
def read_alias(context: ContextDep, caller: CallerDep, alias: str) -> AliasView:
    with context.store.begin(readonly=True) as session:
        return AliasView.read(session, caller.project, aliases.get(session, caller.project, alias))[0]


@router.get("/{alias}/history", responses=responses(404))
def read_alias_history(
    context: ContextDep, caller: CallerDep, alias: str, query: Annotated[PageQuery, Query()]
) -> AliasHistoryPage:
    """Its changes, newest first: who, when, from which checkpoint to which, and why. They stay when the alias is deleted."""
    with context.store.begin(readonly=True) as session:
        rows, has_more = aliases.history(session, caller.project, alias, after=query.after, limit=query.limit)
        names = keys.names(session, {row.key_id for row in rows})
    return AliasHistoryPage.of(AliasChangeView.all(rows, names), [row.id for row in rows], has_more)


@router.put(
    "/{alias}",
    response_model=AliasView,
    responses={201: {"model": AliasView, "description": "The alias is new."}, **responses(404, 409, *BODY)},
    openapi_extra=documented("PromoteRequest"),
)
def promote(
    context: ContextDep, caller: CallerDep, alias: str, document: DocumentDep, idempotency_key: IdempotencyKeyDep
) -> Any:
    """Let the alias point at a checkpoint, from the next request on. A new one is made; if it points there, nothing changes."""
    request = parse(PromoteRequest, document.data)
    if errors := wrong_alias("/path/alias", alias):
        raise invalid(errors)
    with once(
        context.store, caller, idempotency_key, route=f"PUT /v1/aliases/{alias}"[:128], body_sha256=document.sha256
    ) as turn:
        if turn.replay is not None:
            return turn.replay
        with context.store.begin() as session:
            wish = _wish(session, caller, request)
            row, made = aliases.promote(session, caller.project, alias, request.checkpoint, wish)
            [view] = AliasView.read(session, caller.project, row)
            turn.complete(session, view, 201 if made else 200)
    return Response(view.model_dump_json(), 201 if made else 200, media_type="application/json")


@router.post(
    "/{alias}/rollback",
    response_model=AliasView,
    responses=responses(404, 409, *BODY),
    openapi_extra=documented("RollbackRequest", required=False),
)
def roll_back(
    context: ContextDep, caller: CallerDep, alias: str, document: OptionalDocumentDep, idempotency_key: IdempotencyKeyDep
) -> Any:
    """Promote the checkpoint that it pointed at before. Repeated, it goes further back."""
    request = parse(RollbackRequest, document.data)
    route = f"POST /v1/aliases/{alias}/rollback"
    with once(context.store, caller, idempotency_key, route=route[:128], body_sha256=document.sha256) as turn:
        if turn.replay is not None:
            return turn.replay
        with context.store.begin() as session:
            wish = _wish(session, caller, request)
            row = aliases.rollback(session, caller.project, alias, wish)
            [view] = AliasView.read(session, caller.project, row)
            turn.complete(session, view, 200)
    return Response(view.model_dump_json(), media_type="application/json")


@router.delete("/{alias}", status_code=204, response_class=Response, responses=responses(404, 409))
def delete_alias(context: ContextDep, caller: CallerDep, alias: str, query: Annotated[DeleteAliasQuery, Query()]) -> None:
    """Delete an alias. Its checkpoint stays, as long as its job's retention says; its history stays, too."""
    with context.store.begin() as session:
        aliases.delete(session, caller.project, alias, _wish(session, caller, query))


def _wish(session: Session, caller: Caller, asked: PromoteRequest | RollbackRequest | DeleteAliasQuery) -> Wish:
    return Wish(key_id=caller.key_id, now=clock.now(session), note=asked.note, expected=asked.expected)
