"""What a million metric points in one project cost: writing them as workers do, and reading curves through the API.

    python bench/points.py [--points 1000000] [--backend sqlite]

Four jobs with 25 curves each take turns. The first and the last steps are written as a worker writes them: by commit_step, a
step in a transaction, with its event and the checks of the lease. What lies between is the same rows in the same order, in
larger transactions. Read is a whole page of curves, one curve, and the end of one, each of 1000 points at most, put together
in the database; beside it the same of a job of 1000 steps, where nothing is put together.
"""

import argparse
import json
import time
from collections.abc import Iterable
from random import Random

from loopback import BACKENDS, Stack, machine, started
from wire import ask, get, percentile, post

from service.ids import utcnow
from service.jobs import lease as leases
from service.jobs.lease import Lease
from service.store import metrics
from service.store.session import Store, open_store

NAMES = ["reward/mean", "loss", "optimizer/grad_norm", "optimizer/learning_rate", *(f"policy/curve_{i:02}" for i in range(21))]
JOBS = 4
SHORT = 1000  # steps of the job beside
BY_STEP = 250  # steps that are committed one by one, at the beginning and at the end
TOGETHER = 100  # steps in one transaction, between them
READS = 40  # of each kind
SPEC = {
    "kind": "supervised",
    "model": {"source": "tiny"},
    "data": {"train": {"source": "inline", "rows": [{"q": "1", "a": "1"}]}, "prompt": "{q}", "answer": "{a}"},
    "limits": {"max_steps": 1_000_000},
}
Held = list[Lease]


def claimed(stack: Stack, store: Store, count: int) -> Held:
    ask(stack.url, [post("/v1/jobs", stack.key, {**SPEC, "name": f"job {i}"}) for i in range(count)], status=201)
    found = [leases.claim(store, stack.settings, "wrk_bench", ["any"]) for _ in range(count)]
    return [one[0] for one in found if one is not None]


def values(draw: Random) -> dict[str, float | None]:
    return {name: draw.random() for name in NAMES}


def by_step(store: Store, held: Held, steps: Iterable[int]) -> list[float]:
    """Seconds of each commit."""
    draw, times = Random(0), []
    for step in steps:
        for lease in held:
            point = values(draw)
            began = time.perf_counter()
            leases.commit_step(store, lease, step, point)
            times.append(time.perf_counter() - began)
    return times


def together(store: Store, held: Held, steps: range) -> None:
    draw = Random(1)
    for first in range(steps.start, steps.stop, TOGETHER):
        with store.begin() as session:
            for step in range(first, min(first + TOGETHER, steps.stop)):
                for lease in held:
                    metrics.write(session, lease.job_id, step, values(draw), attempt=lease.attempt, now=utcnow())


def reads(stack: Stack, job_id: str, last: int) -> dict[str, float]:
    """95th percentile of each kind, in milliseconds. They take turns."""
    path = f"/v1/jobs/{job_id}/metrics"
    kinds = {
        "25 curves": path,
        "1 curve": f"{path}?name=reward/mean",
        "1 curve, last 500 steps": f"{path}?name=reward/mean&from_step={last - 499}",
        "25 curves, 100 points": f"{path}?points=100",
    }
    answers = ask(stack.url, (get(kind, stack.key) for _ in range(READS) for kind in kinds.values()))
    assert set(json.loads(answers[0].body)["series"]) == set(NAMES)
    assert len(json.loads(answers[2].body)["series"]["reward/mean"]["step"]) == 500
    return {name: percentile((one.took_s for one in answers[i :: len(kinds)]), 95) for i, name in enumerate(kinds)}


def measure(backend: str, points: int) -> None:
    steps = points // (JOBS * len(NAMES))
    with started(backend) as stack:
        store = open_store(stack.settings)
        (short, *held) = claimed(stack, store, JOBS + 1)
        first = by_step(store, held, range(1, BY_STEP + 1))
        together(store, held, range(BY_STEP + 1, steps - BY_STEP + 1))
        last = by_step(store, held, range(steps - BY_STEP + 1, steps + 1))
        together(store, [short], range(1, SHORT + 1))
        few, many = reads(stack, short.job_id, SHORT), reads(stack, held[0].job_id, steps)
        store.close()
    print(f"{backend:32}{'first points':>14}{'last points':>14}{'ratio':>8}")
    rates = [len(NAMES) * len(times) / sum(times) for times in (first, last)]
    print(f"{'points written in a second':32}{rates[0]:14.0f}{rates[1]:14.0f}{rates[1] / rates[0]:8.2f}")
    for part in (50, 95):
        figures = [percentile(times, part) for times in (first, last)]
        print(f"{f'commit of a step, p{part}':32}{figures[0]:11.1f} ms{figures[1]:11.1f} ms{figures[1] / figures[0]:8.2f}")
    print(f"{'':32}{f'{SHORT} steps':>14}{f'{steps} steps':>14}{'ratio':>8}")
    for name, value in few.items():
        print(f"{f'read {name}, p95':32}{value:11.1f} ms{many[name]:11.1f} ms{many[name] / value:8.2f}")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: both")
    options = parser.parse_args()
    print(f"{machine()}; {options.points} points, {len(NAMES)} in a step; the API and the database share the cores\n")
    for backend in options.backend or BACKENDS:
        measure(backend, options.points)


if __name__ == "__main__":
    main()
