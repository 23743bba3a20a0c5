"""Each failure code can happen, and nothing fails with a code that the registry and the docs do not know."""

import ast
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_network
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pydantic import SecretStr
from safetensors.torch import save_file
from sqlalchemy.exc import OperationalError

from job_specs import rl_spec
from service.errors import BucketRefused, BucketUnavailable, Failure, InvalidRequest, JobFailed
from service.failures import CODES, table
from service.ids import new_id, utcnow
from service.jobs import lease as leases
from service.jobs import lifecycle
from service.jobs.data import Data, InlineRows, ReasoningGymRows
from service.jobs.datasets import ingest
from service.jobs.gym_rows import RowMaker
from service.jobs.lifecycle import create_job
from service.jobs.reconciler import reconcile
from service.jobs.resolve import resolve
from service.rewards.rewards import Rewards
from service.rewards.samples import Graded, Sample
from service.rewards.sandbox import Sandbox
from service.settings import Settings
from service.spec.data import ReasoningGymSource
from service.spec.job import JobSpec, RLSpec, SupervisedSpec
from service.spec.model import ModelSpec
from service.spec.reward import RewardSpec
from service.spec.training import OptimizerSpec, VllmEngine
from service.store import events
from service.store.checkpoints import CheckpointRow
from service.validation import parse
from workers.loops.attempt import Attempt
from workers.loops.measure import Part, _without
from workers.loops.no_signal import given_up, no_signal
from workers.loops.nonfinite import MAX_SKIPPED_IN_A_ROW, count_skipped
from workers.loops.progress import Progress
from workers.loops.sampling import fitted, settle_errors
from workers.loops.supervised import encode
from workers.policy.base import Base
from workers.policy.errors import PolicyFailed, Subject
from workers.policy.learner import Learner
from workers.policy.load import adapter_of
from workers.ranks.policies import open_spread
from workers.ranks.ranks import Ranks
from workers.rollout.vllm_server import Server
from workers.runner import _dataset_path
from workers.tenure.failures import POINTERS, failure_of
from workers.tenure.keeper import Hold, Keeper
from workers.tenure.log_tail import LINES, LogTail
from workers.tenure.resume import start_checkpoint

ROOT = Path(__file__).parents[2]


class World:
    """What the producers below need: a store with jobs in it, and tiny policies."""

    def __init__(self, store: Any, settings: Settings, doorbell: Any, specs: Any, folder: Path) -> None:
        self.store, self.settings, self.doorbell, self.specs, self.folder = store, settings, doorbell, specs, folder

    def submit(self, **sections: Any) -> Any:
        spec = self.specs.supervised(**sections)
        resolved = resolve(self.store, self.settings, "default", parse(JobSpec, spec))
        return create_job(self.store, self.doorbell, project="default", sent=spec, resolved=resolved)

    def held(self, **sections: Any) -> leases.Lease:
        self.submit(**sections)
        claimed = leases.claim(self.store, self.settings, "w", {"any"})
        assert claimed is not None
        return claimed[0]

    def policy(self, **model: Any) -> Learner:
        spec = ModelSpec(**{"source": "tiny", **model})
        base = Base.load(spec, device="cpu", threads=1)
        return Learner(base, adapter_of(spec), name="mine", optimizer=OptimizerSpec(), steps=1, seed=0)

    def attempt(self, policy: Any, spec: Any) -> Attempt:
        nothing: Any = SimpleNamespace()
        return Attempt(tenure=nothing, spec=spec, data=nothing, rewards=None, policy=policy, progress=Progress())

    def told(self, job_id: str) -> dict[str, Any]:
        with self.store.begin(readonly=True) as session:
            return [event.data for event in events.after(session, job_id, 0) if event.type == "failure"][-1]


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    """What fails is the same over any database."""
    shutil.copyfile(sqlite_template, tmp_path / "ratchet.db")
    return f"sqlite:///{tmp_path / 'ratchet.db'}"


