"""Graders: what a sampled answer is worth. Torch-free, because the API's dry run grades too."""

from service.rewards.rewards import Rewards
from service.rewards.samples import Graded, NotGraded, Sample

__all__ = ["Graded", "NotGraded", "Rewards", "Sample"]
