"""The service's own cost: its share of the demo's job, what makes it grow, a tiny job's first step, and the gap between jobs.

    python bench/own_cost.py [--backend sqlite] [--steps 80] [--jobs 10]

Share: the demo's reinforcement learning runs in this process as a worker's child runs it, against a real store and Redis. All
CPU time of the process that is not a training step, an evaluation, or the writing of a checkpoint's files is the service's: the
commits, the lease, the signals, the checkpoint's rows. Growth: commit_step alone, after 10 and 100 times the steps, with 10
times the rollouts, and with 10 times the metrics.
Tiny jobs: a whole stack with a worker that is warm; one step of a tiny model each, alone and queued together.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from itertools import pairwise
from random import Random
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from demo_rollout import quiet_libraries
from loopback import BACKENDS, Stack, machine, started
from reads import SPEC

from service.cli.demo import gspo_spec, make_rows, warm_up_spec
from service.doorbell import Doorbell
from service.jobs import lease as leases
from service.jobs.lease import Lease
from service.store.rollouts import RolloutRow
from service.store.session import Store, open_store
from workers import runner
from workers.loops import managed
from workers.policy.learner import Learner
from workers.tenure.keeper import Keeper
from workers.tenure.tenure import Tenure

FINAL_WITHIN_S = 60.0
DURABLE = "making checkpoints durable"  # in a thread of its own


# ---------------------------------------------------------------- the share


def share(stack: Stack, steps: int) -> None:
    store = open_store(stack.settings)
    with Keeper(store, stack.settings, Doorbell(stack.settings)) as keeper:
        rows = make_rows(0)
        ids = {part: stack.ratchet.create_dataset(rows[part], part)["id"] for part in rows}
        warm_up = stack.ratchet.create_job(warm_up_spec(ids, 0))
        work(keeper)
        done = stack.ratchet.get_job(warm_up["id"])
        assert done["checkpoint_id"] is not None
        spec = gspo_spec(ids, done["checkpoint_id"], 0)
        spec["limits"]["max_steps"] = steps
        job = stack.ratchet.create_job(spec)
        spent: dict[str, float] = defaultdict(float)
        began = time.perf_counter(), time.process_time(), time.thread_time()
        with timed(spent):
            work(keeper)
        wall, cpu, main = (now - then for now, then in zip(clocks(), began, strict=True))
        assert stack.ratchet.get_job(job["id"])["status"] == "succeeded"
        useful, beside = sum(spent.values()), spent[DURABLE]
        part = 100 * (cpu - useful) / cpu
        print(f"the demo's job, {steps} steps: {wall:.1f} s, {cpu:.2f} s of CPU, of it {part:.1f} % the service's")
        print(
            f"  its commits and loading {main - useful + beside:.2f}, the lease's and other threads {cpu - main - beside:.2f}"
        )
        print("  " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in spent.items()), flush=True)
    store.close()


def clocks() -> tuple[float, float, float]:
    return time.perf_counter(), time.process_time(), time.thread_time()


def work(keeper: Keeper) -> None:
    claimed = leases.claim(keeper.store, keeper.settings, "wrk_bench", ["any"])
    assert claimed is not None
    runner.run(keeper, *claimed)


def timed(spent: dict[str, float]) -> Any:
    """Inside, CPU seconds of the calling threads are added up by what they are spent on."""

    def of(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.thread_time() - began

        return run

    patches = ExitStack()
    patches.enter_context(patch.dict(managed.STEPS, {kind: of("steps", step) for kind, step in managed.STEPS.items()}))
    patches.enter_context(patch.object(managed, "evaluate", of("evaluations", managed.evaluate)))
    patches.enter_context(patch.object(managed, "measure", of("measuring rows", managed.measure)))
    patches.enter_context(patch.object(Learner, "save", of("files of checkpoints", Learner.save)))
    patches.enter_context(patch.object(Tenure, "_seal", of(DURABLE, Tenure._seal)))  # pyright: ignore[reportPrivateUsage]
    patches.enter_context(patch.object(runner, "_policies", of("loading the model", runner._policies)))  # pyright: ignore[reportPrivateUsage]
    return patches


# ---------------------------------------------------------------- its growth


def growth(stack: Stack) -> None:
    store = open_store(stack.settings)
    stack.ratchet.create_job(SPEC)
    claimed = leases.claim(store, stack.settings, "wrk_bench", ["any"])
    assert claimed is not None
    lease, step = claimed[0], 0
    print(f"{'commit_step':44}{'CPU ms':>8}{'wall ms':>9}")
    for name, until, curves, groups in (
        ("25 metrics, after 100 steps", 100, 25, 0),
        ("25 metrics, after 1,000 steps", 1000, 25, 0),
        ("250 metrics", 1050, 250, 0),
        ("25 metrics, 8 groups of 8 answers", 1100, 25, 8),
        ("25 metrics, 80 groups of 8 answers", 1130, 25, 80),
        ("1 metric", 1200, 1, 0),
    ):
        wall, cpu = list[float](), list[float]()
        while step < until:
            step += 1
            began = time.perf_counter(), time.process_time()
            commit(store, lease, step, curves, groups)
            wall.append(time.perf_counter() - began[0])
            cpu.append(time.process_time() - began[1])
        last = slice(-50, None)
        print(f"{name:44}{1000 * median(cpu[last]):8.2f}{1000 * median(wall[last]):9.2f}", flush=True)
    store.close()


def commit(store: Store, lease: Lease, step: int, curves: int, groups: int) -> None:
    draw = Random(step)
    point: dict[str, float | None] = {"reward/mean": draw.random()}
    point |= {f"policy/curve_{i}": draw.random() for i in range(curves - 1)}
    sample = {"completion": "2 + 2 = 4", "reward": 1.0}
    rows = [RolloutRow("train", step, group, "2 + 2 =", "4", [sample] * 8) for group in range(groups)]
    leases.commit_step(store, lease, step, point, rows)


# ---------------------------------------------------------------- tiny jobs


def tiny_jobs(stack: Stack, jobs: int) -> None:
    spec = SPEC | {"limits": {"max_steps": 1}, "update": {"batch_size": 8}}
    parts: dict[str, list[float]] = defaultdict(list)
    for number in range(jobs + 1):
        posted = time.time()
        job = stack.ratchet.create_job(spec)
        answered = time.time()
        done = ended(stack, job["id"])
        if not number:
            continue  # the first warms up
        events: Any = stack.ratchet.list_events(job["id"], limit=100)["data"]
        at = {event["type"]: moment(event["created_at"]) for event in reversed(events)}
        started_at = moment(done["started_at"])
        parts["the answer to the POST"].append(answered - posted)
        parts["POST to claimed"].append(started_at - posted)
        parts["claimed to loaded (model, data)"].append(at["resolved"] - started_at)
        parts["loaded to the first step's commit"].append(at["step"] - at["resolved"])
        parts["POST to the first step's commit"].append(at["step"] - posted)
        parts["the commit to the end (checkpoint)"].append(moment(done["finished_at"]) - at["step"])
    for name, seconds in parts.items():
        print(f"{name:44}{1000 * median(seconds):9.0f} ms, longest {1000 * max(seconds):.0f}")
    rows = [ended(stack, job["id"]) for job in [stack.ratchet.create_job(spec) for _ in range(jobs)]]
    rows.sort(key=lambda row: row["started_at"])
    gaps = [moment(after["started_at"]) - moment(row["finished_at"]) for row, after in pairwise(rows)]
    print(f"{'gap between two queued jobs of one worker':44}{1000 * median(gaps):9.0f} ms, longest {1000 * max(gaps):.0f}")


def moment(text: Any) -> float:
    return datetime.fromisoformat(str(text)).timestamp()


def ended(stack: Stack, job_id: str) -> Any:
    until = time.monotonic() + FINAL_WITHIN_S
    while time.monotonic() < until:
        job: Any = stack.ratchet.get_job(job_id)
        if job["status"] in ("succeeded", "failed", "cancelled"):
            assert job["status"] == "succeeded", job["error"]
            return job
        time.sleep(0.02)
    raise RuntimeError(f"{job_id} did not end: {stack.ratchet.get_job(job_id)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: both")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--jobs", type=int, default=10)
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    for backend in options.backend or BACKENDS:
        print(f"{machine()}, {backend}")
        with started(backend) as stack:
            share(stack, options.steps)
            growth(stack)
        with started(backend, workers=1, RATCHET_SERVES="training") as stack:
            tiny_jobs(stack, options.jobs)


if __name__ == "__main__":
    main()
