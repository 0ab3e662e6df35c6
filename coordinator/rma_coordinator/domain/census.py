"""Who has copies of what, and who has room for more, as rules of placement see the pool's machines; pure counts.

Only lanes under rules that govern are counted (`Rules.govern`); of a pool without such rules nothing is.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping

    from rma_coordinator.domain.rules import Strategy


K = TypeVar("K", bound="Hashable")


class Group(NamedTuple):
    """What a machine is to one lane: whether it is liked, and its value of the label that copies are shared over."""

    liked: bool
    value: str = ""


class Standing(NamedTuple):
    """One machine: the governed lanes that it has, those that it has room for, and how much it runs in all."""

    has: tuple[tuple[str, Group], ...] = ()
    room: tuple[tuple[str, Group], ...] = ()
    runs: int = 0


NOTHING = Standing()


class Census:
    """The counts of all machines; a machine that is looked at is left out meanwhile."""

    def __init__(self) -> None:
        self._has: dict[str, Counter[Group]] = {}
        self._room: dict[str, Counter[tuple[Group, int]]] = {}

    def add(self, standing: Standing) -> None:
        """Count a machine."""
        for lane, group in standing.has:
            self._has.setdefault(lane, Counter())[group] += 1
        for lane, group in standing.room:
            self._room.setdefault(lane, Counter())[group, standing.runs] += 1

    def remove(self, standing: Standing) -> None:
        """Count a machine no more."""
        for lane, group in standing.has:
            _less(self._has, lane, group)
        for lane, group in standing.room:
            _less(self._room, lane, (group, standing.runs))

    @contextlib.contextmanager
    def without(self, standing: Standing) -> Iterator[Census]:
        """Leave a machine out while it is looked at."""
        self.remove(standing)
        try:
            yield self
        finally:
            self.add(standing)

    def copies(self, lane: str, *, liked: bool = False) -> int:
        """Return how many have a lane; with ``liked`` only of those that are."""
        counts: Mapping[Group, int] = self._has.get(lane, {})
        return sum(count for group, count in counts.items() if group.liked or not liked)

    def worse(self, lane: str, group: Group) -> int:
        """Return how many that have a lane should give it up before a machine of ``group`` that has it too."""
        counts: Mapping[Group, int] = self._has.get(lane, {})
        values = Counter({group.value: 1})
        for other, count in counts.items():
            values[other.value] += count
        mine = (not group.liked, values[group.value])
        return sum(
            count
            for other, count in counts.items()
            if (other.liked or not group.liked) and (not other.liked, values[other.value]) > mine
        )

    def better(self, lane: str, group: Group, runs: int, *, strategy: Strategy, over: bool) -> int:
        """Return how many have room for a lane and come before a machine of ``group`` that ``runs`` so much.

        The liked come first; then, where copies are shared ``over`` a label, those of whose value there are fewer
        copies; then whom the strategy prefers.
        """
        rooms = self._room.get(lane)
        if not rooms:
            return 0
        values = Counter[str]()
        if over:
            for other, count in self._has.get(lane, {}).items():
                values[other.value] += count
        mine = _order(group, runs, values, strategy)
        return sum(count for (other, much), count in rooms.items() if _order(other, much, values, strategy) < mine)


#: Counts of nobody, where there are no rules.
NOBODY = Census()


def _order(group: Group, runs: int, values: Counter[str], strategy: Strategy) -> tuple[bool, int, int]:
    """Return what puts machines in order, the best one first."""
    much = runs if strategy == "spread" else -runs if strategy == "pack" else 0
    return not group.liked, values[group.value], much


def _less(counts: dict[str, Counter[K]], lane: str, key: K) -> None:
    """Count one less, and keep nothing of what nobody is."""
    of_lane = counts[lane]
    of_lane[key] -= 1
    if not of_lane[key]:
        del of_lane[key]
    if not of_lane:
        del counts[lane]
