"""Events of a streamed answer, read: text, thoughts, ends and counts, whichever engine tells them. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from rma_core.errors import RMAError

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Bytes of text that are kept of an answer; a longer one cannot be continued.
MOST_TEXT_BYTES = 64 * 1024
#: More choices than this no answer has.
MOST_CHOICES = 2048
#: Characters of an id, a model's name, or a reason of an end.
MOST_NAME = 1024
#: No number of tokens is larger; more would not be a whole number to every reader of JSON.
MOST_TOKENS = 2**53
#: What every event of one answer has in common.
IDENTITY = ("id", "object", "created", "model", "system_fingerprint")
#: Where engines put a model's thoughts.
REASONING = ("reasoning_content", "reasoning")


class BadChunk(RMAError):
    """An event of a stream is no piece of an answer; nothing was taken from it, and the stream can go on without it."""

    code = "bad_chunk"


class Part(NamedTuple):
    """What one event says of one choice; ``other`` names the first thing in it that is neither text nor thought."""

    choice: int
    role: bool
    text: str
    reasoning: bool
    other: str
    logprobs: bool
    finish: str


class Piece(NamedTuple):
    """One event, read: tokens of the prompt and of the answer so far where it tells them."""

    parts: tuple[Part, ...]
    prompt_tokens: int | None
    tokens: int | None
    usage: bool


def read(chunk: object) -> Piece:
    """Read one event of a stream of chat or text completions; only what matters here. Raises BadChunk."""
    if not isinstance(chunk, dict):
        raise BadChunk("an event is no object")
    parts = tuple(_part(choice) for choice in choices_of(chunk))
    usage, timings = chunk.get("usage"), chunk.get("timings")
    prompt, tokens = number(usage, "prompt_tokens"), number(usage, "completion_tokens")
    cached, fresh = number(timings, "cache_n"), number(timings, "prompt_n")
    if prompt is None and cached is not None and fresh is not None:
        prompt = cached + fresh
    if tokens is None:
        tokens = number(timings, "predicted_n")
    return Piece(parts, prompt, tokens, isinstance(usage, dict))


def choices_of(chunk: Mapping[str, Any]) -> list[Any]:
    """Return an event's choices; none where it has no such thing. Raises BadChunk."""
    choices = chunk.get("choices")
    if choices is None:
        return []
    if not isinstance(choices, list) or len(choices) > MOST_CHOICES:
        raise BadChunk("an event's choices are no list")
    return choices


def _part(choice: object) -> Part:
    if not isinstance(choice, dict):
        raise BadChunk("a choice is no object")
    index, finish, delta = choice.get("index", 0), choice.get("finish_reason"), choice.get("delta")
    if type(index) is not int or not 0 <= index < MOST_CHOICES:
        raise BadChunk("a choice has no index")
    if finish is not None and (not isinstance(finish, str) or len(finish) > MOST_NAME):
        raise BadChunk("the reason of an end is no name")
    if delta is not None and not isinstance(delta, dict):
        raise BadChunk("a delta is no object")
    inside = {"content": choice.get("text")} if delta is None else delta
    text = inside.get("content")
    if isinstance(text, str) and not _is_text(text):
        raise BadChunk("a text has half a character")
    return Part(
        choice=index,
        role=bool(inside.get("role")),
        text=text if isinstance(text, str) else "",
        reasoning=any(inside.get(name) for name in REASONING),
        other=_other(inside),
        logprobs=bool(choice.get("logprobs")),
        finish=finish or "",
    )


def _other(inside: Mapping[str, Any]) -> str:
    """Name what a delta holds that is neither role, text nor thought."""
    for name, value in inside.items():
        known = name == "role" or name in REASONING or (name == "content" and isinstance(value, str))
        if value and not known:
            return "content that is no text" if name == "content" else str(name)[:MOST_NAME]
    return ""


def _is_text(value: object) -> bool:
    """Whether a value is a text that can be sent: one without half a character."""
    try:
        return isinstance(value, str) and (value.isascii() or bool(value.encode()))
    except UnicodeEncodeError:
        return False


def identity_of(chunk: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all events of one answer have in common."""
    found: dict[str, Any] = {}
    for name in IDENTITY:
        value = chunk.get(name)
        name_like = isinstance(value, str) and len(value) <= MOST_NAME and _is_text(value)
        if name_like or (type(value) is int and 0 <= value <= MOST_TOKENS):
            found[name] = value
    return found


def number(told: object, name: str) -> int | None:
    """Return a number of tokens; an engine that tells something else tells nothing."""
    value = told.get(name) if isinstance(told, dict) else None
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None


def common(one: str, other: str) -> int:
    """Return how many characters two texts begin with together."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
