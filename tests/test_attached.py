"""Model servers that their owner attached: found out, shared within limits, and never trusted, nor is the pool."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.agent import attached as attached_module
from rma_core.agent import channel as channel_module
from rma_core.agent import guarded, model_server
from rma_core.agent import heart as heart_module
from rma_core.agent.attached import Address, AttachedServer, AttachedServers, addresses
from rma_core.agent.incoming import EndpointError
from rma_core.agent.lifecycle import Agent
from rma_core.agent.model_server import MAX_ANSWER_BYTES
from rma_core.agent.start import EVERYTHING, opened
from rma_core.backoff import Backoff
from rma_core.errors import UsageProblem
from rma_core.models import channel as frames
from rma_core.models.strict import decode, encode
from rma_core.models.worker import ContainerStatus
from rma_core.settings import AgentSettings, load_settings
from tests import tiny_model
from tests.agent_service import PATIENCE_S, eventually
from tests.agent_stand_in import StandIn, offer, stand_in
from tests.model_servers import serving
from tests.model_servers import stop as stop_server
from tests.pools import NO_ENGINE, Running, environment, pool, rma, until
from tests.test_agent_lifecycle import REPORT, detect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from pathlib import Path

    from rma_core.agent.model_server import Found
    from tests.agent_stand_in import Line
    from tests.model_servers import ModelServer
    from tests.pools import Pool

CHAT = "/v1/chat/completions"

# What servers answer, as their own documentation shows it: Ollama's /api/tags, /api/ps and /api/version at
# docs.ollama.com/api (October 2025), with the `remote_host` that its lists give cloud models; LM Studio's
# /api/v0/models at lmstudio.ai/docs/api/rest-api, and what it says to any path it does not know, from reports of its
# users; vLLM's /v1/models from its documentation and a public server; llama.cpp's from its tools/server/README.md.
OLLAMA_TAGS = {
    "models": [
        {
            "name": "gemma3:4b",
            "model": "gemma3:4b",
            "modified_at": "2025-10-03T23:34:03.409490317-07:00",
            "size": 3338801804,
            "digest": "a2af6cc3eb7fa8be8504abaf9b04e88f17a119ec3f04a3addf55f92841195f5a",
            "details": {"format": "gguf", "family": "gemma", "families": ["gemma"], "parameter_size": "4.3B"},
        },
        {"name": "llama3.2:latest", "model": "llama3.2:latest", "size": 2019393189, "digest": "a8", "details": {}},
        {
            "name": "gpt-oss:120b-cloud",
            "model": "gpt-oss:120b-cloud",
            "remote_model": "gpt-oss:120b",
            "remote_host": "https://ollama.com:443",
            "size": 384,
            "digest": "b8",
        },
    ]
}
OLLAMA_PS = {
    "models": [
        {
            "name": "gemma3:4b",
            "model": "gemma3:4b",
            "size": 6591830464,
            "digest": "a2af6cc3eb7fa8be8504abaf9b04e88f17a119ec3f04a3addf55f92841195f5a",
            "details": {"parent_model": "", "format": "gguf", "family": "gemma3", "quantization_level": "Q4_K_M"},
            "expires_at": "2025-10-17T16:47:07.93355-07:00",
            "size_vram": 5333539264,
            "context_length": 4096,
        }
    ]
}
OLLAMA: Mapping[str, object] = {"/api/version": {"version": "0.12.6"}, "/api/tags": OLLAMA_TAGS, "/api/ps": OLLAMA_PS}
LM_STUDIO: Mapping[str, object] = {
    "/api/v0/models": {
        "object": "list",
        "data": [
            {
                "id": "qwen2-vl-7b-instruct",
                "object": "model",
                "type": "vlm",
                "publisher": "mlx-community",
                "state": "not-loaded",
                "max_context_length": 32768,
            },
            {
                "id": "meta-llama-3.1-8b-instruct",
                "object": "model",
                "type": "llm",
                "state": "loaded",
                "max_context_length": 131072,
                "loaded_context_length": 4096,
            },
        ],
    }
}
VLLM: Mapping[str, object] = {
    "/v1/models": {
        "object": "list",
        "data": [
            {
                "id": "facebook/opt-125m",
                "object": "model",
                "created": 1677610602,
                "owned_by": "vllm",
                "root": "facebook/opt-125m",
                "parent": None,
                "max_model_len": 2048,
            }
        ],
    }
}
LLAMA_CPP: Mapping[str, object] = {
    "/props": {
        "default_generation_settings": {"id": 0, "n_ctx": 4096, "is_processing": False},
        "total_slots": 4,
        "model_path": "/home/someone/models/qwen2.5-7b-q4_k_m.gguf",
        "chat_template": "...",
        "is_sleeping": False,
    },
    "/v1/models": {
        "object": "list",
        "data": [{"id": "/home/someone/models/qwen2.5-7b-q4_k_m.gguf", "object": "model", "owned_by": "llamacpp"}],
    },
}


class Server:
    """A stand-in for somebody's model server: ``answers`` by path, else 404 (``unknown`` in its place)."""

    def __init__(self, answers: Mapping[str, object], *, unknown: object = None) -> None:
        self.answers, self.unknown = dict(answers), unknown
        self.url = ""
        self.asked: list[str] = []
        self.hangs = self.drips = False
        self.raw: bytes | None = None
        self._server: asyncio.Server | None = None
        self._port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                await self._one(reader, writer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, *_ = (await reader.readuntil(b"\r\n\r\n")).decode().split()
        self.asked.append(f"{method} {path}")
        if self.hangs:
            await asyncio.Event().wait()
        if self.raw is not None:
            writer.write(self.raw)
            await writer.drain()
            writer.close()
            return
        found = self.answers.get(path, self.unknown)
        if isinstance(found, EndlessAnswer):
            await found.write(writer)
            return
        status = "404 Not Found" if found is None else "200 OK"
        if isinstance(found, Loading):
            status, found = "503 Service Unavailable", found.body
        body = found if isinstance(found, bytes) else encode(found)
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


class Loading:
    """What llama.cpp answers while it loads."""

    body: Any = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}  # noqa: RUF012 - never changed


