"""Where a service listens, as its command is told: a port, or a Unix socket."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

DEFAULT_PORT = 8000


def add_arguments(parser: argparse.ArgumentParser, *, version: str) -> None:
    """Add ``--host``, ``--port``, ``--uds`` and ``--version``; the runtimes of RMA use the first three."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=os.environ.get("PORT", DEFAULT_PORT),
        help="port to listen on (default: PORT of the environment, else 8000)",
    )  # fmt: skip
    parser.add_argument("--uds", metavar="PATH", help="a Unix socket to listen on instead")
    parser.add_argument("--version", action="version", version=version)


def place(options: argparse.Namespace) -> str:
    """Return where it listens, as servers and sentences name it: ``/path`` or ``host:port``."""
    if options.uds:
        return str(options.uds)
    return f"[{options.host}]:{options.port}" if ":" in options.host else f"{options.host}:{options.port}"
