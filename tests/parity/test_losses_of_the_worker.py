"""Every library's figures once more, through the loss worker: as items of requests, merged as they come.

What library_losses maps and explains is taken from there: the worker must give what the objective itself gives.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from library_losses.differences import not_offered
from library_losses.figures import agree, entries_of, mapped, settings, theirs
from library_losses.options import LIBRARIES
from service.relay.orders import Answer, Order
from service.relay.queue import Taken
from service.spec.objective import ObjectiveSpec
from workers.losses.batch import bytes_of, viewed
from workers.losses.serve import Round

SENT = ("log_probs", "old_log_probs", "rollout_log_probs", "ref_log_probs", "entropy", "response_mask", "advantages")
ITEMS = 256  # of one order


def batch_of(library: str, entry: Mapping[str, Any], case: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `mapped` gives the objective, as a client sends it."""
    batch = {name: case[name] for name in SENT}
    kind = entry.get("policy_loss_type")
    if kind == "cross_entropy":
        batch["advantages"] = torch.ones_like(case["advantages"])
    if kind in ("clip_cov", "kl_cov"):
        mask = case["response_mask"]
        count = {"token_mean": mask.sum(), "sequence_mean": len(mask) * mask.sum(1, keepdim=True).clamp(min=1)}
        batch["advantages"] = case["advantages"] / count[entry["loss_reduction"]]
    return batch | {"group_ids": case["group_index"].long()}


def figures(items: list[tuple[dict[str, Any], dict[str, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """Loss and gradient of each item of one order."""
    options = {"dtype": "float64", "layout": "padded", "return": ["gradients"], "on_nonfinite": "refuse"}
    options |= {"on_singleton": "refuse", "seed": 0, "warnings": []}
    entries = [{"index": i, "objective": objective, **options} for i, (objective, _) in enumerate(items)]
    tensors = {f"{i}/{name}": bytes_of(values) for i, (_, batch) in enumerate(items) for name, values in batch.items()}
    raws: list[bytes] = []
    raw = Order("loss_1", "default", 2e9, False, entries, tensors).encode()
    Round([Taken("loss_1", "default", raw, b"")], lambda done: raws.extend(raw for _, raw in done)).run()
    answer = Answer.decode(raws[0])
    assert {entry["status"] for entry in answer.data} == {"ok"}, answer
    gradients = [viewed(answer.tensors[f"{i}/gradients/log_probs"]) for i in range(len(items))]
    return [
        (torch.tensor(float(entry["loss"]), dtype=torch.float64), gradient)
        for entry, gradient in zip(answer.data, gradients, strict=True)
    ]


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_worker_gives_every_figure_of_the_table(library: str, golden: Any, cases: Any, as_tensor: Any) -> None:
    """Theirs, or where `DIFFERENCES` explains why ours is another: ours."""
    entries = [entry for entry in entries_of(library, golden) if not not_offered(entry)]
    items, known = [], LIBRARIES[library]
    for entry in entries:
        axes = known.axes(entry, cases(entry["case"]))
        items.append((ObjectiveSpec.model_validate(axes).resolve(), batch_of(library, entry, cases(entry["case"]))))
    found = [one for start in range(0, len(items), ITEMS) for one in figures(items[start : start + ITEMS])]
    assert len(found) == len(entries) >= 40
    for entry, figure in zip(entries, found, strict=True):
        if agree(figure, theirs(entry, as_tensor), 0.0, known.tolerance):
            continue
        for a, b in zip(figure, mapped(library, entry, cases(entry["case"]))[0], strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), (entry["case"], settings(entry))
