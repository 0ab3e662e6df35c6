"""How an attempt's answer gets to the coordinator: what every way up has in common, and the request of its own."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Protocol

from rma_core.agent.flow import Pipe
from rma_core.errors import RMAError
from rma_core.models.channel import MAX_DATA_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from rma_core.agent.client import CoordinatorClient
    from rma_core.models.worker import AttemptRef, Fault

#: Answers that say to be larger take an HTTP request of their own, beside the channel.
LARGE_ANSWER_BYTES = 1024 * 1024
#: Bytes of an upload that wait inside the agent.
UPLOAD_PIPE_BYTES = 64 * 1024


class LinkLostError(RMAError):
    """The way to the coordinator broke while an answer was on it; the attempt is lost, nobody can be told."""

    code = "link_lost"


class Uplink(Protocol):
    """One attempt's way up.

    Methods raise LinkLostError or a CoordinatorError when the coordinator is not there for it.
    """

    async def accept(self) -> None:
        """Say that the attempt runs."""

    async def head(self, status: int, headers: Sequence[tuple[str, str]], length: int | None) -> None:
        """Send status and headers of the answer; ``length`` is the size of its body when that is known."""

    async def data(self, chunk: bytes) -> None:
        """Send a part of the answer, when the other side has room for it."""

    async def progress(self) -> bool:
        """Say that the attempt lives; return whether that was heard."""

    async def end(self, usage: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Say that the answer is whole."""

    async def error(self, fault: Fault, reason: str) -> None:
        """Say that there will be no (whole) answer, whose fault that is and why."""

    async def abandon(self) -> None:
        """Let go of the attempt without a word: nobody wants to hear of it."""


class BrokenOffError(Exception):
    """Raised inside an upload to break it off: the coordinator must not take what it has for a whole answer."""


class Upload:
    """One streamed answer in an HTTP request of its own."""

    def __init__(
        self, client: CoordinatorClient, ref: AttemptRef, status: int, headers: Sequence[tuple[str, str]]
    ) -> None:
        self._pipe = Pipe(UPLOAD_PIPE_BYTES)
        self._request = asyncio.create_task(client.result(ref, status, headers, self._chunks()))
        self._request.add_done_callback(self._ended)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while chunk := await self._pipe.take(MAX_DATA_BYTES):
            yield chunk

    def _ended(self, request: asyncio.Task[None]) -> None:
        """Wake a writer that waits for room in a request that has ended."""
        error = None if request.cancelled() else request.exception()
        self._pipe.fail(error or LinkLostError("the coordinator ended the upload early"))

    async def write(self, chunk: bytes) -> None:
        """Send a part. Raises CoordinatorError when the coordinator refused the rest."""
        await self._pipe.put(chunk)

    async def finish(self) -> None:
        """End the answer and wait until the coordinator has it. Raises CoordinatorError."""
        self._pipe.end()
        await asyncio.shield(self._request)

    async def abort(self) -> None:
        """Break the answer off."""
        self._pipe.fail(BrokenOffError())
        self._request.cancel()
        with contextlib.suppress(asyncio.CancelledError, BrokenOffError, RMAError):
            await self._request
