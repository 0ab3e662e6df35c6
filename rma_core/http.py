"""HTTP, outgoing: the one module that imports the client library.

Clients for a coordinator (TLS, pinned where asked for); problem documents become the exceptions of `rma_core.errors`,
with their hints. Services on this machine have a client of their own, `rma_core.agent.endpoint`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2
import msgspec
from httpx2 import AsyncClient, Client, Headers, HTTPError, Response, TimeoutException

from rma_core.addresses import is_loopback
from rma_core.errors import (
    CoordinatorError,
    CoordinatorUnreachable,
    Forbidden,
    NotAuthenticated,
    NotFound,
    PlanChanged,
    Refused,
    TryLater,
    UsageProblem,
)
from rma_core.tls import pinned_context

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "AsyncClient",
    "Client",
    "HTTPError",
    "Headers",
    "Response",
    "TimeoutException",
    "check_url",
    "error_of",
    "is_loopback",
    "open_client",
    "open_download_client",
    "open_sync_client",
    "problem_of",
    "raise_for",
    "read_problem",
    "read_problem_sync",
    "read_sync",
    "retry_after_s",
    "tls_context",
    "unreachable",
]

#: Seconds to reach a coordinator.
CONNECT_TIMEOUT_S = 10.0
#: Seconds between two reads or writes of an ordinary call.
CALL_TIMEOUT_S = 30.0
#: Connections a client keeps for the next call.
KEPT_CONNECTIONS = 8
#: A problem document is never read further, nor waited for longer than so many seconds.
MAX_PROBLEM_BYTES = 64 * 1024
PROBLEM_TIMEOUT_S = 10.0
#: The longest answer to an ordinary call, and the seconds in which it must be whole.
MAX_ANSWER_BYTES = 64 * 1024 * 1024
ANSWER_TIMEOUT_S = 120.0
#: The longest wait that another side may ask for.
MAX_RETRY_AFTER_S = 86_400.0

_BY_STATUS: dict[int, type[CoordinatorError]] = {401: NotAuthenticated, 403: Forbidden, 404: NotFound}
_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})


def check_url(url: str, *, insecure_http: bool = False) -> str:
    """Return a coordinator's address without a trailing slash.

    Plain http is refused unless it stays on this machine or ``insecure_http`` says otherwise. Raises UsageProblem.
    """
    wrong = UsageProblem(
        f"{url!r} is not the address of a coordinator", hints=("it looks like https://pool.example:8080",)
    )
    try:
        parts = urlsplit(url.strip())
        port, made = parts.port, httpx2.URL(url.strip())
    except (ValueError, httpx2.InvalidURL):
        raise wrong from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise wrong
    if port == 0 or not made.host:
        raise wrong
    if parts.scheme == "http" and not insecure_http and not is_loopback(parts.hostname):
        raise UsageProblem(
            f"{url} would send credentials in the clear",
            hints=(
                "use the coordinator's https:// address",
                "--insecure-http accepts the risk, on a network you trust",
            ),
        )
    return url.strip().rstrip("/")


def tls_context(certificate: str = "") -> ssl.SSLContext:
    """Return what to trust: the pinned ``certificate`` (PEM) alone, or what this machine trusts."""
    return pinned_context(certificate) if certificate else httpx2.create_ssl_context()


def open_client(
    base_url: str,
    *,
    context: ssl.SSLContext | None = None,
    token: str = "",
    timeout_s: float = CALL_TIMEOUT_S,
) -> AsyncClient:
    """Return a client for a coordinator; close it with ``aclose``."""
    return AsyncClient(**_options(base_url, context, token, timeout_s))


def open_sync_client(
    base_url: str,
    *,
    context: ssl.SSLContext | None = None,
    token: str = "",
    timeout_s: float = CALL_TIMEOUT_S,
) -> Client:
    """Return a blocking client for a coordinator; close it with ``close``."""
    return Client(**_options(base_url, context, token, timeout_s))


def open_download_client(*, context: ssl.SSLContext | None = None, silence_s: float) -> AsyncClient:
    """Return a client for large files of strangers: no credentials, proxies or redirects; close it with ``aclose``."""
    return AsyncClient(
        verify=context or tls_context(),
        timeout=httpx2.Timeout(silence_s, connect=CONNECT_TIMEOUT_S),
        limits=httpx2.Limits(max_keepalive_connections=0),
        trust_env=False,
        follow_redirects=False,
    )


def _options(base_url: str, context: ssl.SSLContext | None, token: str, timeout_s: float) -> dict[str, Any]:
    host = urlsplit(base_url).hostname or ""
    secure = base_url.startswith("https:")
    return {
        "base_url": base_url,
        "verify": (context or tls_context()) if secure else _trusts_nobody(),
        "headers": {"Authorization": f"Bearer {token}"} if token else {},
        "timeout": httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
        # Many results may stream up at once beside the calls, so connections are not capped; each task bounds its own.
        "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=KEPT_CONNECTIONS),
        # A proxy from the environment is for the way out of this network, never for this machine.
        "trust_env": not is_loopback(host),
        "follow_redirects": False,
    }


def _trusts_nobody() -> ssl.SSLContext:
    """Return a context for clients that speak no TLS: making a real one would cost 20 ms and some MB."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def problem_of(content: bytes) -> Mapping[str, Any]:
    """Return a problem document's members; an empty mapping when it is none."""
    try:
        value = msgspec.json.decode(content[:MAX_PROBLEM_BYTES])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def error_of(status: int, headers: Mapping[str, str], content: bytes) -> CoordinatorError:
    """Return the exception that an answer with an error status means."""
    problem = problem_of(content)
    text = problem.get("detail") or problem.get("title") or f"the coordinator answered {status}"
    message, hints = _line(text), [_line(hint) for hint in _list(problem.get("hints"))]
    if status in _BY_STATUS:
        return _BY_STATUS[status](message, hints=hints)
    if status in _LATER:
        return TryLater(message, retry_after_s=retry_after_s(headers.get("retry-after")), hints=hints)
    return (PlanChanged if problem.get("code") == PlanChanged.code else Refused)(message, hints=hints)


