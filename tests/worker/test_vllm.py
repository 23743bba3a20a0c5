"""Rollouts on a vLLM server: jobs and the engine against a small server that speaks the same wire, on a real socket."""

import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from ipaddress import ip_network
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from pydantic import SecretStr
from vllm_stand_in import Vllm, error, until

from job_specs import TINY, reversing, rl_spec
from service.errors import InvalidRequest, JobFailed
from service.failures import CODES
from service.jobs import lease as leases
from service.jobs import lifecycle
from service.jobs.lifecycle import create_job
from service.jobs.resolve import resolve
from service.jobs.resolve_rollout import rollout_warnings
from service.settings import Settings
from service.spec.job import JobSpec, RLSpec
from service.spec.model import Lora, ModelSpec
from service.spec.training import OptimizerSpec, VllmEngine
from service.store import jobs, metrics, usage
from service.validation import parse
from workers import runner
from workers.loops import ahead, managed, rl
from workers.policy.base import Base
from workers.policy.learner import Learner
from workers.rollout import vllm_server
from workers.rollout.engine import Request, SamplingParams
from workers.rollout.local import LocalEngine
from workers.rollout.vllm import VllmEngine as Engine
from workers.rollout.vllm_adapters import Adapters
from workers.rollout.vllm_server import Server
from workers.tenure.keeper import Keeper

HERE = (ip_network("127.0.0.0/8"),)
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
MODEL = {**TINY, "adapter": LORA}
ROLLOUT = {"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 4}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(vllm_server, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(vllm_server, "WATCH_S", 0.02)


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    shutil.copyfile(sqlite_template, tmp_path / "ratchet.db")
    return f"sqlite:///{tmp_path / 'ratchet.db'}"


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"rollout_networks": HERE, "rollout_adapters_dir": tmp_path / "adapters"})


def tiny() -> Base:
    return Base.load(ModelSpec.model_validate(TINY), device="cpu", threads=1)


@pytest.fixture(scope="module")
def served() -> Base:
    return tiny()


@pytest.fixture(scope="module")
def trained() -> Base:
    return tiny()


@pytest.fixture
def vllm(served: Base) -> Iterator[Vllm]:
    server = Vllm(served)
    yield server
    server.stop()


class World:
    def __init__(self, store: Any, settings: Any, doorbell: Any) -> None:
        self.store, self.settings, self.doorbell = store, settings, doorbell

    def submit(self, **sections: Any) -> str:
        spec = rl_spec(**{"model": MODEL, "data": reversing(eval_rows=3), "limits": {"max_steps": 3}, **sections})
        resolved = resolve(self.store, self.settings, "default", parse(JobSpec, spec))
        return create_job(self.store, self.doorbell, project="default", sent=spec, resolved=resolved).id

    def take(self, *, obeys: bool = False) -> Any:
        """Run the queued job to the end of its attempt. `obeys`: wishes that come meanwhile are heard."""
        claimed = leases.claim(self.store, self.settings, "w", {"any"})
        assert claimed is not None
        keeper = Keeper(self.store, self.settings, self.doorbell)
        with keeper if obeys else nullcontext():
            runner.run(keeper, *claimed)
        return self.job(claimed[1].id)

    def job(self, job_id: str) -> Any:
        with self.store.begin(readonly=True) as session:
            return jobs.find(session, job_id)

    def metrics(self, job_id: str) -> dict[str, list[tuple[int, float | None]]]:
        """Every curve but those of time."""
        with self.store.begin(readonly=True) as session:
            curves = metrics.series(session, job_id)
        return {name: list(zip(s.step, s.value, strict=True)) for name, s in curves.items() if not name.startswith("perf/")}


@pytest.fixture
def world(store: Any, settings: Any, doorbell: Any) -> World:
    return World(store, settings, doorbell)


