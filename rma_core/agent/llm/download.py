"""One file over https: taken up where it broke off, never longer than it should be, from no address of this network.

Whose address it is, a coordinator says, and no coordinator is trusted with this machine's network: a name is looked up
here, and only public addresses are connected to, unless the owner has named the host. Redirects are followed a few
times, each under the same rule.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urljoin, urlsplit

from rma_core import http
from rma_core.addresses import is_public
from rma_core.backoff import Backoff
from rma_core.errors import DownloadFailed, ModelMissing, OutOfSpace

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, Callable, Collection
    from pathlib import Path

    from rma_core.models.weights import ModelFile

logger = logging.getLogger(__name__)

#: Seconds until a server must have sent the next bytes, and until something must have come although tries broke off.
SILENCE_S, STALL_S = 60.0, 300.0
#: Redirects that are followed; shops of files send each download elsewhere once.
MAX_REDIRECTS = 5
#: Bytes that are gathered before they are written, and after which the disk is looked at again.
PIECE_BYTES, LOOK_BYTES = 2**20, 64 * 2**20
#: Seconds between two tries: at first, and at most.
RETRY_BASE_S, RETRY_CAP_S = 1.0, 60.0
OK, PARTIAL, RANGE_WRONG = 200, 206, 416
MOVED = frozenset({301, 302, 303, 307, 308})
#: What a server says of a file that it will not give, however often it is asked.
NEVER = frozenset({400, 401, 403, 404, 405, 410, 451})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Rules(NamedTuple):
    """What the owner allows: ``hosts`` named by them (empty: any public one), and what tells that the disk is short.

    A host may be named with its port: ``models.example:8443``. ``context`` is whom to trust, this machine's own
    authorities where there is none.
    """

    hosts: Collection[str] = ()
    short: Callable[[], str] = lambda: ""
    context: ssl.SSLContext | None = None


class _CutError(Exception):
    """A try broke off; the next one may go on."""

    def __init__(self, words: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(words)
        self.retry_after_s = retry_after_s


class _Place(NamedTuple):
    """Where a request goes: the address that was checked, under the name that its certificate is for."""

    url: str
    host: str
    headers: dict[str, str]


async def download(
    file: ModelFile, part: Path, *, rules: Rules, told: Callable[[int], None] = lambda _: None,
    stall_s: float = STALL_S, backoff: Backoff | None = None, clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Bring ``part`` to the file's size, going on from what is there; ``told`` gets the bytes there are.

    Its hash is the caller's to check. Raises ModelMissing when no try can help, DownloadFailed after ``stall_s``
    without a new byte, OutOfSpace, with nothing left of it, when the disk gets short.
    """
    backoff = backoff or Backoff(base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S)
    have, moved_at = _size(part, most=file.size_bytes), clock()
    furthest = have
    told(have)
    async with _client(rules) as client:
        while have < file.size_bytes:
            try:
                async with contextlib.aclosing(_once(client, file, part, have, rules)) as steps:
                    async for have in steps:
                        told(have)
            except _CutError as cut:
                words = str(cut)
                logger.debug("%s broke off at %d bytes: %s", file.name, have, words)
                have = _size(part, most=file.size_bytes)
                # What comes for the second time is no step forward, or a file that is too short would come for ever.
                if have > furthest:
                    furthest, moved_at = have, clock()
                    backoff.reset()
                elif clock() - moved_at >= stall_s:
                    message = f"{file.name}: nothing came for {clock() - moved_at:.0f} s: {words}"
                    raise DownloadFailed(message) from None
                await asyncio.sleep(min(stall_s, backoff.next_s(cut.retry_after_s)))


def _client(rules: Rules) -> http.AsyncClient:
    return http.open_download_client(context=rules.context, silence_s=SILENCE_S)


def _size(part: Path, *, most: int) -> int:
    """Return how much of a file there is; what is longer than it should be is nothing."""
    with contextlib.suppress(FileNotFoundError):
        size = part.stat().st_size
        if size <= most:
            return size
        part.unlink()
    return 0


async def _once(
    client: http.AsyncClient, file: ModelFile, part: Path, have: int, rules: Rules
) -> AsyncGenerator[int, None]:  # fmt: skip
    """Make one request and write what comes; yield how many bytes there are. Raises _CutError."""
    url = file.url
    for _ in range(MAX_REDIRECTS + 1):
        place = await _place(url, rules)
        headers = {**place.headers, "accept-encoding": "identity", **({"range": f"bytes={have}-"} if have else {})}
        request = client.build_request("GET", place.url, headers=headers, extensions={"sni_hostname": place.host})
        try:
            response = await client.send(request, stream=True)
        except http.HTTPError as error:
            raise _CutError(_words(error)) from None
        try:
            if response.status_code in MOVED:
                url = _next(url, response.headers.get("location", ""))
                continue
            begin = _begin(response, place.host, file, part, have)
            async with contextlib.aclosing(_written(response, file, part, begin, rules)) as steps:
                async for now in steps:
                    yield now
            return
        finally:
            await response.aclose()
    raise ModelMissing(f"{file.name}: {urlsplit(file.url).hostname} sends on and on, more than {MAX_REDIRECTS} times")