async def raise_for(response: Response) -> Response:
    """Return a good answer as it is; read a bad one as far as it is worth and raise the exception that it means."""
    if response.is_success:
        return response
    raise error_of(response.status_code, response.headers, await read_problem(response))


async def read_problem(response: Response) -> bytes:
    """Return the beginning of an error's body, streamed or already read, and close the response.

    At most MAX_PROBLEM_BYTES, and what has come within PROBLEM_TIMEOUT_S. Raises HTTPError.
    """
    content = bytearray()
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBLEM_TIMEOUT_S), contextlib.aclosing(response.aiter_bytes()) as chunks:
                async for chunk in chunks:
                    content += chunk[: MAX_PROBLEM_BYTES - len(content)]
                    if len(content) >= MAX_PROBLEM_BYTES:
                        break
    finally:
        await response.aclose()
    return bytes(content)


def read_problem_sync(response: Response) -> bytes:
    """Return the beginning of an error's body, at most MAX_PROBLEM_BYTES, and close the response. Raises HTTPError."""
    content = bytearray()
    try:
        for chunk in response.iter_bytes():
            content += chunk[: MAX_PROBLEM_BYTES - len(content)]
            if len(content) >= MAX_PROBLEM_BYTES:
                break
    finally:
        response.close()
    return bytes(content)


def read_sync(response: Response, *, limit_bytes: int = MAX_ANSWER_BYTES, within_s: float = ANSWER_TIMEOUT_S) -> bytes:
    """Return a streamed answer's whole body. Raises CoordinatorError for one too long or too slow, HTTPError."""
    content, ends = bytearray(), time.monotonic() + within_s
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > limit_bytes:
            raise CoordinatorError(f"the coordinator's answer is longer than {limit_bytes} bytes")
        if time.monotonic() > ends:
            raise CoordinatorUnreachable(f"the coordinator's answer was not whole within {within_s:.0f} s")
    return bytes(content)


def unreachable(url: str, error: Exception) -> CoordinatorUnreachable:
    """Return the exception for a call that got no answer at all."""
    words = _line(error) or type(error).__name__
    if isinstance(error, TimeoutException):
        words = f"no answer in time ({type(error).__name__})"
    hints = ("check the address and the network, and whether the coordinator is running",)
    return CoordinatorUnreachable(f"the coordinator at {url} cannot be reached: {words}", hints=hints)


def retry_after_s(text: str | None) -> float | None:
    """Return a Retry-After in seconds, at most MAX_RETRY_AFTER_S; RMA's programs do not use the date form."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def _list(value: object) -> list[object]:
    return value[:8] if isinstance(value, list) else []


def _line(value: object) -> str:
    """Return text from outside as one printable line, cut at 500 characters."""
    return "".join(c if c.isprintable() else " " for c in str(value))[:500].strip()