def rollout(server: Vllm, *, engine: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    asked = {"kind": "vllm", "url": server.url, "served_model": "base", "wait_s": 5, "timeout_s": 5, **(engine or {})}
    return {**ROLLOUT, "engine": asked, **more}


LOCAL = {**ROLLOUT, "rescore": "always"}  # as with a server: the trainer's own log-probs are the old ones
UNDISTURBED: dict[str, Any] = {}  # the metrics of the job of these tests, by the local engine; filled by the first that asks


def undisturbed(world: World) -> dict[str, Any]:
    if not UNDISTURBED:
        job_id = world.submit(rollout=LOCAL)
        assert world.take().status == "succeeded"
        UNDISTURBED.update(world.metrics(job_id))
    return UNDISTURBED


# ---------------------------------------------------------------- whole jobs


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "stop": ["1"]}])
def test_a_job_on_a_server_that_draws_alike_has_the_metrics_of_the_local_engine(world: World, vllm: Vllm, how: Any) -> None:
    local = undisturbed(world)
    if how:
        local_id = world.submit(rollout={**LOCAL, **how})
        world.take()
        local = world.metrics(local_id)
    served = world.submit(rollout=rollout(vllm, **how))
    job = world.take()
    assert (job.status, job.step) == ("succeeded", 3), job.error
    assert world.metrics(served) == local
    if not how:
        assert all(abs(value) < 1e-6 for _, value in world.metrics(served)["rollout/approx_kl_k3"] if value is not None)
    facts = job.resolved["rollout"]
    assert (facts["engine"], facts["version"], facts["log_probs"]) == ("vllm", "0.33.0", "processed")
    assert facts["off_by"] < 1e-4
    loaded = [body["lora_name"] for body in vllm.paths("/v1/load_lora_adapter")]
    updates = 4  # minibatches
    assert loaded == [f"ratchet-{served}-1-{version}" for version in range(0, 3 * updates + 1, updates)]
    assert vllm.adapters == [] and list(world.settings.rollout_adapters_dir.iterdir()) == []
    sampled = [body for body in vllm.paths("/v1/completions") if body["model"] == loaded[1] and body["temperature"]]
    assert len({body["seed"] for body in sampled}) == len(sampled) > 0


def test_a_server_that_is_started_anew_in_the_middle_changes_nothing(world: World, vllm: Vllm) -> None:
    expected = undisturbed(world)
    restarted: list[Thread] = []

    def restart() -> None:
        vllm.stop()
        vllm.start()

    def die(path: str, body: Any) -> Any:
        if path == "/v1/completions" and len(vllm.paths(path)) > 13 and not restarted:
            restarted.append(Thread(target=restart))
            restarted[0].start()
            return error(500, "EngineCore encountered an issue.", "InternalServerError")
        return None

    vllm.before = die
    disturbed = world.submit(rollout=rollout(vllm))
    job = world.take()
    assert restarted and (job.status, job.attempt) == ("succeeded", 1), job.error
    assert world.metrics(disturbed) == expected
    names = [body["lora_name"] for body in vllm.paths("/v1/load_lora_adapter") if disturbed in body["lora_name"]]
    assert len(names) == len(set(names)) + 1, "one of them was loaded a second time"
    assert vllm.adapters == []


