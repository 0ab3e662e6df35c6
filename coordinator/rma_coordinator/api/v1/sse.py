"""A model's stream as OpenAI's SDKs read it: whole events of one answer, and an end that only a whole answer has.

Pure: bytes of an engine go in, bytes for the client come out. Engines differ in what they repeat, leave out or add;
clients glue deltas together key by key and stop at the first event that they cannot read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rma_coordinator.api.v1.choices import BREAKS, finish_of, guessed, mend_arguments, mend_call, said_in, usage_of
from rma_coordinator.api.v1.splicing import Wrapping
from rma_coordinator.domain.continuing import Delivered, Seam
from rma_coordinator.domain.stream_events import BadChunk
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

#: An event longer than this is no piece of an answer.
MAX_EVENT_BYTES = 1024 * 1024
#: More choices than this in one answer nobody asks for.
MAX_CHOICES = 2048
#: More calls of tools than this in one answer are not kept apart.
MAX_TOOLS = 1024
#: So many texts are counted together.
TOGETHER = 32
#: The end of a whole answer.
DONE = b"data: [DONE]\n\n"
#: Keeps a silent stream alive. One newline: a second one would end an event, and some clients dispatch an empty one.
COMMENT = b": rma\n"
#: Says to who looks closely that another worker goes on.
CONTINUED = b": rma continued\n"
_decode = msgspec.json.Decoder().decode


class Broken(NamedTuple):
    """Why a stream is no whole answer, as its engine said it."""

    error: object


class Events:
    """Cuts a stream into the data of its events; comments and other fields than ``data`` are dropped."""

    def __init__(self) -> None:
        #: The beginning of an event that is not whole.
        self.rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the data of each event that is whole now. Raises ValueError for one that is too long."""
        if b"\r" in data:
            data = data.replace(b"\r", b"")
        for block in self._blocks(data):
            if block.startswith(b"data: ") and b"\n" not in block:
                yield block[6:]
            elif joined := _data(block):
                yield joined

    def _blocks(self, data: bytes) -> list[bytes]:
        rest = self.rest
        if not rest and data.endswith(b"\n\n"):
            return data[:-2].split(b"\n\n")
        # Only what is new is searched: bytes that drip in one by one must not cost their square.
        known = max(0, len(rest) - 1)
        rest += data
        end = rest.rfind(b"\n\n", known)
        blocks = bytes(rest[:end]).split(b"\n\n") if end >= 0 else []
        if end >= 0:
            del rest[: end + 2]
        if len(rest) > MAX_EVENT_BYTES:
            raise ValueError("an event is too long")
        return blocks


def _data(block: bytes) -> bytes:
    """Return the data of an event that has more than one line, or none."""
    parts = []
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        # llama.cpp used to name its errors so, against the standard.
        if name in (b"data", b"error"):
            parts.append(value.removeprefix(b" "))
    return b"\n".join(parts)


class Answer(NamedTuple):
    """What all events of one answer share, whatever the engine says, and what the client asked for."""

    id: str
    created: int
    model: str
    chat: bool = True
    usage: bool = False
    #: Tokens of the prompt, where no engine tells them.
    prompt_guess: int = 1

    @property
    def object(self) -> str:
        """The type of its events."""
        return "chat.completion.chunk" if self.chat else "text_completion"


