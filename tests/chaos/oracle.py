"""The oracle: six questions about a job that went through a fault, asked of the store and the disk. No answer is good news.

1  The final weights and the optimizer's state are those of an undisturbed run, bit for bit.
2  Every step, metric point, sample and evaluation stands exactly once, with the value that the undisturbed run measured; every
   operation of a session has one answer, that of the undisturbed one, and its client was told this answer.
3  The event log is numbered without a gap and walks a legal path; an attempt goes on where the last checkpoint was.
4  The job ended (whoever waits for that has a bound).
5  No row was changed under an attempt that did not hold the job.
6  No process, temporary file or lock is left.
"""

import sqlite3
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from safetensors.torch import load_file
from sqlalchemy import select, text
from torch import Tensor

from chaos import stale
from chaos.loops import without_ids
from chaos.rig import FINAL, Rig, of_sessions
from service.ids import utcnow
from service.jobs.reconciler import sweep
from service.sessions.codec import as_json
from service.states import Status, is_legal
from service.store import checkpoints
from service.store.tables import Checkpoint, Dataset, Event, Job, Metric, Operation, Rollout

ORPHANS_VANISH_WITHIN_S = 10.0


@dataclass(frozen=True)
class Standing:
    """What a job left behind, without the times and speeds that differ from run to run."""

    weights: dict[str, Tensor]  # of the final checkpoint, the optimizer's state too
    metrics: dict[tuple[str, int], float | None]
    rollouts: dict[tuple[str, int, int], Any]
    result: dict[str, Any] | None
    evaluations: dict[int, Any]
    operations: dict[int, Any]  # of a session: kind and answer by their numbers
    told: dict[int, Any]  # what its client learnt


def standing(rig: Rig, job_id: str) -> Standing:
    job = rig.job(job_id)
    with rig.store.begin(readonly=True) as session:
        metrics = list(session.scalars(select(Metric).where(Metric.job_id == job_id)))
        rollouts = list(session.scalars(select(Rollout).where(Rollout.job_id == job_id)))
        asked = list(session.scalars(select(Operation).where(Operation.job_id == job_id)))
    return Standing(
        weights=_weights(rig, job),
        metrics={(one.name, one.step): one.value for one in metrics if not one.name.startswith("perf/")},
        rollouts={(one.split, one.step, one.group_index): (one.prompt, one.samples) for one in rollouts},
        result=job.result,
        evaluations={one.data["step"]: one.data["metrics"] for one in rig.events(job_id) if one.type == "evaluation"},
        operations={one.seq: (one.kind, without_ids(one.answer and as_json(one.answer)), one.error) for one in asked},
        told=rig.loops[job_id].told if job_id in rig.loops else {},
    )


def _weights(rig: Rig, job: Job) -> dict[str, Tensor]:
    if job.checkpoint_id is None:
        return {}
    with rig.store.begin(readonly=True) as session:
        folder = rig.store.blobs.path(checkpoints.get(session, job.project, job.checkpoint_id).path)
    return {f"{file.name}:{k}": v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}


def examine(rig: Rig, job_id: str, undisturbed: Standing, *, may_fall_back: bool = False) -> list[str]:
    """What is wrong with this job: points 1 to 5. `may_fall_back`: a checkpoint was broken, the one before is used."""
    job, events = rig.job(job_id), rig.events(job_id)
    if job_id in rig.loops and (error := rig.loops[job_id].error) is not None:
        return [f"2: the client was told {error!r}", *_log(job, events, may_fall_back=may_fall_back)]
    problems = _log(job, events, may_fall_back=may_fall_back) + _attempts(rig, job, events)
    if job.status != "succeeded":
        return [f"4: the job is {job.status} ({job.status_reason}) at step {job.step}: {job.error}", *problems]
    found = standing(rig, job_id)
    return _same_weights(found, undisturbed) + _once(found, undisturbed) + problems


def _same_weights(found: Standing, undisturbed: Standing) -> list[str]:
    if found.weights.keys() != undisturbed.weights.keys() or not found.weights:
        return [f"1: the final checkpoint holds {len(found.weights)} tensors, not {len(undisturbed.weights)}"]
    different = [name for name, tensor in found.weights.items() if not torch.equal(tensor, undisturbed.weights[name])]
    return [f"1: {len(different)} of {len(found.weights)} tensors differ, for example {different[0]}"] if different else []


def _once(found: Standing, undisturbed: Standing) -> list[str]:
    """A primary key keeps a point from standing twice; so what can go wrong is a missing, a further or another one."""
    problems: list[str] = []
    for what in ("metrics", "rollouts", "evaluations", "operations", "told"):
        ours, theirs = getattr(found, what), getattr(undisturbed, what)
        if missing := theirs.keys() - ours.keys():
            problems.append(f"2: {len(missing)} {what} are missing, for example {min(missing)}")
        if further := ours.keys() - theirs.keys():
            problems.append(f"2: {len(further)} {what} should not be, for example {min(further)}")
        if other := [key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]]:
            problems.append(f"2: {len(other)} {what} differ, for example {min(other)}")
    if found.result != undisturbed.result:
        problems.append(f"2: the result is {found.result}, not {undisturbed.result}")
    return problems


