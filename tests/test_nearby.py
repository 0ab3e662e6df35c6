"""Model servers that run on the owner's machine: found at their usual ports, offered, and never just taken."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil
import pytest

from rma_core.agent.attach import nearby
from rma_core.agent.attach.nearby import USUAL, Nearby, Usual, find
from rma_core.commands.sharing import sentence
from rma_core.diagnosis import examine
from rma_core.host import Plugins
from rma_core.settings import AgentSettings
from tests.attached_servers import LM_STUDIO, OLLAMA, VLLM, EndlessAnswer, Server, running
from tests.ollama_stand_in import ollama
from tests.pools import NO_ENGINE, Running, environment, pool, rma

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

#: Seconds until a command has said what it is to say.
PATIENCE_S = 60.0


def port_of(server: Server) -> int:
    return int(server.url.rpartition(":")[2])


def usually(server: Server, name: str = "somebody's") -> Usual:
    return Usual(port_of(server), name)


# -- looking -----------------------------------------------------------------------------------------------------------


async def test_what_runs_at_the_usual_ports_is_found_with_its_models() -> None:
    async with (
        running(OLLAMA) as one,
        running(VLLM) as two,
        running({"/v1/models": {"data": [{"id": "m"}]}}) as three,
    ):
        found = await find(usual=[usually(one), usually(two), usually(three, "Jan")])
    assert found == (
        Nearby(url=one.url, server="Ollama", models=("gemma3:4b", "llama3.2:latest")),
        Nearby(url=two.url, server="vLLM", models=("facebook/opt-125m",)),
        Nearby(url=three.url, server="OpenAI-compatible server, likely Jan", models=("m",)),
    )
    assert found[0].words() == f"Ollama at {one.url} (2 models: gemma3:4b, llama3.2:latest)"
    assert sentence(found[1], "rma up") == (
        f"vLLM at {two.url} (1 model: facebook/opt-125m) is not shared; to share it: rma up --attach {two.url}"
    )


async def test_a_server_that_answers_to_every_name_is_known_by_its_own() -> None:
    # KoboldCpp speaks Ollama's words, too, and not all of them alike.
    kobold = {"/api/extra/version": {"result": "KoboldCpp", "version": "1.117.1"}}
    listed = {"/v1/models": {"object": "list", "data": [{"id": "koboldcpp/Tiefighter", "object": "model"}]}}
    async with running({**OLLAMA, **kobold, **listed}) as server:
        [found] = await find(usual=[usually(server)])
    assert (found.server, found.models) == ("KoboldCpp", ("koboldcpp/Tiefighter",))


@pytest.mark.parametrize(
    ("answers", "raw"),
    [
        ({}, None),
        ({}, b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n"),
        ({}, b"SSH-2.0-OpenSSH\r\n"),
        ({}, b"\0" * 999),
        ({"/": b"<html>", "/v1/models": b"<html>"}, None),
        ({"/v1/models": EndlessAnswer()}, None),
        ({"/v1/models": {"data": []}}, None),
        ({"/v1/models": {"data": [{"id": "\x1b[2J"}]}}, None),
    ],
)
async def test_of_what_is_no_model_server_nothing_is_said(answers: Mapping[str, object], raw: bytes | None) -> None:
    async with running(answers) as server:
        server.raw = raw
        assert await find(usual=[usually(server)]) == ()


async def test_one_that_hangs_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearby, "WITHIN_S", 0.5)
    async with running({}) as silent, running(LM_STUDIO, unknown={"error": "no"}) as one:
        silent.hangs = True
        [found] = await find(usual=[usually(silent), usually(one)])
    assert found.server == "LM Studio"


async def test_only_small_questions_are_asked_that_load_nothing() -> None:
    async with ollama() as server:
        [found] = await find(usual=[Usual(int(server.url.rpartition(":")[2]), "Ollama")])
        assert found.models == ("tiny:latest",)
        assert (server.loads, {path for path, body in server.asked if body is not None}) == (0, set())
    async with running(VLLM) as plain:
        await find(usual=[usually(plain)])
        assert {call.split()[0] for call in plain.asked} == {"GET"}
        assert "GET /slots" not in plain.asked


async def test_what_is_attached_and_the_pool_itself_are_not_asked() -> None:
    async with running(VLLM) as one, running(VLLM) as two:
        besides = [
            f"http://localhost:{port_of(one)}#slots=4",
            f"https://127.0.0.1:{port_of(two)}/x",
            "unix:/a",
            "",
            "http://[",
        ]
        assert await find(besides, usual=[usually(one), usually(two)]) == ()
        assert one.asked == two.asked == []
        # Nor is it when it goes by another address of this machine; one elsewhere is somebody else.
        own = [a.address for every in psutil.net_if_addrs().values() for a in every if a.family.name == "AF_INET"]
        for address in own:
            assert await find([f"http://{address}:{port_of(one)}"], usual=[usually(one)]) == ()
        assert len(await find([f"http://192.0.2.1:{port_of(one)}"], usual=[usually(one)])) == 1


def test_every_usual_port_stands_once_and_below_those_that_systems_give_away() -> None:
    ports = [one.port for one in USUAL]
    assert len(set(ports)) == len(ports)
    # Where RMA's own services get theirs: Linux begins at 32768, others later.
    assert max(ports) < 32768


# -- the commands ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def at_a_usual_port(answers: Mapping[str, object]) -> Iterator[Server]:
    """Run a stand-in at the first usual port that nobody has."""
    made, loop = Server(answers), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(10)

    for one in reversed(USUAL):
        made._port = one.port
        with contextlib.suppress(OSError):
            run(made.open())
            break
    try:
        assert made.url, "every usual port is taken"
        yield made
    finally:
        if made.url:
            run(made.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def of(url: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was found there; other programs of this machine may run at other usual ports."""
    return [one for one in found if one["url"] == url]


