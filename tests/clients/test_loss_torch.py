"""Losses through the client, with torch and without, over HTTP with a real API and a real loss worker."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from chaos.rig import Zygote
from ratchet_client import Ratchet, RatchetApiError
from ratchet_client.torch import ratchet_loss, ratchet_losses
from service.spec.objective import ObjectiveSpec
from workers.objectives import Objective

WORKED_EXAMPLE = {
    "objective": {"preset": "gspo"},
    "batch": {
        "log_probs": [[-2.0, -1.8, -1.5, -1.2], [-1.9, -1.6, -1.3]],
        "old_log_probs": [[-2.2, -2.0, -1.6, -1.3], [-2.1, -1.8, -1.5]],
        "advantages": [1.0, -1.0],
    },
    "return": ["gradients", "log_importance_ratio"],
}


@pytest.fixture(scope="module")
def stack(whole: Any) -> Iterator[Any]:
    with whole(RATCHET_SERVES="losses") as running:
        yield running


@pytest.fixture(scope="module")
def ratchet(stack: Any) -> Iterator[Ratchet]:
    with Ratchet(stack.url, stack.key) as ratchet:
        ratchet.losses([WORKED_EXAMPLE], wait_s=100)
        yield ratchet


def batch(dtype: torch.dtype = torch.float64, lengths: tuple[int, ...] = (9, 4, 1, 6), seed: int = 0) -> dict[str, Any]:
    """A padded batch whose ratios lie on both sides of every clip. Behind the mask stands NaN."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    old = -torch.rand(mask.shape, generator=draw, dtype=torch.float64) * 3 - 0.1
    moved = 0.01 * torch.randn(mask.shape, generator=draw, dtype=torch.float64)
    per_token = {"log_probs": old + moved, "old_log_probs": old, "ref_log_probs": old - moved}
    tensors = {name: torch.where(mask, values, torch.nan).to(dtype) for name, values in per_token.items()}
    advantages = torch.randn(len(lengths), generator=draw, dtype=torch.float64).to(dtype)
    return {**tensors, "advantages": advantages, "response_mask": mask}