@pytest.fixture
def world(store: Any, settings: Settings, doorbell: Any, specs: Any, tmp_path: Path) -> World:
    return World(store, settings, doorbell, specs, tmp_path)


PRODUCERS: dict[str, Callable[[World], Any]] = {}


def produces(code: str) -> Callable[[Callable[[World], Any]], Callable[[World], Any]]:
    def register(function: Callable[[World], Any]) -> Callable[[World], Any]:
        PRODUCERS[code] = function
        return function

    return register


# ---------------------------------------------------------------- what a worker runs into


PRODUCERS["invalid_request"] = lambda _: failure_of(InvalidRequest("no such task"))
PRODUCERS["missing_extra"] = lambda _: failure_of(InvalidRequest("not installed", code="missing_extra"))
PRODUCERS["store_unavailable"] = lambda _: failure_of(OperationalError("SELECT 1", {}, Exception("gone")))
PRODUCERS["out_of_memory"] = lambda _: failure_of(torch.OutOfMemoryError("CUDA out of memory"))
PRODUCERS["bucket_unavailable"] = lambda _: failure_of(BucketUnavailable("it does not answer"))
PRODUCERS["bucket_refused"] = lambda _: failure_of(BucketRefused("it refuses: AccessDenied"))
PRODUCERS["io_error"] = lambda _: failure_of(OSError(28, "No space left on device"))
PRODUCERS["internal_error"] = lambda _: failure_of(ZeroDivisionError("a bug"))


@produces("model_pickled")
def _(world: World) -> Any:
    folder = world.folder / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return world.policy(source=str(folder))


PRODUCERS["model_not_found"] = lambda world: world.policy(source=str(world.folder / "nowhere"))
PRODUCERS["lora_target_modules"] = lambda world: world.policy(adapter={"kind": "lora", "target_modules": ["nothing_like_it"]})


@produces("model_unsupported")
def _(world: World) -> None:
    world.policy().text._known([10**6])


@produces("no_chat_template")
def _(world: World) -> None:
    policy = world.policy()
    policy.text.tokenizer.chat_template = None
    policy.text.encode([{"role": "user", "content": "hi"}])


@produces("chat_refused")
def _(world: World) -> None:
    policy = world.policy()
    policy.text.tokenizer.chat_template = "{{ raise_exception('no system turn, please') }}"
    policy.text.encode([{"role": "system", "content": "hi"}])


@produces("no_eos_token")
def _(world: World) -> None:
    policy = world.policy()
    policy.text.eos_ids = []
    policy.text.encode_answer("1")


@produces("non_finite_logits")
def _(world: World) -> None:
    policy = world.policy()
    with torch.no_grad():
        next(policy.base.model.parameters()).fill_(float("nan"))
    policy.sample([policy.text.encode("1")], group_size=1, max_tokens=2, temperature=1.0, seed=0)


@produces("checkpoint_mismatch")
def _(world: World) -> None:
    save_file({"exp_avg/a_layer_of_another_model": torch.zeros(1)}, world.folder / "optimizer.safetensors")
    world.policy()._optimizer.load(world.folder)


@produces("rank_lost")
def _(_: World) -> None:
    ranks = Ranks(2, "cpu")
    ranks.end()
    ranks.together([None], lambda: None)


@produces("non_finite_loss")
def _(world: World) -> None:
    progress = Progress()
    for _ in range(MAX_SKIPPED_IN_A_ROW):
        count_skipped(progress, True, 3)


def _lengths(world: World, prompt: list[int]) -> None:
    spec = parse(RLSpec, world.specs.rl())
    fitted(world.attempt(SimpleNamespace(text=SimpleNamespace(context=128)), spec), [prompt], [7], 64)


PRODUCERS["prompt_empty"] = lambda world: _lengths(world, [])
PRODUCERS["prompt_too_long"] = lambda world: _lengths(world, [1] * 65)


