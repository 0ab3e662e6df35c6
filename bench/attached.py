"""The agent at rest with a model server attached, and what the translation of an Ollama's answers costs.

A real agent, joined to a real coordinator that offers nothing, once with nothing attached, once with llama.cpp (a real
server with a tiny model), once with a stand-in for Ollama that lists 20 models. CPU is what the kernel counted for the
agent's threads over three times ``--seconds``, as a part of one core. Then lines of an Ollama's streamed answer are
translated, in this process, in pieces of one line and of fifty. ``--workers`` has no meaning here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from bench import _common, _load
from bench._common import Target
from rma_core.agent.attach.ollama_answer import translation
from rma_core.agent.attach.ollama_request import Wanted
from tests.model_servers import serving
from tests.ollama_stand_in import MODEL, STATS, said

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Seconds until what a start needs is done and let go of, and until a server must have been found.
SETTLE_S, READY_S = 10.0, 60.0
#: Lines of one answer, and of one piece of it.
LINES, PIECES = 20_000, (1, 50)
#: The bars: percent of one core at rest, and microseconds a line.
MOST_CPU, MOST_US = 0.2, 20.0

#: The stand-in as a process of its own, which lists more models than most people have.
OLLAMA = """
import asyncio, sys
from tests import ollama_stand_in as module

class Many(module.OllamaStandIn):
    def _small(self, path):
        found = super()._small(path)
        if path == "/api/tags":
            one = found["models"][0]
            found["models"] = [{**one, "name": f"m{n}:7b", "digest": f"{n:064x}"} for n in range(20)]
        return found

async def main():
    server = Many()
    await server.open()
    print(server.url, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def main() -> int:
    asked = _common.options(__doc__)
    with tempfile.TemporaryDirectory(prefix="rma-bench-") as name:
        folder = Path(name)
        (folder / "catalog").mkdir()
        arguments = ("--catalog", str(folder / "catalog"))
        with (
            _common.coordinator(folder / "home", cores=set(), arguments=arguments) as server,
            serving(folder / "llama") as [llama],
            _ollama(folder / "ollama") as ollama,
        ):
            rest = {
                kind: _at_rest(folder / kind, server, url, asked.seconds)
                for kind, url in (("nothing", ""), ("llama_cpp", llama.endpoint), ("ollama", ollama))
            }
    result = {"cpu_percent": rest, "us_a_line": {str(size): _translated(size) for size in PIECES}}
    return _common.show(result, _lines(result), _targets(result), asked)


@contextlib.contextmanager
def _ollama(home: Path) -> Iterator[str]:
    with _common.started(["-c", OLLAMA], home=home, cores=set(), env={"PYTHONPATH": str(Path.cwd())}) as process:
        deadline = time.monotonic() + READY_S
        while not (url := (home / "log").read_text(encoding="utf-8").strip()).startswith("http"):
            if time.monotonic() > deadline or process.poll() is not None:
                sys.exit(f"the stand-in does not run: {url}")
            time.sleep(0.05)
        yield url


def _at_rest(home: Path, server: _common.Server, url: str, seconds: float) -> float:
    """Return the percent of a core that an agent takes with this attached."""
    env = {
        "RMA_COORDINATOR_URL": server.url,
        "RMA_JOIN_TOKEN": asyncio.run(_load.join_token(server, 1)),
        "RMA_ATTACH": url,
        "RMA_FIND_MODEL_SERVERS": "false",
    }
    with _common.started(["-m", "rma_core", "agent"], home=home, cores=set(), env=env) as started:
        log, deadline = home / "log", time.monotonic() + READY_S
        wanted = f"attached {url}: " if url else "the channel to the coordinator is open"
        while wanted not in log.read_text(encoding="utf-8"):
            if time.monotonic() > deadline or started.poll() is not None:
                sys.exit(f"the agent is not ready:\n{log.read_text(encoding='utf-8')[-2000:]}")
            time.sleep(0.1)
        time.sleep(min(SETTLE_S, seconds))
        process = psutil.Process(started.pid)
        before, began = _common.cpu_s(process), time.monotonic()
        time.sleep(3 * seconds)
        return round((_common.cpu_s(process) - before) / (time.monotonic() - began) * 100, 4)


def _translated(size: int) -> float:
    """Return the microseconds of CPU that one line takes, when so many come at a time."""
    line = json.dumps(said("/api/chat", " token")).encode() + b"\n"
    last = json.dumps(said("/api/chat", "", done=True, done_reason="stop", **STATS)).encode() + b"\n"
    answer = translation(Wanted("chat", MODEL, stream=True), answer_id="a" * 24, created=1)
    piece, began = line * size, time.process_time()
    for _ in range(LINES // size):
        answer.feed(piece)
    answer.feed(last)
    return round((time.process_time() - began) / LINES * 1e6, 2)


def _targets(result: dict[str, Any]) -> list[Target]:
    rest = result["cpu_percent"]
    return [
        Target("the agent at rest with llama.cpp attached, % of one core", rest["llama_cpp"], MOST_CPU),
        Target("the agent at rest with Ollama attached, % of one core", rest["ollama"], MOST_CPU),
        Target("a line of an Ollama's answer, alone, us of CPU", result["us_a_line"]["1"], MOST_US),
    ]


def _lines(result: dict[str, Any]) -> Iterator[str]:
    rest, us = result["cpu_percent"], result["us_a_line"]
    yield (
        f"the agent at rest: {rest['nothing']} % of one core with nothing attached, {rest['llama_cpp']} % with "
        f"llama.cpp, {rest['ollama']} % with Ollama (20 models)"
    )
    yield f"a line of an Ollama's answer: {us['1']} us of CPU alone, {us['50']} us among fifty"


if __name__ == "__main__":
    raise SystemExit(main())
