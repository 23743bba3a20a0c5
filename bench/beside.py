"""What an idle session's host costs the job beside it.

    python bench/beside.py [--rollouts 40]

The demo's rollouts (see demo_rollout.py) beside a host that keeps an idle session, in alternation with rollouts during which
the host's processes are stopped; and the CPU that the idle host takes.
"""

import argparse
import os
import signal
import time
from pathlib import Path
from statistics import median
from typing import Any

from demo_rollout import quiet_libraries, warmed_up
from loopback import cpu_s, machine, started

from service.cli.demo import gspo_spec
from service.spec.job import JobSpec
from service.validation import parse
from workers.loops import rl

WORKERS = {"RATCHET_SERVES": "training", "RATCHET_TORCH_THREADS": "1", "RATCHET_SESSION_IDLE_S": "3600"}
IDLE_S = 20.0


def tree(pid: int) -> list[int]:
    """A process and its children, and theirs."""
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return [pid, *(below for child in children for below in tree(child))]


def beside_a_host(rollouts: int) -> None:
    adapter = {"kind": "lora", "rank": 8, "target_modules": "all-linear"}
    with (
        warmed_up(0) as demo,
        started(workers=1, **WORKERS) as stack,
        stack.ratchet.session(model={"source": "tiny", "adapter": adapter}) as session,
    ):
        row = {"tokens": [3, 4, 5], "target_tokens": [4, 5, 6]}
        session.forward_backward([row])
        session.optim_step({"learning_rate": 1e-4})
        pid = stack.processes["worker"]
        began = time.perf_counter(), cpu_s(pid)
        time.sleep(IDLE_S)
        idle = (cpu_s(pid) - began[1]) / (time.perf_counter() - began[0])
        spec: Any = parse(JobSpec, gspo_spec(demo.ids, "ckpt_none", 0) | {"model": {"source": "tiny"}})
        attempt = demo.attempt(spec, 8 * rollouts)
        found: dict[str, list[tuple[float, float]]] = {"beside it": [], "it is stopped": []}
        for step in range(1, 2 * rollouts + 1):
            way = list(found)[step % 2]
            if way == "it is stopped":
                signalled(pid, signal.SIGSTOP)
            at = time.perf_counter(), time.process_time()
            try:
                rl.step(attempt, step)
            finally:
                found[way].append((time.perf_counter() - at[0], time.process_time() - at[1]))
                signalled(pid, signal.SIGCONT)
            attempt.progress.step = step
    print(f"an idle session's host takes {100 * idle:.2f} % of a core")
    medians = {way: [1000 * median(each) for each in zip(*times[1:], strict=True)] for way, times in found.items()}
    for way, (wall, cpu) in medians.items():
        print(f"a rollout, {way:16}{wall:8.1f} ms{cpu:8.1f} CPU ms")
    (wall, cpu), (alone, alone_cpu) = medians.values()
    print(f"beside it a rollout takes {wall / alone:.3f} of the time and {cpu / alone_cpu:.3f} of the CPU", flush=True)


def signalled(pid: int, which: signal.Signals) -> None:
    for one in tree(pid):
        os.kill(one, which)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rollouts", type=int, default=40)
    options = parser.parse_args()
    quiet_libraries()
    print(machine(), flush=True)
    beside_a_host(options.rollouts)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main()
