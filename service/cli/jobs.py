"""Commands about jobs: submit, validate, jobs, show, watch, cancel, pause, resume, fork, delete."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ratchet_client import Ratchet, RatchetError
from ratchet_client.types import FINAL, Job, JobSummary, UsageTotals
from service.cli import exits
from service.cli.completion import complete_checkpoint_or_alias, complete_job, complete_status
from service.cli.connection import connect
from service.cli.dry_run import print_validation
from service.cli.helps import command
from service.cli.live import MANAGED, follow
from service.cli.operations import print_newest
from service.cli.output import (
    ago,
    clean,
    complain,
    duration,
    number,
    one_line,
    print_facts,
    print_json,
    print_table,
    say,
    shown,
    status_text,
)
from service.metric_names import EVAL_GREEDY_REWARD_MEAN, EVAL_LOSS, EVAL_REWARD_MEAN
from service.validation import core_yaml
from service.validation.words import counted

FACTS = {  # of job.resolved
    "device": "{}",
    "dtype": "{}",
    "architecture": "{}",
    "parameters": "{:,} parameters",
    "trainable_parameters": "{:,} of them trained",
    "revision": "revision {}",
}
EVALUATION = (EVAL_REWARD_MEAN, EVAL_GREEDY_REWARD_MEAN, EVAL_LOSS)

JobId = Annotated[str, typer.Argument(metavar="JOB", help="job_...", autocompletion=complete_job)]
SpecFile = Annotated[str, typer.Argument(metavar="FILE", help="a job spec in YAML or JSON; - reads standard input")]
Json = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="watch the job until it is over; the exit status says how it ended")
]


def register(app: typer.Typer) -> None:
    for function in (submit, validate, show, watch, pause, resume, cancel, fork, delete):
        command(app, function)
    command(app, list_jobs, "jobs")


def submit(context: typer.Context, file: SpecFile = "-", follow: Follow = False, as_json: Json = False) -> None:
    """Submit a job.

    $ ratchet submit job.yaml --follow && ./deploy
    $ cat job.json | ratchet submit - --json

    With --follow the exit status is 0 only when the job succeeded. With --json the job is printed, or with both its
    events, one a line.
    """
    with connect(context) as ratchet:
        _created(ratchet, ratchet.create_job(read_spec(file)), follow, as_json)


def validate(context: typer.Context, file: SpecFile = "-", as_json: Json = False) -> None:
    """Check a job spec without creating anything.

    $ ratchet validate job.yaml
    $ ratchet validate job.yaml --json | jq .spec

    Everything that can be known before the queue is checked, and all that is wrong is said at once. The answer is the
    spec with every default filled in, estimates, sample rows, and what each grader would pay for right, near and wrong
    answers to them.
    """
    with connect(context) as ratchet:
        validation = ratchet.validate_job(read_spec(file))
    if as_json:
        print_json(validation)
    else:
        print_validation(validation)


def list_jobs(
    context: typer.Context,
    status: Annotated[
        str | None,
        typer.Option(
            help="only jobs with this status: queued, running, paused, succeeded, failed, cancelled ...",
            autocompletion=complete_status,
        ),
    ] = None,
    kind: Annotated[str | None, typer.Option(help="only jobs of this kind: rl, supervised, session or sampler")] = None,
    tag: Annotated[str | None, typer.Option(help="only jobs with this tag")] = None,
    name: Annotated[str | None, typer.Option(help="only jobs with this text in their name")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="how many to list")] = 20,
    after: Annotated[str | None, typer.Option(help="continue after this job (the last id of a page)")] = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first.

    $ ratchet jobs --status running
    $ ratchet jobs --tag baseline --json | jq -r '.data[].id'
    """
    with connect(context) as ratchet:
        page = ratchet.list_jobs(status=status, kind=kind, tag=tag, name=name, after=after, limit=limit)  # pyright: ignore[reportArgumentType]
    if as_json:
        print_json(page)
        return
    rows = [
        (job["id"], one_line(job["name"], 40), job["kind"], status_text(job["status"]), progress(job), ago(job["created_at"]))
        for job in page["data"]
    ]
    print_table(("job", "name", "kind", "status", "step", "created"), rows, nothing="no jobs; `ratchet submit FILE` makes one")
    if page["has_more"]:
        complain(f"more: ratchet jobs --after {page['last_id']}")


def show(context: typer.Context, job_id: JobId, as_json: Json = False) -> None:
    """Show one job: where it stands, why it failed.

    $ ratchet show job_01k...
    $ ratchet show job_01k... --json | jq .resolved
    """
    with connect(context) as ratchet:
        job = ratchet.get_job(job_id)
        if as_json:
            print_json(job)
            return
        _print_job(job)
        if job["kind"] == "session":
            print_newest(ratchet, job_id)


