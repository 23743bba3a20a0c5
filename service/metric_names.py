"""Every metric that a job writes or a loss request answers with: one table, from which docs/metrics.md is printed.

`python -m service.metric_names` prints that page. In a name, `{grader}` stands for a grader's name, which is one part of the
path. A loop may write only the metrics listed here for its kind of job (`workers/loops/known_metrics.py`). Standard library
only.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

Better = Literal["up", "down", "neither"]
Origin = Literal["rl", "supervised", "session", "losses"]  # a kind of job; or a loss request

# Prefixes of the metrics that an evaluation measures, for sampled and for greedy answers.
EVAL, EVAL_GREEDY = "eval/", "eval/greedy/"

# Names that modules other than the writing one use.
REWARD_MEAN = "reward/mean"
EVAL_REWARD_MEAN, EVAL_GREEDY_REWARD_MEAN = EVAL + REWARD_MEAN, EVAL_GREEDY + REWARD_MEAN
LOSS, LOSS_SUM, POLICY_LOSS, EVAL_LOSS = "loss", "loss/sum", "policy/loss", "eval/loss"
CLIP_LOW, CLIP_HIGH = "policy/clip_fraction_low", "policy/clip_fraction_high"
POLICY_KL_K3, REF_KL_K3 = "policy/approx_kl_k3", "kl/ref_k3"
NOISE_LOG_RATIO, NOISE_POOLED = "policy/noise_log_ratio", "policy/noise_pooled_log_ratio"
RESCORE_DIFFERENCE = "rollout/rescore_difference"
OVERLONG_SKIPPED, OVERLONG_TRUNCATED = "data/overlong_skipped", "data/overlong_truncated"
DISAGREEMENT = "rollout/approx_kl_k3"
STALENESS, WAITED_S = "rollout/staleness", "perf/waited_s"
TOKENS_SAMPLED, TOKENS_TRAINED, STEP_S = "tokens/sampled", "tokens/trained", "perf/step_s"

EVAL_TOKENS_SAMPLED = EVAL + TOKENS_SAMPLED

_PART = "{grader}"
JOBS: tuple[Origin, ...] = ("rl", "supervised")
RL: tuple[Origin, ...] = ("rl",)
SUPERVISED: tuple[Origin, ...] = ("supervised",)
LOSSES: tuple[Origin, ...] = ("losses",)
SESSION: tuple[Origin, ...] = ("session",)
STEPS: tuple[Origin, ...] = (*JOBS, *SESSION)
OBJECTIVE: tuple[Origin, ...] = ("rl", "session", "losses")


@dataclass(frozen=True)
class Metric:
    """One line of the table. `live`: the step events contain it. `drawn`: `ratchet metrics` draws it by default."""

    name: str
    unit: str  # "1" is a plain number
    means: str
    better: Better
    of: tuple[Origin, ...]
    live: bool = False
    drawn: bool = False

    def names(self, graders: Iterable[str]) -> list[str]:
        """The names under which a job with these graders writes the metric."""
        return [self.name.replace(_PART, grader) for grader in graders] if _PART in self.name else [self.name]


# Measured on answers that were sampled and graded, in training and in each evaluation.
OF_ANSWERS = (
    Metric(REWARD_MEAN, "reward", "mean reward of the answers that have one", "up", (*RL, *SESSION), live=True, drawn=True),
    Metric("reward/std", "reward", "standard deviation of the answers' rewards", "neither", (*RL, *SESSION)),
    Metric(
        "reward/{grader}",
        "score",
        "mean score from this grader, before its weight (if that is below 0, less is better)",
        "up",
        RL,
    ),
    Metric("reward/error_rate", "share", "answers that could not be graded", "down", RL),
    Metric("completion/length_mean", "tokens", "mean length of the answers", "neither", RL, live=True),
    Metric("completion/truncated_fraction", "share", "answers that were cut at the longest allowed length", "down", RL),
)


def _evaluated(prefix: str, of_what: str, of: tuple[Origin, ...], *, drawn: bool) -> Iterator[Metric]:
    for metric in OF_ANSWERS:
        means = f"{of_what}: {metric.means}"
        yield replace(metric, name=prefix + metric.name, means=means, of=of, drawn=metric.drawn and drawn)


def _shares(name: str, which: str, better: Better, *, live: bool = False, drawn: bool = False) -> Iterator[Metric]:
    """Two metrics: NAME is the share of all tokens, NAME_sequence the mean over answers of each answer's share."""
    yield Metric(name, "share", f"tokens that {which}", better, OBJECTIVE, live=live, drawn=drawn)
    means = f"mean over answers of the share of their tokens that {which}"
    yield Metric(f"{name}_sequence", "share", means, better, OBJECTIVE, live=live)


