"""The loss mathematics: seven axes, one file each, and `Objective`, which composes them. It imports torch and no other room."""

from workers.objectives.metrics import Metrics
from workers.objectives.objective import Objective
from workers.objectives.outputs import LossOutputs
from workers.objectives.step import OptimizerStep, Rows

__all__ = ["LossOutputs", "Metrics", "Objective", "OptimizerStep", "Rows"]