def watch(context: typer.Context, job_id: JobId, as_json: Json = False) -> None:
    """Follow a job until it is over.

    $ ratchet watch job_01k...
    $ ratchet watch job_01k... --json | jq 'select(.type == "evaluation")'

    Shows progress, reward, clip fraction and KL as they move. The exit status follows the job; Ctrl-C leaves it running.
    A session that is idle is watched on.
    """
    with connect(context) as ratchet:
        _follow(ratchet, job_id, as_json)


Grace = Annotated[float | None, typer.Option(metavar="S", help="kill the worker if it takes longer than this many seconds")]


def pause(context: typer.Context, job_id: JobId, grace_seconds: Grace = None, as_json: Json = False) -> None:
    """Stop a job at its next step, with a checkpoint.

    `ratchet resume` goes on from there. A queued job rests at once.
    """
    with connect(context) as ratchet:
        _report(ratchet.pause_job(job_id, grace_seconds=grace_seconds), as_json)


def resume(
    context: typer.Context,
    job_id: JobId,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="the job's new budget: tokens sampled and trained in all, including those already spent"),
    ] = None,
    worker_s: Annotated[
        float | None, typer.Option(help="the job's new budget: seconds of a worker in all, including those already spent")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put a paused job back into the queue.

    One that rests because its budget is spent needs a larger one: --tokens, --worker-s.
    """
    given = {name: value for name, value in (("tokens", tokens), ("worker_s", worker_s)) if value is not None}
    with connect(context) as ratchet:
        _report(ratchet.resume_job(job_id, budget=given or None), as_json)


def cancel(
    context: typer.Context,
    job_id: JobId,
    save: Annotated[bool, typer.Option("--save", help="save a checkpoint first")] = False,
    grace_seconds: Grace = None,
    as_json: Json = False,
) -> None:
    """End a job for good.

    Its metrics and checkpoints are kept; `ratchet fork` makes a new job from them.
    """
    with connect(context) as ratchet:
        _report(ratchet.cancel_job(job_id, final_checkpoint="save" if save else None, grace_seconds=grace_seconds), as_json)


def fork(
    context: typer.Context,
    job_id: JobId,
    from_checkpoint: Annotated[
        str | None,
        typer.Option(
            help="the checkpoint to start from; default: the job's newest", autocompletion=complete_checkpoint_or_alias
        ),
    ] = None,
    changes: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="a file of YAML or JSON that is merged into the job's spec; - reads standard input"),
    ] = None,
    follow: Follow = False,
    as_json: Json = False,
) -> None:
    """Make a new job from a job's checkpoint.

    $ ratchet fork job_01k... --follow
    $ echo 'optimizer: {learning_rate: 1e-4}' | ratchet fork job_01k... --changes -

    The new job has the old one's spec, with --changes merged into it; null takes a key out.
    """
    spec = None if changes is None else parse_mapping(read_spec(changes), changes)
    with connect(context) as ratchet:
        _created(ratchet, ratchet.fork_job(job_id, from_checkpoint=from_checkpoint, spec=spec), follow, as_json)


def delete(
    context: typer.Context,
    job_id: JobId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask for confirmation")] = False,
) -> None:
    """Delete a job that is over.

    Its events, metrics and rollouts go with it. Its checkpoints stay.
    """
    with connect(context) as ratchet:
        if not yes:
            job = ratchet.get_job(job_id)
            typer.confirm(f"Delete {job_id} ({clean(job['name'])}) with its events, metrics and rollouts?", abort=True)
        ratchet.delete_job(job_id)
    say(f"{job_id} deleted")


# ---------------------------------------------------------------- reading and following


def read_spec(file: str) -> bytes:
    """The spec's bytes, unparsed. The service parses them, so that its errors point into the user's own text."""
    if file != "-":
        return Path(file).read_bytes()
    if sys.stdin.isatty():
        complain("reading YAML or JSON from the terminal; Ctrl-D ends it")
    return sys.stdin.buffer.read()


def parse_mapping(text: bytes, file: str) -> dict[str, Any]:
    try:
        value = core_yaml.load(text)
    except yaml.YAMLError as error:
        raise RatchetError(f"{file} is not YAML: {error}") from None
    if not isinstance(value, dict):
        raise RatchetError(
            f"{file} must hold parts of a job spec, for example `limits: {{max_steps: 200}}`, got {shown(value)}"
        )
    return value


def _created(ratchet: Ratchet, job: Job, following: bool, as_json: bool) -> None:
    if not following:
        _report(job, as_json)
        if not as_json:
            complain(f"follow it: ratchet watch {job['id']}")
        return
    if not as_json:
        say(f"{job['id']} {clean(job['name'])}")
    _follow(ratchet, job["id"], as_json)


def _follow(ratchet: Ratchet, job_id: str, as_json: bool) -> None:
    try:
        job = follow(ratchet, job_id, as_json=as_json)
    except KeyboardInterrupt:
        complain(f"\nnot watching any more; {job_id} goes on. `ratchet cancel {job_id}` ends it")
        raise typer.Exit(exits.INTERRUPTED) from None
    if not as_json:
        _print_outcome(job)
    raise typer.Exit(exits.OF_STATUS[job["status"]])


# ---------------------------------------------------------------- showing


def _report(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        say(job["id"], status_text(job["status"]), clean(job["name"]))


def progress(job: JobSummary) -> str:
    """The step, and how many there will be if that is known."""
    return f"{job['step']}/{job['max_steps']}" if job["kind"] in MANAGED else str(job["step"])


def _print_outcome(job: Job) -> None:
    say(job["id"], status_text(job["status"]), f"at step {progress(job)} after {duration(job['run_s'])}")
    if job["status"] == "paused":
        why = job["error"] or {}
        say(f"  it rests ({job['status_reason']}); {_how_it_goes_on(job)}")
        if why.get("hint"):
            say(f"  hint: {clean(why['hint'])}")
    if job["checkpoint_id"]:
        say(f"  checkpoint {job['checkpoint_id']}  (ratchet checkpoints download {job['checkpoint_id']})")


def _how_it_goes_on(job: Job) -> str:
    resume = f"ratchet resume {job['id']}"
    if job["status_reason"] in ("paused", "pause_requested"):  # as somebody wished, of one that ran or waited
        return f"it goes on with: {resume}"
    if job["status_reason"] != "budget_spent":
        return f"mend what it rests for, then: {resume}"
    budget = job["spec"].get("limits", {}).get("budget") or {}
    spent = [name for name in ("tokens", "worker_s") if budget.get(name) and job["usage"][name] >= budget[name]]
    options = [f"--{name.replace('_', '-')} N" for name in spent]
    return (
        f"give it more: {' '.join([resume, *options])}"
        if options
        else f"its project's budget is spent (ratchet budget); then: {resume}"
    )


def _print_job(job: Job) -> None:
    status = status_text(job["status"])
    if job["status_reason"]:
        status += f" ({job['status_reason']})"
    result, model = job["result"] or {}, job["spec"].get("model", {})
    print_facts(
        {
            "job": job["id"],
            "name": job["name"],
            "kind": job["kind"] + (f", {preset}" if (preset := job["spec"].get("objective", {}).get("preset")) else ""),
            "status": status,
            "phase": job["phase"] if job["status"] not in FINAL else None,
            "step": progress(job),
            "attempt": job["attempt"] or None,
            "model": model.get("source"),
            "starts from": job["from_checkpoint_id"],
            "fork of": job["parent_id"],
            "checkpoint": job["checkpoint_id"],
            "ran for": duration(job["run_s"]),
            "spent": spent_text(job["usage"]),
            "may spend": _bounds(tokens=job["budget_tokens"], worker_s=job["budget_worker_s"]),
            "created": f"{job['created_at']} ({ago(job['created_at'])})",
            "finished": job["finished_at"],
            "tags": job["tags"],
            "metadata": job["metadata"],
            "error": f"{job['error'].get('detail')} ({job['error'].get('code')})" if job["error"] else None,
            "hint": (job["error"] or {}).get("hint"),
            "ended": result.get("ended"),
            "first evaluation": _metrics(result.get("initial")),
            "last evaluation": _metrics(result.get("final")),
            "best evaluation": _best(result.get("best")),
            "runs on": runs_on(job["resolved"]),
            "warnings": job["resolved"].get("warnings"),
            "you may": job["allowed_actions"],
        }
    )


def runs_on(resolved: dict[str, Any]) -> str:
    """What the worker found when it loaded the model, for people."""
    return ", ".join(form.format(resolved[name]) for name, form in FACTS.items() if resolved.get(name) is not None)


def _bounds(**bounds: float | None) -> dict[str, float]:
    return {name: bound for name, bound in bounds.items() if bound is not None}


def spent_text(usage: UsageTotals) -> str:
    if not usage["attempts"]:
        return ""
    sampled = counted(usage["sampled_tokens"], "token")
    text = f"{sampled} sampled, {usage['trained_tokens']} trained, {duration(usage['worker_s'])} worked"
    return text + (f" ({duration(usage['wasted']['worker_s'])} wasted)" if usage["wasted"]["worker_s"] >= 1 else "")


def _best(best: dict[str, Any] | None) -> str:
    if not best:
        return ""
    saved = best.get("checkpoint_id") or ("the model before training" if best["step"] == 0 else "no checkpoint holds it")
    return f"{best.get('metric', '')} {number(best['value'])} at step {best['step']}  {saved}".strip()


def _metrics(values: dict[str, float | None] | None) -> str:
    return "  ".join(f"{name} {number(values[name])}" for name in EVALUATION if values and name in values)