class EndlessAnswer:
    """An answer of a gigabyte; ``sent_bytes`` is what was taken of it."""

    def __init__(self) -> None:
        self.sent_bytes = 0

    async def write(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while self.sent_bytes < 1_000_000_000:
            writer.write(b" " * 65536)
            await writer.drain()
            self.sent_bytes += 65536


@contextlib.asynccontextmanager
async def running(answers: Mapping[str, object], *, unknown: object = None) -> AsyncIterator[Server]:
    server = Server(answers, unknown=unknown)
    await server.open()
    try:
        yield server
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def attached(url: str, **more: Any) -> AsyncIterator[AttachedServer]:
    [address] = addresses([url])
    one = AttachedServer(address, **more)
    try:
        yield one
    finally:
        await one.aclose()


async def looked(answers: Mapping[str, object], *, unknown: object = None, fragment: str = "") -> ContainerStatus:
    """Return what a heartbeat says of such a server, once it was looked at."""
    async with running(answers, unknown=unknown) as server, attached(server.url + fragment) as one:
        await one.look()
        status = one.status()
        # As the coordinator reads it.
        return decode(encode(status), ContainerStatus, subject="status")


def listed(status: ContainerStatus) -> list[tuple[str, str, int]]:
    return [(model.name, model.state, model.context) for model in status.models]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    with serving(tmp_path_factory.mktemp("llama")) as [server]:
        yield server


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http://127.0.0.1:8081", Address("http://127.0.0.1:8081", 0, "attached-8081")),
        ("http://localhost:11434/", Address("http://localhost:11434", 0, "attached-11434")),
        ("http://[::1]:1234/v1", Address("http://[::1]:1234", 0, "attached-1234")),
        (" http://127.0.0.1:8000#slots=4 ", Address("http://127.0.0.1:8000", 4, "attached-8000")),
        ("unix:/run/My Models/LLM.sock#slots=2", Address("unix:/run/My Models/LLM.sock", 2, "attached-llm-sock")),
    ],
)
def test_an_address_on_this_machine_is_taken(text: str, address: Address) -> None:
    assert addresses([text]) == (address,)


