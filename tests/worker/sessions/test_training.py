"""What a session's operations compute; and that one that is refused changes nothing."""

import math
from typing import Any

import pytest
import torch
from session_operations import ADAM, FULL, LORA, forward_backward, loop, optim_step, row, train_step

from service.spec.model import ModelSpec
from service.spec.training import OptimizerSpec
from service.store import aliases, clock
from workers.policy.base import Base
from workers.policy.learner import Learner
from workers.policy.load import adapter_of
from workers.policy.optimizer import StepSettings
from workers.policy.score.layout import Items

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
pytestmark = SQLITE


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("model", [LORA, FULL], ids=["lora", "full"])
def test_a_session_trains_as_its_learner_does(rig: Any, model: dict[str, Any], tmp_path: Any) -> None:
    job = rig.session(model)
    rig.send(job, *loop(3))
    rig.work()
    assert (rig.job(job).status, rig.job(job).status_reason, rig.job(job).step) == ("paused", "idle", 3)

    spec = ModelSpec.model_validate(model)
    base = Base.load(spec, device="cpu", threads=1)
    learner = Learner(base, adapter_of(spec), name="plain", optimizer=OptimizerSpec(), steps=1, seed=0)
    for step in range(3):
        for rows in (((5, 6 + step, 7, 8), (9, 10, 11 + step)), ((12, 13 + step, 14),)):
            starts = [0]
            for tokens in rows:
                starts.append(starts[-1] + len(tokens) - 1)
            read = torch.tensor([token for tokens in rows for token in tokens[:-1]])
            targets = torch.tensor([token for tokens in rows for token in tokens[1:]])
            learner.accumulate_targets(Items(read, targets, starts), lambda lp, places: -lp.sum())
        learner.step(StepSettings(ADAM["learning_rate"], (0.9, 0.95), 1e-8, ADAM["weight_decay"], 1.0))
    learner.save(tmp_path)
    from safetensors.torch import load_file

    ours = rig.weights(job)
    theirs = {f"{f.name}:{k}": v for f in sorted(tmp_path.rglob("*.safetensors")) for k, v in load_file(f).items()}
    assert same(ours, theirs)


def test_the_answers_of_a_loop(rig: Any) -> None:
    job = rig.session()
    rig.send(job, forward_backward(row(5, 6, 7, weights=[1.0, -0.5])), optim_step(max_grad_norm=None), *loop(1))
    rig.work()
    first = rig.answer(job, 1)
    ((one, two),) = first["log_probs"]
    assert math.isclose(first["metrics"]["loss:sum"], -(one - 0.5 * two), rel_tol=1e-5)
    step = rig.answer(job, 2)["metrics"]
    assert step["skipped"] is False and step["learning_rate"] == 1e-2 and step["grad_norm"] > 0
    assert [rig.operation(job, seq).status for seq in range(1, 6)] == ["done"] * 5
    assert rig.job(job).step == 2


def test_forward_computes_the_same_and_leaves_nothing(rig: Any) -> None:
    one, other = rig.session(), rig.session()
    rig.send(one, *loop(2))
    look = forward_backward(row(5, 6, 7), kind="forward")
    rig.send(other, look, *loop(1), look, look, *loop(1, first=1))
    rig.work()
    assert rig.answer(other, 5) == rig.answer(other, 6) != rig.answer(other, 1)
    assert same(rig.weights(one), rig.weights(other))


def test_custom_losses_by_signed_weights(rig: Any) -> None:
    """As a client does it: forward, its own gradient of the log-probs, backward with weights = -dC/dlog_probs."""
    job = rig.session()
    lengths = {"target_tokens": [[6, 9], [7, 3]], "tokens": [5, 6]}
    rig.send(
        job,
        forward_backward({**lengths, "weights": [[0.0, 0.0], [0.0, 0.0]]}, kind="forward"),
        forward_backward({**lengths, "weights": [[1.0, -0.1], [0.25, -1.0]]}),
        optim_step(),
    )
    rig.work()
    seen, trained = rig.answer(job, 1), rig.answer(job, 2)
    assert seen["log_probs"] == trained["log_probs"] and seen["metrics"]["loss:sum"] == 0.0
    (a, b), (c, d) = trained["log_probs"][0]
    assert math.isclose(trained["metrics"]["loss:sum"], -(a - 0.1 * b + 0.25 * c - d), rel_tol=1e-5)


