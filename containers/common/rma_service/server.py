"""The command of a service: ``python -m MODULE`` serves it, on a port or a Unix socket."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, NamedTuple

from hypercorn.asyncio import serve
from hypercorn.config import Config

from rma_service import listening
from rma_service.app import MAX_BODY_BYTES, Limits, ServiceApp
from rma_service.processes import Processes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Requests at work when the end is asked for get so long.
GRACE_S = 5.0
#: Then the process ends, whatever the server still waits for.
HARD_S = GRACE_S + 3.0
_KEEP_ALIVE_S = 30.0
_BACKLOG = 128


class Service(NamedTuple):
    """A service: ``POST /name``, answered by processes of the module ``child``, within default limits.

    ``facts`` are what ``GET /health`` says beyond its state; ``threads`` says how many
    threads one document gets where so many are read at once.
    """

    name: str
    module: str
    version: str
    description: str
    facts: Mapping[str, object]
    slots: int
    deadline_s: float
    memory_bytes: int
    threads: Callable[[int], int] = lambda slots: 1  # noqa: ARG005 - one thread, however many slots


def arguments(service: Service, words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog=service.module, description=service.description)
    listening.add_arguments(parser, version=service.version)
    parser.add_argument(
        "--slots", type=int, default=service.slots, help="documents read at once (default: %(default)s)"
    )
    parser.add_argument(
        "--deadline-s",
        type=float,
        default=service.deadline_s,
        help="seconds a document may take (default: %(default)g)",
    )
    parser.add_argument(
        "--memory-bytes", type=int, default=service.memory_bytes,
        help="address space of a process that reads one (default: %(default)s; Linux)",
    )  # fmt: skip
    parser.add_argument(
        "--max-body-bytes", type=int, default=MAX_BODY_BYTES, help="longest request body (default: %(default)s)"
    )
    options = parser.parse_args(words)
    if min(options.slots, options.deadline_s, options.memory_bytes, options.max_body_bytes) <= 0:
        parser.error("slots and limits are greater than zero")
    return options


def _config(options: argparse.Namespace) -> Config:
    config = Config()
    config.bind = [f"unix:{options.uds}" if options.uds else listening.place(options)]
    config.alpn_protocols = ["http/1.1"]
    config.h11_pass_raw_headers = False
    config.keep_alive_timeout = _KEEP_ALIVE_S
    config.graceful_timeout = GRACE_S
    config.shutdown_timeout = GRACE_S
    config.backlog = _BACKLOG
    config.include_server_header = False
    # A logger of ours, which it would otherwise give a second handler.
    config.errorlog = logging.getLogger("hypercorn")
    return config


async def _serve(service: Service, options: argparse.Namespace) -> None:
    processes = Processes(
        f"{service.module}.child", slots=options.slots, deadline_s=options.deadline_s,
        memory_bytes=options.memory_bytes, threads=service.threads(options.slots),
    )  # fmt: skip
    limits = Limits(body_bytes=options.max_body_bytes)
    facts = {"version": service.version, **service.facts}
    app = ServiceApp(service.name, processes, facts=facts, limits=limits)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        ended.set()
        # The server can wait for ever for a client that neither reads nor leaves.
        loop.call_later(HARD_S, os._exit, 1)

    for number in (signal.SIGTERM, signal.SIGINT):
        if sys.platform == "win32":
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(end))
        else:
            loop.add_signal_handler(number, end)

    async def until_ended() -> None:
        await ended.wait()

    await serve(app, _config(options), shutdown_trigger=until_ended)  # type: ignore[arg-type]  # its ASGI types are its own


def main(service: Service) -> None:
    """Serve until SIGTERM or SIGINT."""
    options = arguments(service)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(_serve(service, options))
    except OSError as error:
        sys.exit(f"{service.module}: cannot serve on {listening.place(options)}: {error.strerror}")
