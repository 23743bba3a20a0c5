"""`ratchet export metrics`, read back with the packages that it writes for (imported only where they are used)."""

import threading
from collections.abc import Callable
from math import isnan
from pathlib import Path
from typing import Any

import pytest

from service.cli import export, sinks

Cli = Callable[..., Any]
SPEC = """
kind: rl
name: curves
model: {source: tiny}
data: {train: {source: inline, rows: [{q: "1", a: "1"}]}, prompt: "{q}", answer: "{a}"}
objective: {preset: gspo}
rollout: {prompts_per_step: 2, group_size: 2, max_completion_tokens: 4}
reward: {graders: [{kind: exact, reference: "{a}"}]}
limits: {max_steps: 40}
"""


@pytest.fixture
def job_id(api: str, cli: Cli) -> str:
    return cli("submit", "-", "--json", stdin=SPEC).json["id"]


def tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written_once(cli: Cli, job_id: str, hand: Any, tmp_path: Path) -> None:
    held = hand.take()
    hand.step(held, 1, {"reward/mean": 0.25, "loss": 2.0})
    hand.step(held, 2, {"reward/mean": float("nan"), "loss": 1.5})
    to = f"tensorboard:{tmp_path}"
    said = cli("export", "metrics", job_id, "--to", to)
    assert said.code == 0 and said.out.startswith("4 points"), said
    hand.step(held, 3, {"reward/mean": 0.75, "loss": 1.0, "eval/reward/mean": 0.5})
    assert cli("export", "metrics", job_id, "--to", to).out.startswith("3 points")
    assert cli("export", "metrics", job_id, "--to", to).out.startswith("0 points")
    curves = tensorboard(tmp_path / job_id)
    assert curves["loss"] == [(1, 2.0), (2, 1.5), (3, 1.0)] and curves["eval/reward/mean"] == [(3, 0.5)]
    assert [step for step, _ in curves["reward/mean"]] == [1, 2, 3] and isnan(curves["reward/mean"][1][1])


def test_following_ends_with_the_job_and_a_resumed_attempt_repeats_nothing(
    cli: Cli, job_id: str, hand: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "EVERY_S", 0.0)
    monkeypatch.setattr(export, "WINDOW", 2)
    held = hand.take()

    def work() -> None:
        for step in range(1, 6):
            hand.step(held, step, {"loss": float(step)})
        for step in range(4, 9):  # as an attempt that goes on from a checkpoint at step 3
            hand.step(held, step, {"loss": float(step)})
        hand.succeed(held)

    worker = threading.Timer(0.3, work)
    worker.start()
    said = cli("export", "metrics", job_id, "--to", f"tensorboard:{tmp_path}", "--follow")
    worker.join()
    assert said.code == 0 and said.out.startswith("8 points"), said
    assert tensorboard(tmp_path / job_id)["loss"] == [(step, float(step)) for step in range(1, 9)]


