"""Who has copies of what, and who has room for more, as rules of placement see the pool's machines; pure counts.

Only lanes under rules that govern are counted (`Rules.govern`); of a pool without such rules nothing is. Machines are
counted by what they are to a lane, so that a look at all of them costs no more in a large pool, whatever labels it has.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

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


class _Lane:
    """The machines that have one lane, or have room for it.

    Both are also counted by how many copies there are of their value, the only thing about it that matters.
    """

    __slots__ = ("_has", "_having", "_room", "_roomy", "copies")

    def __init__(self) -> None:
        #: Copies by value.
        self.copies = Counter[str]()
        #: By value, those that have it: the liked and the others. By value, those with room, and how much they run.
        self._has: dict[str, Counter[bool]] = {}
        self._room: dict[str, Counter[tuple[bool, int]]] = {}
        #: The same, by how many copies there are of their value.
        self._having = Counter[tuple[bool, int]]()
        self._roomy = Counter[tuple[bool, int, int]]()

    def count_copy(self, group: Group, by: int) -> None:
        """Count one copy more, or one less."""
        value, before = group.value, self.copies[group.value]
        for liked, count in self._has.get(value, {}).items():
            _add(self._having, (liked, before), -count)
            _add(self._having, (liked, before + by), count)
        for (liked, runs), count in self._room.get(value, {}).items():
            _add(self._roomy, (liked, before, runs), -count)
            _add(self._roomy, (liked, before + by, runs), count)
        _add(self.copies, value, by)
        _add(self._has.setdefault(value, Counter()), group.liked, by)
        _add(self._having, (group.liked, before + by), by)
        if not self._has[value]:
            del self._has[value]

    def count_room(self, group: Group, runs: int, by: int) -> None:
        """Count one machine more, or one less, that has room and runs so much."""
        _add(self._room.setdefault(group.value, Counter()), (group.liked, runs), by)
        _add(self._roomy, (group.liked, self.copies[group.value], runs), by)
        if not self._room[group.value]:
            del self._room[group.value]

    def all(self, *, liked: bool) -> int:
        """Return how many have it; with ``liked`` only of those that are."""
        return sum(count for (likes, _), count in self._having.items() if likes or not liked)

    def worse(self, group: Group) -> int:
        """See `Census.worse`."""
        mine = (not group.liked, self.copies[group.value] + 1)
        return sum(
            count
            for (liked, copies), count in self._having.items()
            if (liked or not group.liked) and (not liked, copies) > mine
        )

    def better(self, group: Group, runs: int, strategy: Strategy) -> int:
        """See `Census.better`."""
        sign = {"spread": 1, "pack": -1}.get(strategy, 0)
        mine = (not group.liked, self.copies[group.value], sign * runs)
        return sum(
            count for (liked, copies, much), count in self._roomy.items() if (not liked, copies, sign * much) < mine
        )

    @property
    def empty(self) -> bool:
        """Whether nobody is counted."""
        return not self._has and not self._room


class Census:
    """The counts of all machines; a machine that is looked at is left out meanwhile."""

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane] = {}

    def add(self, standing: Standing, *, by: int = 1) -> None:
        """Count a machine."""
        for lane, group in standing.has:
            self._lane(lane).count_copy(group, by)
        for lane, group in standing.room:
            self._lane(lane).count_room(group, standing.runs, by)
        if by < 0:
            for lane, _ in (*standing.has, *standing.room):
                if lane in self._lanes and self._lanes[lane].empty:
                    del self._lanes[lane]

    def remove(self, standing: Standing) -> None:
        """Count a machine no more."""
        self.add(standing, by=-1)

    def _lane(self, lane: str) -> _Lane:
        found = self._lanes.get(lane)
        if found is None:
            found = self._lanes[lane] = _Lane()
        return found

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
        found = self._lanes.get(lane)
        return found.all(liked=liked) if found else 0

    def worse(self, lane: str, group: Group) -> int:
        """Return how many that have a lane should give it up before a machine of ``group`` that has it too.

        Those that are not liked go first; then those of whose value there are more copies.
        """
        found = self._lanes.get(lane)
        return found.worse(group) if found else 0

    def better(self, lane: str, group: Group, runs: int, *, strategy: Strategy) -> int:
        """Return how many have room for a lane and come before a machine of ``group`` that ``runs`` so much.

        The liked come first; then those of whose value there are fewer copies; then whom the strategy prefers.
        """
        found = self._lanes.get(lane)
        return found.better(group, runs, strategy) if found else 0


#: Counts of nobody, where there are no rules.
NOBODY = Census()


def _add(counts: Counter[K], key: K, by: int) -> None:
    """Count, and keep nothing of what nobody is."""
    counts[key] += by
    if not counts[key]:
        del counts[key]
