"""Dispatch in a simulated pool of volunteers, beside round-robin, least-busy and random; no process, no network.

The real dispatcher runs against a clock of its own: machines of very different speed that come and go, requests in
bursts, one key that asks for most. The others send each request on at once, to a queue at a worker, as a load balancer
does. ``--workers`` machines, 15 simulated seconds for each of ``--seconds``; ``--workers 10000 --seconds 40`` is ten
minutes of a large pool and takes about as long.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import sys
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bench import _common
from bench._common import Target
from rma_coordinator.domain.dispatch import Dispatcher
from rma_coordinator.domain.speeds import CROWDING
from rma_coordinator.domain.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rma_coordinator.domain.tasks import Attempt

SEED = 5
SIMULATED_PER_S = 15
#: Share of the machines' sum that is asked for, and how much more in a burst of so many seconds of each so many.
LOAD, BURST, BURST_S, EVERY_S = 0.9, 3.0, 30.0, 120.0
#: Half of the machines have left after this time; a newcomer takes each one's place.
MEDIAN_LIFE_S = 35 * 3600.0
#: How long it takes until a machine that left is missed.
MISSED_S = 10.0
#: Tokens of an answer: median, spread and most.
TOKENS, SPREAD, MOST_TOKENS = 200.0, 0.8, 2000.0
MEAN_TOKENS = TOKENS * math.exp(SPREAD**2 / 2)
DEADLINE_S = 600.0
#: How often time passes for the dispatcher, and how often each way says how far it is.
TICK_S, PROGRESSES = 2.0, 10
LANE = "llm"


class Machine(NamedTuple):
    """A class of machines: how many of a hundred, tokens a second alone, how many requests at once."""

    share: float
    speed: float
    slots: int


#: Shares of graphics memory of 16 GB and more, 12 GB and 6 GB as in Steam's survey of August 2025; of 8 GB and without
#: a graphics card of use they are assumed. Speeds are those of an 8B model in four bits, rounded.
MACHINES = (
    Machine(3, 60, 4), Machine(7.5, 40, 4), Machine(19, 30, 4), Machine(30, 25, 2), Machine(10.5, 12, 1),
    Machine(30, 5, 1),
)  # fmt: skip
#: Parts of the requests that each key asks for.
KEYS = {"most": 8.0, "some": 1.0, "few": 1.0}
Way = Literal["rma", "round-robin", "least-busy", "random"]
WAYS: tuple[Way, ...] = ("rma", "round-robin", "least-busy", "random")


class Ended(NamedTuple):
    """A request that was answered, in seconds."""

    key: str
    waited: float
    took: float
    tokens: float


class World:
    """Time, machines and requests, the same for every way of handing them out."""

    def __init__(self, workers: int, seconds: float) -> None:
        self.chance = random.Random(SEED)
        self.now, self.seconds = 0.0, seconds
        self.machines: dict[str, Machine] = {}
        self.work: dict[str, float] = {}
        self.events: list[tuple[float, int, str, Any]] = []
        self.order, self.names = itertools.count(), itertools.count()
        self.ended: list[Ended] = []
        self.asked = self.failed = 0
        self.lost_tokens = 0.0
        #: Machines that left, and requests that were handed to another machine because of that.
        self.left = self.again = 0
        for _ in range(workers):
            self.at(0.0, "come", None)
        #: Tokens a second of all machines together, on average.
        self.capacity = workers * sum(one.share * total_speed(one) for one in MACHINES) / 100
        self.rate = LOAD * self.capacity / MEAN_TOKENS / (1 + (BURST - 1) * BURST_S / EVERY_S)

    def at(self, time: float, kind: str, what: object) -> None:
        """Let something happen then."""
        heapq.heappush(self.events, (time, next(self.order), kind, what))

    def come(self) -> str:
        """Return the name of a machine that is there from now on, until it leaves."""
        name = f"w{next(self.names)}"
        self.machines[name] = self.chance.choices(MACHINES, [one.share for one in MACHINES])[0]
        self.at(self.now + self.chance.expovariate(math.log(2) / MEDIAN_LIFE_S), "leave", name)
        return name

    def request(self) -> Task:
        """Return the next request, and let the one after it come."""
        burst = BURST if self.now % EVERY_S < BURST_S else 1.0
        later = self.now + self.chance.expovariate(self.rate * burst)
        if later < self.seconds:
            self.at(later, "ask", None)
        key = self.chance.choices(list(KEYS), list(KEYS.values()))[0]
        task = Task(
            service=LANE, method="POST", path="/", headers=(), body_bytes=0, key_id=key, now=self.now,
            timeout_s=DEADLINE_S,
        )  # fmt: skip
        self.work[task.id] = min(MOST_TOKENS, self.chance.lognormvariate(math.log(TOKENS), SPREAD))
        self.asked += 1
        return task

    def takes(self, task: Task, worker_id: str, beside: int) -> float:
        """Return the seconds of a request on a machine that has so many others."""
        return self.work[task.id] / self.machines[worker_id].speed * (1 + CROWDING * beside)

    def gave_up(self, task: Task) -> None:
        """A request will have no answer."""
        self.failed += 1
        self.lost_tokens += self.work.pop(task.id)

    def answered(self, task: Task, begun: float) -> None:
        """A request has its whole answer."""
        waited, took = begun - task.created_at, self.now - task.created_at
        self.ended.append(Ended(task.key_id, waited, took, self.work.pop(task.id)))


def total_speed(machine: Machine) -> float:
    """Return tokens a second of a machine with all slots in use."""
    return machine.slots * machine.speed / (1 + CROWDING * (machine.slots - 1))


class Pull:
    """The real dispatcher, and what it hands out."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.dispatcher = Dispatcher(
            self, clock=lambda: world.now, max_queued=10**9, lease_s=10**9, chance=random.Random(SEED)
        )  # fmt: skip

    def come(self, name: str) -> None:
        """A machine is there."""
        self.dispatcher.arrived(name)
        self.dispatcher.offers(name, {LANE: self.world.machines[name].slots}, usable=True)

    def leave(self, name: str) -> None:
        """A machine is gone, and soon missed."""
        self.dispatcher.departed(name)
        self.world.at(self.world.now + MISSED_S, "missed", name)

    def missed(self, name: str) -> None:
        """A machine that left is missed."""
        self.dispatcher.gone(name, "it left", blame=True)

    def ask(self, task: Task) -> None:
        """A request comes."""
        self.dispatcher.submit(task)

    def done(self, attempt: Attempt) -> None:
        """A machine has the whole answer, if it is still there."""
        if attempt.open and attempt.worker_id in self.world.machines:
            attempt.task.answer_bytes = int(self.world.work[attempt.task.id])
            self.dispatcher.delivered(attempt, usage={})

    def tick(self) -> None:
        """Time passes."""
        self.dispatcher.tick()

    def ready(self, worker_id: str) -> bool:
        """Say whether a machine can be handed something."""
        return worker_id in self.world.machines

    def offer(self, attempt: Attempt) -> bool:
        """A machine begins."""
        takes = self.world.takes(attempt.task, attempt.worker_id, attempt.beside)
        self.world.at(self.world.now + takes, "done", attempt)
        self.world.at(self.world.now, "begin", attempt)
        return True

    def begin(self, attempt: Attempt) -> None:
        """A machine has begun."""
        if attempt.open:
            self.dispatcher.accept(attempt)

    def withdraw(self, attempt: Attempt, reason: str) -> None:
        """Nobody wants an attempt any more."""

    def accepted(self, attempt: Attempt) -> None:
        """A machine has begun."""

    def restarted(self, task: Task) -> None:  # noqa: ARG002 - the dispatcher's word
        """A request begins anew."""
        self.world.again += 1

    def closing(self, task: Task) -> None:
        """No request here is durable."""

    def finished(self, task: Task) -> None:
        """A request has ended."""
        if task.state == "succeeded" and task.attempt is not None:
            self.world.answered(task, task.attempt.offered_at)
        else:
            self.world.gave_up(task)


