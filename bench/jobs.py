"""What a long queue costs: jobs are submitted over HTTP until 10,000 wait, and the same is measured with 100 and with all.

    python bench/jobs.py [--jobs 10000] [--backend sqlite]

Submitting, lists (first page, last page, filters), a worker's claim, and one pass of the reconciler: with nothing to do, when
every job has waited long enough to be rung for again, and after Redis has lost every ring. What does not grow with the queue
has a ratio near 1.
"""

import argparse
import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import redis
from loopback import BACKENDS, Stack, machine, started
from wire import ask, get, percentile, post

from service.doorbell import Doorbell, redis_py_url
from service.ids import utcnow
from service.jobs import lease as leases
from service.jobs.reconciler import reconcile
from service.store.session import Store, open_store

FEW = 100
AT_ONCE = 8  # connections that submit
LISTS = 100  # of each kind
CLAIMS = 20
PASSES = 5
ROWS = 50  # in the spec of each job: lists must not read them
RARE = 1000  # one job in so many has the tag that is looked for
LATER = timedelta(seconds=45)  # long enough to ring again (ring_again_s), short enough for leases

Figures = dict[str, float]  # milliseconds


def spec(number: int) -> dict[str, Any]:
    return {
        "kind": "rl",
        "name": f"job {number}",
        "tags": ["rare"] if number % RARE == 1 else ["often"],
        "model": {"source": "tiny"},
        "data": {
            "train": {"source": "inline", "rows": [{"q": f"{i} + {number} =", "a": str(i + number)} for i in range(ROWS)]},
            "prompt": "{q}",
            "answer": "{a}",
        },
        "objective": {"preset": "gspo"},
        "reward": {"graders": [{"kind": "exact", "reference": "{a}"}]},
        "limits": {"max_steps": 10},
    }


def submit(stack: Stack, first: int, last: int) -> tuple[float, Figures, list[str]]:
    """Jobs a second, how long each took, and their ids."""
    requests = (post("/v1/jobs", stack.key, spec(number), Idempotency_Key=f"job {number}") for number in range(first, last))
    began = time.perf_counter()
    answers = ask(stack.url, requests, AT_ONCE, status=201)
    rate = len(answers) / (time.perf_counter() - began)
    times = [answer.took_s for answer in answers]
    figures = {"submit, p50": percentile(times, 50), "submit, p99": percentile(times, 99)}
    return rate, figures, [json.loads(answer.body)["id"] for answer in answers]


def lists(stack: Stack, oldest: str) -> Figures:
    """`oldest`: the id of one of the first jobs. The kinds take turns."""
    paths = {
        "first page": "/v1/jobs",
        "last page": f"/v1/jobs?after={oldest}",
        "status queued": "/v1/jobs?status=queued",
        "status failed (none)": "/v1/jobs?status=failed",
        "tag (1 in 1000)": "/v1/jobs?tag=rare",
        "name (none)": "/v1/jobs?name=absent",
    }
    answers = ask(stack.url, (get(path, stack.key) for _ in range(LISTS) for path in paths.values()))
    found = {name: percentile((one.took_s for one in answers[i :: len(paths)]), 95) for i, name in enumerate(paths)}
    return {f"list, {name}, p95": value for name, value in found.items()}


def claims(stack: Stack, store: Store) -> Figures:
    times: list[float] = []
    for _ in range(CLAIMS):
        began = time.perf_counter()
        claimed = leases.claim(store, stack.settings, "wrk_bench", ["any"])
        times.append(time.perf_counter() - began)
        assert claimed is not None
        leases.cancelled(store, claimed[0])
    return {"claim, p50": percentile(times, 50), "claim, p95": percentile(times, 95)}


def passes(stack: Stack, store: Store, doorbell: Doorbell) -> Figures:
    def look(later: timedelta = timedelta()) -> int:
        return len(reconcile(store, stack.settings, doorbell, utcnow() + later).rung)

    look()  # connections
    found = {"reconciler, nothing to do": percentile([timed(look) for _ in range(PASSES)], 50)}
    found["reconciler, all wait long"] = percentile([timed(lambda: look(LATER)) for _ in range(PASSES)], 50)
    redis.Redis.from_url(redis_py_url(stack.settings.redis_url.get_secret_value())).flushall()
    found["reconciler, rings lost"] = 1000 * timed(lambda: look(LATER))
    return found


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(backend: str, many: int) -> tuple[list[float], list[Figures]]:
    rates: list[float] = []
    columns: list[Figures] = []
    with started(backend, RATCHET_RECONCILE_EVERY_S="3600") as stack:
        store, doorbell = open_store(stack.settings), Doorbell(stack.settings)
        oldest, there = "", 0
        for count in (FEW, many):
            rate, submitted, ids = submit(stack, there, count)
            oldest, there = oldest or ids[10], count
            rates.append(rate)
            looked = passes(stack, store, doorbell)
            columns.append({**submitted, **lists(stack, oldest), **claims(stack, store), **looked})
        doorbell.close()
        store.close()
    return rates, columns


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: both")
    options = parser.parse_args()
    print(f"{machine()}; {AT_ONCE} connections submit, the API and the database share the cores\n")
    for backend in options.backend or BACKENDS:
        rates, (few, all_) = measure(backend, options.jobs)
        print(f"{backend:30}{f'{FEW} jobs':>14}{f'{options.jobs} jobs':>14}{'ratio':>8}")
        print(f"{'submitted in a second':30}" + "".join(f"{rate:14.0f}" for rate in rates) + f"{rates[1] / rates[0]:8.2f}")
        for name, value in few.items():
            print(f"{name:30}{value:11.1f} ms{all_[name]:11.1f} ms{all_[name] / value:8.1f}")
        print(flush=True)


if __name__ == "__main__":
    main()
