"""Rewards to advantages: what each choice means, and what groups without information get."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from workers.objectives.advantage import BASELINES, CENTRES, SCALES, advantages, without_spread

property_test = settings(max_examples=100, deadline=None, derandomize=True)
rewards_of = st.lists(st.sampled_from([0.0, 1.0, 0.1, -0.4, 0.7, 3.0]), min_size=1, max_size=9)
axes = st.tuples(st.sampled_from(sorted(CENTRES)), st.sampled_from(sorted(SCALES)))


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def compute(rewards, group_ids, centre="group_mean", scale="group_std", **options) -> Tensor:
    return advantages(tensor(rewards), torch.tensor(group_ids), centre=centre, scale=scale, **options)


def test_grpo_is_the_groups_z_score():
    result = compute([1.0, 0.0, 0.0, 1.0, 2.0, 4.0], [0, 0, 0, 0, 1, 1])
    z, w = 0.5 / (3**-0.5 + 1e-6), 1 / (2**0.5 + 1e-6)
    assert_close(result, tensor([z, -z, -z, z, -w, w]))


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others():
    rewards = [1.0, 0.5, 0.0]
    expected = [1.0 - 0.25, 0.5 - 0.5, 0.0 - 0.75]
    assert_close(compute(rewards, [0, 0, 0], "leave_one_out", "none"), tensor(expected))


def test_length_weighted_baseline_counts_tokens():
    result = compute([1.0, 0.0], [0, 0], "length_weighted", "none", lengths_B=torch.tensor([3, 1]))
    assert_close(result, tensor([0.25, -0.75]))


def test_only_the_best_answer_gets_its_lead():
    assert_close(compute([0.2, 0.9, 0.5], [0, 0, 0], "best_minus_second", "none"), tensor([0.0, 0.4, 0.0]))
    assert (compute([0.9, 0.9, 0.5], [0, 0, 0], "best_minus_second", "none") == 0).all()


def test_maxrl_divides_by_the_mean_and_leaves_groups_without_success_alone():
    result = compute([1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0, 1, 1], scale="group_mean", eps=0.0)
    assert_close(result, tensor([3.0, -1.0, -1.0, -1.0, 0.0, 0.0]))
    assert (compute([0.5, -0.5], [0, 0], scale="group_mean") == 0).all()


def test_whitening_counts_each_row_by_its_tokens():
    result = compute([1.0, 0.0, 0.0], [0, 0, 0], "none", "whiten", eps=0.0, lengths_B=torch.tensor([1, 2, 3]))
    tokens = result.repeat_interleave(torch.tensor([1, 2, 3]))
    assert_close(tokens.mean(), tensor(0.0), atol=1e-12, rtol=0)
    assert_close(tokens.std(), tensor(1.0))


def test_given_rewards_are_the_advantages():
    assert_close(compute([1.5, -2.0], [0, 0], "given", "none"), tensor([1.5, -2.0]))


def test_several_rewards_summed_first_or_normalised_first():
    """A reward of a hundred times the scale drowns the other in the sum, and not when each is normalised."""
    rewards, group_ids = tensor([[0.0, 100.0], [1.0, 100.0], [0.0, 0.0], [1.0, 0.0]]), torch.zeros(4, dtype=torch.long)
    summed = advantages(rewards, group_ids, centre="group_mean", scale="group_std")
    each = advantages(rewards, group_ids, centre="group_mean", scale="group_std", several="normalize_then_sum")
    assert abs(float(summed[0] - summed[1])) < 0.03
    assert float(each[1] - each[0]) == pytest.approx(float(each[0] - each[2]), rel=1e-4)
    assert_close(each.std(), tensor(1.0), rtol=1e-4, atol=0)
    weighted = advantages(rewards, group_ids, centre="group_mean", scale="none", reward_weights_R=tensor([1.0, 0.0]))
    assert_close(weighted, tensor([-0.5, 0.5, -0.5, 0.5]))


# ---------------------------------------------------------------- every choice


@property_test
@given(rewards_of, axes, st.data())
def test_groups_without_spread_get_zero_from_every_baseline(rewards, axis, data):
    """Singletons among them; never a blow-up. (Whitening shifts all rows, so there only finiteness is asked for.)"""
    centre, scale = axis
    group_ids = data.draw(st.lists(st.integers(0, 3), min_size=len(rewards), max_size=len(rewards)))
    result = compute(rewards, group_ids, centre, scale)
    assert result.isfinite().all()
    assert result.abs().max() < 1e4
    flat = without_spread(tensor(rewards), torch.tensor(group_ids))
    if centre in BASELINES and scale != "whiten":
        assert (result[flat] == 0).all()


@property_test
@given(rewards_of, axes, st.data())
def test_invalid_samples_are_as_if_they_were_not_there(rewards, axis, data):
    centre, scale = axis
    count = len(rewards)
    group_ids = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)))
    whole = compute(rewards, group_ids, centre, scale, valid_B=valid, lengths_B=lengths)
    assert (whole[~valid] == 0).all()
    kept = valid.nonzero().squeeze(1).tolist()
    if kept:
        alone = compute([rewards[i] for i in kept], [group_ids[i] for i in kept], centre, scale, lengths_B=lengths[valid])
        assert_close(whole[valid], alone, rtol=1e-12, atol=1e-12)
    poisoned = tensor(rewards).masked_fill(~valid, float("nan"))  # a reward that is no number is found invalid by itself
    again = advantages(poisoned, torch.tensor(group_ids), centre=centre, scale=scale, lengths_B=lengths)
    assert_close(again, whole, rtol=1e-12, atol=1e-12)


@property_test
@given(rewards_of, axes, st.data())
def test_order_and_names_of_groups_do_not_matter(rewards, axis, data):
    centre, scale = axis
    count = len(rewards)
    group_ids = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))
    a = compute(rewards, group_ids, centre, scale)
    b = compute([rewards[i] for i in order], [7 - 100 * group_ids[i] for i in order], centre, scale)
    assert_close(b, a[torch.tensor(order)], rtol=1e-12, atol=1e-12)


@property_test
@given(rewards_of, st.sampled_from(sorted(BASELINES)), st.sampled_from(["none", "group_std"]), st.data())
def test_a_shift_of_all_rewards_changes_nothing(rewards, centre, scale, data):
    group_ids = data.draw(st.lists(st.integers(0, 2), min_size=len(rewards), max_size=len(rewards)))
    shifted = [reward + 2.0 for reward in rewards]
    assert_close(compute(shifted, group_ids, centre, scale), compute(rewards, group_ids, centre, scale), rtol=1e-7, atol=1e-7)


def test_equal_rewards_that_are_no_binary_fractions_give_exactly_zero():
    """0.1 + 0.1 + 0.1 over 3 is not 0.1, and over eps that would be an advantage of 1e-11."""
    assert (compute([0.1] * 3, [0, 0, 0], eps=0.0) == 0).all()


def test_integer_and_single_precision_rewards_are_computed_in_double():
    rewards = torch.tensor([1e8, 1e8 + 8], dtype=torch.float32)
    result = advantages(rewards, torch.tensor([0, 0]), centre="group_mean", scale="none")
    assert result.dtype == torch.float32
    assert result.tolist() == [-4.0, 4.0]
    assert advantages(torch.tensor([0, 1]), torch.tensor([0, 0]), centre="group_mean", scale="none").tolist() == [-0.5, 0.5]


def test_with_no_valid_sample_at_all_everything_is_zero():
    for centre in CENTRES:
        for scale in SCALES:
            assert (compute([float("nan")] * 3, [0, 0, 1], centre, scale) == 0).all()
            assert compute([], [], centre, scale).tolist() == []
