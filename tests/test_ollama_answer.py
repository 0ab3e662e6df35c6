"""Answers of Ollama made answers of OpenAI's API: however the bytes are cut, and no end but a real one."""

from __future__ import annotations

import base64
import itertools
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.agent.attach import ollama_answer
from rma_core.agent.attach.ollama_answer import DONE, Translation, translation
from rma_core.agent.attach.ollama_lines import MAX_LINE_BYTES, Broken, error_body, goes_on, refusal
from rma_core.agent.attach.ollama_request import Wanted
from tests.ollama_stand_in import STATS, said

CHAT = Wanted("chat", "tiny:latest", stream=True)
WHOLE = CHAT._replace(stream=False)
COMPLETION = Wanted("completion", "tiny:latest", stream=True)
LAST = {"done": True, "done_reason": "stop", **STATS}

# As docs/api.md of ollama/ollama at fb30760 shows them: a chat (of an old version, without a reason of its end), one
# with a call of a tool, and a completion.
PLAIN = [
    {
        "model": "llama3.2",
        "created_at": "2023-08-04T08:52:19.385406455-07:00",
        "message": {"role": "assistant", "content": "The", "images": None},
        "done": False,
    },
    {
        "model": "llama3.2",
        "created_at": "2023-08-04T19:22:45.499127Z",
        "message": {"role": "assistant", "content": ""},
        "done": True,
        **STATS,
    },
]
WITH_TOOL = [
    {
        "model": "llama3.2",
        "created_at": "2025-07-07T20:22:19.184789Z",
        "message": {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Tokyo"}}}],
        },
        "done": False,
    },
    {
        "model": "llama3.2",
        "created_at": "2025-07-07T20:22:19.19314Z",
        "message": {"role": "assistant", "content": ""},
        "done_reason": "stop",
        "done": True,
        "total_duration": 182242375,
        "load_duration": 41295167,
        "prompt_eval_count": 169,
        "prompt_eval_duration": 24573166,
        "eval_count": 15,
        "eval_duration": 115959084,
    },
]
RAW = [
    {"model": "llama3.2", "created_at": "2023-08-04T08:52:19.385406455-07:00", "response": "The", "done": False},
    {
        "model": "llama3.2",
        "created_at": "2023-08-04T19:22:45.499127Z",
        "response": "",
        "done": True,
        "context": [1, 2, 3],
        **STATS,
    },
]


def ndjson(*lines: object) -> bytes:
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)


def made(wanted: Wanted) -> Translation:
    return translation(wanted, answer_id="a1b2", created=1_700_000_000)


def run(wanted: Wanted, *pieces: bytes) -> tuple[bytes, Broken | None]:
    """Return all that a client gets of these bytes, and what broke the answer, if anything."""
    answer = made(wanted)
    out = b"".join(answer.feed(piece) for piece in pieces)
    return out + answer.end(), answer.broken


def events(data: bytes) -> list[Any]:
    """Return the events of a whole stream, read as strictly as any client reads them."""
    assert data.endswith(DONE)
    frames = data[: -len(DONE)].split(b"\n\n")
    assert frames.pop() == b""
    assert all(frame.startswith(b"data: {") and b"\n" not in frame for frame in frames)
    return [json.loads(frame[6:]) for frame in frames]


def deltas(wanted: Wanted, *lines: object) -> list[Any]:
    out, broken = run(wanted, ndjson(*lines))
    assert broken is None
    return [choice for event in events(out) for choice in event["choices"]]


