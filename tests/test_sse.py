"""The events of a stream, one by one: whatever an engine sends, clients get whole events that they can read."""

from __future__ import annotations

import itertools
import json
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rma_coordinator.api.v1 import sse
from rma_coordinator.api.v1.splicing import MOST_TEXT
from rma_coordinator.api.v1.sse import MAX_EVENT_BYTES, Answer, Events, Stream
from tests.openai_kit import END, ROLE, USAGE, delta, event, events, text_of

WHOLE = b"".join(
    [
        b": ping\n\n", ROLE, delta("h\u00e9\U0001f600"), delta("l\n\n"), b"data: {oops\r\n\r\n", event({"x": 1}),
        b"id: 7\ndata: " + delta("o")[6:], delta(finish="stop"), USAGE, END,
    ]
)  # fmt: skip


def fed(*parts: bytes) -> tuple[list[Any], Stream]:
    made = Stream(Answer("chatcmpl-1", 1, "tiny", usage=True))
    text = "".join(made.feed(part).decode() for part in parts)
    return events(text) if text else [], made


@given(cuts=st.lists(st.integers(0, len(WHOLE))))
def test_a_stream_is_the_same_however_it_was_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(WHOLE)]
    found, made = fed(*(WHOLE[a:b] for a, b in itertools.pairwise(places)))
    assert text_of(found) == "h\u00e9\U0001f600l\n\no"
    assert (made.skipped, made.whole, made.done) == (2, True, True)
    assert events(made.end().decode())[0]["usage"]["total_tokens"] == 5


@pytest.mark.parametrize("text", [b'\n"x"', b'"x"\n', b'\n\n"x"', b'\r"x"', b' "x" ', b'"x" ', b'\t"x"'])
def test_white_space_around_the_text_of_an_event_tears_no_event(text: bytes) -> None:
    plain = delta("Hi")
    odd = plain.replace(b'"Hi"', text)
    assert odd != plain
    found, made = fed(plain, plain, odd, plain)
    assert text_of(found).replace("x", "") == "HiHiHi"
    assert made.broken is None


@given(end=st.integers(0, len(WHOLE)))
def test_what_was_cut_off_anywhere_gives_whole_events_and_is_whole_only_with_its_finish_reason(end: int) -> None:
    found, made = fed(WHOLE[:end])
    assert made.whole == any(choice["finish_reason"] for one in found for choice in one["choices"])
    assert "h\u00e9\U0001f600l\n\no".startswith(text_of(found))


#: JSON of any shape, among it what is nearly an event.
ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3) | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "delta",
                    "index",
                    "finish_reason",
                    "tool_calls",
                    "function",
                    "arguments",
                    "usage",
                    "role",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(values=st.lists(ODD, max_size=6), choices=st.lists(ODD, max_size=3))
def test_no_event_of_an_engine_breaks_the_stream_or_those_after_it(values: list[Any], choices: list[Any]) -> None:
    found, made = fed(*map(event, values), event({"choices": choices}), delta("a"), delta(finish="stop"))
    for one in found:
        assert {"id", "created", "model", "choices"} <= set(one)
        assert all(isinstance(choice["index"], int) and "finish_reason" in choice for choice in one["choices"])
    events(made.end().decode())


@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_events_give_nothing(data: bytes) -> None:
    made = Stream(Answer("x", 1, "m"))
    assert made.feed(data) == b""
    assert not made.whole


def test_an_event_without_end_is_bounded() -> None:
    made = Stream(Answer("x", 1, "m"))
    assert made.feed(b"data: " + b"x" * MAX_EVENT_BYTES) == b""
    assert made.broken is not None
    cut = Events()
    assert list(cut.feed(b"data: 1\r\n\r")) == []
    assert list(cut.feed(b"\n")) == [b"1"]


def test_an_end_is_said_once_and_in_words_that_clients_know() -> None:
    found, made = fed(delta("a"), delta(finish="eos"), delta("b", finish="length"))
    assert [one["choices"][0]["finish_reason"] for one in found] == [None, None, "stop"]
    assert made.whole


