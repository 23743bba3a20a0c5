"""Warns once when a metric reaches a value that no healthy run has, and names the likely cause."""

from collections.abc import Mapping
from dataclasses import dataclass

from service.metric_names import DISAGREEMENT, EVAL_LOSS, LOSS, POLICY_LOSS, STALENESS
from service.signals import HUGE, HUGE_KL
from workers.loops.progress import Progress
from workers.tenure.tenure import EventRow


@dataclass(frozen=True)
class Bound:
    """A metric is implausible if its absolute value exceeds `most`. The warning also shows the metrics in `beside`."""

    most: float
    cause: str
    beside: tuple[str, ...] = ()


FAR = "policy/ratio_max", "optimizer/grad_norm", "optimizer/learning_rate"
BOUNDS: dict[str, Bound] = {
    **{name: Bound(HUGE_KL, f"{cause}; {remedy}", FAR) for name, (cause, remedy) in HUGE.items()},
    DISAGREEMENT: Bound(
        1.0,
        "sampler and trainer disagree about the same weights; rollout.top_p and top_k do that, since the sampler then gives "
        "the log-probs among the tokens that they leave; without them use model.dtype: float32, or report the model's family",
    ),
    POLICY_LOSS: Bound(
        20.0, "a few tokens with large ratios make up the loss; look at the clip bounds and the advantages", FAR
    ),
    LOSS: Bound(
        20.0,
        "worse than a uniform guess over any vocabulary: the model takes the answers for impossible; look at the template, and "
        "at optimizer.learning_rate",
        FAR[1:],
    ),
    EVAL_LOSS: Bound(
        20.0,
        "worse than a uniform guess over any vocabulary: the model takes the held-out answers for impossible; look at the "
        "template, and at optimizer.learning_rate",
        (LOSS, *FAR[1:]),
    ),
}


def implausible(progress: Progress, metrics: Mapping[str, float]) -> list[EventRow]:
    """A warning for each metric that is implausible now and was not at the step before."""
    now = {name for name, bound in BOUNDS.items() if abs(metrics.get(name, 0.0)) > bound.most}
    if metrics.get(STALENESS):  # the sampler's weights are others, as the spec wants it
        now.discard(DISAGREEMENT)
    now.update(name for name in progress.implausible if name not in metrics)  # not every commit has all of them
    fresh = [name for name in BOUNDS if name in now and name not in progress.implausible]
    progress.implausible = sorted(now)
    return [
        ("warning", {"step": progress.step, "metric": name, "detail": _detail(name, metrics, progress.step)}) for name in fresh
    ]


def _detail(name: str, metrics: Mapping[str, float], step: int) -> str:
    bound = BOUNDS[name]
    beside = ", ".join(f"{other} {metrics[other]:.3g}" for other in bound.beside if other in metrics)
    return f"{name} is {metrics[name]:.3g} at step {step}: {bound.cause}" + (f" ({beside})" if beside else "")
