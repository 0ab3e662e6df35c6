"""The coordinator's start: seconds from the process to the first answer of /health, and what it holds at rest.

First starts find an empty state folder, later ones their store; ``python -c pass`` stands beside them, for what of it
is the interpreter's. ``--workers`` has no meaning here; ``--seconds`` bounds the rounds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import _common
from bench._common import Target

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Rounds at most, each with a first and a later start.
ROUNDS = 5
#: Seconds of rest before memory is read.
REST_S = 3.0
#: The bars: seconds to the first answer, and MiB at rest.
FIRST_S, REST_MIB = 0.5, 60.0


def main() -> int:
    asked = _common.options(__doc__)
    served, loading = _common.split_cores()
    _common.pin(loading)
    times: dict[str, list[float]] = {"interpreter": [], "first": [], "later": []}
    held: list[dict[str, float]] = []
    ends = time.monotonic() + asked.seconds
    with tempfile.TemporaryDirectory(prefix="rma-bench-") as folder:
        for number in range(ROUNDS):
            home = Path(folder) / str(number)
            times["interpreter"].append(_interpreter_s())
            times["first"].append(_start_s(home, served, held))
            times["later"].append(_start_s(home, served, held))
            if time.monotonic() > ends:
                break
    result: dict[str, Any] = {
        "rounds": len(times["first"]),
        **{f"{name}_s": _common.median(found) for name, found in times.items()},
        **{f"{name}_least_s": round(min(found), 3) for name, found in times.items()},
        **{f"rest_{kind}": _common.median((one[kind] for one in held), 2) for kind in held[0]},
    }
    return _common.show(result, _lines(result), _targets(result), asked)


def _targets(result: dict[str, Any]) -> list[Target]:
    return [
        # The quickest: what others do on this machine only ever adds.
        Target("start to the first answer, s, the quickest first start", result["first_least_s"], FIRST_S),
        Target("at rest, MiB RSS", result["rest_rss_mib"], REST_MIB),
    ]


def _interpreter_s() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.perf_counter() - began


def _start_s(home: Path, cores: set[int], held: list[dict[str, float]]) -> float:
    """Start a coordinator, add what it holds at rest to ``held``, and return the seconds to its first answer."""
    with _common.coordinator(home, cores=cores) as server:
        cpu_s = _common.cpu_s(server.process)
        time.sleep(REST_S)
        held.append({**_common.memory(server.process), "cpu_s": cpu_s})
    return server.answered_s


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield (
        f"start to the first answer: {result['first_s']:.3f} s in an empty folder, {result['later_s']:.3f} s again, of "
        f"which the bare interpreter {result['interpreter_s']:.3f} s (medians of {result['rounds']} rounds)"
    )
    yield f"of CPU it takes {result['rest_cpu_s']} s, whatever else this machine does"
    yield f"at rest: {result['rest_rss_mib']} MiB RSS, {result['rest_pss_mib']} PSS"


if __name__ == "__main__":
    raise SystemExit(main())