def test_a_call_of_a_tool_begins_with_all_that_names_it_and_goes_on_with_pieces_of_its_arguments() -> None:
    bare = {"function": {"name": "add", "arguments": {"a": 1}}}
    again = {"index": 0, "id": "other", "type": "function", "function": {"name": "add", "arguments": None}}
    found, _ = fed(delta(tool_calls=[bare, 5]), delta(tool_calls=[again]), delta(tool_calls="no"), delta("a"))
    first, second = (one["choices"][0]["delta"]["tool_calls"] for one in found[1:3])
    assert first[0].pop("id").startswith("call_")
    assert first == [{"index": 0, "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}]
    assert second == [{"index": 0, "function": {"arguments": ""}}]
    assert len(found) == 5, "what says nothing is an empty delta, which clients pass over"


@given(values=st.lists(ODD, max_size=4))
@example(values=[{}, {"index": 0, "choices": None, "function": None}])
@example(values=[{"type": "custom", "function": None}])
def test_odd_calls_of_tools_are_mended_or_left_out(values: list[Any]) -> None:
    found, _ = fed(delta(tool_calls=values), delta("a"))
    for one in found:
        for call in one["choices"][0]["delta"].get("tool_calls", ()):
            assert isinstance(call["index"], int)
            assert isinstance(call.get("function", {}).get("arguments", ""), str)


@given(cut=st.integers(0, 12), asked=st.booleans())
def test_who_comes_later_is_given_the_same_answer(cut: int, asked: bool) -> None:
    parts = [ROLE, *(delta(letter) for letter in "hello wor"), delta(finish="length"), USAGE]
    made = Stream(Answer("chatcmpl-1", 1, "tiny", usage=asked))
    live = "".join(made.feed(part).decode() for part in parts[:cut])
    begun = made.replay()
    assert begun is not None
    rest = "".join(made.feed(part).decode() for part in parts[cut:])
    whole, later = (events(f"{text}{rest}{made.end().decode()}") for text in (live, begun.decode()))
    assert text_of(whole) == text_of(later) == "hello wor"
    ends = [
        [c["finish_reason"] for e in one[:-1] for c in e["choices"] if c["finish_reason"]] for one in (whole, later)
    ]
    assert ends == [["length"], ["length"]]
    assert len(whole[-2]["choices"]) == len(later[-2]["choices"]) == (0 if asked else 1)
    said = [one["choices"][0]["delta"] for one in later[:-1] if one["choices"]]
    assert [delta["role"] for delta in said if "role" in delta] == ["assistant"]
    assert said[0]["role"] == "assistant"


def test_a_text_completion_can_be_replayed_too() -> None:
    made = Stream(Answer("cmpl-1", 1, "tiny", chat=False))
    made.feed(event({"choices": [{"index": 0, "text": "ab"}]}) + event({"choices": [{"index": 0, "text": "c"}]}))
    (one,) = events((made.replay() or b"").decode())
    assert (one["choices"][0]["text"], one["object"]) == ("abc", "text_completion")


class Longhand(Stream):
    """A stream that reads every event in full."""

    def _learn(self, payload: bytes, event: dict[str, Any], ours: bytes) -> None:
        """Remember nothing."""


TEXTS = st.text(st.sampled_from('ab \n"\\{}:,\u00e9\U0001f600'), max_size=4) | st.sampled_from(
    ['"content":"x"', "data: ", '"text":', "\\", " ", "\u2028"]
)


@st.composite
def engine_events(draw: st.DrawFn, *, chat: bool) -> bytes:
    """Give one event as engines write them, nearly all alike, and some that are nearly so."""
    text, odd = draw(TEXTS), draw(st.integers(0, 12))
    finish = '"stop"' if odd == 1 else "null"
    more = {
        2: ',"logprobs":{"content":[]}',
        3: ',"index":0',
        4: ',"delta":{"role":"assistant"}',
        5: ',"finish_reason":"length"',
    }.get(odd, "")
    said = json.dumps(text, ensure_ascii=draw(st.booleans()))
    if odd == 6:
        said = draw(st.sampled_from(['"a","content":"b"', '"\\ud83d"', "null", "5", '"a"}}],"x":[{"y":{"z":"b"', '""']))
    end = draw(st.sampled_from(["\n\n", "\n\n", "\n\n", "\r\n\r\n", "\n"]))
    usage = {7: ',"usage":{"completion_tokens":3}', 8: ',"usage":null', 9: ',"timings":{"predicted_n":4}'}.get(odd, "")
    space = " " if odd == 10 else ""
    inside = f'"delta":{{"content":{space}{said}}}' if chat else f'"text":{space}{said}'
    return f'data: {{"id":"e","choices":[{{"index":0,{inside},"finish_reason":{finish}{more}}}]{usage}}}{end}'.encode()


@given(data=st.data(), chat=st.booleans(), cuts=st.lists(st.integers(0, 2000), max_size=3))
def test_events_that_are_not_read_in_full_come_to_the_same(data: st.DataObject, chat: bool, cuts: list[int]) -> None:
    parts = data.draw(st.lists(engine_events(chat=chat), max_size=12))
    whole = b"".join(parts)
    places = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    pieces = parts if len(cuts) == 0 else [whole[a:b] for a, b in itertools.pairwise(places)]
    outcomes = []
    together = data.draw(st.sampled_from([1, 2, 5, sse.TOGETHER]))
    for kind in (Longhand, Stream):
        made = kind(Answer("chatcmpl-1", 1, "tiny", chat=chat))
        with patch.object(sse, "TOGETHER", together):
            said = "".join(made.feed(piece).decode() for piece in pieces)
        outcomes.append((events(said) if said else [], vars(made.delivered), made.skipped, made.done, made.broken))
    assert outcomes[0] == outcomes[1]


def test_the_commonest_event_is_not_read_in_full_and_the_last_is() -> None:
    made = Stream(Answer("chatcmpl-1", 1, "tiny"))
    made.feed(ROLE + delta("a"))
    wrapping = made._wrapping
    assert wrapping is not None
    assert wrapping.take(delta("b")) == (made.feed(delta("b")), "b")
    for other in (delta(finish="stop"), delta("b", logprobs={}), delta("b" * (MOST_TEXT + 1)), delta("b") * 2):
        assert wrapping.take(other) == (b"", "")
