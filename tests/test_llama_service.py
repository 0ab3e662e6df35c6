"""The service `llm`: a real model behind it, and what it does when clients leave, files are bad and processes die."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from rma_core.builtin.process_runtime import ProcessRuntime
from rma_core.catalog import load
from tests import model_servers, tiny_model
from tests.fixtures import NOTES
from tests.model_servers import SOLID, SOLID_PROMPT, SOLID_TOKENS, ModelServer, serving, start, stop, until
from tests.needs import need
from tests.tiny_service import tiny_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psutil

LLAMA = NOTES.parent / "llama-cpp"
#: Tokens that take the tiny model much longer than any test waits.
ENDLESS = 60_000
#: Seconds in which a slot has to be free again; an answer of ENDLESS tokens takes far longer.
FREE_S = 10.0
#: Tokens of a slot that has room for such an answer; llama.cpp rounds up to whole 256.
ROOM = 61_440


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two chat models that differ in their weights only, and one for embeddings."""
    need("llama")
    folder = tmp_path_factory.mktemp("models")
    tiny_model.write_chat_model(folder / "one.gguf", seed=1, context=2 * ENDLESS)
    tiny_model.write_chat_model(folder / "two.gguf", seed=2)
    tiny_model.write_embedding_model(folder / "embedding.gguf")
    return folder


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """One server with two slots, for tests that leave it as it was; llama.cpp is asked to show prompts."""
    env = {"LLAMA_SERVER_SLOTS_DEBUG": "1", "CONTEXT": str(ROOM)}
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, file=models / "one.gguf", env=env) as [one]:
        yield one


def ended(server: ModelServer) -> tuple[int, str]:
    """Wait for the service's end; returns its code and its last line."""
    code = server.process.wait(model_servers.PATIENCE_S)
    return code, server.said().strip().splitlines()[-1]


def test_a_tiny_model_is_small_and_the_same_seed_gives_the_same_file(models: Path, tmp_path: Path) -> None:
    again = tiny_model.write_chat_model(tmp_path / "again.gguf", seed=2)
    assert again.read_bytes() == (models / "two.gguf").read_bytes()
    assert all(file.stat().st_size < 1_000_000 for file in models.iterdir())


def test_the_model_goes_by_the_name_that_the_pool_gave_it(server: ModelServer) -> None:
    listed = server.get("/v1/models").body["data"]
    assert [model["id"] for model in listed] == ["tiny"]
    health = server.get("/health").body
    assert (health["status"], health["model"], health["slots"], health["busy"]) == ("ok", "tiny", 2, 0)
    props = server.get("/props").body
    assert (props["total_slots"], props["n_ctx"]) == (2, ROOM)
    assert "assistant" in props["chat_template"]


def test_two_processes_with_the_same_file_say_the_same_and_other_weights_something_else(
    models: Path, server: ModelServer, tmp_path: Path
) -> None:
    with serving(tmp_path / "same", file=models / "one.gguf", unix=True) as [same]:
        assert same.text("Hello", max_tokens=200) == server.text("Hello", max_tokens=200)
    with serving(tmp_path / "other", file=models / "two.gguf") as [other]:
        assert other.text("Hello", max_tokens=200) != server.text("Hello", max_tokens=200)


@pytest.mark.parametrize("said", [*SOLID, SOLID_PROMPT])
def test_rounding_does_not_decide_what_the_tiny_model_says_to_some_texts(server: ModelServer, said: str) -> None:
    asked = server.chat(said, max_tokens=SOLID_TOKENS, logprobs=True, top_logprobs=2)
    path = "/v1/chat/completions"
    if said == SOLID_PROMPT:
        asked, path = {**asked, "prompt": said, "logprobs": 2}, "/v1/completions"
    tokens = server.post(path, asked).body["choices"][0]["logprobs"]["content"]
    assert len(tokens) == SOLID_TOKENS
    for token in tokens:
        best, second = token["top_logprobs"]
        assert best["logprob"] - second["logprob"] > 0.05


