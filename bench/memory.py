"""What a worker costs the coordinator in memory: registered, placed and beating, without an open connection.

Real machines' reports register with a real coordinator, a few at a time, and beat; each closes its connection. After
the first ``--workers`` of them the process has grown all it grows for good; what counts is the RSS that twice as many
more add, per 100. What a connection costs on top of that is what the server's library takes (`bench.fleet` shows it).
``--seconds`` has no meaning here.
"""

from __future__ import annotations

import asyncio
import tempfile
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import _common, _load
from bench._common import Target
from rma_coordinator.server import run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench._common import Options, Server

#: Machines that register at once.
AT_ONCE = 8
#: Uses of one join token.
TOKEN_USES = 1000
#: Seconds until closed connections have been let go.
REST_S = 2.0
#: The bar: MB per 100 workers.
MOST_MB = 0.2


def main() -> int:
    asked = _common.options(__doc__)
    served, loading = _common.split_cores()
    with tempfile.TemporaryDirectory(prefix="rma-bench-") as name:
        folder = Path(name)
        catalog = _load.write_catalog(folder / "catalog")
        arguments = ("--catalog", str(catalog))
        with _common.coordinator(folder / "home", cores=served, arguments=arguments) as server:
            _common.pin(loading)
            result: dict[str, Any] = {}

            async def measure() -> int:
                result.update(await _measure(asked, server))
                return 0

            run(measure())
    return _common.show(result, _lines(result), _targets(result), asked)


async def _measure(asked: Options, server: Server) -> dict[str, Any]:
    kinds = cycle(_load.machines())
    held = [_common.memory(server.process)]
    for count in (asked.workers, 2 * asked.workers):
        await _join(server, [_load.Machine(server.url, one, by_channel=False) for one in islice(kinds, count)])
        await asyncio.sleep(REST_S)
        held.append(_common.memory(server.process))
    added = (held[2]["rss_mib"] - held[1]["rss_mib"]) * _common.MIB / 1e6
    return {
        "workers": 3 * asked.workers,
        "rss_mib": [one["rss_mib"] for one in held],
        "mb_per_100": round(added / (2 * asked.workers) * 100, 3),
    }


async def _join(server: Server, machines: list[_load.Machine]) -> None:
    tokens = [await _load.join_token(server, TOKEN_USES) for _ in range(0, len(machines), TOKEN_USES)]
    numbers = iter(range(len(machines)))

    async def join() -> None:
        for number in numbers:
            machine = machines[number]
            await machine.register(tokens[number // TOKEN_USES])
            # The second one has the containers of the first one's answer.
            await machine.beat()
            await machine.beat()
            await machine.close()

    await asyncio.gather(*(join() for _ in range(AT_ONCE)))


def _targets(result: dict[str, Any]) -> list[Target]:
    return [Target("the coordinator per 100 workers, MB", result["mb_per_100"], MOST_MB)]


def _lines(result: dict[str, Any]) -> Iterator[str]:
    rest, first, last = result["rss_mib"]
    yield f"at rest {rest} MiB RSS, with {result['workers'] // 3} workers {first}, with {result['workers']} {last}"
    yield f"{result['mb_per_100']} MB per 100 workers"


if __name__ == "__main__":
    raise SystemExit(main())