@produces("row_not_made")
def _(_: World) -> None:
    pytest.importorskip("reasoning_gym")
    config = {"min_words": 9000, "max_words": 9001}
    source = ReasoningGymSource(source="reasoning_gym", task="letter_jumble", config=config)
    ReasoningGymRows(source, RowMaker())[0]


@produces("sequence_too_long")
def _(world: World) -> None:
    policy = world.policy()
    attempt = world.attempt(policy, parse(SupervisedSpec, world.specs.supervised()))
    attempt.data = Data(InlineRows([{}]), None, "1" * 200, None, "1")
    encode(attempt, InlineRows([{}]), [0])


@produces("all_rows_overlong")
def _(world: World) -> None:
    rows = InlineRows([{}, {}])
    _without(Part("train", rows, range(2), None, answers=True), [0, 1])


def _checkpoint(world: World, *, commit: bool) -> str:
    held = world.held()
    row = CheckpointRow(new_id("ckpt"), 1, "full", {"source": "tiny"}, "checkpoints/x", 1, "0" * 64, {}, True, False)
    if commit:
        leases.commit_checkpoint(world.store, held, row)
    return row.id


@produces("checkpoint_broken")
def _(world: World) -> None:
    checkpoint_id = _checkpoint(world, commit=True)
    start_checkpoint(world.store, world.submit(), checkpoint_id)


def _dataset(world: World) -> tuple[str, Path]:
    dataset = ingest(world.store, "default", "rows", [b'{"q": "1"}\n'], 100)
    return dataset.id, world.store.blobs.path(dataset.path)


@produces("dataset_broken")
def _(world: World) -> None:
    dataset_id, path = _dataset(world)
    path.write_bytes(b'{"q": "2"}\n')
    _dataset_path(world.store, "default", dataset_id)


@produces("checkpoint_not_found")
def _(world: World) -> None:
    start_checkpoint(world.store, world.submit(), _checkpoint(world, commit=False))


def _ungraded(**reward: Any) -> None:
    grader = {"kind": "exact", "reference": "1"}
    settle_errors(RewardSpec(graders=[grader], **reward), [Graded(None, {"exact": None}, {"exact": "timed out"})])  # pyright: ignore[reportArgumentType]


def _graded_by(url: str) -> None:
    spec = RewardSpec.model_validate({"graders": [{"kind": "http", "url": url}]})
    with Rewards(spec, job_id="job_test", secrets={}, networks=()) as graders:
        graders.grade([Sample("2+2=", "4", 1, False, {})])


def _asked(url: str, *networks: str) -> None:
    spec = VllmEngine.model_validate({"kind": "vllm", "url": url, "served_model": "m", "wait_s": 0})
    server = Server(spec, networks=[ip_network(one) for one in networks], key=None)
    try:
        server.run(server.models())
    finally:
        server.close()


def _answered(status: int, answer: Any) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        Thread(target=listening.handle_request, daemon=True).start()
        _asked(f"http://127.0.0.1:{listening.server_port}", "127.0.0.0/8")


def _without_signal(what: str) -> None:
    spec = parse(JobSpec, rl_spec(limits={"max_steps": 9, "on_no_signal": what, "no_signal_steps": 1}))
    progress = Progress()
    no_signal(progress, spec, {"optimizer/grad_norm": 0.0})
    if (failed := given_up(progress, spec)) is not None:
        raise failed


PRODUCERS["no_signal"] = lambda _: _without_signal("fail")
PRODUCERS["no_signal_paused"] = lambda _: _without_signal("pause")
PRODUCERS["grader_unhealthy"] = lambda _: _ungraded()
PRODUCERS["grader_address_refused"] = lambda _: _graded_by("http://10.0.0.1/judge")
PRODUCERS["rollout_unavailable"] = lambda world: _asked("http://127.0.0.1:1", "127.0.0.0/8")
PRODUCERS["rollout_address_refused"] = lambda world: _asked("http://127.0.0.1:1")
PRODUCERS["rollout_refused"] = lambda world: _answered(401, {"error": "Unauthorized"})
PRODUCERS["rollout_mismatch"] = lambda world: _answered(200, {"data": "none"})
PRODUCERS["gpus_missing"] = lambda _: open_spread(cast(Any, None), "cuda", Ranks(65, "cuda"))
PRODUCERS["ranks_disagree"] = lambda _: Ranks(2, "cpu").agree([b"1", b"2"])
PRODUCERS["sample_not_graded"] = lambda _: _ungraded(on_error="fail")
PRODUCERS["grader_unavailable"] = lambda _: Sandbox("no_such_scorer", {}, "/reward/graders/0").ask_all([("1",)])