def test_what_is_found_is_shown_and_not_shared_without_a_word(tmp_path: Path) -> None:
    with (
        pool(tmp_path / "pool", "--port", "0", "--no-agent", env=NO_ENGINE) as made,
        at_a_usual_port(VLLM) as server,
    ):
        token = made.json("tokens", "create")["token"]
        env = environment(tmp_path / "rma", NO_ENGINE)
        joined = Running(rma("join", made.url, token, "--yes"), env)
        try:
            joined.wait_for(rf"it would not share +at +models\s+(.*\n)*.*vLLM +{server.url} +facebook/opt-125m")
            joined.wait_for("shared with --attach URL, or all of it with --attach-found")
            name = joined.wait_for(r"This machine is (worker-\w+)")[1]
            joined.wait_for(re.escape(f"vLLM at {server.url} (1 model: facebook/opt-125m) is not shared"))
            joined.wait_for("the channel to the coordinator is open")

            def told(*arguments: str) -> subprocess.CompletedProcess[str]:
                return subprocess.run(
                    rma(*arguments), env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
                )

            [found] = of(server.url, json.loads(told("status", "--json").stdout)["attachable"])
            assert found == {"url": server.url, "server": "vLLM", "models": ["facebook/opt-125m"]}
            assert f"is not shared; to share it: rma agent --attach {server.url}" in told("status").stdout
            findings = json.loads(told("doctor", "--json").stdout)["findings"]
            [about] = [one for one in findings if one["subject"] == "model server" and server.url in one["message"]]
            assert (about["level"], about["advice"]) == ("note", f"to share it: rma agent --attach {server.url}")
            # The pool knows nothing of it.
            assert server.url not in joined.text.partition("the channel")[2]
            worker = made.json("workers", name)
            assert (worker["containers"], "facebook" in json.dumps(worker)) == ([], False)
            assert not [call for call in server.asked if not call.startswith("GET ")]
        finally:
            joined.stop()