def _kl(name: str, which: str, better: Better, *, drawn: bool = False) -> Iterator[Metric]:
    """Two estimates of a KL: NAME is by the mean log ratio, NAME_k3 is never below 0."""
    yield Metric(name, "nats/token", f"{which}, by the mean log ratio; may be below 0", better, OBJECTIVE, live=True)
    means = f"{which}, by k3; never below 0"
    yield Metric(f"{name}_k3", "nats/token", means, better, OBJECTIVE, live=True, drawn=drawn)


SECTIONS: Mapping[str, tuple[Metric, ...]] = MappingProxyType(
    {
        "Rewards and answers": (
            *OF_ANSWERS,
            Metric("reward/zero_variance_fraction", "share", "groups whose answers all have the same reward", "down", RL),
            Metric("advantage/abs_mean", "1", "mean size of the advantages, without their signs", "neither", (*RL, *SESSION)),
        ),
        "Evaluations": (
            *_evaluated(EVAL, "evaluation", STEPS, drawn=True),
            *_evaluated(EVAL_GREEDY, "evaluation, greedy answers", JOBS, drawn=False),
            Metric(EVAL_TOKENS_SAMPLED, "tokens", "evaluation: tokens of the answers, the greedy ones too", "neither", JOBS),
            Metric(EVAL_LOSS, "nats/token", "evaluation: mean −log p of a token of the given answers", "down", JOBS, live=True),
        ),
        "Loss": (
            Metric(
                LOSS, "nats/token", "mean −log p of a token of the given answers", "down", SUPERVISED, live=True, drawn=True
            ),
            Metric(
                LOSS_SUM,
                "nats",
                "sum of the losses whose gradients an optimizer step took",
                "neither",
                SESSION,
                live=True,
                drawn=True,
            ),
            Metric(
                POLICY_LOSS,
                "1",
                "the objective's; in a job the mean over a step's updates",
                "neither",
                OBJECTIVE,
                live=True,
                drawn=True,
            ),
        ),
        "Policy": (
            Metric("policy/entropy", "nats/token", "mean entropy of the next token's distribution", "neither", OBJECTIVE),
            Metric("policy/ratio_mean", "1", "mean over tokens of the pooled ratio, before any clip", "neither", OBJECTIVE),
            Metric("policy/ratio_min", "1", "least pooled ratio, before any clip", "neither", OBJECTIVE),
            Metric("policy/ratio_max", "1", "greatest pooled ratio, before any clip", "neither", OBJECTIVE),
            *_shares(CLIP_LOW, "the lower bound holds", "neither", live=True, drawn=True),
            *_shares(CLIP_HIGH, "the upper bound holds", "neither", live=True, drawn=True),
            *_shares("policy/clip_fraction_dual", "the dual clip holds", "neither", live=True),
            Metric(
                NOISE_LOG_RATIO, "nats", "rms of a token's log ratio that comes of rounding alone; not in float32", "down", RL
            ),
            Metric(NOISE_POOLED, "nats", "the same of the pooled log ratio; clips below it act at random", "down", RL),
            *_kl("policy/approx_kl", "KL(old ‖ new) of the policy", "neither", drawn=True),
            *_kl("kl/ref", "KL(new ‖ reference)", "neither", drawn=True),
        ),
        "Sampler and trainer": (
            *_kl("rollout/approx_kl", "KL(sampler ‖ trainer): how far they disagree about the same weights", "neither"),
            Metric(
                RESCORE_DIFFERENCE,
                "nats",
                "greatest difference of a token's log-prob between sampler and trainer (rollout.rescore: auto)",
                "down",
                RL,
            ),
            Metric(
                "rollout/effective_samples",
                "share",
                "(Σw)² / (n Σw²) of n tokens' w = p_old / p_rollout; 1: they agree",
                "up",
                OBJECTIVE,
            ),
            Metric(
                STALENESS,
                "steps",
                "by which the weights that sampled are older than those that are trained (rollout.max_staleness: 1)",
                "neither",
                RL,
            ),
            Metric("correction/weight_mean", "1", "mean weight of the correction, before its bounds", "neither", OBJECTIVE),
            Metric("correction/weight_min", "1", "least weight of the correction, before its bounds", "neither", OBJECTIVE),
            Metric("correction/weight_max", "1", "greatest weight of the correction, before its bounds", "neither", OBJECTIVE),
            *_shares("correction/fraction_truncated", "the cap or the floor of the correction holds", "down"),
            *_shares("correction/fraction_masked", "the correction's mask drops", "down"),
        ),
        "What the loss was made of": (
            Metric("batch/tokens", "tokens", "tokens that count; in a job once for each epoch", "neither", OBJECTIVE),
            Metric("batch/sequences", "answers", "answers that count; in a job once for each epoch", "neither", OBJECTIVE),
            Metric("batch/masked_rows", "answers", "answers without a token that counts", "neither", OBJECTIVE),
            Metric("batch/nonfinite_rows", "answers", "answers whose loss is not finite", "down", OBJECTIVE),
            Metric("batch/groups", "groups", "groups, where rewards were sent", "neither", LOSSES),
            Metric("batch/zero_variance_groups", "groups", "groups whose answers all have the same reward", "down", LOSSES),
        ),
        "Rows that are too long": (
            Metric(OVERLONG_SKIPPED, "rows", "rows of data.train that are left out (data.overlong: skip)", "down", JOBS),
            Metric(
                OVERLONG_TRUNCATED, "rows", "a step's rows whose prompt is cut (data.overlong: truncate_left)", "down", JOBS
            ),
        ),
        "Optimizer": (
            Metric("optimizer/grad_norm", "1", "norm of the gradient, before it is clipped", "neither", STEPS, live=True),
            Metric("optimizer/learning_rate", "1", "of the newest optimizer step", "neither", STEPS, live=True),
            Metric("optimizer/skipped", "updates", "those left out because the gradient was not finite", "down", STEPS),
        ),
        "Tokens and time": (
            Metric(TOKENS_SAMPLED, "tokens", "tokens of the answers that were sampled to learn from", "neither", RL),
            Metric(TOKENS_TRAINED, "tokens", "answer tokens that were learned from, once for each epoch", "neither", STEPS),
            Metric("perf/sample_tokens_per_s", "tokens/s", "sampled tokens a second, grading included", "up", RL),
            Metric("perf/update_tokens_per_s", "tokens/s", "trained tokens a second, scoring included", "up", JOBS),
            Metric(WAITED_S, "s", "how long a step waited for its answers (rollout.max_staleness: 1)", "down", RL),
            Metric(STEP_S, "s", "a training step, without evaluation and saving", "down", JOBS),
        ),
    }
)
METRICS = tuple(metric for section in SECTIONS.values() for metric in section)
DRAWN = tuple(metric.name for metric in METRICS if metric.drawn)

