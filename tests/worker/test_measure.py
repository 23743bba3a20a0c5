"""A row that cannot be taken ends the job before its first step, and not when its turn comes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from job_specs import rl_spec, supervised_spec
from service.jobs import lease as leases
from service.jobs import lifecycle
from service.jobs.lifecycle import create_job
from service.jobs.resolve import resolve
from service.spec.job import JobSpec
from service.spec.model import ModelSpec, TinyConfig
from service.states import Wish
from service.store import checkpoints, jobs, metrics, rollouts
from service.validation import parse
from workers import runner
from workers.loops import managed
from workers.policy.base import Base
from workers.tenure.keeper import Keeper
from workers.tenure.tenure import Tenure

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
def take(store: Any, settings: Any, doorbell: Any) -> Any:
    """Claims the queued job and runs it to the end of its attempt."""

    def take() -> Any:
        claimed = leases.claim(store, settings, "w", {"any"})
        assert claimed is not None
        runner.run(Keeper(store, settings, doorbell), *claimed)
        with store.begin(readonly=True) as session:
            return jobs.find(session, claimed[1].id)

    return take


@pytest.fixture
def run(store: Any, settings: Any, doorbell: Any, folder: str, take: Any) -> Any:
    def run(make: Any, bad: str, steps: int, **data: str) -> Any:
        rows = [{"q": f"{n}", "a": "7"} for n in range(40)]
        rows[37]["q"] = bad
        train = {"source": "inline", "rows": rows, "shuffle": False}
        sections = {**(SHORT if make is rl_spec else {"update": {"batch_size": 2}}), "limits": {"max_steps": steps}}
        spec = make(model={"source": folder}, data={"train": train, "answer": "{a}", **data}, **sections)
        resolved = resolve(store, settings, "default", parse(JobSpec, spec))
        create_job(store, doorbell, project="default", sent=spec, resolved=resolved)
        return take()

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


# ---------------------------------------------------------------- data.overlong

FITS = {rl_spec: 28, supervised_spec: 30}  # characters of a prompt that fit the context of 32: answers have 4 tokens, or 2
MAKES = pytest.mark.parametrize("make", [rl_spec, supervised_spec])


class Rig:
    """Jobs over 12 short rows, of which some may be long, and what the store holds of them afterwards."""

    def __init__(self, store: Any, settings: Any, doorbell: Any, folder: str, take: Any) -> None:
        self.store, self.settings, self.doorbell, self.folder, self.take = store, settings, doorbell, folder, take

    def submit(self, make: Any, rows: list[dict[str, str]], *, steps: int = 12, eval_rows: Any = None, **data: Any) -> str:
        train = {"source": "inline", "rows": rows}
        held_out = {"eval": {"source": "inline", "rows": eval_rows}} if eval_rows else {}
        sections = (
            SHORT | {"log_rollouts": {"every_steps": 1, "groups": 2}} if make is rl_spec else {"update": {"batch_size": 2}}
        )
        data = {"train": train, **held_out, "prompt": "{q}", "answer": "{a}", **data}
        spec = make(model={"source": self.folder}, data=data, limits={"max_steps": steps}, **sections)
        resolved = resolve(self.store, self.settings, "default", parse(JobSpec, spec))
        return create_job(self.store, self.doorbell, project="default", sent=spec, resolved=resolved).id

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.submit(*args, **kwargs)
        return self.take()

    def pause(self, tenure: Tenure) -> None:
        lifecycle.pause(self.store, self.doorbell, "default", tenure.job.id)
        tenure._hold.wish = Wish.PAUSE  # as the keeper's thread would

    def weights(self, job: Any) -> dict[str, Any]:
        with self.store.begin(readonly=True) as session:
            folder = self.store.blobs.path(checkpoints.get(session, job.project, job.checkpoint_id).path)
        return {f"{file.name}:{k}": v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}

    def metric(self, job: Any, name: str) -> list[float | None]:
        with self.store.begin(readonly=True) as session:
            return list(metrics.series(session, job.id, [name])[name].value)

    def prompts(self, job: Any) -> list[str]:
        with self.store.begin(readonly=True) as session:
            return [row.prompt for row in rollouts.page(session, job.id, limit=100)[0]]


@pytest.fixture
def rig(store: Any, settings: Any, doorbell: Any, folder: str, take: Any) -> Rig:
    return Rig(store, settings, doorbell, folder, take)


def short_rows() -> list[dict[str, str]]:
    return [{"q": f"{n}+1=", "a": "7"} for n in range(12)]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@MAKES
def test_a_job_that_skips_rows_learns_as_if_they_had_never_been_there(rig: Rig, make: Any) -> None:
    rows = short_rows()
    rows[3]["q"] = rows[8]["q"] = "5" * (FITS[make] + 1)
    job = rig.run(make, rows, overlong="skip")
    assert job.status == "succeeded", job.error
    without = rig.run(make, [row for number, row in enumerate(rows) if number not in (3, 8)])
    assert same(rig.weights(job), rig.weights(without))
    assert rig.metric(job, "data/overlong_skipped") == [2.0] * 12
    assert rig.metric(without, "data/overlong_skipped") == []
    assert job.resolved["overlong"] == {"train": {"rows": 12, "overlong": 2, "first": [3, 8]}}
    assert job.resolved["warnings"][-1].startswith("data.overlong: skip leaves out 2 of 12 rows of data.train")
    if make is rl_spec:
        assert max(map(len, rig.prompts(job))) < 6
    assert not same(rig.weights(job), rig.weights(rig.run(make, short_rows()))), "the rows that are left out would count"


@MAKES
def test_a_row_that_just_fits_is_kept(rig: Rig, make: Any) -> None:
    rows = short_rows()
    rows[3]["q"] = "5" * FITS[make]
    assert rig.run(make, rows, overlong="skip").resolved["overlong"]["train"]["overlong"] == 0
    assert rig.run(make, rows, overlong="truncate_left").resolved["overlong"]["train"]["overlong"] == 0


@MAKES
def test_a_paused_job_goes_on_over_the_same_rows(rig: Rig, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = short_rows()
    rows[3]["q"] = "5" * 40
    whole = rig.run(make, rows, overlong="skip")
    kind, job_id = ("rl" if make is rl_spec else "supervised"), rig.submit(make, rows, overlong="skip")
    step = managed.STEPS[kind]

    def pausing(attempt: Any, number: int) -> Any:
        if number == 7:
            rig.pause(attempt.tenure)
        return step(attempt, number)

    monkeypatch.setitem(managed.STEPS, kind, pausing)
    assert (paused := rig.take()).status == "paused" and 0 < paused.step < 12
    monkeypatch.undo()
    lifecycle.resume(rig.store, rig.doorbell, "default", job_id)
    resumed = rig.take()
    assert resumed.status == "succeeded" and same(rig.weights(resumed), rig.weights(whole))


def test_a_wish_while_rows_are_measured_is_obeyed_before_any_of_them_is_used(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = short_rows()
    rows[3]["q"] = "5" * 40
    job_id = rig.submit(rl_spec, rows, eval_rows=rows, overlong="skip")
    begin = Tenure.begin

    def wished(self: Tenure, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        rig.pause(self)

    monkeypatch.setattr(Tenure, "begin", wished)
    assert (paused := rig.take()).status == "paused" and paused.step == 0 and "overlong" not in paused.resolved
    monkeypatch.undo()
    lifecycle.resume(rig.store, rig.doorbell, "default", job_id)
    assert (job := rig.take()).status == "succeeded", job.error
    assert job.resolved["overlong"]["eval"] == {"rows": 12, "overlong": 1, "first": [3]}


@MAKES
def test_rows_that_are_all_too_long_end_the_job(rig: Rig, make: Any) -> None:
    long = [{"q": "5" * 40, "a": "7"}]
    job = rig.run(make, short_rows(), eval_rows=long, overlong="skip")
    assert (job.status, job.error["code"], job.error["pointer"]) == ("failed", "all_rows_overlong", "/data/overlong")
    assert "every row of data.eval (1 row) is too long" in job.error["detail"] and job.error["phase"] == "loading"
    assert rig.run(make, long, overlong="skip").error["code"] == "all_rows_overlong"


@MAKES
def test_an_empty_prompt_is_not_skipped(rig: Rig, make: Any) -> None:
    rows = short_rows()
    rows[3]["q"] = ""
    assert rig.run(make, rows, overlong="skip").error["code"] == "prompt_empty"


@MAKES
def test_a_cut_prompt_is_its_end(rig: Rig, make: Any) -> None:
    rows, room = short_rows(), FITS[make]
    rows[3]["q"] = "".join(str(n % 10) for n in range(40))
    by_hand = [dict(row, q=row["q"][-room:]) for row in rows]
    job = rig.run(make, rows, steps=6, eval_rows=rows, overlong="truncate_left")
    assert job.status == "succeeded", job.error
    cut = rig.run(make, by_hand, steps=6, eval_rows=by_hand)
    assert same(rig.weights(job), rig.weights(cut))
    if make is supervised_spec:  # where nothing is sampled, a prompt has the same room in training and evaluation
        assert rig.metric(job, "eval/loss") == rig.metric(cut, "eval/loss") != []
    assert sum(value or 0.0 for value in rig.metric(job, "data/overlong_truncated")) == 1.0  # one epoch
    assert job.resolved["overlong"]["train"] == {"rows": 12, "overlong": 1, "first": [3]}
    if make is rl_spec:
        assert rows[3]["q"][-room:] in rig.prompts(job)


def test_an_answer_is_never_cut(rig: Rig) -> None:
    rows = short_rows()
    rows[3]["a"] = "7" * 31
    job = rig.run(supervised_spec, rows, overlong="truncate_left")
    assert (job.status, job.error["code"]) == ("failed", "sequence_too_long") and "row 3 " in job.error["detail"]
