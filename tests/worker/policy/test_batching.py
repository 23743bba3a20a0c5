"""Micro-batches: every row once, like lengths together, within the bound."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.policy.score.layout import Sequence, auto_microbatch_tokens, microbatches, pad

LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), max_size=40)


@given(LENGTHS, st.integers(1, 300))
def test_every_row_is_in_one_micro_batch_that_keeps_the_bound(lengths, tokens):
    sequences = [Sequence([1] * prompt, [2] * completion) for prompt, completion in lengths]
    batches = list(microbatches(sequences, tokens))
    assert sorted(row for batch in batches for row in batch) == list(range(len(sequences)))
    for batch in batches:
        longest = max(sum(map(len, sequences[row])) for row in batch)
        assert len(batch) == 1 or len(batch) * longest <= tokens


def test_padding_is_less_than_in_the_given_order():
    sequences = [Sequence([1] * (40 if row % 2 else 2), [2]) for row in range(8)]
    assert [[sum(map(len, sequences[row])) for row in batch] for batch in microbatches(sequences, 164)] == [[41] * 4, [3] * 4]


def test_padded_positions_point_at_the_token_before_each_target():
    batch = pad([Sequence([5, 6], [7, 8]), Sequence([9], [3])], pad_id=0, device=torch.device("cpu"))
    assert batch.input_ids_B_L.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert batch.positions_N.tolist() == [1, 2, 3]
    assert batch.targets_N.tolist() == [7, 8, 3]
    assert batch.rows_N.tolist() == [0, 0, 1] and batch.steps_N.tolist() == [0, 1, 0]


def test_auto_gives_larger_models_smaller_micro_batches(load, tiny_spec):
    model = load(tiny_spec).base.model
    small = auto_microbatch_tokens(model, torch.device("cpu"))
    model.config.hidden_size, model.config.num_hidden_layers = 2048, 24
    large = auto_microbatch_tokens(model, torch.device("cpu"))
    assert small == 4096 and 256 <= large < 1024


def test_the_resolved_number_is_among_the_facts(load):
    assert load().facts["microbatch_tokens"] == 4096
