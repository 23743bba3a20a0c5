"""What the metrics of a job say: signs that it does not learn at all, and what else stands out. Standard library only.

A sign is looked at after each step by the loop, which warns, pauses or fails the job (`limits.on_no_signal`). Advice looks at
whole curves, at any time, and only says what it sees.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

from service.metric_names import (
    CLIP_HIGH,
    CLIP_LOW,
    DISAGREEMENT,
    EVAL_GREEDY_REWARD_MEAN,
    EVAL_REWARD_MEAN,
    POLICY_KL_K3,
    REF_KL_K3,
    REWARD_MEAN,
    STALENESS,
)

FLAT, GRADIENT, ENTROPY = "reward/zero_variance_fraction", "optimizer/grad_norm", "policy/entropy"
LENGTH, TRUNCATED, ERRORS = "completion/length_mean", "completion/truncated_fraction", "reward/error_rate"
LEAST_RATIO, MOST_RATIO, SKIPPED = "policy/ratio_min", "policy/ratio_max", "optimizer/skipped"
SPREAD = "reward/std"

Values = Mapping[str, float]


# ---------------------------------------------------------------- signs that nothing is learnt


@dataclass(frozen=True)
class Sign:
    """If `shows` holds at limits.no_signal_steps steps in a row, the job has no signal."""

    metric: str  # the one that shows it
    shows: Callable[[Values, int], bool]  # of a step's metrics, and of the optimizer steps that each rollout brings
    cause: str
    remedy: str
    stops: bool = True  # whether limits.on_no_signal may pause or fail the job for it: nothing is learnt


def _is_one(ratio: float | None) -> bool:
    """To rounding: the sampler's log-probs are not the trainer's to the bit."""
    return ratio is not None and abs(ratio - 1) <= 1e-5


SIGNS: Mapping[str, Sign] = {
    "no_spread": Sign(
        FLAT,
        lambda values, _: values.get(FLAT) == 1.0,
        "all answers of each group have the same reward, so that no advantage differs from 0",
        "choose tasks that the model solves sometimes, warm it up by supervised training, raise rollout.group_size or "
        "rollout.temperature, or grade more finely",
    ),
    "all_truncated": Sign(
        TRUNCATED,
        lambda values, _: values.get(TRUNCATED) == 1.0,
        "no answer ends before the longest allowed length",
        "raise rollout.max_completion_tokens, give rollout.stop, or warm the model up on answers that end",
    ),
    "zero_gradient": Sign(
        GRADIENT,
        lambda values, _: values.get(GRADIENT) == 0.0,
        "the gradient is exactly 0: no token has weight",
        "look at reward/zero_variance_fraction, at what objective.select and rollout.mask_truncated leave, at the clip bounds",
    ),
    "constant_reward": Sign(
        SPREAD,
        lambda values, _: values.get(SPREAD) == 0.0,
        "every answer of a step has the same reward",
        "try the graders with `ratchet validate`: a reference that no answer can match, or a grader that pays everything",
    ),
    "ratio_is_one": Sign(
        MOST_RATIO,
        lambda values, updates: updates > 1 and all(_is_one(values.get(name)) for name in (LEAST_RATIO, MOST_RATIO)),
        "no token's probability changes between the updates of a step",
        "raise optimizer.learning_rate; in bfloat16 small updates of the weights round to nothing: use model.dtype float32",
    ),
    "clip_never_acts": Sign(
        CLIP_HIGH,
        lambda values, updates: updates > 1 and values.get(CLIP_LOW) == 0.0 and values.get(CLIP_HIGH) == 0.0,
        "no ratio reaches the clip bounds, so that the objective is plain policy gradient",
        "narrower objective.surrogate.clip_low and clip_high, a higher optimizer.learning_rate or more update.epochs make it "
        "act; it may also be meant so",
        stops=False,
    ),
}


def signs_of(values: Values, updates: int) -> list[str]:
    """The names of the signs that a step's metrics show; `updates`: optimizer steps of each rollout."""
    return [name for name, sign in SIGNS.items() if sign.shows(values, updates)]


