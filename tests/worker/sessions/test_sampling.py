"""Sampling: the session's weights in their turn, versions that never change, and the base; alone or beside others the same."""

from typing import Any

import pytest
import torch
from session_operations import LORA, forward_backward, loop, row

from service.ids import utcnow
from service.jobs.discard import discard
from workers.sessions import session, versions
from workers.tenure.resume import verified

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
pytestmark = SQLITE
ASKED = {"kind": "sample", "prompts": [[5, 6, 7], [8, 9]], "num_samples": 2, "seed": 3, "sampling": {"max_tokens": 5}}
SAVE = {"kind": "save_checkpoint", "purpose": "sampler"}


def test_a_sample_in_order_is_of_the_weights_at_its_turn(rig: Any) -> None:
    job, quiet = rig.session(), rig.session()
    rig.send(job, ASKED, *loop(2), ASKED, *loop(1, first=2))
    rig.send(quiet, *loop(3))
    rig.work()
    before, after = rig.answer(job, 1), rig.answer(job, 8)
    assert before != after
    assert len(before["tokens"]) == 4 and before["finish_reasons"] == ["length"] * 4
    ours, theirs = rig.weights(job), rig.weights(quiet)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())  # sampling has changed nothing


def test_sampler_and_trainer_agree(rig: Any) -> None:
    job = rig.session()
    rig.send(job, *loop(2), {**ASKED, "prompts": [[5, 6, 7]], "num_samples": 1})
    rig.work()
    sampled = rig.answer(job, 7)
    (tokens,), (log_probs,) = sampled["tokens"], sampled["log_probs"]
    rig.send(job, forward_backward(row(5, 6, 7, *tokens), kind="forward"))
    rig.work()
    (seen,) = rig.answer(job, 8)["log_probs"]
    assert seen[2:] == pytest.approx(log_probs, abs=1e-5)
    kl = sum(a - b for a, b in zip(log_probs, seen[2:], strict=True)) / len(tokens)
    assert abs(kl) < 1e-6


def test_a_version_does_not_drift_and_changes_nothing(rig: Any) -> None:
    job = rig.session()
    rig.send(job, *loop(2), {**SAVE, "name": "v"}, ASKED)
    rig.work()
    version, then = rig.answer(job, 7)["checkpoint_id"], rig.answer(job, 8)
    trained = rig.session()
    rig.send(trained, *loop(3))
    rig.send(job, *loop(1, first=2))
    rig.send_loose(job, ASKED, lane="s", checkpoint=version)
    rig.work()
    assert rig.answer(job, 1, "s") == then  # to the bit, by another process even: the session was idle in between
    ours, theirs = rig.weights(job), rig.weights(trained)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_sampler_samples_the_base_and_versions_side_by_side(rig: Any) -> None:
    job, sampler = rig.session(), rig.sampler()
    rig.send(job, ASKED, *loop(2), {**SAVE, "name": "v"}, ASKED)
    rig.work()
    version = rig.answer(job, 8)["checkpoint_id"]
    for number in range(4):
        rig.send_loose(sampler, ASKED, lane=f"lane{number}", checkpoint=version if number % 2 else None)
    rig.work()
    answers = [rig.answer(sampler, 1, f"lane{number}") for number in range(4)]
    assert answers[0] == answers[2] == rig.answer(job, 1)  # a new adapter does nothing
    assert answers[1] == answers[3] == rig.answer(job, 9)
    assert (rig.job(sampler).status, rig.job(sampler).status_reason) == ("paused", "idle")