@pytest.mark.parametrize(
    "text",
    [
        "", "8081", "127.0.0.1:8081", "https://127.0.0.1:8081", "http://192.168.1.5:8081", "http://example.org:8081",
        "http://127.0.0.1", "http://127.0.0.1:0", "http://127.0.0.1:99999", "http://127.0.0.1:8081/api",
        "http://127.0.0.1:8081?x=1", "http://user:word@127.0.0.1:8081", "http://0.0.0.0:8081", "http://evil.localhost:80",
        "http://127.0.0.1@evil.org:80", "unix:relative", "http://127.0.0.1:8081#slots=0", "http://127.0.0.1:8081#slots=65",
        "http://127.0.0.1:8081#fast", "http://127.0.0.1:8081,http://127.0.0.1:8082", "http://[::1:80", "unix:/a,b",
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(UsageProblem, match="cannot be attached"):
        addresses([text])


def test_an_address_counts_once_and_names_do_not_meet() -> None:
    found = addresses(["http://127.0.0.1:80", "http://127.0.0.1:80/v1", "http://[::1]:80", "http://localhost:80"])
    assert [one.name for one in found] == ["attached-80", "attached-80--2", "attached-80--3"]
    with pytest.raises(UsageProblem, match="at most 16"):
        addresses(f"http://127.0.0.1:{port}" for port in range(1, 18))


@given(st.text(max_size=60) | st.from_regex(r"(http|unix):[/\[\]a-z0-9:.#=@]{0,40}", fullmatch=True))
def test_no_text_is_taken_for_an_address_elsewhere(text: str) -> None:
    with contextlib.suppress(UsageProblem):
        [one] = addresses([text])
        msgspec.convert(AttachedServerStatus(one), ContainerStatus)
        assert one.url.startswith(("unix:/", "http://127.", "http://localhost:", "http://[::1]:", "http://[0"))


def AttachedServerStatus(one: Address) -> dict[str, str]:  # noqa: N802 - reads as the record it stands for
    return {"name": one.name, "service": "llm", "state": "pending"}


def test_the_setting_takes_a_list_from_the_environment_and_a_flag_goes_first(tmp_path: Path) -> None:
    environment = {"RMA_HOME": str(tmp_path), "RMA_ATTACH": "http://127.0.0.1:1, http://127.0.0.1:2"}
    settings = load_settings(AgentSettings, flags={}, environment=environment)
    assert settings.attach == ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    flags = {"attach": ["http://127.0.0.1:3"]}
    assert load_settings(AgentSettings, flags=flags, environment=environment).attach == ["http://127.0.0.1:3"]


@pytest.mark.parametrize("command", [("agent",), ("join", "http://127.0.0.1:1", "rmaj_x"), ("up",)])
def test_a_wrong_address_ends_a_command_before_anything_starts(command: tuple[str, ...], tmp_path: Path) -> None:
    # In a process of its own: a command sets up logging for all that comes after it.
    env = environment(tmp_path / "home", NO_ENGINE)
    words = rma(*command, "--attach", "http://192.168.1.5:8080")
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "'http://192.168.1.5:8080' cannot be attached: it is not an address on this machine" in done.stderr
    assert not (tmp_path / "home").exists()


# -- which server it is ------------------------------------------------------------------------------------------------


async def test_a_real_llama_cpp_is_found_out(llama: ModelServer) -> None:
    async with attached(llama.endpoint) as one:
        await one.look()
        status = one.status()
        assert (status.state, status.runtime, status.isolated, status.image_id) == ("healthy", "attached", False, "")
        assert (status.service, status.slots, listed(status)) == ("llm", 2, [("tiny", "loaded", 2048)])
        assert one.sentence() == f"attached {llama.endpoint}: llama.cpp, 1 model (tiny), 2 slots"


async def test_llama_cpp_is_asked_for_its_slots_and_its_path_stays_here() -> None:
    status = await looked(LLAMA_CPP)
    assert (status.slots, listed(status)) == (4, [("qwen2.5-7b-q4_k_m.gguf", "loaded", 4096)])
    assert "someone" not in encode(status).decode()


#: llama.cpp's own server, as its owner would start it: without a name for the model, or anything of RMA in between.
OWN_SERVER = """
import sys, xllamacpp
told = xllamacpp.CommonParams()
told.model.path, told.hostnames, told.port = sys.argv[1], ["127.0.0.1"], 0
told.n_parallel, told.n_ctx, told.kv_unified, told.fit_params = 3, 3072, False, False
server = xllamacpp.Server(told)
print("listens at", server.listening_address, flush=True)
sys.stdin.read()
"""


async def test_llama_cpps_own_server_is_found_out_and_answers_under_its_files_name(tmp_path: Path) -> None:
    file = await asyncio.to_thread(tiny_model.write_chat_model, tmp_path / "my-model.gguf")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWN_SERVER, str(file), stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            while b"listens at" not in (line := await process.stdout.readline()):
                assert line, "it has ended"
        async with attached(line.decode().split()[-1]) as one:
            await one.look()
            assert one.reason == "llama.cpp, 1 model (my-model.gguf), 3 slots"
            assert listed(one.status()) == [("my-model.gguf", "loaded", 1024)]
            asked = {"model": "my-model.gguf", "max_tokens": 5, "messages": [{"role": "user", "content": "Hello"}]}
            answer = await one.client.request(
                "POST", CHAT, headers=(("content-type", "application/json"),), body=encode(asked)
            )
            body = b""
            while data := await answer.read(65536, within_s=PATIENCE_S):
                body += data
            await answer.aclose()
            assert (answer.status, json.loads(body)["usage"]["completion_tokens"]) == (200, 5)
    finally:
        process.kill()
        await process.wait()


async def test_a_llama_cpp_that_sleeps_is_cold() -> None:
    props: Any = LLAMA_CPP["/props"]
    status = await looked({**LLAMA_CPP, "/props": {**props, "is_sleeping": True}})
    assert [model.state for model in status.models] == ["cold"]


async def test_ollama_says_what_is_loaded_and_what_runs_elsewhere_is_not_shared(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="rma_core.agent.attached")
    status = await looked(OLLAMA)
    assert listed(status) == [("gemma3:4b", "loaded", 4096), ("llama3.2:latest", "cold", 0)]
    assert status.slots == 1
    assert status.reason == "Ollama, 2 models (gemma3:4b, llama3.2:latest), 1 slot; kept back: 1 run elsewhere"
    assert "keeps back models run elsewhere: 'gpt-oss:120b-cloud'" in caplog.text


async def test_an_old_ollama_is_known_by_its_list() -> None:
    assert (await looked({"/api/tags": OLLAMA_TAGS})).reason.startswith("Ollama, 2 models")


async def test_lm_studio_is_known_although_it_answers_200_to_everything() -> None:
    unknown = {"error": "Unexpected endpoint or method. (GET /props)"}
    status = await looked(LM_STUDIO, unknown=unknown)
    assert listed(status) == [("meta-llama-3.1-8b-instruct", "loaded", 4096), ("qwen2-vl-7b-instruct", "cold", 0)]
    assert status.reason.startswith("LM Studio, 2 models")


async def test_any_other_server_is_asked_the_way_of_openai_and_takes_the_slots_its_owner_says() -> None:
    status = await looked(VLLM, fragment="#slots=16")
    assert listed(status) == [("facebook/opt-125m", "loaded", 2048)]
    assert (status.slots, status.reason) == (16, "vLLM, 1 model (facebook/opt-125m), 16 slots")
    plain = {"/v1/models": {"data": [{"id": "m"}]}}
    assert (await looked(plain)).reason == "OpenAI-compatible server, 1 model (m), 1 slot"


async def test_what_models_can_do_is_told_as_far_as_their_servers_say_it() -> None:
    def can(status: ContainerStatus) -> dict[str, tuple[str, ...]]:
        return {model.name: model.capabilities for model in status.models}

    props: Any = {**cast("Any", LLAMA_CPP["/props"]), "modalities": {"vision": True, "audio": False}}
    props["chat_template_caps"] = {"supports_tools": True, "supports_system_role": True}
    models: Any = {**cast("Any", LLAMA_CPP["/v1/models"]), "models": [{"capabilities": ["completion"]}]}
    status = await looked({"/props": props, "/v1/models": models})
    assert list(can(status).values()) == [("completion", "vision", "tools")]
    tags = {"models": [{"name": "a", "capabilities": ["tools", "thinking", "completion"]}, {"name": "b"}]}
    assert can(await looked({**OLLAMA, "/api/tags": tags})) == {
        "a": ("completion", "tools", "thinking"),
        "b": (),
    }
    found = can(await looked(LM_STUDIO, unknown={}))
    assert found == {"meta-llama-3.1-8b-instruct": ("completion",), "qwen2-vl-7b-instruct": ("vision",)}
    for odd in (5, "tools", [1, None, "fly"], {"tools": "yes"}, [["tools"]]):
        tags = {"models": [{"name": "a", "capabilities": cast("Any", odd)}]}
        assert can(await looked({**OLLAMA, "/api/tags": tags})) == {"a": ()}


async def test_once_it_is_known_nothing_else_is_asked() -> None:
    async with running(VLLM) as server, attached(server.url) as one:
        await one.look()
        assert server.asked[-1] == "GET /v1/models"
        server.asked.clear()
        await one.look()
        assert server.asked == ["GET /v1/models"]


async def test_names_that_cannot_be_passed_on_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rma_core.agent.attached")
    names = ["good", "my model", "line\nbreak", "end\n", "\x1b[31m", "", "x" * 201, "good"]
    status = await looked({"/v1/models": {"data": [{"id": name} for name in names]}})
    assert [model.name for model in status.models] == ["good"]
    assert status.reason.endswith("kept back: 6 with a name that cannot be passed on")
    assert r"'my model', 'line\nbreak', 'end\n'" in caplog.text
    assert "\x1b" not in caplog.text


async def test_at_most_64_models_are_listed_the_loaded_ones_first() -> None:
    tags = {"models": [{"name": f"m{number}"} for number in range(100)]}
    running_now = {"models": [{"name": "m99", "context_length": 8192}]}
    status = await looked({"/api/version": {"version": "1"}, "/api/tags": tags, "/api/ps": running_now})
    assert (len(status.models), listed(status)[0]) == (64, ("m99", "loaded", 8192))
    assert "36 beyond the first 64" in status.reason


async def test_a_server_that_loads_is_starting_and_one_without_models_is_no_use() -> None:
    loading = Loading()
    status = await looked({"/props": loading, "/v1/models": loading})
    assert (status.state, status.reason) == ("starting", "it loads its model")
    status = await looked({**OLLAMA, "/api/tags": {"models": None}})
    assert (status.state, status.reason) == ("unhealthy", "Ollama has no model to share")


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "unknown", "reason"),
    [
        ({}, None, "GET /v1/models answered 404"),
        ({}, b"<html>hello</html>", "it is no model server that is known"),
        ({"/v1/models": {"data": "none"}}, None, "it is no model server that is known"),
        ({"/v1/models": {"data": [{"id": 5}]}}, None, "it is no model server that is known"),
        ({"/v1/models": b"[" * 100_000}, None, "it is no model server that is known"),
        ({"/v1/models": b'{"data": [{"id": "\xff"}]}'}, None, "it is no model server that is known"),
        ({"/api/version": {"version": "1"}}, None, "it is Ollama, but GET /api/tags gave no list"),
        ({"/props": {"total_slots": 2}}, None, "it is llama.cpp, but GET /v1/models gave no list"),
    ],
)
async def test_nonsense_is_unhealthy_with_a_reason(answers: Mapping[str, object], unknown: object, reason: str) -> None:
    status = await looked(answers, unknown=unknown)
    assert (status.state, status.models) == ("unhealthy", ())
    assert status.reason.startswith(reason)


