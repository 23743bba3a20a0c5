"""Commands about what was spent: usage, budget."""

from typing import Annotated, Any

import typer

from service.cli.completion import complete_job, complete_key
from service.cli.connection import connect
from service.cli.helps import command
from service.cli.jobs import Json, spent_text
from service.cli.output import duration, print_facts, print_json, print_table, say

Project = Annotated[str | None, typer.Option(help="another project; needs an administrator's key")]
Day = Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="a day (UTC), inclusive")]
EVER = "1970-01-01"  # the day that the API gives if all time is counted


def register(app: typer.Typer) -> None:
    command(app, usage)
    command(app, budget)


def usage(
    context: typer.Context,
    by: Annotated[str, typer.Option(help="group by day, job or key; an administrator's key also by project")] = "day",
    first: Annotated[str | None, typer.Option("--from", metavar="YYYY-MM-DD", help="the first day (UTC)")] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="YYYY-MM-DD", help="the last day (UTC)")] = None,
    job: Annotated[str | None, typer.Option(metavar="JOB", help="only this job", autocompletion=complete_job)] = None,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="only jobs submitted with this key", autocompletion=complete_key)
    ] = None,
    project: Project = None,
    as_json: Json = False,
) -> None:
    """Show what the project spent: tokens, seconds of workers, and what was wasted.

    $ ratchet usage --by job --from 2026-11-01
    $ ratchet usage --by key --json | jq '.data[] | {group, tokens}'
    """
    filters: dict[str, Any] = {"group_by": by, "first_day": first, "last_day": last, "job_id": job, "key_id": key}
    with connect(context) as ratchet:
        answer = ratchet.usage(**filters, project=project)
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            sums.get("group", "total"),
            sums["attempts"],
            sums["sampled_tokens"],
            sums["trained_tokens"],
            duration(sums["worker_s"]),
            duration(sums["wasted"]["worker_s"]),
        )
        for sums in ([*answer["data"], answer["total"]] if answer["data"] else [])
    ]
    print_table((by, "attempts", "sampled", "trained", "worker", "wasted"), rows, nothing="nothing was spent")


def budget(
    context: typer.Context,
    project: Project = None,
    set_tokens: Annotated[
        int | None, typer.Option("--tokens", min=0, help="set the budget: tokens sampled and trained")
    ] = None,
    set_worker_s: Annotated[float | None, typer.Option("--worker-s", min=0, help="set the budget: seconds of workers")] = None,
    since: Day = None,
    unbounded: Annotated[bool, typer.Option("--unbounded", help="remove the budget")] = False,
    as_json: Json = False,
) -> None:
    """Show or set what a project may spend.

    $ ratchet budget
    $ ratchet budget --project team-a --tokens 50000000 --since 2026-11-01

    To set it takes --project and a key of the administrators' project. Jobs pause when it is spent.
    """
    with connect(context) as ratchet:
        if set_tokens is None and set_worker_s is None and not unbounded:
            answer = ratchet.get_budget(project=project)
        elif project is None:
            raise typer.BadParameter("say whose budget is set: --project NAME")
        else:
            answer = ratchet.set_budget(project, tokens=set_tokens, worker_s=set_worker_s, since=since)
    if as_json:
        print_json(answer)
        return
    bounds = {name: answer[name] for name in ("tokens", "worker_s") if answer[name] is not None}  # pyright: ignore[reportGeneralTypeIssues]
    since_day = "the beginning" if answer["since"] == EVER else answer["since"]
    print_facts({"project": answer["project"], "may spend": bounds or "without bound", "since": since_day})
    say(f"spent since then: {spent_text(answer['spent']) or 'nothing'}")
