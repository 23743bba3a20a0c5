"""`ratchet export`: a job's metrics into tools of others; `export_model.py` has the models."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Annotated

import typer

from ratchet_client import Ratchet, RatchetError
from service.cli.connection import connect
from service.cli.export_model import export_checkpoint
from service.cli.helps import command, text
from service.cli.jobs import JobId
from service.cli.output import say
from service.cli.sinks import Sink, open_sink
from service.validation.words import counted

WINDOW = 5000  # steps in one request; far below what would be thinned out
EVERY_S = 1.0  # while following: between two requests


def register(app: typer.Typer) -> None:
    inner = typer.Typer(help=text("Write what a job did, and what it made, for tools of others."), rich_markup_mode=None)
    command(inner, export_metrics, "metrics")
    command(inner, export_checkpoint, "checkpoint")
    app.add_typer(inner, name="export")


def export_metrics(
    context: typer.Context,
    job_id: JobId,
    to: Annotated[
        str, typer.Option(metavar="SINK:WHERE", help="tensorboard:FOLDER, mlflow:URI, wandb:FOLDER or trackio:PROJECT")
    ],
    follow: Annotated[bool, typer.Option("--follow", help="go on until the job has ended")] = False,
) -> None:
    """Write a job's curves to TensorBoard, MLflow, Weights & Biases (offline) or trackio.

    $ ratchet export metrics job_01k... --to tensorboard:runs --follow
    $ ratchet export metrics job_01k... --to mlflow:sqlite:///mlflow.db

    What is there already is not written again: the command may be repeated, and goes on where an interrupted one was.
    """
    with connect(context) as ratchet:
        job = ratchet.get_job(job_id)
        with _naming(to):
            sink = open_sink(to, {"id": job["id"], "kind": job["kind"], "name": job["name"]})
        with closing(sink):
            exporting = Exporting(ratchet, job_id, sink, to)
            exporting.go_on()
            if follow:
                exporting.follow()
    say(f"{counted(exporting.points, 'point')} of {job_id} written to {to.partition(':')[0]}")


@contextmanager
def _naming(to: str) -> Iterator[None]:
    """What a package of others fails with (a full disk, a server that does not answer) names the sink, in one line."""
    try:
        yield
    except RatchetError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), to) from error
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RatchetError(f"{to} cannot be written: {why}") from error


class Exporting:
    """Copies the points that the sink lacks. A resumed job repeats steps; those that are there stay as they are."""

    def __init__(self, ratchet: Ratchet, job_id: str, sink: Sink, to: str) -> None:
        self._ratchet, self._job_id, self._sink, self._to = ratchet, job_id, sink, to
        with _naming(to):
            self._last = sink.last()
        self._from = 0  # before this step everything was copied
        self.points = 0

    def follow(self) -> None:
        """Copy each step soon after its commit, until the job has ended."""
        looked_at = 0.0
        for event in self._ratchet.follow(self._job_id):
            if event["type"] in ("step", "evaluation") and time.monotonic() - looked_at > EVERY_S:
                self.go_on()
                looked_at = time.monotonic()
        self.go_on()

    def go_on(self) -> None:
        """Copy what there is now. Metrics of the newest step are asked for again: an evaluation may add some."""
        newest = self._ratchet.get_job(self._job_id)["step"]
        for first in range(self._from, newest + 1, WINDOW):
            last = min(first + WINDOW - 1, newest)
            series = self._ratchet.metrics(self._job_id, from_step=first, to_step=last, points=2 * WINDOW)["series"]
            steps: dict[int, dict[str, float | None]] = defaultdict(dict)
            for name, curve in series.items():
                for step, value in zip(curve["step"], curve["value"], strict=True):
                    if step > self._last.get(name, -1):
                        steps[step][name] = value
            for step in sorted(steps):
                with _naming(self._to):
                    self._sink.write(step, steps[step])
                self._last |= dict.fromkeys(steps[step], step)
                self.points += len(steps[step])
        self._from = newest