async def test_wild_numbers_do_no_harm() -> None:
    props = {"total_slots": 10**12, "n_ctx": -5}
    status = await looked({**LLAMA_CPP, "/props": props})
    assert (status.slots, status.models[0].context) == (64, 0)
    wild = b'{"data": [{"id": "m", "max_model_len": 1e308}, {"id": "n", "max_model_len": true}]}'
    assert [model.context for model in (await looked({"/v1/models": wild})).models] == [0, 0]


async def test_of_an_endless_answer_little_is_read() -> None:
    endless = EndlessAnswer()
    async with running({"/v1/models": endless}) as server, attached(server.url) as one:
        await one.look()
        assert one.reason == f"its answer to GET /v1/models is larger than {MAX_ANSWER_BYTES} bytes"
    assert endless.sent_bytes < 20 * MAX_ANSWER_BYTES


async def test_a_server_that_hangs_is_unhealthy_but_not_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_server, "LOOK_TIMEOUT_S", 0.3)
    async with running(VLLM) as server, attached(server.url) as one:
        await one.look()
        server.hangs = True
        slot = one.place()
        assert slot is not None
        await one.look()
        assert one.state == "healthy"
        slot.release()
        await one.look()
        assert (one.state, one.reason[:16]) == ("unhealthy", "no answer within")