class Stream:
    """The events of one answer, made right one by one; its last event tells ``facts`` of how it came about."""

    def __init__(self, answer: Answer, facts: Callable[[], dict[str, Any]] = dict) -> None:
        self.answer = answer
        self._facts = facts
        #: Whether the engine has said its end.
        self.done = False
        #: Why no whole answer can come any more, once that is known.
        self.broken: Broken | None = None
        #: Events that were nothing a client could read, and were left out.
        self.skipped = 0
        self._events = Events()
        self._usage: dict[str, Any] | None = None
        #: Bytes of text that went out.
        self.said = 0
        #: What the engine says of its own work, as it says it.
        self.timings: object = None
        self._estimated = False
        self._open: set[int] = set()
        self._finished: set[int] = set()
        self._tools: set[tuple[int, int]] = set()
        self._delivered = Delivered()
        #: Texts that it has beside that, to be counted together: each by itself would cost a few calls.
        self._texts: list[str] = []
        self._seam: Seam | None = None
        self._wrapping: Wrapping | None = None

    @property
    def delivered(self) -> Delivered:
        """What the client has, for another worker to go on from."""
        self._count()
        return self._delivered

    def _count(self) -> None:
        if self._texts:
            self._delivered.say(self._texts)
            self._texts.clear()

    def resume(self, body: bytes) -> Stream:
        """Go on with what another worker streams for the request ``body``; returns itself."""
        self._seam = Seam(body, self.delivered)
        # Half an event of the lost worker is nobody's.
        self._events, self.done, self._wrapping, self.timings = Events(), False, None, None
        return self

    def add(self, events: Iterable[dict[str, Any]]) -> bytes:
        """Return what the client gets for events that no engine has sent."""
        out: list[bytes] = []
        for event in events:
            self._estimated = self._estimated or bool(event.get("x_rma"))
            self._send(event, out)
        return b"".join(out)

    def replay(self) -> bytes | None:
        """Return all of the answer so far in a few events, for a client that comes later.

        ``None`` where not all of it is kept: calls of tools, thoughts, probabilities, several choices, a long text.
        """
        if not self.begun:
            return b""
        seen = self.delivered
        if self._open != {0} or seen.other or seen.logprobs or seen.too_long or seen.reasoned:
            return None
        chat, text = self.answer.chat, seen.text
        out = [self._opening(0, {})] if chat else []
        says: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text, "logprobs": None}
        out.append(frame({**self._head(), "choices": [{"index": 0, **says, "finish_reason": None}]}))
        if self._finished:
            ends: dict[str, Any] = {"delta": {}} if chat else {"text": "", "logprobs": None}
            finish = finish_of(seen.finished.get(0))
            event = {**self._head(), "choices": [{"index": 0, **ends, "finish_reason": finish}]}
            facts = {} if self.answer.usage else self._facts()
            out.append(frame({**event, "x_rma": facts} if facts else event))
        return b"".join(out)

    @property
    def usage(self) -> dict[str, Any] | None:
        """What the engine said it took, if it did."""
        return self._usage

    @property
    def begun(self) -> bool:
        """Whether anything of the answer itself has come."""
        return bool(self._open)

    @property
    def whole(self) -> bool:
        """Whether every choice that was begun has its end."""
        return self.begun and self._open == self._finished and self.broken is None

    def feed(self, data: bytes) -> bytes:
        """Return what the client gets for what the engine sent; nothing before the first piece of the answer."""
        wrapping = self._wrapping
        if wrapping is not None and not self._finished and not self._events.rest:
            # Like the last one but for its text.
            event, text = wrapping.take(data)
            if event:
                self._texts.append(text)
                if len(self._texts) >= TOGETHER:
                    self._count()
                self.said += len(event) - wrapping.size
                return event
        out: list[bytes] = []
        try:
            for payload in self._events.feed(data):
                if self.done or self.broken:
                    break
                if payload == b"[DONE]":
                    self.done = True
                else:
                    self._event(payload, out)
        except ValueError as error:
            self.broken = Broken(str(error))
        return b"".join(out)

    def _learn(self, payload: bytes, event: dict[str, Any], ours: bytes) -> None:
        """Remember what stands around the text of an event that was nothing but some text of the only choice."""
        name = "content" if self.answer.chat else "text"
        if self._open == {0} and not self._finished and _is_plain(event["choices"][0], name):
            self._wrapping = Wrapping.of(payload, ours, name.encode())

    def end(self) -> bytes:
        """Return what ends a whole answer: usage where the client asked for it, and the end marker."""
        if not self.answer.usage:
            return DONE
        usage, estimated = self._usage, self._estimated
        if usage is None:
            seen, estimated = self.delivered, True
            usage = guessed(prompt=seen.prompt_tokens or self.answer.prompt_guess, answer=seen.tokens)
        facts = self._facts() | ({"estimated": True} if estimated else {})
        return frame({**self._head(), "choices": [], "usage": usage, **({"x_rma": facts} if facts else {})}) + DONE

    def failure(self, error: dict[str, Any]) -> bytes:
        """Return what ends an answer that is not whole: SDKs raise at it, and no end marker follows."""
        choice: dict[str, Any] = {"index": 0, "delta": {}} if self.answer.chat else {"index": 0, "text": ""}
        event = {"error": error, **self._head(), "choices": [{**choice, "finish_reason": "error"}]}
        return frame({**event, "x_rma": facts} if (facts := self._facts()) else event)

    def _head(self) -> dict[str, Any]:
        answer = self.answer
        return {"id": answer.id, "object": answer.object, "created": answer.created, "model": answer.model}

    def _event(self, payload: bytes, out: list[bytes]) -> None:
        try:
            event = _decode(payload)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            self.skipped += 1
            return
        choices = event.get("choices") if isinstance(event, dict) else None
        if not isinstance(choices, list):
            self._other(event)
            return
        try:
            events = self._noted(event)
        except BadChunk:
            self.skipped += 1
            return
        size, counted = len(out), event.get("usage") is not None or event.get("timings") is not None
        self.timings = event.get("timings") or self.timings
        for one in events:
            self._send(one, out)
        if self._seam is None and len(out) > size and not counted:
            self._learn(payload, event, out[-1])
        if self._seam is not None and self._seam.done:
            self.done = True

    def _noted(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what the client gets for an event, and keep account of it. Raises BadChunk."""
        if self._seam is not None:
            return self._seam.take(event)
        self.delivered.take(event)
        return [event]

    def _send(self, event: dict[str, Any], out: list[bytes]) -> None:
        usage, choices = event.pop("usage", None), event["choices"]
        # What a worker says in our name is not passed on.
        event.pop("x_rma", None)
        if usage is not None:
            self._usage = usage_of(usage) or self._usage
        if not all(map(_is_choice, choices)):
            self.skipped += 1
            return
        kept = [choice for choice in choices if self._choice(choice, out)]
        self.said += sum(map(said_in, kept))
        if kept:
            answer = self.answer
            event["id"], event["object"] = answer.id, answer.object
            event["created"], event["model"] = answer.created, answer.model
            event["choices"] = kept
            if self._finished == self._open and not answer.usage and (facts := self._facts()):
                event["x_rma"] = facts
            out.append(frame(event))

    def _other(self, event: Any) -> None:  # noqa: ANN401 - plain JSON data has no narrower type
        """Take an event without choices: the engine's error, or nothing that anyone could read."""
        if isinstance(event, dict) and event.get("error"):
            self.broken = Broken(event["error"])
        elif isinstance(event, dict) and event.get("object") == "error":
            self.broken = Broken(event)
        else:
            self.skipped += 1

    def _choice(self, choice: dict[str, Any], out: list[bytes]) -> bool:
        """Make a choice right and say whether the client gets it."""
        index, finish = choice.setdefault("index", 0), choice.get("finish_reason")
        if index in self._finished:
            return False
        if finish in BREAKS:
            self.broken = Broken(f"the model server ended the answer: {finish}")
            return False
        chat = self.answer.chat
        delta: dict[str, Any] = (choice.get("delta") or {}) if chat else choice
        if index not in self._open:
            if not finish and not _says(delta, chat=chat):
                return False
            self._open.add(index)
            if chat:
                out.append(self._opening(index, delta))
        if finish:
            self._finished.add(index)
        choice["finish_reason"] = finish_of(finish) if finish else None
        if chat:
            # Clients glue strings together: a role that is said twice becomes another one.
            delta.pop("role", None)
            choice["delta"] = delta
            if "tool_calls" in delta:
                self._mend_tools(index, delta)
        return True

    def _opening(self, index: int, delta: dict[str, Any]) -> bytes:
        """Return the event that says the role, once and by itself."""
        said: dict[str, Any] = {"role": "assistant", "content": None if delta.get("tool_calls") else ""}
        return frame({**self._head(), "choices": [{"index": index, "delta": said, "finish_reason": None}]})

    def _mend_tools(self, index: int, delta: dict[str, Any]) -> None:
        """Number fragments of calls, say each call's name once, and give arguments as text."""
        told = delta["tool_calls"]
        calls = [call for call in told if isinstance(call, dict)] if isinstance(told, list) else []
        if not calls:
            del delta["tool_calls"]
            return
        delta["tool_calls"] = calls
        for position, call in enumerate(calls):
            if type(call.get("index")) is not int:
                call["index"] = position
            if (index, call["index"]) not in self._tools:
                mend_call(call, position=position)
                if len(self._tools) < MAX_TOOLS:
                    self._tools.add((index, call["index"]))
                continue
            for name in ("id", "type"):
                call.pop(name, None)
            if isinstance(function := call.get("function"), dict):
                function.pop("name", None)
                mend_arguments(function)
            else:
                call.pop("function", None)


def _is_choice(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("delta") or {}, dict):
        return False
    index, finish = value.get("index", 0), value.get("finish_reason")
    return type(index) is int and 0 <= index < MAX_CHOICES and (finish is None or isinstance(finish, str))


def _is_plain(choice: Mapping[str, Any], name: str) -> bool:
    """Whether a choice as it was sent is a piece of its text, and nothing beside it."""
    says = choice.get("delta", choice)
    alone = not any(says[other] for other in says if other not in (name, "index"))
    return bool(isinstance(says.get(name), str) and says[name] and alone and not choice.get("logprobs"))


def _says(delta: dict[str, Any], *, chat: bool) -> bool:
    """Whether there is anything of the answer in it, beside the role."""
    return any(delta[name] for name in delta if name != "role") if chat else bool(delta.get("text"))


def frame(event: object) -> bytes:
    """Return one event."""
    return b"data: " + encode(event) + b"\n\n"