def test_all_that_is_found_is_shared_where_the_owner_says_so_beforehand(tmp_path: Path) -> None:
    with (
        pool(tmp_path / "pool", "--port", "0", "--no-agent", env=NO_ENGINE) as made,
        at_a_usual_port(VLLM) as server,
    ):
        token = made.json("tokens", "create")["token"]
        env = environment(tmp_path / "rma", NO_ENGINE)
        command = rma("join", made.url, token, "--yes", "--attach-found", "--enrol-only", "--json")
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
        answer = json.loads(done.stdout)
        assert (server.url in answer["attached"], of(server.url, answer["attachable"])) == (True, [])
        assert f"attached {server.url}: vLLM, 1 model (facebook/opt-125m), 1 slot" in done.stderr
        assert re.search(rf"rma agent .*--attach {server.url}", done.stderr)


@pytest.mark.parametrize("shared", [True, False])
def test_each_of_them_is_asked_for_by_itself_and_no_is_the_default(tmp_path: Path, shared: bool) -> None:
    with (
        pool(tmp_path / "pool", "--port", "0", "--no-agent", env=NO_ENGINE) as made,
        at_a_usual_port(VLLM) as server,
    ):
        token = made.json("tokens", "create")["token"]
        env = environment(tmp_path / "rma", NO_ENGINE)
        screen = typed(
            rma("join", made.url, token, "--enrol-only"),
            env,
            {
                r"Do you agree to run this\? \[y/N\]: ": "y",
                rf"Share vLLM at {server.url} \(1 model: facebook/opt-125m\) with the pool\? \[y/N\]: ": (
                    "y" if shared else ""
                ),
                r"with the pool\? \[y/N\]: ": "",
            },
            until=r"Enrolled\. Start working with:  rma agent.*\n",
        )
        last = screen.strip().splitlines()[-1]
        assert (f"--attach {server.url}" in last) is shared


def typed(command: list[str], env: Mapping[str, str], answers: Mapping[str, str], *, until: str) -> str:
    """Run a command in a terminal, answer what it asks, and return its screen once it has said its last."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    os.set_blocking(ours, False)
    screen, answered, deadline = "", 0, time.monotonic() + PATIENCE_S
    try:
        while not re.search(until, screen):
            assert time.monotonic() < deadline, screen
            with contextlib.suppress(OSError):
                screen += os.read(ours, 65_536).decode(errors="replace").replace("\r", "")
            for pattern, answer in answers.items():
                if found := re.search(pattern + r"\Z", screen[answered:]):
                    os.write(ours, answer.encode() + b"\n")
                    answered += found.end()
                    break
            time.sleep(0.05)
        process.wait(PATIENCE_S)
        return screen
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.asyncio
async def test_an_owner_who_wants_nobody_to_look_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(VLLM) as server:
        # Not at a usual port: other agents of this machine look there, whatever this one does.
        port = urlsplit(server.url).port or 0
        monkeypatch.setitem(find.__kwdefaults__ or {}, "usual", (Usual(port, "vLLM"),))
        for looks in (False, True):
            settings = AgentSettings(home=str(tmp_path / "rma"), runtimes=[], find_model_servers=looks)
            findings = await examine(settings, Plugins())
            assert any("model server" in one.subject for one in findings) is looks
            assert bool(server.asked) is looks


def test_rma_up_says_what_could_be_shared(tmp_path: Path) -> None:
    nothing = tmp_path / "catalog"
    nothing.mkdir()
    with at_a_usual_port(VLLM) as server:
        with pool(tmp_path / "pool", "--port", "0", env={**NO_ENGINE, "RMA_CATALOG": str(nothing)}) as made:
            made.up.wait_for(re.escape(f"is not shared; to share it: rma up --attach {server.url}"))
            assert made.workers()[0]["assigned_containers"] == []
        assert not [call for call in server.asked if not call.startswith("GET ")]
