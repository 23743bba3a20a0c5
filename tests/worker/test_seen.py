"""What is kept of single tokens: the newest look at each answer, within its bounds, null where the loss did not count."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from workers.loops import seen
from workers.loops.seen import Seen
from workers.loops.update import Experience
from workers.rollout.engine import Completion

ANSWERS = [[3, 4, 5], [6, 7], [8, 9, 10]]
TEXT: Any = SimpleNamespace(pieces=lambda tokens: {token: f"<{token}>" for token in tokens})


def outputs(ratio: float, rows: int, *, high: bool = False) -> Any:
    full = torch.full((rows, 3), 1.0)
    no = torch.zeros(rows, 3, dtype=torch.bool)
    weights = full.clone()
    weights[-1, 2] = 0  # the last row's last token does not count
    flags = {"clipped_low": no, "clipped_high": no | high, "clipped_dual": no}
    return SimpleNamespace(ratio=full * ratio, weights=weights, **flags)


def experience(advantages: torch.Tensor) -> Experience:
    mask = torch.tensor([[True] * 3, [True, True, False], [True] * 3])
    return Experience([], mask, torch.full((3, 3), -2.0), None, None, advantages, torch.zeros(3))


COMPLETIONS = [Completion(tokens, [-2.0] * len(tokens), "", "stop") for tokens in ANSWERS]


def test_the_last_optimizer_step_on_an_answer_is_kept() -> None:
    looked = Seen(2)
    looked.look([1, 2], torch.full((2, 3), -1.9), outputs(1.1, 2))
    looked.look([0, 1], torch.full((2, 3), -1.5), outputs(1.4, 2, high=True))
    first, second = looked.told(experience(torch.tensor([0.5, -0.25, 9.0])), COMPLETIONS, TEXT)
    assert (first["advantage"], second["advantage"]) == (0.5, -0.25)
    assert first["by_token"]["text"] == ["<3>", "<4>", "<5>"]
    assert first["by_token"]["ratio"] == [1.4] * 3 and first["by_token"]["clipped"] == ["high"] * 3
    assert second["by_token"]["log_probs"] == [-1.5] * 2 and second["by_token"]["old_log_probs"] == [-2.0] * 2


def test_what_the_loss_did_not_count_or_never_saw_is_null() -> None:
    looked = Seen(3)
    looked.look([0, 1], torch.full((2, 3), -1.5), outputs(float("nan"), 2))
    looked.look([2], torch.full((1, 3), -1.5), outputs(1.4, 1))
    told = [one["by_token"] for one in looked.told(experience(torch.zeros(3)), COMPLETIONS, TEXT)]
    assert told[0]["ratio"] == [None] * 3  # not finite: no number of JSON
    assert told[2]["ratio"] == [1.4, 1.4, None] and told[2]["log_probs"] == [-1.5, -1.5, None]
    never = Seen(1).told(experience(torch.zeros(3)), COMPLETIONS, TEXT)[0]["by_token"]
    assert never["ratio"] == never["log_probs"] == never["clipped"] == [None] * 3


def test_an_advantage_of_each_token_is_shown_as_their_mean() -> None:
    by_token = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 99.0], [0.0, 0.0, 0.0]])
    told = Seen(3).told(experience(by_token), COMPLETIONS, TEXT)
    assert [one["advantage"] for one in told] == [2.0, 1.5, 0.0]


def test_long_answers_are_kept_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "MOST_IN_ALL", 6)
    looked = Seen(3)
    looked.look([0, 1, 2], torch.full((3, 3), -1.5), outputs(1.4, 3))
    told = [one["by_token"] for one in looked.told(experience(torch.zeros(3)), COMPLETIONS, TEXT)]
    assert [len(column) for one in told for column in one.values()] == [2] * 15
