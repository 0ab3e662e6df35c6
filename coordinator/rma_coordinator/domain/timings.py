"""What an engine did for one task, by its own timings or by what was seen, and how long it may say nothing. Pure.

llama.cpp tells its ``timings`` with each answer, and what Ollama tells is brought to the same form by the agent. Of
other engines the coordinator sees when the first piece of a stream came and when the last. A worker could claim
anything, so that it is given more, or less: what it says is kept within what was seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rma_coordinator.domain.speeds import Measured
from rma_coordinator.domain.stream_events import MOST_TOKENS, number

if TYPE_CHECKING:
    from rma_coordinator.domain.speeds import Expected

#: An engine that says it took less than this part of the time that its task had is not believed.
LEAST_OF_SEEN = 0.5
#: A claim of less than this is none.
LEAST_CLAIM_S = 1e-9
#: Loading a model takes longer: less is to look whether it is loaded.
LEAST_LOAD_S = 0.5
#: Fewer tokens than this tell nothing by when they came; reading so few, beside what a cache spares, takes as long for
#: each as answering, which says nothing of how fast a prompt is read.
LEAST_TOKENS, LEAST_READ = 8, 16
#: A service has so many times as long as was expected to begin its answer, and so many seconds more; at least and at
#: most so long, where that can be expected at all.
FIRST_BYTE_TIMES, FIRST_BYTE_MORE_S, LEAST_FIRST_BYTE_S, MOST_FIRST_BYTE_S = 3.0, 10.0, 15.0, 300.0
#: Between two pieces it has so many times as long as a token takes, or as it takes to read a batch of another prompt;
#: at least so long.
SILENCE_TIMES, BATCHES, BATCH_TOKENS, LEAST_SILENCE_S = 20.0, 3.0, 512, 10.0


class Seen(NamedTuple):
    """What was seen of a streamed answer: when it was begun, and its first and its last piece, in seconds."""

    began_at: float
    first_at: float
    last_at: float


def told(timings: object) -> Measured | None:
    """Return what an engine says of its own, in the form of llama.cpp; ``None`` where it says nothing."""
    prompt, prompt_ms = number(timings, "prompt_n"), _milliseconds(timings, "prompt_ms")
    answer, answer_ms = number(timings, "predicted_n"), _milliseconds(timings, "predicted_ms")
    if prompt is None or answer is None or not (prompt_ms or answer_ms):
        return None
    load_s = _milliseconds(timings, "load_ms") / 1000
    return Measured(
        prompt if prompt >= LEAST_READ else 0,
        prompt_ms / 1000,
        answer,
        answer_ms / 1000,
        load_s if load_s >= LEAST_LOAD_S else 0.0,
    )


def counted(usage: object, seen: Seen | None = None) -> Measured | None:
    """Return what is known of an answer whose engine only counts: how fast, where its pieces were ``seen`` to come."""
    prompt, answer = number(usage, "prompt_tokens"), number(usage, "completion_tokens")
    if answer is None:
        return None
    if seen is None or answer < LEAST_TOKENS:
        return Measured(answer_tokens=answer)
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    fresh = max(0, (prompt or 0) - (number(details, "cached_tokens") or 0))
    # The first token comes with the end of reading; those behind it took the rest.
    reading_s = max(0.0, seen.first_at - seen.began_at)
    return Measured(fresh if fresh >= LEAST_READ else 0, reading_s, answer - 1, max(0.0, seen.last_at - seen.first_at))


def believed(found: Measured, seconds: float, *, asked: int, said: int) -> Measured:
    """Return what an engine says, stretched or shrunk to what may be true of a task that had so many seconds.

    No more tokens are believed than bytes were ``asked``, and ``said``.
    """
    if seconds <= 0:
        return Measured()
    prompt, answer = min(found.prompt_tokens, asked), min(found.answer_tokens, said)
    load_s = min(found.load_s, seconds)
    claimed = found.prompt_s + found.answer_s
    if claimed < LEAST_CLAIM_S:
        # So little is no measure, and would be stretched beyond all numbers.
        return Measured(prompt, 0.0, answer, 0.0, load_s)
    had = max(seconds - found.load_s, LEAST_OF_SEEN * seconds)
    factor = min(had, max(claimed, LEAST_OF_SEEN * had)) / claimed
    return Measured(prompt, found.prompt_s * factor, answer, found.answer_s * factor, load_s)


def first_byte_s(expected: Expected, load_s: float, most_s: float | None) -> float:
    """Return how long a service may take to begin a streamed answer: a slow one its time, a stuck one not for ever.

    Its model takes ``load_s`` to load, which may be needed though nobody has said so yet.
    """
    scaled = FIRST_BYTE_TIMES * (max(expected.load, load_s) + expected.prefill) + FIRST_BYTE_MORE_S
    scaled = min(MOST_FIRST_BYTE_S, max(LEAST_FIRST_BYTE_S, scaled))
    return scaled if most_s is None else min(scaled, most_s)


def silence_s(per_prompt_s: float, per_answer_s: float, most_s: float) -> float:
    """Return how long an engine may say nothing in the middle of its answer: ``most_s``, or less where it is fast."""
    if not per_answer_s:
        return most_s
    scaled = max(SILENCE_TIMES * per_answer_s, BATCHES * BATCH_TOKENS * per_prompt_s, LEAST_SILENCE_S)
    return min(scaled, most_s)


def _milliseconds(timings: object, name: str) -> float:
    value = timings.get(name) if isinstance(timings, dict) else None
    # What is no number at all, and what compares with none, is in no range.
    return float(value) if isinstance(value, (int, float)) and 0 < value <= MOST_TOKENS else 0.0