@pytest.mark.parametrize("kind", ["sample", "load_checkpoint"])
def test_a_checkpoint_that_is_deleted_while_it_is_loaded_is_the_user_s_error(
    rig: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    job, sampler = rig.session(), rig.sampler()
    rig.send(job, *loop(1), {**SAVE, "name": "v", "purpose": "sampler"}, *loop(1))
    rig.work()
    version = rig.answer(job, 4)["checkpoint_id"]

    def deleted_behind(store: Any, row: Any) -> Any:
        folder = verified(store, row)
        if row.id == version:
            discard(store, rig.doorbell, [version], utcnow())
        return folder

    for module in (versions, session):
        monkeypatch.setattr(module, "verified", deleted_behind)
    if kind == "sample":
        rig.send_loose(sampler, ASKED, lane="late", checkpoint=version)
        rig.send_loose(sampler, ASKED, lane="base")
    else:
        rig.send(job, {"kind": kind, "checkpoint": version, "optimizer": False}, ASKED)
    rig.work()
    error = rig.error(sampler, 1, "late") if kind == "sample" else rig.error(job, 8)
    assert (error["code"], error["category"]) == ("checkpoint_not_found", "user")
    assert rig.answer(sampler, 1, "base") if kind == "sample" else rig.answer(job, 9)
    assert not rig.store.blobs.path(f"checkpoints/{job}/{version}").exists()


def test_what_is_told_of_prompts(rig: Any) -> None:
    job = rig.session()
    look = {**ASKED, "prompts": [[5, 6, 7], [8, 9]], "prompt_log_probs": True, "top_prompt_log_probs": 3, "top_log_probs": 2}
    rig.send(job, *loop(1), look, forward_backward(row(5, 6, 7), row(8, 9), kind="forward"))
    rig.work()
    told, seen = rig.answer(job, 4), rig.answer(job, 5)["log_probs"]
    assert told["prompt_tokens"] == [[5, 6, 7], [8, 9]]
    assert [values[0] for values in told["prompt_log_probs"]] == [None, None]
    assert [values[1:] for values in told["prompt_log_probs"]] == [pytest.approx(one, abs=1e-5) for one in seen]
    for ids, values, prompt, own in zip(
        told["top_prompt_ids"], told["top_prompt_log_probs"], told["prompt_tokens"], told["prompt_log_probs"], strict=True
    ):
        for place in range(1, len(prompt)):
            assert values[place] == sorted(values[place], reverse=True) and len(set(ids[place])) == 3
            if prompt[place] in ids[place]:
                assert values[place][ids[place].index(prompt[place])] == pytest.approx(own[place], abs=1e-5)
    assert all(len(top) == 2 for answer in told["top_ids"] for top in answer)


def test_texts_are_read_by_the_models_tokenizer(rig: Any) -> None:
    job = rig.session()
    rig.send(job, {"kind": "sample", "texts": ["3+8="], "sampling": {"max_tokens": 3, "temperature": 0.0, "ends": False}})
    rig.work()
    answer = rig.answer(job, 1)
    assert [len(one) for one in answer["prompt_tokens"]] == [4]
    assert [len(one) for one in answer["tokens"]] == [3]


def test_what_cannot_be_sampled(rig: Any) -> None:
    job, sampler, stranger = rig.session(), rig.sampler(), rig.session(project="other")
    rig.send(stranger, {**SAVE, "name": "v"})
    wide = {**LORA, "tiny": {**LORA["tiny"], "seed": 1}}
    unlike = rig.session(wide)
    rig.send(unlike, {**SAVE, "name": "v"})
    rig.work()
    theirs, another = rig.answer(stranger, 1)["checkpoint_id"], rig.answer(unlike, 1)["checkpoint_id"]
    for number, (checkpoint, prompts) in enumerate(
        [("ckpt_none", [[5]]), (theirs, [[5]]), (another, [[5]]), (None, [[99999]]), (None, [[5] * 64])]
    ):
        rig.send_loose(sampler, {**ASKED, "prompts": prompts}, lane=f"l{number}", checkpoint=checkpoint)
    rig.send_loose(sampler, ASKED, lane="good")
    rig.work()
    codes = [rig.error(sampler, 1, f"l{number}")["code"] for number in range(5)]
    assert codes == [
        "checkpoint_not_found",
        "checkpoint_not_found",
        "checkpoint_mismatch",
        "token_unknown",
        "sequence_too_long",
    ]
    assert rig.answer(sampler, 1, "good")["finish_reasons"] == ["length"] * 4
    assert rig.job(job).status == "queued" or rig.job(job).status_reason == "idle"


def test_a_text_with_unknown_characters_is_refused_and_they_are_named(rig: Any) -> None:
    job = rig.session()
    rig.send(
        job,
        {"kind": "sample", "texts": ["abc", "a\u00e9b"]},
        {"kind": "sample", "texts": ["abc"], "sampling": {"max_tokens": 1}},
    )
    rig.work()
    error = rig.error(job, 1)
    assert (error["code"], error["category"]) == ("text_unknown", "user")
    assert "\u00e9" in error["detail"] and "prompt 1" in error["detail"]
    assert rig.answer(job, 2)["texts"]