def test_importance_sampling_through_a_session(rig: Any) -> None:
    job = rig.session()
    sampled: dict[str, Any] = {"log_probs": [0.0, -1.0, -2.0], "advantages": [0.0, 1.0, -0.5]}
    for name in ("importance_sampling", "ppo", "cispo"):
        rig.send(job, forward_backward(row(5, 6, 7, 8, **sampled), loss=name))
    rig.send(job, forward_backward(row(5, 6, 7, 8, **sampled), loss="dro", config={"beta": 0.1}))
    rig.send(job, forward_backward(row(5, 6, 7, 8, **sampled, mask=[0, 1, 1]), loss="gspo"))
    rig.work()
    (lp,) = rig.answer(job, 1)["log_probs"]
    r = [math.exp(value - q) for value, q in zip(lp, sampled["log_probs"], strict=True)]
    assert math.isclose(rig.answer(job, 1)["metrics"]["loss:sum"], -(r[1] - 0.5 * r[2]), rel_tol=1e-4)
    clipped = [min(max(value, 0.8), 1.2) for value in r]
    ppo = min(r[1], clipped[1]) + min(-0.5 * r[2], -0.5 * clipped[2])
    assert math.isclose(rig.answer(job, 2)["metrics"]["loss:sum"], -ppo, rel_tol=1e-4)
    assert all(rig.answer(job, seq)["log_probs"] == [lp] for seq in (2, 3, 4, 5))


def test_a_loss_that_is_not_finite_skips_the_next_step_only(rig: Any) -> None:
    one, other = rig.session(), rig.session()
    far = forward_backward(row(5, 6, 7, log_probs=[-1000.0, 0.0], advantages=[1.0, 1.0]), loss="importance_sampling")
    rig.send(one, *loop(1))
    rig.send(other, *loop(1), forward_backward(row(5, 6)), far, optim_step())
    rig.work()
    assert rig.answer(other, 5)["metrics"]["loss:sum"] is None
    assert rig.answer(other, 6)["metrics"]["skipped"] is True
    assert same(rig.weights(one), rig.weights(other))
    rig.send(other, *loop(1))
    rig.work()
    assert rig.answer(other, 9)["metrics"]["skipped"] is False


# ---------------------------------------------------------------- updates with an objective


def test_a_train_step_is_one_update_of_several_optimizer_steps(rig: Any) -> None:
    job = rig.session()
    rig.send(job, train_step())
    rig.work()
    answer = rig.answer(job, 1)
    assert rig.job(job).step == 4  # 2 minibatches, 2 epochs
    assert answer["advantages"] == pytest.approx([-1, 1, -1, 1] * 2, abs=0.2)
    assert answer["metrics"]["optimizer/skipped"] == 0 and answer["metrics"]["optimizer/grad_norm"] > 0


def test_a_train_step_of_one_part_is_forward_backward_and_optim_step(rig: Any) -> None:
    one, other = rig.session(), rig.session()
    whole = train_step(minibatches=1, epochs=1)
    rig.send(one, whole)
    rig.send(
        other,
        {"kind": "forward_backward", "objective": whole["objective"], "groups": whole["groups"]},
        {"kind": "optim_step", "optimizer": ADAM},
    )
    rig.work()
    ours, theirs = rig.weights(one), rig.weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-4)
    answered = rig.answer(other, 1)
    assert [len(row) for row in answered["log_probs"]] == [2, 3] * 4
    assert answered["metrics"]["loss:sum"] == pytest.approx(rig.answer(one, 1)["metrics"]["policy/loss"], abs=1e-5)


def test_an_objective_with_a_reference(rig: Any) -> None:
    job = rig.session()
    objective = {"preset": "grpo", "kl": {"place": "loss", "coef": 0.1}}
    rig.send(job, *loop(1), train_step(objective=objective))
    rig.work()
    assert rig.answer(job, 4)["metrics"]["kl/ref_k3"] > 0  # the policy has moved away from its base


