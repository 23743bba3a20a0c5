"""`ratchet demo`: real reinforcement learning on two CPU cores, through the ordinary HTTP API.

The task is to reverse six digits. A supervised warm-up job trains a tiny model until a fifth of its sampled answers are right.
A GSPO job then starts from that checkpoint; its only reward is whether a sampled answer is right. Prompts whose crc32 is
divisible by ten are held out: no job trains on them. The last line printed is the share of them that is answered exactly.
"""

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zlib import crc32

from ratchet_client import Ratchet, RatchetError
from ratchet_client.discovery import find
from ratchet_client.types import Job
from service.cli.curves import answer_text
from service.cli.live import follow
from service.cli.output import complain, console, number, one_line, say
from service.metric_names import EVAL_GREEDY_REWARD_MEAN, EVAL_REWARD_MEAN

TRAIN_ROWS, PROBE_ROWS, HELD_OUT_ROWS = 20_000, 128, 512
SHOWN = 5  # sampled answers, before and after
READY_WITHIN_S = 120.0
LEAVE_WITHIN_S = 90.0  # longer than the stack waits for its worker

Row = dict[str, str]


def run(*, url: str | None, stack_dir: Path | None, data_dir: Path | None, keep: Path | None, seed: int) -> None:
    """Run the demo on the named service, else on its own embedded stack. Raises RatchetError if anything fails.

    `keep`: a new folder for the model. It is made before anything is trained. Raises OSError if it cannot be.
    """
    if keep is not None:
        if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
            raise RatchetError(f"--keep names a new folder for the model, and {keep} is there already")
        keep.mkdir(parents=True, exist_ok=True)
    if url is not None or stack_dir is not None:
        with Ratchet(*find(url, data_dir=stack_dir)) as ratchet:
            teach(ratchet, seed, keep)
    else:
        with folder_for(data_dir) as folder, embedded_stack(folder), Ratchet(*find(data_dir=folder)) as ratchet:
            teach(ratchet, seed, keep)
    complain(what_next(keep))


# ---------------------------------------------------------------- the two jobs


def teach(ratchet: Ratchet, seed: int, keep: Path | None) -> None:
    """Upload rows, run both jobs, keep the model, show what changed."""
    rows = make_rows(seed)
    names = {"train": "demo: digits to reverse", "probe": "demo: warm-up probe", "held_out": "demo: held out"}
    ids = {part: ratchet.create_dataset(rows[part], name)["id"] for part, name in names.items()}
    say(f"uploaded {len(rows['train'])} rows to train on and {len(rows['held_out'])} held-out ones\n")

    say("1. supervised warm-up, until a fifth of the sampled answers is right")
    warm_up = finished(ratchet, ratchet.create_job(warm_up_spec(ids, seed)))
    checkpoint_id = warm_up["checkpoint_id"]
    assert checkpoint_id is not None

    say("\n2. reinforcement learning (GSPO) from the warm-up's checkpoint, with nothing but right or wrong")
    job = finished(ratchet, ratchet.create_job(gspo_spec(ids, checkpoint_id, seed)))
    show_answers(ratchet, job)
    if keep is not None and job["checkpoint_id"] is not None:
        ratchet.download_checkpoint(job["checkpoint_id"], keep)
        say(f"\nthe model is kept in {keep / 'model'}; {keep / 'README.md'} says how to load it")
    result = job["result"] or {}
    before, after = result["initial"], result["final"]
    say(f"\n{changed('held-out exact match, greedy', before, after, EVAL_GREEDY_REWARD_MEAN)}")
    say(changed("held-out exact match", before, after, EVAL_REWARD_MEAN))


def make_rows(seed: int) -> dict[str, list[Row]]:
    """Distinct prompts for each purpose. `probe` are some training prompts, which decide when the warm-up ends."""
    generator, rows = random.Random(seed), {"train": list[Row](), "held_out": list[Row]()}
    wanted = {"train": TRAIN_ROWS, "held_out": HELD_OUT_ROWS}
    for drawn in generator.sample(range(10**6), 2 * TRAIN_ROWS):  # a tenth of these is held out, which is enough
        digits = f"{drawn:06d}"
        part = "held_out" if crc32(f"rev {digits}>".encode()) % 10 == 0 else "train"
        if len(rows[part]) < wanted[part]:
            rows[part].append({"digits": digits, "reversed": digits[::-1]})
    return rows | {"probe": rows["train"][:PROBE_ROWS]}


def finished(ratchet: Ratchet, job: Job) -> Job:
    """Wait until the job has succeeded. If the demo fails or is interrupted, cancel the job."""
    try:
        job = follow(ratchet, job["id"])
    except BaseException:
        with suppress(RatchetError):
            ratchet.cancel_job(job["id"])
        raise
    if job["status"] != "succeeded":
        raise RatchetError(f"the job {job['name']!r} {job['status']}: {(job['error'] or {}).get('detail', 'no reason given')}")
    return job


def task(ids: dict[str, str], eval_part: str) -> dict[str, Any]:
    """The sections that both jobs share: the data and the reward."""
    return {
        "data": {
            "train": {"source": "dataset", "id": ids["train"]},
            "eval": {"source": "dataset", "id": ids[eval_part]},
            "prompt": "rev {digits}>",
            "answer": "{reversed}",
        },
        "reward": {"graders": [{"kind": "exact", "reference": "{reversed}", "strip": False}]},
        "tags": ["demo"],
    }


