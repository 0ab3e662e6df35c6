"""Answers as OpenAI's SDKs read them, whichever engine made them: how choices end, calls of tools, what was used."""

from __future__ import annotations

import secrets
from typing import Any

from rma_coordinator.domain.stream_events import MOST_TOKENS
from rma_core.models.strict import encode

#: What a client may be told as the reason of an end.
FINISHES = frozenset({"stop", "length", "tool_calls", "content_filter", "function_call"})
#: Engines say these when an answer did not come to its end.
BREAKS = frozenset({"abort", "cancelled", "error", "load", "unload"})


def finish_of(finish: object) -> str:
    """Return the reason of an end in words that clients know."""
    return finish if isinstance(finish, str) and finish in FINISHES else "stop"


def mend_call(call: dict[str, Any], *, position: int) -> None:
    """Make a call of a tool right, a whole one or the first of its fragments: its place, type, id, name, arguments."""
    if type(call.get("index")) is not int:
        call["index"] = position
    if not _is_text(call.get("id")):
        call["id"] = f"call_{secrets.token_hex(12)}"
    if not _is_text(call.get("type")):
        call["type"] = "function"
    function = call.get("function")
    if call["type"] != "function":
        if not isinstance(function, dict):
            call.pop("function", None)
        return
    call["function"] = function = function if isinstance(function, dict) else {}
    if not isinstance(function.get("name"), str):
        function["name"] = ""
    mend_arguments(function)
    function.setdefault("arguments", "")


def mend_arguments(function: dict[str, Any]) -> None:
    """Give arguments as text, which some engines give as what they mean."""
    arguments = function.get("arguments", "")
    if not isinstance(arguments, str):
        function["arguments"] = "" if arguments is None else encode(arguments).decode()


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def mend_whole(choice: dict[str, Any], *, chat: bool) -> bool:
    """Make a choice of a whole answer right, and say whether it is one: it came to its end, and has a message."""
    finish = choice.get("finish_reason")
    if isinstance(finish, str) and finish in BREAKS:
        return False
    choice["finish_reason"] = finish_of(finish)
    if type(choice.get("index")) is not int:
        choice["index"] = 0
    if chat:
        message = choice.get("message")
        if not isinstance(message, dict):
            return False
        _mend_message(message)
    return True


def _mend_message(message: dict[str, Any]) -> None:
    message["role"] = "assistant"
    message.setdefault("content", None)
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        message.pop("tool_calls", None)
        return
    for position, call in enumerate(calls):
        if isinstance(call, dict):
            mend_call(call, position=position)
            # Only fragments are numbered.
            del call["index"]


#: Where what a model says stands, beside calls of tools.
SAID = ("content", "text", "reasoning_content", "reasoning")


def said_in(choice: object) -> int:
    """Return how many bytes a choice says, of a whole answer or of an event: no token has less than one."""
    if not isinstance(choice, dict):
        return 0
    inside = choice.get("delta") or choice.get("message") or choice
    if not isinstance(inside, dict):
        return 0
    told = [inside.get(name) for name in SAID]
    calls = inside.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        told += [function.get("name"), function.get("arguments")] if isinstance(function, dict) else []
    return sum(len(one.encode("utf-8", "replace")) for one in told if isinstance(one, str))


def text_of(choice: dict[str, Any]) -> str:
    """Return the text of a choice of a whole answer; the length of it is what tokens are guessed by."""
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def usage_of(usage: object) -> dict[str, Any] | None:
    """Return what an engine says was used, in whole numbers that add up; ``None`` where it says nothing of use."""
    if not isinstance(usage, dict) or not _is_count(prompt := usage.get("prompt_tokens")):
        return None
    completion = usage.get("completion_tokens", 0)
    if not _is_count(completion):
        return None
    told = {**usage, "prompt_tokens": prompt, "total_tokens": prompt + completion}
    # Embeddings have nothing to complete.
    return told | {"completion_tokens": completion} if "completion_tokens" in usage else told


def _is_count(value: Any) -> bool:  # noqa: ANN401 - plain JSON has no narrower type
    return type(value) is int and 0 <= value <= MOST_TOKENS


def guessed(*, prompt: int, answer: int | None) -> dict[str, int]:
    """Return what was used where no engine says it, by numbers of tokens; ``answer`` of ``None`` for embeddings."""
    if answer is None:
        return {"prompt_tokens": prompt, "total_tokens": prompt}
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
