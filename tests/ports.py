"""Ports for the servers that tests start."""

from __future__ import annotations

import itertools
import os
import random
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Below the ports that systems give to whoever asks for any: between looking and listening nobody else gets one.
_FIRST = 20_000
#: Ports of each process that runs tests, by its number: they do not take each other's.
_EACH = 1_000
_PROCESSES = 12


def _own() -> Iterator[int]:
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PROCESSES
    # Two runs on one machine begin at different ones.
    start = random.SystemRandom().randrange(_EACH)
    return (_FIRST + number * _EACH + (start + step) % _EACH for step in itertools.count())


_ports = _own()


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on, nor will but who was given it here; each is given again only late."""
    for port in itertools.islice(_ports, _EACH):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise AssertionError(f"all {_EACH} ports of this process are taken")
