"""Model servers that run on this machine and are not shared: found at their usual ports, told to the owner alone.

Nothing here attaches anything, and nothing is told to a pool. What listens at such a port may be any program: it is
asked a few small questions that change nothing in a model server, and what it answers is taken as hostile.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import msgspec

from rma_core.addresses import is_loopback
from rma_core.agent.attach.model_server import PLAIN, QUOTED, look
from rma_core.agent.endpoint import Endpoint
from rma_core.agent.incoming import EndpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rma_core.agent.attach.model_server import Found

#: Seconds for all that is asked of all ports together.
WITHIN_S = 1.5
IPV6 = 6


class Usual(NamedTuple):
    """A port, and who listens there when nobody has said otherwise."""

    port: int
    server: str


#: None of them lies where systems take ports for those who do not mind which, as RMA's own services do.
USUAL = (
    Usual(11434, "Ollama"),
    Usual(1234, "LM Studio"),
    Usual(8080, "llama.cpp, llamafile, LocalAI or MLX"),
    Usual(9931, "llama.cpp"),
    Usual(8000, "vLLM"),
    Usual(30000, "SGLang"),
    Usual(5000, "text-generation-webui or TabbyAPI"),
    Usual(5001, "KoboldCpp"),
    Usual(1337, "Jan"),
    Usual(4891, "GPT4All"),
)


class Nearby(msgspec.Struct, frozen=True, kw_only=True):
    """A server that could be attached: by this URL; ``models`` are those that it would share."""

    url: str
    server: str
    models: tuple[str, ...]

    def words(self) -> str:
        """Return it as a sentence has it: ``Ollama at http://127.0.0.1:11434 (2 models: a, b)``."""
        shown = ", ".join(self.models[:QUOTED]) + (", …" if len(self.models) > QUOTED else "")
        count = f"{len(self.models)} model{'' if len(self.models) == 1 else 's'}"
        return f"{self.server} at {self.url} ({count}: {shown})"


async def find(besides: Iterable[str] = (), *, usual: Iterable[Usual] = USUAL) -> tuple[Nearby, ...]:
    """Return what runs at the usual ports; never asked are the addresses ``besides``: attached ones, the pool's own."""
    left_out = {port for url in besides if (port := _own_port(url)) is not None}
    asked = [_ask(one) for one in usual if one.port not in left_out]
    return tuple(one for one in await asyncio.gather(*asked) if one is not None)


def _own_port(url: str) -> int | None:
    """Return the port of an address on this machine; nothing for one elsewhere."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return None
    return port if is_loopback(host) or host == socket.gethostname() or _is_ours(host) else None


def _is_ours(host: str) -> bool:
    """Say whether this machine has an address; no name server is asked."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == IPV6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except (OSError, ValueError):
        return False
    return True


async def _ask(usual: Usual) -> Nearby | None:
    url = f"http://127.0.0.1:{usual.port}"
    endpoint = Endpoint(url)
    try:
        found = await look(endpoint, within_s=WITHIN_S)
    except (EndpointError, TimeoutError):
        # Nobody is there, or no model server, or one that is not for everybody.
        return None
    finally:
        await endpoint.aclose()
    names = tuple(one.name for one in found.models)
    return Nearby(url=url, server=_name(found, usual), models=names) if names else None


def _name(found: Found, usual: Usual) -> str:
    """Return which server it is, by what it says; by where it is, if it says nothing, that is only likely."""
    return f"{found.server}, likely {usual.server}" if found.server == PLAIN else found.server
