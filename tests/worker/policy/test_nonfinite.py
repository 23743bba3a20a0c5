"""Rows that make a step's loss or gradient not finite are named, and the step changes no weight."""

import math

import pytest
import torch
from torch import Tensor

from workers.loops.nonfinite import NAMED, Suspects, step_skipped
from workers.policy.score.layout import Sequence


def batch(policy) -> list[Sequence]:
    return [Sequence(policy.text.encode(f"{n}+1="), policy.text.encode_answer(str(n + 1))) for n in range(6)]


@pytest.mark.parametrize(("poison", "cause", "rows"), [("row 4", "loss", [4]), ("all", "gradient", [0, 1, 2, 3, 4, 5])])
def test_a_poisoned_step_is_skipped_and_its_rows_are_named(load, poison: str, cause: str, rows: list[int]) -> None:
    policy, suspects = load(), Suspects()
    before = {name: value.clone() for name, value in policy.base.model.state_dict().items()}

    def loss(log_probs: Tensor, index: Tensor) -> Tensor:
        if poison == "row 4":
            log_probs = torch.where((index == 4)[:, None], math.nan, log_probs)
            return suspects.watch(-log_probs.sum(), log_probs, index)
        # Finite, with a slope that is not: the root at 0.
        return suspects.watch(torch.sqrt((log_probs - log_probs.detach()).abs()).sum(), log_probs, index)

    policy.accumulate(batch(policy), loss, microbatch_tokens=16)
    assert policy.step()["skipped"] is True
    assert suspects.name() == (cause, rows)
    assert all(torch.equal(value, before[name]) for name, value in policy.base.model.state_dict().items())


def test_a_loss_that_is_not_finite_without_such_a_row_names_its_micro_batch() -> None:
    suspects, fine = Suspects(), torch.zeros(2, 3)
    suspects.watch(torch.tensor(1.0), fine, torch.tensor([0, 3]))
    suspects.watch(torch.tensor(math.inf), fine, torch.tensor([5, 1]))
    assert suspects.name() == ("loss", [1, 5])


def test_an_event_names_so_many_rows_and_counts_all() -> None:
    type_, data = step_skipped(7, 1, "loss", [{"row": n} for n in range(NAMED + 1)])
    assert (type_, data["step"], data["minibatch"], data["count"], len(data["rows"])) == (
        "step_skipped",
        7,
        1,
        NAMED + 1,
        NAMED,
    )
