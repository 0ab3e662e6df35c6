"""Requests under /v1: read, checked, and made what model servers take; and what their clients say of themselves."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rma_coordinator.api import bodies
from rma_coordinator.api.v1.errors import APIProblem
from rma_core.errors import Problem, ValidationProblem
from rma_core.models.strict import MAX_EXPLAINED_BYTES, convert, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rma_coordinator.api.asgi import Call

#: Values in one request, counted by what stands before each; as objects they take 100 bytes and more apiece.
MOST_VALUES = 300_000
#: What an Idempotency-Key may be.
IDEMPOTENCY_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
#: Times that SDKs ask again by themselves unless told otherwise.
RETRIES = 2
#: A client's own patience is no reason to send something more often than this.
LEAST_SILENCE_S = 0.25
#: A client that leaves this near to the end of its patience has lost it, or within a quarter of the patience itself.
NEAR_S = 2.0
#: Node's SDK tells its patience in whole seconds, and not the rest.
ROUNDED_S = 1.0
#: It does not tell what it was made with, but only what a request was. Then it has its own patience, or Node's fetch.
SDK_PATIENCES_S = (300.0, 600.0)


class Kind(NamedTuple):
    """One of OpenAI's calls that run a model."""

    path: str
    takes: type[bodies.ChatCompletionRequest | bodies.CompletionRequest | bodies.EmbeddingRequest]
    #: What its answers' ids begin with; embeddings have none.
    prefix: str = ""


CHAT = Kind("/v1/chat/completions", bodies.ChatCompletionRequest, "chatcmpl-")
COMPLETION = Kind("/v1/completions", bodies.CompletionRequest, "cmpl-")
EMBEDDING = Kind("/v1/embeddings", bodies.EmbeddingRequest)


# -- bodies --------------------------------------------------------------------------------------------------------