@pytest.mark.parametrize(
    "raw", [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", b"\0" * 999]
)
async def test_a_server_that_breaks_off_or_speaks_something_else_is_unhealthy(raw: bytes) -> None:
    async with running({}) as server, attached(server.url) as one:
        server.raw = raw
        await one.look()
        assert one.state == "unhealthy"
        assert one.reason


async def test_a_server_that_wants_a_key_says_so() -> None:
    async with running({}) as server, attached(server.url) as one:
        server.raw = b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n"
        await one.look()
        assert one.reason == "it wants an API key, and none can be given to it"


async def test_a_bug_in_the_look_is_told_once_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(*_: object) -> Found:
        raise LookupError("oh")

    async with attached("http://127.0.0.1:9", look=broken) as one:
        assert await one.look() > 0
        await one.look()
        assert (one.state, one.free) == ("failed", 0)
    assert caplog.text.count("the look at http://127.0.0.1:9 failed") == 1


async def test_one_that_is_not_there_comes_by_itself_and_goes_and_comes_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached_module, "AWAY_BASE_S", 0.02)
    monkeypatch.setattr(attached_module, "AWAY_CAP_S", 0.05)
    monkeypatch.setattr(attached_module, "LOOK_EVERY_S", 0.05)
    caplog.set_level(logging.INFO, logger="rma_core.agent.attached")
    server = Server(VLLM)
    await server.open()
    await server.close()
    changes: list[str] = []

    def changed() -> None:
        changes.append(one.state)

    one: AttachedServer
    async with attached(server.url, changed=changed) as one:
        looking = asyncio.create_task(one.run())
        try:
            for _ in range(2):
                await eventually(lambda: one.state == "unhealthy")
                assert (one.reason[:13], one.free, one.status().models) == ("no connection", 0, ())
                await server.open()
                await eventually(lambda: one.state == "healthy")
                assert one.free == 1
                await server.close()
            await eventually(lambda: one.state == "unhealthy")
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
    told = [record.message.partition(": ")[2].partition(":")[0] for record in caplog.records]
    well = "vLLM, 1 model (facebook/opt-125m), 1 slot"
    assert told == ["unhealthy", well, "unhealthy", well, "unhealthy"]
    assert changes[:3] == ["unhealthy", "healthy", "unhealthy"]


SAID = [encode(value) for shape in (OLLAMA, LLAMA_CPP, LM_STUDIO, VLLM) for value in shape.values()]


@given(
    st.dictionaries(
        st.sampled_from(sorted({*OLLAMA, *LLAMA_CPP, *LM_STUDIO})), st.binary(max_size=40) | st.sampled_from(SAID)
    )
)
def test_whatever_it_answers_there_is_a_list_that_the_pool_can_read_or_a_reason(answers: dict[str, bytes]) -> None:
    class Told:
        """An endpoint whose server said all that long ago."""

        async def request(self, _: str, path: str, **__: object) -> Any:
            return Whole(answers.get(path))

    class Whole:
        def __init__(self, body: bytes | None) -> None:
            self.status, self._body = (404, b"") if body is None else (200, body)

        async def read(self, _: int) -> bytes:
            body, self._body = self._body, b""
            return body

        async def aclose(self) -> None:
            pass

    with contextlib.suppress(EndpointError):
        found = asyncio.run(model_server.look(Told()))  # type: ignore[arg-type]  # as much of it as is asked
        status = ContainerStatus(name="attached-1", service="llm", state="healthy", models=found.models)
        assert decode(encode(status), ContainerStatus, subject="status") == status


