"""Tools of others that a job's metrics can be written to. Each package is an extra, imported when it is used.

A sink says how far each metric is there already, from its own files: what is written twice would be seen twice.
"""

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from math import nan
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from ratchet_client import RatchetError

Values = Mapping[str, float | None]  # by metric; null: not finite


class Sink(Protocol):
    """Where the metrics of one job go."""

    def last(self) -> dict[str, int]:
        """The last step of each metric that is there."""
        ...

    def write(self, step: int, values: Values) -> None:
        """Write the metrics of a step. When it returns, they are there."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """A folder of event files, one folder a job: `tensorboard --logdir WHERE`."""

    def __init__(self, where: str, job: Mapping[str, Any]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # pyright: ignore[reportMissingImports]

        self._folder = Path(where or "runs") / job["id"]
        self._there = self._read()
        self._writer = EventFileWriter(str(self._folder))
        threading.excepthook = _unless_told(threading.excepthook)

    def _read(self) -> dict[str, int]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # pyright: ignore[reportMissingImports]

        if not self._folder.is_dir():
            return {}
        events = EventAccumulator(str(self._folder), size_guidance={"scalars": 1}, purge_orphaned_data=False)
        events.Reload()  # of each metric one point is kept: the last
        return {name: max(point.step for point in events.Scalars(name)) for name in events.Tags()["scalars"]}

    def last(self) -> dict[str, int]:
        return self._there

    def write(self, step: int, values: Values) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        points = [Summary.Value(tag=name, simple_value=nan if value is None else value) for name, value in values.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _unless_told(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """The writer's thread ends with an error of the disk, and `flush` raises it again: one of the two need not be printed."""
    return lambda ended: None if isinstance(ended.exc_value, OSError) else hook(ended)


class MLflow:
    """A run in the experiment `ratchet`, with the tag `ratchet.job_id`. WHERE is a tracking URI: sqlite:///mlflow.db, http://..."""

    def __init__(self, where: str, job: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        self._client = MlflowClient(tracking_uri=where or None)
        experiment = self._client.get_experiment_by_name("ratchet")
        experiment_id = self._client.create_experiment("ratchet") if experiment is None else experiment.experiment_id
        ours = self._client.search_runs([experiment_id], f"tags.`ratchet.job_id` = '{job['id']}'")
        tags = {"ratchet.job_id": job["id"], "ratchet.kind": job["kind"]}
        self._run = ours[0] if ours else self._client.create_run(experiment_id, run_name=job["name"], tags=tags)

    def last(self) -> dict[str, int]:
        id_ = self._run.info.run_id
        names = self._client.get_run(id_).data.metrics
        return {name: max(point.step for point in self._client.get_metric_history(id_, name)) for name in names}

    def write(self, step: int, values: Values) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(time.time() * 1000)
        points = [Metric(name, nan if value is None else value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run.info.run_id, metrics=points)

    def close(self) -> None:
        """The run stays open: a job that goes on is written to it."""


class Wandb:
    """Offline runs of Weights & Biases below a folder, for `wandb sync`; the run's id is the job's.

    What is written is in the file after `close`; its core process writes by itself.
    """

    BLOCK, HEADER = 32768, struct.Struct("<IHB")  # of LevelDB's log, which a .wandb file is: checksum, length, type

    def __init__(self, where: str, job: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        folder = Path(where or "runs")
        folder.mkdir(parents=True, exist_ok=True)
        self._there: dict[str, int] = {}
        for file in sorted(folder.glob(f"wandb/offline-run-*/run-{job['id']}.wandb")):
            for values in self._history(file.read_bytes()):
                self._there |= dict.fromkeys(values.keys() - {"step"}, int(values["step"]))
        quiet = dict.fromkeys(("silent", "x_disable_stats", "x_disable_meta", "x_disable_machine_info"), True)
        settings = wandb.Settings(console="off", **quiet)
        names = {"project": "ratchet", "id": job["id"], "name": job["name"], "config": {"kind": job["kind"]}}
        self._run = wandb.init(**names, dir=folder, mode="offline", settings=settings)
        self._run.define_metric("*", step_metric="step")  # wandb's own steps only grow: an evaluation could not be added to one

    @classmethod
    def _history(cls, data: bytes) -> Iterator[dict[str, Any]]:
        """The rows of a .wandb file. What was torn off at its end is left out."""
        from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        at, whole = cls.HEADER.size, b""
        while at + cls.HEADER.size <= len(data):
            if (left := cls.BLOCK - at % cls.BLOCK) < cls.HEADER.size:
                at += left
                continue
            _, length, kind = cls.HEADER.unpack_from(data, at)
            at += cls.HEADER.size + length
            if at > len(data) or kind == 0:
                return
            whole += data[at - length : at]
            if kind in (1, 4):  # full, last
                record, whole = Record.FromString(whole), b""
                if record.WhichOneof("record_type") == "history":
                    yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}

    def last(self) -> dict[str, int]:
        return self._there

    def write(self, step: int, values: Values) -> None:
        self._run.log({"step": step, **{name: nan if value is None else value for name, value in values.items()}})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio's project WHERE (default: ratchet), in the folder TRACKIO_DIR; its id is the job's."""

    def __init__(self, where: str, job: Mapping[str, Any]) -> None:
        from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

        self._storage, self._project, self._job = SQLiteStorage, where or "ratchet", job

    def last(self) -> dict[str, int]:
        there: dict[str, int] = {}
        for row in self._storage.get_logs(self._project, run_id=self._job["id"]):
            there |= dict.fromkeys(row.keys() - {"step", "timestamp"}, int(row["step"]))
        return there

    def write(self, step: int, values: Values) -> None:
        points = {name: nan if value is None else value for name, value in values.items()}
        run = {"run": self._job["name"], "run_id": self._job["id"], "config": {"kind": self._job["kind"]}}
        self._storage.bulk_log(self._project, metrics_list=[points], steps=[step], **run)

    def close(self) -> None: ...


# By name: the class, and the extra that brings its package.
SINKS: Mapping[str, tuple[Callable[[str, Mapping[str, Any]], Sink], str]] = MappingProxyType(
    {
        "tensorboard": (TensorBoard, "tensorboard"),
        "mlflow": (MLflow, "mlflow"),
        "wandb": (Wandb, "wandb"),
        "trackio": (Trackio, "trackio"),
    }
)


def open_sink(target: str, job: Mapping[str, Any]) -> Sink:
    """Open `SINK:WHERE` for a job. Raises RatchetError for an unknown sink, and for one whose package is not installed."""
    name, _, where = target.partition(":")
    if name not in SINKS:
        raise RatchetError(f"there is no sink {name!r}; there are {', '.join(SINKS)}, as in tensorboard:runs")
    sink, extra = SINKS[name]
    try:
        return sink(where, job)
    except ImportError as error:
        raise RatchetError(f"{name} is not installed ({error}): pip install 'ratchet-rl[{extra}]'") from None
