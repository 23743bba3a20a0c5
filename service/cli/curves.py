"""Commands for a job's metrics and sampled answers: metrics, rollouts."""

import csv
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated

import typer
from rich.text import Text

from ratchet_client.types import Rollout, Series
from service.cli import exits
from service.cli.completion import complete_metric
from service.cli.connection import connect
from service.cli.helps import command
from service.cli.jobs import JobId, Json
from service.cli.output import ID, clean, complain, console, number, one_line, print_error_json, print_json, print_table, say
from service.metric_names import DRAWN, METRICS

KNOWN = [metric.name for metric in METRICS]

PLOT_ROWS = 14
TICKS = 5
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def register(app: typer.Typer) -> None:
    command(app, metrics)
    command(app, rollouts)


def metrics(
    context: typer.Context,
    job_id: JobId,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[JOB]... [NAME]...",
            help="further jobs, and metrics such as reward/mean; default: the most important metrics",
            autocompletion=complete_metric,
        ),
    ] = None,
    from_step: Annotated[int | None, typer.Option(min=0, help="the first step to draw")] = None,
    to_step: Annotated[int | None, typer.Option(min=0, help="the last step to draw")] = None,
    list_names: Annotated[
        bool, typer.Option("--list", help="print only the name and the newest value of every metric")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="print CSV with the columns job, metric, step, value")] = False,
    as_json: Json = False,
) -> None:
    """Draw the curves of a job, or of several, in the terminal.

    $ ratchet metrics job_01k...                      reward, loss, clip fractions, KL
    $ ratchet metrics job_01k... perf/step_s          any other, by name
    $ ratchet metrics job_01k... job_01m... reward/mean   two jobs, one curve below the other
    $ ratchet metrics job_01k... --list               what there is
    $ ratchet metrics job_01k... --csv > curves.csv
    $ ratchet metrics job_01k... --json | jq .series

    With several jobs --json prints one object a job, in a list.
    """
    if "/" in job_id:
        raise typer.BadParameter(f"a job comes first, then metrics: ratchet metrics job_01k... {job_id}")
    job_ids = [job_id, *(name for name in names or [] if ID.fullmatch(name))]
    names = [name for name in names or [] if not ID.fullmatch(name)]
    width = shutil.get_terminal_size((100, 24)).columns
    whole = as_json or as_csv  # every point, of every metric unless some are named
    wanted = names or ([] if list_names or whole else list(DRAWN))
    with connect(context) as ratchet:
        points = None if whole else 4 * width
        answers = [ratchet.metrics(each_id, wanted, from_step=from_step, to_step=to_step, points=points) for each_id in job_ids]
    of_jobs = [answer["series"] for answer in answers]
    if as_json:
        print_json(answers if len(answers) > 1 else answers[0])
    elif as_csv:
        print_csv(job_ids, of_jobs)
    else:
        for each_id, series in zip(job_ids, of_jobs, strict=True):
            if len(job_ids) > 1:
                say(Text(each_id, style="bold"))
            _print_curves(each_id, series, wanted, names, list_names=list_names, width=width)
    _refuse_absent(job_ids, of_jobs, names, as_json=as_json)


def _refuse_absent(
    job_ids: Sequence[str], of_jobs: Sequence[Mapping[str, Series]], names: Sequence[str], *, as_json: bool
) -> None:
    """Print which job lacks which of the named metrics, and exit, after the others were printed."""
    told = []
    for job_id, series in zip(job_ids, of_jobs, strict=True):
        if absent := [name for name in names if name not in series or not series[name]["step"]]:
            there = [name for name in dict.fromkeys([*series, *KNOWN]) if name not in absent]
            near = [match for name in absent for match in get_close_matches(name, there, n=1)]
            meant = f"; did you mean {', '.join(near)}?" if near else ""
            told.append(f"{job_id} has no {', '.join(absent)}{meant}; `ratchet metrics {job_id} --list` says what there is")
    if not told:
        return
    if as_json:
        print_error_json({"code": "no_metric", "detail": "; ".join(told)})
    else:
        for line in told:
            complain(line)
    raise typer.Exit(exits.REFUSED)


def print_csv(job_ids: Sequence[str], curves_of_jobs: Sequence[Mapping[str, Series]]) -> None:
    """One row per point; a value that is not finite is empty."""
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(("job", "metric", "step", "value"))
    for job_id, series in zip(job_ids, curves_of_jobs, strict=True):
        for name, curve in series.items():
            rows.writerows(
                (job_id, clean(name), step, value) for step, value in zip(curve["step"], curve["value"], strict=True)
            )


