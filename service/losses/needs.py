"""The tensors that an objective needs and a batch lacks, and how the objective changes without optional tensors."""

from collections.abc import Collection
from typing import Any

from service.errors import FieldError
from service.spec.objective import ObjectiveSpec
from service.spec.tensors import uses


def missing(objective: ObjectiveSpec, has: Collection[str]) -> list[FieldError]:
    """A FieldError for each tensor that the objective needs and `has` lacks. Pointers are relative to the batch."""
    needed = uses(objective, has).needed.items()
    return [FieldError(f"/{name}", f"is missing: {why}", "missing_tensor") for name, why in needed if name not in has]


def resolved(objective: ObjectiveSpec, has: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Every axis in full, and warnings about settings that are valid but probably a mistake.

    A selection is switched off if the tensors that it needs are missing, or if `weights` are given, because these already
    contain the selection of the whole step.
    """
    axes, warnings = objective.resolve(), objective.warnings()
    select = axes["select"]
    if objective.kl.in_reward and objective.kl.coef > 0 and "advantages" in has:
        warnings.append("kl.place reward changes nothing here: `advantages` came, not the rewards that it would be taken off")
    if axes["aggregate"].get("constant", 0) is None and "weights" not in has:
        warnings.append(
            "aggregate constant divides by the longest sequence that came, padding included: "
            "give the longest possible answer as aggregate.constant"
        )
    if "weights" in has:
        axes["select"] = {"truncated": False, "zero_variance": False, "top_entropy": None}
        return axes, warnings
    if select["truncated"] and "truncated" not in has:
        select["truncated"] = False
        warnings.append("select.truncated leaves nothing out: the batch does not say which answers were `truncated`")
    if select["zero_variance"] and not {"rewards", "group_ids"} <= set(has):
        select["zero_variance"] = False
        warnings.append("select.zero_variance leaves nothing out: it looks at `rewards` and `group_ids`")
    return axes, warnings