# ---------------------------------------------------------------- what is wrong with a request


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown loss": (forward_backward(row(5, 6), loss="cross_entrpy"), "unknown_loss", "did you mean 'cross_entropy'"),
    "secret loss": (forward_backward(row(5, 6), loss="stable_reinforce"), "unknown_loss", "importance_sampling"),
    "unknown setting": (
        forward_backward(row(5, 6, log_probs=[0], advantages=[1]), loss="ppo", config={"clip_low_treshold": 0.8}),
        "unknown_config",
        "clip_low_threshold",
    ),
    "missing setting": (
        forward_backward(row(5, 6, log_probs=[0], advantages=[1]), loss="dro"),
        "missing_config",
        "config.beta",
    ),
    "offsets for bounds": (
        forward_backward(row(5, 6, log_probs=[0], advantages=[1]), loss="ppo", config={"clip_high_threshold": 0.2}),
        "invalid_config",
        "bound the ratio itself",
    ),
    "missing tensor": (forward_backward(row(5, 6, log_probs=[0]), loss="ppo"), "missing_tensor", "advantages"),
    "needless tensor": (forward_backward(row(5, 6, mask=[1])), "unknown_tensor", "does not use the tensor 'mask'"),
    "unknown token": (forward_backward(row(5, 500)), "token_unknown", "got 500"),
    "too long": (forward_backward(row(*[5] * 66)), "sequence_too_long", "65 tokens; the context holds 64"),
    "missing rollout_log_probs": (
        train_step(objective={"preset": "gspo", "correct": {"action": "truncate", "level": "token", "cap": 2.0}}),
        "missing_tensor",
        "rollout_log_probs",
    ),
    "no such checkpoint": (
        {"kind": "load_checkpoint", "checkpoint": "ckpt_none", "optimizer": True},
        "checkpoint_not_found",
        "ckpt_none",
    ),
    "a prompt that is too long": (
        {"kind": "sample", "prompts": [[5] * 60], "sampling": {"max_tokens": 10}},
        "sequence_too_long",
        "may get 10 more",
    ),
}


def test_what_is_refused_changes_nothing(rig: Any) -> None:
    one, other = rig.session(), rig.session()
    rig.send(one, *loop(1))
    gradient, rest = loop(1)[0], loop(1)[1:]
    bad = [operation for operation, _, _ in BAD.values()]
    rig.send(other, gradient, *bad, *rest)
    rig.work()
    for seq, (name, (_, code, words)) in enumerate(BAD.items(), 2):
        error = rig.error(other, seq)
        assert (error["code"], error["category"]) == (code, "user"), (name, error)
        assert words in error["detail"], (name, error)
    assert same(rig.weights(one), rig.weights(other))


def test_nan_in_a_request_is_refused(rig: Any) -> None:
    from array import array

    from service.losses.numbers import tensor
    from service.sessions.codec import pack
    from service.store.operations import Asked

    job = rig.session()
    tensors = {
        "tokens": tensor(array("i", [5, 6])),
        "cu_seqlens": tensor(array("q", [0, 2])),
        "target_tokens": tensor(array("i", [6, 7])),
        "weights": tensor(array("f", [1.0, math.nan])),
    }
    head = {"kind": "forward_backward", "loss": "cross_entropy", "config": {}}
    rig._append(job, [Asked("forward_backward", 1, pack(head, tensors))])
    rig.work()
    error = rig.error(job, 1)
    assert (error["code"], error["pointer"]) == ("nonfinite", "/weights")
    assert "got nan at 1" in error["detail"]


# ---------------------------------------------------------------- checkpoints, and the end


def test_saving_and_loading(rig: Any) -> None:
    job = rig.session()
    rig.send(job, *loop(2), {"kind": "save_checkpoint", "name": "two", "metadata": {"a": 1}}, *loop(1, first=2))
    rig.work()
    saved = rig.answer(job, 7)
    assert (saved["name"], saved["step"]) == ("two", 2)
    third = rig.weights(job)
    rig.send(job, {"kind": "load_checkpoint", "checkpoint": saved["checkpoint_id"], "optimizer": True}, *loop(1, first=2))
    rig.work()
    assert same(rig.weights(job), third)
    rig.send(job, {"kind": "load_checkpoint", "checkpoint": saved["checkpoint_id"], "optimizer": False}, *loop(1, first=2))
    rig.work()
    anew = rig.weights(job)
    assert not same(anew, third)
    assert {float(v) for name, v in anew.items() if ":step/" in name} == {1.0}  # Adam begins anew


