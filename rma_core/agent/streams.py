"""One attempt on the channel: its request body coming down, its answer going up, each within a window."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from rma_core.agent.answers import LinkLostError
from rma_core.agent.execute import AttemptFailed
from rma_core.agent.flow import Pipe, Window
from rma_core.agent.uplink import LARGE_ANSWER_BYTES, Upload
from rma_core.models import channel as frames
from rma_core.models.worker import AttemptRef, TaskComplete

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from rma_core.agent.answers import Answers, Copy
    from rma_core.agent.channel import Channel
    from rma_core.agent.client import CoordinatorClient
    from rma_core.models.worker import Fault, TaskOffer

#: Taken bytes of a request body are given back in portions, so that credit does not cost a frame for each frame.
CREDIT_BYTES = frames.WINDOW_BYTES // 4
#: A reason is cut here; the contract takes no longer one.
MAX_REASON = 2000


class ChannelStream:
    """One attempt on the channel; an `Uplink`.

    Its answer goes over the channel, by a request of its own (large, or the channel stayed away), or, when the channel
    breaks in the middle of it, only into a copy that is delivered once it is whole.
    """

    def __init__(
        self, channel: Channel, client: CoordinatorClient, answers: Answers, number: int, offer: TaskOffer
    ) -> None:
        self.number, self.offer = number, offer
        self.ref = AttemptRef(task_id=offer.task_id, attempt=offer.attempt, lease_id=offer.lease_id)
        #: Set while frames may be sent, and once the attempt must do without the channel.
        self.go = asyncio.Event()
        self.go.set()
        #: The answer does without the channel from here on.
        self.detached = False
        self._channel, self._client, self._answers = channel, client, answers
        self._window = Window()
        self._copy: Copy | None = None
        self._upload: Upload | None = None
        self._body = Pipe(frames.WINDOW_BYTES)
        self._body_left = offer.body_bytes
        self._body_due = 0
        self._body_ended = offer.body_url is not None or not offer.body_bytes or offer.body is not None

    def broke(self) -> bool:
        """The channel broke: say whether the attempt goes on.

        Its request must be here whole, and of its answer nothing sent, or all of that kept.
        """
        if self._upload is not None:
            return True
        if not self._body_ended or (self._copy is not None and not self._copy.kept):
            return False
        if self._copy is None:
            self.go.clear()
        else:
            self.detach()
        return True

    def detach(self) -> None:
        """Do without the channel from here on."""
        self.detached = True
        self.go.set()
        self._window.open()

    def body(self) -> AsyncGenerator[bytes, None] | bytes | None:
        """Return the request's body, whole when it is here, else as it comes; ``None`` when there is none."""
        if self.offer.body_url is not None:
            return self._client.body(self.offer)
        if self.offer.body is not None:
            return self.offer.body or None
        if not self.offer.body_bytes:
            return None
        return self._body.whole() or self._read_body()

    async def _read_body(self) -> AsyncGenerator[bytes, None]:
        while chunk := await self._body.take(frames.MAX_DATA_BYTES):
            yield chunk
            self._body_due += len(chunk)
            if self._body_due >= CREDIT_BYTES:
                due, self._body_due = self._body_due, 0
                # Without a channel nothing more comes: what is here already is all there will be.
                with contextlib.suppress(LinkLostError):
                    await self._send(frames.Credit(stream=self.number, bytes=due))

    def take_body(self, data: bytes, *, end: bool) -> bool:
        """Take a BODY frame; say whether it kept to the window and the announced size."""
        if len(data) > self._body_left or len(self._body) + len(data) > frames.WINDOW_BYTES:
            return False
        self._body_left -= len(data)
        self._body.feed(data)
        if end and self._body_left:
            self._body.fail(LinkLostError("the request's body ended early"))
        elif end or not self._body_left:
            self._body_ended = True
            self._body.end()
        return True

    def credit(self, count: int) -> None:
        """Take a CREDIT frame."""
        self._window.give(count)

    async def accept(self) -> None:
        """Say that the attempt runs; when the channel breaks, HELLO says it instead."""
        with contextlib.suppress(LinkLostError):
            # A quick service has answered in the meantime: then both leave together.
            await self._channel.send(frames.pack(frames.Accept(stream=self.number)), more=True)

    async def head(
        self, status: int, headers: Sequence[tuple[str, str]], length: int | None, *, more: bool = False
    ) -> None:
        """Send status and headers; a large or late answer opens an HTTP request of its own instead."""
        await self.go.wait()
        self._copy = self._answers.copy(self.ref, status, headers, length)
        if self.detached or (length or 0) > LARGE_ANSWER_BYTES:
            self._upload = Upload(self._client, self._answers, self._copy)
        else:
            await self._send_or_detach(
                frames.pack(frames.Head(stream=self.number, status=status, headers=tuple(headers))), more=more
            )

    async def data(self, chunk: bytes, *, more: bool = False) -> None:
        """Send a part of the answer as the window allows, or only keep it."""
        if self._upload is not None:
            await self._upload.write(chunk)
            return
        copy = self._copy
        assert copy is not None  # noqa: S101 - an answer begins with its head
        copy.add(chunk)
        while chunk and not self.detached:
            count = await self._room(min(len(chunk), frames.MAX_DATA_BYTES))
            if not self.detached:
                await self._send_or_detach(frames.pack_data(self.number, chunk[:count]), more=more)
                chunk = chunk[count:]
        if self.detached and not copy.kept:
            raise LinkLostError("the channel broke, and the answer is too large to be kept")

    async def _room(self, count: int) -> int:
        """Wait for the window to open, but not for ever: a coordinator may have forgotten the stream."""
        if self._window.is_open:
            return await self._window.take(count)
        gap_s = self.offer.gap_s
        try:
            async with asyncio.timeout(gap_s):
                return await self._window.take(count)
        except TimeoutError:
            raise AttemptFailed("coordinator", f"nobody took more of the answer for {gap_s:g} s") from None

    async def _send_or_detach(self, message: str | bytes, *, more: bool = False) -> None:
        """Send a part of the answer; when the channel is broken, go on without it if that can be."""
        try:
            await self._channel.send(message, more=more)
        except LinkLostError:
            if not self.broke():
                raise

    async def progress(self) -> bool:
        """Say that the attempt lives, and wait until that has been read."""
        return await self._channel.sign(frames.Progress(stream=self.number))

    def late(self) -> None:
        """From here on nothing goes over the channel: the coordinator may take no frames of this lease any more."""
        if self._upload is None:
            self.detach()

    async def end(self, usage: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Say that the answer is whole, once it all has arrived where it takes a request of its own; else keep it."""
        frame = frames.pack(frames.End(stream=self.number, usage=dict(usage), timings=dict(timings)))
        if self._upload is not None:
            await self._upload.finish()
            # The upload has closed the attempt; this only closes its stream, where there still is one.
            with contextlib.suppress(LinkLostError):
                await self._channel.send(frame)
        elif self._copy is not None:
            if not self.detached:
                await self._send_or_detach(frame)
            copy, self._copy = self._copy, None
            (self._answers.keep if self.detached else self._answers.sent)(copy)
        self._channel.drop(self)

    async def error(self, fault: Fault, reason: str) -> None:
        """Say that there is no whole answer."""
        await self.abandon()
        if self.detached:
            await self._client.complete(closing(self.ref, fault, reason))
        else:
            await self._send(frames.Error(stream=self.number, fault=fault, reason=reason[:MAX_REASON]))

    async def abandon(self) -> None:
        """Break an upload off, keep nothing, and forget the stream."""
        self._channel.drop(self)
        if self._copy is not None and self._upload is None:
            self._copy.drop()
        if self._upload is not None:
            await self._upload.abort()

    async def _send(self, frame: frames.Frame) -> None:
        await self._channel.send(frames.pack(frame))


def closing(ref: AttemptRef, fault: Fault, reason: str) -> TaskComplete:
    """Return the record that closes an attempt without an answer; what the owner stops is returned, not failed."""
    return TaskComplete(
        task_id=ref.task_id,
        attempt=ref.attempt,
        lease_id=ref.lease_id,
        status="returned" if fault == "owner" else "failed",
        fault=fault,
        reason=reason[:MAX_REASON],
    )
