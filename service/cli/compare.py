"""Compares jobs side by side: the differences of their specs, and their results."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from ratchet_client.types import Job
from service.cli.completion import complete_job
from service.cli.connection import connect
from service.cli.helps import command
from service.cli.jobs import Json
from service.cli.output import duration, number, one_line, print_json, print_table, say, shown
from service.metric_names import DRAWN, EVAL_GREEDY_REWARD_MEAN, EVAL_LOSS, EVAL_REWARD_MEAN

ABSENT = "-"
APART = ("name", "tags", "metadata")  # labels for people, not differences between runs


def register(app: typer.Typer) -> None:
    command(app, compare)


def compare(
    context: typer.Context,
    job_ids: Annotated[list[str], typer.Argument(metavar="JOB JOB...", help="two or more jobs", autocompletion=complete_job)],
    all_metrics: Annotated[bool, typer.Option("--all", help="compare every metric, not only the most important ones")] = False,
    as_json: Json = False,
) -> None:
    """Compare jobs: where their specs differ, and the newest value of each metric.

    $ ratchet compare job_01k... job_01m...
    $ ratchet compare job_01k... job_01m... --all --json | jq .metrics
    """
    if len(job_ids) < 2:
        raise typer.BadParameter("name two jobs or more")
    with connect(context) as ratchet:
        jobs = [ratchet.get_job(job_id) for job_id in job_ids]
        wanted = [] if all_metrics else [*DRAWN, EVAL_REWARD_MEAN, EVAL_GREEDY_REWARD_MEAN, EVAL_LOSS]  # []: every one
        series = [ratchet.metrics(job_id, wanted, newest=1)["series"] for job_id in job_ids]
    differences = differing([dict(flat(job["spec"])) for job in jobs])
    last = [{name: curve["value"][-1] for name, curve in curves.items() if curve["value"]} for curves in series]
    newest = {name: [curves.get(name) for curves in last] for name in sorted({name for curves in last for name in curves})}
    if as_json:
        print_json({"jobs": job_ids, "spec": differences, "metrics": newest})
        return
    columns = ("", *job_ids)
    print_table(columns, [(name, *values) for name, values in facts(jobs).items()], nothing="")
    say("")
    rows = [(place, *map(_value, values)) for place, values in differences.items()]
    print_table(("differs in", *job_ids), rows, nothing="their specs are the same, but for names")
    if newest:
        say("")
        rows = [(name, *(number(value) for value in values)) for name, values in newest.items()]
        print_table(("newest value", *job_ids), rows, nothing="")


def _value(value: Any) -> str:
    return ABSENT if value is None else one_line(shown(value), 40)


def facts(jobs: list[Job]) -> dict[str, list[str]]:
    return {
        "name": [one_line(job["name"], 40) for job in jobs],
        "status": [job["status"] for job in jobs],
        "step": [f"{job['step']}/{job['max_steps']}" for job in jobs],
        "ran for": [duration(job["run_s"]) for job in jobs],
        "tokens": [str(job["usage"]["tokens"]) for job in jobs],
    }


def flat(spec: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its dotted path; lists are leaves."""
    for name, value in spec.items():
        if not place and name in APART:
            continue
        if isinstance(value, dict) and value:
            yield from flat(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value


def differing(specs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The paths whose values differ, with each spec's value; None if a spec does not have the path."""
    places = list(dict.fromkeys(place for spec in specs for place in spec))
    values = {place: [spec.get(place) for spec in specs] for place in places}
    return {place: several for place, several in values.items() if any(value != several[0] for value in several[1:])}
