"""The phases of bench/gateway.py: what is asked of each gateway, in turns, and what one run of a phase makes of it."""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import _common, _stub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from bench._common import Server
    from bench._stub import Aim, Load

#: The model server without a gateway.
ALONE = "alone"
#: Seconds of a round, at most, and of load before it that does not count.
ROUND_S, WARM_S = 2.0, 0.3
#: Tokens of a whole answer; tokens a second of a stream.
TOKENS, PACE = 16, 50.0
#: Streams must all have begun this much later than they should, and end by themselves this much after they are left:
#: not every gateway lets go of them.
OPENING_S, LEFT_S = 4.0, 4.0
#: Connections that ask without a pause; requests a second of a load that is low for all, and its connections.
AT_ONCE = 32
LOW_RATE, LOW_CONNECTIONS = 20.0, 16
#: Streams of which the lateness is compared.
STREAMS = 60
#: Open streams whose memory is measured, each slow enough to cost nothing.
OPEN, OPEN_PACE, OPEN_OPENING_S = (1, 100, 1000), 1.0, 40.0
#: A number of streams is sustained when nearly all of their tokens came, and nearly none a tenth of a second late:
#: more, and tokens of a stream come together, which is cheaper.
SUSTAINED, SUSTAINED_LATE_US = 0.97, 100_000
#: How much of its core a gateway is given to do at first, and brought to; from one number of streams to the next, at
#: least and at most.
START, FULL, LEAST_STEP, MOST_STEP = 0.6, 0.97, 1.08, 1.6
#: A number of streams that are too many while the gateway used less than BUSY of its core, or that are not but had it
#: wait for DISTURBED of the time, is tried again: others were in the way.
BUSY, DISTURBED, TRIES = 0.9, 0.2, 3


class Phase(NamedTuple):
    """What is asked in a phase: of how many at once, and requests a second (0: as they come) or a stream's pace."""

    connections: int
    rate: float = 0.0
    stream: bool = False
    opening_s: float = OPENING_S


PHASES = {
    "latency": Phase(1),
    "low": Phase(LOW_CONNECTIONS, LOW_RATE),
    "requests": Phase(AT_ONCE),
    "streams": Phase(STREAMS, PACE, stream=True),
}
WHOLE = _stub.request(tokens=TOKENS)


class Bench(NamedTuple):
    """The load, the model server, the gateways by name, and the streams that a pool takes at most."""

    stub: Path
    backend: Server
    gateways: Mapping[str, Aim]
    most: int

    def run(self, name: str, phase: Phase, seconds: float, marked: Callable[[], None] | None = None) -> Load:
        """Run one phase once against one gateway; ``marked`` is called when what counts begins, and when it ends."""
        load = partial(_stub.load, self.stub, aim=self.gateways[name], seconds=seconds, marked=marked)
        if not phase.stream:
            return load("requests", body=WHOLE, count=phase.connections, warm_s=WARM_S, rate=phase.rate)
        warm_s = min(seconds, ROUND_S)
        tokens = math.ceil(phase.rate * (warm_s + phase.opening_s + seconds + LEFT_S))
        body = _stub.request(tokens=tokens, rate=phase.rate, stream=True)
        found = load("streams", body=body, count=phase.connections, warm_s=warm_s, opening_s=phase.opening_s)
        if not _stub.quiet(self.backend):
            sys.exit(f"{name} still asks the model server for what its clients have left long ago")
        return found


def rounds(bench: Bench, phase: Phase, seconds: float) -> dict[str, list[Load]]:
    """Let all take turns until each has had its seconds."""
    count = max(1, round(seconds / ROUND_S))
    done: dict[str, list[Load]] = {name: [] for name in bench.gateways}
    for name in [*bench.gateways] * count:
        done[name].append(bench.run(name, phase, seconds / count))
    return done


# -- how much ------------------------------------------------------------------------------------------------------


class Capacity(NamedTuple):
    """The most paced streams that were sustained, and what that measured."""

    streams: int
    load: Load | None