def test_a_stream_says_what_a_whole_answer_says(server: ModelServer) -> None:
    whole = server.post("/v1/chat/completions", server.chat("How are you?", max_tokens=50)).body
    pieces = list(server.stream("How are you?", max_tokens=50))
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert len([piece for piece in pieces if piece]) == 50
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 50
    assert whole["timings"]["predicted_n"] == 50
    assert whole["id"].startswith("chatcmpl-")


def test_plain_completions_are_put_together_with_their_logprobs_and_choices(server: ModelServer) -> None:
    asked = {"prompt": "Once", "max_tokens": 12, "temperature": 0, "logprobs": 2, "n": 2}
    whole = server.post("/v1/completions", asked).body
    assert whole["object"] == "text_completion"
    one, two = whole["choices"]
    assert (one["index"], two["index"], len(one["text"]), one["text"]) == (0, 1, 12, two["text"])
    assert len(one["logprobs"]["content"]) == 12


@pytest.mark.parametrize("flags", [{}, {"continue_final_message": True, "add_generation_prompt": False}])
@pytest.mark.parametrize("cut", [1, 17, 59])
def test_an_answer_that_was_cut_goes_on_as_if_it_had_not_been(
    server: ModelServer, cut: int, flags: dict[str, bool]
) -> None:
    whole = server.text("Tell me a story", max_tokens=60)
    options: dict[str, Any] = {"begin": whole[:cut], "max_tokens": 60 - cut, **flags}
    assert "".join(server.stream("Tell me a story", **options)) == whole[cut:]
    assert server.text("Tell me a story", **options) == whole


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_slot(server: ModelServer, streamed: bool) -> None:
    asked = server.chat("Go on for ever", max_tokens=ENDLESS, stream=streamed)
    # With this header llama.cpp itself would compute to the end, and let anyone read it who knows the name.
    with contextlib.closing(server.send("/v1/chat/completions", asked, X_Conversation_Id="mine")):
        until(server.busy, what="the request has a slot")
    until(lambda: not server.busy(), what="the slot is free", patience_s=FREE_S)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_while_its_prompt_is_read_frees_its_slot(server: ModelServer, streamed: bool) -> None:
    said = f"{streamed}" + "a long story " * 4000
    asked = server.chat(said, max_tokens=1000, stream=streamed)
    with contextlib.closing(server.send("/v1/chat/completions", asked)):
        until(server.busy, what="the request has a slot")
    until(lambda: not server.busy(), what="the slot is free", patience_s=FREE_S)


def test_requests_wait_for_a_slot_up_to_a_limit_and_those_who_leave_are_forgotten(server: ModelServer) -> None:
    asked = server.chat("Go on", max_tokens=ENDLESS)
    with contextlib.ExitStack() as waiting:
        for _ in range(6):
            waiting.enter_context(contextlib.closing(server.send("/v1/chat/completions", asked)))
        until(lambda: server.get("/health").body["busy"] == 6, what="all are taken")
        until(lambda: server.get("/slots?fail_on_no_slot=1").status == 503, what="no slot is free")
        more = server.post("/v1/chat/completions", asked)
        assert (more.status, more.headers["retry-after"]) == (503, "1")
    until(lambda: server.get("/health").body["busy"] == 0 and not server.busy(), what="all are gone", patience_s=FREE_S)
    assert server.get("/slots?fail_on_no_slot=1").status == 200


CLOSED = [
    "POST /props", "POST /slots/0?action=save", "POST /slots/0?action=erase", "GET /lora-adapters", "GET /metrics",
    "POST /lora-adapters", "POST /models/load", "GET /models/sse", "GET /", "GET /index.html", "POST /tokenize",
    "POST /apply-template", "POST /infill", "GET /v1/stream?conv_id=mine", "POST /v1/streams/lookup", "GET /tools",
    "POST /tools", "GET /cors-proxy?url=http://127.0.0.1", "POST /v1/responses", "POST /v1/messages", "POST /rerank",
    "GET /../etc/passwd", "GET //v1/models", "DELETE /v1/models", "POST /v1/chat/completions/control",
]  # fmt: skip


