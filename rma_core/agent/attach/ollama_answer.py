"""What Ollama answers, made an answer of OpenAI's API. Pure: bytes in, bytes out, however they are cut.

Ollama writes one JSON object a line, and can simply stop in the middle of an answer: only the line that says ``done``
makes it whole. Everything else is `Broken`, and nothing that looks like an end is ever made of it.
"""

from __future__ import annotations

import base64
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from rma_core.agent.attach.ollama_lines import NONSENSE, Broken, Lines, Message, words
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rma_core.agent.attach.ollama_lines import Call, Line, Probability
    from rma_core.agent.attach.ollama_request import Wanted

#: Bytes of one streamed answer, and of one that is given whole.
MAX_STREAM_BYTES, MAX_WHOLE_BYTES = 1024 * 1024 * 1024, 32 * 1024 * 1024
#: Calls of tools in one answer, and numbers in one answer of embeddings.
MAX_CALLS, MAX_NUMBERS = 1024, 1_000_000
#: No number of tokens is larger.
MAX_TOKENS = 2**53
NS_PER_MS = 1_000_000
#: The end of a whole stream.
DONE = b"data: [DONE]\n\n"
#: Why Ollama ends an answer, as OpenAI says it; an old one says nothing. Loading and unloading are no answers.
FINISHES = {None: "stop", "": "stop", "stop": "stop", "length": "length"}


class _Embedded(msgspec.Struct):
    embeddings: list[msgspec.Raw]
    prompt_eval_count: int | None = None


_embedded = msgspec.json.Decoder(_Embedded).decode
_numbers = msgspec.json.Decoder(list[float]).decode
_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Translation(Protocol):
    """Makes an answer of what comes."""

    @property
    def done(self) -> bool:
        """Whether all of the answer has come."""

    @property
    def broken(self) -> Broken | None:
        """Why no whole answer can come any more, once that is so; what was returned before is still good."""

    def feed(self, data: bytes) -> bytes:
        """Return what the client gets for what has come."""

    def end(self) -> bytes:
        """Return what the client gets at the end, where it is whole."""


def translation(wanted: Wanted, *, answer_id: str, created: int) -> Translation:
    """Return what makes the answer; ``answer_id`` is its own part of the ids, ``created`` seconds since 1970."""
    if wanted.kind == "embedding":
        return Embeddings(wanted)
    prefix = "chatcmpl-" if wanted.kind == "chat" else "cmpl-"
    head = {"id": prefix + answer_id, "created": created, "model": wanted.model}
    return Stream(wanted, head) if wanted.stream else Whole(wanted, head)


class Piece(NamedTuple):
    """What one line says: text, thoughts, calls of tools, probabilities of tokens."""

    text: str
    thought: str
    calls: list[dict[str, Any]]
    probabilities: list[Probability]


class _Answer:
    """What an answer given whole has in common with a streamed one."""

    def __init__(self, wanted: Wanted, head: dict[str, Any], most_bytes: int) -> None:
        self.done = False
        self.broken: Broken | None = None
        self._wanted, self._head = wanted, head
        self._lines = Lines(most_bytes)
        self._calls = 0
        self._finish = ""
        self._usage: dict[str, int] = {}
        self._timings: dict[str, float] = {}

    @property
    def chat(self) -> bool:
        """Whether it is one of a chat."""
        return self._wanted.kind == "chat"

    def _pieces(self, data: bytes | None) -> Iterator[Piece]:
        """Yield what has come, up to the end or to what breaks it; ``None`` for the end of all bytes."""
        if self.done or self.broken:
            return
        try:
            for line in self._lines.last() if data is None else self._lines.feed(data):
                yield self._piece(line)
                if line.done:
                    # Behind its end an answer has nothing more: what comes there is not even read.
                    self._ended(line)
                    return
            if data is None:
                raise Broken("it stopped in the middle of its answer")
        except Broken as error:
            self.broken = self.broken or error

    def _piece(self, line: Line) -> Piece:
        said = line.message or Message()
        text = (said.content if self.chat else line.response) or ""
        thought = (said.thinking or "") if self.chat else ""
        calls = [self._call(call) for call in said.tool_calls or ()] if self.chat else []
        return Piece(text, thought, calls, line.logprobs or [])

    def _call(self, call: Call) -> dict[str, Any]:
        """Return a call of a tool: Ollama gives its arguments as an object, and often no id."""
        if self._calls >= MAX_CALLS:
            raise Broken(f"its answer calls more than {MAX_CALLS} tools")
        arguments = bytes(call.function.arguments)
        try:
            given = _object(arguments) if arguments not in (b"", b"null") else {}
        except NONSENSE:
            raise Broken("the arguments of a tool call are no JSON object") from None
        index, self._calls = self._calls, self._calls + 1
        name = call.id or f"call_{self._head['id'].rpartition('-')[2]}_{index}"
        function = {"name": call.function.name, "arguments": encode(given).decode()}
        return {"index": index, "id": name, "type": "function", "function": function}

    def _ended(self, line: Line) -> None:
        finish = FINISHES.get(line.done_reason)
        if finish is None:
            raise Broken(f"it ended its answer for no reason that an answer has: {words(line.done_reason)}")
        self.done = True
        self._finish = "tool_calls" if self._calls and finish == "stop" else finish
        prompt, answer = _count(line.prompt_eval_count), _count(line.eval_count)
        self._usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
        self._timings = {
            # Ollama does not say what it had still in memory of the prompt.
            "cache_n": 0,
            **_speed("prompt", prompt, line.prompt_eval_duration),
            **_speed("predicted", answer, line.eval_duration),
            "load_ms": _ms(line.load_duration),
        }