def whole(wanted: Wanted, *lines: object) -> Any:
    out, broken = run(wanted, ndjson(*lines))
    assert broken is None
    return json.loads(out)


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_chat_is_streamed_with_one_role_one_id_and_one_end() -> None:
    out, broken = run(CHAT, ndjson(*PLAIN))
    assert broken is None
    found = events(out)
    assert {(one["id"], one["created"], one["model"], one["object"]) for one in found} == {
        ("chatcmpl-a1b2", 1_700_000_000, "tiny:latest", "chat.completion.chunk")
    }
    assert [one["choices"] for one in found] == [
        [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
        [{"index": 0, "delta": {"content": "The"}, "finish_reason": None}],
        [{"index": 0, "delta": {}, "finish_reason": "stop"}],
    ]
    assert not any("usage" in one for one in found)


def test_usage_comes_last_and_only_where_it_was_asked_for() -> None:
    out, _ = run(CHAT._replace(usage=True), ndjson(*PLAIN))
    *_, finish, last = events(out)
    assert (finish["choices"][0]["finish_reason"], "timings" in finish) == ("stop", False)
    assert (last["choices"], last["usage"]) == (
        [],
        {"prompt_tokens": 26, "completion_tokens": 282, "total_tokens": 308},
    )
    assert last["timings"] == {
        "cache_n": 0, "prompt_n": 26, "prompt_ms": 342.546, "prompt_per_second": 75.902, "predicted_n": 282,
        "predicted_ms": 4535.599, "predicted_per_second": 62.175, "load_ms": 1.335,
    }  # fmt: skip


def test_timings_stand_on_the_last_event_without_usage_too() -> None:
    out, _ = run(CHAT, ndjson(*PLAIN))
    assert events(out)[-1]["timings"]["predicted_n"] == 282


def test_thoughts_are_thoughts_and_come_before_what_is_said_in_the_same_line() -> None:
    both = {"message": {"role": "assistant", "content": "Yes", "thinking": "hm"}, "done": False}
    found = deltas(CHAT, {"message": {"thinking": "let me see"}}, both, said("/api/chat", "", **LAST))
    assert [one["delta"] for one in found] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "let me see"},
        {"reasoning_content": "hm"},
        {"content": "Yes"},
        {},
    ]


def test_calls_of_tools_are_numbered_and_have_arguments_as_text() -> None:
    [opening, call, finish] = deltas(CHAT, *WITH_TOOL)
    assert opening["delta"] == {"role": "assistant", "content": ""}
    [told] = call["delta"]["tool_calls"]
    assert told == {
        "index": 0, "id": "call_a1b2_0", "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city":"Tokyo"}'},
    }  # fmt: skip
    assert finish["finish_reason"] == "tool_calls"


def test_every_call_has_a_number_of_its_own_whatever_ollama_numbers() -> None:
    def calling(name: str, **more: object) -> dict[str, Any]:
        call = {**more, "function": {"index": 0, "name": name, "arguments": None}}
        return {"message": {"content": "", "tool_calls": [call]}}

    found = deltas(CHAT, calling("a", id="call_x"), calling("b"), said("/api/chat", "", **LAST))
    calls = [call for one in found for call in one["delta"].get("tool_calls", ())]
    assert [(call["index"], call["id"], call["function"]["arguments"]) for call in calls] == [
        (0, "call_x", "{}"),
        (1, "call_a1b2_1", "{}"),
    ]


def test_an_answer_that_was_too_long_says_so_although_it_calls_a_tool() -> None:
    cut = {**WITH_TOOL[1], "done_reason": "length"}
    assert deltas(CHAT, WITH_TOOL[0], cut)[-1]["finish_reason"] == "length"


def test_an_empty_answer_is_an_answer() -> None:
    found = deltas(CHAT, said("/api/chat", "", **LAST))
    assert [one["delta"] for one in found] == [{"role": "assistant", "content": ""}, {}]


def test_the_last_line_may_have_text_too() -> None:
    found = deltas(CHAT, said("/api/chat", "a"), said("/api/chat", "b", **LAST))
    assert "".join(one["delta"].get("content", "") for one in found) == "ab"


def test_a_completion_is_streamed_as_text() -> None:
    out, _ = run(COMPLETION, ndjson(*RAW))
    found = events(out)
    assert {(one["id"], one["object"]) for one in found} == {("cmpl-a1b2", "text_completion")}
    assert [one["choices"][0] for one in found] == [
        {"index": 0, "text": "The", "logprobs": None, "finish_reason": None},
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"},
    ]


PROBABILITIES = [
    {"token": "The", "logprob": -0.1, "bytes": [84, 104, 101], "top_logprobs": [{"token": "A", "logprob": -2.5}]}
]