def read(data: bytes, kind: Kind) -> tuple[Any, bytes]:
    """Return a request as a record, and the bytes that go to the model server. Raises ValidationProblem, APIProblem."""
    if len(data) > MOST_VALUES and sum(data.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        raise APIProblem(400, f"a request has at most {MOST_VALUES} values, counted by commas and brackets")
    try:
        value = msgspec.json.decode(data)
    except RecursionError:
        raise ValidationProblem("request", [Problem("$", "nested too deeply")]) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ValidationProblem("request", [Problem("$", f"not JSON: {error}")]) from None
    request = _convert(value, kind, size=len(data))
    stream = getattr(request, "stream", None)
    if getattr(request, "stream_options", None) is not None and not stream:
        raise APIProblem(400, "stream_options is for streams: it needs stream: true", param="stream_options")
    added, changed, gone = _changes(value, stream=bool(stream), chat=kind is CHAT)
    if changed or gone:
        # What need not change stays as it was written, byte for byte.
        fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        kept = {name: field for name, field in fields.items() if name not in gone}
        return request, encode({**kept, **added, **changed})
    if added:
        start = data.index(b"{") + 1
        return request, data[:start] + encode(added)[1:-1] + b"," + data[start:]
    return request, data


def _convert(value: object, kind: Kind, *, size: int) -> Any:  # noqa: ANN401 - one of the records of `Kind`
    if size <= MAX_EXPLAINED_BYTES:
        return convert(value, kind.takes, subject="request")
    try:
        return msgspec.convert(value, kind.takes)
    except msgspec.ValidationError as error:
        # Walking something large, to name everything that is wrong in it, would hold everyone else up.
        what, _, where = str(error).partition(" - at `")
        raise ValidationProblem("request", [Problem(where.rstrip("`") or "$", what)]) from None


class Changes(NamedTuple):
    """Fields that model servers must see otherwise: those that were not there, those that were, those that must go."""

    added: dict[str, Any]
    changed: dict[str, Any]
    gone: frozenset[str]


#: What goes with tools, of which there are none.
TOOLS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
NOTHING: frozenset[str] = frozenset()


def _changes(value: Mapping[str, Any], *, stream: bool, chat: bool) -> Changes:
    changes = Changes({}, {}, TOOLS if value.get("tools") == [] else NOTHING)

    def put(name: str, one: object) -> None:
        (changes.changed if name in value else changes.added)[name] = one

    if stream:
        options = value.get("stream_options") or {}
        # What was used is counted for every request, asked for or not.
        if options.get("include_usage") is not True:
            put("stream_options", {**options, "include_usage": True})
    # Several engines know the older name only, and to those that know both the newer one is what counts.
    most = value.get("max_completion_tokens")
    if type(most) is int and value.get("max_tokens") != most:
        put("max_tokens", most)
    if chat and any(message.get("role") == "developer" for message in value["messages"]):
        # Templates that do not know the role refuse it or leave it out; the one family that does takes both for one.
        changes.changed["messages"] = [_without_developer(message) for message in value["messages"]]
    return changes


def _without_developer(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "role": "system"} if message.get("role") == "developer" else message


# -- clients -------------------------------------------------------------------------------------------------------


class Manner(NamedTuple):
    """What a client says of itself: how long it waits, how often it has asked already, and how it may be kept waiting.

    ``patience_s`` is ``None`` where it does not say, ``tries`` where it is nobody that asks again by itself.
    """

    patience_s: float | None = None
    tries: int | None = None
    #: Whether it is one of OpenAI's own SDKs.
    sdk: bool = False
    #: Whether it asked to be kept alive while it waits for a whole answer.
    keep_alive: bool = False
    #: Its name for the request, where it has one.
    name: str = ""

    def third_s(self, most_s: float) -> float:
        """Return the seconds after which it should hear something: a third of its patience, but no more than these."""
        return most_s if self.patience_s is None else min(most_s, max(LEAST_SILENCE_S, self.patience_s / 3))

    @property
    def repeats(self) -> bool:
        """Whether it asks for what it has asked for before."""
        return bool(self.tries)

    def lost_patience(self, waited_s: float) -> bool:
        """Say whether one that left after so many seconds of silence left for that, and will ask again."""
        if self.tries is None or self.tries >= RETRIES:
            return False
        usual = SDK_PATIENCES_S if self.sdk else ()
        return any(_near(waited_s, one) for one in (usual if self.patience_s is None else (self.patience_s,)))

    def gave_up(self, waited_s: float) -> bool:
        """Say whether one that seems to be there may have given up long ago, without anyone having told us."""
        if self.patience_s is not None:
            return waited_s >= self.patience_s
        return not self.sdk or waited_s >= max(SDK_PATIENCES_S)


def _near(waited_s: float, patience_s: float) -> bool:
    near_s = min(NEAR_S, patience_s / 4)
    return patience_s - near_s <= waited_s <= patience_s + ROUNDED_S + near_s


def manner(call: Call) -> Manner:
    """Return what a client says of itself in its headers. Raises APIProblem for an Idempotency-Key that is none."""
    raw = call.raw
    agent = raw.get(b"user-agent", b"").lower()
    name = raw.get(b"idempotency-key")
    if name is not None and not IDEMPOTENCY_KEY.fullmatch(name):
        raise APIProblem(400, "an Idempotency-Key has 1 to 255 visible ASCII characters")
    tries = raw.get(b"x-stainless-retry-count", b"")
    return Manner(
        patience_s=_seconds(raw.get(b"x-stainless-read-timeout") or raw.get(b"x-stainless-timeout")),
        tries=int(tries) if tries.isdigit() and len(tries) <= 4 else None,  # noqa: PLR2004 - digits enough for any
        sdk=agent.startswith((b"openai/", b"asyncopenai/")),
        keep_alive=raw.get(b"x-rma-keepalive", b"").strip() == b"1",
        name=name.decode("ascii") if name else "",
    )


def _seconds(text: bytes | None) -> float | None:
    try:
        seconds = float(text or b"")
    except ValueError:
        return None
    # NaN is not above 0 either.
    return seconds if seconds > 0 else None
