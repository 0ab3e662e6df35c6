"""Model servers that their owner attached, looked at: which one it is, what it has, how it fails, never trusted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.agent.attach import attached as attached_module
from rma_core.agent.attach import model_server
from rma_core.agent.attach.asking import MAX_ANSWER_BYTES
from rma_core.agent.attach.attachable import Address, addresses
from rma_core.agent.incoming import EndpointError
from rma_core.errors import UsageProblem
from rma_core.models.strict import decode, encode
from rma_core.models.worker import ContainerStatus
from rma_core.settings import AgentSettings, load_settings
from tests import tiny_model
from tests.agent_service import PATIENCE_S, eventually
from tests.attached_servers import (
    CHAT,
    LLAMA_CPP,
    LM_STUDIO,
    LOADING,
    OLLAMA,
    OLLAMA_TAGS,
    VLLM,
    EndlessAnswer,
    Server,
    attached,
    listed,
    looked,
    running,
)
from tests.model_servers import serving
from tests.pools import NO_ENGINE, environment, rma

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from rma_core.agent.attach.attached import AttachedServer
    from rma_core.agent.attach.model_server import Found
    from tests.model_servers import ModelServer


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
    caplog.set_level(logging.INFO, logger="rma_core.agent.attach.attached")
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
    caplog.set_level(logging.INFO, logger="rma_core.agent.attach.attached")
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
    status = await looked({"/props": LOADING, "/v1/models": LOADING})
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
    caplog.set_level(logging.INFO, logger="rma_core.agent.attach.attached")
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

        async def read(self, _: int, *, within_s: float | None = None) -> bytes:
            body, self._body = self._body, b""
            return body

        async def aclose(self) -> None:
            pass

    with contextlib.suppress(EndpointError):
        found = asyncio.run(model_server.look(Told()))  # type: ignore[arg-type]  # as much of it as is asked
        status = ContainerStatus(name="attached-1", service="llm", state="healthy", models=found.models)
        assert decode(encode(status), ContainerStatus, subject="status") == status