def test_probabilities_of_tokens_are_given_as_either_api_has_them() -> None:
    line = {**said("/api/chat", "The"), "logprobs": PROBABILITIES}
    [_, one, _] = deltas(CHAT, line, said("/api/chat", "", **LAST))
    [told] = one["logprobs"]["content"]
    assert (told["token"], told["logprob"], told["bytes"]) == ("The", -0.1, [84, 104, 101])
    assert told["top_logprobs"][0]["token"] == "A"
    raw = {**said("/api/generate", "The"), "logprobs": PROBABILITIES}
    [first, second, _] = deltas(COMPLETION, raw, raw, said("/api/generate", "", **LAST))
    assert first["logprobs"] == {
        "tokens": ["The"], "token_logprobs": [-0.1], "top_logprobs": [{"A": -2.5}], "text_offset": [0]
    }  # fmt: skip
    assert second["logprobs"]["text_offset"] == [3]


# -- whole answers -----------------------------------------------------------------------------------------------------


def test_a_whole_answer_is_put_together() -> None:
    found = whole(WHOLE, {"message": {"thinking": "hm"}}, *PLAIN)
    assert (found["id"], found["object"], found["model"]) == ("chatcmpl-a1b2", "chat.completion", "tiny:latest")
    [choice] = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": "The", "reasoning_content": "hm"}
    assert (choice["finish_reason"], found["usage"]["total_tokens"]) == ("stop", 308)
    assert found["timings"]["load_ms"] == 1.335


def test_a_whole_answer_with_a_call_has_no_text_and_no_numbers() -> None:
    [choice] = whole(WHOLE, *WITH_TOOL)["choices"]
    [call] = choice["message"]["tool_calls"]
    assert (choice["message"]["content"], "index" in call, choice["finish_reason"]) == (None, False, "tool_calls")


def test_a_whole_completion_is_text() -> None:
    found = whole(COMPLETION._replace(stream=False), *RAW)
    assert (found["object"], found["choices"][0]["text"]) == ("text_completion", "The")


EMBED = {"model": "all-minilm", "embeddings": [[0.25, -1, 2.5], [0.5, 0, 0]], "prompt_eval_count": 8}


def test_embeddings_are_numbers_or_what_sdks_ask_for_by_default() -> None:
    wanted = Wanted("embedding", "all-minilm")
    found = whole(wanted, EMBED)
    assert [one["embedding"] for one in found["data"]] == EMBED["embeddings"]
    assert [(one["object"], one["index"]) for one in found["data"]] == [("embedding", 0), ("embedding", 1)]
    assert found["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    packed = whole(wanted._replace(base64=True), EMBED)["data"][0]["embedding"]
    assert struct.unpack("<3f", base64.b64decode(packed)) == (0.25, -1, 2.5)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"embeddings": null}', b'{"embeddings": [["a"]]}', b'{"embeddings": [[1]']
)
def test_what_is_no_embedding_is_broken(body: bytes) -> None:
    out, broken = run(Wanted("embedding", "m"), body)
    assert (out, broken is not None) == (b"", True)


def test_numbers_that_do_not_fit_in_32_bits_are_broken() -> None:
    out, broken = run(Wanted("embedding", "m", base64=True), b'{"embeddings": [[1e300]]}')
    assert (out, broken is not None) == (b"", True)


# -- no end but a real one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([{"error": "an error was encountered while running the model: CUDA error"}], "CUDA error"),
        ([{"error": {"message": "no"}}], "no"),
        ([], "in the middle"),
        ([said("/api/chat", "", done=True, done_reason="load")], "load"),
        ([said("/api/chat", "", done=True, done_reason="unload")], "unload"),
        ([said("/api/chat", "", done=True, done_reason="abort")], "abort"),
        ([b"[]"], "not what Ollama sends"),
        ([b"no"], "not what Ollama sends"),
        ([b'{"message": "a"}'], "not what Ollama sends"),
        ([b'{"message": {"content": "\xff"}}'], "not what Ollama sends"),
        ([b'{"done": "yes"}'], "not what Ollama sends"),
        ([b'{"done": true, "eval_count": 1e999}'], "not what Ollama sends"),
        ([b"[" * 100_000], "not what Ollama sends"),
        ([b'{"message": {"tool_calls": [{"function": {"name": "a", "arguments": [1]}}]}}'], "no JSON object"),
        ([b" " * (MAX_LINE_BYTES + 1)], "longer than"),
    ],
)
@pytest.mark.parametrize("wanted", [CHAT, WHOLE])
def test_what_is_not_whole_never_looks_so(wanted: Wanted, lines: list[object], reason: str) -> None:
    out, broken = run(wanted, ndjson(said("/api/chat", "begun"), *lines))
    assert broken is not None
    assert reason in broken.message
    assert b"[DONE]" not in out
    assert b'"finish_reason":"' not in out
    # What had come before stays good: another worker may go on from there.
    assert (b"begun" in out) is wanted.stream


