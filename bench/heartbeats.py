"""Heartbeats as fast as one core takes them, beside the floor: the same server with an application that does nothing.

The floor is raw ASGI on the same Hypercorn and event loop; it is sent the very same requests (headers, token, body),
reads them and answers a fixed JSON of the same length. Both take turns in short rounds. What counts is beats per second
of the server's CPU, so that others on this machine do not count; the wall's rate stands beside it. Of the rounds the
cheapest is taken for each, floor included: noise only ever adds.
"""

from __future__ import annotations

import contextlib
import tempfile
from functools import partial
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

#: Machines that beat at once, of each kind.
AT_ONCE = 16
#: Rounds of (floor, HTTP, channel): many and short, so that each kind meets some in which nobody else uses the caches.
ROUNDS = 25
#: The bar: a heartbeat by HTTP, as a part of the floor's rate.
OF_FLOOR = 0.8


class Act(NamedTuple):
    """What is repeated, at which server."""

    server: Server
    calls: Sequence[Callable[[], Awaitable[object]]]


def main() -> int:
    asked = _common.options(__doc__)
    served, loading = _common.split_cores()
    with tempfile.TemporaryDirectory(prefix="rma-bench-") as folder, servers(Path(folder), served) as (server, floor):
        _common.pin(loading)
        result: dict[str, Any] = {}

        async def measure() -> int:
            result.update(await _measure(asked, server, floor))
            return 0

        run(measure())
    return _common.show(result, _lines(result), _targets(result), asked)


@contextlib.contextmanager
def servers(folder: Path, cores: set[int]) -> Iterator[tuple[Server, Server]]:
    """Run a coordinator and the floor on the same cores."""
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
    kinds = _load.machines()
    machines = [
        _load.Machine(server.url, kinds[index % len(kinds)], by_channel=index % 2 == 1)
        for index in range(2 * min(AT_ONCE, max(1, asked.workers)))
    ]
    token = await _load.join_token(server, len(machines))
    for machine in machines:
        await machine.register(token)
        await machine.connect()
        await machine.beat()
    by_http = [machine for machine in machines if not machine.by_channel]
    floors = [Connection(floor.url, machine.token) for machine in by_http]
    acts = {
        "floor": Act(floor, [partial(_same, machine, to) for machine, to in zip(by_http, floors, strict=True)]),
        "http": Act(server, [machine.beat for machine in by_http]),
        "channel": Act(server, [machine.beat for machine in machines if machine.by_channel]),
    }
    result = await _rounds(acts, max(0.05, asked.seconds / ROUNDS / len(acts)))
    for connection in floors:
        connection.close()
    for machine in machines:
        await machine.close()
    return {"at_once": len(by_http), "rounds": ROUNDS, **result}


async def _same(machine: _load.Machine, floor: Connection) -> None:
    """Send a machine's heartbeat to the floor."""
    await floor.call("POST", "/api/worker/heartbeat", machine.request())


async def _rounds(acts: dict[str, Act], seconds: float) -> dict[str, Any]:
    costs: dict[str, list[float]] = {name: [] for name in acts}
    rates: dict[str, list[float]] = {name: [] for name in acts}
    failures: list[str] = []
    for name in [*acts] * ROUNDS:
        server, calls = acts[name]
        before = _common.cpu_s(server.process)
        done, took, failed = await _load.saturate(calls, seconds)
        costs[name].append((_common.cpu_s(server.process) - before) / max(1, done) * 1e6)
        rates[name].append(done / took)
        failures += failed
    rows = {
        name: {
            "cpu_us_least": round(min(found), 1),
            "cpu_us_median": _common.median(found, 1),
            "per_s_most": round(max(rates[name])),
        }
        for name, found in costs.items()
    }
    return {
        **rows,
        "of_floor": {name: _of(rows["floor"]["cpu_us_least"], row["cpu_us_least"]) for name, row in rows.items()},
        "of_floor_median": {
            name: _common.median((_of(base, cost) for base, cost in zip(costs["floor"], found, strict=True)), 2)
            for name, found in costs.items()
        },
        "of_floor_by_the_wall": {
            name: round(row["per_s_most"] / max(1, rows["floor"]["per_s_most"]), 2) for name, row in rows.items()
        },
        "failures": len(failures),
        "first_failures": failures[:3],
    }


def _of(floor: float, cost: float) -> float:
    return round(floor / cost, 2) if cost else 0.0


def _targets(result: dict[str, Any]) -> list[Target]:
    return [
        Target(
            "a heartbeat by HTTP, of the floor's rate on one core", result["of_floor"]["http"], OF_FLOOR, least=True
        ),
        Target("a heartbeat by channel, of the same", result["of_floor"]["channel"], OF_FLOOR, least=True),
        Target("failed calls", result["failures"], 1),
    ]


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"as fast as they go, {result['at_once']} at once, {result['rounds']} rounds in turns:"
    for name in ("floor", "http", "channel"):
        row = result[name]
        yield (
            f"    {name:10}{row['cpu_us_least']:7.0f} us of CPU at least, {row['cpu_us_median']:.0f} in the median; "
            f"{row['per_s_most']} /s at most; {result['of_floor'][name]:.2f} of the floor "
            f"(median of the rounds {result['of_floor_median'][name]:.2f}, by the wall "
            f"{result['of_floor_by_the_wall'][name]:.2f})"
        )
    yield from (f"    {failure}" for failure in result["first_failures"])


if __name__ == "__main__":
    raise SystemExit(main())