def flat(padded: dict[str, Any]) -> dict[str, Any]:
    """The same batch without padding."""
    mask = padded["response_mask"]
    per_token = {name: values[mask] for name, values in padded.items() if name != "advantages"}
    lengths = mask.sum(dim=1)
    return {**per_token, "advantages": padded["advantages"], "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0))}


def in_process(objective: Any, log_probs: Tensor, **known: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient as a job computes them."""
    ours = Objective(ObjectiveSpec.model_validate(objective).resolve())
    policy = log_probs.detach().clone().requires_grad_()
    loss, _ = ours.loss(policy, ours.prepare(**known, dtype=torch.promote_types(policy.dtype, torch.float32)).rows())
    loss.backward()
    assert policy.grad is not None
    return loss.detach(), policy.grad


def over_http(ratchet: Ratchet, objective: Any, log_probs: Tensor, **known: Any) -> tuple[Tensor, Tensor]:
    policy = log_probs.detach().clone().requires_grad_()
    loss = ratchet_loss(policy, objective=objective, client=ratchet, **known)
    loss.backward()
    assert policy.grad is not None
    return loss.detach(), policy.grad


def close(one: Tensor, other: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_the_worked_example_in_json(ratchet: Ratchet) -> None:
    (item,) = ratchet.losses([WORKED_EXAMPLE])["data"]
    assert item["status"] == "ok" and item.get("warnings", []) == []
    assert torch.tensor(item["log_importance_ratio"][0]).allclose(torch.tensor([0.15] * 4))
    rows = [torch.tensor(row, dtype=torch.float64) for row in WORKED_EXAMPLE["batch"]["log_probs"]]
    old = [torch.tensor(row, dtype=torch.float64) for row in WORKED_EXAMPLE["batch"]["old_log_probs"]]
    pad = lambda values: torch.nn.utils.rnn.pad_sequence(values, batch_first=True)  # noqa: E731
    mask = pad([torch.ones_like(row) for row in rows]).bool()
    loss, gradient = in_process(
        "gspo", pad(rows), old_log_probs=pad(old), response_mask=mask, advantages=torch.tensor([1.0, -1.0])
    )
    assert item["loss"] == pytest.approx(loss.item(), rel=1e-12)
    sent_back = pad([torch.tensor(row, dtype=torch.float64) for row in item["gradients"]["log_probs"]])
    close(sent_back, gradient, 1e-12)


@pytest.mark.parametrize("objective", ["gspo", "gspo_token", "grpo", {"preset": "cispo", "aggregate": "seq"}, "gmpo"], ids=str)
def test_loss_and_gradient_are_those_of_the_objective(ratchet: Ratchet, objective: Any) -> None:
    loss, gradient = over_http(ratchet, objective, **batch())
    close(loss, in_process(objective, **batch())[0], 1e-12)
    close(gradient, in_process(objective, **batch())[1], 1e-12)
    assert gradient.abs().sum() > 0 and loss.dtype == gradient.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_travels_as_it_is(ratchet: Ratchet, dtype: torch.dtype) -> None:
    loss, gradient = over_http(ratchet, "gspo", **batch(dtype))
    expected = in_process(
        "gspo",
        **{name: values.float() for name, values in batch(dtype).items() if values.dtype == dtype},
        response_mask=batch()["response_mask"],
    )
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    close(loss, expected[0], 1e-6)
    assert torch.equal(gradient, expected[1].to(dtype))


def test_a_batch_may_come_flat(ratchet: Ratchet) -> None:
    padded = batch()
    loss, gradient = over_http(ratchet, "gspo", **padded)
    loss_flat, gradient_flat = over_http(ratchet, "gspo", **flat(padded))
    close(loss_flat, loss, 1e-12)
    close(gradient_flat, gradient[padded["response_mask"]], 1e-12)


def test_the_gradient_goes_through_the_rest_of_the_graph(ratchet: Ratchet) -> None:
    """Two losses and something else in one graph, scaled on the way."""
    first, second = (one | {"log_probs": one["log_probs"].nan_to_num()} for one in (batch(seed=1), batch(seed=2)))
    temperature = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    by_seed = [
        ratchet_loss(temperature * one.pop("log_probs"), objective="grpo", client=ratchet, **one) for one in (first, second)
    ]
    (by_seed[0] - 3 * by_seed[1] + temperature**2).backward()

    expected = torch.tensor(2.0, dtype=torch.float64)
    for factor, one in ((1, batch(seed=1)), (-3, batch(seed=2))):
        expected += factor * (in_process("grpo", **one)[1] * one["log_probs"].nan_to_num()).sum()
    assert temperature.grad is not None
    close(temperature.grad, expected, 1e-12)


def test_several_losses_travel_in_one_request(ratchet: Ratchet) -> None:
    items: list[Any] = []
    for seed, objective in enumerate(("gspo", "grpo")):
        one = batch(seed=seed)
        items.append({**one, "log_probs": one["log_probs"].requires_grad_(), "objective": objective, "outputs": ["ratio"]})
    first, second = ratchet_losses(items, client=ratchet)
    (first.loss + 2 * second.loss).backward()
    for seed, (answer, scale) in enumerate(((first, 1), (second, 2))):
        loss, gradient = in_process(items[seed]["objective"], **batch(seed=seed))
        close(answer.loss.detach(), loss, 1e-12)
        sent = items[seed]["log_probs"].grad
        assert sent is not None
        close(sent, scale * gradient, 1e-12)
        assert answer.metrics["policy/loss"] == pytest.approx(loss.item()) and answer.tensors["ratio"].shape == gradient.shape


@pytest.mark.parametrize("objective", ["gspo", {"preset": "dr_grpo", "aggregate": {"constant": 7}}, "dapo"], ids=str)
def test_micro_batches_with_the_weights_of_the_step_add_up_to_it(ratchet: Ratchet, objective: Any) -> None:
    whole = batch(lengths=(9, 4, 1, 6, 0, 9))
    whole.pop("advantages")
    groups: Any = {"rewards": torch.tensor([1.0, 0.0, 0.5, 0.25, 1.0, 0.0]), "group_ids": torch.tensor([5, 5, 5, 7, 7, 7])}
    policy = whole.pop("log_probs").requires_grad_()
    loss, step = ratchet_loss(policy, objective=objective, client=ratchet, outputs=["weights", "advantages"], **whole, **groups)
    loss.backward()
    expected, policy.grad = policy.grad, None

    parts = []
    for rows in torch.arange(6).split(4):
        sent = {**whole, **{name: step.tensors[name] for name in ("weights", "advantages")}}
        part = ratchet_loss(
            policy[rows], objective=objective, client=ratchet, **{name: values[rows] for name, values in sent.items()}
        )
        part.backward()
        parts.append(part.detach())
    close(sum(parts, torch.zeros(())), loss.detach(), 1e-12)
    assert policy.grad is not None and expected is not None
    close(policy.grad, expected, 1e-12)


def test_without_gradients_none_is_asked_for(ratchet: Ratchet) -> None:
    loss, answer = ratchet_loss(objective="gspo", client=ratchet, outputs=(), **batch())
    assert not loss.requires_grad and answer.tensors == {} and answer.metrics["batch/tokens"] == 20
    with torch.no_grad():
        one = batch()
        silent = ratchet_loss(one.pop("log_probs").requires_grad_(), objective="gspo", client=ratchet, **one)
    assert not silent.requires_grad and silent == loss


def test_one_tensor_may_be_sent_under_two_names(ratchet: Ratchet) -> None:
    """On policy the old log-probs are the log-probs; only these get a gradient."""
    one = batch()
    policy = one["log_probs"].requires_grad_()
    loss = ratchet_loss(objective="gspo", client=ratchet, **{**one, "log_probs": policy, "old_log_probs": policy})
    loss.backward()
    expected = in_process("gspo", **{**batch(), "old_log_probs": batch()["log_probs"]})[1]
    assert policy.grad is not None
    close(policy.grad, expected, 1e-12)


def test_there_is_no_second_derivative(ratchet: Ratchet) -> None:
    one = batch()
    policy = one.pop("log_probs").nan_to_num(0).requires_grad_()
    (gradient,) = torch.autograd.grad(ratchet_loss(policy, objective="gspo", client=ratchet, **one), policy, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        gradient.square().sum().backward()


def test_what_an_item_lacks_is_said_with_its_place(ratchet: Ratchet) -> None:
    one, wrong = batch(), cast("Any", ratchet_loss)
    with pytest.raises(RatchetApiError, match=r"(?s)/items/0/batch/old_log_probs.*HTTP 422") as caught:
        ratchet_loss(one["log_probs"].requires_grad_(), objective="gspo", client=ratchet, advantages=one["advantages"])
    assert caught.value.errors[0]["pointer"] == "/items/0/batch/old_log_probs"
    item: Any = {"objective": "gspo", **batch()}
    with pytest.raises(RatchetApiError, match=r"(?s)/items/1/batch/log_probs.*"):  # found by the worker, not by the API
        ratchet_losses([item, item | {"response_mask": torch.ones(4, 9)}], client=ratchet)
    with pytest.raises(TypeError, match="old_logprobs"):
        wrong(objective="gspo", client=ratchet, old_logprobs=one["old_log_probs"], **batch())
    with pytest.raises(TypeError, match="advantages must be a tensor, got a list"):
        wrong(objective="gspo", client=ratchet, **{**batch(), "advantages": [1.0, 2.0]})


def test_what_is_probably_not_meant_is_warned_of(ratchet: Ratchet) -> None:
    one = batch()
    one["log_probs"][0, 0] = 0.5
    with pytest.warns(UserWarning, match=r"log_probs: a log-probability above 0, at row 0, token 0"):
        ratchet_loss(objective="gspo", client=ratchet, **one)
    _, answer = ratchet_loss(objective="gspo", client=ratchet, outputs=(), **one)
    assert len(answer.warnings) == 1


def test_rows_that_are_not_finite_can_be_left_out(ratchet: Ratchet) -> None:
    one = batch()
    one["log_probs"][1, 2] = torch.inf
    policy = one["log_probs"].requires_grad_()
    loss, answer = ratchet_loss(
        objective="gspo", client=ratchet, on_nonfinite="mask", outputs=[], **{**one, "log_probs": policy}
    )
    loss.backward()
    assert answer.nonfinite_rows == [1] and loss.isfinite()
    assert (
        policy.grad is not None and policy.grad.isfinite().all() and policy.grad[1].eq(0).all() and policy.grad[0].ne(0).any()
    )


def test_the_example_ends_with_the_weights_of_the_local_objective(stack: Any, zygote: Zygote) -> None:
    example = Path(__file__).parents[2] / "examples" / "loss_client" / "train.py"
    said = zygote.run(str(example), "--compare", "--steps", "5", RATCHET_URL=stack.url, RATCHET_API_KEY=stack.key)
    assert "the same, bit for bit" in said and said.count("reward") == 10, said