def test_an_attempt_that_died_leaves_nothing_and_loses_nothing(
    world: World, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, ended = undisturbed(world), world.submit()
    lifecycle.cancel(world.store, world.doorbell, "default", ended)

    class Died(BaseException):
        """As by kill -9: nothing is closed."""

    async def not_closed(self: Any) -> None:
        pass

    commits, commit = iter(range(100)), managed._commit

    def die_at_step_2(attempt: Any, result: Any) -> None:
        if next(commits) == 2:  # after the evaluation at step 0, and step 1
            raise Died
        commit(attempt, result)

    disturbed = world.submit(rollout=rollout(vllm), checkpoints={"every_steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Adapters, "close", not_closed)
        patch.setattr(managed, "_commit", die_at_step_2)
        with pytest.raises(Died):
            world.take()
    leases.worker_lost(world.store, world.doorbell, "w")
    [left] = vllm.adapters  # the negative control
    assert left.startswith(f"ratchet-{disturbed}-1-")
    of_an_ended_job, stranger = f"ratchet-{ended}-1-5", "ratchet-job_01stranger-1-3"
    for name in (of_an_ended_job, stranger):
        shutil.copytree(world.settings.rollout_adapters_dir / left, world.settings.rollout_adapters_dir / name)
        vllm.answer(
            "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(world.settings.rollout_adapters_dir / name)}, ""
        )
    job = world.take()
    assert (job.status, job.attempt) == ("succeeded", 2), job.error
    assert world.metrics(disturbed) == expected
    assert job.resolved["rollout"]["left_behind"] == sorted([left, of_an_ended_job])
    assert vllm.adapters == [stranger] == [path.name for path in world.settings.rollout_adapters_dir.iterdir()]


def test_a_pause_is_obeyed_while_the_server_is_away_and_nothing_is_lost(world: World, vllm: Vllm) -> None:
    expected = undisturbed(world)
    disturbed = world.submit(rollout=rollout(vllm, engine={"wait_s": 600}))

    def away(path: str, body: Any) -> Any:
        if path == "/v1/completions" and body["model"].endswith("-4"):  # the second step's
            if not pausing:
                lifecycle.pause(world.store, world.doorbell, "default", disturbed)
                pausing.append(True)
            return error(503, "the engine sleeps", "ServiceUnavailableError")
        return None

    pausing: list[bool] = []
    vllm.before = away
    job = world.take(obeys=True)
    assert (job.status, job.status_reason, job.step, job.error) == ("paused", "paused", 1, None)
    assert job.checkpoint_id is not None and vllm.adapters == []
    vllm.before = lambda path, body: None
    lifecycle.resume(world.store, world.doorbell, "default", disturbed)
    assert world.take().status == "succeeded"
    assert world.metrics(disturbed) == expected


def test_a_cancel_is_obeyed_before_the_server_was_ever_there(world: World, vllm: Vllm) -> None:
    job_id = world.submit(rollout=rollout(vllm, engine={"wait_s": 600}))
    vllm.before = lambda path, body: error(503, "it starts")
    Thread(
        target=lambda: (until(lambda: bool(vllm.asked)), lifecycle.cancel(world.store, world.doorbell, "default", job_id))
    ).start()
    assert world.take(obeys=True).status == "cancelled"


# ---------------------------------------------------------------- a step ahead

AHEAD: dict[str, Any] = {"max_staleness": 1}
TO_THE_SAMPLER = {"preset": "grpo", "anchor": "rollout"}  # ratios against the policy that sampled
CORRECTED = {"preset": "grpo", "correct": {"level": "token", "action": "truncate", "cap": 2}}


def test_the_next_step_is_sampled_while_one_is_learnt_from_by_the_weights_from_before(
    world: World, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt, learn, met = Event(), rl.learn, list[bool]()

    def learn_and_tell(*arguments: Any, **named: Any) -> Any:
        done = learn(*arguments, **named)
        learnt.set()
        return done

    def wait_until_it_has_learnt(path: str, body: dict[str, Any]) -> None:
        if path == "/v1/completions" and body["temperature"] and len(trained_on(vllm)) == 14:  # the second one of step 2
            met.append(learnt.wait(60))

    monkeypatch.setattr(rl, "learn", learn_and_tell)
    vllm.before = wait_until_it_has_learnt
    pays = {"graders": [{"kind": "regex", "pattern": "[0-9A-Z]"}]}  # some answers, so that the weights move
    more = {**AHEAD, "group_size": 6}
    one_by_one = rollout(vllm, engine={"at_once": 1, "timeout_s": 90}, **more)  # most are sent when the weights have changed
    job_id = world.submit(rollout=one_by_one, objective=CORRECTED, reward=pays, data=reversing(eval_rows=0))
    job = world.take()
    assert (job.status, job.step) == ("succeeded", 3), job.error
    assert met == [True], "step 1 was learnt from while answers of step 2 were waited for"
    curves = world.metrics(job_id)
    assert curves["rollout/staleness"] == [(1, 0.0), (2, 1.0), (3, 1.0)]
    versions = [body["model"].rsplit("-", 1)[1] for body in trained_on(vllm)]
    assert versions == ["0"] * 24 + ["4"] * 12, "two prompts with six answers a step, four updates"
    strays = [abs(value or 0) for _, value in curves["rollout/approx_kl_k3"]]
    assert strays[0] < 1e-6 < min(strays[1:]), "the sampler is another policy by then, and the metrics say so"
    assert vllm.adapters == [] and list(world.settings.rollout_adapters_dir.iterdir()) == []


def trained_on(vllm: Vllm) -> list[dict[str, Any]]:
    """What was asked for in training; the looks before the first step are greedy or name the base."""
    return [body for body in vllm.paths("/v1/completions") if body["temperature"] and body["model"] != "base"]


def test_with_a_step_ahead_the_same_prompts_are_drawn_with_the_same_seeds(world: World, vllm: Vllm) -> None:
    drawn = []
    for how in ({}, AHEAD):
        vllm.asked.clear()
        world.submit(rollout=rollout(vllm, **how), objective=TO_THE_SAMPLER)
        assert world.take().status == "succeeded"
        drawn.append(sorted((body["seed"], body["prompt"]) for body in trained_on(vllm)))
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3 * 4 + 2 * 3  # with the evaluations before and after


def test_a_pause_ends_what_is_sampled_ahead_and_counts_it(world: World, vllm: Vllm) -> None:
    paused, came = Event(), list[int]()

    def hang(path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/completions" and len(trained_on(vllm)) == 12:  # the last one of step 3
            lifecycle.pause(world.store, world.doorbell, "default", job_id)
            paused.wait(60)
            return error(503, "it ends")
        return None

    def count(path: str, answer: Any) -> None:
        if path == "/v1/completions" and answer["model"] != "base" and trained_on(vllm):
            came.append(len(answer["choices"][0]["token_ids"]))

    vllm.before, vllm.after = hang, count
    limits = {"max_steps": 4}
    job_id = world.submit(rollout=rollout(vllm, **AHEAD), objective=TO_THE_SAMPLER, data=reversing(eval_rows=0), limits=limits)
    job = world.take(obeys=True)
    paused.set()
    assert (job.status, job.step, job.error) == ("paused", 2, None)
    with world.store.begin(readonly=True) as session:
        assert usage.of_job(session, job_id).sampled_tokens == sum(came) and len(came) == 11
    vllm.before = lambda path, body: None
    lifecycle.resume(world.store, world.doorbell, "default", job_id)
    job = world.take()
    assert (job.status, job.step) == ("succeeded", 4), job.error
    assert dict(world.metrics(job_id)["rollout/staleness"]) == {1: 0.0, 2: 1.0, 3: 0.0, 4: 1.0}
    assert vllm.adapters == []


def test_a_server_that_goes_away_while_a_step_is_learnt_from_is_told_of_at_the_next(world: World, vllm: Vllm) -> None:
    vllm.before = lambda path, body: error(401, "no") if len(trained_on(vllm)) > 4 else None
    world.submit(rollout=rollout(vllm, **AHEAD), objective=TO_THE_SAMPLER, data=reversing(eval_rows=0))
    job = world.take()
    assert (job.status, job.step, job.error["code"]) == ("paused", 1, "rollout_refused")
    assert job.checkpoint_id is not None


def test_what_was_sampled_counts_though_the_next_step_cannot_be_sampled_ahead(
    world: World, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, plain = list[int](), ahead.asked_of

    def asked_of(attempt: Any, step: int) -> Any:
        asked.append(step)
        if asked.count(2) == 1 and step == 2:
            raise JobFailed("prompt_too_long", "only this time")
        return plain(attempt, step)

    monkeypatch.setattr(ahead, "asked_of", asked_of)
    job_id = world.submit(rollout=rollout(vllm, **AHEAD), objective=TO_THE_SAMPLER, data=reversing(eval_rows=0))
    job = world.take()
    assert (job.status, job.step, asked) == ("succeeded", 3, [1, 2, 2, 3]), job.error
    assert dict(world.metrics(job_id)["rollout/staleness"]) == {1: 0.0, 2: 0.0, 3: 1.0}
    with world.store.begin(readonly=True) as session:
        assert usage.of_job(session, job_id).sampled_tokens == sum(
            value or 0 for _, value in world.metrics(job_id)["tokens/sampled"]
        )


def test_to_be_a_step_ahead_needs_another_program_and_an_objective_that_knows(world: World, vllm: Vllm) -> None:
    with pytest.raises(InvalidRequest, match="external engine") as caught:
        world.submit(rollout={**ROLLOUT, **AHEAD})
    assert [error.pointer for error in caught.value.errors] == ["/rollout/max_staleness"]
    for objective, warns in (({"preset": "grpo"}, True), (CORRECTED, False), (TO_THE_SAMPLER, False)):
        spec = parse(JobSpec, rl_spec(model=MODEL, rollout=rollout(vllm, **AHEAD), objective=objective))
        assert isinstance(spec, RLSpec)
        assert any("max_staleness" in warning for warning in rollout_warnings(spec)) == warns


# ---------------------------------------------------------------- what is looked at before the first step


def _of_a_larger_vocabulary(vllm: Vllm) -> None:
    vllm.rows += 1


def _of_a_smaller_vocabulary(vllm: Vllm) -> None:
    vllm.rows -= 1


def _with_another_tokenizer(vllm: Vllm) -> None:
    vllm.after = lambda path, answer: answer["tokens"].reverse() if path == "/tokenize" else None


def _with_another_model(vllm: Vllm) -> None:
    def shifted(path: str, answer: Any) -> None:
        if path == "/v1/completions" and answer["model"] != "base":
            values = answer["choices"][0]["logprobs"]["token_logprobs"]
            values[:] = [value - 0.3 for value in values]

    vllm.after = shifted


def _with_raw_log_probs(vllm: Vllm) -> None:
    vllm.processed = False


def _under_another_name(vllm: Vllm) -> None:
    vllm.name = "llama"


def _without_updates_of_adapters(vllm: Vllm) -> None:
    vllm.updates_adapters = False


def _with_too_small_a_rank(vllm: Vllm) -> None:
    vllm.max_lora_rank = 2


def _with_a_key(vllm: Vllm) -> None:
    vllm.key = "sk-secret"


WARM = {"temperature": 0.7}


@pytest.mark.parametrize(
    ("broken", "how", "code", "says"),
    [
        (_of_a_larger_vocabulary, {}, "rollout_mismatch", "vocabulary"),
        (_of_a_smaller_vocabulary, {}, "rollout_mismatch", "vocabulary"),
        (_with_another_tokenizer, {}, "rollout_mismatch", "tokenizer"),
        (_with_another_model, {}, "rollout_mismatch", "off by 0.3 nats"),
        (_with_raw_log_probs, WARM, "rollout_mismatch", "--logprobs-mode processed_logprobs"),
        (_with_raw_log_probs, {"top_k": 3}, "rollout_mismatch", "--logprobs-mode processed_logprobs"),
        (_under_another_name, {}, "rollout_mismatch", "its models are: llama"),
        (_without_updates_of_adapters, {}, "rollout_refused", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (_with_too_small_a_rank, {}, "rollout_refused", "LoRA rank 4 is greater than max_lora_rank 2"),
        (_with_a_key, {}, "rollout_refused", "RATCHET_ROLLOUT_KEYS"),
    ],
)
def test_a_server_that_does_not_fit_pauses_the_job_at_its_start(
    world: World, vllm: Vllm, broken: Any, how: Any, code: str, says: str
) -> None:
    broken(vllm)
    world.submit(rollout=rollout(vllm, **how))
    job = world.take()
    assert (job.status, job.step, job.error["code"]) == ("paused", 0, code), job.error
    assert says in job.error["detail"] + job.error["hint"] and job.error["pointer"] == "/rollout/engine"
    assert vllm.adapters == []


@pytest.mark.parametrize("mode", ["raw at 1", "processed at 0.7", "with a key", "a shorter context"])
def test_what_fits_is_taken(world: World, vllm: Vllm, mode: str) -> None:
    """The negative controls."""
    if mode == "with a key":
        vllm.key = "sk-secret"
        world.settings = world.settings.model_copy(update={"rollout_keys": {vllm.url: SecretStr("sk-secret")}})
    vllm.processed = mode != "raw at 1"
    if mode == "a shorter context":
        vllm.max_model_len = 20
    how = {"temperature": 0.7 if mode == "processed at 0.7" else 1.0}
    job_id = world.submit(rollout={**rollout(vllm), **how}, limits={"max_steps": 1})
    job = world.take()
    assert job.status == "succeeded" and job.resolved["rollout"]["max_model_len"] == vllm.max_model_len
    assert dict(world.metrics(job_id)["rollout/approx_kl_k3"])[1] == pytest.approx(0, abs=1e-6)


def test_a_prompt_that_only_the_server_has_no_room_for_is_found_at_the_start(world: World, vllm: Vllm) -> None:
    vllm.max_model_len = 11  # "rev 123>" is 8 tokens, and an answer 4
    world.submit(rollout=rollout(vllm))
    job = world.take()
    assert (job.status, job.error["code"]) == ("failed", "prompt_too_long") and "context 11" in job.error["detail"]


def test_a_folder_that_the_server_does_not_see_is_told(world: World, vllm: Vllm) -> None:
    world.settings = world.settings.model_copy(update={"rollout_adapters_seen_as": "/mnt/elsewhere"})
    job_id = world.submit(rollout=rollout(vllm))
    job = world.take()
    assert (job.status, job.error["code"]) == ("paused", "rollout_refused")
    assert f"/mnt/elsewhere/ratchet-{job_id}-1-0" in job.error["detail"]
    assert "RATCHET_ROLLOUT_ADAPTERS_SEEN_AS" in job.error["hint"]


def test_an_address_that_the_operator_does_not_allow_is_not_reached(world: World, vllm: Vllm) -> None:
    world.submit(rollout=rollout(vllm))
    world.settings = world.settings.model_copy(update={"rollout_networks": ()})
    job = world.take()
    assert (job.status, job.error["code"], job.error["pointer"]) == ("paused", "rollout_address_refused", "/rollout/engine/url")
    assert vllm.asked == [] and "RATCHET_ROLLOUT_NETWORKS" in job.error["detail"]


# ---------------------------------------------------------------- what is refused when it is submitted


@pytest.mark.parametrize(
    ("sections", "at", "says"),
    [
        ({"model": TINY}, "/model/adapter/kind", "needs a LoRA adapter"),
        ({"model": {**TINY, "adapter": {**LORA, "rank": 513}}}, "/model/adapter/rank", "at most 512"),
        ({"model": {**TINY, "adapter": {**LORA, "target_parameters": ["x"]}}}, "/model/adapter/target_parameters", "linear"),
        ({"rollout": {"temperature": 2.5}}, "/rollout/temperature", "0.01 to 2"),
        ({"rollout": {"temperature": 0.001}}, "/rollout/temperature", "0.01 to 2"),
        ({"eval": {"temperature": 3.0}}, "/eval/temperature", "0 (greedy), or 0.01 to 2"),
    ],
)
def test_what_no_server_can_serve_is_refused(world: World, sections: Any, at: str, says: str) -> None:
    engine = {"kind": "vllm", "url": "http://127.0.0.1:1", "served_model": "base"}
    sections = {**sections, "rollout": {**ROLLOUT, **sections.get("rollout", {}), "engine": engine}}
    with pytest.raises(InvalidRequest) as caught:
        world.submit(**sections)
    [wrong] = caught.value.errors
    assert wrong.pointer == at and says in wrong.detail
    sections["rollout"].pop("engine")
    if at != "/model/adapter/target_parameters":  # the tiny model has no such weight
        world.submit(**sections)  # the negative control: the local engine takes it


def test_a_server_that_is_not_allowed_and_a_missing_folder_are_refused(world: World, settings: Settings) -> None:
    world.settings = settings.model_copy(update={"rollout_networks": (), "rollout_adapters_dir": None})
    with pytest.raises(InvalidRequest) as caught:
        world.submit(rollout={**ROLLOUT, "engine": {"kind": "vllm", "url": "http://10.0.0.1:8000", "served_model": "base"}})
    assert [(e.pointer, e.code) for e in caught.value.errors] == [
        ("/rollout/engine/url", "address_refused"),
        ("/rollout/engine", "no_adapters_dir"),
    ]


def test_a_correction_is_advised_where_there_is_none(world: World) -> None:
    def warnings(objective: Any, engine: Any) -> list[str]:
        spec = rl_spec(model=MODEL, objective=objective, rollout={**ROLLOUT, "engine": engine})
        told = resolve(world.store, world.settings, "default", parse(JobSpec, spec)).warnings
        return [text for text in told if "advised is objective.correct" in text]

    served = {"kind": "vllm", "url": "http://127.0.0.1:1", "served_model": "base"}
    assert len(warnings({"preset": "grpo"}, served)) == 1
    assert warnings({"preset": "grpo", "correct": {"action": "truncate"}}, served) == []
    assert warnings({"preset": "grpo", "anchor": "rollout"}, served) == []
    assert warnings({"preset": "grpo"}, "local") == []


# ---------------------------------------------------------------- the engine alone


class Rig:
    """A learner that the server samples for, without a job."""

    def __init__(self, vllm: Vllm, base: Base, folder: Path, **options: Any) -> None:
        self.base, adapter = base, Lora(rank=4, alpha=8)
        self.learner = Learner(self.base, adapter, name="job_1", optimizer=OptimizerSpec(), steps=1, seed=0)
        spec = {"kind": "vllm", "url": vllm.url, "served_model": "base", "wait_s": 0.3, "timeout_s": 5, **options}
        self.server = Server(VllmEngine.model_validate(spec), networks=HERE, key=None)
        self.adapters = Adapters(self.server, self.learner, job_id="job_1", attempt=1, folder=folder)
        text = self.base.text
        self.engine = Engine(
            self.server,
            self.adapters,
            adapter="job_1",
            eos_ids=text.eos_ids,
            vocabulary=text.rows,
            decode=text.decode_all,
            show=text.show_all,
        )

    def requests(self, count: int = 3, **how: Any) -> list[Request]:
        params = SamplingParams(**{"max_tokens": 6, **how})
        return [Request(self.base.text.encode(f"rev {n}>"), params, seed, "job_1") for seed, n in enumerate(range(count))]


@pytest.fixture
def rig(vllm: Vllm, trained: Base, tmp_path: Path) -> Iterator[Any]:
    rigs: list[Rig] = []

    def make(**options: Any) -> Rig:
        rigs.append(Rig(vllm, trained, tmp_path / "adapters", **options))
        return rigs[-1]

    yield make
    for one in rigs:
        one.learner.unload()
        one.server.close()


def test_a_stop_text_with_a_token_that_no_text_shows_in_its_middle_is_one(rig: Any) -> None:
    one = rig()
    text = one.base.text
    tokens = [*text.encode("xa"), text.tokenizer.unk_token_id, *text.encode("b")]
    request = Request([5], SamplingParams(max_tokens=9, stop=("a<unk>b",)), seed=0)
    choice = {"prompt_token_ids": [5], "token_ids": tokens, "logprobs": {"token_logprobs": [-1.0] * 4}, "finish_reason": "stop"}
    answer = one.engine._read({"choices": [choice]}, request)
    assert (answer.tokens, answer.text, answer.finish_reason) == (tokens, "xa<unk>b", "stop")
    with pytest.raises(JobFailed, match="nothing that the job gave it ends one"):
        one.engine._read({"choices": [choice]}, Request([5], SamplingParams(max_tokens=9, stop=("a<unk>c",)), seed=0))


def test_answers_are_those_of_the_local_engine_in_any_order_and_number(vllm: Vllm, rig: Any) -> None:
    one = rig(at_once=2)
    asked = one.requests(7) + one.requests(3, temperature=0.5, top_k=9) + one.requests(2, stop=("a", "<eos>"), stop_ids=(1,))
    local: LocalEngine = one.base.engine
    expected = local.run(asked)
    busy, most = [0], [0]

    def count(path: str, body: Any) -> None:
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        time.sleep(0.005)

    def uncount(path: str, answer: Any) -> None:
        busy[0] -= 1

    vllm.before, vllm.after = count, uncount
    assert one.engine.run(asked) == expected
    assert most[0] == 2
    vllm.before, vllm.after = lambda path, body: None, lambda path, answer: None
    tickets = one.engine.submit(asked)
    one.engine.cancel(tickets[1::2])
    stepped: dict[int, Any] = {}
    while one.engine.pending:
        stepped |= dict(one.engine.step())
        assert all(tokens == [] for tokens in one.engine.so_far(tickets).values())
    assert [stepped[ticket] for ticket in tickets[::2]] == expected[::2] and len(stepped) == len(tickets[::2])
    assert len(vllm.paths("/v1/load_lora_adapter")) == 1, "the weights have not changed"


@pytest.mark.parametrize("bad", [{"prompt": []}, {"adapter": "another"}, {"prompt_log_probs": True}, {"top_log_probs": 2}])
def test_what_the_engine_cannot_do_is_refused_and_nothing_waits(rig: Any, bad: dict[str, Any]) -> None:
    one = rig()
    good = one.requests(1)[0]
    with pytest.raises(ValueError):
        one.engine.submit([good, Request(**{**vars(good), **bad})])
    assert one.engine.pending == 0


def _choice(change: Any) -> Any:
    return lambda path, answer: change(answer["choices"][0]) if path == "/v1/completions" else None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["token_ids"].append(5), "7 tokens with 6 log-probs"),
        (lambda c: (c["token_ids"].clear(), c["logprobs"]["token_logprobs"].clear()), "0 tokens"),
        (lambda c: c["token_ids"].__setitem__(0, 10_000), "another vocabulary"),
        (lambda c: c["prompt_token_ids"].pop(), "other prompt tokens"),
        (lambda c: c.update(token_ids=None), "lacks token ids"),
        (lambda c: c.update(logprobs=None), "lacks token ids"),
        (lambda c: c.update(finish_reason="stop"), "--generation-config vllm"),
        (lambda c: (c["token_ids"].pop(), c["logprobs"]["token_logprobs"].pop()), "--max-model-len"),
    ],
)
def test_an_answer_that_is_none_to_the_request_is_told(vllm: Vllm, rig: Any, change: Any, says: str) -> None:
    one = rig()
    vllm.after = _choice(change)
    with pytest.raises(JobFailed) as caught:
        one.engine.run(one.requests(1, ends=False))
    assert caught.value.code == "rollout_mismatch" and says in f"{caught.value.detail} {caught.value.hint}"
    assert one.engine.pending == 0
    vllm.after = lambda path, answer: None
    assert len(one.engine.run(one.requests(2))) == 2  # the engine goes on


def _null(c: Any) -> None:
    c["logprobs"]["token_logprobs"][1] = None


def _minus_infinity(c: Any) -> None:
    c["logprobs"]["token_logprobs"][1] = -9999.0


@pytest.mark.parametrize("change", [_null, _minus_infinity, None])
def test_log_probs_that_are_not_finite_are_the_model_s_fault(vllm: Vllm, rig: Any, change: Any) -> None:
    one = rig()
    if change is None:  # how vLLM 0.33 itself answers
        refused = error(400, "Out of range float values are not JSON compliant: nan")
        vllm.before = lambda path, body: refused if path == "/v1/completions" else None
    else:
        vllm.after = _choice(change)
    one.learner.engine = one.engine
    with pytest.raises(JobFailed) as caught:
        one.learner.sample([one.requests(1)[0].prompt], group_size=1, max_tokens=4, temperature=1.0, seed=0)
    assert caught.value.code == "non_finite_logits" and "dtype" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        (error(503, "overloaded"), "rollout_unavailable"),
        (error(429, "too many"), "rollout_unavailable"),
        (error(400, "temperature is wrong"), "rollout_refused"),
        ((401, {"error": "Unauthorized"}), "rollout_refused"),
        (error(404, "The model does not exist."), "rollout_unavailable"),  # lost as soon as it is loaded
        ((200, "no JSON"), "rollout_mismatch"),
    ],
)
def test_an_error_that_stays_is_told_and_one_that_passes_is_not(vllm: Vllm, rig: Any, answers: Any, code: str) -> None:
    one = rig()
    vllm.before = lambda path, body: answers if path == "/v1/completions" else None
    with pytest.raises(JobFailed) as caught:
        one.engine.run(one.requests(1))
    assert caught.value.code == code
    assert CODES[code].retryable or CODES[code].pauses
    if code == "rollout_unavailable":
        left = [answers, answers]
        vllm.before = lambda path, body: left.pop() if left and path == "/v1/completions" else None
        assert len(one.engine.run(one.requests(1))) == 1


def test_a_server_that_is_slow_is_asked_again_and_one_that_is_gone_is_told(vllm: Vllm, rig: Any) -> None:
    one = rig(timeout_s=0.1, wait_s=5)
    slow = [True, True]

    def answer(path: str, body: Any) -> None:
        if path == "/v1/completions" and slow:
            slow.pop()
            time.sleep(0.2)

    vllm.before = answer
    assert len(one.engine.run(one.requests(2))) == 2 and slow == []
    vllm.stop()
    one.server.spec = one.server.spec.model_copy(update={"wait_s": 0.1})
    with pytest.raises(JobFailed) as caught:
        one.engine.run(one.requests(1))
    assert caught.value.code == "rollout_unavailable" and "ConnectError" in caught.value.detail
    vllm.start()


def test_an_answer_that_the_server_broke_off_is_asked_for_again(vllm: Vllm, rig: Any) -> None:
    one = rig()
    aborted = [True]

    def abort(choice: Any) -> None:
        if aborted:
            aborted.pop()
            choice["finish_reason"] = "abort"

    vllm.after = _choice(abort)
    assert one.engine.run(one.requests(1)) == one.base.engine.run(one.requests(1))


def test_an_endless_answer_is_not_read_to_its_end(vllm: Vllm, rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = rig(wait_s=0)
    monkeypatch.setattr(vllm_server, "MAX_ANSWER_BYTES", 300)
    with pytest.raises(JobFailed, match="longer than 300 bytes"):
        one.engine.run(one.requests(1))
