"""Sessions of the client against the real API, where a stand-in of the worker answers; and where the way there breaks."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from session_stand_in import numbers, working

import ratchet_client.transport
from ratchet_client import (
    Answer,
    Group,
    Ratchet,
    RatchetApiError,
    RatchetConnectionError,
    RatchetError,
    RatchetOperationError,
    Session,
)
from ratchet_client.operations import LARGE, optim_step
from ratchet_client.transport import AsyncTransport
from service.doorbell import Doorbell
from service.jobs import lease
from service.sessions.codec import as_json, pack, unpack
from service.settings import Settings
from service.store import operations
from service.store.operations import Answered
from service.store.session import Store

MODEL = {"source": "tiny"}
ROW = {"tokens": [5, 6, 7], "target_tokens": [6, 7, 8]}
Ran = list[tuple[int, str]]


@pytest.fixture
def ratchet(api: str) -> Iterator[Ratchet]:
    with Ratchet() as ratchet:
        yield ratchet


@pytest.fixture
def ran(store: Store, settings: Settings, doorbell: Doorbell) -> Iterator[Ran]:
    with working(store, settings, doorbell) as ran:
        yield ran


@pytest.fixture
def session(ratchet: Ratchet) -> Iterator[Session]:
    with ratchet.session(model=MODEL, name="loop", reconnect_for_s=20) as session:
        yield session


@pytest.fixture
def posts(monkeypatch: pytest.MonkeyPatch) -> list[httpx.Response]:
    """Every answer to a POST of operations."""
    came = list[httpx.Response]()
    attempt = AsyncTransport.attempt

    async def kept(self: AsyncTransport, method: str, path: str, **content: Any) -> httpx.Response:
        response = await attempt(self, method, path, **content)
        if method == "POST":
            came.append(response)
        return response

    monkeypatch.setattr(AsyncTransport, "attempt", kept)
    return came


def asked(store: Store, session_id: str, seq: int) -> Any:
    with store.begin(readonly=True) as sql:
        (row,) = operations.since(sql, session_id, seq, limit=1)
        return row


# ---------------------------------------------------------------- one operation after the other


def test_a_loop_reads_like_one_on_this_machine(ratchet: Ratchet, session: Session, ran: Ran) -> None:
    groups = session.sample(["ab", "c"], num_samples=2, max_tokens=4, temperature=0.5)
    assert [[answer.text for answer in group.answers] for group in groups] == [["ab", "bc"], ["c", "d"]]
    assert groups[0].prompt_tokens == [97, 98] and groups[0].answers[1].tokens == [98, 99]
    assert groups[1].answers[0].log_probs == pytest.approx([-1 / 99])
    assert [answer.truncated for answer in groups[0].answers] == [False, True]
    for group in groups:
        for answer in group.answers:
            answer.reward = float(answer.text == "bc")
    metrics = session.train_step(groups, objective="gspo", optimizer={"learning_rate": 1e-3}, minibatches=2)
    assert metrics == {"policy/loss": 2.0, "answers": 4.0}
    passed = session.forward_backward([ROW], loss="cross_entropy")
    assert (passed.log_probs, passed.loss) == ([[-5.0, -6.0, -7.0]], 3.0)
    assert session.optim_step({"learning_rate": 1e-3}) == {"grad_norm": 4.0}
    assert session.forward(groups=groups, objective={"preset": "grpo"}).log_probs[1] == [-98.0, -99.0]
    assert session.save("best", purpose="sampler")["name"] == "best"
    assert session.load("ckpt_1", optimizer=False) == "ckpt_1"
    assert session.finish() == "ckpt_2"
    kinds = [
        "sample",
        "train_step",
        "forward_backward",
        "optim_step",
        "forward",
        "save_checkpoint",
        "load_checkpoint",
        "finish",
    ]
    assert ran == list(enumerate(kinds, 1))
    assert [job["id"] for job in ratchet.list_sessions(name="LOOP")["data"]] == [session.id]


def test_what_is_sent_is_what_the_worker_reads(session: Session, store: Store, ran: Ran) -> None:
    answers = [Answer([3, 4], [-1.0, -2.0], reward=1.0, mask=[1, 0]), Answer([5], [-0.5], reward=0.0, finish_reason="length")]
    session.train_step([Group([1, 2], answers)], objective="gspo", epochs=2, temperature=0.7, microbatch_tokens=64)
    session.train_step(
        [{"prompt_tokens": np.array([1]), "answers": [{"tokens": torch.tensor([3, 4]), "advantage": np.array([0.5, -0.5])}]}],
        objective={"preset": "gspo_token"},
    )
    session.sample(prompts=[[7, 8]], stop=["\n"], stop_ids=[2], ends=False, seed=4, top_p=0.9, top_k=5, prompt_log_probs=True)
    first, second, third = (asked(store, session.id, seq).request for seq in (1, 2, 3))
    head = unpack(first)[0]
    assert (head["epochs"], head["temperature"], head["microbatch_tokens"], head["minibatches"]) == (2, 0.7, 64, 1)
    read = as_json(first)
    assert (read["rewards"], read["response_mask"], read["truncated"]) == ([1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0])
    assert (read["rollout_log_probs"], read["completion_tokens"]) == ([-1.0, -2.0, -0.5], [3, 4, 5])
    assert as_json(second)["advantages"] == [0.5, -0.5]
    head, tensors = unpack(third)
    assert (head["seed"], head["sampling"]["stop"], head["sampling"]["stop_ids"]) == (4, ["\n"], [2])
    assert (head["sampling"]["ends"], head["sampling"]["top_p"], head["sampling"]["top_k"]) == (False, 0.9, 5)
    assert numbers(tensors["prompt_tokens"]) == [7, 8]


def test_log_probs_of_a_prompt_have_none_at_its_first_token(session: Session, ran: Ran) -> None:
    (group,) = session.sample(["abc"], prompt_log_probs=True)
    assert group.prompt_log_probs == [None, -0.5, -0.5]


@pytest.mark.parametrize("of", [list, np.array, torch.tensor])
def test_large_bodies_are_tensors_and_mean_the_same(session: Session, store: Store, ran: Ran, of: Any) -> None:
    tokens = list(range(1, 901))
    weights = [[0.5, -0.1]] * 900
    row = {"tokens": of(tokens), "target_tokens": of([[token, 0] for token in tokens]), "weights": of(weights)}
    passed = session.forward_backward([row, {name: values[:3] for name, values in row.items()}])
    assert passed.log_probs == [[-float(token) for token in tokens], [-1.0, -2.0, -3.0]]
    head, tensors = unpack(asked(store, session.id, 1).request)
    assert head == {"kind": "forward_backward", "loss": "cross_entropy", "config": {}}
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "tokens": (903,),
        "cu_seqlens": (3,),
        "target_tokens": (903, 2),
        "weights": (903, 2),
    }
    assert tensors["weights"].data[-8:] == np.array([0.5, -0.1], "<f4").tobytes()


def test_large_groups_and_prompts_are_tensors_and_mean_the_same(session: Session, store: Store, ran: Ran) -> None:
    groups = session.sample(prompts=[[token] * 1500 for token in (5, 6)], num_samples=2, max_tokens=1500)
    assert [group.answers[1].tokens[:2] for group in groups] == [[6, 6], [7, 7]]
    for number, answer in enumerate(answer for group in groups for answer in group.answers):
        answer.reward = [float(number), 1.0]
    session.train_step(groups, objective="gspo", minibatches=2)
    read = as_json(asked(store, session.id, 2).request)
    assert (read["rewards"], read["group_ids"]) == ([[0, 1], [1, 1], [2, 1], [3, 1]], [0, 0, 1, 1])
    assert (read["truncated"], len(read["rollout_log_probs"])) == ([0, 1, 0, 1], 6000)
    assert read["completion_cu_seqlens"] == [0, 1500, 3000, 4500, 6000]


# ---------------------------------------------------------------- several at once


def test_submitted_operations_are_sent_together_and_run_in_order(
    session: Session, ran: Ran, posts: list[httpx.Response]
) -> None:
    handles = [session.submit.optim_step() if number % 2 else session.submit.forward_backward([ROW]) for number in range(40)]
    assert handles[-1].result(20) == {"grad_norm": 40.0}
    assert [handle.result() for handle in handles[1::2]] == [{"grad_norm": float(seq)} for seq in range(2, 41, 2)]
    assert [seq for seq, _ in ran] == list(range(1, 41))
    assert [handle.seq for handle in handles] == list(range(1, 41))
    assert len(posts) < 40


def test_a_held_request_does_not_hold_up_what_comes_after_it(ratchet: Ratchet, session: Session) -> None:
    first = session.submitted(optim_step(), wanted=True)  # nobody answers
    while not ratchet.list_operations(session.id)["data"]:
        sleep(0.01)
    later, began = session.submit.optim_step(), monotonic()
    while ratchet.list_operations(session.id)["next_seq"] < 3:
        assert monotonic() - began < 10
        sleep(0.01)
    with pytest.raises(TimeoutError, match="operation 2"):
        later.result(0.1)
    ratchet.cancel_job(session.id)
    for handle in (first, later):
        with pytest.raises(RatchetOperationError) as caught:
            handle.result(20)
        assert caught.value.code == "session_over"


def test_asynchronous_sessions_do_the_same(ratchet: Ratchet, ran: Ran, posts: list[httpx.Response]) -> None:
    async def loop() -> None:
        async with await ratchet.async_session(model=MODEL) as session:
            handles = [session.submit.forward_backward([ROW]), session.submit.optim_step()]
            passed, stepped = await asyncio.gather(*handles)
            assert (passed.log_probs, stepped) == ([[-5.0, -6.0, -7.0]], {"grad_norm": 2.0})
            assert len(posts) == 1  # one request for both
            (group,) = await session.sample(["ab"])
            assert group.answers[0].text == "ab"
            with pytest.raises(TimeoutError):
                await session.submit.optim_step().result(0)

    asyncio.run(loop())


# ---------------------------------------------------------------- what goes wrong


def test_a_failed_operation_is_raised_and_the_session_goes_on(session: Session, ran: Ran) -> None:
    wrong, right = session.submit.forward_backward([{**ROW, "tokens": [99, 1, 2]}]), session.submit.optim_step()
    with pytest.raises(RatchetOperationError) as caught:
        wrong.result(20)
    error = caught.value
    assert (error.code, error.category, error.pointer, error.seq) == ("token_unknown", "user", "/tokens", 1)
    assert "got 99" in error.detail and error.detail in str(error)
    assert right.result(20) == {"grad_norm": 2.0}
    large = {"tokens": [99] * LARGE, "target_tokens": [1] * LARGE}
    with pytest.raises(RatchetOperationError, match="got 99"):
        session.forward_backward([large])


def test_a_refused_body_takes_no_number_from_those_beside_it(session: Session, ran: Ran) -> None:
    handles = [session.submit.optim_step(), session.submit.optim_step({"learning_rate": -1.0}), session.submit.optim_step()]
    with pytest.raises(RatchetApiError, match="learning_rate"):
        handles[1].result(20)
    assert [handles[0].result(20), handles[2].result(20)] == [{"grad_norm": 1.0}, {"grad_norm": 2.0}]
    assert session.next_seq == 3


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda s: s.forward([ROW], objective="gspo"), "rows with a loss"),
        (lambda s: s.forward([{**ROW, "weights": [float("nan"), 1, 1]}]), "finite"),
        (lambda s: s.forward([{**ROW, "tokens": [1] * LARGE}]), "3 entries for 2048"),
        (lambda s: s.forward([{"tokens": [1] * LARGE, "target_tokens": [1] * LARGE}, ROW | {"mask": [1, 1, 1]}]), "mask"),
    ],
)
def test_what_cannot_be_sent_is_raised_at_once(session: Session, build: Callable[[Session], Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        build(session)
    assert session.next_seq == 1


def test_lost_answers_are_asked_for_again_and_nothing_runs_twice(
    session: Session, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, count = AsyncTransport.attempt, iter(range(10**6))

    async def torn(self: AsyncTransport, method: str, path: str, **content: Any) -> httpx.Response:
        response = await attempt(self, method, path, **content)
        if next(count) % 3 != 2:
            raise httpx.ReadError("the connection broke before the answer came")
        return response

    monkeypatch.setattr(AsyncTransport, "attempt", torn)
    monkeypatch.setattr(ratchet_client.transport, "FIRST_PAUSE_S", 0.001)
    for seq in range(1, 13):
        assert session.optim_step() == {"grad_norm": float(seq)}
    assert [seq for seq, _ in ran] == list(range(1, 13))


@pytest.mark.parametrize("status", [429, 503])
def test_the_same_bytes_are_sent_again_when_the_service_is_busy(
    script: Any, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    view = {"object": "operation", "id": "op_1", "seq": 7, "kind": "optim_step", "status": "done"}
    script.reply({"data": [], "next_seq": 7}).refuse(status, "busy").drop().reply({**view, "result": {"metrics": {"x": 1.0}}})
    monkeypatch.setattr(ratchet_client.transport, "FIRST_PAUSE_S", 0.001)
    with Ratchet(script.url, "tml-test") as ratchet, ratchet.session("job_1") as session:
        assert session.optim_step() == {"x": 1.0}
    _, *sent = script.requests
    assert [request.body for request in sent] == [b'{"seq":7,"kind":"optim_step"}'] * 3
    assert all(request.headers["prefer"] == "wait=30" for request in sent)


def test_a_service_that_stays_away_breaks_the_session_for_good(script: Any) -> None:
    script.reply({"data": [], "next_seq": 1}).drop()
    with Ratchet(script.url, "tml-test") as ratchet, ratchet.session("job_1", reconnect_for_s=0.1) as session:
        later = session.submit.optim_step()
        for attempt in (session.optim_step, later.result, session.optim_step):
            with pytest.raises(RatchetConnectionError):
                attempt()
        assert session.next_seq == 1


def test_a_session_that_is_opened_again_goes_on_behind_its_last_operation(ratchet: Ratchet, session: Session, ran: Ran) -> None:
    session.optim_step()
    session.close()
    with pytest.raises(RatchetError, match="closed here"):
        session.optim_step()
    with ratchet.session(session.id) as again:
        assert (again.next_seq, again.optim_step()) == (2, {"grad_norm": 2.0})


def test_two_programs_that_drive_one_session_are_told(ratchet: Ratchet, session: Session, ran: Ran) -> None:
    with ratchet.session(session.id) as other:
        session.optim_step()
        assert other.optim_step() == {"grad_norm": 1.0}  # the same operation
        session.optim_step()
        with pytest.raises(RatchetApiError) as caught:
            other.forward([ROW])
        assert caught.value.code == "seq_reused"
        with pytest.raises(RatchetApiError):
            other.optim_step()


def test_an_ended_session_says_so(ratchet: Ratchet, session: Session) -> None:
    ratchet.cancel_job(session.id)
    with pytest.raises(RatchetApiError) as caught:
        session.optim_step()
    assert caught.value.code == "session_over"


# ---------------------------------------------------------------- without the object


def test_operations_can_be_sent_as_plain_bodies(ratchet: Ratchet, ran: Ran) -> None:
    made = ratchet.create_session({"model": MODEL})
    assert ratchet.get_session(made["id"])["kind"] == "session"
    done = ratchet.append_operation(made["id"], {"kind": "optim_step", "seq": 1}, wait_s=20)
    assert (done["status"], done["result"]) == ("done", {"metrics": {"grad_norm": 1.0}})
    assert ratchet.append_operation(made["id"], {"kind": "optim_step", "seq": 1})["id"] == done["id"]
    both = ratchet.append_operations(made["id"], [{"kind": "optim_step", "seq": seq} for seq in (2, 3)], wait_s=20)
    assert [one["status"] for one in both] == ["done", "done"]
    assert ratchet.get_operation(made["id"], 3) == ratchet.get_operation(made["id"], both[1]["id"], wait_s=5)
    page = ratchet.list_operations(made["id"], after=1, limit=1)
    assert ([one["seq"] for one in page["data"]], page["has_more"], page["next_seq"]) == ([2], True, 4)


# ---------------------------------------------------------------- the command line


def test_sessions_and_their_operations_are_listed(cli: Any, ratchet: Ratchet, session: Session, ran: Ran) -> None:
    with pytest.raises(RatchetOperationError):
        session.forward([{**ROW, "tokens": [99, 1, 2]}])
    session.optim_step()
    assert ratchet.list_operations(session.id)["waiting"] == 0
    listed = cli("sessions").out.splitlines()
    assert listed[0].split() == ["session", "name", "status", "step", "waiting", "created"]
    assert listed[1].split()[:5] == [session.id, "loop", "running", "0", "0"]
    assert [job["id"] for job in cli("sessions", "--json").json["data"]] == [session.id]
    told = cli("operations", session.id).out
    assert "optim_step" in told and "the model knows tokens 0 to 9, got 99 (token_unknown)" in told
    assert "optim_step" not in cli("operations", session.id, "--after", "0", "--limit", "1").out
    assert cli("operations", session.id, "2", "--json").json["result"] == {"metrics": {"grad_norm": 2.0}}
    assert '{"grad_norm": 2.0}' in cli("operations", session.id, "2").out
    shown = cli("show", session.id).out
    assert "next seq" in shown and "optim_step" in shown and "10000000" not in shown
    assert "no sessions" in cli("sessions", "--name", "another").err


def test_what_waits_in_a_session_is_counted(cli: Any, ratchet: Ratchet, session: Session) -> None:
    for seq in (1, 2, 4):
        ratchet.append_operation(session.id, {"kind": "optim_step", "seq": seq})
    assert cli("sessions").out.splitlines()[1].split()[4] == "3"
    assert re.search(r"operations waiting\s+3\n", cli("show", session.id).out)
    assert re.search(r"next seq\s+5\n", cli("show", session.id).out)


def test_a_session_is_watched_through_its_rest(
    cli: Any, ratchet: Ratchet, session: Session, store: Store, settings: Settings
) -> None:
    ratchet.append_operation(session.id, {"kind": "optim_step", "seq": 1})

    def step(seq: int, step: int) -> None:
        claimed = lease.claim(store, settings, "w", ["any", "cpu"])
        assert claimed is not None
        row = asked(store, session.id, seq)
        metrics = {"loss/sum": 0.5 * step, "optimizer/grad_norm": 1.0}
        answered = [Answered(row.id, pack({"metrics": {}}, {}), step=step, metrics=metrics)]
        for _ in range(2):  # as it is repeated when its answer is lost
            lease.answer_operations(store, settings, claimed[0], answered)
        lease.rest(store, claimed[0], seq)

    step(1, 1)
    ratchet.append_operation(session.id, {"kind": "optim_step", "seq": 2})
    step(2, 2)
    ratchet.cancel_job(session.id)
    watched = cli("watch", session.id)
    assert watched.code == 5 and "step 1  loss 0.500" in watched.out and watched.out.count("paused (idle)") == 2
    events = [json.loads(line) for line in cli("watch", session.id, "--json").out.splitlines()]
    assert [event["data"]["step"] for event in events if event["type"] == "step"] == [1, 2]


def test_a_session_is_paused_resumed_and_cancelled(cli: Any, session: Session) -> None:
    assert [cli(verb, session.id).out.split()[1] for verb in ("pause", "resume", "cancel")] == [
        "paused",
        "queued",
        "cancelled",
    ]
