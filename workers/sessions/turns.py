"""Whose turn it is: fair between projects, and between the sessions of one, by the tokens of work that each had.

Each has a virtual time, which grows with its work; who has had the least is next. One that comes, or comes back, starts at the
time of those that are there, so that nobody saves up turns while there is nothing to do.
"""

from collections.abc import Collection, Mapping


class Turns:
    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        self._now = 0.0  # the time of whoever had the last turn, before it

    def next(self, waiting: Collection[str]) -> str:
        """Who of these is next. They must not be empty; of equals the first in the order of names."""
        return min(sorted(waiting), key=lambda name: max(self._had.get(name, 0.0), self._now))

    def spend(self, name: str, cost: float) -> None:
        """Count this work."""
        self._now = max(self._had.get(name, 0.0), self._now)
        self._had[name] = self._now + cost


class FairTurns:
    """Turns between projects, and within each between its sessions."""

    def __init__(self) -> None:
        self._projects, self._within = Turns(), dict[str, Turns]()

    def next(self, waiting: Mapping[str, str]) -> str:
        """Which session is next. `waiting`: session -> project, not empty."""
        project = self._projects.next(set(waiting.values()))
        ours = [session for session, owner in waiting.items() if owner == project]
        return self._within.setdefault(project, Turns()).next(ours)

    def spend(self, project: str, session: str, cost: float) -> None:
        self._projects.spend(project, cost)
        self._within.setdefault(project, Turns()).spend(session, cost)
