"""What Ollama sends: lines of an answer, and what it says when it has none. Pure, limited, and checked strictly.

A server is a stranger's program. What is not what Ollama sends is `Broken`, and so is an error: it comes as one more
line behind a good status.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rma_core.errors import RMAError
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from collections.abc import Iterator

#: A line longer than this is no piece of an answer.
MAX_LINE_BYTES = 1024 * 1024
#: Characters of what Ollama says that go on.
MAX_MESSAGE = 500
#: Statuses that say something about the request: they go to the client.
ABOUT_THE_REQUEST = frozenset({400, 413, 422})
#: Statuses of an Ollama that has no room or no such model (any more): its owner's doing, and nobody's failure.
OF_THE_OWNER = frozenset({404, 429, 503})
#: What says that a status of 400 is not about the request after all: its engine has ended.
ENGINE_WORDS = ("model runner", "unexpected eof", "connection re", "out of memory")
#: What msgspec raises at anything that is not what it should be.
NONSENSE = (msgspec.MsgspecError, UnicodeError, RecursionError)


class Broken(RMAError):
    """No whole answer can come of this any more."""

    code = "broken_answer"


class Refusal(NamedTuple):
    """What Ollama said instead of an answer: for the client where ``status`` is one, else whose ``fault`` it was."""

    message: str
    status: int = 0
    body: bytes = b""
    owner: bool = False


class Function(msgspec.Struct):
    """A tool that is called."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw()


class Call(msgspec.Struct):
    """One call of a tool."""

    function: Function
    id: str | None = None


class Message(msgspec.Struct):
    """What a line of a chat says."""

    content: str | None = None
    thinking: str | None = None
    tool_calls: list[Call] | None = None


class TopProbability(msgspec.Struct):
    """A token and how likely it was."""

    token: str = ""
    logprob: float = 0.0
    bytes: list[int] | None = None


class Probability(TopProbability):
    """The token that was taken, with others that were likely."""

    top_logprobs: list[TopProbability] | None = None


class Line(msgspec.Struct):
    """One line of an answer."""

    message: Message | None = None
    response: str | None = None
    thinking: str | None = None
    done: bool = False
    done_reason: str | None = None
    error: Any = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    logprobs: list[Probability] | None = None


_line = msgspec.json.Decoder(Line).decode
_said = msgspec.json.Decoder(dict[str, Any]).decode


class Lines:
    """Cuts a stream into lines, and each line into a record."""

    def __init__(self, most_bytes: int) -> None:
        self._rest = bytearray()
        self._left = most_bytes

    def feed(self, data: bytes) -> Iterator[Line]:
        """Yield each line that is whole now. Raises Broken."""
        too_much = len(data) > self._left
        data = data[: self._left]
        self._left -= len(data)
        # Only what is new is searched: bytes that drip in one by one must not cost their square.
        known = len(self._rest)
        self._rest += data
        end = self._rest.rfind(b"\n", known)
        if end >= 0:
            whole = bytes(self._rest[:end])
            del self._rest[: end + 1]
            for line in whole.split(b"\n"):
                yield from self._one(line)
        if len(self._rest) > MAX_LINE_BYTES:
            raise Broken(f"a line of its answer is longer than {MAX_LINE_BYTES} bytes")
        if too_much:
            raise Broken("its answer is longer than any answer")

    def last(self) -> Iterator[Line]:
        """Yield what came without the end of its line, where that is anything. Raises Broken."""
        line = bytes(self._rest)
        self._rest.clear()
        yield from self._one(line)

    def _one(self, line: bytes) -> Iterator[Line]:
        if len(line) > MAX_LINE_BYTES:
            raise Broken(f"a line of its answer is longer than {MAX_LINE_BYTES} bytes")
        if line.strip():
            yield self.read(line)

    @staticmethod
    def read(line: bytes) -> Line:
        """Return a line as a record. Raises Broken for an error, and for what is none."""
        try:
            found = _line(line)
        except NONSENSE:
            raise Broken("a line of its answer is not what Ollama sends") from None
        if found.error:
            raise Broken(words(found.error))
        return found


def refusal(status: int, data: bytes) -> Refusal:
    """Return what to make of a status that is no success; ``data`` is the body that came with it."""
    try:
        told = _said(data)
    except NONSENSE:
        told = {"error": data.decode("utf-8", "replace")}
    message = words(told.get("error") or "without a reason")
    low = message.lower()
    if status in ABOUT_THE_REQUEST and not any(mark in low for mark in ENGINE_WORDS):
        too_long = "context" in low and ("exceed" in low or "longer than" in low)
        return Refusal(message, status, error_body(message, api_code="context_length_exceeded" if too_long else None))
    return Refusal(f"Ollama answered {status}: {message}", owner=status in OF_THE_OWNER)


def error_body(message: str, *, param: str | None = None, api_code: str | None = None) -> bytes:
    """Return an error as OpenAI's API says it, about the request."""
    return encode({
        "error": {"message": message, "type": "invalid_request_error", "param": param, "code": api_code}
    })  # fmt: skip


def goes_on(data: bytes, expected: str) -> bool:
    """Say whether the answer to a probe goes on from its beginning. Raises Broken."""
    found = Lines.read(data)
    if not found.done or found.message is None:
        raise Broken("its answer is not what Ollama sends")
    return (found.message.content or "").startswith(expected)


def words(said: object) -> str:
    """Return what a stranger's program says as a sentence that a log can show."""
    inner = said.get("message", said) if isinstance(said, dict) else said
    text = inner if isinstance(inner, str) else encode(inner).decode()
    return "".join(c if c.isprintable() else " " for c in text[:MAX_MESSAGE]).strip() or "without a reason"