# -- placing -----------------------------------------------------------------------------------------------------------


async def test_an_offer_takes_the_least_busy_server_that_has_its_model() -> None:
    other = {"/v1/models": {"data": [{"id": "facebook/opt-125m"}, {"id": "other"}]}}
    async with running(VLLM) as one, running(other) as two:
        servers = AttachedServers(addresses([f"{one.url}#slots=1", f"{two.url}#slots=2"]))
        assert "is pending" in str(servers.place("other"))
        await servers.look()
        assert (servers.slots(), servers.free(), servers.busy_share(), servers.healthy) == (3, 3, 0.0, True)
        taken = [servers.place("facebook/opt-125m") for _ in range(3)]
        assert [slot.owner for slot in taken if not isinstance(slot, str)].count(servers.servers[1]) == 2
        assert servers.place("facebook/opt-125m") == "facebook/opt-125m is busy"
        assert servers.place("none") == "this machine has no model 'none'; it has: facebook/opt-125m, other"
        assert servers.busy_share() == 1.0
        for slot in taken:
            assert not isinstance(slot, str)
            slot.release()
        assert servers.free() == 3
        await servers.aclose()


async def test_all_servers_of_a_machine_share_64_slots() -> None:
    many = {**LLAMA_CPP, "/props": {"total_slots": 200}}
    async with running(many) as one, running(many) as two:
        servers = AttachedServers(addresses([one.url, two.url]))
        await servers.look()
        assert servers.slots() == 64
        await servers.aclose()


# -- the whole agent ---------------------------------------------------------------------------------------------------


class House:
    """A pool, and an agent with one attached server."""

    def __init__(self, pool: StandIn, line: Line, agent: Agent) -> None:
        self.pool, self.line, self.agent = pool, line, agent
        self._number = 0

    async def ask(self, body: object, *, path: str = CHAT, method: str = "POST", **more: Any) -> int:
        """Offer a task with this body and return its stream."""
        self._number += 1
        data = body if isinstance(body, bytes) else encode(body)
        told = {"service": "llm", "model": "tiny", "headers": [["content-type", "application/json"]], **more}
        task = offer(path, number=self._number, method=method, body_bytes=len(data), **told)
        await self.line.say(frames.Task(stream=self._number, offer=task))
        if data:
            await self.line.body(self._number, data)
        return self._number

    async def refused(self, body: object, **more: Any) -> tuple[str, str]:
        error = await self.line.frame(frames.Error, await self.ask(body, **more))
        return error.fault, error.reason


@contextlib.asynccontextmanager
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *urls: str, **more: Any) -> AsyncIterator[House]:
    monkeypatch.setattr("rma_core.agent.membership.Backoff", lambda: Backoff(base_s=0.05, cap_s=0.2))
    monkeypatch.setattr(heart_module, "GATHER_HTTP_S", 0.05)
    monkeypatch.setattr(channel_module, "RETRY_BASE_S", 0.02)
    async with stand_in() as pool:
        settings = AgentSettings(
            home=str(tmp_path / "home"), coordinator_url=pool.url, join_token=pool.token, runtimes=[], drain_s=5,
            attach=list(urls),
        )  # fmt: skip
        async with opened(settings, detect, consent=EVERYTHING) as (folder, record, key, report):
            assert report is REPORT
            agent = Agent(settings, folder, record, key, report=report, runtimes={}, **more)
            running_agent = asyncio.create_task(agent.run())
            try:
                line = await pool.line()
                await line.wait(lambda: any(slots(f).get("llm") for f in line.control))
                yield House(pool, line, agent)
            finally:
                agent.stop()
                agent.stop()
                async with asyncio.timeout(PATIENCE_S):
                    await running_agent


def slots(frame: frames.Up) -> dict[str, int]:
    return frame.slots if isinstance(frame, frames.Hello | frames.Beat) else {}


def beats(line: Line) -> list[frames.Beat]:
    return [frame for frame in line.control if isinstance(frame, frames.Beat)]


