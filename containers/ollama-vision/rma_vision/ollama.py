"""The model beside this service: asked by Ollama's native API, which says how an answer ended."""

from __future__ import annotations

import base64
import http.client
import json
import os

import msgspec

from rma_service.problems import Busy

#: Seconds for the whole answer; whoever asked gives up before.
ANSWER_S = 600.0
MAX_ANSWER_BYTES = 4 * 1024 * 1024
_OK = 200


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the model said of a picture; ``done_reason`` is ``stop``, or ``length`` when it was cut."""

    text: str
    model: str
    done_reason: str
    usage: dict[str, int]


class _Message(msgspec.Struct):
    content: str


class _Said(msgspec.Struct):
    message: _Message
    done: bool
    done_reason: str = "stop"
    prompt_eval_count: int = 0
    eval_count: int = 0


def model() -> str:
    """Return the name of the model, as the environment says it."""
    return os.environ.get("MODEL", "")


def ask(picture: bytes, *, prompt: str, max_tokens: int) -> Answer:
    """Return what the model says of a picture; raises Busy when it says nothing that is whole."""
    asked = {
        "model": model(), "stream": False, "options": {"num_predict": max_tokens},
        "messages": [{"role": "user", "content": prompt, "images": [base64.b64encode(picture).decode()]}],
    }  # fmt: skip
    connection = http.client.HTTPConnection(os.environ.get("OLLAMA_HOST", "127.0.0.1:11434"), timeout=ANSWER_S)
    try:
        connection.request("POST", "/api/chat", json.dumps(asked), {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read(MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise Busy(f"the model does not answer: {error}; try again in a moment") from error
    finally:
        connection.close()
    if response.status != _OK:
        raise Busy(f"the model cannot be asked now (status {response.status}); try again in a moment")
    try:
        said = msgspec.json.decode(data, type=_Said)
    except msgspec.MsgspecError as error:
        raise Busy("the model's answer is not whole; try again in a moment") from error
    if not said.done:
        raise Busy("the model's answer is not whole; try again in a moment")
    usage = {"prompt_tokens": said.prompt_eval_count, "completion_tokens": said.eval_count}
    return Answer(text=said.message.content, model=model(), done_reason=said.done_reason, usage=usage)
