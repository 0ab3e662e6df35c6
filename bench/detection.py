"""Detection on this machine: its wall time over that of its slowest detector, which nothing can be faster than.

Every detector runs in a child process of its own, all at once, so the ratio should stay near 1 however many there are.
``--workers`` has no meaning here; ``--seconds`` bounds the rounds.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Any

from bench import _common
from bench._common import Target
from rma_core.detection import observe
from rma_core.host import Plugins

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rma_core.detection import Observation

#: Rounds at most; the first one fills caches and counts like the others.
ROUNDS = 7
#: The bar: milliseconds over the slowest detector.
OVER_MS = 250.0


def main() -> int:
    asked = _common.options(__doc__)
    plugins = Plugins.discover(kinds=["detector"])
    rounds: list[tuple[float, tuple[Observation, ...]]] = []
    ends = time.monotonic() + asked.seconds
    while not rounds or (len(rounds) < ROUNDS and time.monotonic() < ends):
        began = time.perf_counter()
        seen = asyncio.run(observe(plugins))
        rounds.append((time.perf_counter() - began, seen))
    result = _result(rounds)
    over = Target("detection over its slowest detector, ms", result["over_slowest_ms"], OVER_MS)
    return _common.show(result, _lines(result), [over], asked)


def _result(rounds: list[tuple[float, tuple[Observation, ...]]]) -> dict[str, Any]:
    if not rounds[0][1]:
        sys.exit("no detector is installed")
    slowest = [max(one.seconds for one in seen) for _, seen in rounds]
    return {
        "rounds": len(rounds),
        "wall_s": _common.median(wall for wall, _ in rounds),
        "slowest_s": _common.median(slowest),
        "over_slowest_ms": _common.median(
            ((wall - least) * 1000 for (wall, _), least in zip(rounds, slowest, strict=True)), 1
        ),
        "wall_over_slowest": _common.median(wall / least for (wall, _), least in zip(rounds, slowest, strict=True)),
        "detectors": {
            one.detector: {
                "state": one.detection.state,
                "seconds": _common.median(seen[index].seconds for _, seen in rounds),
                "import_seconds": round(one.import_seconds or 0.0, 3),
            }
            for index, one in enumerate(rounds[0][1])
        },
    }


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield (
        f"detection: {result['wall_s']:.3f} s, {result['wall_over_slowest']:.2f} times its slowest detector "
        f"(medians of {result['rounds']} rounds)"
    )
    for name, row in result["detectors"].items():
        yield f"    {name:20}{row['seconds']:7.3f} s  {row['state']}"


if __name__ == "__main__":
    raise SystemExit(main())
