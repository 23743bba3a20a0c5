"""What a second worker on the same machine brings: equal small jobs by two workers, against one.

    python bench/two_workers.py [--turns 3] [--jobs 8] [--steps 20] [--backend sqlite]

Each way has a stack of its own, whose workers are warm, and idle while it is not its turn. Every worker has one thread. A job
loads the tiny model, trains it, and saves a checkpoint. CPU is that of the workers' processes.
"""

import argparse
import time
from contextlib import ExitStack
from statistics import median

from loopback import BACKENDS, Stack, cpu_s, machine, started
from own_cost import ended
from reads import SPEC

WAYS = {"one worker": 1, "two workers": 2}


def run(stack: Stack, jobs: int, steps: int) -> tuple[float, float]:
    """Seconds from the first job's POST to the last one's end, and the workers' CPU seconds."""
    workers = [pid for name, pid in stack.processes.items() if name.startswith("worker")]
    spec = SPEC | {"limits": {"max_steps": steps}, "update": {"batch_size": 8}}
    began = time.perf_counter(), sum(map(cpu_s, workers))
    for job in [stack.ratchet.create_job(spec) for _ in range(jobs)]:
        ended(stack, job["id"])
    return time.perf_counter() - began[0], sum(map(cpu_s, workers)) - began[1]


def measure(backend: str, turns: int, jobs: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with ExitStack() as open_stacks:
        stacks = {
            way: open_stacks.enter_context(
                started(backend, workers=count, RATCHET_SERVES="training", RATCHET_TORCH_THREADS="1")
            )
            for way, count in WAYS.items()
        }
        for stack in stacks.values():
            run(stack, 4, 1)  # warms up
        for _ in range(turns):
            for way, stack in stacks.items():
                found[way].append(run(stack, jobs, steps))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: both")
    options = parser.parse_args()
    print(f"{machine()}; {options.jobs} jobs of {options.steps} steps")
    for backend in options.backend or BACKENDS:
        print(f"\n{backend:16}{'jobs/min':>10}{'CPU s/job':>12}{'rate':>8}")
        rates: dict[str, float] = {}
        for way, times in measure(backend, options.turns, options.jobs, options.steps).items():
            wall, cpu = (median(each) / options.jobs for each in zip(*times, strict=True))
            rates[way] = 60 / wall
            print(f"{way:16}{60 / wall:10.1f}{cpu:12.2f}{rates[way] / rates['one worker']:7.2f}x", flush=True)


if __name__ == "__main__":
    main()