def warm_up_spec(ids: dict[str, str], seed: int) -> dict[str, Any]:
    return {
        "kind": "supervised",
        "name": "warm-up",
        **task(ids, "probe"),
        "model": {"source": "tiny", "tiny": {"seed": seed}},
        "update": {"batch_size": 64},
        "optimizer": {"learning_rate": 2e-3, "betas": [0.9, 0.98], "schedule": {"kind": "constant", "warmup_steps": 20}},
        "eval": {"every_steps": 5, "temperature": 1.0, "max_completion_tokens": 8},
        "early_stopping": {"metric": EVAL_REWARD_MEAN, "target": 0.2},
        "checkpoints": {"every_steps": 1000},
        "limits": {"max_steps": 300},
        "seed": seed,
    }


def gspo_spec(ids: dict[str, str], checkpoint_id: str, seed: int) -> dict[str, Any]:
    return {
        "kind": "rl",
        "name": "gspo",
        **task(ids, "held_out"),
        "model": {"from_checkpoint": checkpoint_id},
        "objective": {"preset": "gspo", "surrogate": {"clip_low": 0.1, "clip_high": 0.1}},
        "rollout": {"prompts_per_step": 32, "group_size": 8, "max_completion_tokens": 8, "temperature": 1.0},
        "update": {"minibatches": 4},
        "optimizer": {
            "learning_rate": 7e-4,  # with 1e-3 it rises faster, but on some seeds drops in between
            "betas": [0.9, 0.95],
            "schedule": {"kind": "cosine", "warmup_steps": 20, "min_ratio": 0.1},
        },
        "eval": {"every_steps": 20, "temperature": 1.0, "also_greedy": True},
        "checkpoints": {"every_steps": 40},
        "limits": {"max_steps": 80},
        "seed": seed,
    }


# ---------------------------------------------------------------- what changed


def show_answers(ratchet: Ratchet, job: Job) -> None:
    """Show answers to the same held-out prompts before the first step and after the last."""
    for title, step in (("before", 0), ("after", job["step"])):
        say(f"\nsampled answers {title}:")
        for group in ratchet.list_rollouts(job["id"], split="eval", step=step, limit=SHOWN)["data"]:
            prompt = f"  {one_line(group['prompt'])} (right: {one_line(str(group['reference']))})"
            console().print(prompt, answer_text(group["samples"][0]), soft_wrap=True)


def changed(what: str, before: dict[str, float], after: dict[str, float], metric: str) -> str:
    return f"{what}: {number(before[metric])} -> {number(after[metric])}"


def what_next(keep: Path | None) -> str:
    """The text for standard error; the last line of standard output must be the result."""
    if keep is None:
        first = ("ratchet demo --keep my-model", "the same, and the model stays")
    else:
        first = (f'ratchet sample {shlex.quote(str(keep))} "rev 271828>"', "ask the model")
    home = Path(sys.executable).parent
    path = () if shutil.which("ratchet") else ((f'export PATH="{home}:$PATH"', "so that this shell finds `ratchet`"),)
    rest = (
        ("ratchet up", "a stack that stays; the other commands find it"),
        ("ratchet submit examples/copy-digits.yaml --follow", "a job from a file, to change as you like"),
    )
    return "\n".join(("\nwhat next:", *(f"  {line:<50}  {does}" for line, does in (*path, first, *rest))))


# ---------------------------------------------------------------- a stack of its own


@contextmanager
def folder_for(data_dir: Path | None) -> Iterator[Path]:
    """The named directory, which is kept, or a temporary one, which is removed at the end."""
    if data_dir is not None:
        yield data_dir.absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix="ratchet-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def embedded_stack(folder: Path) -> Iterator[None]:
    """`ratchet up` on any free port, in its own process, exactly as a user would start it."""
    say("starting Redis, a Celery worker and the API on this machine ...")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    log, url, started = folder / "up.log", folder / "url", time.monotonic()
    up = [sys.executable, "-m", "service.cli", "up", "--data-dir", str(folder), "--port", "0"]
    with log.open("wb") as file:
        stack = subprocess.Popen(
            [sys.executable, "-m", "service.local.tied", str(os.getpid()), *up],
            # Do not import a `service` folder in the current directory. No loss worker: it would only slow down training.
            env=os.environ | {"PYTHONSAFEPATH": "1", "RATCHET_SERVES": "training"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    opened_ns = log.stat().st_mtime_ns
    try:
        # An older `url` was left behind by a stack that was killed.
        wait_until(lambda: url.exists() and url.stat().st_mtime_ns >= opened_ns, stack, log)
        say(f"ready after {time.monotonic() - started:.0f} s at {url.read_text().strip()}")
        say(f"watch it there in a browser, too; sign in with what this prints: cat {folder / 'key'}\n")
        yield
    finally:
        leave(stack)


def wait_until(ready: Callable[[], bool], stack: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + READY_WITHIN_S
    while not ready():
        if stack.poll() is not None or time.monotonic() > until:
            raise RatchetError(f"the stack did not start:\n{log.read_text(errors='replace').strip()}")
        time.sleep(0.05)


def leave(stack: subprocess.Popen[bytes]) -> None:
    """Stop the stack in order. A second Ctrl-C is passed on and stops it at once. If it is killed, its children die with it."""
    for asked in (signal.SIGTERM, signal.SIGINT):
        stack.send_signal(asked)
        try:
            stack.wait(LEAVE_WITHIN_S)
            return
        except KeyboardInterrupt:
            complain("stopping at once")
        except subprocess.TimeoutExpired:
            break
    stack.kill()
    stack.wait()
