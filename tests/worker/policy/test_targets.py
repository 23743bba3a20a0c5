"""Items with targets of their own: log-probs and gradients are the plain model's, and each step may have its own settings."""

import math

import pytest
import torch
from torch.nn.functional import log_softmax

from workers.policy.optimizer import StepSettings
from workers.policy.score import log_probs as module
from workers.policy.score.layout import Items

SETTINGS = StepSettings(1e-2, (0.9, 0.95), 1e-12, 0.0, None)


def items_of(lengths, *, k=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    tokens = torch.randint(3, 40, (n,), generator=generator)
    targets = torch.randint(3, 40, (n,) if k is None else (n, k), generator=generator)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return Items(tokens, targets, starts)


def plain(model, items):
    """Item by item, without padding."""
    rows = []
    for start, end in zip(items.starts, items.starts[1:], strict=False):
        logits = model(input_ids=items.tokens_N[start:end].unsqueeze(0), use_cache=False).logits[0].float()
        rows.append(log_softmax(logits, -1))
    return torch.cat(rows)


@pytest.mark.parametrize("k", [None, 3])
def test_log_probs_of_targets_are_the_models(load, k):
    policy = load()
    items = items_of([5, 1, 9], k=k)
    ours = policy.score_targets(items)
    with torch.no_grad():
        expected = plain(policy.base.model, items).gather(-1, items.targets_N.view(len(items.tokens_N), -1)).view(ours.shape)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_the_likeliest_are_the_models(load):
    policy = load()
    items = items_of([5, 2])
    ids, log_probs = policy.likeliest(items, 4)
    with torch.no_grad():
        values, expected = plain(policy.base.model, items).topk(4, dim=-1)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(log_probs, values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("spec", ["tiny_spec", "tiny_lora_spec"])
def test_the_gradient_is_that_of_the_plain_model(load, gradients, request, spec, k):
    policy = load(request.getfixturevalue(spec))
    items = items_of([5, 1, 9], k=k)
    weights = torch.randn(items.targets_N.shape, generator=torch.Generator().manual_seed(1))
    loss, seen = policy.accumulate_targets(items, lambda lp, places: -(lp * weights[places]).sum())
    ours = gradients(policy)
    policy.base.model.zero_grad()
    log_probs = plain(policy.base.model, items).gather(-1, items.targets_N.view(len(items.tokens_N), -1)).view(seen.shape)
    expected = -(log_probs * weights).sum()
    expected.backward()
    assert math.isclose(loss, expected.item(), rel_tol=1e-4, abs_tol=1e-4)
    torch.testing.assert_close(seen, log_probs.detach(), atol=1e-5, rtol=1e-5)
    theirs = gradients(policy)
    assert ours.keys() == theirs.keys() and any(gradient.abs().max() > 1e-4 for gradient in theirs.values())
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_micro_batches_and_chunks_change_nothing(load, gradients, monkeypatch):
    items, results = items_of([5, 1, 9, 7]), []
    for tokens, chunk in ((10_000, 2**28), (8, 2**28), (10_000, 4 * 100 * 3)):
        policy = load()
        policy.base.microbatch_tokens = tokens
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
        loss, seen = policy.accumulate_targets(items, lambda lp, places: -lp.sum())
        results.append((loss, seen, gradients(policy)))
    for loss, seen, gradient in results[1:]:
        assert math.isclose(loss, results[0][0], rel_tol=1e-5)
        torch.testing.assert_close(seen, results[0][1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient, results[0][2], atol=1e-5, rtol=1e-4)


def test_forward_leaves_no_gradient(load, gradients):
    policy = load()
    policy.score_targets(items_of([4]))
    assert gradients(policy) == {}


def test_a_loss_that_is_not_finite_makes_the_next_step_skip(load, weights):
    policy = load()
    before = weights(policy)
    loss, _ = policy.accumulate_targets(items_of([4]), lambda lp, places: lp.sum() * math.nan)
    assert math.isnan(loss)
    assert policy.step(SETTINGS)["skipped"] is True
    assert all(torch.equal(value, before[name]) for name, value in weights(policy).items())
    policy.accumulate_targets(items_of([4]), lambda lp, places: -lp.sum())
    assert policy.step(SETTINGS)["skipped"] is False


def test_each_step_has_its_own_settings(load):
    """As torch's own AdamW, whose settings are changed between two steps."""
    schedule = [
        StepSettings(1e-2, (0.9, 0.95), 1e-12, 0.0, None),
        StepSettings(3e-3, (0.8, 0.99), 1e-8, 0.1, 0.5),
        StepSettings(0.0, (0.9, 0.95), 1e-8, 0.0, None),
    ]
    ours, theirs = load(), load()
    parameters = [p for p in theirs.base.model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=1.0, fused=True)
    for number, how in enumerate(schedule):
        items = items_of([6, 3], seed=number)
        for policy in (ours, theirs):
            policy.accumulate_targets(items, lambda lp, places: -lp.sum())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if how.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, how.max_grad_norm)
        adamw.param_groups[0].update(lr=how.learning_rate, betas=how.betas, eps=how.eps, weight_decay=how.weight_decay)
        adamw.step()
        adamw.zero_grad()
        did = ours.step(how)
        assert did == {"grad_norm": norm.item(), "learning_rate": how.learning_rate, "skipped": False}
    for mine, other in zip(ours.base.model.parameters(), theirs.base.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_folder_without_optimizer_state(load, tiny_lora_spec, tmp_path):
    policy = load(tiny_lora_spec)
    policy.accumulate_targets(items_of([4]), lambda lp, places: -lp.sum())
    policy.step(SETTINGS)
    policy.save(tmp_path, optimizer=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "trainer.json"]
    again = load(tiny_lora_spec, weights_from=tmp_path)
    assert torch.equal(again.score_targets(items_of([4])), policy.score_targets(items_of([4])))
