"""Recipes of the real tinker-cookbook, unchanged and offline, with a small model: each ends, what can fall falls."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from clients.conftest import Whole
from sqlalchemy import select

from service.store.session import open_store
from service.store.tables import Job

KL, NLL = "optim/kl_sample_train_v1", "train_mean_nll"
# One process for all: the cookbook's imports take longer than a recipe.
DRIVER = """
import json, runpy, sys
for program, arguments in json.loads(sys.argv[1]):
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
"""
STEPS = {
    "math_rl": 1,
    "math_rl-async": 1,
    "math_rl-stream": 1,
    "chat_sl": 3,
    "sl_loop": 3,
    "rl_loop": 1,
    "preference-dpo": 2,
    "distillation": 1,
    "sdft": 3,
}
AGAIN = "sdft"  # is run once more, and its worker killed on the way


Rows = dict[str, list[dict[str, Any]]]  # the metrics of each step by recipe


@pytest.mark.timeout(600)  # one test, so that no other process runs all of it again
def test_recipes_run_and_learn_and_one_survives_its_worker(whole: Any, tmp_path: Path) -> None:
    script = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[3] / "examples" / "cookbook" / "recipes.py")))
    script.prepare(tmp_path / "work")
    rows = run(script, whole, tmp_path / "work", tmp_path / "log")
    steps = {name: sum("time/total" in row or NLL in row or "dpo_loss" in row for row in rows[name]) for name in STEPS}
    assert steps == STEPS
    for name in ("math_rl", "math_rl-stream", "distillation"):
        the_sampler_and_the_trainer_agree([row[KL] for row in rows[name] if KL in row])
    for name, metric in (("chat_sl", NLL), ("sl_loop", NLL), ("preference-dpo", "dpo_loss")):
        first, *_, last = [row[metric] for row in rows[name] if metric in row]
        assert last < first - 0.01
    decisions_are_taught(*rows["decisions"])
    learnt, again = of_learning(rows[AGAIN]), of_learning(rows["again"])
    assert len(learnt[0]) > 20
    assert again == learnt  # to the last digit


def run(script: SimpleNamespace, whole: Any, work: Path, log: Path) -> Rows:
    """Every recipe, then one again, whose worker is killed after its first step, then `decisions`."""
    logs = {name: work / "runs" / name for name in [*STEPS, "again", "decisions"]}
    queue = []
    for name, recipe in [*((name, name) for name in STEPS), ("again", AGAIN)]:
        about = script.RECIPES[recipe]
        arguments = [*script.arguments(about, logs[name]), f"max_steps={STEPS[recipe]}"]
        queue.append([f"tinker_cookbook.recipes.{about.module}", arguments])
    queue.append([str(Path(__file__).with_name("decisions.py")), [script.PLAIN, str(logs["decisions"])]])
    first_step = logs["again"] / "metrics.jsonl"
    with whole({"models_dir": work}, RATCHET_MODELS_DIR=str(work)) as server, log.open("wb") as out:
        environment = script.offline(work) | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": server.key}
        command = [sys.executable, "-c", DRIVER, json.dumps(queue)]
        with subprocess.Popen(command, cwd=work, env=environment, stdout=out, stderr=out) as process:
            while process.poll() is None and not (first_step.exists() and first_step.stat().st_size):
                time.sleep(0.02)
            assert process.poll() is None, log.read_text()[-3000:]
            killed = kill_the_host_of_the_newest_session(server)
        assert process.returncode == 0, log.read_text()[-3000:]
        assert attempts(server, killed) > 1
    return {name: script.measured(log) for name, log in logs.items()}


def kill_the_host_of_the_newest_session(server: Whole) -> str:
    """The session's id."""
    store = open_store(server.settings)
    with store.begin(readonly=True) as session:
        job = session.scalars(select(Job).where(Job.kind == "session").order_by(Job.created_at.desc())).first()
        assert job is not None and job.resolved is not None
        os.kill(job.resolved["process"]["pid"], signal.SIGKILL)
    store.close()
    return job.id


def attempts(server: Whole, job_id: str) -> int:
    store = open_store(server.settings)
    with store.begin(readonly=True) as session:
        job = session.get_one(Job, job_id)
    store.close()
    return job.attempt


def the_sampler_and_the_trainer_agree(kl: list[float]) -> None:
    assert kl and all(abs(value) < 1e-6 for value in kl)


def decisions_are_taught(before: dict[str, float], hard: dict[str, float], soft: dict[str, float]) -> None:
    """By a label, then by probabilities."""

    def brier(probabilities: dict[str, float]) -> float:
        return sum((probabilities[name] - wanted) ** 2 for name, wanted in {"heads": 0.5, "tails": 0.25, "edge": 0.25}.items())

    assert all(sum(each.values()) == pytest.approx(1) for each in (before, hard, soft))
    assert hard["tails"] > before["tails"] + 0.1
    assert brier(soft) < brier(hard) - 0.01


def of_learning(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]
