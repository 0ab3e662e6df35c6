"""A streamed answer that lost its worker goes on where it stopped. Pure: requests and decoded events in, the same out.

`Delivered` knows what a client has of its answer. When the stream is lost, `decide` says how it goes on:

- "restart": nothing that counts has been delivered; the same request runs anew elsewhere, whatever it asks for,
- "continue": another worker gets `continued`, the request with the text so far as the beginning of its answer,
- "finish": nothing is missing but the end, which `ending` makes,
- "give_up": neither is right, and the reason is for the client.

What the next worker streams goes through a `Seam`, after "restart" as after "continue". Every further loss begins again
with `decide`, the request as the client sent it, and the same `Delivered`. An engine's errors are no part of an answer:
they are for whoever reads its stream. Nor has a client that waits for a whole answer any of it before all is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from rma_coordinator.domain.stream_events import (
    MOST_TEXT_BYTES,
    REASONING,
    choices_of,
    common,
    identity_of,
    number,
    read,
)
from rma_coordinator.domain.stream_requests import (
    LIMITS,
    begun,
    expected,
    limit_of,
    member,
    members,
    obstacles,
    positive,
    rests,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rma_coordinator.domain.stream_events import Part, Piece

#: Characters of a token, where a number of tokens can only be guessed.
TOKEN_CHARACTERS = 4

Outcome = Literal["restart", "continue", "finish", "give_up"]


class Decision(NamedTuple):
    """How a lost stream goes on; ``reason`` says why one that was given up does not."""

    outcome: Outcome
    reason: str = ""


class Delivered:
    """What a client has of a streamed answer: at most MOST_TEXT_BYTES of text, and a few facts.

    Tokens are the engine's own count where events tell it (``usage``, or llama.cpp's ``timings``). Else each event with
    text counts as one token: exact where engines send every token by itself, never too many where they gather some. So
    an answer may get a little longer than the client allowed by being cut, and is never shortened by it.
    """

    def __init__(self) -> None:
        #: Whether anything has been delivered that a second run could not give again unnoticed.
        self.begun = False
        #: The choices whose end has been delivered, each with its reason.
        self.finished: dict[int, str] = {}
        #: The choices that were given a role.
        self.roles: set[int] = set()
        #: Id, model and the like, as the first event had them.
        self.identity: dict[str, Any] = {}
        self.reasoned = self.logprobs = self.too_long = self.usage_given = False
        #: What was delivered beside text, if anything.
        self.other = ""
        #: Tokens of the prompt, as soon as an engine has told them.
        self.prompt_tokens: int | None = None
        #: Tokens that the delivered text stands for, without the white space at its end, and with what was thought.
        self.kept = 0
        self._text = bytearray()
        self._before = self._run = self._noted = self._thought = self._prefill = 0

    @property
    def text(self) -> str:
        """The text so far of the first choice."""
        return self._text.decode()

    @property
    def tokens(self) -> int:
        """Tokens of the whole answer so far, those of runs that were lost included."""
        return self._before + self._run

    def take(self, chunk: dict[str, Any]) -> None:
        """Take an event that the client gets. Raises BadChunk, and is then as before."""
        piece = read(chunk)
        self.count(piece)
        self.note(piece, chunk)

    def say(self, texts: Sequence[str]) -> None:
        """Take events with nothing in them but a text of the first choice each: what `take` does, for many at once.

        There is one at least, none is empty, and none holds half a character.
        """
        first = self._before + self._run + 1
        for last in range(len(texts) - 1, -1, -1):
            # Only the last text that is not white space alone says how many tokens are kept.
            if not texts[last].isspace():
                new = 1 if last else max(0, first - self._noted)
                self._keep(texts[last], first + last, new)
                self.begun = True
                break
        else:
            self.begun = self.begun or self.logprobs
        self._run += len(texts)
        self._noted = self._before + self._run
        self._add("".join(texts).encode())

    def resume(self) -> None:
        """Count on from what is kept: another run begins."""
        if not self.begun:
            self._thought = 0
        self._before = self._noted = self.kept
        self._prefill = self.kept - self._thought
        self._run = 0

    def count(self, piece: Piece) -> None:
        """Count what the engine of this run has made, whether or not the client gets it."""
        thought, before = any(part.reasoning for part in piece.parts), self.tokens
        said = thought or any(part.text for part in piece.parts)
        ended = not piece.parts or any(part.finish for part in piece.parts)
        # Between texts an engine counts tokens that it still holds back, as the possible beginning of a stop string.
        if piece.tokens is not None and (said or ended):
            self._run = piece.tokens
        elif said:
            self._run += 1
        if thought:
            self._thought += max(0, self.tokens - before)
        if piece.prompt_tokens is not None and self.prompt_tokens is None:
            self.prompt_tokens = max(0, piece.prompt_tokens - self._prefill)

    def note(self, piece: Piece, event: Mapping[str, Any]) -> None:
        """Note what the client gets."""
        new, self._noted = max(0, self.tokens - self._noted), self.tokens
        if not self.identity:
            self.identity = identity_of(event)
        for part in piece.parts:
            self._note(part, new)
        if piece.usage and (self.finished or not piece.parts):
            self.usage_given = True

    def _note(self, part: Part, new: int) -> None:
        if part.role:
            self.roles.add(part.choice)
        self.reasoned = self.reasoned or part.reasoning
        self.logprobs = self.logprobs or part.logprobs
        self.other = self.other or part.other
        if part.finish:
            self.finished[part.choice] = part.finish
        if part.text:
            if not part.text.isspace():
                self._keep(part.text, self.tokens, new)
            self._add(part.text.encode() if part.choice == 0 else b"")
        # White space alone can come again unnoticed, but only as the whole of an answer's beginning.
        spread = part.text and (part.choice > 0 or self.logprobs)
        self.begun = bool(self.begun or part.text.strip() or spread or part.other or part.finish)

    def _keep(self, text: str, tokens: int, new: int) -> None:
        # Of tokens that came together, those of the white space at the end are made again.
        again = (len(text) - len(text.rstrip())) * new // len(text)
        self.kept = tokens - again

    def _add(self, data: bytes) -> None:
        if self.too_long:
            return
        if len(self._text) + len(data) > MOST_TEXT_BYTES:
            self.too_long = True
            self._text.clear()
        else:
            self._text += data


class Seam:
    """What the next worker streams, made one answer with what was delivered; make it before the first of its events.

    Left out are a second role, a second line of thought, and white space that was given again. A stop string is
    found that began in the delivered text, by an engine that gives such beginnings away: what is out is out, nothing
    is added, and the answer ends there. Usage is that of one uncut answer.
    """

    def __init__(self, body: bytes, delivered: Delivered) -> None:
        """Begin a run of the request ``body``, as the client sent it."""
        #: Whether the answer has ended here, although its engine goes on: it can be stopped.
        self.done = False
        self._body = body
        self._delivered = delivered
        text = delivered.text
        self._gap = text[len(text.rstrip()) :]
        asked = members(body)
        self._rests = rests(asked, text)
        self._shows_stop = member(asked, "include_stop_str_in_output") is True
        self._held = ""
        self._mute = delivered.reasoned or delivered.begun
        self._identity = dict(delivered.identity)
        delivered.resume()

    def take(self, chunk: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the events that the client gets for one of the worker's; they are noted as delivered.

        Raises BadChunk, and is then as before.
        """
        piece = read(chunk)
        if self.done:
            return []
        self._delivered.count(piece)
        said = [self._choice(choice, part) for choice, part in zip(choices_of(chunk), piece.parts, strict=True)]
        choices = [choice for choice in said if choice]
        out = []
        if choices or (not piece.parts and piece.usage):
            event = {**chunk, **self._identity, "choices": choices}
            if piece.usage:
                event["usage"] = self._usage(chunk["usage"])
            out.append(event)
            # Counted already, as it came.
            self._delivered.note(read(event), event)
        return out + self._end()

    def _end(self) -> list[dict[str, Any]]:
        return ending(self._body, self._delivered, "stop") if self.done else []

    def _choice(self, choice: dict[str, Any], part: Part) -> dict[str, Any] | None:
        """Return a choice as the client gets it, or nothing where that leaves nothing."""
        text = self._pass(part) if part.choice == 0 else part.text
        if self.done:
            choice, part = {**choice, "finish_reason": None}, part._replace(finish="")
        inside = choice.get("delta")
        if not isinstance(inside, dict):
            return {**choice, "text": text} if text or part.finish else None
        delta = {name: value for name, value in inside.items() if not self._left_out(name, part)}
        if isinstance(delta.get("content"), str) or text:
            delta["content"] = text
        says = any(value not in (None, "") for value in delta.values())
        return {**choice, "delta": delta} if says or part.finish else None

    def _left_out(self, name: str, part: Part) -> bool:
        return (name == "role" and part.choice in self._delivered.roles) or (name in REASONING and self._mute)

    def _pass(self, part: Part) -> str:
        """Return the text that goes on; the rest is dropped or held."""
        again = common(self._gap, part.text)
        text = part.text[again:]
        self._gap = "" if text else self._gap[again:]
        if not self._rests:
            return text
        held = self._held + text
        if whole := next((rest for rest in self._rests if held.startswith(rest)), ""):
            self.done = True
            return whole if self._shows_stop else ""
        self._rests = [rest for rest in self._rests if rest.startswith(held)]
        if self._rests and not part.finish:
            self._held = held
            return ""
        self._rests, self._held = [], ""
        return held

    def _usage(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return an engine's usage with the prompt of the request alone, and all that was delivered as its answer."""
        prompt, completion = self._delivered.prompt_tokens or 0, self._delivered.tokens
        told: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and (cached := number(details, "cached_tokens")) is not None:
            told["prompt_tokens_details"] = {**details, "cached_tokens": min(cached, prompt)}
        return {**usage, **told}


def decide(body: bytes, delivered: Delivered) -> Decision:
    """Say how an answer goes on whose stream was lost; ``body`` is the request as the client sent it."""
    asked = members(body)
    if delivered.finished and len(delivered.finished) >= expected(asked):
        return Decision("finish")
    if not delivered.begun:
        return Decision("restart")
    if reason := next(obstacles(asked, delivered), ""):
        return Decision("give_up", reason)
    if (limit := limit_of(asked)) is not None and delivered.tokens >= limit:
        return Decision("finish")
    return Decision("continue")


def continued(body: bytes, delivered: Delivered) -> bytes:
    """Return the request for the next worker, after "continue" and after "restart": there it is ``body`` itself.

    The text so far is the answer's beginning, without the white space at its end: templates cut that off, and few
    tokens begin behind it. Limits are lowered by what the text stands for. Every other member stays byte for byte.
    """
    if not delivered.begun:
        return body
    asked = members(body)
    said = delivered.text.rstrip()
    told: dict[str, Any] = dict(asked)
    if "messages" in asked:
        told["messages"] = begun(asked, said)
        told |= {"continue_final_message": True, "add_generation_prompt": False}
        if delivered.reasoned:
            # It has thought already; what it thought is not part of the answer that it goes on with.
            options = member(asked, "chat_template_kwargs")
            told["chat_template_kwargs"] = {**(options if isinstance(options, dict) else {}), "enable_thinking": False}
    else:
        prompt = member(asked, "prompt")
        told["prompt"] = [prompt[0] + said] if isinstance(prompt, list) else prompt + said
    for name in LIMITS:
        if (limit := positive(asked, name)) is not None:
            told[name] = max(1, limit - delivered.kept)
    if (least := positive(asked, "min_tokens")) is not None:
        told["min_tokens"] = max(0, least - delivered.kept)
    return msgspec.json.encode(told)


def ending(body: bytes, delivered: Delivered, finish_reason: str = "length") -> list[dict[str, Any]]:
    """Return the events that an answer lacks for its end: the reason, and usage if it was asked for.

    They are noted as delivered. Where no engine has told the prompt's tokens they are guessed by its length, and
    ``x_rma.estimated`` says so.
    """
    asked = members(body)
    chat = "messages" in asked
    head = {"id": "", "object": "chat.completion.chunk" if chat else "text_completion", "created": 0, "model": ""}
    head |= delivered.identity
    out: list[dict[str, Any]] = []
    if not delivered.finished:
        says: dict[str, Any] = {"delta": {}} if chat else {"text": "", "logprobs": None}
        out.append({**head, "choices": [{"index": 0, **says, "finish_reason": finish_reason}]})
    options = member(asked, "stream_options")
    if not delivered.usage_given and isinstance(options, dict) and options.get("include_usage") is True:
        out.append({**head, "choices": [], **_summed(asked, delivered)})
    for event in out:
        delivered.note(read(event), event)
    return out


def _summed(asked: dict[str, msgspec.Raw], delivered: Delivered) -> dict[str, Any]:
    known, answer = delivered.prompt_tokens, delivered.tokens
    length = max(len(bytes(asked.get(name, b""))) for name in ("messages", "prompt"))
    prompt = max(1, length // TOKEN_CHARACTERS) if known is None else known
    usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return {"usage": usage, **({"x_rma": {"estimated": True}} if known is None else {})}
