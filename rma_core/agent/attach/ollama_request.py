"""A request of OpenAI's API, as Ollama's own API takes it. Pure: bytes in, bytes out, nothing is fetched.

Ollama answers OpenAI's API itself, but there it swallows the errors of a stream, knows no context size and gives ids
that repeat. What it cannot do at all is refused, by the parameter's name: an answer that quietly leaves out what was
asked for would be worth less. What is no business of a client's (how long a model stays loaded) is not passed on.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from rma_core.agent.attach.openai_records import Asked, Call, Chat, Completion, Embedding, Form, Message, Named, Part
from rma_core.errors import RMAError, ValidationProblem
from rma_core.models.strict import decode, encode

#: Values in one request, counted by what stands before each; as objects they take 100 bytes and more apiece.
MOST_VALUES = 300_000
#: Numbers that Ollama reads as whole ones: beyond, its own would wrap around.
MOST_NUMBER = 2**53
#: Where it goes, by where it came.
PATHS = {"/v1/chat/completions": "/api/chat", "/v1/completions": "/api/generate", "/v1/embeddings": "/api/embed"}
#: Members that change what an answer is, and that Ollama has nothing for.
UNSUPPORTED = (
    "audio", "best_of", "echo", "functions", "grammar", "guided_choice", "guided_grammar", "guided_json",
    "guided_regex", "json_schema", "logit_bias", "n", "prompt_embeds", "structured_outputs",
)  # fmt: skip
#: What such a member may say all the same: that it asks for nothing.
NOTHING = frozenset({b"null", b"false", b"0", b"[]", b"{}", b'""'})
#: Members that ask for one answer, which is what there is.
ONE_IS_FINE = frozenset({"best_of", "n"})
#: Members that mean the same to Ollama, most under another name.
OPTIONS = {
    "frequency_penalty": "frequency_penalty", "min_p": "min_p", "presence_penalty": "presence_penalty",
    "repeat_penalty": "repeat_penalty", "repetition_penalty": "repeat_penalty", "seed": "seed",
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p",
}  # fmt: skip
ROLES = {
    "assistant": "assistant", "developer": "system", "function": "tool", "system": "system", "tool": "tool",
    "user": "user",
}  # fmt: skip
#: How much a model is to think, as Ollama knows it; what other engines name beyond that is the nearest of these.
EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
#: The answer's beginning with which it is tried whether a model goes on from one, and how it goes on then: with the
#: space in front. A new turn would begin without, and most likely with another number.
PROBE_BEGIN, PROBE_GOES_ON = "1, 2, 3,", " 4"
PROBE_ASKS = "Count from 1 to 9. Write nothing but the numbers, with a comma and a space between them."
PROBE_TOKENS = 8
#: How some engines' clients say that an answer may be as long as it likes.
NO_LIMIT = -1
BAD_REQUEST = 400


class NotForOllama(RMAError):
    """A request that Ollama cannot answer; ``param`` names what of it, ``api_code`` the reason, for programs."""

    code = "not_for_ollama"

    def __init__(
        self, message: str, *, param: str | None = None, api_code: str | None = None, status: int = BAD_REQUEST
    ) -> None:
        super().__init__(message)
        self.param, self.api_code, self.status = param, api_code, status


class Facts(NamedTuple):
    """What is known of a model: the tokens it is loaded with (0: nobody knows), whether it thinks; the owner's wish."""

    context: int = 0
    thinks: bool | None = None
    #: How long it stays loaded, where the owner says so here and not to Ollama.
    keep_alive: str = ""


class Wanted(NamedTuple):
    """How a client wants its answer."""

    kind: Literal["chat", "completion", "embedding"]
    model: str
    stream: bool = False
    usage: bool = False
    base64: bool = False


class Native(NamedTuple):
    """A request for Ollama; ``continues`` where the answer's beginning is given, and it has to go on from that."""

    path: str
    body: bytes
    wanted: Wanted
    continues: bool = False