def test_an_alias_is_loaded_as_it_pointed_when_it_was_accepted(rig: Any) -> None:
    job = rig.session()
    rig.send(
        job, *loop(1), {"kind": "save_checkpoint", "name": "one"}, *loop(1, first=1), {"kind": "save_checkpoint", "name": "two"}
    )
    rig.work()
    one, two = (rig.answer(job, seq)["checkpoint_id"] for seq in (4, 8))
    load = {"kind": "load_checkpoint", "checkpoint": "mine@best"}
    for seq, checkpoint_id in ((9, one), (10, two)):
        with rig.store.begin() as session:
            wish = aliases.Wish("key_test", clock.now(session))
            aliases.promote(session, "default", "mine@best", checkpoint_id, wish)
        rig.send(job, load, first=seq)
    rig.send(job, load, first=9)  # once more
    rig.work()
    assert [rig.answer(job, seq)["checkpoint_id"] for seq in (9, 10)] == [one, two]
    assert same(rig.weights(job), rig.weights(job, two))


def test_a_name_is_taken_until_it_is_overwritten(rig: Any) -> None:
    job = rig.session()
    save = {"kind": "save_checkpoint", "name": "mine", "purpose": "sampler"}
    rig.send(job, save, save, {**save, "overwrite": True}, {**save, "purpose": "training"})
    rig.work()
    assert rig.error(job, 2)["code"] == "name_taken"
    assert len({rig.answer(job, seq)["checkpoint_id"] for seq in (1, 3, 4)}) == 3


def test_a_version_to_sample_from_has_no_optimizer_state(rig: Any) -> None:
    job = rig.session()
    rig.send(job, *loop(1), {"kind": "save_checkpoint", "name": "v", "purpose": "sampler"})
    rig.work()
    version = rig.answer(job, 4)["checkpoint_id"]
    assert not any("optimizer" in name for name in rig.weights(job, version))
    rig.send(job, {"kind": "load_checkpoint", "checkpoint": version, "optimizer": True})
    rig.send(job, {"kind": "load_checkpoint", "checkpoint": version, "optimizer": False})
    rig.work()
    assert rig.error(job, 5)["code"] == "no_optimizer_state"
    assert rig.answer(job, 6)["checkpoint_id"] == version


def test_a_checkpoint_of_another_adapter_does_not_fit(rig: Any) -> None:
    job, other = rig.session(), rig.session({**LORA, "adapter": {"kind": "lora", "rank": 8}})
    rig.send(other, {"kind": "save_checkpoint", "name": "v"})
    rig.work()
    rig.send(job, *loop(1), {"kind": "load_checkpoint", "checkpoint": rig.answer(other, 1)["checkpoint_id"]}, *loop(1, first=1))
    plain = rig.session()
    rig.send(plain, *loop(2))
    rig.work()
    assert rig.error(job, 4)["code"] == "checkpoint_mismatch"
    assert same(rig.weights(job), rig.weights(plain))


@pytest.mark.parametrize("model", [LORA, FULL], ids=["lora", "full"])
def test_finish_ends_the_session_with_a_checkpoint(rig: Any, model: dict[str, Any]) -> None:
    job = rig.session(model)
    rig.send(job, *loop(1), {"kind": "finish"})
    rig.work()
    ended = rig.job(job)
    assert (ended.status, ended.status_reason, ended.step) == ("succeeded", "finished", 1)
    assert rig.answer(job, 4)["checkpoint_id"] == ended.checkpoint_id
    assert rig.checkpoints(job)[0].is_final


def test_a_full_session_loads_too(rig: Any) -> None:
    job = rig.session(FULL)
    rig.send(job, *loop(1), {"kind": "save_checkpoint", "name": "one"}, *loop(1, first=1))
    rig.work()
    after = rig.weights(job)
    rig.send(job, {"kind": "load_checkpoint", "checkpoint": rig.answer(job, 4)["checkpoint_id"]}, *loop(1, first=1))
    rig.work()
    assert same(rig.weights(job), after)


def test_a_gap_waits(rig: Any) -> None:
    job = rig.session()
    rig.send(job, optim_step(), first=2)
    rig.work()
    assert rig.operation(job, 2).status == "waiting"
    rig.send(job, forward_backward(row(5, 6)), first=1)
    rig.work()
    assert [rig.operation(job, seq).status for seq in (1, 2)] == ["done", "done"]


def test_who_reads_the_answer_of_finish_finds_the_session_ended(rig: Any) -> None:
    job = rig.session()
    rig.send(job, *loop(1), {"kind": "finish"})
    rig.work()
    ended = rig.job(job)
    assert (ended.status, ended.status_reason) == ("succeeded", "finished")
    assert rig.answer(job, 4)["checkpoint_id"] == ended.checkpoint_id
    assert rig.operation(job, 4).finished_at <= ended.finished_at
