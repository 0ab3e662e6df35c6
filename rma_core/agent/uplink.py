"""How an attempt's answer gets to the coordinator: what every way up has in common, and the request of its own."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Protocol

from rma_core.agent.answers import NOT_NOW, LinkLostError
from rma_core.agent.flow import Pipe
from rma_core.errors import RMAError
from rma_core.models.channel import MAX_DATA_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from rma_core.agent.answers import Answers, Copy
    from rma_core.agent.client import CoordinatorClient
    from rma_core.models.worker import Fault

__all__ = ["LARGE_ANSWER_BYTES", "BrokenOffError", "LinkLostError", "Uplink", "Upload"]

#: Answers that say to be larger take an HTTP request of their own, beside the channel.
LARGE_ANSWER_BYTES = 1024 * 1024
#: Bytes of an upload that wait inside the agent.
UPLOAD_PIPE_BYTES = 64 * 1024
#: Why an upload is lost whose token was refused in the middle of it.
TOO_LATE_AGAIN = "the token was refused, and what has been sent is not here any more"


class Uplink(Protocol):
    """One attempt's way up.

    Methods raise LinkLostError or a CoordinatorError when the coordinator is not there for it.
    """

    async def accept(self) -> None:
        """Say that the attempt runs."""

    async def head(
        self, status: int, headers: Sequence[tuple[str, str]], length: int | None, *, more: bool = False
    ) -> None:
        """Send status and headers of the answer; ``length`` is the size of its body when that is known.

        ``more`` follows at once, so that both may leave together; so for `data`.
        """

    async def data(self, chunk: bytes, *, more: bool = False) -> None:
        """Send a part of the answer, when the other side has room for it."""

    async def progress(self) -> bool:
        """Say that the attempt lives; return whether the coordinator can have heard that."""

    def late(self) -> None:
        """Its lease may have ended: from here on it is delivered late, or not at all."""

    async def end(self, usage: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Say that the answer is whole, or keep it until it can be delivered."""

    async def error(self, fault: Fault, reason: str) -> None:
        """Say that there will be no (whole) answer, whose fault that is and why."""

    async def abandon(self) -> None:
        """Let go of the attempt without a word: nobody wants to hear of it."""


class BrokenOffError(Exception):
    """Raised inside an upload to break it off: the coordinator must not take what it has for a whole answer."""


class Upload:
    """One streamed answer in an HTTP request of its own; when that breaks, a small one is kept and delivered later."""

    def __init__(self, client: CoordinatorClient, answers: Answers, copy: Copy) -> None:
        self._answers, self._copy = answers, copy
        self._pipe = Pipe(UPLOAD_PIPE_BYTES)
        self._taken = 0
        self._broken = self._over = False
        self._request = asyncio.create_task(client.result(copy.ref, copy.status, copy.headers, self._chunks))
        self._request.add_done_callback(self._ended)

    async def _chunks(self) -> AsyncIterator[bytes]:
        """Yield the answer; a second time (a token was refused) from its beginning, when that is still here."""
        if self._taken:
            if not self._copy.kept:
                raise BrokenOffError
            yield bytes(self._copy.body[: self._taken])
        while chunk := await self._pipe.take(MAX_DATA_BYTES):
            self._taken += len(chunk)
            yield chunk

    def _ended(self, request: asyncio.Task[None]) -> None:
        """Wake a writer that waits for room in a request that has ended."""
        error = None if request.cancelled() else request.exception()
        if isinstance(error, BrokenOffError):
            error = LinkLostError(TOO_LATE_AGAIN)
        self._pipe.fail(error or LinkLostError("the coordinator ended the upload early"))

    async def write(self, chunk: bytes) -> None:
        """Send a part. Raises CoordinatorError when the coordinator refused the rest, or is away for a large one."""
        self._copy.add(chunk)
        if not self._broken:
            try:
                await self._pipe.put(chunk)
            except NOT_NOW:
                self._broken = True
                if not self._copy.kept:
                    raise
        elif not self._copy.kept:
            raise LinkLostError("the upload broke off, and the answer is too large to be kept")

    async def finish(self) -> None:
        """End the answer and wait until the coordinator has it, or it is kept. Raises CoordinatorError."""
        if not self._broken:
            self._pipe.end()
            try:
                await asyncio.shield(self._request)
            except BrokenOffError:
                raise LinkLostError(TOO_LATE_AGAIN) from None
            except NOT_NOW:
                if not self._copy.kept:
                    raise
            else:
                self._over = True
                self._copy.drop()
                return
        self._answers.keep(self._copy)
        self._over = True

    async def abort(self) -> None:
        """Break the answer off, unless it is over: then it is no longer this attempt's."""
        if not self._over:
            self._copy.drop()
        self._pipe.fail(BrokenOffError())
        self._request.cancel()
        with contextlib.suppress(asyncio.CancelledError, BrokenOffError, RMAError):
            await self._request
