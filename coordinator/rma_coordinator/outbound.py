"""Calls to addresses that clients name, and nothing that they name is trusted: the only way out of the coordinator.

A name is looked up once for each call, every address that it leads to must be a stranger's on the internet, and the
connection goes to just those. TLS and the Host header still speak to the name. There are no redirects, no proxies from
the environment, no connections that are kept, and of an answer only its head is read. Importing this costs 20 MB: who
may never call anyone does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpcore2
import psutil

from rma_coordinator.domain.addresses import attached, is_public
from rma_coordinator.domain.webhooks import Reply, Unreachable
from rma_core.http import retry_after_s

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Mapping, Sequence

    from rma_coordinator.domain.addresses import Network

logger = logging.getLogger(__name__)

#: Seconds to look a name up, to connect and to agree on keys; and for all of a call.
CONNECT_S, WHOLE_S = 5.0, 15.0
#: Addresses of one name that are tried.
MOST_TRIED = 4
#: Names that are looked up at once, those included for which nobody waits any more.
MOST_LOOKUPS = 64
#: Of addresses that can be called.
FAMILIES = (socket.AF_INET, socket.AF_INET6)

_looking = threading.BoundedSemaphore(MOST_LOOKUPS)


class Guarded(httpcore2.AsyncNetworkBackend):
    """Connects to public addresses only, and to those of ``allowed`` networks."""

    def __init__(self, allowed: Sequence[Network]) -> None:
        self._allowed = allowed
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's name
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Look a name up, look at everything it leads to, and connect to the first that answers."""
        async with asyncio.timeout(timeout):
            addresses = await _look_up(host, port)
            self._check(host, addresses)
            tried = addresses[:MOST_TRIED]
            each_s = None if timeout is None else timeout / len(tried)
            for address in tried:
                try:
                    return await self._inner.connect_tcp(
                        address, port, timeout=each_s, local_address=local_address, socket_options=socket_options
                    )
                except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                    if address == tried[-1]:
                        raise
            raise AssertionError("a name that was looked at has addresses")

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ARG002, ASYNC109 - the library's form
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,  # noqa: ARG002 - the same
    ) -> httpcore2.AsyncNetworkStream:
        """Refuse: no stranger listens on a socket of this machine."""
        raise Unreachable(f"{path} is no address")

    def _check(self, host: str, addresses: Sequence[str]) -> None:
        """Raise Unreachable unless every address may be called.

        Whoever named it is not told which were found: names of the coordinator's own network are none of its business.
        """
        own = own_networks()
        wrong = [one for one in addresses if not is_public(one, allowed=self._allowed, own=own)]
        if wrong or not addresses:
            found = f"{', '.join(wrong)} is not public" if wrong else "there is no such name"
            logger.debug("a call to %s was refused: %s", host, found, extra={"action": "address_refused"})
            raise Unreachable("its name leads to no public address")


def own_networks() -> list[Network]:
    """Return every network that this machine is attached to now."""
    interfaces = [one for found in psutil.net_if_addrs().values() for one in found if one.family in FAMILIES]
    return [attached(one.address, one.netmask) for one in interfaces]


async def _look_up(host: str, port: int) -> list[str]:
    """Return the addresses of a host, each once; none where it has none. Raises Unreachable while too many are asked.

    In a thread of its own: a resolver may take half a minute whatever anyone wants, and neither files, which have the
    usual threads, nor the coordinator's end may wait for a name that a stranger has chosen.
    """
    if not _looking.acquire(blocking=False):
        raise Unreachable("too many names are being looked up")
    loop = asyncio.get_running_loop()
    done: asyncio.Future[list[str]] = loop.create_future()
    threading.Thread(target=_ask, args=(host, port, loop, done), name="rma-name", daemon=True).start()
    return await done


def _ask(host: str, port: int, loop: asyncio.AbstractEventLoop, done: asyncio.Future[list[str]]) -> None:
    found: list[str] = []
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found = list(dict.fromkeys(str(address[0]) for family, _, _, _, address in answers if family in FAMILIES))
    except (OSError, ValueError):
        # No such name, or nothing that could be one.
        pass
    finally:
        _looking.release()
    # A loop that is closed has nobody who waits.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(_tell, done, found)


def _tell(done: asyncio.Future[list[str]], found: list[str]) -> None:
    if not done.done():
        done.set_result(found)


async def post(
    url: str, *, headers: Mapping[str, str], body: bytes, context: ssl.SSLContext, allowed: Sequence[Network] = ()
) -> Reply:
    """Send ``body`` to a client's address and return the head of the answer. Raises Unreachable."""
    timeouts = {"connect": CONNECT_S, "read": WHOLE_S, "write": WHOLE_S, "pool": WHOLE_S}
    parts = urlsplit(url)
    named: list[tuple[bytes | str, bytes | str]] = [("Host", parts.netloc), *headers.items()]
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        to = httpcore2.URL(scheme=parts.scheme, host=parts.hostname or "", port=parts.port, target=target)
        async with (
            asyncio.timeout(WHOLE_S),
            httpcore2.AsyncConnectionPool(
                ssl_context=context, max_connections=1, max_keepalive_connections=0, network_backend=Guarded(allowed)
            ) as pool,
            pool.stream("POST", to, headers=named, content=body, extensions={"timeout": timeouts}) as answer,
        ):
            asked = next((value for name, value in answer.headers if name.lower() == b"retry-after"), b"")
            return Reply(answer.status, retry_after_s(asked.decode("latin-1")) if asked else None)
    except (TimeoutError, httpcore2.TimeoutException):
        raise Unreachable(f"it did not answer within {WHOLE_S:.0f} s") from None
    except httpcore2.ConnectError as error:
        raise Unreachable(f"no connection: {error}") from None
    except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError, ValueError) as error:
        raise Unreachable(f"the call broke off: {str(error) or type(error).__name__}") from None
