"""The coordinator with 1,000 workers, on one core: registration, heartbeats, admin queries, memory, and its limit.

A real coordinator process with SQLite has one core for itself, the load another; both stay on loopback. Machines are
the recorded ones of the tests, each with its own key and proof; half of them beat over channels, half by HTTP. All
latencies count from the moment a call was meant to be made, so a stall of the server is not hidden by a client that
waits with it. Registration is nonce plus proof plus answer, on a new connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tempfile
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from bench import _common, _load
from bench._common import Target
from bench._wire import Connection
from rma_coordinator.server import run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from bench._common import Options, Server

#: The interval that the load is made for, whatever the fleet's size.
INTERVAL_S = 30.0
#: Machines that register, or open their channel, each second.
REGISTER_PER_S = 100.0
CONNECT_PER_S = 100.0
#: Machines that join while the others work, as a part of the fleet, and calls of each admin query a second.
JOINERS = 0.05
ADMIN_PER_S = 2.0
#: Connections at once, and rounds of (floor, HTTP, channel), when the limit is looked for.
AT_ONCE = 32
ROUNDS = 3
#: Most uses of a join token.
TOKEN_USES = 1000

#: The bars of the design, in milliseconds.
REGISTER_MS, HEARTBEAT_P99_MS, ADMIN_P95_MS = 1000.0, 50.0, 200.0


class Scene(NamedTuple):
    """Everything the phases share."""

    asked: Options
    server: Server
    floor: Server
    machines: list[_load.Machine]
    joiners: list[_load.Machine]


def main() -> int:
    asked = _common.options(__doc__)
    served, loading = _common.split_cores()
    with tempfile.TemporaryDirectory(prefix="rma-bench-") as folder, _servers(Path(folder), served) as servers:
        _common.pin(loading)
        result: dict[str, Any] = {}

        async def measure() -> int:
            result.update(await _measure(asked, *servers))
            return 0

        run(measure())
    return _common.show(result, _lines(result), _targets(result), asked)


@contextlib.contextmanager
def _servers(folder: Path, cores: set[int]) -> Iterator[tuple[Server, Server]]:
    catalog = _load.write_catalog(folder / "catalog")
    port = _common.free_port()
    with (
        _common.coordinator(folder / "home", cores=cores, arguments=("--catalog", str(catalog))) as server,
        _common.started(["-m", "bench._floor", str(port)], home=folder / "floor", cores=cores) as floor,
    ):
        url = f"http://127.0.0.1:{port}"
        _common.wait_until_answered(url, floor, folder / "floor")
        yield server, _common.Server(url, "", psutil.Process(floor.pid))


async def _measure(asked: Options, server: Server, floor: Server) -> dict[str, Any]:
    kinds = cycle(_load.machines())
    joining = max(1, round(asked.workers * JOINERS))
    made = [
        _load.Machine(server.url, report, by_channel=index % 2 == 0)
        for index, report in enumerate(islice(kinds, asked.workers + joining))
    ]
    scene = Scene(asked, server, floor, made[: asked.workers], made[asked.workers :])
    gc.freeze()
    result: dict[str, Any] = {
        "workers": asked.workers,
        "seconds": asked.seconds,
        "memory_at_rest": _common.memory(server.process),
    }
    result["phases"] = {
        "register": await _phase(scene, await _registrations(scene, scene.machines, REGISTER_PER_S)),
        "connect": await _phase(scene, _first_beats(scene)),
        "steady": await _phase(scene, [*_beats(scene, asked.seconds), *_queries(scene, asked.seconds)]),
        "joining": await _phase(scene, await _joining(scene)),
    }
    result["memory_per_100_workers"] = _per_100(result)
    result["limit"] = await _limit(scene)
    for machine in made:
        await machine.close()
    return result


async def _phase(scene: Scene, events: list[_load.Event]) -> dict[str, Any]:
    """Run a schedule; return latencies, failures, memory after it, and the share of each side's core."""
    process, own = scene.server.process, psutil.Process()
    measured, seconds = _load.Measured(), max(event.at_s for event in events)
    before, own_before, waited = _common.cpu_s(process), _common.cpu_s(own), _common.waited_s(process)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await _load.run_schedule(events, measured)
    took = loop.time() - began
    return {
        "seconds": round(seconds, 1),
        "latency": measured.table(),
        "failures": len(measured.failures),
        "first_failures": measured.failures[:3],
        "load_lag": _common.percentiles(measured.lag),
        "cpu_share": round((_common.cpu_s(process) - before) / took, 3),
        "waited_share": round((_common.waited_s(process) - waited) / took, 3),
        "load_cpu_share": round((_common.cpu_s(own) - own_before) / took, 3),
        "memory": _common.memory(process),
    }