class Stream(_Answer):
    """A streamed answer, as server-sent events."""

    def __init__(self, wanted: Wanted, head: dict[str, Any]) -> None:
        super().__init__(wanted, head, MAX_STREAM_BYTES)
        self._head = {**head, "object": "chat.completion.chunk" if self.chat else "text_completion"}
        self._opened = not self.chat
        self._place = 0

    def feed(self, data: bytes) -> bytes:
        """Return the events for what has come."""
        return b"".join(self._events(data))

    def end(self) -> bytes:
        """Return the events that were still missing."""
        return b"".join(self._events(None))

    def _events(self, data: bytes | None) -> Iterator[bytes]:
        for piece in self._pieces(data):
            yield from self._said(piece)
        if self.done and self._finish:
            yield from self._finished()

    def _said(self, piece: Piece) -> Iterator[bytes]:
        if piece.thought:
            yield from self._delta({"reasoning_content": piece.thought})
        if piece.text or piece.probabilities:
            yield from self._text(piece)
        if piece.calls:
            yield from self._delta({"tool_calls": piece.calls})

    def _text(self, piece: Piece) -> Iterator[bytes]:
        if self.chat:
            told = {"logprobs": _chat_probabilities(piece.probabilities)} if piece.probabilities else {}
            yield from self._delta({"content": piece.text}, **told)
            return
        probabilities = _completion_probabilities(piece.probabilities, self._place) if piece.probabilities else None
        self._place += len(piece.text)
        yield self._event({"text": piece.text, "logprobs": probabilities, "finish_reason": None})

    def _delta(self, delta: dict[str, Any], **more: object) -> Iterator[bytes]:
        yield from self._opening()
        yield self._event({"delta": delta, **more, "finish_reason": None})

    def _opening(self) -> Iterator[bytes]:
        """Say the role: once, and by itself, for clients glue what they get together."""
        if not self._opened:
            self._opened = True
            yield self._event({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def _event(self, choice: dict[str, Any], **more: object) -> bytes:
        return _frame({**self._head, "choices": [{"index": 0, **choice}], **more})

    def _finished(self) -> Iterator[bytes]:
        yield from self._opening()
        said: dict[str, Any] = {"delta": {}} if self.chat else {"text": "", "logprobs": None}
        last = {"timings": self._timings}
        yield self._event({**said, "finish_reason": self._finish}, **({} if self._wanted.usage else last))
        if self._wanted.usage:
            yield _frame({**self._head, "choices": [], "usage": self._usage, **last})
        yield DONE
        self._finish = ""


class Whole(_Answer):
    """An answer given in one piece."""

    def __init__(self, wanted: Wanted, head: dict[str, Any]) -> None:
        super().__init__(wanted, head, MAX_WHOLE_BYTES)
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._made: list[dict[str, Any]] = []
        self._probabilities: list[Probability] = []

    def feed(self, data: bytes) -> bytes:
        """Keep what has come."""
        for piece in self._pieces(data):
            self._keep(piece)
        return b""

    def _keep(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        self._thoughts.append(piece.thought)
        self._made += [{name: value for name, value in call.items() if name != "index"} for call in piece.calls]
        self._probabilities += piece.probabilities

    def end(self) -> bytes:
        """Return the answer."""
        for piece in self._pieces(None):
            self._keep(piece)
        if not self.done:
            return b""
        said = self._message() if self.chat else self._completed()
        kind = "chat.completion" if self.chat else "text_completion"
        choice = {"index": 0, **said, "finish_reason": self._finish}
        told = {**self._head, "object": kind, "choices": [choice], "usage": self._usage, "timings": self._timings}
        return encode(told)

    def _message(self) -> dict[str, Any]:
        text, thought = "".join(self._texts), "".join(self._thoughts)
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not self._made else None}
        if thought:
            message["reasoning_content"] = thought
        if self._made:
            message["tool_calls"] = self._made
        found = self._probabilities
        return {"message": message, "logprobs": _chat_probabilities(found) if found else None}

    def _completed(self) -> dict[str, Any]:
        found = self._probabilities
        return {"text": "".join(self._texts), "logprobs": _completion_probabilities(found, 0) if found else None}


class Embeddings:
    """An answer of embeddings, which comes as one JSON object."""

    def __init__(self, wanted: Wanted) -> None:
        self.done = False
        self.broken: Broken | None = None
        self._wanted = wanted
        self._body = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Keep what has come."""
        self._body += data
        if len(self._body) > MAX_WHOLE_BYTES:
            self.broken = Broken(f"its answer is longer than {MAX_WHOLE_BYTES} bytes")
            self._body.clear()
        return b""

    def end(self) -> bytes:
        """Return the answer."""
        if self.broken is None:
            try:
                return self._made()
            except Broken as error:
                self.broken = error
        return b""

    def _made(self) -> bytes:
        if self._body.count(b",") > MAX_NUMBERS:
            raise Broken(f"its answer has more than {MAX_NUMBERS} numbers")
        try:
            found = _embedded(self._body)
            vectors = [self._vector(one) for one in found.embeddings]
        except (*NONSENSE, OverflowError, struct.error):
            raise Broken("its answer is not what Ollama sends") from None
        self.done = True
        tokens = _count(found.prompt_eval_count)
        data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return encode({"object": "list", "data": data, "model": self._wanted.model, "usage": usage})

    def _vector(self, raw: msgspec.Raw) -> object:
        numbers = _numbers(raw)
        # As SDKs ask for them by default: little-endian floats of 32 bits.
        return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode() if self._wanted.base64 else raw


def _chat_probabilities(found: list[Probability]) -> dict[str, Any]:
    return {"content": [{**msgspec.to_builtins(one), "top_logprobs": _tops(one)} for one in found]}


def _tops(one: Probability) -> list[Any]:
    return [msgspec.to_builtins(top) for top in one.top_logprobs or ()]


def _completion_probabilities(found: list[Probability], place: int) -> dict[str, Any]:
    """Return probabilities as the older API gives them, in columns; ``place`` is where their text begins."""
    offsets = []
    for one in found:
        offsets.append(place)
        place += len(one.token)
    return {
        "tokens": [one.token for one in found],
        "token_logprobs": [one.logprob for one in found],
        "top_logprobs": [{top.token: top.logprob for top in one.top_logprobs or ()} for one in found],
        "text_offset": offsets,
    }


def _count(value: int | None) -> int:
    return min(MAX_TOKENS, max(0, value or 0))


def _ms(nanoseconds: int | None) -> float:
    return round(_count(nanoseconds) / NS_PER_MS, 3)


def _speed(name: str, tokens: int, nanoseconds: int | None) -> dict[str, float]:
    """Return how many tokens took how long, under llama.cpp's names."""
    ms = _ms(nanoseconds)
    per_second = round(tokens * 1000 / ms, 3) if ms else 0.0
    return {f"{name}_n": tokens, f"{name}_ms": ms, f"{name}_per_second": per_second}


def _frame(event: object) -> bytes:
    return b"data: " + encode(event) + b"\n\n"