def native(path: str, body: bytes, facts: Facts) -> Native:
    """Return what to ask Ollama for a request to one of PATHS. Raises NotForOllama."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        raise NotForOllama(f"a request has at most {MOST_VALUES} values, counted by commas and brackets")
    _refuse_unsupported(body)
    try:
        if path == "/v1/chat/completions":
            return _chat(decode(body, Chat, subject="request"), facts)
        if path == "/v1/completions":
            return _completion(decode(body, Completion, subject="request"), facts)
        return _embedding(decode(body, Embedding, subject="request"), facts)
    except ValidationProblem as error:
        param = error.problems[0].where.removeprefix("$").removeprefix(".") if error.problems else ""
        raise NotForOllama(error.message, param=param or None) from None
    except (UnicodeError, RecursionError):
        raise NotForOllama("the request cannot be written as JSON again") from None


def probe(model: str, facts: Facts) -> bytes:
    """Return what to ask of ``/api/chat`` to see whether a model goes on from the beginning of an answer."""
    said = [{"role": "user", "content": PROBE_ASKS}, {"role": "assistant", "content": PROBE_BEGIN}]
    options: dict[str, Any] = {"temperature": 0, "num_predict": PROBE_TOKENS}
    told = {"model": model, "messages": said, "stream": False, "think": False}
    return encode(told | _common(facts, options))


def _common(facts: Facts, options: dict[str, Any]) -> dict[str, Any]:
    """Return what every request says."""
    # With another size than it was loaded with, Ollama would load the model anew, under the owner's hands.
    if facts.context:
        options["num_ctx"] = facts.context
    told: dict[str, Any] = {"options": options} if options else {}
    return told | {"keep_alive": facts.keep_alive} if facts.keep_alive else told


def _refuse_unsupported(body: bytes) -> None:
    try:
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise NotForOllama("the request is no JSON object") from None
    for name in UNSUPPORTED:
        value = bytes(given.get(name, b"null"))
        if value not in NOTHING and not (value == b"1" and name in ONE_IS_FINE):
            raise NotForOllama(f"Ollama has nothing for {name}", param=name, api_code="unsupported_parameter")


# -- chats -------------------------------------------------------------------------------------------------------


def _chat(asked: Chat, facts: Facts) -> Native:
    if not asked.messages:
        raise NotForOllama("there are no messages", param="messages")
    continues = _continues(asked)
    calls = {call.id: call.function.name for one in asked.messages for call in one.tool_calls or () if call.id}
    told: dict[str, Any] = {
        "model": asked.model,
        "messages": [_message(one, calls) for one in asked.messages],
        # Whole answers are read as a stream, too: so it shows that Ollama lives, and where it failed.
        "stream": True,
        # A chat that is too long is refused; otherwise Ollama quietly forgets its beginning.
        "truncate": False,
    }
    if tools := _tools(asked):
        told["tools"] = tools
    if (form := _form(asked.response_format)) is not None:
        told["format"] = form
    # Behind the beginning of an answer there is nothing left to think about.
    if (think := False if continues else _think(asked, facts)) is not None:
        told["think"] = think
    if asked.logprobs:
        told |= _probabilities(asked.top_logprobs or 0)
    return Native("/api/chat", encode(told | _common(facts, _options(asked))), _wanted("chat", asked), continues)


def _wanted(kind: Literal["chat", "completion"], asked: Asked) -> Wanted:
    usage = asked.stream_options is not None and asked.stream_options.include_usage is True
    return Wanted(kind, asked.model, stream=asked.stream is True, usage=usage)


def _continues(asked: Chat) -> bool:
    if asked.continue_final_message is not True:
        return False
    last = asked.messages[-1]
    if asked.add_generation_prompt is True:
        raise NotForOllama("an answer is continued or begun, not both", param="add_generation_prompt")
    if last.role != "assistant" or not isinstance(last.content, str) or not last.content or last.tool_calls:
        raise NotForOllama("the last message is no text of the assistant's", param="continue_final_message")
    return True


def _message(one: Message, calls: dict[str, str]) -> dict[str, Any]:
    role = ROLES.get(one.role.lower())
    if role is None:
        raise NotForOllama(f"Ollama knows no role {one.role[:60]!r}", param="messages")
    parts = one.content if isinstance(one.content, list) else []
    told: dict[str, Any] = {"role": role, "content": _text(one.content)}
    if images := [_image(part) for part in parts if part.type != "text"]:
        told["images"] = images
    if one.reasoning_content:
        told["thinking"] = one.reasoning_content
    if one.tool_calls:
        told["tool_calls"] = [_call(call) for call in one.tool_calls]
    if role == "tool":
        if name := one.name or calls.get(one.tool_call_id or ""):
            told["tool_name"] = name
        if one.tool_call_id:
            told["tool_call_id"] = one.tool_call_id
    return told


def _text(content: str | list[Part] | None) -> str:
    if isinstance(content, list):
        return "\n".join(part.text for part in content if part.type == "text")
    return content or ""


def _image(part: Part) -> str:
    """Return a picture, or a sound, in base64."""
    if part.type == "input_audio" and part.input_audio is not None:
        return part.input_audio.data
    if part.type != "image_url" or part.image_url is None:
        raise NotForOllama(f"Ollama has nothing for a part of type {part.type[:60]!r}", param="messages")
    url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
    head, comma, data = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64") or not comma or not data:
        raise NotForOllama(
            "a picture comes along as a data: URL in base64; nothing is fetched from elsewhere", param="messages"
        )
    return data


def _call(call: Call) -> dict[str, Any]:
    """Return a call of a tool that was made before: Ollama wants an object where OpenAI has text."""
    text = call.function.arguments or "{}"
    try:
        arguments = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise NotForOllama("the arguments of a tool call are no JSON object", param="messages") from None
    told: dict[str, Any] = {"function": {"name": call.function.name, "arguments": arguments}}
    return {"id": call.id, **told} if call.id else told


def _tools(asked: Chat) -> list[msgspec.Raw]:
    """Return the tools that are offered: of a choice Ollama knows nothing, so the others are left out."""
    tools, choice = asked.tools or [], asked.tool_choice
    if choice == "none" or not isinstance(choice, Named):
        return [] if choice == "none" else tools
    name = choice.function.name
    chosen = [tool for tool in tools if decode(bytes(tool), Named, subject="tool").function.name == name]
    if not chosen:
        raise NotForOllama(f"there is no tool {name[:60]!r}", param="tool_choice")
    return chosen


def _form(form: Form | None) -> Any:  # noqa: ANN401 - a word, or somebody's JSON schema
    """Return what the answer's form is to be: a JSON schema, JSON of any kind, or nothing."""
    if form is None or form.type == "text":
        return None
    schema = form.schema if form.json_schema is None else form.json_schema.schema
    if form.type not in ("json_object", "json_schema"):
        raise NotForOllama(f"there is no form {form.type[:60]!r}", param="response_format")
    if bytes(schema) not in (b"", b"null"):
        return schema
    if form.type == "json_object":
        return "json"
    raise NotForOllama("there is no schema for the answer's form", param="response_format")


