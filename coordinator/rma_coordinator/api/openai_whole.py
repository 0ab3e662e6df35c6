"""Whole answers under /v1: gathered, whatever becomes of their workers, and made right."""

from __future__ import annotations

import base64
import contextlib
import struct
from typing import TYPE_CHECKING, Any

import msgspec

from rma_coordinator.api import limits
from rma_coordinator.api.choices import guessed, mend_whole, text_of, usage_of
from rma_coordinator.api.openai_errors import APIProblem
from rma_coordinator.api.openai_jobs import GOOD
from rma_coordinator.domain.continuing import TOKEN_CHARACTERS
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from rma_coordinator.api.openai_jobs import Asked
    from rma_coordinator.api.openai_runs import Run

#: The longest whole answer, embeddings of a large batch, and the most values in it: each takes 30 bytes and more as
#: an object, all at once, and a worker may mean harm.
MAX_ANSWER_BYTES = 32 * 1024 * 1024
MOST_VALUES = 1_000_000


async def whole(run: Run) -> bytes:
    """Return the whole answer of a run. Raises RMAError."""
    job = run.job
    found = await job.collect(MAX_ANSWER_BYTES)
    if found is None:
        raise job.failed()
    head, data = found
    if head.status not in GOOD:
        raise job.refused(head, data)
    body = made_right(data, job.asked)
    if body is None:
        words = (
            f"the model server of {job.who()} gave what is no answer: no JSON, too much of it, or one that broke off"
        )
        raise APIProblem(502, words, retry_after_s=5)
    job.task.committed, job.task.http_status = True, head.status
    run.answers()
    limits.settle_whole(run.metered, body)
    return body


def made_right(data: bytes, asked: Asked) -> bytes | None:
    """Return a whole answer with our id and the name that the client knows; ``None`` for what is no answer."""
    answer = asked.answer
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
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
    return encode(found)


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
