"""The table of an objective's tensors, and who has the same names; what is said to be needed, and what is."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from ratchet_client.torch import OPTIONS, Batch
from service.losses.batch import LossBatch
from service.spec.objective import ObjectiveSpec
from service.spec.presets import PRESETS
from service.spec.tensors import DTYPES, GROUP_CENTRES, GROUP_SCALES, MEASURED, TENSORS, uses
from workers.losses.batch import DTYPES as DTYPES_OF_TORCH
from workers.losses.batch import Item, Layout
from workers.losses.compute import ItemRefused, prepare
from workers.losses.merge import compute
from workers.objectives import Rows
from workers.objectives.advantage import BASELINES, CENTRES, SCALES

SPECS: list[Any] = [
    *PRESETS,
    {"ratio": "segment"},
    {"correct": {"action": "mask", "level": "segment"}},
    {"correct": {"action": "truncate", "mask_level": "geometric"}},
    {"correct": {"action": "none", "sequence_delta": 0.1}},
    {"anchor": "rollout", "correct": {"action": "none", "sequence_delta": 0.1}},
    {"kl": {"place": "loss", "reference": "rollout"}},
    {"kl": {"place": "reward", "reference": "rollout", "coef": 0.1}},
    {"kl": {"place": "loss", "coef": 0}},
    {"ratio": "one", "surrogate": "none", "kl": {"place": "loss", "gradient": "token_ratio_weighted", "reference": "rollout"}},
    {"select": {"top_entropy": 0.5}},
]


def test_whoever_has_names_of_tensors_has_those_of_the_table():
    assert list(LossBatch.model_fields) == list(TENSORS)
    assert set(Batch.__annotations__) == TENSORS.keys() - {"log_probs"} | set(OPTIONS)
    assert {field.name for field in fields(Rows)} >= set(MEASURED)
    assert {name for dtypes in DTYPES.values() for name in dtypes} == set(DTYPES_OF_TORCH)


def test_a_baseline_and_a_scale_of_the_group_are_known_as_such():
    assert set(GROUP_CENTRES) == BASELINES <= set(CENTRES)
    assert set(GROUP_SCALES) == {name for name in SCALES if name.startswith("group")}


def outcome(spec: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Of the loss and its gradient, as a loss worker computes them."""
    axes = ObjectiveSpec.model_validate(spec).resolve()
    item = Item(0, axes, torch.float64, Layout.padded(tensors["log_probs"]), tensors, frozenset({"gradients"}))
    (answer,) = compute([prepare(item)])
    return answer.body


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(4, 3, generator=generator, dtype=torch.float64)

    log_probs = -normal().abs() - 1
    others = {name: log_probs + 0.1 * normal() for name in ("old_log_probs", "rollout_log_probs", "ref_log_probs")}
    return {
        "log_probs": log_probs,
        **others,
        "entropy": normal().abs(),
        "segment_ids": torch.tensor([[0, 0, 1]] * 4),
        "rewards": torch.tensor([1.0, 0.0, 0.5, 0.2], dtype=torch.float64),
        "group_ids": torch.tensor([0, 0, 1, 1]),
        "truncated": torch.zeros(4),
        "advantages": torch.tensor([1.0, -1.0, 0.5, 0.2], dtype=torch.float64),
    }


@pytest.mark.parametrize("made_of", ["rewards", "advantages"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_an_objective_can_do_with_what_it_needs_and_not_with_less(spec, made_of, batch):
    if made_of == "rewards":
        del batch["advantages"]
    needed = uses(ObjectiveSpec.model_validate(spec), batch).needed
    brought = {"log_probs", "rewards", "group_ids", "truncated", made_of}
    enough = {name: batch[name] for name in (*brought, *needed)}
    full = {name: values for name, values in batch.items() if name != "segment_ids" or name in needed}
    assert outcome(spec, enough)["loss"] == outcome(spec, full)["loss"], "what is not needed changes nothing"
    for name in needed.keys() - brought:
        less = {key: values for key, values in enough.items() if key != name}
        with pytest.raises((ItemRefused, ValueError), match=name):
            outcome(spec, less)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_numbers_that_reach_the_result_are_looked_at(spec, batch):
    """NaN in one of them is refused; in one that is not read it changes nothing."""
    del batch["advantages"]
    reads, sound = uses(ObjectiveSpec.model_validate(spec), batch).reads, outcome(spec, batch)
    floats = [name for name in batch if TENSORS[name].is_float]
    assert reads >= {"log_probs", *MEASURED}
    for name in floats:
        poisoned = batch | {name: batch[name].clone()}
        poisoned[name][1] = torch.nan
        if name in reads:
            with pytest.raises(ItemRefused, match="NaN"):
                outcome(spec, poisoned)
        else:
            assert outcome(spec, poisoned) == sound
