"""`rma up` as its user sees it: real processes, a real request, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from rma_coordinator import local_worker
from rma_coordinator.serving import client_key, first_key
from tests.coordinator_fixtures import running, settings
from tests.needs import need
from tests.pools import NO_ENGINE, Pool, environment, left_over, pool, rma, until

if TYPE_CHECKING:
    from pathlib import Path


def curl_line(made: Pool) -> str:
    return made.up.wait_for(r"(?m)^ +(curl -s .+)$")[1]


def answer_of(line: str) -> dict[str, Any]:
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check_sample(answer: dict[str, Any]) -> None:
    assert "Volunteers who let others use that time make a compute pool" in " ".join(answer["text"].split())
    titles = [heading["title"] for heading in answer["outline"]]
    assert titles == ["Why share a machine", "How a request is answered", "Tiers", "What volunteers keep"]
    assert any("2 Service" in row for table in answer["tables"] for row in table["rows"])
    assert answer["metadata"]["title"] == "A pool of spare machines"


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("up")


def test_without_an_engine_the_printed_curl_line_answers_a_pdf_from_a_plain_process(home: Path) -> None:
    need("pypi")
    with pool(home, "--port", "0", env=NO_ENGINE) as made:
        assert "plain processes of this user, which are not isolated" in made.up.text
        check_sample(answer_of(curl_line(made)))
        assert made.key not in curl_line(made)
        assert made.up.wait_for(r"Client key +(rmac_\w+)")[1] in curl_line(made)
        [worker] = made.workers()
        [notes] = worker["containers"]
        assert (notes["state"], notes["runtime"], notes["isolated"]) == ("healthy", "process", False)
        assert made.json("services")["services"][0]["healthy"] == 1
        assert made.json("status")["connection"] == "channel"
        assert "a text to be read" in made.ask("infer", "notes", "This is a text to be read by the service.").stdout
        [*_, first] = made.json("tasks")["tasks"]
        assert first["status"] == "succeeded"
        port = urlsplit(made.url).port
        assert (home.stat().st_mode | (home / "agent").stat().st_mode) & 0o077 == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_second_start_keeps_the_machine_its_name_and_the_key(home: Path) -> None:
    need("pypi")
    with pool(home, "--port", "0", env=NO_ENGINE) as made:
        first, key = made.workers()[0]["worker_id"], made.key
        keys = made.json("keys")["keys"]
        assert [(k["kind"], k["scopes"]) for k in keys][1:] == [("client", ["infer:*"])]
    with pool(home, "--port", "0", env=NO_ENGINE) as made:
        assert made.key == key
        assert made.json("keys")["keys"] == keys
        until(lambda: made.workers()[0]["status"] == "healthy", within_s=20, what="the worker is back")
        assert [w["worker_id"] for w in made.workers()] == [first]


def test_a_second_pool_on_the_same_folder_is_refused_with_a_sentence(home: Path) -> None:
    with pool(home, "--port", "0", "--no-agent", env=NO_ENGINE):
        second = subprocess.run(
            rma("up", "--port", "0", "--no-agent"),
            env=environment(home, NO_ENGINE),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert second.returncode == 2
    assert "another coordinator is using" in second.stderr
    assert "Traceback" not in second.stderr


def test_an_asked_port_that_is_taken_is_a_sentence(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            rma("up", "--port", str(port)),
            env=environment(home),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert re.search(rf"cannot listen on 127.0.0.1:{port}: .*in use", done.stderr)
    assert "--port" in done.stderr


def test_killed_with_9_it_takes_its_worker_and_services_along(home: Path) -> None:
    need("pypi")
    made = Pool(home, ("--port", "0"), NO_ENGINE).ready()
    assert len(left_over(home)) > 1
    made.up.stop(signal.SIGKILL)
    until(lambda: left_over(home) == [], within_s=45, what="nothing of the killed pool is left")


def test_in_containers_the_same_request_is_answered_by_the_image(
    home: Path, docker_engine: str, notes_image: str
) -> None:
    env = {"DOCKER_HOST": docker_engine} if docker_engine else {}
    with pool(home, "--port", "0", env=env) as made:
        assert "Services run in containers (docker)." in made.up.text
        check_sample(answer_of(curl_line(made)))
        [worker] = made.workers()
        [notes] = worker["containers"]
        assert (notes["state"], notes["runtime"], notes["isolated"]) == ("healthy", "docker", True)
        assert containers(docker_engine, worker["worker_id"]) != []
    assert containers(docker_engine, worker["worker_id"]) == []


def containers(host: str, worker_id: str) -> list[str]:
    """Return the ids of a worker's containers, stopped ones too."""
    command = ["docker", "ps", "-aq", "--filter", f"label=rma.worker={worker_id}"]
    env = {**os.environ, **({"DOCKER_HOST": host} if host else {})}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True).stdout.split()


