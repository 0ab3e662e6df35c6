"""Requests of OpenAI's API for Ollama: what is carried over, what is refused by name, and what is never passed on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.agent.attach.ollama_request import MOST_VALUES, PATHS, Facts, Native, NotForOllama, native, probe

CHAT, COMPLETION, EMBEDDING = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CLOCK = {"type": "function", "function": {"name": "clock"}}


NOTHING_KNOWN = Facts()


def asked(path: str, body: dict[str, Any], facts: Facts = NOTHING_KNOWN) -> Native:
    return native(path, json.dumps({"model": "tiny:latest", **body}).encode(), facts)


def told(path: str, body: dict[str, Any], facts: Facts = NOTHING_KNOWN) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(asked(path, body, facts).body)
    return found


def chat(**more: Any) -> dict[str, Any]:
    return told(CHAT, {"messages": HELLO, **more})


def refused(path: str, body: dict[str, Any]) -> NotForOllama:
    with pytest.raises(NotForOllama) as caught:
        asked(path, body)
    return caught.value


# -- chats -------------------------------------------------------------------------------------------------------------


def test_a_chat_goes_to_the_native_call_as_a_stream_and_is_never_cut_to_fit() -> None:
    found = asked(CHAT, {"messages": HELLO})
    assert (found.path, found.wanted.kind, found.wanted.stream, found.continues) == ("/api/chat", "chat", False, False)
    assert json.loads(found.body) == {"model": "tiny:latest", "messages": HELLO, "stream": True, "truncate": False}


@pytest.mark.parametrize(
    ("given_", "options"),
    [
        ({"temperature": 0, "top_p": 0.5, "seed": 7}, {"temperature": 0, "top_p": 0.5, "seed": 7}),
        ({"presence_penalty": 1, "frequency_penalty": -1}, {"presence_penalty": 1, "frequency_penalty": -1}),
        ({"max_tokens": 5}, {"num_predict": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 9}, {"num_predict": 9}),
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"stop": ["a", "", "b"]}, {"stop": ["a", "b"]}),
        ({"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}, {"top_k": 3, "min_p": 0.1, "repeat_penalty": 1.1}),
    ],
)
def test_options_keep_their_meaning_under_ollamas_names(given_: dict[str, Any], options: dict[str, Any]) -> None:
    assert chat(**given_)["options"] == options


def test_what_a_client_leaves_out_is_left_to_the_models_own_defaults() -> None:
    assert "options" not in chat(temperature=None, stop=[], max_tokens=None)
    assert "options" not in chat(max_tokens=-1)


def test_the_context_is_the_one_it_is_loaded_with_and_no_client_changes_it() -> None:
    facts = Facts(context=8192)
    for path, body in ((CHAT, {"messages": HELLO}), (COMPLETION, {"prompt": "a"}), (EMBEDDING, {"input": "a"})):
        assert told(path, {**body, "num_ctx": 5, "options": {"num_ctx": 5}}, facts)["options"]["num_ctx"] == 8192
        assert "num_ctx" not in told(path, {**body, "num_ctx": 5}).get("options", {})


def test_how_long_a_model_stays_loaded_is_the_owners_to_say() -> None:
    for path, body in ((CHAT, {"messages": HELLO}), (COMPLETION, {"prompt": "a"}), (EMBEDDING, {"input": "a"})):
        assert "keep_alive" not in told(path, {**body, "keep_alive": -1})
        assert told(path, {**body, "keep_alive": -1}, Facts(keep_alive="30m"))["keep_alive"] == "30m"


def test_parts_of_a_message_become_one_text_with_its_pictures() -> None:
    content = [
        {"type": "text", "text": "What is"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8=", "detail": "low"}},
        {"type": "text", "text": "this?"},
        {"type": "image_url", "image_url": "data:;base64,d29ybGQ="},
        {"type": "input_audio", "input_audio": {"data": "c291bmQ=", "format": "wav"}},
    ]
    found = chat(messages=[{"role": "user", "content": content}])["messages"]
    assert found == [{"role": "user", "content": "What is\nthis?", "images": ["aGVsbG8=", "d29ybGQ=", "c291bmQ="]}]


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a.png", "http://127.0.0.1/a", "file:///etc/passwd", "data:text/plain,a", "data:;base64,",
        "aGVsbG8=",
    ],
)  # fmt: skip
def test_no_picture_is_fetched_from_anywhere(url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    error = refused(CHAT, {"messages": [{"role": "user", "content": content}]})
    assert (error.param, "data: URL" in error.message) == ("messages", True)


def test_roles_are_those_that_ollama_knows() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO]
    assert [one["role"] for one in chat(messages=messages)["messages"]] == ["system", "user"]
    assert refused(CHAT, {"messages": [{"role": "boss", "content": "a"}]}).param == "messages"


def test_calls_of_tools_and_their_results_go_back_as_objects() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "11 degrees"},
    ]
    _, assistant, result = chat(messages=messages)["messages"]
    function = {"name": "weather", "arguments": {"city": "Köln"}}
    assert assistant == {
        "role": "assistant", "content": "", "thinking": "hm", "tool_calls": [{"id": "call_1", "function": function}]
    }  # fmt: skip
    assert result == {"role": "tool", "content": "11 degrees", "tool_name": "weather", "tool_call_id": "call_1"}


@pytest.mark.parametrize("arguments", ["[]", "no", "{", '{"a": 1} 2', "[" * 100_000])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    call = {"id": "a", "function": {"name": "weather", "arguments": arguments}}
    assert refused(CHAT, {"messages": [{"role": "assistant", "tool_calls": [call]}]}).param == "messages"


def test_tools_are_passed_on_as_they_are_and_a_choice_leaves_out_the_others() -> None:
    assert chat(tools=[TOOL, CLOCK])["tools"] == [TOOL, CLOCK]
    assert chat(tools=[TOOL], tool_choice="required")["tools"] == [TOOL]
    assert "tools" not in chat(tools=[TOOL], tool_choice="none")
    assert "tools" not in chat(tools=[])
    one = {"type": "function", "function": {"name": "clock"}}
    assert chat(tools=[TOOL, CLOCK], tool_choice=one)["tools"] == [CLOCK]
    body = {"messages": HELLO, "tools": [TOOL], "tool_choice": one}
    assert refused(CHAT, body).param == "tool_choice"


def test_a_prescribed_form_goes_on_as_it_was_written() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
    strict = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert chat(response_format=strict)["format"] == schema
    assert chat(response_format={"type": "json_object"})["format"] == "json"
    assert chat(response_format={"type": "json_object", "schema": schema})["format"] == schema
    assert "format" not in chat(response_format={"type": "text"})
    for form in ({"type": "json_schema"}, {"type": "grammar"}, {"type": "json_schema", "json_schema": {"name": "x"}}):
        assert refused(CHAT, {"messages": HELLO, "response_format": form}).param == "response_format"


@pytest.mark.parametrize(
    ("given_", "thinks", "think"),
    [
        ({}, True, None),
        ({"reasoning_effort": "none"}, True, False),
        ({"reasoning_effort": "minimal"}, True, "low"),
        ({"reasoning_effort": "high"}, None, "high"),
        ({"reasoning_effort": "high"}, False, None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, True, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True, None),
    ],
)
def test_how_much_to_think_is_said_as_ollama_knows_it(
    given_: dict[str, Any], thinks: bool | None, think: object
) -> None:
    assert told(CHAT, {"messages": HELLO, **given_}, Facts(thinks=thinks)).get("think") == think


def test_probabilities_are_asked_for() -> None:
    assert (chat(logprobs=True)["logprobs"], "top_logprobs" in chat(logprobs=True)) == (True, False)
    assert chat(logprobs=True, top_logprobs=3)["top_logprobs"] == 3
    assert told(COMPLETION, {"prompt": "a", "logprobs": 2})["top_logprobs"] == 2
    assert told(COMPLETION, {"prompt": "a", "logprobs": 0})["logprobs"] is True


def test_a_begun_answer_goes_last_and_is_not_thought_about_again() -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Well, "}]
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    found = asked(CHAT, {"messages": begun, **flags})
    body = json.loads(found.body)
    assert (found.continues, body["messages"], body["think"]) == (True, begun, False)
    assert not {"continue_final_message", "add_generation_prompt"} & set(body)
    # Without the flags it is what it was before: Ollama's to make something of.
    assert asked(CHAT, {"messages": begun}).continues is False


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": HELLO, "continue_final_message": True}, "continue_final_message"),
        (
            {"messages": [{"role": "assistant", "content": ""}], "continue_final_message": True},
            "continue_final_message",
        ),
        (
            {
                "messages": [{"role": "assistant", "content": "a"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "add_generation_prompt",
        ),
    ],
)
def test_what_is_no_begun_answer_cannot_be_continued(body: dict[str, Any], param: str) -> None:
    assert refused(CHAT, body).param == param


# -- the others --------------------------------------------------------------------------------------------------------


def test_a_completion_is_raw_unless_it_fills_a_gap() -> None:
    found = told(COMPLETION, {"prompt": "Once", "max_tokens": 9})
    assert (found["prompt"], found["raw"], found["think"], found["options"]) == (
        "Once",
        True,
        False,
        {"num_predict": 9},
    )
    assert asked(COMPLETION, {"prompt": "Once"}).path == "/api/generate"
    assert told(COMPLETION, {"prompt": ["Once"]})["prompt"] == "Once"
    gap = told(COMPLETION, {"prompt": "def f(", "suffix": "return 1"})
    assert (gap["suffix"], "raw" in gap) == ("return 1", False)


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [1, 2], [[1, 2]], [""]])
def test_a_prompt_that_is_not_one_text_is_refused_and_loads_no_model(prompt: object) -> None:
    assert refused(COMPLETION, {"prompt": prompt}).param == "prompt"


def test_texts_to_embed_are_a_list_and_are_never_cut_to_fit() -> None:
    found = asked(EMBEDDING, {"input": "a", "dimensions": 64, "encoding_format": "base64"})
    assert (found.path, found.wanted.kind, found.wanted.base64) == ("/api/embed", "embedding", True)
    assert json.loads(found.body) == {"model": "tiny:latest", "input": ["a"], "truncate": False, "dimensions": 64}
    assert told(EMBEDDING, {"input": ["a", "b"]})["input"] == ["a", "b"]


@pytest.mark.parametrize("given_", [[], "", [""], [1, 2], [[1, 2]], ["a", 1]])
def test_what_is_no_text_is_not_embedded(given_: object) -> None:
    assert refused(EMBEDDING, {"input": given_}).param == "input"


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2), ("logit_bias", {"50256": -100}), ("audio", {"voice": "a"}), ("functions", [{"name": "a"}]),
        ("grammar", "root ::= 1"), ("guided_json", {"type": "object"}), ("structured_outputs", {"regex": "a"}),
        ("echo", True), ("best_of", 2),
    ],
)  # fmt: skip
def test_what_ollama_has_nothing_for_is_refused_by_its_name(name: str, value: object) -> None:
    error = refused(CHAT, {"messages": HELLO, name: value})
    assert (error.param, error.api_code, error.status) == (name, "unsupported_parameter", 400)


def test_what_asks_for_nothing_is_no_reason_to_refuse() -> None:
    harmless = {"n": 1, "logit_bias": {}, "functions": [], "echo": False, "audio": None, "best_of": 1}
    further = {"user": "a", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": False}
    assert chat(**harmless, **further)["messages"] == HELLO


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, b"[]"),
        (CHAT, b"no"),
        (CHAT, b'{"model": "tiny:latest"}'),
        (CHAT, b'{"model": "tiny:latest", "messages": []}'),
        (CHAT, b'{"messages": [{"role": "user", "content": "a"}]}'),
        (CHAT, b'{"model": "m", "messages": [{"role": "user", "content": 5}]}'),
        (CHAT, b'{"model": "m", "messages": [{"role": "user", "content": "\xff"}]}'),
        (CHAT, b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 0}'),
        (CHAT, b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "seed": 1e300}'),
        (CHAT, b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "seed": 99999999999999999999}'),
        (CHAT, b'{"model": "m", "messages": ' + b"[" * 100_000),
        (COMPLETION, b'{"model": "m", "prompt": {"a": 1}}'),
        (EMBEDDING, b'{"model": "m", "input": "a", "encoding_format": "hex"}'),
    ],
)
def test_nonsense_is_refused_with_a_sentence(path: str, body: bytes) -> None:
    with pytest.raises(NotForOllama) as caught:
        native(path, body, Facts())
    assert caught.value.message


def test_of_too_many_values_no_objects_are_made() -> None:
    many = b'{"model": "m", "messages": [' + b'{"role":"user"},' * (MOST_VALUES // 2) + b"{}]}"
    with pytest.raises(NotForOllama, match=f"at most {MOST_VALUES} values"):
        native(CHAT, many, Facts())


def test_the_probe_asks_for_little_and_without_a_reload() -> None:
    found = json.loads(probe("tiny:latest", Facts(context=8192, keep_alive="5m")))
    assert found["messages"][-1] == {"role": "assistant", "content": "1, 2, 3,"}
    assert found["options"] == {"temperature": 0, "num_predict": 8, "num_ctx": 8192}
    assert (found["stream"], found["think"], found["keep_alive"]) == (False, False, "5m")


#: Whatever JSON a client may send.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
MEMBERS = [
    "messages", "prompt", "input", "stream", "stream_options", "tools", "tool_choice", "response_format", "stop",
    "max_tokens", "temperature", "seed", "logprobs", "continue_final_message", "reasoning_effort", "suffix",
]  # fmt: skip


@given(st.sampled_from(sorted(PATHS)), st.dictionaries(st.sampled_from(MEMBERS), JSON, max_size=6))
def test_whatever_is_asked_there_is_a_request_that_can_be_sent_or_a_refusal(path: str, body: dict[str, Any]) -> None:
    try:
        found = asked(path, body, Facts(context=4096))
    except NotForOllama:
        return
    made = json.loads(found.body)
    assert found.path == PATHS[path]
    assert made["model"] == "tiny:latest"
    assert made["options"]["num_ctx"] == 4096


@given(st.text(min_size=1), st.text())
def test_every_text_comes_through_as_it_is(text: str, second: str) -> None:
    try:
        text.encode(), second.encode()
    except UnicodeEncodeError:
        return
    found = chat(messages=[{"role": "user", "content": text}, {"role": "assistant", "content": second}])["messages"]
    assert [one["content"] for one in found] == [text, second]
    assert told(COMPLETION, {"prompt": text})["prompt"] == text
    assert told(EMBEDDING, {"input": [text]})["input"] == [text]