def _print_curves(
    job_id: str, series: Mapping[str, Series], wanted: list[str], named: list[str], *, list_names: bool, width: int
) -> None:
    if list_names:
        rows = [
            (name, len(curve["step"]), curve["step"][-1], number(curve["value"][-1]))
            for name, curve in series.items()
            if curve["step"]
        ]
        if rows or not named:
            print_table(("metric", "points", "step", "newest"), rows, nothing=f"{job_id} has measured nothing yet")
        return
    curves = {name: curve for name in wanted if (curve := series.get(name)) is not None and curve["step"]}
    for name, curve in curves.items():
        print(plot(clean(name), curve, width))
    if not curves and not named:
        complain(f"{job_id} has measured nothing yet")


def plot(name: str, curve: Series, width: int) -> str:
    """One curve with its extremes, as text without colours. Values that are not finite are left out."""
    points = [(step, value) for step, value in zip(curve["step"], curve["value"], strict=True) if value is not None]
    gaps = len(curve["step"]) - len(points)
    title = f"{name}  {number(points[-1][1])} at step {points[-1][0]}" if points else name
    if gaps:
        title += f"  ({gaps} not finite)"
    if not points:
        return title
    import plotext  # as slow to import as everything else together

    figure = plotext.figure
    figure.clear()
    figure.plot_size(width, PLOT_ROWS).theme("colorless").title(title)
    steps, values = [step for step, _ in points], [value for _, value in points]
    line = figure.signal(steps, values, marker="braille")
    figure.draw(line.lines() if len(points) > 1 else line)
    figure.ruler("x").ticks(ticks(steps[0], steps[-1]))
    text = ESCAPES.sub("", str(figure.build()))
    return "\n".join(row.rstrip() for row in text.splitlines())


def ticks(first: int, last: int) -> list[int]:
    """Up to TICKS + 1 evenly spaced whole steps, including both ends."""
    return sorted({round(first + (last - first) * part / TICKS) for part in range(TICKS + 1)})


def rollouts(
    context: typer.Context,
    job_id: JobId,
    split: Annotated[str | None, typer.Option(help="only groups of this part of the data: train or eval")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="only groups of this step; default: the newest step")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="how many groups to show")] = 8,
    after: Annotated[str | None, typer.Option(help="continue after this group (the last_id of a page)")] = None,
    as_json: Json = False,
) -> None:
    """Show sampled answers with their rewards.

    $ ratchet rollouts job_01k...                         the newest step
    $ ratchet rollouts job_01k... --split eval --step 0   before it was trained
    """
    with connect(context) as ratchet:
        page = ratchet.list_rollouts(job_id, split=split, step=step, after=after, limit=limit)
    if as_json:
        print_json(page)
        return
    for group in page["data"]:
        print_group(group)
    if not page["data"]:
        which = "".join((f" of {split}" if split else "", "" if step is None else f" at step {step}"))
        complain(f"no rollouts of {job_id}{which} are kept (log_rollouts and eval in the spec say which are)")
    if page["has_more"]:
        complain(f"more: ratchet rollouts {job_id} --after {page['last_id']}")


def print_group(group: Rollout, *, answers: int | None = None) -> None:
    out = console()
    reference = f"  ->  {one_line(group['reference'])}" if group["reference"] is not None else ""
    head = Text(f"{group['split']} step {group['step']} #{group['group_index']}  ", style="dim")
    out.print(head + Text(one_line(group["prompt"], 100)) + Text(reference, style="green"), soft_wrap=True)
    for sample in group["samples"][:answers]:
        out.print(answer_text(sample), soft_wrap=True)


def answer_text(sample: dict[str, object]) -> Text:
    """The reward, then the answer, then the errors of graders if there are any."""
    reward, errors = sample.get("reward"), sample.get("errors")
    value = reward if isinstance(reward, float | int) else None
    text = Text(f"  {number(value):>9}  ", style="green" if value is not None and value > 0 else "dim")
    text += Text(one_line(str(sample.get("text")), 100))
    if sample.get("finish_reason") == "length":
        text += Text("  (cut)", style="dim")
    return text + Text(f"  {clean(str(errors))}", style="red") if errors else text