@pytest.mark.parametrize("call", CLOSED)
def test_nothing_else_of_llama_cpp_is_open(server: ModelServer, call: str) -> None:
    method, path = call.split()
    reply = server.post(path, {}) if method == "POST" else server.get(path, method)
    assert reply.status == 404
    assert reply.body["error"]["type"] == "not_found_error"


def test_no_page_of_a_browser_is_let_in(server: ModelServer) -> None:
    with contextlib.closing(server.connect()) as connection:
        connection.request("OPTIONS", "/v1/chat/completions", headers={"Origin": "http://page.example"})
        response = connection.getresponse()
        assert response.status == 405
        assert "access-control-allow-origin" not in {name.lower() for name in response.headers}
    asked = json.dumps(server.chat("x")).encode()
    assert server.post("/v1/chat/completions", asked, Content_Type="text/plain").status == 415


#: Body and headers, and the status of the refusal.
BAD: dict[str, tuple[bytes, int]] = {
    "no JSON": (b'{"PRIVATE": ', 400),
    "a list": (b"[]", 400),
    "nested without end": (b'{"messages": ' + b"[" * 100_000, 400),
    "no number": (b'{"messages": [], "temperature": NaN}', 400),
    "too long": (b" " * (8 * 1024 * 1024 + 1), 413),
    "no messages": (b"{}", 400),
    "longer than the context": (json.dumps({"messages": [{"role": "user", "content": "x" * 70_000}]}).encode(), 400),
    "the same, streamed": (
        json.dumps({"messages": [{"role": "user", "content": "x" * 70_000}], "stream": True}).encode(), 400,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_served_gets_an_error_in_openais_form(server: ModelServer, name: str) -> None:
    body, status = BAD[name]
    reply = server.post("/v1/chat/completions", body)
    assert reply.status == status
    assert reply.body["error"]["message"]


def test_an_image_cannot_name_a_file_or_an_address(server: ModelServer) -> None:
    for url in ("file:///etc/passwd", "http://127.0.0.1:1/"):
        parts = [{"type": "image_url", "image_url": {"url": url}}]
        reply = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})
        assert "not supported" in reply.body["error"]["message"]


def test_prompts_are_shown_by_no_call_and_in_no_log(server: ModelServer) -> None:
    asked = server.chat("PRIVATE", max_tokens=ENDLESS, stream=True, stop=["PRIVATE"], user="PRIVATE")
    with contextlib.closing(server.send("/v1/chat/completions", asked)):
        until(server.busy, what="the request has a slot")
        shown = [json.dumps(server.get(path).body) for path in ("/slots", "/health", "/props", "/v1/models")]
    until(lambda: not server.busy(), what="the slot is free", patience_s=FREE_S)
    server.post("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "PRIVATE"}], "PRIVATE: }')
    assert not [text for text in [*shown, server.said()] if "PRIVATE" in text]


def test_texts_become_vectors_where_the_service_was_started_for_them(models: Path, tmp_path: Path) -> None:
    with serving(tmp_path, file=models / "embedding.gguf", env={"EMBEDDINGS": "1", "CONTEXT": "512"}) as [server]:
        reply = server.post("/v1/embeddings", {"model": "tiny", "input": ["Hello", "Hello", "something else"]})
        one, same, other = (item["embedding"] for item in reply.body["data"])
        assert len(one) == 32
        assert one == pytest.approx(same)
        assert one != pytest.approx(other)
        assert server.get("/v1/models").body["models"][0]["capabilities"] == ["embedding"]
        refused = server.post("/v1/chat/completions", server.chat("Hello"))
        assert (refused.status, "for embeddings" in refused.body["error"]["message"]) == (400, True)


def test_a_chat_model_refuses_embeddings(server: ModelServer) -> None:
    assert server.post("/v1/embeddings", {"input": "Hello"}).status == 400


