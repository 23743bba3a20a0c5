"""The dry run: everything that can be checked before a job is queued. Nothing is stored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from service.api.examples import JOB_SPEC
from service.edge.auth import Caller, CallerDep
from service.edge.bodies import DocumentDep, documented
from service.edge.context import Context, ContextDep
from service.edge.problems import BODY, responses
from service.edge.router import Router
from service.jobs.resolve import Resolved
from service.rewards.preview import Preview, run_preview
from service.rewards.references import resolve_and_read
from service.spec.job import JobSpec
from service.validation import parse

router = Router(prefix="/v1", tags=["jobs"])

PREVIEW_ROWS = 4
PREVIEW_TIMEOUT_S = 20.0


class ProbeView(BaseModel):
    """An answer that was tried on the graders."""

    kind: Annotated[Literal["right", "near", "wrong", "stand_in"], Field(description="stand_in: no right answer is known")]
    answer: str
    made: Annotated[str, Field(description="how it was made from the reference")]
    total: Annotated[float | None, Field(description="the reward; null: a grader could not grade it")]
    scores: Annotated[dict[str, float | None], Field(description="by grader; near and wrong answers are not sent to http ones")]
    errors: dict[str, str]


class SampleView(BaseModel):
    """A row's prompt, and the graders' scores for the row's own right answer."""

    prompt: Annotated[str | list[dict[str, Any]], Field(description="text, or chat messages")]
    reference: Annotated[str | None, Field(description="the right answer, where the spec says what it is")]
    learns: Annotated[list[str] | None, Field(description="the texts that a supervised job learns from the row")] = None
    graded: Annotated[dict[str, Any] | None, Field(description="total and scores of the right answer")]
    errors: list[str]
    probes: Annotated[list[ProbeView], Field(description="what the graders would pay for right, near and wrong answers")] = []


class DryRun(BaseModel):
    """The job that this spec would create."""

    object: Literal["dry_run"] = "dry_run"
    spec: Annotated[dict[str, Any], Field(description="every default filled in, the objective as its axes")]
    spec_sha256: str
    data_sha256: str
    estimates: dict[str, Any]
    samples: list[SampleView]
    warnings: Annotated[list[str], Field(description="settings that are valid but probably a mistake")]


@router.post("/jobs:validate", responses=responses(*BODY), openapi_extra=documented("JobSpec", JOB_SPEC))
async def validate_job(context: ContextDep, caller: CallerDep, document: DocumentDep) -> DryRun:
    """Check and resolve a spec, and grade the right answers of its first rows; nothing is stored or queued."""
    async with context.checks.turn(caller.key_id):
        resolved = await run_in_threadpool(_resolve, context, caller, document.data)
    async with context.previews.turn(caller.key_id):
        # Graders run code of a spec's choice: in a process with a time limit.
        preview = await run_in_threadpool(_preview, context, resolved)
    return DryRun(
        spec=resolved.spec,
        spec_sha256=resolved.spec_sha256,
        data_sha256=resolved.data_sha256,
        estimates=resolved.estimates,
        samples=[SampleView(**sample) for sample in preview.samples],
        warnings=[*resolved.warnings, *preview.warnings],
    )


def _resolve(context: Context, caller: Caller, sent: Any) -> Resolved:
    return resolve_and_read(context.store, context.settings, caller.project, parse(JobSpec, sent))


def _preview(context: Context, resolved: Resolved) -> Preview:
    return run_preview(
        resolved.spec,
        dataset_paths=resolved.dataset_paths,
        secrets=context.settings.grader_secrets,
        networks=context.settings.grader_networks,
        rows=PREVIEW_ROWS,
        timeout_s=PREVIEW_TIMEOUT_S,
    )
