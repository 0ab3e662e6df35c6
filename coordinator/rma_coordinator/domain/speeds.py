"""How long a worker will take for its next task, in seconds, learnt from those it has done. Pure, given a clock.

All of it is seconds, so that nothing needs a weight: loading a model that is cold, reading what is asked as far as no
cache spares it, answering, slower for each task beside it, and what a failure would cost, as often as this worker
fails. A model's speeds are its engine's own, in seconds a token; of other services only the whole is known. Of whom
nothing is known is taken for an average one, as fast as it is at other things.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

_Key = TypeVar("_Key")

#: Pairs of a worker and what it does that are remembered, 400 bytes each; workers, and keys' lengths of answers.
MOST_PAIRS = 20_000
#: Part of a new measurement in the mean: more while little is known.
FIRST_PART, LATER_PART, FIRST_TASKS = 0.3, 0.1, 5
#: What is known is worth half as much for each of these seconds without a word of it.
HALF_LIFE_S = 1800.0
#: What is known fades in steps of this.
AGED_EVERY_S = 1.0
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
#: Seconds to load a model of which nobody knows more.
LOAD_S = 15.0
#: A service's time that is spent on reading what it is asked, where nobody measures that.
READING = 0.5
#: Tokens of an answer where nothing else is known.
ANSWER_TOKENS = 256.0
#: Seconds a token at most: what engines say beyond it is nonsense.
MOST_A_TOKEN_S = 60.0


def _odds(share: float) -> float:
    share = min(0.95, share)
    return share / (1 - share)


_USUAL = FAILURES_BEFORE / TASKS_BEFORE
_USUAL_ODDS = _odds(_USUAL)


class Work(NamedTuple):
    """What a task is likely to be, in tokens; nothing where it has no such measure."""

    prompt: float = 0.0
    answer: float = 0.0


class Measured(NamedTuple):
    """What a task was, by its engine: tokens that were read (not those that a cache spared) and made, and seconds."""

    prompt_tokens: float = 0.0
    prompt_s: float = 0.0
    answer_tokens: float = 0.0
    answer_s: float = 0.0
    load_s: float = 0.0


class Expected(NamedTuple):
    """The parts of a score, in seconds; the lowest sum is the best worker."""

    service: float
    failure: float
    #: What its cache spares.
    saved: float
    #: Whether it is known well enough, or an average stands in for it.
    known: bool
    prefill: float = 0.0
    load: float = 0.0
    #: Until it has room.
    wait: float = 0.0

    @property
    def sure(self) -> bool:
        """Whether it is known well enough, and no failure counts against it."""
        return self.known and not self.failure

    @property
    def total(self) -> float:
        """All of it."""
        return self.wait + self.load + self.prefill + self.service + self.failure - self.saved

    @property
    def takes(self) -> float:
        """How long it will be busy with it, if all goes well."""
        return self.load + self.prefill + self.service - self.saved


#: A task of which nothing is known, and what it takes a worker of which nothing is known.
NO_WORK, UNKNOWN = Work(), Expected(0.0, 0.0, 0.0, known=False)


class Place(Protocol):
    """A worker, and what it has: as many tasks of each service, and lanes whose models must be loaded first."""

    @property
    def worker_id(self) -> str:
        """Who it is."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Its tasks, by service."""

    @property
    def cold(self) -> Collection[str]:
        """Its cold lanes."""


class Pair:
    """What is known of one worker at one thing."""

    __slots__ = ("at", "done", "failed", "load", "per_answer", "per_prompt", "seconds", "tasks")

    def __init__(self, now: float) -> None:
        self.at = now
        #: Mean seconds of a task that had the worker to itself; how many are behind it, faded by age.
        self.seconds, self.tasks = 0.0, 0.0
        #: Seconds a token of reading and of answering, and of loading; 0 where nobody has measured it.
        self.per_prompt = self.per_answer = self.load = 0.0
        self.failed, self.done = FAILURES_BEFORE, TASKS_BEFORE

    def age(self, now: float) -> None:
        """Let what is known fade with the time since it was learnt."""
        if now > self.at:
            stays = 0.5 ** ((now - self.at) / HALF_LIFE_S)
            self.tasks *= stays
            # Whoever is given nothing because it failed could never show that it does not any more.
            self.failed = FAILURES_BEFORE + (self.failed - FAILURES_BEFORE) * stays
            self.done = TASKS_BEFORE + (self.done - TASKS_BEFORE) * stays
            self.at = now


class Lane:
    """What is known of one thing, whoever does it: means over all tasks."""

    __slots__ = ("load", "per_answer", "per_prompt", "seconds", "size")

    def __init__(self) -> None:
        self.seconds = self.size = self.per_prompt = self.per_answer = self.load = 0.0


