"""Whole answers under /v1: gathered, whatever becomes of their workers, and made right."""

from __future__ import annotations

import base64
import contextlib
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rma_coordinator.api import limits
from rma_coordinator.api.v1.choices import guessed, mend_whole, said_in, text_of, usage_of
from rma_coordinator.api.v1.errors import APIProblem
from rma_coordinator.api.v1.jobs import GOOD, MAX_REFUSAL_BYTES
from rma_coordinator.domain.continuing import TOKEN_CHARACTERS
from rma_core.errors import RMAError
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from rma_coordinator.api.v1.jobs import Asked
    from rma_coordinator.api.v1.runs import Run

#: The longest whole answer, embeddings of a large batch, and the most values in it: each takes 30 bytes and more as
#: an object, all at once, and a worker may mean harm.
MAX_ANSWER_BYTES = 32 * 1024 * 1024
MOST_VALUES = 1_000_000
#: Bytes of all of them until their clients have them; an answer up to here is taken all the same.
MOST_GATHERED_BYTES, SMALL_BYTES = 96 * 1024 * 1024, 64 * 1024
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

    def look(self) -> None:
        """Something has changed."""
        relay, run = self._run.job.relay, self._run
        if relay.starts != self._starts:
            self._drop()
            self._starts = relay.starts
        found: bytes | Exception | None = None
        try:
            if relay.crowded or relay.complete:
                self._take(relay.drain())
            if relay.complete:
                found = self._whole()
            elif relay.over:
                found = run.job.failed()
        except RMAError as error:
            # Its frames hold the answer.
            found = error.with_traceback(None)
        except Exception as error:  # noqa: BLE001 - told to whoever waits, and no business of the worker's
            found = error
        if found is not None:
            run.settle(found)

    def _take(self, data: bytes) -> None:
        size, run = self._size + len(data), self._run
        head = run.job.relay.head
        if head is not None and head.status not in GOOD:
            data = data[: max(0, MAX_REFUSAL_BYTES - self._size)]
        elif size > MAX_ANSWER_BYTES:
            raise APIProblem(502, f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        elif size > SMALL_BYTES and not run.may_hold(len(data), MOST_GATHERED_BYTES):
            what = f"large answers may take {MOST_GATHERED_BYTES} bytes together until their clients have them, and do"
            raise APIProblem(503, what, retry_after_s=5)
        self._size += len(data)
        run.hold(len(data))
        self._parts.append(data)

    def _drop(self) -> None:
        """Let go of what was gathered."""
        self._run.hold(-self._size)
        self._parts, self._size = [], 0

    def _whole(self) -> bytes:
        run, job = self._run, self._run.job
        head, data = job.relay.head, b"".join(self._parts)
        # From here on it is held once, as what is made of it.
        self._parts = []
        if head is None or head.status not in GOOD:
            raise job.refused(head, data) if head is not None else job.failed()
        made = made_right(data, job.asked)
        if made is None:
            raise APIProblem(502, NO_ANSWER.format(job.who()), retry_after_s=5)
        job.task.committed, job.task.http_status = True, head.status
        run.answers()
        limits.settle_whole(run.metered, made.usage)
        if job.asked.answer.id:
            job.measured(made.timings, made.usage, said=made.said)
        return made.body


class Made(NamedTuple):
    """An answer that has been made right, what it took, and what its engine says of that."""

    body: bytes
    #: As its engine tells it; ``None`` where it is a guess.
    usage: dict[str, Any] | None
    timings: object
    #: Bytes of all that was said.
    said: int


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
    usage = _count(found, entries, asked)
    said = sum(map(said_in, entries)) if answer.id else 0
    return Made(encode(found), usage, found.get("timings"), said)


def _count(found: dict[str, Any], entries: list[Any], asked: Asked) -> dict[str, Any] | None:
    """Say what was used, guessed from what was said where the engine does not tell, and marked as that.

    Return what the engine tells.
    """
    # What a worker says in our name is not passed on.
    found.pop("x_rma", None)
    told = usage_of(found.get("usage"))
    found["usage"] = told
    if told is None:
        said = sum(len(text_of(choice)) for choice in entries) if asked.answer.id else None
        tokens = None if said is None else -(-said // TOKEN_CHARACTERS)
        found["usage"] = guessed(prompt=asked.answer.prompt_guess, answer=tokens)
        found["x_rma"] = {"estimated": True}
    return told


def _pack_all(entries: list[Any]) -> None:
    """Write embeddings as SDKs ask for them by default: little-endian floats of 32 bits, in base64."""
    for entry in entries:
        numbers = entry.get("embedding") if isinstance(entry, dict) else None
        if isinstance(numbers, list) and all(isinstance(number, (int, float)) for number in numbers):
            with contextlib.suppress(OverflowError, struct.error):
                entry["embedding"] = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
