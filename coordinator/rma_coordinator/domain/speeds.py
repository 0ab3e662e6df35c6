"""How long a worker will take for its next task, in seconds, learnt from those it has done. Pure, given a clock.

All of it is seconds, so that nothing needs a weight: what the next task takes, slower for each one beside it, and what
a failure would cost, as often as this worker fails. Of whom nothing is known is taken for an average one.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

#: Pairs of a worker and what it does that are remembered, 300 bytes each.
MOST_PAIRS = 20_000
#: Part of a new measurement in the mean: more while little is known.
FIRST_PART, LATER_PART, FIRST_TASKS = 0.3, 0.1, 5
#: What is known is worth half as much for each of these seconds without a word of it.
HALF_LIFE_S = 1800.0
#: Below this it is as good as unknown, and worth a try.
LEAST_KNOWN = 0.5
#: How much one task more at the same time slows each of a worker's down.
CROWDING = 0.35
#: An answer counts as so many times as long as the mean one at most, or as so much shorter.
MOST_LONGER = 8.0
#: Each task makes what is known of failures fade by so much; before any, so many of so many have failed.
FADING, FAILURES_BEFORE, TASKS_BEFORE = 0.99, 1.0, 10.0
#: Seconds until a worker that was lost is noticed.
NOTICED_S = 15.0


class Expected(NamedTuple):
    """The parts of a score, in seconds; the lowest sum is the best worker."""

    service: float
    failure: float
    #: What its cache spares.
    saved: float
    #: Whether it is known well enough, or an average stands in for it.
    known: bool

    @property
    def total(self) -> float:
        """All of it."""
        return self.service - self.saved + self.failure


class Pair:
    """What is known of one worker at one lane."""

    __slots__ = ("at", "done", "failed", "seconds", "tasks")

    def __init__(self, now: float) -> None:
        self.at = now
        #: Mean seconds of a task that had the worker to itself; how many are behind it, faded by age.
        self.seconds, self.tasks = 0.0, 0.0
        self.failed, self.done = FAILURES_BEFORE, TASKS_BEFORE

    def age(self, now: float) -> None:
        """Let what is known fade with the time since it was learnt."""
        if now > self.at:
            self.tasks *= 0.5 ** ((now - self.at) / HALF_LIFE_S)
            self.at = now

    @property
    def odds(self) -> float:
        """How many failures come on one success, beyond those that are expected of anyone."""
        return max(0.0, _odds(self.failed / self.done) - _odds(FAILURES_BEFORE / TASKS_BEFORE))


def _odds(share: float) -> float:
    share = min(0.95, share)
    return share / (1 - share)


class Speeds:
    """What every worker was seen to do; ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pairs: OrderedDict[tuple[str, str], Pair] = OrderedDict()
        #: Mean seconds and bytes of each lane's answers, whoever gave them: what is taken for whom nothing is known.
        self._means: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def learn(self, worker_id: str, lane: str, seconds: float, *, beside: int, answer_bytes: int = 0) -> None:
        """A task took so many seconds, with so many others ``beside`` it when it began; a long answer takes longer."""
        mean, size = self._means.get(lane, (0.0, float(answer_bytes)))
        alone = max(0.0, seconds) / (1 + CROWDING * beside)
        if answer_bytes and size:
            alone /= min(MOST_LONGER, max(1 / MOST_LONGER, answer_bytes / size))
        pair = self._pair(worker_id, lane)
        part = FIRST_PART if pair.tasks < FIRST_TASKS else LATER_PART
        pair.seconds = alone if pair.tasks < LEAST_KNOWN else pair.seconds + part * (alone - pair.seconds)
        pair.tasks = min(pair.tasks + 1, 2 * FIRST_TASKS)
        pair.failed, pair.done = pair.failed * FADING, pair.done * FADING + 1
        mean = mean or alone
        self._means[lane] = mean + LATER_PART * (alone - mean), size + LATER_PART * (answer_bytes - size)
        self._means.move_to_end(lane)
        while len(self._means) > MOST_PAIRS:
            self._means.popitem(last=False)

    def failed(self, worker_id: str, lane: str) -> None:
        """A task failed there, by the worker's fault."""
        pair = self._pair(worker_id, lane)
        pair.failed, pair.done = pair.failed * FADING + 1, pair.done * FADING + 1

    def expected(self, worker_id: str, lane: str, *, beside: int, saves: float = 0.0) -> Expected:
        """Return what the next task would take there, with so many ``beside`` it; its cache ``saves`` a part (0..1)."""
        mean, _ = self._means.get(lane, (0.0, 0.0))
        pair = self._pairs.get((worker_id, lane))
        if pair is None:
            seconds, odds, known = mean, 0.0, False
        else:
            pair.age(self._clock())
            known = pair.tasks >= LEAST_KNOWN
            seconds, odds = pair.seconds if known else mean, pair.odds
        service = seconds * (1 + CROWDING * beside)
        return Expected(service, odds * (service / 2 + NOTICED_S), saves * service, known)

    def known(self, worker_id: str) -> dict[str, Expected]:
        """Return what a worker's next task of each lane would take, had the worker nothing else to do."""
        lanes = [lane for name, lane in self._pairs if name == worker_id]
        return {lane: self.expected(worker_id, lane, beside=0) for lane in lanes}

    def _pair(self, worker_id: str, lane: str) -> Pair:
        now = self._clock()
        pair = self._pairs.get((worker_id, lane)) or self._pairs.setdefault((worker_id, lane), Pair(now))
        self._pairs.move_to_end((worker_id, lane))
        while len(self._pairs) > MOST_PAIRS:
            self._pairs.popitem(last=False)
        pair.age(now)
        return pair