async def _registrations(scene: Scene, machines: list[_load.Machine], rate: float) -> list[_load.Event]:
    batches = range(0, len(machines), TOKEN_USES)
    tokens = [await _join_token(scene.server, min(TOKEN_USES, len(machines) - start)) for start in batches]

    async def register(index: int) -> None:
        await machines[index].register(tokens[index // TOKEN_USES])

    return _load.every(rate, len(machines) / rate, "register", register)


async def _join_token(server: Server, uses: int) -> str:
    admin = Connection(server.url, server.key)
    answer = await admin.json("POST", "/api/admin/tokens", {"label": "bench", "uses": uses})
    admin.close()
    return str(answer["token"])


def _first_beats(scene: Scene) -> list[_load.Event]:
    """Open channels and send everyone's first heartbeat, after which placement has settled."""

    async def connect(index: int) -> None:
        await scene.machines[index].connect()
        await scene.machines[index].beat()

    return _load.every(CONNECT_PER_S, len(scene.machines) / CONNECT_PER_S, "connect", connect)


def _beats(scene: Scene, seconds: float) -> list[_load.Event]:
    """Return heartbeats at the rate of the whole fleet at INTERVAL_S, machine after machine."""

    async def beat(machines: list[_load.Machine], index: int) -> None:
        await machines[index % len(machines)].beat()

    events = []
    for name, by_channel in (("heartbeat_channel", True), ("heartbeat_http", False)):
        machines = [machine for machine in scene.machines if machine.by_channel is by_channel]
        if machines:
            events += _load.every(len(machines) / INTERVAL_S, seconds, name, partial(beat, machines))
    return events


def _queries(scene: Scene, seconds: float) -> list[_load.Event]:
    paths = {
        "admin_workers": "/api/admin/workers?limit=100",
        "admin_stats": "/api/admin/stats",
        "admin_tasks": "/api/admin/tasks",
        "admin_worker": f"/api/admin/workers/{scene.machines[0].worker_id}",
    }

    async def query(path: str, _: int) -> None:
        # Each on a connection of its own: answers must not wait for each other at the client.
        admin = Connection(scene.server.url, scene.server.key)
        await admin.call("GET", path)
        admin.close()

    return [
        event for name, path in paths.items() for event in _load.every(ADMIN_PER_S, seconds, name, partial(query, path))
    ]


async def _joining(scene: Scene) -> list[_load.Event]:
    """Everything at once: machines join, which changes what the pool lacks, while the fleet beats and admins look."""
    seconds = scene.asked.seconds / 2
    joining = await _registrations(scene, scene.joiners, len(scene.joiners) / seconds)
    return [*joining, *_beats(scene, seconds), *_queries(scene, seconds)]


def _per_100(result: dict[str, Any]) -> dict[str, float]:
    """Return the MiB (RSS) that 100 workers cost: registered only, and with half of them on channels."""
    rest = result["memory_at_rest"]["rss_mib"]
    share = 100 / result["workers"]
    phases = result["phases"]
    return {
        "registered_mib": round((phases["register"]["memory"]["rss_mib"] - rest) * share, 3),
        "half_on_channels_mib": round((phases["connect"]["memory"]["rss_mib"] - rest) * share, 3),
    }


async def _limit(scene: Scene) -> dict[str, Any]:
    """Heartbeats as fast as they go, in turns with the floor, so that noise of the machine hits all alike."""
    seconds = max(0.1, scene.asked.seconds / 20)
    by_http = [machine.beat for machine in scene.machines if not machine.by_channel][:AT_ONCE]
    by_channel = [machine.beat for machine in scene.machines if machine.by_channel][:AT_ONCE]
    body = b'{"worker_id":"worker-00000000","current_load":0.5,"generation":1}'.ljust(600)
    floors = [Connection(scene.floor.url) for _ in range(AT_ONCE)]
    acts: dict[str, tuple[Server, Sequence[Callable[[], Awaitable[object]]]]] = {
        "floor": (scene.floor, [partial(floor.call, "POST", "/api/worker/heartbeat", body) for floor in floors]),
        "http": (scene.server, by_http),
        "channel": (scene.server, by_channel),
    }
    rates: dict[str, list[float]] = {name: [] for name, (_, calls) in acts.items() if calls}
    costs: dict[str, list[float]] = {name: [] for name in rates}
    failures: list[str] = []
    for name in [*rates] * ROUNDS:
        server, calls = acts[name]
        before = _common.cpu_s(server.process)
        done, took, failed = await _load.saturate(calls, seconds)
        rates[name].append(done / took)
        costs[name].append((_common.cpu_s(server.process) - before) / max(1, done) * 1e6)
        failures += failed
    for floor in floors:
        floor.close()
    rows = {
        name: {"per_s": _common.median(found, 0), "cpu_us_each": _common.median(costs[name], 0)}
        for name, found in rates.items()
    }
    ratios = {name: round(row["per_s"] / rows["floor"]["per_s"], 2) for name, row in rows.items() if name != "floor"}
    return {**rows, "of_floor": ratios, "failures": len(failures), "first_failures": failures[:3]}


def _targets(result: dict[str, Any]) -> list[Target]:
    targets = []
    for phase, found in result["phases"].items():
        for name, row in found["latency"].items():
            label = f"{name} ({phase})"
            if name == "register":
                targets.append(Target(f"{label}, max ms", row["max_ms"], REGISTER_MS))
            elif name.startswith("heartbeat"):
                targets.append(Target(f"{label}, p99 ms", row["p99_ms"], HEARTBEAT_P99_MS))
            elif name.startswith("admin"):
                targets.append(Target(f"{label}, p95 ms", row["p95_ms"], ADMIN_P95_MS))
    failed = sum(found["failures"] for found in [*result["phases"].values(), result["limit"]])
    return [*targets, Target("failed calls", failed, 1)]


def _lines(result: dict[str, Any]) -> Iterator[str]:
    rest = result["memory_at_rest"]
    yield f"{result['workers']} workers; at rest {rest['rss_mib']} MiB RSS, {rest['pss_mib']} PSS"
    for phase, found in result["phases"].items():
        yield (
            f"{phase}: {found['seconds']:g} s, {found['cpu_share']:.0%} of the core, waiting for it "
            f"{found['waited_share']:.0%} of the time (load {found['load_cpu_share']:.0%}, late by p99 "
            f"{found['load_lag']['p99_ms']} ms); then {found['memory']['rss_mib']} MiB RSS, "
            f"{found['memory']['pss_mib']} PSS; {found['failures']} failures"
        )
        yield from (f"    {failure}" for failure in found["first_failures"])
        for name, row in found["latency"].items():
            points = "  ".join(f"{point} {row[f'{point}_ms']:8.2f}" for point in ("p50", "p95", "p99", "max"))
            yield f"    {name:20}{row['count']:6}  {points}  ms"
    yield f"per 100 workers: {result['memory_per_100_workers']} MiB RSS"
    yield f"as fast as they go, {AT_ONCE} at once:"
    for name in ("floor", "http", "channel"):
        if row := result["limit"].get(name):
            ratio = result["limit"]["of_floor"].get(name, 1)
            cost = f"{row['cpu_us_each']:6.0f} us of CPU each"
            yield f"    {name:20}{row['per_s']:8.0f} /s  {cost}  {ratio:.2f} of the floor"


if __name__ == "__main__":
    raise SystemExit(main())
