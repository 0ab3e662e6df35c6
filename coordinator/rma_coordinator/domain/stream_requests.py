"""What a request for a streamed answer says, as far as it matters where the answer was cut. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from rma_coordinator.domain.stream_events import MOST_TEXT_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rma_coordinator.domain.continuing import Delivered

#: How thoughts begin that an engine leaves in the text; templates take them out of what was said before.
THOUGHT = "<think>"
#: Members of a request that bound an answer's tokens, the one that counts first.
LIMITS = ("max_completion_tokens", "max_tokens", "n_predict")
#: Members that make an engine's grammar start at its root again: what follows the seam would be nested or doubled.
GRAMMARS = (
    "format", "grammar", "guided_choice", "guided_grammar", "guided_json", "guided_regex", "json_schema",
    "response_format", "structured_outputs",
)  # fmt: skip
#: Members that a continuation could not do justice to, whatever they say.
UNCONTINUED = ("audio", "echo", "n_probs", "prompt_embeds", "suffix")
#: A longer stop string is not looked for across the seam.
MOST_STOP = 1024


def members(body: bytes) -> dict[str, msgspec.Raw]:
    """Return a request's members as they are written; none where it is no JSON object, which no engine answers."""
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return {}


def member(asked: Mapping[str, msgspec.Raw], name: str) -> Any:  # noqa: ANN401 - plain JSON has no narrower type
    """Return one member, read; ``None`` where it is not there or cannot be read."""
    try:
        return msgspec.json.decode(asked.get(name, b"null"))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


def positive(asked: Mapping[str, msgspec.Raw], name: str) -> int | None:
    """Return a member that is a whole number above 0."""
    value = member(asked, name)
    return value if type(value) is int and value > 0 else None


def limit_of(asked: Mapping[str, msgspec.Raw]) -> int | None:
    """Return the tokens that an answer may have, where the request says so."""
    return next((limit for name in LIMITS if (limit := positive(asked, name)) is not None), None)


def expected(asked: Mapping[str, msgspec.Raw]) -> int:
    """Return how many choices an answer has."""
    prompt = member(asked, "prompt")
    several = isinstance(prompt, list) and not any(type(part) is int for part in prompt)
    return (positive(asked, "n") or 1) * (max(1, len(prompt)) if several else 1)


def obstacles(asked: Mapping[str, msgspec.Raw], delivered: Delivered) -> Iterator[str]:
    """Say what makes an answer that was begun one that cannot be continued."""
    if delivered.other:
        yield f"a part of {delivered.other} was delivered"
    if delivered.too_long:
        yield f"it has more than {MOST_TEXT_BYTES} bytes of text"
    if delivered.text.lstrip().startswith(THOUGHT):
        yield "the model's thoughts are part of its text"
    if expected(asked) > 1 or (positive(asked, "best_of") or 1) > 1:
        yield "more than one choice was asked for"
    # 0 asks too: for the probability of the chosen token alone.
    wanted = [member(asked, name) for name in ("logprobs", "prompt_logprobs")]
    if delivered.logprobs or any(value is not None and value is not False for value in wanted):
        yield "probabilities of tokens were asked for"
    yield from _demands(asked)
    if reason := _unopened(asked):
        yield reason


def _demands(asked: Mapping[str, msgspec.Raw]) -> Iterator[str]:
    # Asked to continue, engines write text where they would have called a tool.
    for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        if member(asked, tools) and member(asked, choice) != "none":
            yield "tools were offered"
    for name in GRAMMARS:
        if (form := member(asked, name)) and form != {"type": "text"}:
            yield f"its form was prescribed ({name})"
    yield from (f"it was asked for with {name}" for name in UNCONTINUED if member(asked, name))


def _unopened(asked: Mapping[str, msgspec.Raw]) -> str:
    """Return why the text so far cannot be put behind what the request says, if it cannot."""
    if "messages" not in asked:
        prompt = member(asked, "prompt")
        lone = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
        return "" if isinstance(lone, str) else "its prompt is not text"
    messages = member(asked, "messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict):
        return "its messages cannot be read"
    if last.get("role") != "assistant":
        return ""
    # Without the flag some engines go on from the assistant's words, and others begin a new answer behind them.
    if member(asked, "continue_final_message") is not True or not isinstance(last.get("content"), str):
        return "the assistant has the last word in its messages"
    return ""


def begun(asked: Mapping[str, msgspec.Raw], said: str) -> list[Any]:
    """Return the messages with the answer's beginning: in the last one where that is already its beginning."""
    messages: list[Any] = msgspec.json.decode(asked["messages"], type=list[msgspec.Raw])
    last = msgspec.json.decode(messages[-1])
    if last.get("role") == "assistant":
        return [*messages[:-1], {**last, "content": last["content"] + said}]
    return [*messages, {"role": "assistant", "content": said}]


def rests(asked: Mapping[str, msgspec.Raw], text: str) -> list[str]:
    """Return what would complete a stop string that the text ends with the beginning of."""
    stop = member(asked, "stop")
    stops = [one for one in (stop if isinstance(stop, list) else [stop]) if isinstance(one, str)]
    tail = text[-MOST_STOP:]
    return [
        one[length:]
        for one in stops
        if len(one) <= MOST_STOP
        for length in range(1, len(one))
        if tail.endswith(one[:length])
    ]
