"""A row that cannot be taken ends the job before its first step, and not when its turn comes."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from job_specs import rl_spec, supervised_spec
from service.jobs import lease as leases
from service.jobs.lifecycle import create_job
from service.jobs.resolve import resolve
from service.spec.job import JobSpec
from service.spec.model import ModelSpec, TinyConfig
from service.store import jobs
from service.validation import parse
from workers import runner
from workers.policy.base import Base
from workers.tenure.keeper import Keeper

REFUSES = "{% if 'no' in m.content %}{{ raise_exception('no such words') }}{% endif %}"
TEMPLATE = "{% for m in messages %}" + REFUSES + "{{ m.content }}{% endfor %}"
SHORT: dict[str, Any] = {"rollout": {"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 4}, "eval": {}}


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    shutil.copyfile(sqlite_template, tmp_path / "ratchet.db")
    return f"sqlite:///{tmp_path / 'ratchet.db'}"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A model whose rows the API cannot measure, for it has no tokenizer."""
    config = TinyConfig(hidden_size=16, layers=1, heads=2, intermediate_size=16, context=32)
    base = Base.load(ModelSpec(source="tiny", tiny=config), device="cpu", threads=1)
    base.text.tokenizer.chat_template = TEMPLATE
    base.model.save_pretrained(tmp_path / "model")
    base.text.save(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def run(store: Any, settings: Any, doorbell: Any, folder: str) -> Any:
    def run(make: Any, bad: str, steps: int, **data: str) -> Any:
        rows = [{"q": f"{n}", "a": "7"} for n in range(40)]
        rows[37]["q"] = bad
        train = {"source": "inline", "rows": rows, "shuffle": False}
        sections = {**(SHORT if make is rl_spec else {"update": {"batch_size": 2}}), "limits": {"max_steps": steps}}
        spec = make(model={"source": folder}, data={"train": train, "answer": "{a}", **data}, **sections)
        resolved = resolve(store, settings, "default", parse(JobSpec, spec))
        create_job(store, doorbell, project="default", sent=spec, resolved=resolved)
        claimed = leases.claim(store, settings, "w", {"any"})
        assert claimed is not None
        runner.run(Keeper(store, settings, doorbell), *claimed)
        with store.begin(readonly=True) as session:
            return jobs.find(session, claimed[1].id)

    return run


@pytest.mark.parametrize(
    ("make", "bad", "data", "code"),
    [
        (rl_spec, "1" * 29, {"prompt": "{q}"}, "prompt_too_long"),
        (rl_spec, "", {"prompt": "{q}"}, "prompt_empty"),
        (supervised_spec, "1" * 31, {"prompt": "{q}"}, "sequence_too_long"),
        (supervised_spec, "", {"prompt": "{q}"}, "prompt_empty"),
    ],
)
def test_a_row_that_does_not_fit_is_found_at_load(run: Any, make: Any, bad: str, data: Any, code: str) -> None:
    job = run(make, bad, 20, **data)
    assert (job.status, job.step, job.error["code"], job.error["phase"]) == ("failed", 0, code, "loading")
    assert "row 37" in job.error["detail"]
    if make is supervised_spec:  # only what is wrong is said
        told = [what for what in ("a prompt has at least one", "the model's context holds") if what in job.error["detail"]]
        assert told == ["a prompt has at least one" if code == "prompt_empty" else "the model's context holds"]
    assert run(make, bad, 2, **data).status == "succeeded"  # the negative control: nobody asks for that row


@pytest.mark.parametrize("make", [rl_spec, supervised_spec])
def test_a_row_that_the_template_refuses_is_found_at_load(run: Any, make: Any) -> None:
    chat: Any = [{"role": "user", "content": "{q}"}]
    job = run(make, "no", 20, chat=chat)
    assert (job.status, job.step, job.error["code"], job.error["pointer"]) == ("failed", 0, "chat_refused", "/data/chat")
    assert "row 37: " in job.error["detail"] and "no such words" in job.error["detail"]
    assert run(make, "1", 2, chat=chat).status == "succeeded"