def test_what_was_interrupted_goes_on_where_it_was(
    cli: Cli, job_id: str, hand: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = hand.take()
    for step in range(1, 7):
        hand.step(held, step, {"loss": float(step), "reward/mean": 1.0})
    write, written = sinks.TensorBoard.write, []

    def dies(sink: Any, step: int, values: Any) -> None:
        write(sink, step, values)
        written.append(step)
        if step == 3:
            raise OSError("killed")

    monkeypatch.setattr(sinks.TensorBoard, "write", dies)
    assert cli("export", "metrics", job_id, "--to", f"tensorboard:{tmp_path}").code == 1
    assert cli("export", "metrics", job_id, "--to", f"tensorboard:{tmp_path}").code == 0
    assert written == [1, 2, 3, 4, 5, 6]
    assert len(tensorboard(tmp_path / job_id)["loss"]) == 6


@pytest.mark.parametrize("at", ["write", "last"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("disk is full\nmany lines")], ids=repr)
def test_what_a_package_fails_with_names_the_sink_in_one_line(
    cli: Cli, job_id: str, hand: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, at: str
) -> None:
    hand.step(hand.take(), 1, {"loss": 1.0})

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(sinks.TensorBoard, at, fails)
    said = cli("export", "metrics", job_id, "--to", f"tensorboard:{tmp_path}")
    why = ": No space left on device" if isinstance(error, OSError) else " cannot be written: disk is full"
    assert (said.code, said.err) == (1, f"error: tensorboard:{tmp_path}{why}\n")


def test_unknown_and_absent_sinks_are_named(cli: Cli, job_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = cli("export", "metrics", job_id, "--to", "excel:x")
    assert said.code == 1 and "there are tensorboard, mlflow, wandb, trackio" in said.err

    def absent(where: str, job: Any) -> Any:
        raise ImportError("No module named 'mlflow'")

    monkeypatch.setattr(sinks, "SINKS", {"mlflow": (absent, "mlflow")})
    said = cli("export", "metrics", job_id, "--to", "mlflow:x")
    assert said.code == 1 and "pip install 'ratchet-rl[mlflow]'" in said.err


def test_mlflow_reads_what_was_written_once(cli: Cli, job_id: str, hand: Any, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    held = hand.take()
    hand.step(held, 1, {"reward/mean": 0.25, "loss": float("nan")})
    assert cli("export", "metrics", job_id, "--to", f"mlflow:{uri}").out.endswith(
        "2 points of " + job_id + " written to mlflow\n"
    )
    hand.step(held, 2, {"reward/mean": 0.5, "eval/reward/mean": 1.0})
    assert cli("export", "metrics", job_id, "--to", f"mlflow:{uri}").code == 0
    assert cli("export", "metrics", job_id, "--to", f"mlflow:{uri}").out.startswith("0 points")
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("ratchet")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.data.tags["ratchet.job_id"]) == ("curves", job_id)
    curves = {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in ("reward/mean", "eval/reward/mean")
    }
    assert curves == {"reward/mean": [(1, 0.25), (2, 0.5)], "eval/reward/mean": [(2, 1.0)]}


def test_wandb_has_what_was_written_once_across_offline_runs(cli: Cli, job_id: str, hand: Any, tmp_path: Path) -> None:
    """Read back with wandb's own record types; the second export begins a second offline run, and the two add up."""
    held = hand.take()
    names = {f"metric/{n}": float(n) for n in range(2000)}  # more than one block of the file
    hand.step(held, 1, {"reward/mean": 0.25, "loss": float("nan"), **names})
    to = f"wandb:{tmp_path}"
    assert cli("export", "metrics", job_id, "--to", to).out.endswith(f"2002 points of {job_id} written to wandb\n")
    hand.step(held, 2, {"reward/mean": 0.5, "eval/reward/mean": 1.0})
    assert cli("export", "metrics", job_id, "--to", to).out.startswith("2 points")
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{job_id}.wandb"))
    rows = [row for file in files for row in sinks.Wandb._history(file.read_bytes())]
    assert len(files) == 2 and len(rows) == 2 and isnan(rows[0]["loss"])
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(1, 0.25), (2, 0.5)]
    assert names.items() <= rows[0].items() and rows[1]["eval/reward/mean"] == 1.0
    torn = files[0].read_bytes()
    assert not list(sinks.Wandb._history(torn[: len(torn) // 2]))


def test_trackio_reads_what_was_written_once(
    cli: Cli, job_id: str, hand: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    held = hand.take()
    hand.step(held, 1, {"reward/mean": 0.25, "loss": float("nan")})
    assert cli("export", "metrics", job_id, "--to", "trackio:curves").out.startswith("2 points")
    hand.step(held, 2, {"reward/mean": 0.5})
    assert cli("export", "metrics", job_id, "--to", "trackio:curves").out.startswith("1 point of")
    assert cli("export", "metrics", job_id, "--to", "trackio:curves").out.startswith("0 points")
    (run,) = trackio.Api().runs("curves")
    assert (run.id, run.name, run.config) == (job_id, "curves", {"kind": "rl"})
    first, second = SQLiteStorage.get_logs("curves", run_id=job_id)
    assert (first["step"], first["reward/mean"], isnan(first["loss"])) == (1, 0.25, True)
    assert (second["step"], second["reward/mean"]) == (2, 0.5)
