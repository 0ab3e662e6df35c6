"""Durable task cycles a second in the store, beside whole libraries that keep tasks: Celery and procrastinate.

A cycle is three commits of one small record each: the task comes in, an attempt claims it, it ends. Each commit is on
disk before it returns; 64 cycles are under way at once. Celery runs on a Redis that syncs every write, procrastinate on
PostgreSQL, each with as many waiting, in the same folder's file system and in the same run. They do more than a store
does, so the ratio says what a pool would pay for them, not that they are slow.

``--seconds S`` makes S thousand cycles (default 20,000), the peers a tenth. ``--workers`` has no meaning here.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bench import _common, _peers
from bench._common import Target
from rma_coordinator.server import run
from rma_coordinator.store import Put, SqliteStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Cycles under way at once.
WAITING = 64
#: Runs of the store, of which the median counts; the peers, which take far longer, run once.
ROUNDS = 3
PEERS: dict[str, Callable[[Path, int, int], dict[str, Any]]] = {
    "celery": _peers.celery,
    "procrastinate": _peers.procrastinate,
}


class BenchTask(msgspec.Struct, frozen=True, kw_only=True):
    """A record of the size of a small task."""

    task_id: str
    state: str
    payload: str


def main() -> int:
    asked = _common.options(__doc__)
    cycles = max(WAITING, round(asked.seconds * 1000))
    with tempfile.TemporaryDirectory(prefix="rma-bench-") as name:
        folder = Path(name)
        # PostgreSQL runs as a user of its own.
        folder.chmod(0o755)
        result: dict[str, Any] = {"waiting": WAITING, "fsync_us": _fsync_us(folder), "store": _store(folder, cycles)}
        for peer, measure in PEERS.items():
            result[peer] = _peer(measure, folder, max(WAITING, cycles // 10))
    return _common.show(result, _lines(result), _targets(result), asked)


def _fsync_us(folder: Path) -> float:
    """Return what putting a page on this disk costs."""
    times = []
    with (folder / "fsync").open("wb", buffering=0) as file:
        for _ in range(100):
            file.write(b"x" * 4096)
            began = time.perf_counter()
            os.fdatasync(file.fileno()) if hasattr(os, "fdatasync") else os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return _common.median((one * 1e6 for one in times), 0)


def _store(folder: Path, cycles: int) -> dict[str, Any]:
    rates: list[float] = []
    latencies: list[float] = []

    async def rounds() -> int:
        for number in range(ROUNDS):
            store = SqliteStore(folder / f"store{number}.db")
            await store.open()
            took = await _cycles(store, cycles, latencies)
            rates.append(cycles / took)
            kept = await store.load(BenchTask)
            if len(kept) != cycles or any(one.state != "succeeded" for one in kept):
                raise RuntimeError("the store has lost something")
            await store.close()
        return 0

    run(rounds())
    return {
        "cycles": cycles,
        "per_s": _common.median(rates, 0),
        "per_s_each": [round(rate) for rate in rates],
        "latency": _common.percentiles(latencies),
    }


async def _cycles(store: SqliteStore, cycles: int, latencies: list[float]) -> float:
    numbers = iter(range(cycles))

    async def repeat() -> None:
        for number in numbers:
            key, payload = f"task-{number:020}", f"{number:0200}"
            began = time.perf_counter()
            for state in ("queued", "running", "succeeded"):
                await store.commit([Put(key, BenchTask(task_id=key, state=state, payload=payload))])
            latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(WAITING):
            group.create_task(repeat())
    return time.perf_counter() - began


def _peer(measure: Callable[[Path, int, int], dict[str, Any]], folder: Path, cycles: int) -> dict[str, Any]:
    try:
        found = measure(folder, cycles, WAITING)
    except _peers.NoPeerError as error:
        return {"left_out": str(error)}
    return {**found, "per_s": round(found["cycles"] / found["seconds"])}


def _targets(result: dict[str, Any]) -> list[Target]:
    """The store must not be slower than any of the libraries that could stand in its place."""
    measured = [peer for peer in PEERS if "per_s" in result[peer]]
    ratios = {peer: round(result["store"]["per_s"] / result[peer]["per_s"], 1) for peer in measured}
    return [Target(f"the store's cycles, of {peer}'s", ratio, 1, least=True) for peer, ratio in ratios.items()]


def _lines(result: dict[str, Any]) -> Iterator[str]:
    store = result["store"]
    yield (
        f"durable cycles (insert, claim, complete), {result['waiting']} at once; fdatasync here "
        f"{result['fsync_us']:.0f} us"
    )
    yield (
        f"    store          {store['per_s']:8.0f} /s  {store['cycles']} cycles, {store['per_s_each']}; a cycle takes "
        f"{store['latency']['p50_ms']} ms (p50), {store['latency']['p99_ms']} (p99)"
    )
    for peer in PEERS:
        row = result[peer]
        if "left_out" in row:
            yield f"    {peer:14} not measured: {row['left_out']}"
        else:
            yield f"    {peer:14} {row['per_s']:8.0f} /s  {row['cycles']} cycles in {row['seconds']} s"


if __name__ == "__main__":
    raise SystemExit(main())