def _think(asked: Chat, facts: Facts) -> bool | str | None:
    """Return whether to think, and how much; nothing leaves it to the model."""
    effort, options = asked.reasoning_effort, asked.chat_template_kwargs
    if effort == "none" or (options is not None and options.enable_thinking is False):
        return False
    if not effort or facts.thinks is False:
        return None
    if effort not in EFFORTS:
        raise NotForOllama(f"there is no effort {effort[:60]!r}", param="reasoning_effort")
    return EFFORTS[effort]


def _probabilities(top: int) -> dict[str, Any]:
    return {"logprobs": True, **({"top_logprobs": top} if top else {})}


def _options(asked: Asked) -> dict[str, Any]:
    """Return the options that a client gives; what it leaves out is for the model's own defaults to say."""
    options: dict[str, Any] = {}
    for name, theirs in OPTIONS.items():
        if (value := getattr(asked, name)) is not None:
            options[theirs] = _sane(name, value)
    if (limit := asked.limit) not in (None, NO_LIMIT):
        if limit < 1:
            raise NotForOllama("an answer has one token at least", param="max_tokens")
        options["num_predict"] = _sane("max_tokens", limit)
    if stops := [one for one in ([asked.stop] if isinstance(asked.stop, str) else asked.stop or []) if one]:
        options["stop"] = stops
    return options


def _sane(name: str, value: float) -> float:
    if abs(value) > MOST_NUMBER:
        raise NotForOllama(f"{name} is out of range", param=name)
    return value


# -- completions and embeddings ----------------------------------------------------------------------------------


def _completion(asked: Completion, facts: Facts) -> Native:
    prompt = asked.prompt
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        # Without a prompt Ollama would only load the model.
        raise NotForOllama("the prompt is one text that is not empty", param="prompt")
    told: dict[str, Any] = {"model": asked.model, "prompt": prompt, "stream": True, "truncate": False, "think": False}
    # Only a model's own template says how the text on both sides of a gap is to be written.
    told |= {"suffix": asked.suffix} if asked.suffix else {"raw": True}
    if asked.logprobs is not None:
        told |= _probabilities(asked.logprobs)
    return Native("/api/generate", encode(told | _common(facts, _options(asked))), _wanted("completion", asked))


def _embedding(asked: Embedding, facts: Facts) -> Native:
    texts = asked.input if isinstance(asked.input, list) else [asked.input]
    if not texts or not all(isinstance(one, str) and one for one in texts):
        raise NotForOllama("the input is text, or a list of texts, none of them empty", param="input")
    if asked.encoding_format not in (None, "float", "base64"):
        raise NotForOllama("embeddings come as float or base64", param="encoding_format")
    told: dict[str, Any] = {"model": asked.model, "input": texts, "truncate": False}
    if asked.dimensions is not None:
        told["dimensions"] = _sane("dimensions", asked.dimensions)
    wanted = Wanted("embedding", asked.model, base64=asked.encoding_format == "base64")
    return Native("/api/embed", encode(told | _common(facts, {})), wanted)
