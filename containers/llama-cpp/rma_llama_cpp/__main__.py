"""``python -m rma_llama_cpp``: serve one model, on a port or a Unix socket."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rma_llama_cpp import __version__, exchange, settings
from rma_llama_cpp.front import Front
from rma_llama_cpp.keeper import Engine
from rma_service import listening

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_BACKLOG = 128
_CONNECTIONS: set[asyncio.Task[None]] = set()


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options; which model is served, the environment says."""
    parser = argparse.ArgumentParser(prog="rma_llama_cpp", description="One language model over HTTP, by llama.cpp.")
    listening.add_arguments(parser, version=__version__)
    return parser.parse_args(words)


def main() -> None:
    """Serve until SIGTERM or SIGINT, or until the model cannot be served any more."""
    options = arguments()
    # Sockets are for this user only, wherever they are.
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        wanted = settings.read(os.environ)
        if options.uds:
            options.uds = str(Path(options.uds).absolute())
        with tempfile.TemporaryDirectory(prefix="llama-", ignore_cleanup_errors=True) as folder:
            # The engine's socket is named without a folder, whose path may be longer than a socket's can be.
            os.chdir(folder)
            why = asyncio.run(_serve(options, wanted))
            os.chdir(tempfile.gettempdir())
    except settings.Unusable as problem:
        sys.exit(f"rma_llama_cpp: {problem}")
    except OSError as error:
        sys.exit(f"rma_llama_cpp: cannot serve on {listening.place(options)}: {error.strerror}")
    sys.exit(f"rma_llama_cpp: {why}" if why else 0)


async def _serve(options: argparse.Namespace, wanted: settings.Settings) -> str:
    """Serve until the end is asked for (an empty string), or comes by itself (the reason). Raises Unusable, OSError."""
    engine = Engine(wanted)
    front = Front(engine)
    accept = _accepting(front.answer)
    if options.uds:
        server = await asyncio.start_unix_server(accept, options.uds, backlog=_BACKLOG, limit=exchange.READ_BYTES)
    else:
        server = await asyncio.start_server(
            accept, options.host, options.port, backlog=_BACKLOG, limit=exchange.READ_BYTES
        )
    running = asyncio.create_task(engine.run(), name="engine")
    asked = asyncio.create_task(_asked_to_end(), name="asked to end")
    try:
        await asyncio.wait((running, asked), return_when=asyncio.FIRST_COMPLETED)
        return running.result() if running.done() else ""
    finally:
        server.close()
        for task in (running, asked, *_CONNECTIONS):
            task.cancel()
        await engine.stop()
        await asyncio.wait((running, asked, *_CONNECTIONS), timeout=1)
        if options.uds:
            _forget(Path(options.uds))


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _accepting(
    answer: Callable[[exchange.Exchange, exchange.Request], Awaitable[None]],
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(_CONNECTIONS) >= exchange.MOST_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.create_task(exchange.serve(exchange.Exchange(reader, writer), answer), name="connection")
        _CONNECTIONS.add(task)
        task.add_done_callback(_CONNECTIONS.discard)

    return accept


async def _asked_to_end() -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        if sys.platform == "win32":
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(ended.set))
        else:
            loop.add_signal_handler(number, ended.set)
    await ended.wait()


if __name__ == "__main__":
    main()
