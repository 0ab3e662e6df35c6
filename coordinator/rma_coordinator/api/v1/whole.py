"""Whole answers under /v1: gathered, whatever becomes of their workers, and made right."""

from __future__ import annotations

import base64
import contextlib
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rma_coordinator.api import limits
from rma_coordinator.api.v1.choices import guessed, mend_whole, text_of, usage_of
from rma_coordinator.api.v1.errors import APIProblem
from rma_coordinator.api.v1.jobs import GOOD
from rma_coordinator.domain.continuing import TOKEN_CHARACTERS
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from rma_coordinator.api.v1.jobs import Asked
    from rma_coordinator.api.v1.runs import Run

#: The longest whole answer, embeddings of a large batch, and the most values in it: each takes 30 bytes and more as
#: an object, all at once, and a worker may mean harm.
MAX_ANSWER_BYTES = 32 * 1024 * 1024
MOST_VALUES = 1_000_000
#: Bytes of all that are on their way at one time; of an answer up to here nobody asks.
MOST_GATHERED_BYTES, LARGE_BYTES = 96 * 1024 * 1024, 1024 * 1024
NO_ANSWER = "the model server of {} gave what is no answer: no JSON, too much of it, or one that broke off"


class Gathering:
    """One whole answer on its way to its run: nothing of it has gone out, so that the loss of a worker only costs time.

    Its relay is watched instead of read: the answer is gathered where its pieces come, and made right once it is whole.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._parts: list[bytes] = []
        self._size = 0
        self._starts = run.job.relay.starts
        run.job.relay.watch = self.look
        run.work.add_done_callback(lambda _: self._drop())

    def look(self) -> None:
        """Something has changed."""
        relay, run = self._run.job.relay, self._run
        if relay.starts != self._starts:
            self._drop()
            self._starts = relay.starts
        try:
            if relay.crowded or relay.complete:
                self._take(relay.drain())
            if relay.complete:
                run.settle(self._whole())
            elif relay.over:
                run.settle(run.job.failed())
        except Exception as error:  # noqa: BLE001 - told to whoever waits, and no business of the worker's
            run.settle(error)

    def _take(self, data: bytes) -> None:
        size, repeats = self._size + len(data), self._run.job.pool.repeats
        if size > MAX_ANSWER_BYTES:
            raise APIProblem(502, f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        if size > LARGE_BYTES and repeats.gathered_bytes + len(data) > MOST_GATHERED_BYTES:
            raise APIProblem(
                503,
                f"large answers on their way may take {MOST_GATHERED_BYTES} bytes together, and do",
                retry_after_s=5,
            )
        self._size = size
        repeats.gathered_bytes += len(data)
        self._parts.append(data)

    def _drop(self) -> None:
        """Let go of what was gathered."""
        self._run.job.pool.repeats.gathered_bytes -= self._size
        self._parts, self._size = [], 0

    def _whole(self) -> bytes:
        run, job = self._run, self._run.job
        head, data = job.relay.head, b"".join(self._parts)
        if head is None or head.status not in GOOD:
            raise job.refused(head, data) if head is not None else job.failed()
        made = made_right(data, job.asked)
        if made is None:
            raise APIProblem(502, NO_ANSWER.format(job.who()), retry_after_s=5)
        job.task.committed, job.task.http_status = True, head.status
        run.answers()
        limits.settle_whole(run.metered, made.usage)
        if job.asked.answer.id:
            job.measured(made.timings, made.usage)
        return made.body


class Made(NamedTuple):
    """An answer that has been made right, what it took, and what its engine says of that."""

    body: bytes
    usage: dict[str, Any]
    timings: object


def made_right(data: bytes, asked: Asked) -> Made | None:
    """Return a whole answer with our id and the name that the client knows; ``None`` for what is no answer."""
    answer = asked.answer
    if len(data) > MOST_VALUES and sum(data.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        return None
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    entries = found.get("choices" if answer.id else "data") if isinstance(found, dict) else None
    if not isinstance(entries, list):
        return None
    if answer.id:
        found["id"], found["created"] = answer.id, answer.created
        found["object"] = "chat.completion" if answer.chat else "text_completion"
        if not entries or not all(isinstance(one, dict) and mend_whole(one, chat=answer.chat) for one in entries):
            return None
    else:
        found["object"] = "list"
        if asked.base64:
            _pack_all(entries)
    found["model"] = answer.model
    _count(found, entries, asked)
    return Made(encode(found), found["usage"], found.get("timings"))


def _count(found: dict[str, Any], entries: list[Any], asked: Asked) -> None:
    """Say what was used, guessed from what was said where the engine does not tell, and marked as that."""
    # What a worker says in our name is not passed on.
    found.pop("x_rma", None)
    usage = usage_of(found.get("usage"))
    if usage is None:
        said = sum(len(text_of(choice)) for choice in entries) if asked.answer.id else None
        tokens = None if said is None else -(-said // TOKEN_CHARACTERS)
        usage = guessed(prompt=asked.answer.prompt_guess, answer=tokens)
        found["x_rma"] = {"estimated": True}
    found["usage"] = usage


def _pack_all(entries: list[Any]) -> None:
    """Write embeddings as SDKs ask for them by default: little-endian floats of 32 bits, in base64."""
    for entry in entries:
        numbers = entry.get("embedding") if isinstance(entry, dict) else None
        if isinstance(numbers, list) and all(isinstance(number, (int, float)) for number in numbers):
            with contextlib.suppress(OverflowError, struct.error):
                entry["embedding"] = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