def bad_file(folder: Path, kind: str, good: Path) -> Path:
    data = good.read_bytes()
    file = folder / "bad.gguf"
    if kind == "a folder":
        file.mkdir()
    elif kind == "no GGUF":
        file.write_text("This is no model.")
    elif kind == "empty":
        file.touch()
    elif kind == "cut off":
        file.write_bytes(data[: len(data) // 2])
    elif kind == "another version":
        file.write_bytes(data[:4] + b"\x63\0\0\0" + data[8:])
    elif kind == "unknown architecture":
        file.write_bytes(data.replace(b"\x05" + bytes(7) + b"llama", b"\x05" + bytes(7) + b"lxxma", 1))
    return file


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("missing", "there is no model file"), ("a folder", "is not a file"), ("no GGUF", "is not a GGUF file"),
        ("empty", "is not a GGUF file"), ("another version", "version 99"),
        ("cut off", "cannot be loaded: tensor"), ("unknown architecture", "unknown model architecture: 'lxxma'"),
    ],
)  # fmt: skip
def test_a_bad_file_ends_the_service_with_a_sentence(models: Path, tmp_path: Path, kind: str, sentence: str) -> None:
    server = start(tmp_path / "run", bad_file(tmp_path, kind, models / "two.gguf"))
    try:
        code, last = ended(server)
    finally:
        stop(server)
    assert code == 1
    assert last.startswith("rma_llama_cpp: ")
    assert sentence in last


def test_settings_that_do_not_fit_are_named_together(tmp_path: Path) -> None:
    need("llama")
    env = {"CONTEXT": "many", "SLOTS": "0", "MODEL_SHA256": "x", "KV_TYPE": "q1", "EMBEDDINGS": "maybe"}
    server = start(tmp_path / "run", tmp_path / "x.gguf", env={**env, "MODEL_FILE": ""})
    try:
        code, last = ended(server)
    finally:
        stop(server)
    assert code == 1
    assert all(name in last for name in [*env, "MODEL_FILE"])


