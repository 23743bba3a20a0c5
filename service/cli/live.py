"""Follows a job in the terminal: a progress bar with changing numbers, or plain lines if there is no terminal."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.text import Text

from ratchet_client import FINAL, Ratchet
from ratchet_client.types import Event, Job
from service.cli.headline import Headline
from service.cli.output import clean, console, json_text, number, one_line, status_text
from service.metric_names import EVAL_GREEDY_REWARD_MEAN, EVAL_LOSS, EVAL_REWARD_MEAN

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 24
MANAGED = frozenset({"rl", "supervised"})  # kinds of jobs that know how many steps they will do
IDLE = "idle"  # why a session pauses that goes on when an operation comes
LINE_EVERY_S = 2.0  # without a terminal: at most one line of numbers in this time


class View(Protocol):
    """Shows the events of a job."""

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
    def show(self, event: Event) -> None: ...


def follow(ratchet: Ratchet, job_id: str, *, as_json: bool = False) -> Job:
    """Show the job's events until it has ended or is paused; a session that is idle goes on by itself. Returns the job."""
    last = None  # the number of the job's last event, once the job is paused
    with make_view(ratchet.get_job(job_id), as_json=as_json) as view:
        for event in ratchet.follow(job_id):
            view.show(event)
            if event["type"] == "status_changed":
                job = ratchet.get_job(job_id) if event["data"]["to"] == "paused" else None
                # None if the job was resumed meanwhile.
                rests = job is not None and job["status"] == "paused" and job["status_reason"] != IDLE
                last = job["last_event"] if job is not None and rests else None
            if last is not None and event["seq"] >= last:
                break
    return ratchet.get_job(job_id)


def make_view(job: Job, *, as_json: bool) -> View:
    if as_json:
        return JsonLines()
    return Bar(job) if console().is_terminal else Lines(job)


class JsonLines:
    """One event per line, for programs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def show(self, event: Event) -> None:
        sys.stdout.write(json_text(event) + "\n")
        sys.stdout.flush()


class Lines:
    """One line for each notable event, and numbers from time to time."""

    def __init__(self, job: Job) -> None:
        self._console, self._headline, self._said_at = console(), Headline(), float("-inf")
        self._total = f"/{job['max_steps']}" if job["kind"] in MANAGED else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def show(self, event: Event) -> None:
        if (note := note_of(event)) is not None:
            self._console.print(note, soft_wrap=True)
        if event["type"] != "step":
            return
        data = event["data"]
        self._headline.update(data["metrics"])
        last = data["step"] >= data["max_steps"]
        if last or time.monotonic() - self._said_at >= LINE_EVERY_S:
            self._said_at = time.monotonic()
            self._console.print(f"step {data['step']}{self._total}  {numbers(self._headline)}", soft_wrap=True)


class Bar:
    """A progress bar with numbers below it. Notable events are printed above."""

    def __init__(self, job: Job) -> None:
        self._headline, self._phase = Headline(), Text("waiting for a worker", style="dim")
        self._progress = Progress(
            "{task.description}", BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), expand=True
        )
        self._total = job["max_steps"] if job["kind"] in MANAGED else None
        self._task = self._progress.add_task(one_line(job["name"]), total=self._total)
        self._live = Live(get_renderable=self._render, console=console(), refresh_per_second=8)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def show(self, event: Event) -> None:
        if event["type"] != "evaluation" and (note := note_of(event)) is not None:  # its number is below the bar
            self._live.console.print(note)
        data = event["data"]
        if event["type"] == "step":
            self._headline.update(data["metrics"])
            self._progress.update(self._task, completed=data["step"], total=self._total)
        elif event["type"] == "phase_changed":
            self._phase = Text(clean(data["phase"]), style="dim")
        elif event["type"] == "status_changed":
            self._phase = Text("") if data["to"] in FINAL else status_text(data["to"])

    def _render(self) -> Group:
        spark = Text(sparkline(self._headline.rewards), style="green")
        line = Text("  ").join(part for part in (Text(numbers(self._headline)), spark, self._phase) if part)
        return Group(self._progress, Text("  ") + line)


def numbers(headline: Headline) -> str:
    """The known numbers, in one line."""
    pairs = {
        "reward": headline.reward,
        "clip fraction": headline.clip_fraction,
        headline.kl_of: headline.kl,
        "loss": headline.loss if headline.reward is None else None,
        "eval": headline.evaluation,
    }
    return "  ".join(f"{name} {number(value)}" for name, value in pairs.items() if value is not None)


def sparkline(values: list[float]) -> str:
    values = values[-SPARK_WIDTH:]
    if len(values) < 2:
        return ""
    low, spread = min(values), max(values) - min(values)
    return "".join(SPARKS[int((value - low) / spread * (len(SPARKS) - 1)) if spread else 0] for value in values)


# ---------------------------------------------------------------- what is worth a line


def note_of(event: Event) -> Text | None:
    """An event in words; None for events that only change a number."""
    teller = TELLERS.get(event["type"])
    return None if teller is None else teller(event["data"])


def _status(data: dict[str, Any]) -> Text:
    reason = data.get("reason")
    return status_text(data["to"]) + Text(f" ({clean(reason)})" if reason and reason != data["to"] else "", style="dim")


def _failure(data: dict[str, Any]) -> Text:
    text = Text(f"{clean(str(data.get('detail')))} ", style="red") + Text(f"({clean(str(data.get('code')))})", style="dim")
    if data.get("hint"):
        text += Text(f"\n  hint: {clean(str(data['hint']))}", style="dim")
    return text


def _warning(data: dict[str, Any]) -> Text:
    return Text(f"warning: {clean(str(data.get('detail')))}", style="yellow")


def _evaluation(data: dict[str, Any]) -> Text | None:
    metrics = data.get("metrics", {})
    told = {"reward": EVAL_REWARD_MEAN, "greedy": EVAL_GREEDY_REWARD_MEAN, "loss": EVAL_LOSS}
    values = [f"{name} {number(metrics[metric])}" for name, metric in told.items() if metrics.get(metric) is not None]
    return Text(f"eval at step {data['step']}: {', '.join(values)}") if values else None


def _checkpoint(data: dict[str, Any]) -> Text:
    return Text(f"saved {data['checkpoint_id']} at step {data['step']}", style="dim")


TELLERS: dict[str, Callable[[dict[str, Any]], Text | None]] = {
    "status_changed": _status,
    "failure": _failure,
    "warning": _warning,
    "evaluation": _evaluation,
    "checkpoint_saved": _checkpoint,
}
