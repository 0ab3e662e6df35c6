"""The phases of bench/gateway.py: what is asked of each gateway, in turns, and what one run of a phase makes of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import _common, _stub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from bench._stub import Aim, Load

#: The model server without a gateway.
ALONE = "alone"
#: Seconds of a round, at most, and of load before it that does not count.
ROUND_S, WARM_S = 2.0, 0.3
#: Tokens of a whole answer, and of a stream (more than anyone waits for); tokens a second of one stream.
TOKENS, ENDLESS, PACE = 16, 1_000_000, 50.0
#: Connections that ask without a pause; requests a second of a load that is low for all, and its connections.
AT_ONCE = 32
LOW_RATE, LOW_CONNECTIONS = 20.0, 16
#: Streams of which the lateness is compared.
STREAMS = 60
#: Open streams whose memory is measured, each slow enough to cost nothing.
OPEN, OPEN_PACE = (1, 100, 1000), 1.0
#: A number of streams is sustained when nearly all of their tokens came, and nearly none a second late.
SUSTAINED, SUSTAINED_LATE_US = 0.97, 1_000_000
#: How much of its core a gateway is brought to use; from one number of streams to the next, at least and at most.
FULL, LEAST_STEP, MOST_STEP, STEPS = 0.97, 1.08, 1.6, 12
#: Numbers that fail while less of the core was used are tried again: others used it.
BUSY, TRIES = 0.9, 3


class Phase(NamedTuple):
    """What is asked in a phase: ``kind`` of load, the request, connections, requests a second (0: as they come)."""

    kind: str
    body: bytes
    connections: int
    rate: float = 0.0


WHOLE = _stub.request(tokens=TOKENS)
PACED = _stub.request(tokens=ENDLESS, rate=PACE, stream=True)
SLOW = _stub.request(tokens=ENDLESS, rate=OPEN_PACE, stream=True)
PHASES = {
    "latency": Phase("requests", WHOLE, 1),
    "low": Phase("requests", WHOLE, LOW_CONNECTIONS, LOW_RATE),
    "requests": Phase("requests", WHOLE, AT_ONCE),
    "streams": Phase("streams", PACED, STREAMS),
}


class Bench(NamedTuple):
    """The load, what it is aimed at by name, and the streams that a pool takes at most."""

    stub: Path
    aims: Mapping[str, Aim]
    most: int

    def run(self, name: str, phase: Phase, seconds: float, marked: Callable[[], None] | None = None) -> Load:
        """Run one phase once against one gateway; ``marked`` is called when what counts begins, and when it ends."""
        return _stub.load(
            self.stub,
            phase.kind,
            self.aims[name],
            phase.body,
            count=phase.connections,
            seconds=seconds,
            warm_s=min(seconds, ROUND_S) if phase.kind == "streams" else WARM_S,
            rate=phase.rate,
            marked=marked,
        )


def rounds(bench: Bench, phase: Phase, seconds: float) -> dict[str, list[Load]]:
    """Let all take turns until each has had its seconds."""
    count = max(1, round(seconds / ROUND_S))
    done: dict[str, list[Load]] = {name: [] for name in bench.aims}
    for name in [*bench.aims] * count:
        done[name].append(bench.run(name, phase, seconds / count))
    return done


# -- how much ------------------------------------------------------------------------------------------------------


class Capacity(NamedTuple):
    """The most paced streams that were sustained, and what that measured."""

    streams: int
    load: Load | None


def capacity(measure: Callable[[int], Load], cost_us: float, most: int) -> Capacity:
    """Open more and more streams, beginning where a token's cost lets expect no trouble, until they are too many."""
    count = min(most, max(1, int(0.6e6 / PACE / cost_us))) if cost_us > 0 else 1
    best = Capacity(0, None)
    for _ in range(STEPS):
        load = sustained(measure, count)
        if load is not None:
            best = Capacity(count, load)
            if count == most:
                break
            step = FULL / load.busy() if load.busy() else MOST_STEP
            count = min(most, math.ceil(count * min(MOST_STEP, max(LEAST_STEP, step))))
        elif best.load is not None or count == 1:
            break
        else:
            count //= 2
    return best


def sustained(measure: Callable[[int], Load], count: int) -> Load | None:
    """Return what so many streams measured, or nothing when they were too many."""
    for _ in range(TRIES):
        load = measure(count)
        late = load.p99_us >= SUSTAINED_LATE_US or load.per_s < SUSTAINED * count * PACE
        if not late and not load.failed:
            return load
        if load.busy() > BUSY:
            return None
    return None


def memory(bench: Bench, name: str) -> dict[str, float]:
    """Return the MiB that a gateway holds at rest, and with streams open."""
    aim = bench.aims[name]
    found = {"rest": aim.resident_mib()}
    for count in sorted({min(count, bench.most) for count in OPEN}):
        seen: list[float] = []
        bench.run(name, Phase("streams", SLOW, count), 1.0, lambda seen=seen: seen.append(aim.resident_mib()))  # type: ignore[misc]
        found[str(count)] = max(seen)
    return found


# -- what it comes to ----------------------------------------------------------------------------------------------


def row(done: Mapping[str, Mapping[str, Sequence[Load]]], name: str) -> dict[str, Any]:
    """Return what the phases say of one gateway, and what it adds to the model server alone."""
    found: dict[str, Any] = {}
    for phase, sides in done.items():
        loads, floor = sides[name], sides[ALONE]
        found[phase] = {
            "per_s": round(max(load.per_s for load in loads), 1),
            **{f"{point}_ms": _ms(loads, point) for point in ("p50", "p99")},
            **{f"added_{point}_ms": round(_ms(loads, point) - _ms(floor, point), 3) for point in ("p50", "p99")},
            # Others on the machine only ever add to it.
            "cpu_us": [round(min(load.cpu_us(index) for load in loads), 1) for index in range(len(loads[0].used))],
            "busy": _common.median((load.busy() for load in loads), 2),
            "waited": _common.median((load.waited() for load in loads), 2),
            "failed": sum(load.failed for load in loads),
            "failures": [text for load in loads for text in load.failures][:3],
        }
    return found


def _ms(loads: Iterable[Load], point: str) -> float:
    return _common.median((getattr(load, f"{point}_us") / 1000 for load in loads), 3)
