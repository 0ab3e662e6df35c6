"""A streamed answer that lost its worker: when it goes on, with which request, and as which stream."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rma_coordinator.domain import stream_requests
from rma_coordinator.domain.continuing import Delivered, Seam, continued, decide, ending
from rma_coordinator.domain.stream_events import MOST_TEXT_BYTES, BadChunk, read

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

USER = {"role": "user", "content": "Hello"}


def chat(**members: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [USER], "stream": True, **members}).encode()


def plain(**members: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "Hello", "stream": True, **members}).encode()


def delta(_index: int = 0, /, *, finish: str | None = None, **members: Any) -> dict[str, Any]:
    choice = {"index": _index, "delta": members, "finish_reason": finish}
    return {"id": "one", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def delivered(*chunks: dict[str, Any]) -> Delivered:
    answer = Delivered()
    for chunk in chunks:
        answer.take(chunk)
    return answer


ROLE = delta(role="assistant", content=None)
TEXT = delta(content="Once upon")
TOOL = delta(tool_calls=[{"index": 0, "function": {"name": "look"}}])
OFFERED = [{"type": "function", "function": {"name": "look"}}]
SCHEMA = {"type": "json_schema", "json_schema": {}}

#: Request, what was delivered, what follows, and a word of the reason.
CASES: dict[str, tuple[bytes, list[dict[str, Any]], str, str]] = {
    "nothing": (chat(), [], "restart", ""),
    "the role alone": (chat(tools=OFFERED), [ROLE], "restart", ""),
    "thoughts alone": (chat(), [ROLE, delta(reasoning_content="hm")], "restart", ""),
    "white space alone": (chat(response_format=SCHEMA), [ROLE, delta(content="\n\n")], "restart", ""),
    "nothing of several choices": (chat(n=2), [ROLE], "restart", ""),
    "nothing with probabilities": (chat(logprobs=True), [ROLE], "restart", ""),
    "no JSON, nothing": (b"{", [], "restart", ""),
    "text": (chat(), [ROLE, TEXT], "continue", ""),
    "text after thoughts": (chat(), [delta(reasoning="hm"), TEXT], "continue", ""),
    "tools that are not to be called": (chat(tools=OFFERED, tool_choice="none"), [TEXT], "continue", ""),
    "no tools": (chat(tools=[], functions=None), [TEXT], "continue", ""),
    "text as the prescribed form": (chat(response_format={"type": "text"}), [TEXT], "continue", ""),
    "what is off": (chat(logprobs=False, top_logprobs=0, echo=False, n=1, grammar=""), [TEXT], "continue", ""),
    "a plain prompt": (plain(), [TEXT], "continue", ""),
    "one plain prompt in a list": (plain(prompt=["a"]), [TEXT], "continue", ""),
    "its own beginning, with the flag": (
        chat(messages=[USER, {"role": "assistant", "content": "Well"}], continue_final_message=True),
        [TEXT],
        "continue",
        "",
    ),
    "tools offered": (chat(tools=OFFERED), [TEXT], "give_up", "tools"),
    "functions offered": (chat(functions=[{"name": "look"}]), [TEXT], "give_up", "tools"),
    "a tool's fragment": (chat(tools=OFFERED), [ROLE, TOOL], "give_up", "tool_calls"),
    "a refusal": (chat(), [delta(refusal="No")], "give_up", "refusal"),
    "content in parts": (chat(), [delta(content=[{"type": "text"}])], "give_up", "no text"),
    "JSON": (chat(response_format={"type": "json_object"}), [TEXT], "give_up", "response_format"),
    "a schema": (chat(response_format=SCHEMA), [TEXT], "give_up", "response_format"),
    "a grammar": (chat(grammar="root ::= x"), [TEXT], "give_up", "grammar"),
    "a guided choice": (chat(guided_choice=["a"]), [TEXT], "give_up", "guided_choice"),
    "probabilities": (chat(logprobs=True), [TEXT], "give_up", "probabilities"),
    "the probability of one token": (plain(logprobs=0), [TEXT], "give_up", "probabilities"),
    "several choices": (chat(n=2), [TEXT], "give_up", "more than one"),
    "the second of several choices": (chat(n=2), [delta(1, content=" ")], "give_up", "more than one"),
    "one end of two": (chat(n=2), [delta(0, finish="stop")], "give_up", "more than one"),
    "the best of several": (plain(best_of=3), [TEXT], "give_up", "more than one"),
    "several prompts": (plain(prompt=["a", "b"]), [TEXT], "give_up", "more than one"),
    "a prompt of tokens": (plain(prompt=[1, 2, 3]), [TEXT], "give_up", "not text"),
    "echo": (plain(echo=True), [TEXT], "give_up", "echo"),
    "a text to fill in": (plain(suffix="the end"), [TEXT], "give_up", "suffix"),
    "sound": (chat(audio={"voice": "x"}), [TEXT], "give_up", "audio"),
    "too long": (chat(), [delta(content="x" * 65_537)], "give_up", "65536"),
    "thoughts in the text": (chat(), [delta(content="\n<think>"), TEXT], "give_up", "thoughts"),
    "its own beginning": (chat(messages=[{"role": "assistant", "content": "Well"}]), [TEXT], "give_up", "last word"),
    "messages that are none": (chat(messages="Hello"), [TEXT], "give_up", "messages"),
    "no JSON": (b"{", [TEXT], "give_up", "not text"),
    "too deep": (chat()[:-1] + b',"tools":' + b"[" * 9999 + b"]" * 9999 + b"}", [TEXT], "give_up", ""),
    "the end of all": (chat(), [TEXT, delta(finish="stop")], "finish", ""),
    "every end": (chat(n=2), [delta(0, finish="stop"), delta(1, finish="stop")], "finish", ""),
    "an end without text": (chat(tools=OFFERED), [ROLE, TOOL, delta(finish="tool_calls")], "finish", ""),
    "as much as was allowed": (chat(max_tokens=1), [TEXT], "finish", ""),
    "as much as the newer limit": (chat(max_tokens=1, max_completion_tokens=2), [TEXT, TEXT], "finish", ""),
    "less than the newer limit": (chat(max_tokens=1, max_completion_tokens=2), [TEXT], "continue", ""),
    "no limit": (chat(max_tokens=-1), [TEXT], "continue", ""),
}


@pytest.mark.parametrize("name", CASES)
def test_what_was_asked_for_and_what_came_decide_how_it_goes_on(name: str) -> None:
    body, chunks, outcome, word = CASES[name]
    decision = decide(body, delivered(*chunks))
    assert decision.outcome == outcome, decision
    assert word in decision.reason
    assert bool(decision.reason) == (outcome == "give_up")


def test_the_next_worker_gets_the_text_so_far_as_the_beginning_and_the_rest_untouched() -> None:
    body = b'{"seed":18446744073709551617,"temperature":0.10,"messages":[{"content":"\\u0041", "role":"user"}],"z":1e5}'
    answer = delivered(ROLE, delta(content="Once"), delta(content=" upon \n"))
    assert continued(body, answer) == (
        b'{"seed":18446744073709551617,"temperature":0.10,"messages":[{"content":"\\u0041", "role":"user"},'
        b'{"role":"assistant","content":"Once upon"}],"z":1e5,'
        b'"continue_final_message":true,"add_generation_prompt":false}'
    )
    assert answer.text == "Once upon \n"


@pytest.mark.parametrize(("prompt", "after"), [("Hello ", "Hello Once upon"), (["a"], ["aOnce upon"])])
def test_a_plain_prompt_grows_by_the_text_so_far(prompt: Any, after: Any) -> None:
    assert json.loads(continued(plain(prompt=prompt), delivered(TEXT))) == {**json.loads(plain()), "prompt": after}


def test_an_answer_that_the_client_began_grows_in_its_own_message() -> None:
    messages = [USER, {"role": "assistant", "content": "Well, ", "name": "x"}]
    told = json.loads(continued(chat(messages=messages, continue_final_message=True), delivered(TEXT)))
    assert told["messages"] == [USER, {"role": "assistant", "content": "Well, Once upon", "name": "x"}]


def test_a_model_that_has_thought_is_asked_not_to_think_again() -> None:
    body = chat(chat_template_kwargs={"style": "dry", "enable_thinking": True})
    told = json.loads(continued(body, delivered(delta(reasoning_content="hm"), TEXT)))
    assert told["chat_template_kwargs"] == {"style": "dry", "enable_thinking": False}
    assert "hm" not in json.dumps(told["messages"])


def test_a_request_that_runs_anew_is_the_same() -> None:
    body = b'{ "messages": [] }'
    assert continued(body, delivered(ROLE, delta(content=" "))) == body


def test_limits_shrink_by_what_was_made_and_never_below_one() -> None:
    limits = {"max_tokens": 10, "max_completion_tokens": 2, "n_predict": -1, "min_tokens": 1}
    told = json.loads(continued(chat(**limits), delivered(TEXT, TEXT, TEXT)))
    assert {name: told[name] for name in limits} == {
        "max_tokens": 7, "max_completion_tokens": 1, "n_predict": -1, "min_tokens": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "said",
    [
        {"usage": {"prompt_tokens": 7, "completion_tokens": 5}},
        {"timings": {"cache_n": 3, "prompt_n": 4, "predicted_n": 5}},
    ],
)
def test_the_engines_own_count_goes_before_that_of_events(said: dict[str, Any]) -> None:
    answer = delivered({**delta(content="abcde"), **said})
    assert (answer.tokens, answer.kept, answer.prompt_tokens) == (5, 5, 7)
    # Made again is what was cut off: two of five tokens with one character each.
    assert delivered({**delta(content="abc  "), **said}).kept == 3


#: What may have come before plain texts: more tokens told than texts, fewer, probabilities, white space, nothing.
BEFORE = [
    delta(role="assistant", content=""),
    {**delta(content="a "), "usage": {"completion_tokens": 9}},
    {**delta(content="b"), "usage": {"completion_tokens": 1}},
    {"choices": [{"index": 0, "delta": {"content": ""}, "logprobs": {"content": [1]}, "finish_reason": None}]},
    delta(content=" \n"),
    delta(content="x" * (MOST_TEXT_BYTES - 9)),
]


@given(
    before=st.lists(st.sampled_from(BEFORE), max_size=3),
    texts=st.lists(st.text(st.sampled_from("a \n\u00e9\u2003"), min_size=1, max_size=4), max_size=6),
    cuts=st.lists(st.integers(0, 4), max_size=3),
    again=st.booleans(),
    kept_back=st.booleans(),
)
@example(before=[BEFORE[3]], texts=[" "], cuts=[], again=False, kept_back=False)
@example(before=[], texts=["a "], cuts=[], again=False, kept_back=True)
def test_texts_that_are_counted_together_come_to_the_same(
    before: list[dict[str, Any]], texts: list[str], cuts: list[int], again: bool, kept_back: bool
) -> None:
    one, many = delivered(delta(content=""), *before), delivered(delta(content=""), *before)
    for seen in (one, many):
        if again:
            seen.resume()
        if kept_back:
            seen.count(read(delta(content="b")))
    for start, end in itertools.pairwise([0, *sorted(cuts), len(texts)]):
        if part := texts[start:end]:
            for text in part:
                one.take(delta(content=text))
            many.say(part)
            assert vars(many) == vars(one)


def test_tokens_that_an_engine_holds_back_are_not_counted() -> None:
    answer = delivered(
        {**delta(content="a"), "timings": {"predicted_n": 1}}, {**delta(content=""), "timings": {"predicted_n": 3}}
    )
    assert answer.tokens == 1


def test_a_lost_answer_that_is_as_long_as_allowed_gets_its_end_without_a_second_run() -> None:
    body = chat(max_tokens=2, stream_options={"include_usage": True})
    answer = delivered(ROLE, {**delta(content="a"), "timings": {"cache_n": 2, "prompt_n": 5}}, delta(content="b"))
    assert decide(body, answer).outcome == "finish"
    end, usage = ending(body, answer)
    assert end == delta(finish="length")
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    assert (usage["id"], "x_rma" in usage) == ("one", False)
    assert ending(body, answer) == []


def test_a_prompt_whose_tokens_nobody_told_is_guessed_and_says_so() -> None:
    [usage] = ending(chat(stream_options={"include_usage": True}), delivered(TEXT, delta(finish="stop")))
    assert usage["usage"]["completion_tokens"] == 1
    assert usage["usage"]["prompt_tokens"] > 0
    assert usage["x_rma"] == {"estimated": True}


def test_an_end_that_lacks_nothing_is_not_given_again() -> None:
    body, usage = chat(stream_options={"include_usage": True}), {"prompt_tokens": 1, "completion_tokens": 1}
    assert ending(body, delivered(TEXT, delta(finish="stop"), {"choices": [], "usage": usage})) == []
    assert ending(chat(), delivered(TEXT, delta(finish="stop"))) == []
    [end] = ending(plain(), delivered({"choices": [{"index": 0, "text": "a"}]}))
    assert end["object"] == "text_completion"
    assert end["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]


def said(chunks: Iterable[dict[str, Any]]) -> str:
    return "".join(
        choice["delta"].get("content") or "" if "delta" in choice else choice.get("text") or ""
        for chunk in chunks
        for choice in chunk["choices"]
    )


def passed(seam: Seam, *chunks: dict[str, Any]) -> list[dict[str, Any]]:
    return [out for chunk in chunks for out in seam.take(chunk)]


def test_the_seam_leaves_out_the_second_role_and_the_second_thoughts_and_keeps_the_first_id() -> None:
    seam = Seam(chat(), delivered(ROLE, delta(reasoning_content="hm"), TEXT))
    second = [{**ROLE, "id": "two"}, {**delta(reasoning_content="so"), "id": "two"}, {**TEXT, "id": "two"}]
    assert passed(seam, *second) == [TEXT]


def test_after_thoughts_alone_the_second_thoughts_are_left_out_and_the_text_comes() -> None:
    seam = Seam(chat(), delivered(ROLE, delta(reasoning="hm")))
    assert passed(seam, ROLE, delta(reasoning="so"), TEXT, delta(finish="stop")) == [TEXT, delta(finish="stop")]


def test_a_run_from_the_beginning_passes_as_it_is() -> None:
    chunks = [ROLE, delta(reasoning="hm"), TOOL, delta(finish="tool_calls")]
    assert passed(Seam(chat(tools=OFFERED), Delivered()), *chunks) == chunks


@pytest.mark.parametrize(
    ("first", "second", "whole"),
    [
        (["a", " "], [" b"], "a b"),
        (["a", " \n"], [" ", "\n", "b"], "a \nb"),
        (["a \n"], [" \n\n b"], "a \n\n b"),
        (["a\n\n"], ["\n    b"], "a\n\n    b"),
        (["a "], ["b"], "a b"),
        (["a"], [" b"], "a b"),
        (["\n\n"], ["\n\n", "b"], "\n\nb"),
        (["a "], [" ", " ", "b"], "a  b"),
        (["a \n"], [" b", "\nc"], "a \nb\nc"),
    ],
)
def test_white_space_that_comes_again_is_dropped(first: list[str], second: list[str], whole: str) -> None:
    answer = delivered(*(delta(content=text) for text in first))
    passed(Seam(chat(), answer), *(delta(content=text) for text in second))
    assert answer.text == whole


def test_usage_is_that_of_one_run_however_often_it_thought() -> None:
    answer, body = delivered(ROLE, delta(reasoning="h"), delta(reasoning="m")), chat()
    passed(Seam(body, answer), ROLE, delta(reasoning="so"), delta(content="a"), delta(content="b"))
    assert decide(body, answer).outcome == "continue"
    details = {"cached_tokens": 9, "x": 1}
    # The third engine read the prompt's own 7 tokens and the two of the text, and made two more.
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11, "prompt_tokens_details": details}
    told = passed(Seam(body, answer), delta(content="c"), delta(content="d"), {"choices": [], "usage": usage})[-1]
    assert told["usage"] == {
        "prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 7, "x": 1},
    }  # fmt: skip


def test_the_text_is_that_of_the_first_choice() -> None:
    assert delivered(TEXT, delta(1, content="other")).text == "Once upon"


@pytest.mark.parametrize(
    ("stop", "first", "second", "whole", "ends"),
    [
        ("END", "the EN", ["D", " of"], "the EN", True),
        (["x", "END"], "the E", ["N", "D of"], "the E", True),
        ("END", "the E", ["N", "T"], "the ENT", False),
        ("END", "the E", ["N"], "the EN", False),
        ("aab", "aa", ["ab"], "aa", True),
        ("END", "the end", ["END"], "the endEND", False),
        (["", None, 3, "y" * 9999], "y", ["yy"], "yyy", False),
    ],
)
def test_a_stop_string_is_found_across_the_seam(
    stop: Any, first: str, second: list[str], whole: str, ends: bool
) -> None:
    answer = delivered(delta(content=first))
    seam = Seam(chat(stop=stop), answer)
    out = passed(seam, *(delta(content=text) for text in second))
    assert seam.done is ends
    if ends:
        assert out[-1] == delta(finish="stop")
        assert seam.take(delta(content="more")) == []
    else:
        passed(seam, delta(finish="length"))
    assert answer.text == whole
    assert list(answer.finished) == [0]


def test_a_stop_string_that_is_to_be_shown_is_shown_whole() -> None:
    answer = delivered(delta(content="the E"))
    passed(Seam(chat(stop="END", include_stop_str_in_output=True), answer), delta(content="ND of"))
    assert answer.text == "the END"


# -- an ideal engine, cut anywhere -----------------------------------------------------------------------------------


#: What the ideal engine makes of every request's own prompt.
PROMPT_TOKENS = 11


class Engine(NamedTuple):
    """Says ``answer`` after anything: a token a character; ``sizes`` of the pieces it sends, ``tells`` their count."""

    answer: str
    sizes: tuple[int, ...]
    tells: str

    def stream(self, body: bytes) -> Iterator[dict[str, Any]]:
        asked = json.loads(body)
        begin, is_chat = self._begin(asked), "messages" in asked
        assert self.answer.startswith(begin)
        assert not is_chat or not begin or (asked["continue_final_message"] and not asked["add_generation_prompt"])
        text, limit = self.answer[len(begin) :], asked["max_tokens"]
        head = {"id": f"after {len(begin)}", "created": len(begin), "model": "m"}
        if is_chat:
            yield {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        for end, piece in self._pieces(text[:limit]):
            yield {**head, **self._told(len(begin), end), "choices": [_choice(is_chat, piece, None)]}
        yield {**head, "choices": [_choice(is_chat, "", "stop" if len(text) < limit else "length")]}
        if asked.get("stream_options"):
            used = min(limit, len(text))
            usage = {"prompt_tokens": PROMPT_TOKENS + len(begin), "completion_tokens": used}
            yield {**head, "choices": [], "usage": {**usage, "total_tokens": sum(usage.values())}}

    def _begin(self, asked: dict[str, Any]) -> str:
        if "prompt" in asked:
            return str(asked["prompt"]).removeprefix("Hello")
        last = asked["messages"][-1]
        return str(last["content"]) if last["role"] == "assistant" else ""

    def _pieces(self, text: str) -> Iterator[tuple[int, str]]:
        at = turn = 0
        while at < len(text):
            size = self.sizes[turn % len(self.sizes)] if self.tells else 1
            turn += 1
            piece = text[at : at + size]
            at += len(piece)
            yield at, piece

    def _told(self, begun: int, made: int) -> dict[str, Any]:
        if self.tells == "usage":
            return {"usage": {"prompt_tokens": PROMPT_TOKENS + begun, "completion_tokens": made}}
        if self.tells == "timings":
            return {"timings": {"cache_n": begun, "prompt_n": PROMPT_TOKENS, "predicted_n": made}}
        return {}


def _choice(is_chat: bool, text: str, finish: str | None) -> dict[str, Any]:
    says: dict[str, Any] = {"text": text} if not is_chat else {"delta": {"content": text} if text else {}}
    return {"index": 0, **says, "finish_reason": finish}


def through(engine: Engine, body: bytes, cuts: Iterable[int]) -> list[dict[str, Any]]:
    """Return what a client gets when each cut ends a run after so many of its events."""
    answer, out = Delivered(), list[dict[str, Any]]()
    lost, again = iter(cuts), False
    while True:
        decision = decide(body, answer)
        if decision.outcome == "finish" and again:
            return [*out, *ending(body, answer)]
        assert decision.outcome in ("restart", "continue"), decision
        sent, again = continued(body, answer), True
        assert json.loads(sent)["max_tokens"] > 0
        seam, left = Seam(body, answer), next(lost, None)
        for number, chunk in enumerate(engine.stream(sent)):
            if number == left:
                break
            out += seam.take(chunk)
        else:
            return out


def check(engine: Engine, cuts: list[int], *, limit: int, is_chat: bool, usage: bool) -> None:
    """A client gets the same whether or not, and wherever, the answer is cut."""
    options = {"max_tokens": limit, **({"stream_options": {"include_usage": True}} if usage else {})}
    body = chat(**options) if is_chat else plain(**options)
    uncut, cut = list(engine.stream(body)), through(engine, body, cuts)
    assert said(cut) == said(uncut) == engine.answer[:limit]
    choices = [choice for chunk in cut for choice in chunk["choices"]]
    assert [bool(choice["delta"].get("role")) for choice in choices if "delta" in choice].count(True) == is_chat
    ends = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    assert ends == [uncut[-2 if usage else -1]["choices"][0]["finish_reason"]]
    assert len({(chunk["id"], chunk["created"]) for chunk in cut}) == 1
    last = [chunk["usage"] for chunk in cut if not chunk["choices"]]
    assert len(last) == usage
    if usage and "x_rma" in cut[-1]:
        assert last[0]["completion_tokens"] == uncut[-1]["usage"]["completion_tokens"]
    elif usage:
        assert last[0] == uncut[-1]["usage"]


ENGINES = st.builds(
    Engine,
    answer=st.text(st.one_of(st.sampled_from(" \n\tab"), st.characters(codec="utf-8")), max_size=20),
    sizes=st.lists(st.integers(1, 7), min_size=1).map(tuple),
    tells=st.sampled_from(["", "usage", "timings"]),
)


@given(ENGINES, st.lists(st.integers(0, 22), max_size=4), st.integers(1, 25), st.booleans(), st.booleans())
def test_an_answer_cut_anywhere_is_the_uncut_one(
    engine: Engine, cuts: list[int], limit: int, is_chat: bool, usage: bool
) -> None:
    check(engine, cuts, limit=limit, is_chat=is_chat, usage=usage)


@pytest.mark.parametrize("tells", ["", "usage", "timings"])
@pytest.mark.parametrize("is_chat", [True, False])
def test_a_short_answer_cut_at_every_place_with_every_limit_is_the_uncut_one(tells: str, is_chat: bool) -> None:
    for sizes in ((1,), (3,), (2, 1)):
        engine = Engine("\na  b \n c", sizes, tells)
        for cut in range(12):
            for limit in range(1, 12):
                check(engine, [cut, 2], limit=limit, is_chat=is_chat, usage=True)


# -- hostile events --------------------------------------------------------------------------------------------------

ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def members(*names: str, **known: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={**dict.fromkeys(names, ODD), **known})


DELTA = members("role", "tool_calls", "reasoning_content", "x", content=ODD | st.text(max_size=5))
CHOICE = members(
    "finish_reason", "logprobs", text=ODD | st.text(max_size=5), index=ODD | st.integers(0, 2), delta=DELTA
)
COUNTS = members("prompt_tokens", "completion_tokens", "cache_n", "prompt_n", "predicted_n", "prompt_tokens_details")
CHUNK = ODD | members(
    "id", "created", "model", "object",
    choices=ODD | st.lists(CHOICE | ODD, max_size=2), usage=ODD | COUNTS, timings=COUNTS,
)  # fmt: skip
NAMES = [
    *stream_requests.GRAMMARS,
    *stream_requests.UNCONTINUED,
    *stream_requests.LIMITS,
    "n",
    "best_of",
    "logprobs",
    "stop",
    "tools",
]
BODY = members("messages", "prompt", "min_tokens", "stream_options", "chat_template_kwargs", *NAMES).map(
    lambda body: json.dumps(body).encode()
)


@given(BODY | st.binary(max_size=20) | st.just(chat()), st.lists(CHUNK, max_size=5), st.lists(CHUNK, max_size=5))
def test_no_event_and_no_request_does_more_than_be_refused(body: bytes, first: list[Any], second: list[Any]) -> None:
    answer = Delivered()

    def take(chunk: Any) -> None:
        before = (answer.text, answer.tokens, dict(answer.finished))
        try:
            answer.take(chunk)
        except BadChunk:
            assert (answer.text, answer.tokens, answer.finished) == before

    for chunk in first:
        take(chunk)
    if decide(body, answer).outcome in ("restart", "continue"):
        continued(body, answer)
    seam = Seam(body, answer)
    for chunk in second:
        try:
            seam.take(chunk)
        except BadChunk:
            continue
    ending(body, answer)


@pytest.mark.parametrize(
    "chunk",
    [
        None, [], "x", {"choices": {}}, {"choices": [None]}, {"choices": [{}] * 4000}, {"choices": [{"delta": "x"}]},
        delta(-1), delta(True), delta(10**9), {"choices": [{"index": "0"}]}, {"choices": [{"finish_reason": 3}]},
        delta(finish="x" * 9999), delta(content="\ud800"),
    ],
)  # fmt: skip
def test_what_is_no_piece_of_an_answer_is_refused_by_name(chunk: Any) -> None:
    with pytest.raises(BadChunk):
        Delivered().take(chunk)
    with pytest.raises(BadChunk):
        Seam(chat(), Delivered()).take(chunk)


@pytest.mark.parametrize("tokens", [float("nan"), -1, 10**400, "7", True, None, 1.5, float("inf")])
def test_a_count_that_is_none_counts_as_not_told(tokens: Any) -> None:
    first = {**delta(content="a"), "usage": {"completion_tokens": tokens, "prompt_tokens": tokens}}
    answer = delivered(first)
    assert (answer.tokens, answer.prompt_tokens) == (1, None)
    [out] = Seam(chat(), answer).take(first)
    assert out["usage"] == {"completion_tokens": 2, "prompt_tokens": 0, "total_tokens": 2}


def test_memory_stays_bounded_whatever_comes() -> None:
    answer = Delivered()
    tracemalloc.start()
    try:
        for number in range(100_000):
            answer.take(delta(number % 3000 if number % 3000 < 2048 else 0, role="assistant", content=f"{number} 好"))
        answer.take({"id": "x" * 1_000_000, "model": "y" * 1_000_000, "choices": []})
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer.too_long
    assert kept < 512 * 1024
