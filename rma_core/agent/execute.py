"""One attempt: the task's HTTP request goes to a service on this machine, the answer goes up as it comes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from rma_core.agent.endpoint import EndpointError
from rma_core.agent.incoming import NotNowError
from rma_core.errors import CoordinatorError, UsageProblem
from rma_core.models.channel import MAX_DATA_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    from rma_core.agent.endpoint import Client, Reply
    from rma_core.agent.uplink import Uplink
    from rma_core.models.worker import Fault, TaskOffer

#: Frames smaller than this are gathered under load.
SMALL_BYTES = 4 * 1024
#: Attempts at once from which on small frames are gathered, and for how long.
LOAD_ATTEMPTS = 4
GATHER_S = 0.005
#: A request's body up to this size is sent once it is whole: in one piece, over a kept connection.
WHOLE_BODY_BYTES = MAX_DATA_BYTES
#: Headers of an answer, all together; servers take 16 KiB of headers, and ours stand in one.
MAX_HEADER_BYTES = 8 * 1024
MAX_HEADERS = 64

#: Headers about one connection (RFC 9110, 7.6.1); each connection has its own.
HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
})  # fmt: skip
#: Headers of a request that the agent sets itself, or that are none of the service's business.
NOT_PASSED_ON = HOP_BY_HOP | {"accept-encoding", "authorization", "content-length", "cookie", "expect", "host"}


class AttemptFailed(Exception):
    """An attempt ended without a whole answer: whose fault that is, and why."""

    def __init__(self, fault: Fault, reason: str) -> None:
        super().__init__(reason)
        self.fault, self.reason = fault, reason


class Timings(NamedTuple):
    """Seconds from the start of an attempt to the first byte of its answer and to its end."""

    first_byte: float
    total: float


async def forward(
    offer: TaskOffer,
    endpoint: Client,
    body: AsyncGenerator[bytes, None] | bytes | None,
    uplink: Uplink,
    *,
    crowded: Callable[[], bool] = lambda: False,
) -> Timings:
    """Send the offer's request to the service at ``endpoint`` and its answer up; return once the answer is whole.

    Raises AttemptFailed, and what the uplink raises. Cancelling it closes the request to the service at once.
    """
    clock = asyncio.get_running_loop().time
    begun = clock()
    try:
        async with asyncio.timeout(offer.total_s):
            answer = await _ask(offer, endpoint, body)
            try:
                first_byte = clock() - begun
                headers = passed_on(answer.headers, HOP_BY_HOP)
                await uplink.head(answer.status, headers, _length(answer.headers), more=answer.ready)
                await _relay(answer, uplink, offer.gap_s, crowded)
            finally:
                await answer.aclose()
    except TimeoutError:
        raise AttemptFailed("service", f"{offer.service} was not done within {offer.total_s:g} s") from None
    timings = Timings(first_byte, clock() - begun)
    await uplink.end({}, timings._asdict())
    return timings


async def _ask(offer: TaskOffer, endpoint: Client, body: AsyncGenerator[bytes, None] | bytes | None) -> Reply:
    """Send the request and return the answer with its body unread."""
    if body is not None and not isinstance(body, bytes):
        body = _steady(body, offer)
        if offer.body_bytes <= WHOLE_BODY_BYTES:
            body = b"".join([chunk async for chunk in body])
    try:
        return await endpoint.request(
            offer.method,
            offer.path,
            headers=(*passed_on(offer.headers, NOT_PASSED_ON), ("accept-encoding", "identity")),
            body=body,
            length=offer.body_bytes if offer.body_bytes or offer.method in ("POST", "PUT", "PATCH") else None,
            write_s=offer.gap_s,
            # It counts from the end of the request's body: a slow upload is not a slow service.
            answer_s=offer.first_byte_s,
        )
    except TimeoutError:
        raise AttemptFailed("service", f"{offer.service} did not answer within {offer.first_byte_s:g} s") from None
    except UsageProblem as error:
        raise AttemptFailed("request", error.message) from None
    except NotNowError as error:
        raise AttemptFailed("owner", str(error)) from None
    except EndpointError as error:
        raise AttemptFailed("service", f"{offer.service} broke off before it answered: {error}") from None


async def _steady(body: AsyncGenerator[bytes, None], offer: TaskOffer) -> AsyncGenerator[bytes, None]:
    """Yield a request's body; fail when it stalls, or has another size than announced."""
    size = 0
    try:
        while size <= offer.body_bytes:
            async with asyncio.timeout(offer.gap_s):
                chunk = await anext(body, None)
            if chunk is None:
                break
            size += len(chunk)
            yield chunk
    except TimeoutError:
        raise AttemptFailed("coordinator", f"the request's body stalled for {offer.gap_s:g} s") from None
    except CoordinatorError as error:
        raise AttemptFailed("coordinator", f"the request's body could not be had: {error}") from None
    if size != offer.body_bytes:
        raise AttemptFailed("coordinator", f"the request's body has not the {offer.body_bytes} bytes it should have")


async def _relay(answer: Reply, uplink: Uplink, gap_s: float, crowded: Callable[[], bool]) -> None:
    """Send the answer's body up; the service is read only as fast as it goes."""
    while data := await _read(answer, gap_s):
        await uplink.data(data, more=answer.ready)
        if len(data) < SMALL_BYTES and not answer.over and crowded():
            await asyncio.sleep(GATHER_S)


async def _read(answer: Reply, gap_s: float) -> bytes:
    """Return what has come of the answer. Only the service's own silence counts, not the time it waits for room."""
    try:
        return await answer.read(MAX_DATA_BYTES, within_s=gap_s)
    except TimeoutError:
        raise AttemptFailed("service", f"the answer stalled for {gap_s:g} s") from None
    except EndpointError as error:
        raise AttemptFailed("service", f"the service broke off in the middle of its answer: {error}") from None


def passed_on(headers: Iterable[tuple[str, str]], without: frozenset[str]) -> tuple[tuple[str, str], ...]:
    """Return headers that may go on: none about this connection, none that the contract would refuse."""
    pairs = [(name.lower(), value) for name, value in headers]
    named = {part.strip().lower() for name, value in pairs if name == "connection" for part in value.split(",")}
    kept: list[tuple[str, str]] = []
    room = MAX_HEADER_BYTES
    for name, value in pairs:
        size = len(name) + len(value.encode()) + 8
        if name not in without and name not in named and size <= room and len(kept) < MAX_HEADERS:
            kept.append((name, value))
            room -= size
    return tuple(kept)


def _length(headers: Iterable[tuple[str, str]]) -> int | None:
    text = next((value for name, value in headers if name == "content-length"), "")
    return int(text) if text.isdecimal() and len(text) < 20 else None  # noqa: PLR2004 - more digits than a disk has bytes
