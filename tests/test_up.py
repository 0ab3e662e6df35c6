"""`rma up` as its user sees it: real processes, a real request, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

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
    with pool(home, "--port", "0", env=NO_ENGINE) as made:
        assert made.key == key
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
