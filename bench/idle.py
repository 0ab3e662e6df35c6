"""2,000 workers with nothing to do, most of them parked: their memory, and how soon a task finds one all the same.

Real machines' reports join a real coordinator, each with a model that its owner shares, and do as they are told: open
the channel, let go of it, heartbeat by HTTP, come back. Once all may keep their channel, once a tenth (`max_channels`).
Each time half of them join first; what a worker costs is what the other half adds to the RSS. With most of them parked,
tasks follow one another, for every service and model in turn; then many come at once for one model. ``--seconds`` is
the length of the first of these, and the longest time between heartbeats is half as much again, 30 s at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from bench import _common, _load
from bench._common import Target
from bench._idle import LLM, Idler, idling, kinds, request
from bench._wire import Connection
from rma_coordinator.server import run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from bench._common import Options, Server

#: Workers, unless told otherwise, and the share of them that may keep a channel where most are parked.
WORKERS, OPEN = 2000, 0.1
#: Models that owners share: each of them many, and one that a single machine has.
MODELS, RARE = 12, "rare"
#: Heartbeats of parked workers are this far apart, as a share of ``--seconds``, and at most.
INTERVAL, MOST_INTERVAL_S = 1.5, 30.0
#: Tasks a second for one service or model after the other.
PER_S = 20.0
#: A burst: how many tasks come for each worker that has the model, and how long one takes, at most and as a share of
#: ``--seconds``.
FOR_EACH, MOST_WORK_S, WORK = 3, 2.0, 0.1
#: Seconds in which a burst must be over, and, at most, until what was just done has been put away.
BURST_S, STILL_S = 300.0, 3.0
#: How long a task waited for a worker, as answers of /v1 and of other services say it.
QUEUED = re.compile(r"x-rma-queue-ms: (\d+)|server-timing: .*queue;dur=([\d.]+)")
#: The bar: milliseconds until a task for any service or model has met a free worker.
FOUND_MS = 50.0


def main() -> int:
    parser = _common.parser(__doc__)
    parser.set_defaults(workers=WORKERS)
    asked = _common.read_options(parser.parse_args())
    with tempfile.TemporaryDirectory(prefix="rma-bench-") as name:
        folder = Path(name)
        catalog = _load.write_catalog(folder / "catalog")
        result: dict[str, Any] = {"workers": asked.workers, "interval_s": _interval_s(asked)}
        for kind, channels in (("open", 2 * asked.workers), ("parked", max(2, round(asked.workers * OPEN)))):
            result[kind] = _one(asked, folder / kind, catalog, channels, found=kind == "parked")
    return _common.show(result, _lines(result), _targets(result), asked)


def _interval_s(asked: Options) -> float:
    return min(MOST_INTERVAL_S, asked.seconds * INTERVAL)


def _one(asked: Options, home: Path, catalog: Path, channels: int, *, found: bool) -> dict[str, Any]:
    served, loading = _common.split_cores()
    env = {"RMA_MAX_CHANNELS": str(channels), "RMA_HEARTBEAT_INTERVAL_S": str(_interval_s(asked))}
    arguments = ("--catalog", str(catalog), "--log-level", "warning")
    with (
        _common.coordinator(home, cores=served, arguments=arguments, env=env) as server,
        _common.pinned(loading),
    ):
        result: dict[str, Any] = {"max_channels": channels}

        async def measure() -> int:
            async with _joined(asked, server, result) as workers:
                if found:
                    result["found"] = await _found(asked, server, workers)
                    result["burst"] = await _burst(server, workers, works_s=min(MOST_WORK_S, asked.seconds * WORK))
            return 0

        run(measure())
    return result


@contextlib.asynccontextmanager
async def _joined(asked: Options, server: Server, result: dict[str, Any]) -> AsyncIterator[Sequence[Idler]]:
    """Let all join, in two halves; how many are open then, and what one of the second half costs."""
    names = [f"model-{number % MODELS}" for number in range(asked.workers)]
    workers = [
        Idler(server.url, report, models=[name]) for report, name in zip(kinds(asked.workers), names, strict=True)
    ]
    workers[-1].models = (RARE,)
    half = asked.workers // 2
    held = [_common.memory(server.process)["rss_mib"]]
    async with contextlib.AsyncExitStack() as stack:
        opened = []
        for part in (workers[:half], workers[half:]):
            await stack.enter_async_context(idling(part, partial(_load.join_token, server)))
            await _settled(part, parked=result["max_channels"] < asked.workers, interval_s=_interval_s(asked))
            held.append(_common.memory(server.process)["rss_mib"])
            opened.append(_open(workers))
        result["rss_mib"], result["open"] = held, opened
        result["kib_each"] = round((held[2] - held[1]) * 1024 / max(1, asked.workers - half), 1)
        yield workers


def _open(workers: Sequence[Idler]) -> int:
    return sum(worker.open for worker in workers)


async def _settled(workers: Sequence[Idler], *, parked: bool, interval_s: float) -> None:
    """Wait until all of them are as they stay: on their channels, or heard once more since everyone is there."""
    if parked:
        await asyncio.sleep(interval_s)
    else:
        async with asyncio.timeout(BURST_S):
            while _open(workers) < len(workers):  # noqa: ASYNC110 - looking is all that is done to them
                await asyncio.sleep(0.1)
    await asyncio.sleep(min(STILL_S, interval_s))


async def _found(asked: Options, server: Server, workers: Sequence[Idler]) -> dict[str, Any]:
    """Ask for every service and model in turn; each call is on a connection of its own."""
    services = {service for worker in workers for service in worker.slots}
    models = {f"{LLM} {model}" for worker in workers for model in worker.models}
    lanes = sorted((services - {LLM}) | models)

    queued: list[float] = []

    async def ask(number: int) -> None:
        queued.append(await _ask(server, lanes[number % len(lanes)]))

    measured, seconds = _load.Measured(), max(asked.seconds, len(lanes) / PER_S)
    waited = _common.waited_s(server.process), _common.waited_s(psutil.Process())
    await _load.run_schedule(_load.every(PER_S, seconds, "task", ask), measured)
    return {
        "lanes": len(lanes),
        "load_lag": _common.percentiles(measured.lag),
        "waited_share": round((_common.waited_s(server.process) - waited[0]) / seconds, 3),
        "load_waited_share": round((_common.waited_s(psutil.Process()) - waited[1]) / seconds, 3),
        "latency": measured.table().get("task", _common.percentiles([])),
        "queued": _common.percentiles(queued),
        "failures": len(measured.failures),
        "first_failures": measured.failures[:3],
    }


async def _ask(server: Server, lane: str) -> float:
    """Ask for something, and return the seconds until a worker was given it, as the coordinator says."""
    connection = Connection(server.url, server.key)
    try:
        await connection.call("POST", *request(lane), within_s=BURST_S)
    finally:
        connection.close()
    return _queued_s(connection.headers)


def _queued_s(headers: Mapping[str, str]) -> float:
    """Return how long a task waited for a worker; raises ValueError for an answer that does not say."""
    found = QUEUED.search("\n".join(f"{name}: {value}" for name, value in headers.items()))
    if found is None:
        raise ValueError("an answer does not say how long its task waited")
    return float(found[1] or found[2]) / 1000


async def _burst(server: Server, workers: Sequence[Idler], *, works_s: float) -> dict[str, Any]:
    """Ask for one model more often, and all at once, than those on their channels have it."""
    model = workers[0].models[0]
    have = [worker for worker in workers if model in worker.models]
    for worker in have:
        worker.works_s = works_s
    were_open, loop = _open(have), asyncio.get_running_loop()
    before = [(worker.given, worker.called_back) for worker in have]
    began, took, first_back = loop.time(), list[float](), asyncio.create_task(_first_back(have))
    failures: list[str] = []

    async def ask() -> None:
        try:
            await _ask(server, f"{LLM} {model}")
        except _load.FAILURES as error:
            failures.append(str(error))
        else:
            took.append(loop.time() - began)

    async with asyncio.timeout(BURST_S):
        await asyncio.gather(*(ask() for _ in range(FOR_EACH * len(have))))
    worked = [worker.given - given for worker, (given, _) in zip(have, before, strict=True)]
    first_back.cancel()
    return {
        "tasks": FOR_EACH * len(have),
        "works_s": works_s,
        "have": len(have),
        "were_open": were_open,
        "called_back": sum(worker.called_back > back for worker, (_, back) in zip(have, before, strict=True)),
        "first_back_s": round(first_back.result(), 2) if first_back.done() and not first_back.cancelled() else None,
        "worked": sum(count > 0 for count in worked),
        "seconds": round(loop.time() - began, 2),
        "by_the_open_ones_s": round(FOR_EACH * len(have) / max(1, were_open) * works_s, 2),
        "latency": _common.percentiles(took),
        "failures": len(failures),
        "first_failures": failures[:3],
    }


async def _first_back(workers: Sequence[Idler]) -> float:
    """Return the seconds until the first of them opens a channel again."""
    loop = asyncio.get_running_loop()
    began, were = loop.time(), _open(workers)
    while _open(workers) <= were:  # noqa: ASYNC110 - looking is all that is done to them
        await asyncio.sleep(0.02)
    return loop.time() - began


def _targets(result: dict[str, Any]) -> list[Target]:
    found, burst = result["parked"]["found"], result["parked"]["burst"]
    targets = [
        Target("a task for any service or model has a worker, p99 ms", found["queued"]["p99_ms"], FOUND_MS),
        Target("failed calls", found["failures"] + burst["failures"], 1),
    ]
    if burst["were_open"] < burst["have"]:
        share = burst["seconds"] / burst["by_the_open_ones_s"]
        targets.append(Target("a burst, of what those on their channels alone would take", share, 1))
    return targets


def _points(row: dict[str, float]) -> str:
    return "  ".join(f"{point} {row[f'{point}_ms']:g}" for point in ("p50", "p95", "p99", "max")) + " ms"


def _lines(result: dict[str, Any]) -> Iterator[str]:
    for kind in ("open", "parked"):
        row = result[kind]
        (rest, half, whole), (first, last) = row["rss_mib"], row["open"]
        yield (
            f"{kind}: {row['kib_each']} KiB RSS each (at rest {rest} MiB; with {result['workers'] // 2} workers "
            f"{half}, {first} on their channels; with {result['workers']} {whole}, {last} on their channels)"
        )
    found, burst = result["parked"]["found"], result["parked"]["burst"]
    yield (
        f"a task for each of {found['lanes']} services and models in turn: a worker is given it after "
        f"{_points(found['queued'])}; the client has its answer after {_points(found['latency'])}; "
        f"{found['failures']} failures "
        f"(waiting for a core: coordinator {found['waited_share']:.0%} of the time, load and workers "
        f"{found['load_waited_share']:.0%}; the load late by p99 {found['load_lag']['p99_ms']} ms)"
    )
    yield (
        f"a burst of {burst['tasks']} tasks of {burst['works_s']:g} s for a model that {burst['have']} workers have, "
        f"{burst['were_open']} on their channels: over in {burst['seconds']} s (alone these would take "
        f"{burst['by_the_open_ones_s']} s), {burst['called_back']} called back, the first after "
        f"{burst['first_back_s']} s of heartbeats every {result['interval_s']:g} s; {burst['worked']} worked; "
        f"{burst['failures']} failures"
    )
    yield from (f"    {failure}" for failure in [*found["first_failures"], *burst["first_failures"]])


if __name__ == "__main__":
    raise SystemExit(main())