async def test_the_pool_is_told_of_it_and_an_offer_is_answered_whole_and_streamed(
    llama: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path, monkeypatch, llama.endpoint) as here:
        beat = (await here.line.wait(lambda: [b for b in beats(here.line) if b.slots]))[0]
        assert beat.slots == {"llm": 2}
        [status] = beat.beat.containers
        assert (status.runtime, status.state, listed(status)) == ("attached", "healthy", [("tiny", "loaded", 2048)])
        assert here.agent.status().containers == (status,)
        assert beat.beat.status == "healthy"

        stream = await here.ask(llama.chat("Hello", max_tokens=20))
        head = await here.line.frame(frames.Head, stream)
        assert head.status == 200
        await here.line.frame(frames.End, stream)
        whole = json.loads(here.line.data[stream])["choices"][0]["message"]["content"]
        assert len(whole) == 20

        stream = await here.ask(llama.chat("Hello", max_tokens=20, stream=True))
        assert dict((await here.line.frame(frames.Head, stream)).headers)["content-type"].startswith(
            "text/event-stream"
        )
        await here.line.frame(frames.End, stream)
        events = bytes(here.line.data[stream]).decode().strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        data = [json.loads(event[5:]) for event in events[:-1] if event.startswith("data:")]
        text = "".join(choice["delta"].get("content") or "" for one in data for choice in one["choices"])
        assert text == whole
        assert here.agent.offering.free() == 2


async def test_a_streamed_request_that_is_cancelled_frees_the_servers_slot(
    llama: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path, monkeypatch, llama.endpoint) as here:
        stream = await here.ask(llama.chat("Hello", max_tokens=60_000, stream=True))
        await here.line.bytes_of(stream, 1)
        assert here.agent.offering.free() == 1
        await here.line.say(frames.Cancel(stream=stream, reason="the client left"))
        await eventually(lambda: here.agent.offering.free() == 2)
        await asyncio.to_thread(lambda: until(lambda: llama.busy() == 0, within_s=20, what="the slot is free"))


async def test_what_is_not_shared_is_refused_by_the_agent_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(OLLAMA) as server, house(tmp_path, monkeypatch, server.url) as here:
        server.asked.clear()
        good: dict[str, Any] = {"model": "gemma3:4b", "messages": []}
        gemma = {"model": "gemma3:4b"}
        for method, path in [
            ("DELETE", "/api/delete"),
            ("POST", "/api/pull"),
            ("POST", "/api/generate"),
            ("GET", CHAT),
            ("POST", CHAT + "/control"),
            ("POST", CHAT + "?a=b"),
            ("POST", "/v1/../api/delete"),
            ("POST", "/v1/chat%2fcompletions"),
            ("POST", "//v1/chat/completions"),
            ("GET", "/slots"),
        ]:
            fault, reason = await here.refused(good, path=path, method=method, **gemma)
            assert (fault, "is not open" in reason) == ("request", True), path
        # One that its owner's account pays for elsewhere; names that only some servers would read.
        for body in [
            {**good, "model": "gpt-oss:120b-cloud"},
            {**good, "Model": "gpt-oss:120b-cloud"},
            {"MODEL": "gpt-oss:120b-cloud"},
            {**good, "model": ["gemma3:4b"]},
            b'{"model": "gemma3:4b"} {"model": "gpt-oss:120b-cloud"}',
            b"[]",
            b"no",
            b"",
        ]:
            fault, _ = await here.refused(body, **gemma)
            assert fault == "request"
        assert not [call for call in server.asked if not call.startswith("GET /api/")]
        assert here.agent.offering.free() == 1


async def test_of_a_large_request_no_more_is_read_than_may_be_sent() -> None:
    given = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += 65536
            yield b" " * 65536

    async with running(VLLM) as server, attached(server.url) as one:
        await one.look()
        with pytest.raises(UsageProblem, match="8388608 bytes at most"):
            await one.client.request("POST", CHAT, body=body(), length=10**9)  # type: ignore[arg-type]  # a generator
        assert given <= guarded.MAX_BODY_BYTES + 65536
        assert "POST" not in "".join(server.asked)


async def test_a_model_that_is_not_there_is_given_back_with_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(OLLAMA) as server, house(tmp_path, monkeypatch, server.url) as here:
        fault, reason = await here.refused({}, model="nothing")
        assert fault == "owner"
        assert reason == "this machine has no model 'nothing'; it has: gemma3:4b, llama3.2:latest"
        fault, reason = await here.refused({}, service="notes")
        assert reason == "this machine does not run notes"


async def test_hardly_any_header_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("POST"):
            seen.append(head.lower())
            await reader.readexactly(2)
        body = encode(VLLM["/v1/models"]) if "GET /v1/models" in head else b"{}"
        status = "200 OK" if "/v1/" in head else "404 No"
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    names = ["content-type", "User-Agent", "Accept", "X-Conversation-Id", "Authorization", "Cookie", "X-Other"]
    async with server, house(tmp_path, monkeypatch, url) as here:
        headers = [[name, "value"] for name in names]
        stream = await here.ask(b"{}", model="facebook/opt-125m", headers=headers)
        await here.line.frame(frames.End, stream)
    [head] = seen
    sent = {line.partition(":")[0] for line in head.split("\r\n")[1:] if line}
    assert sent == {"host", "content-length", "content-type", "user-agent", "accept", "accept-encoding"}