class Running(NamedTuple):
    """A request at a machine, since when."""

    task: Task
    name: str
    begun: float


class Push:
    """A load balancer: each request goes to a machine's own queue at once, whoever is there."""

    def __init__(self, world: World, way: Way) -> None:
        self.world, self.way = world, way
        self.chance = random.Random(SEED)
        self.here: list[str] = []
        self.next = 0
        self.queues: dict[str, deque[Task]] = {}
        self.running: dict[str, list[Running]] = {}
        self.slots: dict[str, int] = {}
        #: Machines by how much each has: a heap with what is outdated left in it.
        self.heap: list[tuple[float, float, str]] = []

    def come(self, name: str) -> None:
        """A machine is there."""
        self.here.append(name)
        self.queues[name], self.running[name] = deque(), []
        self.slots[name] = self.world.machines[name].slots
        self._weigh(name)

    def leave(self, name: str) -> None:
        """A machine is gone, and soon missed: until then it is sent more."""
        self.world.at(self.world.now + MISSED_S, "missed", name)

    def missed(self, name: str) -> None:
        """A machine that left is missed: what it had goes to others."""
        self.here.remove(name)
        lost = [one.task for one in self.running.pop(name)] + list(self.queues.pop(name))
        self.world.again += len(lost)
        for task in lost:
            self.ask(task)

    def ask(self, task: Task) -> None:
        """A request comes."""
        name = self._chosen()
        self.queues[name].append(task)
        self._work(name)
        self._weigh(name)

    def done(self, one: Running) -> None:
        """A machine has the whole answer, if it is still there."""
        if one.name in self.world.machines and one in self.running.get(one.name, ()):
            self.running[one.name].remove(one)
            self.world.answered(one.task, one.begun)
            self._work(one.name)
            self._weigh(one.name)

    def tick(self) -> None:
        """Time passes."""

    def begin(self, one: object) -> None:
        """A machine begins by itself."""

    def _chosen(self) -> str:
        if self.way == "random":
            return self.chance.choice(self.here)
        if self.way == "round-robin":
            self.next = (self.next + 1) % len(self.here)
            return self.here[self.next]
        while True:
            load, tie, name = heapq.heappop(self.heap)
            if name in self.queues and load == self._load(name):
                heapq.heappush(self.heap, (load, tie, name))
                return name

    def _load(self, name: str) -> float:
        return (len(self.queues[name]) + len(self.running[name])) / self.slots[name]

    def _weigh(self, name: str) -> None:
        if self.way == "least-busy":
            heapq.heappush(self.heap, (self._load(name), self.chance.random(), name))

    def _work(self, name: str) -> None:
        running, queue = self.running[name], self.queues[name]
        machine = self.world.machines.get(name)
        while machine is not None and queue and len(running) < machine.slots:
            task = queue.popleft()
            if self.world.now > task.created_at + DEADLINE_S:
                # Who asked has gone.
                self.world.gave_up(task)
                continue
            one = Running(task, name, self.world.now)
            self.world.at(self.world.now + self.world.takes(task, name, len(running)), "done", one)
            running.append(one)


