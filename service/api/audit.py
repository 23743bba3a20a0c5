"""The audit log of a project: which key changed what, for keys of scope `admin`."""

from datetime import datetime
from typing import Annotated, Literal, Self

from fastapi import Query
from pydantic import BaseModel, Field

from service.api.keys import Project
from service.edge.auth import ADMIN_PROJECT, AdminDep
from service.edge.context import ContextDep
from service.edge.pages import Page, PageQuery
from service.edge.problems import responses
from service.edge.router import Router
from service.store import audit, keys
from service.store.tables import AuditEntry
from service.validation import below

router = Router(prefix="/v1/audit", tags=["keys"])

NOT_OURS = "another one's audit log is not shown"


class AuditView(BaseModel):
    """A change that a request made."""

    id: str
    object: Literal["audit.entry"] = "audit.entry"
    key_id: Annotated[str, Field(description="who")]
    key_name: Annotated[str | None, Field(description="the key's name; sso:USER for who came by the sign-on proxy")]
    action: Annotated[str, Field(description="what: method and route")]
    object_id: Annotated[str | None, Field(description="of what was changed or made; null: of several")]
    status: int
    request_id: Annotated[str, Field(description="the header X-Request-Id of the answer, which the service's log has, too")]
    created_at: datetime

    @classmethod
    def of(cls, row: AuditEntry, key_name: str | None) -> Self:
        columns = cls.model_fields.keys() - {"object", "key_name"}
        return cls(**{name: getattr(row, name) for name in columns}, key_name=key_name)


class AuditPage(Page[AuditView]):
    pass


class AuditQuery(PageQuery):
    key_id: Annotated[str | None, Field(max_length=40, description="only what this key did")] = None
    object_id: Annotated[str | None, Field(max_length=128, description="only what was done to this")] = None
    project: Annotated[Project | None, Field(description=f"another project, for keys of `{ADMIN_PROJECT}`")] = None


@router.get("", responses=responses(403))
def read_audit_log(context: ContextDep, caller: AdminDep, query: Annotated[AuditQuery, Query()]) -> AuditPage:
    """Changes that requests of the project made, newest first. Entries are kept for 400 days."""
    project = caller.managed(query.project, NOT_OURS)
    with context.store.begin(readonly=True) as session, below("/query"):
        rows, more = audit.page(
            session, project, key_id=query.key_id, object_id=query.object_id, after=query.after, limit=query.limit
        )
        names = keys.names(session, {row.key_id for row in rows})
    return AuditPage.of([AuditView.of(row, names.get(row.key_id)) for row in rows], [row.id for row in rows], more)