def _mixed(known: float, new: float, part: float) -> float:
    """Return a mean with one more measurement in it; 0 is none at all."""
    return known + part * (new - known) if known else new


class Speeds:
    """What every worker was seen to do; ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pairs: OrderedDict[tuple[str, str], Pair] = OrderedDict()
        self._lanes: OrderedDict[str, Lane] = OrderedDict()
        #: How slow each worker is beside others at the same things: 1 is average.
        self._slowness: OrderedDict[str, float] = OrderedDict()
        #: Tokens of an answer, by key and lane.
        self._lengths: OrderedDict[tuple[str, str], float] = OrderedDict()

    # -- what is learnt ----------------------------------------------------------------------------------------

    def learn(self, worker_id: str, lane: str, seconds: float, *, beside: int, answer_bytes: int = 0) -> None:
        """A task took so many seconds, with so many others ``beside`` it when it began; a long answer takes longer."""
        pair = self._pair(worker_id, lane)
        mean = self._lanes[lane]
        alone = (seconds if seconds > 0 else 0.0) / (1 + CROWDING * beside)
        if answer_bytes and mean.size:
            longer = answer_bytes / mean.size
            alone /= min(MOST_LONGER, max(1 / MOST_LONGER, longer))
        part = FIRST_PART if pair.tasks < FIRST_TASKS else LATER_PART
        pair.seconds = alone if pair.tasks < LEAST_KNOWN else pair.seconds + part * (alone - pair.seconds)
        if pair.tasks < 2 * FIRST_TASKS:
            pair.tasks = min(pair.tasks + 1, 2 * FIRST_TASKS)
        pair.failed, pair.done = pair.failed * FADING, pair.done * FADING + 1
        mean.seconds = _mixed(mean.seconds, alone, LATER_PART)
        mean.size = _mixed(mean.size, float(answer_bytes), LATER_PART)
        if mean.seconds:
            self._note(self._slowness, worker_id, min(MOST_LONGER, alone / mean.seconds))

    def measured(self, worker_id: str, lane: str, found: Measured, *, beside: int) -> None:
        """A task's engine has said what it did, with so many others beside it."""
        mean, pair, crowd = self._lane(lane), self._pair(worker_id, lane), 1 + CROWDING * beside
        for name, tokens, seconds in (
            ("per_prompt", found.prompt_tokens, found.prompt_s),
            ("per_answer", found.answer_tokens, found.answer_s),
            ("load", 1.0, found.load_s),
        ):
            each = seconds / tokens / (1.0 if name == "load" else crowd) if tokens > 0 and seconds > 0 else 0.0
            if 0 < each <= MOST_A_TOKEN_S or (name == "load" and each):
                setattr(pair, name, _mixed(getattr(pair, name), each, FIRST_PART))
                setattr(mean, name, _mixed(getattr(mean, name), each, LATER_PART))

    def answered(self, key_id: str, lane: str, tokens: float) -> None:
        """A key's request was answered with so many tokens."""
        self._note(self._lengths, (key_id, lane), tokens)

    def failed(self, worker_id: str, lane: str) -> None:
        """A task failed there, by the worker's fault."""
        pair = self._pair(worker_id, lane)
        pair.failed, pair.done = pair.failed * FADING + 1, pair.done * FADING + 1

    # -- what is expected --------------------------------------------------------------------------------------

    def length(self, key_id: str, lane: str, most: float | None = None) -> float:
        """Return how many tokens a key's next answer is likely to have, ``most`` where it may not have more."""
        known = self._lengths.get((key_id, lane), ANSWER_TOKENS)
        return known if most is None else min(known, most)

    def expected(
        self,
        worker_id: str,
        lane: str,
        *,
        beside: int,
        saves: float = 0.0,
        work: Work = NO_WORK,
        loaded: bool = True,
    ) -> Expected:
        """Return what the next task would take there, with so many ``beside`` it.

        Its cache ``saves`` a part (0..1) of what is to be read; a model that is not ``loaded`` must be.
        """
        mean = self._lanes.get(lane)
        return UNKNOWN if mean is None else Expected(*self._parts(mean, worker_id, lane, beside, saves, work, loaded))

    def totals(  # noqa: C901 - a call for each part would cost more than the parts
        self, seats: Iterable[Place], lane: str, service: str, work: Work, *, favourite: str = "", saves: float = 0.0
    ) -> tuple[list[float], int]:
        """Return for each of some workers the sum of `expected` beside what it has, and how many of them are sure.

        One of them, the ``favourite``, has something in its cache. It is `expected` written once more, for the hottest
        loop of all: what is called for each worker costs more than what it reckons.
        """
        mean = self._lanes.get(lane)
        if mean is None:
            return [0.0 for _ in seats], 0
        pairs, slowness, now, found, sure = self._pairs, self._slowness, self._clock(), list[float](), 0
        by_token = bool(work.answer and mean.per_answer)
        for seat in seats:
            worker_id = seat.worker_id
            pair = pairs.get((worker_id, lane))
            slow = 1.0 + CROWDING * seat.counts.get(service, 0)
            own: Pair | Lane = mean
            share = 0.0
            if pair is not None:
                if now - pair.at > AGED_EVERY_S:
                    pair.age(now)
                share = pair.failed / pair.done
                if pair.tasks >= LEAST_KNOWN:
                    own = pair
                    sure += share <= _USUAL
            if slowness and (own is mean or (by_token and not own.per_answer)):
                slow *= slowness.get(worker_id, 1.0)
            if by_token:
                prefill = work.prompt * (own.per_prompt or mean.per_prompt) * slow
                takes = prefill + work.answer * (own.per_answer or mean.per_answer) * slow
                reads = prefill
            else:
                takes = own.seconds * slow
                reads = READING * takes
            total = takes
            if share > _USUAL:
                total += (_odds(share) - _USUAL_ODDS) * (takes / 2 + NOTICED_S)
            if saves and worker_id == favourite:
                total -= reads * saves
            if seat.cold and lane in seat.cold:
                total += (pair.load if pair is not None else 0.0) or mean.load or LOAD_S
            found.append(total)
        return found, sure

    def _parts(  # noqa: PLR0917 - names would cost the hottest call of all as much as its work
        self,
        mean: Lane,
        worker_id: str,
        lane: str,
        beside: int,
        saves: float,
        work: Work,
        loaded: bool,  # noqa: FBT001 - the same
    ) -> tuple[float, float, float, bool, float, float]:
        pair = self._pairs.get((worker_id, lane))
        odds, known = 0.0, False
        if pair is not None:
            now = self._clock()
            if now - pair.at > AGED_EVERY_S:
                pair.age(now)
            share = pair.failed / pair.done
            if share > _USUAL:
                odds = _odds(share) - _USUAL_ODDS
            known = pair.tasks >= LEAST_KNOWN
        slow = 1 + CROWDING * beside
        own: Pair | Lane = pair if known and pair is not None else mean
        by_token = bool(work.answer and mean.per_answer)
        if own is mean or (by_token and not own.per_answer):
            # Where others' measure stands in for its own.
            slow *= self._slowness.get(worker_id, 1.0)
        saved = prefill = load = 0.0
        if by_token:
            # A model of which the whole is known and no token yet has the average's tokens.
            prefill = work.prompt * (own.per_prompt or mean.per_prompt) * slow
            service = work.answer * (own.per_answer or mean.per_answer) * slow
            saved = prefill * saves
        else:
            service = own.seconds * slow
            saved = READING * saves * service
        if not loaded:
            load = (pair.load if pair is not None else 0.0) or mean.load or LOAD_S
        failure = odds * ((prefill + service) / 2 + NOTICED_S) if odds else 0.0
        return service, failure, saved, known, prefill, load

    def known(self, worker_id: str) -> dict[str, Expected]:
        """Return what a worker's next task of each lane would take, had the worker nothing else to do."""
        lanes = [lane for name, lane in self._pairs if name == worker_id]
        return {lane: self.expected(worker_id, lane, beside=0) for lane in lanes}

    def load_s(self, worker_id: str, lane: str) -> float:
        """Return a worker's seconds to load a model; 0 where nobody has measured it."""
        pair = self._pairs.get((worker_id, lane))
        return pair.load if pair is not None else 0.0

    def per_token(self, worker_id: str, lane: str) -> tuple[float, float]:
        """Return a worker's seconds a token of reading and of answering; 0 where nobody has measured it."""
        pair = self._pairs.get((worker_id, lane))
        return (pair.per_prompt, pair.per_answer) if pair is not None else (0.0, 0.0)

    # -- inside ------------------------------------------------------------------------------------------------

    def _pair(self, worker_id: str, lane: str) -> Pair:
        now, key = self._clock(), (worker_id, lane)
        pair = self._pairs.get(key)
        if pair is None:
            pair = self._pairs[key] = Pair(now)
            if len(self._pairs) > MOST_PAIRS:
                self._pairs.popitem(last=False)
        self._pairs.move_to_end(key)
        pair.age(now)
        self._lane(lane)
        return pair

    def _lane(self, lane: str) -> Lane:
        mean = self._lanes.get(lane)
        if mean is None:
            mean = self._lanes[lane] = Lane()
            if len(self._lanes) > MOST_PAIRS:
                self._lanes.popitem(last=False)
        self._lanes.move_to_end(lane)
        return mean

    def _note(self, where: OrderedDict[_Key, float], key: _Key, value: float) -> None:
        where[key] = _mixed(where.get(key, 0.0), value, LATER_PART)
        where.move_to_end(key)
        if len(where) > MOST_PAIRS:
            where.popitem(last=False)
