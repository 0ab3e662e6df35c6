"""What one client under /v1 gets of a run: all of it, the rest of it, or why there is none; or what was kept of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rma_coordinator.api.asgi import Gone, raw
from rma_coordinator.api.inference import CutAnswer
from rma_coordinator.api.problems import status_of
from rma_coordinator.api.v1 import errors as openai_errors
from rma_coordinator.api.v1.clients import Client, Quiet
from rma_coordinator.api.v1.jobs import EVENT_STREAM, PLAIN
from rma_coordinator.api.v1.sse import COMMENT, Stream
from rma_core.errors import RMAError
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from rma_coordinator.api.asgi import Call
    from rma_coordinator.api.v1.requests import Manner
    from rma_coordinator.api.v1.runs import Run
    from rma_coordinator.domain.repeats import Kept

#: A stream is never silent for longer; its status goes out after this at the latest.
SILENCE_S = 10.0
#: A whole answer is kept alive after so long where its client asked for that. Then errors cannot have a status.
KEPT_ALIVE_AFTER_S = 20.0
#: An SDK that did not ask is kept alive once its wait is likely to pass the minute after which many proxies cut it.
LONG_WAIT_S = 50.0
#: And then so often.
BLANK_EVERY_S = 15.0
RAW_EVENT_STREAM, RAW_PLAIN = raw(EVENT_STREAM), raw(PLAIN)
JOINED = (b"x-rma-joined", b"1")
#: May stand before JSON, and is no part of it.
BLANK = b"\n"


async def follow(run: Run, call: Call, how: Manner, *, asked_at: float, joined: bool = False) -> None:
    """Give a client what a run gives, until it has all of it or leaves; it began to wait at ``asked_at``.

    Raises RMAError while a status can still say what went wrong, Gone, CutAnswer.
    """
    streams = run.job.asked.stream

    def opening() -> list[tuple[bytes, bytes]]:
        found = [*(RAW_EVENT_STREAM if streams else RAW_PLAIN), *run.raw_headers()]
        found += raw(openai_errors.noted(call))
        return [*found, JOINED] if joined else found

    begun = run.replay()
    quiet = _stream_quiet(how) if streams else _whole_quiet(how)
    client = Client(call, how, opening=opening, quiet=quiet, clock=run.job.pool.clock, asked_at=asked_at)
    run.join(client)
    try:
        if begun:
            await client.send(begun, more=not run.done)
        await client.over
        if not run.done:
            if not client.ended:
                raise Gone
            # It was quick to leave with the end of its answer, of which its run does not know yet that it is out.
            await client.flush()
            return
        await client.settle()
        await _finish(run, client)
    finally:
        client.close()
        run.leave(client)


def _stream_quiet(how: Manner) -> Quiet:
    silence_s = how.third_s(SILENCE_S)
    return Quiet(silence_s, silence_s, COMMENT)


def _whole_quiet(how: Manner) -> Quiet | None:
    if how.keep_alive:
        return Quiet(how.third_s(KEPT_ALIVE_AFTER_S), how.third_s(BLANK_EVERY_S), BLANK)
    # One with less patience than that asks again, and joins.
    return Quiet(LONG_WAIT_S, how.third_s(BLANK_EVERY_S), BLANK) if how.sdk else None


async def _finish(run: Run, client: Client) -> None:
    """Send the end of an answer, whole or not, where it has not gone out already."""
    call, stream = client.call, run.stream
    if run.work.cancelled():
        raise Gone
    try:
        body = run.work.result()
    except RMAError as error:
        if not call.started:
            openai_errors.note(call, run.headers())
            raise
        await _say_late(run, client, error)
        return
    if body is not None and not call.started:
        await call.give(200, client.opening(), body)
    elif body is not None:
        await client.end(body)
    elif client.ended or stream is None:
        await client.flush()
    else:
        await client.end(stream.end())


async def _say_late(run: Run, client: Client, error: RMAError) -> None:
    """Say what went wrong where no status can any more: as the event that SDKs raise at, or in the body."""
    said = openai_errors.body(error, status_of(error))
    asked = run.job.asked
    if asked.stream:
        await client.end((run.stream or Stream(asked.answer)).failure(said))
    elif client.manner.keep_alive:
        await client.end(encode({"error": said}))
    else:
        # It did not ask for this: a body that breaks off is an error to any client, a whole one would be none.
        await client.send(encode({"error": said}))
        raise CutAnswer(run.id)


async def give_again(call: Call, kept: Kept) -> None:
    """Answer as a request of the same name was answered."""
    headers = {**kept.headers, **openai_errors.noted(call), "idempotency-replayed": "true"}
    if kept.headers["content-type"] == EVENT_STREAM["content-type"]:
        await call.start(200, headers)
        await call.write(kept.body, more=False)
    else:
        await call.answer(200, headers, kept.body)
