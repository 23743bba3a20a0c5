"""What an objective needs of a batch, and what becomes of it where parts that are not needed did not come."""

from collections.abc import Collection
from typing import Any

from service.errors import FieldError
from service.spec.axes import Plain
from service.spec.objective import ObjectiveSpec

GROUP_CENTRES = ("group_mean", "leave_one_out", "length_weighted", "best_minus_second")
GROUP_SCALES = ("group_std", "group_mean")


def missing(objective: ObjectiveSpec, has: Collection[str]) -> list[FieldError]:
    """A FieldError for each tensor that the objective cannot do without; their pointers begin at the batch."""
    from_rewards = "advantages" not in has and "rewards" in has
    wanted = dict(sorted(objective.needs(rewards=from_rewards).items()))
    if "weights" in has:  # they say which tokens count, and by how much
        wanted.pop("entropy", None)
    elif objective.aggregate.kind == "prompt":
        wanted["group_ids"] = "aggregate prompt takes means over groups"
    if from_rewards and _looks_at_groups(objective):
        wanted["group_ids"] = "advantages are made of rewards within their group"
    if "advantages" not in has and not from_rewards and not _is_plain(objective):
        wanted["advantages"] = "send them, or rewards (with group_ids) of which they are made"
    return [FieldError(f"/{name}", f"is missing: {why}", "missing_tensor") for name, why in wanted.items() if name not in has]


def _looks_at_groups(objective: ObjectiveSpec) -> bool:
    return objective.advantage.centre in GROUP_CENTRES or objective.advantage.scale in GROUP_SCALES


def _is_plain(objective: ObjectiveSpec) -> bool:
    """-log p, whose advantages are 1 unless they are given (cross-entropy)."""
    return objective.ratio.constant and isinstance(objective.surrogate, Plain) and objective.advantage.centre == "given"


def resolved(objective: ObjectiveSpec, has: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Every axis in full, and what is legal and probably not meant.

    A selection has no effect without the facts that it looks at, nor under `weights`, in which the selection of the whole step
    is contained: it is switched off.
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