# ---------------------------------------------------------------- advice


@dataclass(frozen=True)
class Advice:
    """One thing that stands out."""

    rule: str
    severity: str  # warning: look at it now · notice: keep an eye on it
    metric: str
    from_step: int
    to_step: int
    detail: str  # what is seen, in numbers
    cause: str
    remedy: str


@dataclass(frozen=True)
class Curve:
    """Points in the order of their steps, none of them null."""

    steps: Sequence[int]
    values: Sequence[float]

    @classmethod
    def of(cls, steps: Sequence[int], values: Sequence[float | None]) -> "Curve":
        points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None and isfinite(v)]
        return cls([s for s, _ in points], [v for _, v in points])

    def __len__(self) -> int:
        return len(self.values)

    @property
    def _part(self) -> int:
        return max(1, min(10, len(self) // 4))

    @property
    def first(self) -> float:
        """The mean of the first few points (a quarter, at most ten)."""
        return fmean(self.values[: self._part])

    @property
    def last(self) -> float:
        return fmean(self.values[-self._part :])

    def best(self) -> tuple[int, float]:
        """Step and value of the highest mean over as many points in a row as `last` has."""
        part = self._part
        means = [fmean(self.values[i : i + part]) for i in range(len(self) - part + 1)]
        value = max(means)
        return self.steps[means.index(value) + part - 1], value


Curves = Mapping[str, Curve]
NEEDED = tuple(
    {
        *(REWARD_MEAN, EVAL_REWARD_MEAN, EVAL_GREEDY_REWARD_MEAN, POLICY_KL_K3, REF_KL_K3, CLIP_LOW, CLIP_HIGH),
        *(FLAT, GRADIENT, ENTROPY, LENGTH, TRUNCATED, ERRORS, LEAST_RATIO, MOST_RATIO, SKIPPED, DISAGREEMENT, SPREAD),
    }
)
ENOUGH = 8  # points of a curve, before a trend is read off it


def advise(curves: Curves, *, updates: int, no_signal_steps: int) -> list[Advice]:
    """What stands out in these curves (those of NEEDED that there are): the warnings first."""
    found = [*_no_signal(curves, updates, no_signal_steps)]
    for rule in (
        _collapse,
        _entropy,
        _length,
        _held_out,
        _flat_groups,
        _truncated,
        _errors,
        _skipped,
        _disagreement,
        _kl,
        _huge_kl,
    ):
        found += rule(curves)
    return sorted(found, key=lambda advice: advice.severity != "warning")


def _no_signal(curves: Curves, updates: int, no_signal_steps: int) -> Iterator[Advice]:
    """The signs that the newest steps have all shown."""
    reward = curves.get(REWARD_MEAN) or curves.get(GRADIENT)
    if reward is None or len(reward) < no_signal_steps:
        return
    steps = reward.steps[-no_signal_steps:]
    at = {name: dict(zip(curve.steps, curve.values, strict=True)) for name, curve in curves.items()}
    shown = [set(signs_of({name: values[step] for name, values in at.items() if step in values}, updates)) for step in steps]
    for name, sign in SIGNS.items():
        if all(name in signs for signs in shown):
            at_each = "the last step" if len(steps) == 1 else f"each of the last {len(steps)} steps"
            detail = f"{sign.metric} showed it at {at_each}"
            severity = "warning" if sign.stops else "notice"
            yield Advice(name, severity, sign.metric, steps[0], steps[-1], detail, sign.cause, sign.remedy)


def _long(curves: Curves, name: str, points: int = ENOUGH) -> Curve | None:
    curve = curves.get(name)
    return curve if curve is not None and len(curve) >= points else None


def _collapse(curves: Curves) -> Iterator[Advice]:
    if (reward := _long(curves, REWARD_MEAN)) is None:
        return
    step, best = reward.best()
    gain = best - reward.first
    if gain > 0.2 * abs(best) and best - reward.last > 0.5 * gain:
        yield Advice(
            "collapse",
            "warning",
            REWARD_MEAN,
            step,
            reward.steps[-1],
            f"the reward rose from {reward.first:.3g} to {best:.3g} at step {step}, and is {reward.last:.3g} now",
            "the policy moved too far from where it learnt",
            "continue from the best checkpoint with a lower optimizer.learning_rate, fewer update.epochs, narrower clip bounds "
            "or a KL to the reference (objective.kl)",
        )


def _entropy(curves: Curves) -> Iterator[Advice]:
    entropy = _long(curves, ENTROPY)
    if entropy is None or entropy.first <= 0 or entropy.last >= 0.1 * entropy.first:
        return
    reward = _long(curves, REWARD_MEAN)
    flat = _long(curves, FLAT)
    solved = reward is not None and flat is not None and flat.last > 0.8 and reward.last >= 0.9 * max(reward.values)
    yield Advice(
        "entropy_gone",
        "notice" if solved else "warning",
        ENTROPY,
        entropy.steps[0],
        entropy.steps[-1],
        f"the entropy fell from {entropy.first:.3g} to {entropy.last:.3g} nats a token",
        "the task is solved" if solved else "the answers of a group become the same, so that nothing new is tried",
        "end the job, or take harder tasks"
        if solved
        else "raise objective.surrogate.clip_high above clip_low, raise rollout.temperature, or lower optimizer.learning_rate",
    )


def _length(curves: Curves) -> Iterator[Advice]:
    """Answers that grow: with the reward on training rows and not on held-out ones, it is the length that is paid."""
    length = _long(curves, LENGTH)
    if length is None or length.first <= 0:
        return
    ratio = length.last / length.first
    if 0.5 <= ratio <= 2.0:
        return
    reward, held_out = _long(curves, REWARD_MEAN), _held_out_curve(curves)
    hacked = (
        ratio > 2.0
        and reward is not None
        and held_out is not None
        and reward.last - reward.first > 0.1 * max(abs(reward.first), abs(reward.last))
        and held_out.last - held_out.first <= 0.1 * (reward.last - reward.first)
    )
    yield Advice(
        "length_hacking" if hacked else "length_drift",
        "warning" if hacked else "notice",
        LENGTH,
        length.steps[0],
        length.steps[-1],
        f"answers went from {length.first:.3g} to {length.last:.3g} tokens on average"
        + (" while only the training reward rose" if hacked else ""),
        "the reward pays for length" if hacked else f"answers become {'longer' if ratio > 1 else 'shorter'}",
        "read the newest rollouts (`ratchet rollouts JOB`), and grade what you want instead of how much is written; "
        "objective.aggregate says how an answer's length weighs",
    )


def _held_out_curve(curves: Curves) -> Curve | None:
    return next((curve for name in (EVAL_REWARD_MEAN, EVAL_GREEDY_REWARD_MEAN) if (curve := _long(curves, name, 3))), None)


def _held_out(curves: Curves) -> Iterator[Advice]:
    reward, held_out = _long(curves, REWARD_MEAN), _held_out_curve(curves)
    if reward is None or held_out is None:
        return
    gain = reward.last - reward.first
    best = max(held_out.values)
    lost = best - held_out.values[-1]
    if gain > 0.05 and lost > 0.05 and reward.last >= 0.9 * reward.best()[1] and lost > 0.2 * gain:
        yield Advice(
            "overfitting",
            "warning",
            EVAL_REWARD_MEAN,
            held_out.steps[list(held_out.values).index(best)],
            held_out.steps[-1],
            f"on held-out rows the reward fell from {best:.3g} to {held_out.values[-1]:.3g}, on training rows it rose to "
            f"{reward.last:.3g}",
            "the model learns the training rows or a gap in their grading",
            "take the best checkpoint (checkpoints.keep_best, early_stopping), more rows, or a KL to the reference",
        )


def _flat_groups(curves: Curves) -> Iterator[Advice]:
    flat, reward = _long(curves, FLAT), _long(curves, REWARD_MEAN)
    if flat is None or reward is None or not 0.5 < flat.last < 1.0:
        return
    yield Advice(
        "few_groups_teach",
        "notice",
        FLAT,
        flat.steps[0],
        flat.steps[-1],
        f"{flat.last:.0%} of the groups have answers of one reward, and teach nothing (mean reward {reward.last:.3g})",
        "their tasks are too hard or too easy",
        "choose tasks by how often they are solved, or raise rollout.group_size",
    )


def _truncated(curves: Curves) -> Iterator[Advice]:
    cut = _long(curves, TRUNCATED)
    if cut is not None and 0.25 < cut.last < 1.0:
        yield Advice(
            "many_truncated",
            "notice",
            TRUNCATED,
            cut.steps[0],
            cut.steps[-1],
            f"{cut.last:.0%} of the answers are cut at the longest allowed length",
            "what is graded is often not a whole answer",
            "raise rollout.max_completion_tokens, or leave cut answers out: rollout.mask_truncated",
        )


def _errors(curves: Curves) -> Iterator[Advice]:
    errors = curves.get(ERRORS)
    if errors is not None and len(errors) and errors.last > 0.02:
        yield Advice(
            "grader_errors",
            "warning",
            ERRORS,
            errors.steps[0],
            errors.steps[-1],
            f"{errors.last:.1%} of the answers could not be graded",
            "a grader fails on what the model writes",
            "read the events `reward_errors` of the job",
        )


def _skipped(curves: Curves) -> Iterator[Advice]:
    skipped = curves.get(SKIPPED)
    if skipped is not None and len(skipped) and (total := sum(skipped.values)) > 0:
        yield Advice(
            "updates_skipped",
            "warning",
            SKIPPED,
            skipped.steps[0],
            skipped.steps[-1],
            f"{total:.0f} updates were left out because their gradient was not finite",
            "numbers overflow",
            "use model.dtype float32, a lower optimizer.learning_rate, or look at the rows that the events `step_skipped` name",
        )


def _disagreement(curves: Curves) -> Iterator[Advice]:
    apart, stale = curves.get(DISAGREEMENT), curves.get(STALENESS)
    if stale is not None and len(stale) and stale.last > 0:  # the weights differ by a step, as the spec wants it
        return
    if apart is not None and len(apart) and apart.last > 0.01:
        yield Advice(
            "sampler_disagrees",
            "warning",
            DISAGREEMENT,
            apart.steps[0],
            apart.steps[-1],
            f"sampler and trainer are {apart.last:.3g} nats a token apart on the same weights",
            "they round differently, or sampling uses top_p, top_k or another temperature than the update",
            "use model.dtype float32, or weigh by objective.correct",
        )


def _kl(curves: Curves) -> Iterator[Advice]:
    moved = _long(curves, POLICY_KL_K3)
    if moved is not None and moved.last > 0.1 and moved.last > 10 * max(moved.first, 1e-4):
        yield Advice(
            "steps_too_large",
            "warning",
            POLICY_KL_K3,
            moved.steps[0],
            moved.steps[-1],
            f"one step moves the policy by {moved.last:.3g} nats a token; it was {moved.first:.3g}",
            "updates become too large for the data of one step",
            "lower optimizer.learning_rate or update.epochs, or lower optimizer.max_grad_norm",
        )


# What no healthy run has, in nats a token; the loop warns of it too.
HUGE_KL = 10.0
HUGE: Mapping[str, tuple[str, str]] = {
    POLICY_KL_K3: (
        "within one step the policy moved far from the one that sampled",
        "lower optimizer.learning_rate or update.epochs",
    ),
    REF_KL_K3: ("the policy is far from the reference", "raise objective.kl.coef, or lower optimizer.learning_rate"),
}


def _huge_kl(curves: Curves) -> Iterator[Advice]:
    for name, (cause, remedy) in HUGE.items():
        curve = curves.get(name)
        steps = [] if curve is None else [s for s, value in zip(curve.steps, curve.values, strict=True) if value > HUGE_KL]
        if curve is not None and steps:
            detail = f"{name} reached {max(curve.values):.3g} nats a token"
            yield Advice("huge_kl", "warning", name, steps[0], steps[-1], detail, cause, remedy)
