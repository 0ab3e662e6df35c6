"""What the pool adds to a call: a trivial service asked directly, and through coordinator and agent, in turns.

Everything is on this machine and real: the service runs as a process of the agent, the direct calls go to one of the
same kind. Each side has one kept-alive connection; a call follows the other, so that noise hits both alike.
``--seconds`` is the length; ``--workers`` has no meaning here.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from bench import _agents, _common
from bench._common import Server, Target
from bench._wire import Connection
from rma_coordinator.server import run

if TYPE_CHECKING:
    from collections.abc import Iterator

BODY = b'{"text":"a small request"}'
#: Calls before the first that counts.
WARM = 50
#: The bar, in milliseconds.
ADDED_MS = 3.0


def main() -> int:
    asked = _common.options(__doc__)
    with tempfile.TemporaryDirectory(prefix="rma-bench-") as name:
        folder = Path(name)
        catalog = _agents.write_catalog(folder / "catalog", host="")
        port = _common.free_port()
        (folder / "hello.py").write_text(_agents.SOURCE, encoding="utf-8")
        command = [str(folder / "hello.py"), "--host", "127.0.0.1", "--port", str(port)]
        with (
            _common.started(command, home=folder / "direct", cores=set()) as process,
            _common.coordinator(folder / "home", cores=set(), arguments=("--catalog", str(catalog))) as server,
            _agents.agent(folder / "agent", server, runtime="process", cores=set()),
        ):
            url = f"http://127.0.0.1:{port}"
            _common.wait_until_answered(url, process, folder / "direct")
            result: dict[str, Any] = {}

            async def measure() -> int:
                result.update(await _measure(server, Server(url, "", psutil.Process(process.pid)), asked.seconds))
                return 0

            run(measure())
    return _common.show(result, _lines(result), _targets(result), asked)


async def _measure(server: Server, direct: Server, seconds: float) -> dict[str, Any]:
    sides = {
        "direct": (Connection(direct.url), f"/{_agents.SERVICE}"),
        "pool": (Connection(server.url, server.key), f"/api/inference/{_agents.SERVICE}"),
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}
    loop = asyncio.get_running_loop()
    ends, number = loop.time() + seconds, 0
    while loop.time() < ends or number <= WARM:
        for name, (connection, path) in sides.items():
            began = time.perf_counter()
            await connection.call("POST", path, BODY)
            if number >= WARM:
                taken[name].append(time.perf_counter() - began)
        number += 1
    for connection, _ in sides.values():
        connection.close()
    rows = {
        name: {**_common.percentiles(found), "least_ms": round(min(found) * 1000, 2)} for name, found in taken.items()
    }
    return {**rows, "added_p50_ms": round(rows["pool"]["p50_ms"] - rows["direct"]["p50_ms"], 2)}


def _targets(result: dict[str, Any]) -> list[Target]:
    return [Target("what the pool adds, p50 ms", result["added_p50_ms"], ADDED_MS)]


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield "a small call to a trivial service on this machine:"
    for name in ("direct", "pool"):
        row = result[name]
        yield (
            f"    {name:8}{row['count']:6} calls  least {row['least_ms']:6.2f}  p50 {row['p50_ms']:6.2f}  "
            f"p95 {row['p95_ms']:6.2f}  p99 {row['p99_ms']:6.2f}  ms"
        )
    yield f"the pool adds {result['added_p50_ms']:.2f} ms (p50)"


if __name__ == "__main__":
    raise SystemExit(main())
