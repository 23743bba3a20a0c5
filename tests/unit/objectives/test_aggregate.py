"""Aggregation weights: what each kind sums to, and that the whole step is what counts."""

import pytest
import torch
from torch.testing import assert_close

from workers.objectives.aggregate import AGGREGATES, weights

MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)  # 4, 2, 0 and 1 tokens
GROUPS = torch.tensor([0, 0, 1, 2])

# kind -> the weight of a token in rows of 4, 2, 0 and 1 tokens
WEIGHTS = {
    "token": [1 / 7, 1 / 7, 0, 1 / 7],
    "seq": [1 / 12, 1 / 6, 0, 1 / 3],
    "prompt": [1 / 12, 1 / 12, 0, 1 / 2],
    "seq_sum": [1 / 3, 1 / 3, 0, 1 / 3],
    "constant": [1 / 48, 1 / 48, 0, 1 / 48],
    "sum": [1, 1, 0, 1],
}


def of(kind, mask=MASK, **options):
    return weights(mask, kind=kind, group_ids_B=GROUPS, longest=16, dtype=torch.float64, **options)


@pytest.mark.parametrize("kind", AGGREGATES)
def test_weights_of_each_kind(kind):
    expected = torch.tensor(WEIGHTS[kind], dtype=torch.float64).unsqueeze(1) * MASK
    assert_close(of(kind), expected)


@pytest.mark.parametrize("kind", ["token", "seq", "prompt"])
def test_means_have_weights_that_sum_to_one(kind):
    assert_close(of(kind).sum(), torch.tensor(1.0, dtype=torch.float64))


def test_length_power_undoes_the_sequence_mean():
    assert_close(of("seq", length_power=1.0), of("seq_sum"))
    assert_close(of("token", length_power=2.0)[0, 0], torch.tensor(16 / 7, dtype=torch.float64))


def test_a_constant_of_ones_own_takes_precedence():
    assert_close(of("constant", constant=2.0), of("seq_sum") / 2)
    assert_close(weights(MASK, kind="constant", dtype=torch.float64), of("seq_sum") / 4)  # T, where nothing is said


@pytest.mark.parametrize("kind", AGGREGATES)
def test_no_token_at_all_gives_zero_weights(kind):
    assert (weights(torch.zeros(2, 3, dtype=torch.bool), kind=kind, group_ids_B=torch.tensor([0, 1])) == 0).all()


def test_prompt_without_group_ids_says_what_is_missing():
    with pytest.raises(ValueError, match="group_ids"):
        weights(MASK, kind="prompt")