# -- the keys ------------------------------------------------------------------------------------------------------


async def test_the_client_key_only_sends_requests_and_is_made_once(home: Path) -> None:
    async with running(home) as made:
        settled = settings(home)

        async def start() -> str:
            await first_key(made.app, settled, url=made.url)
            return await client_key(made.app, settled)

        key = await start()
        known = made.pool.keyring.all_keys()
        assert key.startswith("rmac_")
        assert [await start(), made.pool.keyring.all_keys()] == [key, known]
        refused = await made.client.get("/api/admin/workers", headers=made.bearer(key))
        assert refused.status_code == 403
        sent = await made.client.post("/api/inference/notes", content=b"text", headers=made.bearer(key))
        assert sent.json()["code"] == "try_later", "the key was enough; there is no worker"
        await made.pool.revoke(known[-1].key_id)
        again = await start()
        assert again != key
        assert made.pool.keyring.valid(again)


# -- the end of the worker -----------------------------------------------------------------------------------------

#: Counts SIGTERM, and ends at so many of them.
STUBBORN = """
import signal, sys, time
told = 0
def count(*_):
    global told
    told += 1
    print(told, flush=True)
signal.signal(signal.SIGTERM, count)
print(told, flush=True)
while told < {ends_at}:
    time.sleep(0.01)
"""


async def stubborn(ends_at: int) -> asyncio.subprocess.Process:
    command = [sys.executable, "-c", STUBBORN.format(ends_at=ends_at)]
    agent = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, start_new_session=True)
    await told(agent, 0)
    return agent


async def told(agent: asyncio.subprocess.Process, times: int) -> None:
    """Wait until the worker has had so many signals."""
    assert agent.stdout is not None
    assert await asyncio.wait_for(agent.stdout.readline(), 20) == f"{times}\n".encode()


async def test_a_second_ctrl_c_hurries_the_worker_and_a_third_kills_it(capsys: pytest.CaptureFixture[str]) -> None:
    agent = await stubborn(ends_at=3)
    ending = asyncio.create_task(local_worker.stop(agent, drain_s=600))
    await told(agent, 1)
    assert not ending.done()
    os.kill(os.getpid(), signal.SIGINT)
    await told(agent, 2)
    assert not ending.done()
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.wait_for(ending, 20)
    assert agent.returncode == -signal.SIGKILL
    said = capsys.readouterr().err
    assert "610 s at most (Ctrl-C again: it gives that back to the pool)" in said
    assert "45 s at most (Ctrl-C again: it is killed)" in said
    assert "is killed." in said


async def test_a_worker_that_takes_too_long_is_hurried_before_anything_is_killed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two signals that come before it has run are one to it.
    monkeypatch.setattr(local_worker, "LEAVING_S", 2.0)
    agent = await stubborn(ends_at=2)
    await asyncio.wait_for(local_worker.stop(agent, drain_s=0), 20)
    assert agent.returncode == 0
    assert "gives back what it has" in capsys.readouterr().err


async def test_a_worker_that_ends_in_time_is_told_once() -> None:
    agent = await stubborn(ends_at=1)
    await asyncio.wait_for(local_worker.stop(agent, drain_s=600), 20)
    assert agent.returncode == 0


async def test_the_log_of_a_running_worker_stays_short_and_one_old_one_is_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_worker, "LOG_BYTES", 1000)
    monkeypatch.setattr(local_worker, "LOG_LOOK_S", 0.05)
    log, old = home / "agent.log", home / "agent.log.1"
    words = "import sys; print('x' * 1000, flush=True); sys.stdin.readline(); print('and on', flush=True)"
    with log.open("ab") as file:
        agent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", words, stdin=asyncio.subprocess.PIPE, stdout=file
        )
    ending = asyncio.create_task(local_worker.ended(agent, log))
    await asyncio.to_thread(until, old.exists, within_s=20, what="the old log")
    await asyncio.to_thread(until, lambda: log.stat().st_size == 0, within_s=20, what="the new log")
    assert agent.stdin is not None
    agent.stdin.write(b"go on\n")
    agent.stdin.close()
    assert await asyncio.wait_for(ending, 20) == 0
    assert (log.read_text(), old.read_text()) == ("and on\n", "x" * 1000 + "\n")
