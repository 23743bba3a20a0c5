"""The segment ratio: between the token's and the sequence's, from chunks or from ids."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

CLIP = {"kind": "ppo", "clip_low": 0.05, "clip_high": 0.05}


@pytest.fixture
def batch() -> dict[str, Any]:
    """With holes, so that segments are of answer tokens and not of positions."""
    generator = torch.Generator().manual_seed(3)
    log_probs = -torch.rand(3, 7, generator=generator, dtype=torch.float64)
    return {
        "log_probs": log_probs,
        "old_log_probs": log_probs + 0.2 * torch.randn(3, 7, generator=generator, dtype=torch.float64),
        "response_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]),
        "advantages": torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64),
    }


def segment(chunk: int | None) -> dict[str, Any]:
    return {"ratio": {"kind": "segment", "chunk": chunk}, "surrogate": CLIP, "aggregate": "seq"}


@pytest.mark.parametrize(("chunk", "end"), [(1, "token"), (7, "sequence"), (100, "sequence")])
def test_its_ends_are_the_token_and_the_sequence_ratio(chunk, end, batch, compute):
    ours, ends = compute(segment(chunk), batch), compute({**segment(1), "ratio": end}, batch)
    assert_close(ours[0], ends[0], rtol=1e-14, atol=1e-14)
    assert_close(ours[1], ends[1], rtol=1e-14, atol=1e-14)


def test_between_the_ends_it_is_neither(batch, compute):
    losses = [compute(segment(chunk), batch)[0] for chunk in (1, 2, 3, 7)]
    assert len({round(float(loss), 12) for loss in losses}) == 4


def test_a_segments_ratio_is_the_geometric_mean_of_its_tokens(batch, compute):
    """Row 1 has answer tokens at 0, 1, 4, 5, 6: chunks of two are (0, 1), (4, 5), (6)."""
    ratio = compute(segment(2), batch)[2].ratio[1]
    tokens = (batch["log_probs"] - batch["old_log_probs"])[1].exp()
    for members in ([0, 1], [4, 5], [6]):
        mean = tokens[members].log().mean().exp()
        assert_close(ratio[members], mean.expand(len(members)))
    assert (ratio[[2, 3]] == 0).all()


def test_ids_and_chunks_say_the_same(batch, compute):
    """Ids are labels: any integers, in any order, and whatever behind the mask."""
    ids = torch.tensor([[99, 7, 7, -4, -4, 0, 0], [5, 5, 99, 99, 2, 2, 8], [1, 1, 3, 9, 9, 9, 9]])
    by_ids = compute(segment(None), batch | {"segment_ids": ids})
    by_chunks = compute(segment(2), batch)
    assert_close(by_ids[0], by_chunks[0], rtol=1e-14, atol=1e-14)
    assert_close(by_ids[1], by_chunks[1], rtol=1e-14, atol=1e-14)
    assert_close(by_ids[2].ratio, by_chunks[2].ratio)


def test_segments_may_be_scattered(batch, compute):
    ids = torch.tensor([[0, 1, 2, 1, 2, 1, 2]] * 3)
    ratio: Tensor = compute(segment(None), batch | {"segment_ids": ids})[2].ratio
    tokens = (batch["log_probs"] - batch["old_log_probs"])[0]
    assert_close(ratio[0, [1, 3, 5]], tokens[[1, 3, 5]].mean().exp().expand(3))


def test_a_segment_is_clipped_as_one(batch, compute):
    _, gradient, outputs = compute(segment(2), batch)
    clipped = outputs.clipped_high | outputs.clipped_low
    assert clipped[1, [0, 1]].all() or not clipped[1, [0, 1]].any()
    assert clipped.any()
    assert (gradient[clipped] == 0).all()
    kept = batch["response_mask"].bool() & ~clipped
    assert (gradient[kept] != 0).all()


def test_its_gradient_spreads_a_segments_weight_evenly_over_its_tokens(batch, compute):
    """w r_S A for each token, where A is constant over the sequence: no token is favoured inside a segment."""
    _, gradient, outputs = compute({**segment(2), "surrogate": "none"}, batch)
    assert_close(gradient, -outputs.weights * outputs.ratio * batch["advantages"].unsqueeze(1))


def test_its_spread_falls_with_the_root_of_the_segments_length(compute):
    """For independent tokens: why the clip range has to shrink with the segment."""
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.zeros(50, 64, dtype=torch.float64)
    batch = {
        "log_probs": log_probs,
        "old_log_probs": 0.1 * torch.randn(50, 64, generator=generator, dtype=torch.float64),
        "response_mask": torch.ones(50, 64),
        "advantages": torch.ones(50, dtype=torch.float64),
    }
    for chunk in (1, 4, 16):
        spread = compute(segment(chunk), batch)[2].log_importance_ratio.std()
        assert float(spread) == pytest.approx(0.1 / chunk**0.5, rel=0.1)


def test_without_chunk_and_ids_it_says_what_is_missing(batch, compute):
    with pytest.raises(ValueError, match="segment_ids"):
        compute(segment(None), batch)
