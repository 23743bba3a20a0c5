"""What an attempt spends: tokens, and seconds by phase. Read at every commit; used by the main thread only."""

from collections import defaultdict
from time import monotonic

from service.store.usage import Spent
from service.tracing import Stages


class Meter:
    def __init__(self, phase: str, stages: Stages) -> None:
        self._stages = stages
        stages.enter(phase)
        self._phase, self._since = phase, monotonic()
        self._seconds = defaultdict[str, float](float)
        self._sampled = self._trained = 0

    def enter(self, phase: str) -> None:
        """Count the seconds from now on for this phase."""
        if phase != self._phase:
            self._stages.enter(phase)
        now = monotonic()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def sampled(self, tokens: int) -> None:
        self._sampled += tokens

    def trained(self, tokens: int) -> None:
        self._trained += tokens

    def take(self) -> Spent:
        """What was spent since the last call."""
        self.enter(self._phase)
        spent = Spent(self._sampled, self._trained, dict(self._seconds))
        self._seconds.clear()
        self._sampled = self._trained = 0
        return spent

    def give_back(self, spent: Spent) -> None:
        """What was taken could not be written: the next `take` has it again."""
        self._sampled += spent.sampled_tokens
        self._trained += spent.trained_tokens
        for phase, seconds in spent.phase_s.items():
            self._seconds[phase] += seconds