async def test_a_server_that_dies_fails_its_attempts_and_is_seen_to_be_gone_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(VLLM)
    await server.open()
    async with house(tmp_path, monkeypatch, server.url) as here:
        await server.close()
        fault, reason = await here.refused({"model": "facebook/opt-125m"}, model="facebook/opt-125m")
        assert (fault, "broke off before it answered" in reason) == ("service", True)
        # Long before the next look would have been.
        await here.line.wait(lambda: any(beat.beat.containers[0].state == "unhealthy" for beat in beats(here.line)))
        beat = beats(here.line)[-1]
        [status] = beat.beat.containers
        assert (beat.slots, status.state, status.models) == ({}, "unhealthy", ())
        fault, reason = await here.refused({}, model="facebook/opt-125m")
        assert (fault, reason[:34]) == ("owner", f"{status.name} is unhealthy: no conne"[:34])


async def test_while_draining_nothing_is_offered(
    llama: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path, monkeypatch, llama.endpoint) as here:
        here.agent.draining = True
        assert here.agent.slots() == {}


async def test_without_a_channel_the_plain_way_serves_it_too(
    llama: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached_module, "LOOK_EVERY_S", 0.1)
    async with stand_in() as pool:
        settings = AgentSettings(
            home=str(tmp_path / "home"), coordinator_url=pool.url, join_token=pool.token, runtimes=[], drain_s=5,
            attach=[llama.endpoint],
        )  # fmt: skip
        async with opened(settings, detect, consent=EVERYTHING) as (folder, record, key, report):
            agent = Agent(settings, folder, record, key, report=report, runtimes={}, use_channel=False)
            task = asyncio.create_task(agent.run())
            body = encode(llama.chat("Hello", max_tokens=5))
            told: dict[str, Any] = {
                "service": "llm",
                "model": "tiny",
                "method": "POST",
                "headers": [["content-type", "application/json"]],
            }
            pool.offers.put_nowait(msgspec.structs.replace(offer(CHAT, body_bytes=len(body), **told), body=body))
            try:
                [done] = await pool.until(lambda: pool.completed)
                assert (done.status, done.http_status) == ("succeeded", 200)
                assert any(beat.containers for beat in pool.beats)
            finally:
                agent.stop()
                async with asyncio.timeout(PATIENCE_S):
                    await task


# -- the commands ------------------------------------------------------------------------------------------------------


def test_a_volunteer_joins_with_a_server_and_everybody_sees_it_come_and_go(tmp_path: Path) -> None:
    with (
        pool(tmp_path / "pool", "--port", "0", "--no-agent", env=NO_ENGINE) as made,
        serving(tmp_path / "served", unix=True) as [server],
    ):
        token = made.json("tokens", "create")["token"]
        env = environment(tmp_path / "rma", NO_ENGINE)
        joined = Running(rma("join", made.url, token, "--yes", "--attach", server.endpoint), env)
        try:
            joined.wait_for(rf"attached {server.endpoint}: llama.cpp, 1 model \(tiny\), 2 slots")
            name = joined.wait_for(r"This machine is (worker-\w+)")[1]
            joined.wait_for("the channel to the coordinator is open")
            [status] = [one for one in until_told(made, name, "healthy") if one["service"] == "llm"]
            assert (status["runtime"], status["slots"]) == ("attached", 2)
            assert re.search(r"llm +healthy +attached-s +llama.cpp, 1 model \(tiny\), 2 slots", told(env, "status"))
            assert "llama.cpp, 1 model (tiny), 2 slots" in made.ask("workers", name).stdout
            stop_server(server)
            until_told(made, name, "unhealthy")
            assert re.search(r"llm +unhealthy +attached-s +no connection", told(env, "status"))
        finally:
            joined.stop()


def until_told(made: Pool, name: str, state: str) -> list[dict[str, Any]]:
    """Wait until the pool knows the state of what a worker attached; return all that it runs."""

    def look() -> list[dict[str, Any]]:
        containers: list[dict[str, Any]] = made.json("workers", name)["containers"]
        return containers if [one for one in containers if one["state"] == state] else []

    found: list[dict[str, Any]] = until(look, within_s=60, what=f"{name} has something {state}")
    return found


def told(env: Mapping[str, str], *arguments: str) -> str:
    return subprocess.run(rma(*arguments), env=env, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_machine_that_only_enrols_is_told_how_to_start_with_its_server(tmp_path: Path) -> None:
    with pool(tmp_path / "pool", "--port", "0", "--no-agent", env=NO_ENGINE) as made:
        token = made.json("tokens", "create")["token"]
        env = environment(tmp_path / "rma", NO_ENGINE)
        command = rma("join", made.url, token, "--yes", "--enrol-only", "--attach", "http://127.0.0.1:9#slots=2")
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
        assert "attached http://127.0.0.1:9: unhealthy: no connection" in done.stdout
        assert "rma agent --attach 'http://127.0.0.1:9#slots=2'" in done.stderr
