"""Commands about training sessions: sessions, operations. As jobs they are shown, watched, paused and ended by the commands for
jobs."""

from typing import Annotated

import typer

from ratchet_client.types import FINAL
from service.cli.completion import complete_session, complete_status
from service.cli.connection import connect
from service.cli.helps import command
from service.cli.jobs import Json, progress
from service.cli.operations import print_operations
from service.cli.output import ago, complain, one_line, print_facts, print_json, print_table, status_text

SessionId = Annotated[str, typer.Argument(metavar="SESSION", help="job_...", autocompletion=complete_session)]


def register(app: typer.Typer) -> None:
    command(app, sessions)
    command(app, operations)


def sessions(
    context: typer.Context,
    status: Annotated[
        str | None, typer.Option(help="queued, running, paused, succeeded ...", autocompletion=complete_status)
    ] = None,
    tag: Annotated[str | None, typer.Option(help="sessions with this tag")] = None,
    name: Annotated[str | None, typer.Option(help="a part of the name")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="how many")] = 20,
    after: Annotated[str | None, typer.Option(help="go on behind this session (the last id of a page)")] = None,
    as_json: Json = False,
) -> None:
    """List training sessions, newest first.

    $ ratchet sessions --status running
    $ ratchet show job_01k...; ratchet watch job_01k...; ratchet cancel job_01k... --save

    The commands for jobs work on sessions.
    """
    with connect(context) as ratchet:
        page = ratchet.list_sessions(status=status, tag=tag, name=name, after=after, limit=limit)  # pyright: ignore[reportArgumentType]
        if as_json:
            print_json(page)
            return
        rows = [
            (
                job["id"],
                one_line(job["name"], 40),
                status_text(job["status"]),
                progress(job),
                0 if job["status"] in FINAL else ratchet.list_operations(job["id"], limit=1)["waiting"],
                ago(job["created_at"]),
            )
            for job in page["data"]
        ]
    nothing = "no sessions; `ratchet.session(...)` of ratchet_client makes one"
    print_table(("session", "name", "status", "step", "waiting", "created"), rows, nothing=nothing)
    if page["has_more"]:
        complain(f"more: ratchet sessions --after {page['last_id']}")


def operations(
    context: typer.Context,
    session_id: SessionId,
    seq: Annotated[int | None, typer.Argument(min=1, help="only this one, with what came of it")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="how many")] = 20,
    after: Annotated[int | None, typer.Option(min=0, help="those behind this seq; default: the newest")] = None,
    newest_first: Annotated[bool, typer.Option("--newest-first", help="the newest first, and those of samplers, too")] = False,
    before: Annotated[str | None, typer.Option(help="newest first: those that came before the one with this id")] = None,
    as_json: Json = False,
) -> None:
    """List a session's operations in their order: the newest, or those behind a seq.

    $ ratchet operations job_01k...
    $ ratchet operations job_01k... --newest-first
    $ ratchet operations job_01k... 17 --json | jq .result.metrics
    """
    with connect(context) as ratchet:
        if seq is not None:
            view = ratchet.get_operation(session_id, seq)
            if as_json:
                print_json(view)
            else:
                metrics = (view["result"] or {}).get("metrics")
                print_facts({**view, "object": None, "result": None, "summary": None, "metrics": metrics})
            return
        newest_first = newest_first or before is not None
        if newest_first:
            page = ratchet.list_operations(session_id, newest_first=True, before=before, after=after, limit=limit)
        else:
            if after is None:
                after = max(0, ratchet.list_operations(session_id, limit=1)["next_seq"] - 1 - limit)
            page = ratchet.list_operations(session_id, after=after, limit=limit)
    if as_json:
        print_json(page)
        return
    print_operations(page["data"])
    if page["has_more"]:
        complain(f"more: ratchet operations {session_id} --{'before' if newest_first else 'after'} {page['last_id']}")