def test_a_line_without_its_end_is_a_line() -> None:
    for wanted in (CHAT, WHOLE):
        out, broken = run(wanted, ndjson(*PLAIN).rstrip())
        assert (broken, b"The" in out) == (None, True)
    _, broken = run(CHAT, ndjson(PLAIN[0]), json.dumps(PLAIN[1]).encode()[:-1])
    assert broken is not None


def test_behind_its_end_nothing_counts() -> None:
    assert run(CHAT, ndjson(*PLAIN, said("/api/chat", "more"), b"nonsense")) == run(CHAT, ndjson(*PLAIN))
    for more in (PLAIN[0], b"nonsense", {"error": "no"}):
        for wanted in (CHAT, WHOLE):
            assert run(wanted, ndjson(*PLAIN), ndjson(more)) == run(wanted, ndjson(*PLAIN, more))
            assert run(wanted, ndjson(*PLAIN), ndjson(more)) == run(wanted, ndjson(*PLAIN))


def test_numbers_beyond_reason_are_cut() -> None:
    wild = said("/api/chat", "", done=True, prompt_eval_count=-5, eval_count=10**30, load_duration=-1)
    found = whole(WHOLE, wild)
    assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (0, 2**53)
    assert found["timings"]["load_ms"] == 0


def test_everything_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama_answer, "MAX_WHOLE_BYTES", 1000)
    monkeypatch.setattr(ollama_answer, "MAX_STREAM_BYTES", 1000)
    monkeypatch.setattr(ollama_answer, "MAX_CALLS", 2)
    monkeypatch.setattr(ollama_answer, "MAX_NUMBERS", 2)
    line = ndjson(said("/api/chat", "a"))
    for wanted in (CHAT, WHOLE):
        _, broken = run(wanted, *[line] * 20)
        assert broken is not None
        assert "longer than any answer" in broken.message
    _, broken = run(Wanted("embedding", "m"), b" " * 1001)
    assert broken is not None
    assert "longer than 1000 bytes" in broken.message
    _, broken = run(Wanted("embedding", "m"), json.dumps(EMBED).encode())
    assert broken is not None
    assert "more than 2 numbers" in broken.message
    call = {"message": {"tool_calls": [{"function": {"name": "a"}}]}}
    _, broken = run(CHAT, ndjson(call, call, call))
    assert broken is not None
    assert "more than 2 tools" in broken.message


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PIECES = st.lists(st.tuples(TEXT, TEXT), max_size=6)


@given(PIECES, st.booleans())
def test_text_in_is_text_out(pieces: list[tuple[str, str]], ends_in_length: bool) -> None:
    lines: list[object] = [{"message": {"content": text, "thinking": thought}} for text, thought in pieces]
    reason = "length" if ends_in_length else "stop"
    lines.append(said("/api/chat", "", **{**LAST, "done_reason": reason}))
    found = deltas(CHAT, *lines)
    assert "".join(one["delta"].get("content", "") for one in found) == "".join(text for text, _ in pieces)
    thoughts = "".join(one["delta"].get("reasoning_content", "") for one in found)
    assert thoughts == "".join(thought for _, thought in pieces)
    assert [one["finish_reason"] for one in found][-1] == reason
    assert [one["finish_reason"] for one in found[:-1]] == [None] * (len(found) - 1)
    message = whole(WHOLE, *lines)["choices"][0]["message"]
    assert (message["content"], message.get("reasoning_content", "")) == ("".join(t for t, _ in pieces), thoughts)


#: Lines as Ollama sends them, and as nobody should.
LINE = st.one_of(
    st.sampled_from([*PLAIN, *WITH_TOOL, *RAW, {"error": "no"}, {"error": ""}, {}, said("/api/chat", "", **LAST)]),
    st.builds(lambda text: said("/api/chat", text), TEXT),
    st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"")),
)