# ---------------------------------------------------------------- what the store makes of a worker that is silent


@produces("worker_lost")
def _(world: World) -> Any:
    held = world.held()
    leases.worker_lost(world.store, world.doorbell, "w")
    return world.told(held.job_id)


@produces("lease_lost")
def _(world: World) -> Any:
    held = world.held()
    reconcile(world.store, world.settings, world.doorbell, utcnow() + timedelta(minutes=2))
    return world.told(held.job_id)


@produces("crash_loop")
def _(world: World) -> Any:
    held = world.held(limits={"max_steps": 1, "max_attempts": 1})
    leases.worker_lost(world.store, world.doorbell, "w")
    return world.told(held.job_id)


@produces("max_runtime")
def _(world: World) -> Any:
    held = world.held(limits={"max_steps": 1, "max_runtime_s": 1})
    reconcile(
        world.store, world.settings.model_copy(update={"drain_grace_s": 0.0}), world.doorbell, utcnow() + timedelta(seconds=9)
    )
    return world.told(held.job_id)


@produces("deadline")
def _(world: World) -> Any:
    job = world.submit(limits={"max_steps": 1, "deadline_s": 1})
    reconcile(world.store, world.settings, world.doorbell, utcnow() + timedelta(seconds=9))
    return world.told(job.id)


@produces("unresponsive")
def _(world: World) -> Any:
    held = world.held()
    lifecycle.cancel(world.store, world.doorbell, "default", held.job_id, grace_s=0.0)
    leases.unresponsive(world.store, world.doorbell, held.job_id, utcnow() + timedelta(seconds=1))
    return world.told(held.job_id)


class Exited(Exception):
    pass