def _log(job: Job, events: list[Event], *, may_fall_back: bool) -> list[str]:
    if [event.seq for event in events] != list(range(1, job.last_event + 1)):
        return [f"3: the numbers of the events are not 1 to {job.last_event}"]
    problems: list[str] = []
    status, attempt, saved, at, last = "queued", 0, 0, None, 0
    for event in events:
        data, where = event.data, f"event {event.seq}"
        if event.type == "status_changed":
            if data["from"] != status or not is_legal(Status(data["from"]), Status(data["to"])):
                problems.append(f"3: {where} moves from {data['from']} to {data['to']} while the job is {status}")
            status = data["to"]
            if status == "running" and data["from"] == "queued":
                attempt, at = attempt + 1, None
                if data["attempt"] != attempt:
                    problems.append(f"3: {where} claims attempt {data['attempt']} after {attempt - 1}")
        elif event.type == "step":
            if job.kind == "session":  # its log is done again in silence
                new = data["step"] > last
            else:
                new = data["step"] in _next_steps(at, saved) or (may_fall_back and at is None and data["step"] <= saved)
            if not new:
                problems.append(f"3: {where} is step {data['step']} after {last}, the last checkpoint was of step {saved}")
            at = last = data["step"]
        elif event.type == "checkpoint_saved":
            saved = data["step"]
    if status != job.status:
        problems.append(f"3: the log ends with {status}, the job is {job.status}")
    return problems


def _next_steps(at: int | None, saved: int) -> set[int]:
    """What a job may tell after step `at` of this attempt; None: it comes from its checkpoint."""
    if at is not None:
        return {at + 1}
    return {saved + 1} if saved else {0, 1}  # 0: the evaluation before the first step


def _attempts(rig: Rig, job: Job, events: list[Event]) -> list[str]:
    """Each row must bear the attempt that told its step last."""
    last_told: dict[int, int] = {}
    attempt = 0
    for event in events:
        if event.type == "status_changed" and event.data["to"] == "running":
            attempt = event.data["attempt"]
        elif event.type == "step":
            last_told[event.data["step"]] = attempt
    with rig.store.begin(readonly=True) as session:
        noted = session.execute(
            text(f"SELECT what, count(*) FROM {stale.TABLE} WHERE job_id = :id GROUP BY what"), {"id": job.id}
        )
        problems = [f"5: {count} times a stale {what}" for what, count in noted]
        for table in (Metric, Rollout):
            rows = session.execute(select(table.step, table.attempt).where(table.job_id == job.id).distinct())
            problems += [
                f"5: step {step} in {table.__tablename__} is of attempt {said}, told last by {last_told.get(step)}"
                for step, said in rows
                if last_told.get(step) != said
            ]
        final = session.get(Checkpoint, job.checkpoint_id) if job.checkpoint_id else None
    if job.kind == "session" and final is not None and final.is_final:  # who died after it saved leaves nothing to save
        return problems
    if final is None or final.attempt != job.attempt or not final.is_final:
        problems.append(f"5: the final checkpoint is not of the last attempt, {job.attempt}")
    return problems


# ---------------------------------------------------------------- the sixth


def left_behind(rig: Rig) -> list[str]:
    """Stops the rig, and says what is left of it. What a killed attempt left on the disk, a later sweep must remove."""
    dead = {process.pid for process in rig.started if not process.alive}
    deadline = time.monotonic() + ORPHANS_VANISH_WITHIN_S
    while (orphans := of_sessions(dead)) and time.monotonic() < deadline:
        time.sleep(0.1)
    problems = [f"6: process {pid} outlived the worker that started it" for pid in orphans]
    rig.stop()
    deadline = time.monotonic() + ORPHANS_VANISH_WITHIN_S
    while (left := of_sessions({process.pid for process in rig.started})) and time.monotonic() < deadline:
        time.sleep(0.1)
    problems += [f"6: process {pid} is left" for pid in left]
    return problems + _files(rig) + _locks(rig)


def _files(rig: Rig) -> list[str]:
    sweep(rig.store, utcnow() + timedelta(days=2))
    with rig.store.begin(readonly=True) as session:
        named = set(session.scalars(select(Checkpoint.path).where(Checkpoint.deleted_at.is_(None))))
        named |= set(session.scalars(select(Dataset.path).where(Dataset.deleted_at.is_(None))))
    root = rig.store.blobs.root
    files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    unknown = [str(path) for path in files if not any(str(one) in named for one in (path, *path.parents))]
    missing = [path for path in named if not (root / path).exists()]
    return [f"6: {path} is a file that no row names" for path in unknown] + [f"6: {path} is not there" for path in missing]


def _locks(rig: Rig) -> list[str]:
    with rig.store.begin(readonly=True) as session:
        held = list(session.scalars(select(Job.id).where(Job.status.in_(FINAL), Job.lease_owner.is_not(None))))
    problems = [f"6: {job_id} has ended and is still held" for job_id in held]
    rig.store.close()
    if rig.settings.sql_url.startswith("sqlite"):
        connection = sqlite3.connect(rig.settings.sql_url.removeprefix("sqlite:///"), timeout=1, isolation_level=None)
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            problems.append(f"6: SQLite: {error}")
        connection.close()
        return problems
    with rig.store.begin(readonly=True) as session:
        others = "datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        connected = session.scalar(text(f"SELECT count(*) FROM pg_stat_activity WHERE {others}"))
    return [*problems, *([f"6: {connected} connections to PostgreSQL are left"] if connected else [])]