def _next(url: str, location: str) -> str:
    """Return where a redirect leads; what is no address is refused like any other that is not allowed."""
    try:
        return urljoin(url, location)
    except ValueError:
        return location


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


async def _place(url: str, rules: Rules) -> _Place:
    """Return where a request may go. Raises ModelMissing for an address that is not allowed, _CutError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 443
    except ValueError:
        parts, host, port = urlsplit(""), "", 0
    if parts.scheme != "https" or not host or "@" in parts.netloc:
        raise ModelMissing(f"files are downloaded over https only, not from {url[:200]!r}")
    named = host in rules.hosts or f"{host}:{port}" in rules.hosts
    if rules.hosts and not named:
        message = f"the owner of this machine downloads from {', '.join(sorted(rules.hosts))} only, not from {host}"
        raise ModelMissing(message)
    address = await _address(host, port, named=named)
    shown = f"[{address}]" if ":" in address else address
    target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
    return _Place(f"https://{shown}:{port}{target}", host, {"host": parts.netloc})


async def _address(host: str, port: int, *, named: bool) -> str:
    """Look a name up, and return an address that may be connected to. Raises ModelMissing, _CutError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, proto=6)
    except OSError as error:
        raise _CutError(f"{host} is not found: {error}") from None
    addresses = [str(one[4][0]) for one in found]
    allowed = [one for one in addresses if named or is_public(one)]
    if not allowed:
        raise ModelMissing(
            f"{host} is in a private network ({', '.join(addresses[:3])})",
            hints=("the owner can allow it by its name: `model_hosts` in the settings",),
        )
    return allowed[0]


def _begin(response: http.Response, host: str, file: ModelFile, part: Path, have: int) -> int:
    """Return from which byte on the answer goes. Raises _CutError, ModelMissing."""
    status = response.status_code
    if status in NEVER:
        raise ModelMissing(f"{file.name}: {host} answers {status}; is the address right, and free to all?")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise ModelMissing(f"{file.name}: it comes packed, although it was asked for as it is")
    if status == PARTIAL and response.headers.get("content-range", "") == (
        f"bytes {have}-{file.size_bytes - 1}/{file.size_bytes}"
    ):
        return have
    if status == OK:
        _right_size(response, file)
        return 0
    # What is there does not fit to what the server has; it begins anew.
    if status in (PARTIAL, RANGE_WRONG):
        part.unlink(missing_ok=True)
    raise _CutError(
        f"the server answers {status}", retry_after_s=http.retry_after_s(response.headers.get("retry-after"))
    )


def _right_size(response: http.Response, file: ModelFile) -> None:
    told = response.headers.get("content-length", "")
    if told.isdecimal() and int(told[:20]) != file.size_bytes:
        raise ModelMissing(f"{file.name}: it should have {file.size_bytes} bytes, and the server has {told[:20]}")


async def _written(
    response: http.Response, file: ModelFile, part: Path, begin: int, rules: Rules
) -> AsyncGenerator[int, None]:  # fmt: skip
    """Append what comes to ``part``; yield how many bytes it has."""
    writing = await asyncio.to_thread(part.open, "r+b" if begin else "wb")
    try:
        await asyncio.to_thread(writing.seek, begin)
        done = looked_at = begin
        async with contextlib.aclosing(_pieces(response)) as pieces:
            async for piece in pieces:
                if done + len(piece) > file.size_bytes:
                    raise ModelMissing(f"{file.name}: more comes than the {file.size_bytes} bytes it should have")
                await asyncio.to_thread(writing.write, piece)
                done += len(piece)
                if done - looked_at >= LOOK_BYTES:
                    looked_at = done
                    if words := await asyncio.to_thread(rules.short):
                        raise OutOfSpace(words)
                yield done
    except OSError as error:
        if error.errno in FULL:
            raise OutOfSpace(f"the disk that holds {part.parent} is full") from None
        raise DownloadFailed(f"{file.name} cannot be written: {error.strerror or error}") from None
    finally:
        await asyncio.shield(asyncio.to_thread(writing.close))
    if done < file.size_bytes:
        raise _CutError("the server closed the connection")


async def _pieces(response: http.Response) -> AsyncGenerator[bytes, None]:
    """Yield the body in pieces worth a write, and what came of it when it breaks off. Raises _CutError."""
    gathered = bytearray()
    broken: _CutError | None = None
    try:
        async with contextlib.aclosing(response.aiter_raw()) as chunks:
            async for chunk in chunks:
                gathered += chunk
                if len(gathered) >= PIECE_BYTES:
                    yield bytes(gathered)
                    gathered.clear()
    except http.HTTPError as error:
        broken = _CutError(_words(error))
    if gathered:
        yield bytes(gathered)
    if broken is not None:
        raise broken
