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


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[3] / "examples" / "cookbook" / "recipes.py")))


@pytest.fixture(scope="module")
def ran(script: SimpleNamespace, whole: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The metrics of each step by recipe."""
    work = tmp_path_factory.mktemp("cookbook")
    script.prepare(work)
    logs = {name: work / "runs" / name for name in [*STEPS, "again", "decisions"]}
    queue = []
    for name, recipe in [*((name, name) for name in STEPS), ("again", AGAIN)]:
        about = script.RECIPES[recipe]
        arguments = [*script.arguments(about, logs[name]), f"max_steps={STEPS[recipe]}"]
        queue.append([f"tinker_cookbook.recipes.{about.module}", arguments])
    queue.append([str(Path(__file__).with_name("decisions.py")), [script.PLAIN, str(logs["decisions"])]])
    with whole({"models_dir": work}, RATCHET_MODELS_DIR=str(work)) as server, (work / "log").open("wb") as out:
        environment = script.offline(work) | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": server.key}
        command = [sys.executable, "-c", DRIVER, json.dumps(queue)]
        with subprocess.Popen(command, cwd=work, env=environment, stdout=out, stderr=out) as process:
            while process.poll() is None and not script.measured(logs["again"]):
                time.sleep(0.02)
            if killed := process.poll() is None:  # else it failed, or was too fast
                kill_the_host_of_the_newest_session(server)
        assert process.returncode == 0 and killed, (work / "log").read_text()[-3000:]
    return {name: script.measured(log) for name, log in logs.items()}


def kill_the_host_of_the_newest_session(server: Whole) -> None:
    store = open_store(server.settings)
    with store.begin(readonly=True) as session:
        job = session.scalars(select(Job).order_by(Job.created_at.desc())).first()
        assert job is not None and job.resolved is not None
        os.kill(job.resolved["process"]["pid"], signal.SIGKILL)
    store.close()


def test_every_recipe_ran_all_its_steps(ran: dict[str, list[dict[str, Any]]]) -> None:
    of_steps = {name: [row for row in ran[name] if "time/total" in row or NLL in row or "dpo_loss" in row] for name in STEPS}
    assert {name: len(rows) for name, rows in of_steps.items()} == STEPS


@pytest.mark.parametrize("name", ["math_rl", "math_rl-stream", "distillation"])
def test_the_sampler_and_the_trainer_agree(ran: dict[str, list[dict[str, Any]]], name: str) -> None:
    assert all(abs(row[KL]) < 1e-6 for row in ran[name] if KL in row)
    assert any(KL in row for row in ran[name])


@pytest.mark.parametrize(("name", "metric"), [("chat_sl", NLL), ("sl_loop", NLL), ("preference-dpo", "dpo_loss")])
def test_a_loss_falls(ran: dict[str, list[dict[str, Any]]], name: str, metric: str) -> None:
    values = [row[metric] for row in ran[name] if metric in row]
    assert len(values) == STEPS[name]
    assert values[-1] < values[0] - 0.01


def test_decisions_are_taught_by_hard_and_by_soft_labels(ran: dict[str, list[dict[str, Any]]]) -> None:
    before, hard, soft = ran["decisions"]
    assert all(sum(each.values()) == pytest.approx(1) for each in ran["decisions"])
    assert hard["tails"] > before["tails"] + 0.1
    assert brier(soft) < brier(hard) - 0.01


def brier(probabilities: dict[str, float]) -> float:
    return sum((probabilities[name] - wanted) ** 2 for name, wanted in {"heads": 0.5, "tails": 0.25, "edge": 0.25}.items())


def test_a_recipe_whose_worker_is_killed_ends_with_the_undisturbed_run_s_metrics(ran: dict[str, list[dict[str, Any]]]) -> None:
    """To the last digit."""

    def of_learning(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]

    assert of_learning(ran["again"]) == of_learning(ran[AGAIN])
    assert len(of_learning(ran[AGAIN])[0]) > 20
