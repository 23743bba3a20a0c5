"""Which rank does which rows."""

from collections.abc import Sequence


def split(prompts: Sequence[list[int]], costs: Sequence[int], ranks: int) -> list[list[int]]:
    """The numbers of the rows of each rank: about equal costs, and rows of one prompt together as far as that allows, because
    what they share is computed once. Ranks without any come last."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(row)
    parts: list[list[int]] = [[] for _ in range(ranks)]
    whole, before = sum(costs), 0
    for row in (row for group in groups.values() for row in group):
        parts[(2 * before + costs[row]) * ranks // (2 * whole)].append(row)  # where its middle lies
        before += costs[row]
    return sorted(parts, key=lambda part: not part)
