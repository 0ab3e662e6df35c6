"""`rma pause`: seconds until the memory of everything that ran is free, as the operating system counts it.

A pool of one machine runs `notes` and a language model as processes, the model with a cache of half a GB; it is paused
and resumed a few times. ``--workers`` has no meaning here; ``--seconds`` bounds the rounds.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from bench import _common
from bench._common import MIB, Target
from tests import tiny_model
from tests.pools import NO_ENGINE, Pool, pool, until

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Rounds at most.
ROUNDS = 5
#: The bar: "within seconds".
FREE_S = 5.0
#: Tokens of the cache, which take 16 KB each in a model of this size.
CONTEXT = 16_384
#: Seconds until the model is loaded again.
LOADED_S = 60.0


def main() -> int:
    asked = _common.options(__doc__)
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="rma-bench-") as folder:
        file = tiny_model.write_chat_model(
            Path(folder) / "model.gguf", layers=8, width=512, heads=8, kv_heads=8, context=CONTEXT
        )
        shared = f"model={file}#context={CONTEXT}&slots=2"
        with pool(Path(folder) / "home", "--port", "0", "--model", shared, env=NO_ENGINE) as made:
            ends = time.monotonic() + asked.seconds
            while not rounds or (len(rounds) < ROUNDS and time.monotonic() < ends):
                rounds.append(_round(made))
    result: dict[str, Any] = {
        "rounds": len(rounds),
        "held_mib": _common.median(one["held_mib"] for one in rounds),
        "stopped_s": _common.median(one["stopped_s"] for one in rounds),
        "free_s": _common.median(one["free_s"] for one in rounds),
        "loaded_again_s": _common.median(one["loaded_again_s"] for one in rounds),
    }
    line = (
        f"{result['held_mib']:.0f} MiB of services were free {result['free_s']:.2f} s after `rma pause` was typed, of"
        f" which the agent took {result['stopped_s']:.2f} s; after `rma resume` the model was loaded again in"
        f" {result['loaded_again_s']:.2f} s (medians of {result['rounds']} rounds)"
    )
    return _common.show(result, [line], [Target("memory free, s", result["free_s"], FREE_S)], asked)


def _services(home: Path) -> Iterator[psutil.Process]:
    """Give the processes of the services below a state folder."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(home / "agent" / "services") in " ".join(process.cmdline()):
                yield process


def _held_mib(home: Path) -> float:
    total = 0
    for process in _services(home):
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total / MIB


def _round(made: Pool) -> dict[str, float]:
    until(lambda: _is_loaded(made), within_s=LOADED_S, what="the model is loaded")
    held = _held_mib(made.home)
    began = time.monotonic()
    said = made.json("pause")
    until(lambda: _held_mib(made.home) == 0, within_s=LOADED_S, what="the memory is free")
    free_s = time.monotonic() - began
    made.ask("resume")
    began = time.monotonic()
    until(lambda: _is_loaded(made), within_s=LOADED_S, what="the model is loaded again")
    return {
        "held_mib": held,
        "stopped_s": said["seconds"],
        "free_s": free_s,
        "loaded_again_s": time.monotonic() - began,
    }


def _is_loaded(made: Pool) -> bool:
    return any(one["state"] == "loaded" for one in made.get("/api/admin/models")["models"])


if __name__ == "__main__":
    raise SystemExit(main())
