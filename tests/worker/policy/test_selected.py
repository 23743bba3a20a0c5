"""Log-probs of selected tokens against float64, where torch's log_softmax is off; their gradient against finite differences."""

import weakref
from typing import Any

import pytest
import torch

from workers.policy.score import selected
from workers.policy.score.selected import frozen_head_log_probs, selected_log_probs, trained_head_log_probs


@pytest.fixture
def steep() -> torch.Tensor:
    """[16, 49152]: logits of a large vocabulary in which the likelihood of a token falls with the square of its rank."""
    torch.manual_seed(0)
    zipf = -2 * torch.arange(1, 49_153).log()
    return torch.stack([zipf[torch.randperm(len(zipf))] for _ in range(16)])


def test_over_a_large_vocabulary_they_are_exact(steep: torch.Tensor) -> None:
    likely = steep.topk(8, dim=-1).indices
    true = steep.double().log_softmax(-1).gather(-1, likely)
    log_probs, whole = selected_log_probs(steep, likely)
    assert (log_probs - true).abs().max() < 1e-6
    assert (whole - steep.double().logsumexp(-1, keepdim=True)).abs().max() < 1e-6
    assert (steep.log_softmax(-1).gather(-1, likely)[:, 0] - true[:, 0]).mean() > 4e-6  # why it is not used


def test_a_row_is_the_same_to_the_bit_whatever_stands_beside_it(steep: torch.Tensor) -> None:
    """With one thread; several share the sum of a single row among them."""
    likely, threads = steep.topk(2, dim=-1).indices, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        together, _ = selected_log_probs(steep, likely)
        alone = [selected_log_probs(steep[i : i + 1], likely[i : i + 1])[0] for i in range(len(steep))]
        assert torch.equal(torch.cat(alone), together)
    finally:
        torch.set_num_threads(threads)


def test_the_gradient_is_that_of_log_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (5, 3))
    targets[0] = 2  # the same token asked for three times
    assert torch.autograd.gradcheck(lambda x: selected_log_probs(x, targets)[0], (logits,))
    given = torch.randn(5, 3, dtype=torch.float64)
    (ours,) = torch.autograd.grad(selected_log_probs(logits, targets)[0], logits, given)
    (theirs,) = torch.autograd.grad(logits.log_softmax(-1).gather(-1, targets), logits, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    consumed = logits * 1.0
    (overwritten,) = torch.autograd.grad(selected_log_probs(consumed, targets, consumes=True)[0], logits, given)
    assert torch.equal(overwritten, ours) and not torch.equal(consumed, logits)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_under_a_frozen_head_log_probs_and_gradients_are_the_plain_ones(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks that do not divide the positions, and blocks that do not divide the vocabulary."""
    monkeypatch.setattr(selected, "COLUMNS", 4)
    torch.manual_seed(0)
    weight, targets = torch.randn(11, 4, dtype=torch.float64), torch.randint(0, 11, (7,))
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    given = torch.randn(7, dtype=torch.float64)
    ours = frozen_head_log_probs(hidden, weight, targets, temperature=temperature, rows=3)
    plain = (hidden @ weight.T / temperature).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(log_probs, hidden, given)[0] for log_probs in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_under_a_frozen_head_float32_log_probs_are_those_of_scoring_to_the_bit(steep: torch.Tensor) -> None:
    """Else a ratio is not 1 before the first step."""
    targets, hidden = steep.argmax(-1), torch.eye(len(steep), requires_grad=True)
    ours = frozen_head_log_probs(hidden, steep.T, targets, temperature=1.0, rows=len(steep))
    assert torch.equal(ours, selected_log_probs(hidden @ steep, targets.unsqueeze(-1))[0].squeeze(-1))


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_under_a_trained_head_log_probs_and_gradients_are_the_plain_ones(
    temperature: float, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks that do not divide the vocabulary; three targets a row, of which one is asked for twice."""
    monkeypatch.setattr(selected, "COLUMNS", 4)
    torch.manual_seed(0)
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    targets, given = torch.randint(0, 11, (7, 3)), torch.randn(7, 3, dtype=torch.float64)
    targets[0] = torch.tensor([2, 10, 2])
    ours = trained_head_log_probs(hidden, weight, targets, temperature=temperature, keeps=keeps)
    plain = (hidden @ weight.T / temperature).log_softmax(-1).gather(-1, targets)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(log_probs, (hidden, weight), given, retain_graph=True) for log_probs in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    if keeps:
        with pytest.raises(RuntimeError, match="possible once"):
            torch.autograd.grad(ours, (hidden, weight), given)
    else:
        torch.testing.assert_close(torch.autograd.grad(ours, (hidden, weight), given), gradients[1], rtol=1e-12, atol=1e-12)
    outside = trained_head_log_probs(hidden, weight, targets + 11, temperature=temperature, keeps=keeps)
    assert outside.isnan().all()  # and not a number that looks like a log-prob
    of_weight = trained_head_log_probs(hidden.detach(), weight, targets, temperature=temperature, keeps=keeps)
    torch.testing.assert_close(torch.autograd.grad(of_weight, weight, given)[0], gradients[1][1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_a_trained_head_log_probs_are_those_of_scoring_to_the_bit(steep: torch.Tensor, dtype: torch.dtype) -> None:
    """And the gradients those of all logits at once, but for rounding."""
    targets = steep.topk(2, dim=-1).indices
    hidden = torch.eye(len(steep), dtype=dtype).requires_grad_()
    weight = steep.T.to(dtype).contiguous().requires_grad_()
    ours = trained_head_log_probs(hidden, weight, targets, temperature=1.0, keeps=True)
    scored = selected_log_probs((hidden @ weight.T).float(), targets)[0]
    assert ours.dtype == torch.float32 and torch.equal(ours, scored)
    found, plain = (torch.autograd.grad(log_probs.sum(), (hidden, weight)) for log_probs in (ours, scored))
    for one, other in zip(found, plain, strict=True):
        assert one.dtype == dtype
        assert (one - other).float().norm() <= (0.02 if dtype == torch.bfloat16 else 1e-5) * other.float().norm()


def test_under_a_trained_head_logits_go_as_the_gradient_of_the_weight_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selected, "COLUMNS", 4)
    hidden, weight = torch.randn(7, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    log_probs: Any = trained_head_log_probs(hidden, weight, torch.zeros(7, 1).long(), temperature=1.0, keeps=True)
    blocks = [weakref.ref(block) for block in log_probs.grad_fn.kept]
    alive, in_block = list[int](), selected._in_block

    def look(*asked: Any) -> Any:
        alive.append(sum(block() is not None for block in blocks))
        return in_block(*asked)

    monkeypatch.setattr(selected, "_in_block", look)
    log_probs.sum().backward()
    assert alive == [3, 2, 1]