def simulate(way: Way, workers: int, seconds: float) -> dict[str, Any]:
    """Return what became of all requests when they were handed out this way."""
    world = World(workers, seconds)
    pool = Pull(world) if way == "rma" else Push(world, way)
    world.at(0.001, "ask", None)
    world.at(TICK_S, "tick", None)
    happens: dict[str, Callable[[Any], None]] = {
        "ask": lambda _: pool.ask(world.request()),
        "come": lambda _: pool.come(world.come()),
        "leave": lambda name: _leave(world, pool, name),
        "missed": pool.missed,
        "begin": pool.begin,
        "done": pool.done,
        "tick": lambda _: _tick(world, pool),
    }
    said = 0.0
    while world.events and (world.now < seconds or world.work):
        world.now, _, kind, what = heapq.heappop(world.events)
        happens[kind](what)
        if min(world.now, seconds) >= said + seconds / PROGRESSES:
            said = world.now
            print(f"{way}: {said:.0f} of {seconds:.0f} simulated seconds", file=sys.stderr, flush=True)
    return _result(world)


def _leave(world: World, pool: Pull | Push, name: str) -> None:
    del world.machines[name]
    world.left += 1
    pool.leave(name)
    world.at(world.now, "come", None)


def _tick(world: World, pool: Pull | Push) -> None:
    pool.tick()
    world.at(world.now + TICK_S, "tick", None)


def _result(world: World) -> dict[str, Any]:
    ended = [one for one in world.ended if one.took <= DEADLINE_S]
    return {
        "asked": world.asked,
        "answered": len(ended),
        "machines_left": world.left,
        "began_again": world.again,
        "goodput_of_asked": round(sum(one.tokens for one in ended) / _all_tokens(world), 4),
        "waited_s": _spread([one.waited for one in ended]),
        "took_s": _spread([one.took for one in ended]),
        "waited_p95_s_by_key": {
            key: _spread([one.waited for one in ended if one.key == key])["p95"] for key in KEYS
        },
    }  # fmt: skip


def _all_tokens(world: World) -> float:
    return sum(one.tokens for one in world.ended) + world.lost_tokens or 1.0


def _spread(seconds: list[float]) -> dict[str, float]:
    """Return mean, median and 95th percentile; zeros of nothing."""
    found = sorted(seconds) or [0.0]
    at = [found[min(len(found) - 1, int(share * len(found)))] for share in (0.5, 0.95)]
    return {"mean": round(sum(found) / len(found), 3), "p50": round(at[0], 3), "p95": round(at[1], 3)}


def main() -> int:
    asked = _common.options(__doc__)
    seconds = asked.seconds * SIMULATED_PER_S
    ways = {way: simulate(way, asked.workers, seconds) for way in WAYS}
    ours, best = ways["rma"]["took_s"]["p95"], min(ways[way]["took_s"]["p95"] for way in WAYS[1:])
    result = {"workers": asked.workers, "simulated_s": seconds, "ways": ways}
    target = Target("p95 of a request, of the best other way's", round(ours / (best or 1.0), 3), 1.0)
    return _common.show(result, _lines(result), [target], asked)


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"{result['workers']} machines, {result['simulated_s']:g} simulated seconds, load {LOAD:g} with bursts"
    heads = f"{'answered':>9} {'goodput':>8} {'left':>5} {'again':>6} "
    heads += f"{'waited p50':>11} {'p95':>8} {'took p50':>9} {'p95':>8}"
    yield f"    {'':14}{heads}   waited p95 by key"
    for way, one in result["ways"].items():
        keys = ", ".join(f"{key} {value:.1f}" for key, value in one["waited_p95_s_by_key"].items())
        waited, took = one["waited_s"], one["took_s"]
        numbers = f"{waited['p50']:11.2f} {waited['p95']:8.2f} {took['p50']:9.2f} {took['p95']:8.2f}"
        gone = f"{one['machines_left']:5} {one['began_again']:6}"
        yield f"    {way:14}{one['answered']:9} {one['goodput_of_asked']:8.3f} {gone} {numbers}   {keys}"


if __name__ == "__main__":
    raise SystemExit(main())
