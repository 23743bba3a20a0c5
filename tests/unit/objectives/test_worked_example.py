"""The example of the public docs, to 1e-6, and the three things that texts about it get wrong."""

import math

import pytest
import torch
from torch.testing import assert_close


def close(actual, expected):
    assert_close(actual, torch.tensor(expected, dtype=actual.dtype), atol=1e-6, rtol=0)


def test_negative_approx_kl_and_its_masked_mean(example, compute):
    _, _, outputs = compute("grpo", example | {"ref_log_probs": example["old_log_probs"]})
    close(outputs.log_importance_ratio, [[0.2, 0.2, 0.1, 0.1, 0], [0.2, 0.2, 0.2, 0, 0]])
    lengths = example["response_mask"].sum(1)
    close(outputs.log_importance_ratio.sum(1) / lengths, [0.15, 0.2])


@pytest.mark.parametrize("preset", ["gspo", "gspo_token"])
def test_the_sequence_ratio(preset, example, compute):
    _, _, outputs = compute(preset, example)
    close(outputs.log_importance_ratio, [[0.15, 0.15, 0.15, 0.15, 0], [0.2, 0.2, 0.2, 0, 0]])
    close(outputs.ratio[0], [math.exp(0.15)] * 4 + [0])
    assert round(float(outputs.ratio[0, 0]), 4) == 1.1618


def test_gspo_clips_the_good_answer_and_pushes_the_bad_one_down(example, compute):
    """-min(1.1618, 1.0004) for A = 1, +1.2214 for A = -1; the mean of both."""
    loss, gradient, outputs = compute("gspo", example)
    close(loss, 0.5 * (-1.0004 + math.exp(0.2)))
    close(gradient, [[0] * 5, [0.5 * math.exp(0.2) / 3] * 3 + [0, 0]])
    assert outputs.clipped_high.tolist() == [[True] * 4 + [False], [False] * 5]
    assert not outputs.clipped_low.any()


def test_misreading_1_the_mean_needs_its_axis_kept(example):
    """mean [B] times mask [B, T] raises, or for B == T silently scales token t by the mean of row t."""
    delta = example["log_probs"] - example["old_log_probs"]
    mean_B = delta.sum(1) / example["response_mask"].sum(1)
    with pytest.raises(RuntimeError, match="size of tensor"):
        torch.mul(mean_B, example["response_mask"])
    square = example["response_mask"][:, :2]
    assert not torch.equal(mean_B * square, mean_B.unsqueeze(1) * square)


def test_misreading_2_the_token_term_is_zero_and_only_carries_the_gradient(example, compute):
    """Also after an update: s_it = s_i in value, d s_it = s_i dl_it."""
    batch = example | {"advantages": torch.tensor([-1.0, -1.0], dtype=torch.float64)}
    for drift in (0.0, 0.3):
        moved = batch | {"log_probs": batch["log_probs"] + drift * batch["response_mask"]}
        _, gradient, outputs = compute("gspo_token", moved)
        _, _, plain = compute("gspo", moved)
        assert_close(outputs.ratio, plain.ratio, atol=0, rtol=0)
        weights = outputs.weights
        assert_close(gradient, weights * outputs.ratio)


def test_misreading_3_both_agree_for_one_advantage_a_sequence_and_differ_for_one_a_token(example, compute):
    token_level = torch.tensor([[1.0, -0.5, 2.0, 0.3, 0], [-1.0, 0.5, -0.2, 0, 0]], dtype=torch.float64)
    same = [compute(preset, example)[:2] for preset in ("gspo", "gspo_token")]
    assert_close(same[0], same[1])
    differ = [compute(preset, example | {"advantages": token_level})[:2] for preset in ("gspo", "gspo_token")]
    assert_close(differ[0][0], differ[1][0])
    assert (differ[0][1] - differ[1][1]).abs().max() > 0.01


def test_the_mean_log_ratio_is_minus_a_kl_estimate(example, compute):
    measured = compute("gspo", example)[2].metrics.finish()
    assert measured["policy/approx_kl"] == pytest.approx(-(0.6 + 0.6) / 7)
    assert measured["policy/ratio_mean"] == pytest.approx((4 * math.exp(0.15) + 3 * math.exp(0.2)) / 7)
    assert measured["policy/clip_fraction_high"] == pytest.approx(4 / 7)
    assert measured["policy/clip_fraction_high_sequence"] == pytest.approx(1 / 2)
