"""One whole answer put together from the events of a stream, as llama.cpp gives it to who does not want a stream."""

from __future__ import annotations

import json
from typing import Any

#: Members of an event that say something of the whole answer, not of one choice.
_WHOLE = ("id", "created", "model", "system_fingerprint", "usage", "timings")


class Failed(Exception):
    """The stream carried an error object instead of the rest of the answer."""

    def __init__(self, error: dict[str, Any]) -> None:
        """Keep the object, and the status it stands for."""
        super().__init__(str(error.get("message", "")))
        self.error = error
        code = error.get("code")
        self.status = code if isinstance(code, int) and 400 <= code <= 599 else 500  # noqa: PLR2004 - HTTP's errors


def beginning(request: dict[str, Any]) -> str:
    """Return the text that the answer has to go on from: the assistant's, where it has the last word."""
    messages = request.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if isinstance(last, dict) and last.get("role") == "assistant" and isinstance(last.get("content"), str):
        return str(last["content"])
    return ""


class Answer:
    """Takes the events of a stream, one after the other."""

    def __init__(self, begin: str = "") -> None:
        """Begin with the text that was given to go on from."""
        self._begin = begin
        self._whole: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self.ended = False

    def take(self, data: bytes) -> None:
        """Add what stands behind ``data:`` of one event. Raises Failed."""
        if data.strip() == b"[DONE]":
            self.ended = True
            return
        event = json.loads(data)
        if isinstance(event.get("error"), dict):
            raise Failed(event["error"])
        self._whole.update({name: event[name] for name in _WHOLE if event.get(name) is not None})
        self._whole["object"] = str(event.get("object", "")).removesuffix(".chunk")
        for part in event.get("choices", ()):
            self._add(self._choices.setdefault(part.get("index", 0), {"finish_reason": None}), part)

    def _add(self, choice: dict[str, Any], part: dict[str, Any]) -> None:
        choice["index"] = part.get("index", 0)
        choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
        if "text" in part:
            choice["text"] = choice.get("text", "") + (part["text"] or "")
        if isinstance(part.get("delta"), dict):
            message = choice.setdefault("message", {"role": "assistant", "content": None})
            _add_delta(message, part["delta"])
        if isinstance(part.get("logprobs"), dict):
            kept = choice.setdefault("logprobs", {})
            for name, values in part["logprobs"].items():
                kept[name] = [*(kept.get(name) or ()), *(values or ())]

    def json(self) -> bytes:
        """Return the whole answer."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        for choice in choices:
            if "message" in choice and (self._begin or not choice["message"].get("tool_calls")):
                choice["message"]["content"] = self._begin + (choice["message"]["content"] or "")
        return json.dumps({"choices": choices, **self._whole}, ensure_ascii=False).encode(errors="replace")


def _add_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name in ("content", "reasoning_content"):
        if isinstance(delta.get(name), str):
            message[name] = (message.get(name) or "") + delta[name]
    for call in delta.get("tool_calls") or ():
        calls = message.setdefault("tool_calls", [])
        while len(calls) <= int(call.get("index", 0)) < 1024:  # noqa: PLR2004 - more calls than any answer has
            calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        known, told = calls[int(call.get("index", 0))], call.get("function") or {}
        known["id"] = call.get("id") or known["id"]
        known["function"]["name"] += told.get("name") or ""
        known["function"]["arguments"] += told.get("arguments") or ""