@produces("stalled")
def _(world: World) -> Any:
    def exit_(code: int) -> None:
        raise Exited(code)

    held, keeper = world.held(), Keeper(world.store, world.settings, world.doorbell)
    keeper.hold(Hold(held, stall_timeout_s=-1.0, tail=LogTail(world.settings)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.tenure.keeper.os._exit", exit_)
        with pytest.raises(Exited):
            keeper.tick()
    return world.told(held.job_id)


@pytest.mark.parametrize("code", CODES)
def test_each_code_can_happen_and_says_what_the_registry_says(world: World, code: str) -> None:
    try:
        found = PRODUCERS[code](world)
    except JobFailed as failed:
        found = failed.failure
    said = found.as_dict() if isinstance(found, Failure) else found
    assert said["code"] == code
    assert (said["category"], said["retryable"]) == (CODES[code].category, CODES[code].retryable)
    assert said["detail"] and said["hint"]


@pytest.mark.parametrize(
    ("code", "pointer"),
    [
        ("model_not_found", "/model/source"),
        ("model_pickled", "/model/source"),
        ("model_unsupported", "/model/source"),
        ("no_eos_token", "/model/source"),
        ("no_chat_template", "/data/chat"),
        ("chat_refused", "/data/chat"),
        ("lora_target_modules", "/model/adapter/target_modules"),
        ("checkpoint_mismatch", "/model/from_checkpoint/load"),
    ],
)
def test_what_a_policy_refuses_points_into_the_spec(world: World, code: str, pointer: str) -> None:
    with pytest.raises(PolicyFailed) as failed:
        PRODUCERS[code](world)
    failure = failure_of(failed.value)
    assert failure.pointer == pointer
    assert failure.as_dict() == {**failed.value.failure.as_dict(), "pointer": pointer}


def test_an_adapter_that_does_not_fit_points_at_the_adapter(world: World) -> None:
    world.policy(adapter={"kind": "lora"}).save(world.folder)
    with pytest.raises(PolicyFailed) as failed:
        Base.load(ModelSpec(source="tiny"), device="cpu", threads=1, checkpoint=world.folder)
    assert failure_of(failed.value).pointer == "/model/adapter"


def test_each_subject_has_a_place_in_the_spec() -> None:
    assert POINTERS.keys() == set(Subject)


def test_no_code_is_tried_that_is_not_registered() -> None:
    assert PRODUCERS.keys() == CODES.keys()


# ---------------------------------------------------------------- the registry is the only one


FAILURES = ("JobFailed", "PolicyFailed", "Failure")


def raised_codes() -> Iterator[tuple[str, str | None]]:
    """Where a failure is made, and with which code; None where that is not written out."""
    for path in [*(ROOT / "service").rglob("*.py"), *(ROOT / "workers").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FAILURES:
                first = node.args[0] if node.args else ast.Constant(None)
                for one in (first.body, first.orelse) if isinstance(first, ast.IfExp) else (first,):
                    yield f"{path.name}:{node.lineno}", one.value if isinstance(one, ast.Constant) else None  # pyright: ignore[reportReturnType]


def test_every_code_in_the_code_is_registered() -> None:
    found = list(raised_codes())
    assert len(found) > 20
    assert [(where, code) for where, code in found if code is not None and code not in CODES] == []


def test_a_code_that_is_not_registered_cannot_be_raised() -> None:
    with pytest.raises(KeyError, match="no_such_code"):
        JobFailed("no_such_code", "it went wrong")


def test_the_docs_have_the_registry_s_table() -> None:
    assert table() in (ROOT / "docs" / "failures.md").read_text(), "python -m service.failures prints the current one"


# ---------------------------------------------------------------- the log tail


def test_the_tail_is_short_clean_and_without_traces(settings: Settings) -> None:
    secretive = settings.model_copy(update={"grader_secrets": {"judge": SecretStr("hunter2-hunter2")}})
    log = logging.getLogger("workers.test")
    with LogTail(secretive) as tail:
        for number in range(LINES + 5):
            log.warning("line %d", number)
        try:
            raise ValueError("what a customer wrote")
        except ValueError:
            log.exception("sent hunter2-hunter2 to tml-abcdefghijklmnop")
    log.warning("after the attempt")
    failure = tail.add_to(
        Failure("io_error", "no luck with redis://:s3cret@host", details={"url": "http://u:s3cret@h/", "n": 1})
    )
    assert len(failure.log_tail) == LINES
    assert failure.log_tail[0].endswith("WARNING workers.test: line 6")
    assert failure.log_tail[-1].endswith("ERROR workers.test: sent *** to tml-***")
    assert "customer" not in str(failure) and "s3cret" not in str(failure)
    assert failure.details["n"] == 1


def test_without_the_scrubber_the_tail_would_tell(settings: Settings) -> None:
    """The negative control of the test above."""
    with LogTail(settings) as tail:
        logging.getLogger("workers.test").warning("sent hunter2-hunter2")
    assert "hunter2-hunter2" in tail.add_to(Failure("io_error", "")).log_tail[-1]


def test_a_dataset_is_read_only_as_it_was_uploaded(world: World) -> None:
    dataset_id, path = _dataset(world)
    os.utime(path, (1, 1))
    assert _dataset_path(world.store, "default", dataset_id) == path
    path.write_bytes(b"")
    with pytest.raises(JobFailed, match="was altered"):
        _dataset_path(world.store, "default", dataset_id)
    path.unlink()
    with pytest.raises(JobFailed, match="is not on this machine"):
        _dataset_path(world.store, "default", dataset_id)
