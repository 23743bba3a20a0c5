"""The few numbers that people follow, picked by name from the metrics of a step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

REWARD = "reward/mean"
EVAL, EVAL_GREEDY, EVAL_LOSS = "eval/reward/mean", "eval/greedy/reward/mean", "eval/loss"
LOSS, POLICY_LOSS = "loss", "policy/loss"  # of a supervised job; of an rl job
CLIP_LOW, CLIP_HIGH = "policy/clip_fraction_low", "policy/clip_fraction_high"
KL = "policy/approx_kl_k3"  # against the policy that sampled
REF_KL = "kl/ref_k3"  # against the reference, where the objective has one
CURVES = (REWARD, EVAL, LOSS, POLICY_LOSS, CLIP_LOW, CLIP_HIGH, KL, REF_KL)  # what `ratchet metrics` draws unless told


@dataclass
class Headline:
    """The newest value of each, as step events come in; rewards are kept for a sparkline."""

    reward: float | None = None
    clip_fraction: float | None = None
    kl: float | None = None
    loss: float | None = None
    evaluation: float | None = None
    rewards: list[float] = field(default_factory=list)

    def update(self, metrics: Mapping[str, float | None]) -> None:
        clips = [value for name in (CLIP_LOW, CLIP_HIGH) if (value := metrics.get(name)) is not None]
        if clips:
            self.clip_fraction = sum(clips)
        self.kl = _newer(metrics.get(KL), self.kl)
        self.loss = _newer(metrics.get(LOSS), self.loss)
        self.evaluation = _newer(metrics.get(EVAL), self.evaluation)
        self.reward = _newer(metrics.get(REWARD), self.reward)
        if metrics.get(REWARD) is not None and self.reward is not None:
            self.rewards.append(self.reward)


def _newer(new: float | None, old: float | None) -> float | None:
    return old if new is None else new
