"""One attempt: the task's HTTP request goes to a service on this machine, the answer goes up as it comes."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, NamedTuple

from rma_core import http
from rma_core.agent.flow import Pipe
from rma_core.errors import CoordinatorError, UsageProblem
from rma_core.models.channel import MAX_DATA_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from rma_core.agent.uplink import Uplink
    from rma_core.models.worker import Fault, TaskOffer

#: Bytes of an answer that wait between the service and the way up; then the service is held back.
PIPE_BYTES = 64 * 1024
#: Frames smaller than this are gathered under load.
SMALL_BYTES = 4 * 1024
#: Attempts at once from which on small frames are gathered, and for how long.
LOAD_ATTEMPTS = 4
GATHER_S = 0.005
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
    client: http.AsyncClient,
    body: AsyncIterator[bytes] | None,
    uplink: Uplink,
    *,
    crowded: Callable[[], bool] = lambda: False,
) -> Timings:
    """Send the offer's request to the service behind ``client`` and its answer up; return once the answer is whole.

    Raises AttemptFailed, and what the uplink raises. Cancelling it closes the request to the service at once.
    """
    clock = asyncio.get_running_loop().time
    begun = clock()
    try:
        async with asyncio.timeout(offer.total_s):
            response = await _ask(offer, client, body)
            try:
                first_byte = clock() - begun
                headers = passed_on(response.headers.multi_items(), HOP_BY_HOP)
                await uplink.head(response.status_code, headers, _length(response.headers))
                await _relay(response, uplink, offer.gap_s, crowded)
            finally:
                await response.aclose()
    except TimeoutError:
        raise AttemptFailed("service", f"{offer.service} was not done within {offer.total_s:g} s") from None
    timings = Timings(first_byte, clock() - begun)
    await uplink.end({}, timings._asdict())
    return timings


async def _ask(offer: TaskOffer, client: http.AsyncClient, body: AsyncIterator[bytes] | None) -> http.Response:
    """Send the request and return the answer with its body unread."""
    try:
        # The time to the first byte counts from the end of the request's body: a slow upload is not a slow service.
        async with asyncio.timeout(None) as limit:

            def sent() -> None:
                limit.reschedule(asyncio.get_running_loop().time() + offer.first_byte_s)

            if body is None:
                sent()
            content = None if body is None else _steady(body, offer.gap_s, sent)
            request = http.endpoint_request(
                client, offer.method, offer.path, headers=_request_headers(offer), content=content, write_s=offer.gap_s
            )
            return await client.send(request, stream=True)
    except TimeoutError:
        raise AttemptFailed("service", f"{offer.service} did not answer within {offer.first_byte_s:g} s") from None
    except UsageProblem as error:
        raise AttemptFailed("request", error.message) from None
    except http.HTTPError as error:
        words = str(error) or type(error).__name__
        raise AttemptFailed("service", f"{offer.service} broke off before it answered: {words}") from None


async def _steady(body: AsyncIterator[bytes], gap_s: float, sent: Callable[[], None]) -> AsyncIterator[bytes]:
    """Yield a request's body; say when it is all sent, and fail when it stalls."""
    try:
        while True:
            async with asyncio.timeout(gap_s):
                chunk = await anext(body, None)
            if chunk is None:
                break
            yield chunk
    except TimeoutError:
        raise AttemptFailed("coordinator", f"the request's body stalled for {gap_s:g} s") from None
    except CoordinatorError as error:
        raise AttemptFailed("coordinator", f"the request's body could not be had: {error}") from None
    sent()


async def _relay(response: http.Response, uplink: Uplink, gap_s: float, crowded: Callable[[], bool]) -> None:
    """Send the answer's body up; the service is read only as fast as it goes."""
    pipe = Pipe(PIPE_BYTES)
    reader = asyncio.create_task(_read(response, pipe, gap_s))
    try:
        while data := await pipe.take(MAX_DATA_BYTES):
            await uplink.data(data)
            if len(data) < SMALL_BYTES and len(pipe) < SMALL_BYTES and crowded():
                await asyncio.sleep(GATHER_S)
    finally:
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader


async def _read(response: http.Response, pipe: Pipe, gap_s: float) -> None:
    """Read the answer's body into the pipe, whose end or break says how that went."""
    chunks = response.aiter_raw()
    try:
        while True:
            # Only the service's own silence counts, not the time its answer waits for room.
            async with asyncio.timeout(gap_s):
                chunk = await anext(chunks, None)
            if chunk is None:
                pipe.end()
                return
            await pipe.put(chunk)
    except TimeoutError:
        pipe.fail(AttemptFailed("service", f"the answer stalled for {gap_s:g} s"))
    except (http.HTTPError, http.StreamError) as error:
        words = str(error) or type(error).__name__
        pipe.fail(AttemptFailed("service", f"the service broke off in the middle of its answer: {words}"))


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


def _request_headers(offer: TaskOffer) -> list[tuple[str, str]]:
    headers = [*passed_on(offer.headers, NOT_PASSED_ON), ("accept-encoding", "identity")]
    if offer.body_bytes or offer.method in ("POST", "PUT", "PATCH"):
        size = len(offer.body) if offer.body is not None else offer.body_bytes
        headers.append(("content-length", str(size)))
    return headers


def _length(headers: http.Headers) -> int | None:
    text = headers.get("content-length", "")
    return int(text) if text.isdecimal() and len(text) < 20 else None  # noqa: PLR2004 - more digits than a disk has bytes
