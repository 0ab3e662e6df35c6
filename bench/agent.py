"""The agent at rest: what it holds and the CPU it uses while its service runs and nobody asks for anything.

A real agent, joined to a real coordinator, with one service healthy: in Docker where one answers (``DOCKER_HOST``; a
private one: ``python -m tests.engines up``), else as a process, and then it is said. Memory is PSS of the agent's own
process: shared pages count by their share. CPU is what the kernel counted for its threads over three times
``--seconds``, which holds a heartbeat or more, as a part of one core. ``--workers`` has no meaning here.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import _agents, _common
from bench._common import Target

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Seconds until what a start needs is done and let go of.
SETTLE_S = 10.0
#: The bars: MiB of PSS, and percent of one core.
MOST_MIB, MOST_CPU = 45.0, 0.1


def main() -> int:
    asked = _common.options(__doc__)
    host = _agents.docker()
    with tempfile.TemporaryDirectory(prefix="rma-bench-") as name:
        folder = Path(name)
        catalog = _agents.write_catalog(folder / "catalog", host=host)
        arguments = ("--catalog", str(catalog))
        runtime = "docker" if host else "process"
        with (
            _common.coordinator(folder / "home", cores=set(), arguments=arguments) as server,
            _agents.agent(folder / "agent", server, runtime=runtime, cores=set(), host=host) as agent,
        ):
            time.sleep(min(SETTLE_S, asked.seconds))
            result = _measure(agent, 3 * asked.seconds)
    return _common.show(result, _lines(result), _targets(result), asked)


def _measure(agent: _agents.Agent, seconds: float) -> dict[str, Any]:
    before, began = _common.cpu_s(agent.process), time.monotonic()
    time.sleep(seconds)
    used, took = _common.cpu_s(agent.process) - before, time.monotonic() - began
    return {
        "runtime": agent.runtime,
        **_common.memory(agent.process),
        "threads": agent.process.num_threads(),
        "children": len(agent.process.children(recursive=True)),
        "seconds": round(took, 1),
        "cpu_percent": round(used / took * 100, 4),
    }


def _targets(result: dict[str, Any]) -> list[Target]:
    return [
        Target(f"the agent at rest ({result['runtime']}), MiB PSS", result["pss_mib"], MOST_MIB),
        Target("the agent at rest, % of one core", result["cpu_percent"], MOST_CPU),
    ]


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield (
        f"the agent at rest, its service in {result['runtime']}: {result['pss_mib']} MiB PSS "
        f"({result['rss_mib']} RSS, {result['uss_mib']} its own alone), {result['threads']} threads, "
        f"{result['children']} children; {result['cpu_percent']} % of one core over {result['seconds']} s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