def test_a_file_larger_than_the_free_memory_is_not_even_tried(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("llama")
    from rma_llama_cpp import model_file, settings
    from rma_service import machine

    monkeypatch.setattr(machine, "memory_bytes", lambda: 100_000)
    with pytest.raises(settings.Unusable, match=r"more than the 0\.0 GB of memory that are free"):
        model_file.check_room(models / "two.gguf", model_file.check(models / "two.gguf"))


def test_the_hash_is_checked_first_and_health_tells_how_far_that_is(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "large.gguf"
    file.write_bytes((models / "two.gguf").read_bytes())
    os.truncate(file, 700_000_000)
    server = start(tmp_path / "run", file, env={"MODEL_SHA256": "0" * 64})
    seen: list[Any] = []

    def checked() -> bool:
        with contextlib.suppress(OSError):
            reply = server.get("/health")
            seen.append((reply.status, reply.body["status"], reply.body["phase"], reply.body.get("progress")))
            assert reply.headers["retry-after"] == "1"
            assert server.post("/v1/chat/completions", server.chat("x")).status == 503
        return server.process.poll() is not None

    try:
        until(checked, what="the file is refused")
        code, last = ended(server)
    finally:
        stop(server)
    assert {one[:3] for one in seen} == {(503, "loading", "checking")}
    shares = [one[3] for one in seen if one[3] is not None]
    assert shares == sorted(shares)
    assert shares[-1] > 0
    assert (code, "is not the file that was asked for" in last) == (1, True)


def test_the_right_hash_lets_it_start(models: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((models / "two.gguf").read_bytes()).hexdigest()
    with serving(tmp_path, file=models / "two.gguf", env={"MODEL_SHA256": f"sha256:{digest}"}) as [server]:
        assert len(server.text("Hello")) == 40


def test_sigterm_ends_it_in_the_middle_of_an_answer_and_leaves_nothing(models: Path, tmp_path: Path) -> None:
    env = {"CONTEXT": str(ROOM)}
    with serving(tmp_path, file=models / "one.gguf", unix=True, env=env) as [server]:
        socket, engines = tmp_path / "0" / "s", server.engines()
        assert socket.stat().st_mode & 0o077 == 0
        stream = server.stream("Go on", max_tokens=ENDLESS)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(model_servers.PATIENCE_S) == 0
        until(lambda: not any(engine.is_running() for engine in engines), what="the engine is gone")
        assert len(engines) == 1
        assert not socket.exists()
        with pytest.raises(EOFError):
            list(stream)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_model_that_dies_ends_its_answers_without_an_end_and_the_service(
    models: Path, tmp_path: Path, streamed: bool
) -> None:
    env = {"CONTEXT": str(ROOM)}
    with serving(tmp_path, file=models / "one.gguf", env=env) as [server]:
        connection = server.send("/v1/chat/completions", server.chat("Go on", max_tokens=ENDLESS, stream=streamed))
        until(server.busy, what="the request has a slot")
        # A stream has begun; an engine that is lost before that is a 502 for it, too.
        stream = model_servers.events(connection.getresponse()) if streamed else None
        if stream is not None:
            next(stream)
        server.kill_engine()
        code, last = ended(server)
        assert (code, last) == (1, "rma_llama_cpp: llama.cpp has ended: killed by SIGKILL")
        with contextlib.closing(connection), contextlib.suppress(OSError):
            if stream is None:
                assert connection.getresponse().status == 502
            else:
                with pytest.raises(EOFError):
                    list(stream)


def test_an_engine_does_not_outlive_its_service(models: Path, tmp_path: Path) -> None:
    with serving(tmp_path, file=models / "two.gguf") as [server]:
        engines = server.engines()
        server.process.kill()
        until(lambda: not any(engine.is_running() for engine in engines), what="the engine is gone")
        assert engines


# -- loaded, unloaded, loaded again --------------------------------------------------------------------------------


def rss_bytes(processes: list[psutil.Process]) -> int:
    return sum(process.memory_info().rss for process in processes if process.is_running())


def test_a_model_that_is_unloaded_takes_no_memory_and_comes_back_with_the_next_request(
    models: Path, tmp_path: Path
) -> None:
    with serving(tmp_path, file=models / "two.gguf", env={"CONTEXT": str(ROOM)}) as [server]:
        before, [engine] = server.text("Hello"), server.engines()
        assert rss_bytes([engine]) > 20_000_000
        assert server.post("/unload", {}).status == 200
        assert not engine.is_running()
        health = server.get("/health")
        assert (health.status, health.body["status"], health.body["busy"]) == (200, "cold", 0)
        assert server.get("/v1/models").body["data"][0]["id"] == "tiny"
        assert server.get("/slots").status == 503
        assert server.text("Hello") == before
        assert server.get("/health").body["status"] == "ok"
        assert len(server.engines()) == 1


def test_a_model_at_work_is_not_unloaded(models: Path, tmp_path: Path) -> None:
    with serving(tmp_path, file=models / "one.gguf", env={"CONTEXT": str(ROOM)}) as [server]:
        with contextlib.closing(server.send("/v1/chat/completions", server.chat("x", max_tokens=ENDLESS, stream=True))):
            until(server.busy, what="the request has a slot")
            assert server.post("/unload", {}).status == 409
            assert server.busy() == 1
        until(lambda: server.post("/unload", {}).status == 200, what="the client is gone")
        # Asked in one breath, the last word counts.
        assert [server.post(path, {}).status for path in ("/load", "/unload", "/load")] == [200, 200, 200]
        until(lambda: server.get("/health").body["status"] == "ok", what="it is loaded")


def test_a_stream_that_waits_for_its_model_is_told_so_and_a_refusal_comes_as_its_event(
    models: Path, tmp_path: Path
) -> None:
    slow = slow_to_check(tmp_path, models / "two.gguf")
    env = {"LOAD": "0", "MODEL_SHA256": hashlib.sha256(slow.read_bytes()).hexdigest()}
    with serving(tmp_path / "run", file=slow, env=env) as [server]:
        assert (server.get("/health").body["status"], server.engines()) == ("cold", [])
        asked = server.chat("Hello", max_tokens=5, stream=True)
        with contextlib.closing(server.send("/v1/chat/completions", asked)) as connection:
            response = connection.getresponse()
            assert (response.status, response.readline()) == (200, b": loading\n")
            told = server.get("/health")
            assert (told.status, told.body["status"], told.body["phase"]) == (200, "loading", "checking")
            text = "".join(
                choice["delta"].get("content") or ""
                for data in model_servers.events(response)
                for choice in data["choices"]
            )
        assert len(text) == 5
        server.post("/unload", {})
        with contextlib.closing(server.send("/v1/chat/completions", {"stream": True})) as connection:
            body = connection.getresponse().read()
            [refusal] = [line for line in body.split(b"\n") if line.startswith(b"data")]
        assert json.loads(refusal[6:])["error"]["code"] == 400


def slow_to_check(folder: Path, good: Path) -> Path:
    """Return a copy that takes a second to hash: llama.cpp does not mind what stands behind the weights."""
    file = folder / "slow.gguf"
    file.write_bytes(good.read_bytes())
    os.truncate(file, 600_000_000)
    return file


def test_hundreds_of_answers_leave_nothing_behind(server: ModelServer) -> None:
    wanted = server.text("Again", max_tokens=20)
    end = time.monotonic() + model_servers.PATIENCE_S
    for _ in range(100):
        assert server.text("Again", max_tokens=20) == wanted
        if time.monotonic() > end:  # its threads wait for each other: on busy processors an answer takes long
            break
    assert server.get("/health").body["busy"] == 0


async def test_the_service_is_installed_and_run_by_the_process_runtime(models: Path, tmp_path: Path) -> None:
    need("pypi")
    entry = load(LLAMA / "catalog.toml")
    env = {**entry.env, "MODEL": "tiny", "MODEL_FILE": str(models / "two.gguf")}
    spec = msgspec.structs.replace(tiny_spec(), process=entry.process, limits=entry.limits, env=env)
    # A short path: the endpoint is a Unix socket then.
    home = Path(tempfile.mkdtemp(prefix="rma-"))
    runtime = ProcessRuntime(home=str(home), sources=[str(LLAMA.parent)])
    try:
        await runtime.pull(spec, lambda _: None)
        handle = await runtime.start(spec)
        endpoint = await runtime.endpoint(handle)
        assert endpoint.startswith("unix:")
        await asyncio.to_thread(until, lambda: answers(endpoint), what="the model is loaded")
        assert (await runtime.stats(handle)).pids == 2
    finally:
        await runtime.aclose()
        shutil.rmtree(home, ignore_errors=True)


def answers(endpoint: str) -> bool:
    with contextlib.suppress(OSError), contextlib.closing(model_servers.connect(endpoint)) as connection:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def event(delta: dict[str, Any], finish: str | None = None, **more: object) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return json.dumps({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice], **more}).encode()


def test_calls_of_tools_and_reasoning_are_put_together_from_their_pieces() -> None:
    need("llama")
    from rma_llama_cpp.answers import Answer

    answer = Answer()
    call = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    for data in (
        event({"role": "assistant", "content": None}), event({"reasoning_content": "Let me "}),
        event({"reasoning_content": "see"}), event({"tool_calls": [call]}),
        event({"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]}),
        event({"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]}),
        event({}, "tool_calls", usage={"total_tokens": 9}), b"[DONE]",
    ):  # fmt: skip
        answer.take(data)
    assert answer.ended
    whole = json.loads(answer.json())
    [choice] = whole["choices"]
    assert (whole["object"], whole["usage"], choice["finish_reason"]) == (
        "chat.completion", {"total_tokens": 9}, "tool_calls",
    )  # fmt: skip
    assert choice["message"] == {
        "role": "assistant", "content": None, "reasoning_content": "Let me see",
        "tool_calls": [
            {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
        ],
    }  # fmt: skip


def test_an_error_in_a_stream_becomes_the_status_of_a_whole_answer() -> None:
    need("llama")
    from rma_llama_cpp.answers import Answer, Failed

    with pytest.raises(Failed, match="no room") as failed:
        Answer().take(b'{"error": {"code": 503, "message": "no room"}}')
    assert failed.value.status == 503


def test_progress_is_a_comment_for_who_did_not_ask_for_it() -> None:
    need("llama")
    from rma_llama_cpp.front import without_progress

    told = b'data: {"choices":[],"prompt_progress":{"total":9,"cache":1,"processed":4,"time_ms":1}}'
    assert without_progress(told) == b": prompt 4 of 9"
    about = event({"content": '"prompt_progress":{'})
    assert without_progress(b"data: " + about) == b"data: " + about
