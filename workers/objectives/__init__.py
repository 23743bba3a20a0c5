"""The loss mathematics: seven axes, one file each, and `Objective`, which composes them. torch and nothing else of ours."""

from workers.objectives.metrics import Metrics
from workers.objectives.objective import Objective, Step
from workers.objectives.outputs import LossOutputs

__all__ = ["LossOutputs", "Metrics", "Objective", "Step"]
