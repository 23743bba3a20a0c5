"""The few metrics that people follow live, by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from service.metric_names import CLIP_HIGH, CLIP_LOW, EVAL_REWARD_MEAN, LOSS, LOSS_SUM, POLICY_KL_K3, REF_KL_K3, REWARD_MEAN


@dataclass
class Headline:
    """The newest value of each metric from the step events; rewards are kept for a sparkline."""

    reward: float | None = None
    clip_fraction: float | None = None
    kl: float | None = None  # to the reference, which the spec penalises, if the job has one; else to the old policy
    kl_of: str = "KL"
    loss: float | None = None
    evaluation: float | None = None
    rewards: list[float] = field(default_factory=list)

    def update(self, metrics: Mapping[str, float | None]) -> None:
        clips = [value for name in (CLIP_LOW, CLIP_HIGH) if (value := metrics.get(name)) is not None]
        if clips:
            self.clip_fraction = sum(clips)
        if metrics.get(REF_KL_K3) is not None:
            self.kl, self.kl_of = metrics[REF_KL_K3], "KL to reference"
        elif self.kl_of == "KL":
            self.kl = _newer(metrics.get(POLICY_KL_K3), self.kl)
        self.loss = _newer(metrics.get(LOSS, metrics.get(LOSS_SUM)), self.loss)
        self.evaluation = _newer(metrics.get(EVAL_REWARD_MEAN), self.evaluation)
        self.reward = _newer(metrics.get(REWARD_MEAN), self.reward)
        if metrics.get(REWARD_MEAN) is not None and self.reward is not None:
            self.rewards.append(self.reward)


def _newer(new: float | None, old: float | None) -> float | None:
    return old if new is None else new