_PLAIN = {metric.name: metric for metric in METRICS if _PART not in metric.name}
_PATTERNS = [
    (re.compile(re.escape(metric.name).replace(re.escape(_PART), "[^/]+")), metric)
    for metric in METRICS
    if _PART in metric.name
]


def find(name: str) -> Metric | None:
    """The metric that has this name; a plain name is preferred to a pattern."""
    return _PLAIN.get(name) or next((metric for pattern, metric in _PATTERNS if pattern.fullmatch(name)), None)


@lru_cache(1024)  # asked of every metric at every step
def is_live(name: str) -> bool:
    found = find(name)
    return found is not None and found.live


def taken_from_graders() -> list[str]:
    """The names that no grader may have, because reward/NAME is another metric."""
    return [metric.name.removeprefix("reward/") for metric in _PLAIN.values() if metric.name.startswith("reward/")]


# ---------------------------------------------------------------- docs/metrics.md

HEAD = """# Metrics

Printed from the table that the code checks itself by (`service/metric_names.py`, `make reference`). A job writes these at its
steps: `GET /v1/jobs/ID/metrics`, `ratchet metrics JOB NAME`. A loss request answers with its own for each item. A metric that
looks at something, such as a reference or a correction, is there when that is.

- **unit**: 1 is a plain number, a share goes from 0 to 1.
- **means**: old, new and reference policy, ratio, k3 and correction are those of [objectives.md](objectives.md).
- **better**: whether more (up) or less (down) is better as such; what only tells where a run is says neither.
- **shown**: live ones are in the events `step`; drawn ones are the curves of `ratchet metrics JOB`, unless others are named.
- **of**: the kinds of job that write it; `losses` are loss requests.

Jobs and sessions leave answers that cannot move the policy out of an update: masked ones and, if the objective has no KL in
the loss, those whose advantage is 0, such as all of a group whose rewards are equal. `batch/tokens` and `batch/sequences`
count them;
`policy/ratio_*`, `policy/clip_fraction_*`, `policy/approx_kl*` and `kl/ref*` are of the others.
With rollout.rescore: auto, `rollout/*` is of the answers that were scored again to prove that the others need not be.
"""


def page() -> str:
    """The table as Markdown."""
    lines = [HEAD]
    for title, section in SECTIONS.items():
        lines += [f"## {title}", "", "| metric | unit | means | better | shown | of |", "|---|---|---|---|---|---|"]
        lines += [_row(metric) for metric in section] + [""]
    return "\n".join(lines)


def _row(metric: Metric) -> str:
    shown = ", ".join(word for word, is_so in (("live", metric.live), ("drawn", metric.drawn)) if is_so)
    return f"| `{metric.name}` | {metric.unit} | {metric.means} | {metric.better} | {shown} | {', '.join(metric.of)} |"


if __name__ == "__main__":
    print(page(), end="")
