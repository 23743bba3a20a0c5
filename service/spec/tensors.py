"""The table of the tensors of a loss, and the function that says which of them an objective uses.

Loss requests read the table for accepted names, shapes and dtypes; loss workers for the checks and rounding of numbers. Other
modules ask it what an objective needs. `workers.objectives` and the client do not import it but use the same names; tests check
that.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from service.spec.axes import Plain
from service.spec.objective import ObjectiveSpec

# What each number belongs to. B sequences of T tokens, R rewards: [B, T] (or flat, the sequences concatenated), [B], [B, R],
# [R], and for `cut` [B + 1].
Per = Literal["token", "row", "row_and_reward", "reward", "cut"]
# What the numbers mean, which determines how they are checked:
#   log_prob  finite where response_mask is 1; a value above 0 draws a warning
#   number    finite where response_mask is 1
#   flag      0 or 1
#   id        integers, at least 0
#   label     integers of any value; in JSON strings too
#   offset    non-decreasing integers from 0 to the number of tokens
Holds = Literal["log_prob", "number", "flag", "id", "label", "offset"]

FLOATS = ("F64", "F32", "BF16")
INTEGERS = ("I64", "I32")
DTYPES: Mapping[Holds, tuple[str, ...]] = {
    "log_prob": FLOATS,
    "number": FLOATS,
    "flag": (*FLOATS, "BOOL", "U8", *INTEGERS),
    "id": INTEGERS,
    "label": INTEGERS,
    "offset": INTEGERS,
}


@dataclass(frozen=True)
class BatchTensor:
    """One tensor of a batch."""

    per: tuple[Per, ...]  # several: either
    holds: Holds
    meaning: str  # in openapi.json
    of_model: bool = False  # a bfloat16 model would give it in bfloat16, so it is rounded where that is computed in
    measured: bool = False  # where given it is in the metrics, needed or not

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The accepted dtypes, by their names in safetensors."""
        return DTYPES[self.holds]

    @property
    def is_float(self) -> bool:
        return self.holds in ("log_prob", "number")


TENSORS: Mapping[str, BatchTensor] = {
    "log_probs": BatchTensor(
        ("token",), "log_prob", "per token, of the policy that is trained: what gradients are taken of", of_model=True
    ),
    "old_log_probs": BatchTensor(
        ("token",), "log_prob", "per token, of the same policy when it sampled", of_model=True, measured=True
    ),
    "rollout_log_probs": BatchTensor(
        ("token",), "log_prob", "per token, as the sampler reported them", of_model=True, measured=True
    ),
    "ref_log_probs": BatchTensor(("token",), "log_prob", "per token, of the reference policy", of_model=True, measured=True),
    "entropy": BatchTensor(("token",), "number", "per token, of the policy's distribution", of_model=True, measured=True),
    "response_mask": BatchTensor(("token",), "flag", "per token, 0 or 1: what counts; default: all of it"),
    "segment_ids": BatchTensor(("token",), "id", "per token: the segment that it belongs to"),
    "weights": BatchTensor(
        ("token",), "number", "per token: aggregation weights, as `return` gives them, in place of the aggregate axis"
    ),
    "advantages": BatchTensor(("row", "token"), "number", "one a sequence, or per token", of_model=True),
    "rewards": BatchTensor(
        ("row", "row_and_reward"),
        "number",
        "one a sequence, or several, [B, R]; advantages are made of them unless given",
        of_model=True,
    ),
    "group_ids": BatchTensor(("row",), "label", "one a sequence: which of them answer the same prompt"),
    "truncated": BatchTensor(("row",), "flag", "one a sequence: whether it was cut at the token limit"),
    "reward_weights": BatchTensor(("reward",), "number", "[R], of several rewards; default: all 1"),
    "cu_seqlens": BatchTensor(("cut",), "offset", "of flat tensors [B + 1]: where each sequence begins, and the end"),
}
MEASURED = tuple(name for name, tensor in TENSORS.items() if tensor.measured)


# ---------------------------------------------------------------- what an objective does with a batch

GROUP_CENTRES = ("group_mean", "leave_one_out", "length_weighted", "best_minus_second")
GROUP_SCALES = ("group_std", "group_mean")
OF_A_JOB = frozenset({"rewards", "group_ids"})  # what an rl job's batches contain besides the results of its models


@dataclass(frozen=True)
class Uses:
    """How an objective uses a batch with certain tensors."""

    needed: Mapping[str, str]  # what the objective cannot do without beside log_probs, and what for; brought or not
    reads: frozenset[str]  # tensors whose numbers reach the result, where they came
    makes_advantages: bool  # of rewards
    in_groups: bool  # with a statistic of each group

    @property
    def in_segments(self) -> bool:
        """Whether segment_ids affect the result."""
        return "segment_ids" in self.needed


def uses(objective: ObjectiveSpec, given: Collection[str]) -> Uses:
    """How the objective uses a batch that contains the tensors `given`."""
    makes_advantages = "advantages" not in given and "rewards" in given
    in_groups = makes_advantages and (objective.advantage.centre in GROUP_CENTRES or objective.advantage.scale in GROUP_SCALES)
    needed = dict(sorted(dict(_needed_by_axes(objective, rewards=makes_advantages)).items()))
    if "weights" in given:  # they say which tokens count, and by how much
        needed.pop("entropy", None)
    elif objective.aggregate.kind == "prompt":
        needed["group_ids"] = "aggregate prompt takes means over groups"
    if in_groups:
        needed["group_ids"] = "advantages are made of rewards within their group"
    if "advantages" not in given and not makes_advantages and not _is_plain(objective):
        needed["advantages"] = "send them, or rewards (with group_ids) of which they are made"
    reads = {"log_probs", "weights", "advantages", *MEASURED}
    reads |= {"rewards", "reward_weights"} if makes_advantages else set()
    reads |= {"rewards"} if objective.select.zero_variance and "weights" not in given else set()
    return Uses(needed, frozenset(reads), makes_advantages, in_groups)


def _needed_by_axes(objective: ObjectiveSpec, *, rewards: bool) -> Iterator[tuple[str, str]]:
    """Pairs of a needed tensor and the reason; the later of two reasons for a tensor counts.

    `rewards`: advantages are computed from rewards, so the tensors that affect advantages are needed too."""
    correct, kl = objective.correct, objective.kl
    if correct.wants_segments:
        yield "segment_ids", "correct.level segment, without a chunk length"
    if objective.has_segments:
        yield "segment_ids", "ratio segment, without a chunk length"
    if objective.select.top_entropy is not None:
        yield "entropy", "select.top_entropy keeps the tokens of highest entropy"
    if correct.sequence_delta is not None:
        yield "old_log_probs", "correct.sequence_delta looks how far the policy moved"
    if correct.weighs:
        for name in ("old_log_probs", "rollout_log_probs"):
            yield name, f"correct.action {correct.action} weighs by old over rollout"
    if kl.acts(rewards=rewards):
        if kl.in_reward:
            yield "old_log_probs", "kl.place reward takes the KL of the old policy"
        yield f"{kl.reference}_log_probs", f"kl.place {kl.place} compares with it (kl: none switches that off)"
    if objective.compares_with_anchor:
        yield f"{objective.anchor}_log_probs", f"anchor {objective.anchor}: the ratio's denominator"


def _is_plain(objective: ObjectiveSpec) -> bool:
    """Whether the loss is -log p, for which advantages default to 1 (cross-entropy)."""
    return objective.ratio.constant and isinstance(objective.surrogate, Plain) and objective.advantage.centre == "given"