@given(
    st.lists(LINE, max_size=6), st.lists(st.integers(0, 4000), max_size=8), st.sampled_from([CHAT, WHOLE, COMPLETION])
)
def test_however_the_bytes_are_cut_the_client_gets_the_same(lines: list[Any], cuts: list[int], wanted: Wanted) -> None:
    data = ndjson(*lines)
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(places)]
    one, two = run(wanted, data), run(wanted, *pieces)
    assert one[0] == two[0]
    assert str(one[1]) == str(two[1])
    three = run(wanted, *[data[place : place + 1] for place in range(len(data))])
    assert (three[0], str(three[1])) == (one[0], str(one[1]))
    # And whatever it was, only what is whole has an end.
    assert (b"[DONE]" in one[0]) <= (one[1] is None)


def test_bytes_that_drip_in_do_not_cost_their_square() -> None:
    # Each is searched once: a line of half a megabyte, byte by byte, is done in the time of a few passes over it.
    answer = made(CHAT)
    line = ndjson(said("/api/chat", "a" * 400_000))
    assert b"".join(answer.feed(line[place : place + 1]) for place in range(len(line))).count(b"data: ") == 2


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "said_", "code"),
    [
        (400, '"tiny" does not support tools', None),
        (400, "the input length exceeds the context length", "context_length_exceeded"),
        (
            400,
            "the prompt is longer than the context length currently available to the model; shorten the prompt",
            "context_length_exceeded",
        ),
        (400, "request (9000 tokens) exceeds the available context size (4096 tokens)", "context_length_exceeded"),
    ],
)
def test_what_is_wrong_with_a_request_goes_to_the_client(status: int, said_: str, code: str | None) -> None:
    found = refusal(status, json.dumps({"error": said_}).encode())
    assert (found.status, json.loads(found.body)["error"]) == (
        status,
        {"message": said_, "type": "invalid_request_error", "param": None, "code": code},
    )


@pytest.mark.parametrize(
    ("status", "said_", "owner"),
    [
        (503, "server busy, please try again.  maximum pending requests exceeded", True),
        (404, "model 'tiny' not found", True),
        (429, "too many", True),
        (500, "model requires more system memory (8.4 GiB) than is available (2.1 GiB)", False),
        (500, "llama runner process has terminated: signal: killed", False),
        (400, "model runner has unexpectedly stopped, this may be due to resource limitations", False),
        (401, "unauthorized", False),
        (499, "request canceled", False),
    ],
)
def test_what_is_wrong_with_ollama_or_its_machine_does_not(status: int, said_: str, owner: bool) -> None:
    found = refusal(status, json.dumps({"error": said_}).encode())
    assert (found.status, found.owner) == (0, owner)
    assert said_ in found.message


@given(st.integers(300, 599), st.binary(max_size=60))
def test_whatever_comes_with_a_status_there_is_a_sentence_that_a_log_can_show(status: int, data: bytes) -> None:
    found = refusal(status, data)
    assert found.message
    assert found.message.isprintable()
    if found.status:
        assert json.loads(found.body)["error"]["message"] == found.message


def test_a_probe_is_judged_by_the_space_in_front_of_what_follows() -> None:
    def answer(text: str, **more: object) -> bytes:
        return json.dumps(said("/api/chat", text, done=True, **more)).encode()

    assert goes_on(answer(" 4, 5"), " 4")
    assert not goes_on(answer("4, 5"), " 4")
    assert not goes_on(answer("1, 2, 3, 4"), " 4")
    assert not goes_on(answer(""), " 4")
    for bad in (b"", b"{}", b'{"error": "no"}', b'{"done": true}', json.dumps(said("/api/chat", " 4")).encode()):
        with pytest.raises(Broken):
            goes_on(bad, " 4")


def test_an_error_has_openais_form() -> None:
    error = json.loads(error_body("no", param="n", api_code="unsupported_parameter"))["error"]
    assert error == {
        "message": "no", "type": "invalid_request_error", "param": "n", "code": "unsupported_parameter"
    }  # fmt: skip