def capacity(measure: Callable[[int], Load], cost_us: float, most: int, *, within_s: float) -> Capacity:
    """Look for the most streams that are sustained, from where a token's cost lets expect no trouble.

    A search that takes longer than ``within_s`` ends with what was found.
    """
    ends = time.monotonic() + within_s
    count = min(most, max(1, int(START * 1e6 / PACE / cost_us))) if cost_us > 0 else 1
    best, too_many = Capacity(0, None), most + 1
    while time.monotonic() < ends:
        load = sustained(measure, count)
        if load is not None:
            best = Capacity(count, load)
            step = FULL / load.busy() if load.busy() else MOST_STEP
            count = math.ceil(count * min(MOST_STEP, max(LEAST_STEP, step)))
        else:
            too_many = count
        if count >= too_many:
            count = _between(best.streams, too_many)
        if count <= best.streams:
            break
    return best


def _between(good: int, bad: int) -> int:
    """Return a number of streams between one that was sustained and one that was not, or none when they are close."""
    return good if bad <= max(good + 1, good * LEAST_STEP) else max(good + 1, math.isqrt(max(1, good) * bad))


def sustained(measure: Callable[[int], Load], count: int) -> Load | None:
    """Return what so many streams measured, or nothing when they were too many."""
    best: Load | None = None
    for _ in range(TRIES):
        load = measure(count)
        late = load.p99_us >= SUSTAINED_LATE_US or load.per_s < SUSTAINED * count * PACE
        if not late and not load.failed and load.begun == count:
            best = load
        if load.busy() > BUSY or (best is load and load.waited() < DISTURBED):
            break
    return best


class Held(NamedTuple):
    """The memory that a gateway holds with so many streams open, of those that were asked for."""

    asked: int
    open: int
    mib: float


def memory(bench: Bench, name: str) -> list[Held]:
    """Return what a gateway holds with more and more streams open."""
    aim, found = bench.gateways[name], list[Held]()
    for count in sorted({min(count, bench.most) for count in OPEN}):
        seen: list[float] = []
        phase = Phase(count, OPEN_PACE, stream=True, opening_s=OPEN_OPENING_S)
        load = bench.run(name, phase, 1.0, partial(_note, aim, seen))
        found.append(Held(count, load.begun, max(seen)))
    return found


def _note(aim: Aim, seen: list[float]) -> None:
    seen.append(aim.resident_mib())


# -- what it comes to ----------------------------------------------------------------------------------------------


def row(done: Mapping[str, Mapping[str, Sequence[Load]]], name: str) -> dict[str, Any]:
    """Return what the phases say of one gateway, and what it adds to the model server alone."""
    found: dict[str, Any] = {}
    for phase, sides in done.items():
        loads, floor = calm(sides[name]), calm(sides[ALONE])
        found[phase] = {
            "per_s": _common.median((load.per_s for load in loads), 1),
            **{f"{point}_ms": _ms(loads, point) for point in ("p50", "p99")},
            **{f"added_{point}_ms": round(_ms(loads, point) - _ms(floor, point), 3) for point in ("p50", "p99")},
            "cpu_us": [
                _common.median((load.cpu_us(index) for load in loads), 1) for index in range(len(loads[0].used))
            ],
            "busy": _common.median((load.busy() for load in loads), 2),
            "waited": _common.median((load.waited() for load in loads), 2),
            "failed": sum(load.failed for load in sides[name]),
            "failures": [text for load in sides[name] for text in load.failures][:3],
        }
    return found


def calm(loads: Sequence[Load]) -> Sequence[Load]:
    """Return the half of the rounds, at least one, in which what was measured waited least for its core."""
    return sorted(loads, key=lambda load: load.waited())[: math.ceil(len(loads) / 2)]


def _ms(loads: Iterable[Load], point: str) -> float:
    return _common.median((getattr(load, f"{point}_us") / 1000 for load in loads), 3)
