"""A second machine joins over TLS with the pinned certificate, serves, and cannot be reached from the pool's side."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.needs import need
from tests.netns import machine
from tests.pools import NO_ENGINE, Running, environment, left_over, pool, rma, until
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.netns import Machine
    from tests.pools import Pool

SOURCES = str(Path(__file__).resolve().parents[1] / "containers")


@pytest.fixture
def second() -> Iterator[Machine]:
    with machine(1) as made:
        yield made


def join_words(made: Pool) -> list[str]:
    return made.up.wait_for(r"(?m)^ +rma (join https://\S+ rmaj_\S+)$")[1].split()


def test_a_second_machine_joins_over_tls_serves_and_leaves(
    tmp_path_factory: pytest.TempPathFactory, second: Machine
) -> None:
    need("pypi")
    home, other = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    lan = ("--lan", "--lan-host", second.host, "--lan-port", str(free_port()))
    with pool(home, "--port", "0", *lan, env=NO_ENGINE) as made:
        # No package index can be reached from there: the second machine has installed the service before.
        # The first one's service still writes its cached modules there.
        cached = shutil.ignore_patterns("__pycache__")
        shutil.copytree(home / "agent" / "services", other / "rma" / "services", symlinks=True, ignore=cached)
        env = environment(other / "rma", {**NO_ENGINE, "RMA_SERVICE_SOURCES": SOURCES})
        command = second.command(*rma(*join_words(made), "--yes", "--runtime", "process"))
        joined = Running(command, env)
        try:
            joined.wait_for(r"This machine is (worker-\w+)")
            name = joined.wait_for(r"This machine is (worker-\w+)")[1]
            until(lambda: serving(made, name), within_s=90, what=f"{name} serves notes\n{joined.text}")
            check_that_it_serves(made, name)
            check_that_it_cannot_be_reached(second)
        finally:
            code = joined.stop(signal.SIGTERM)
        assert code == 0, joined.text
        gone = next(w for w in made.workers() if w["worker_id"] == name)
        assert (gone["status"], gone["status_reason"]) == ("offline", "it left by itself")
    assert left_over(other) == []


def serving(made: Pool, name: str) -> bool:
    worker = next((w for w in made.workers() if w["worker_id"] == name), None)
    return worker is not None and any(c["state"] == "healthy" for c in worker["containers"])


def check_that_it_serves(made: Pool, name: str) -> None:
    first = next(w["worker_id"] for w in made.workers() if w["worker_id"] != name)
    made.call("POST", f"/api/admin/workers/{first}/disable")
    assert "read elsewhere" in made.ask("infer", "notes", "A text that is to be read elsewhere.").stdout
    assert made.json("tasks")["tasks"][0]["attempts"][-1]["worker_id"] == name
    made.call("POST", f"/api/admin/workers/{first}/enable")


def check_that_it_cannot_be_reached(second: Machine) -> None:
    """Something listens there on every address, and still nobody gets in."""
    script = "import socket; s = socket.create_server(('0.0.0.0', 4711)); print('up', flush=True); s.accept()"
    listener = subprocess.Popen(second.command(sys.executable, "-c", script), stdout=subprocess.PIPE, text=True)
    try:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "up\n"
        with pytest.raises(OSError, match="timed out"):
            socket.create_connection((second.address, 4711), timeout=1.5).close()
    finally:
        listener.kill()
        listener.wait(10)
        if listener.stdout is not None:
            listener.stdout.close()


def test_another_certificate_than_the_pinned_one_gets_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    home, other = tmp_path_factory.mktemp("pool"), tmp_path_factory.mktemp("victim")
    lan = ("--lan", "--lan-host", "127.0.0.1", "--lan-port", str(free_port()))
    with pool(home, "--port", "0", "--no-agent", *lan, env=NO_ENGINE) as made:
        join, url, token = join_words(made)
        forged = re.sub(r"\.(.)", lambda found: "." + ("A" if found[1] != "A" else "B"), token)
        done = subprocess.run(
            rma(join, url, forged, "--yes"),
            env=environment(other / "rma"),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 7
    assert "is not the one that the join token names; nothing was sent" in done.stderr
    assert not (other / "rma").exists()


def test_whoever_does_not_agree_leaves_nothing_behind(tmp_path_factory: pytest.TempPathFactory) -> None:
    home, other = tmp_path_factory.mktemp("pool"), tmp_path_factory.mktemp("no")
    with pool(home, "--port", "0", "--no-agent", env=NO_ENGINE) as made:
        token = made.json("tokens", "create")["token"]
        env = environment(other / "rma", NO_ENGINE)
        refused = subprocess.run(
            rma("join", made.url, token),
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert refused.returncode == 2
        assert "--yes agrees" in refused.stderr
        assert not (other / "rma").exists()
        assert made.workers() == []
        assert answer_no(rma("join", made.url, token), env) == 1
        assert not (other / "rma").exists()
        assert made.workers() == []
        assert made.json("tokens")["tokens"][-1]["uses_left"] == 1


def test_a_program_can_enrol_a_machine_and_take_it_out_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    home, other = tmp_path_factory.mktemp("pool"), tmp_path_factory.mktemp("machine")
    with pool(home, "--port", "0", "--no-agent", env=NO_ENGINE) as made:
        token = made.json("tokens", "create")["token"]
        env = environment(other / "rma", NO_ENGINE)

        def told(*arguments: str) -> tuple[int, dict[str, Any]]:
            done = subprocess.run(
                rma(*arguments, "--json"), env=env, capture_output=True, text=True, timeout=60, check=False
            )
            return done.returncode, json.loads(done.stdout)

        code, joined = told("join", made.url, token, "--yes", "--enrol-only", "--runtime", "process")
        [worker] = made.workers()
        assert (code, joined["worker_id"], joined["coordinator"]) == (0, worker["worker_id"], made.url)
        assert joined["tier"] == worker["tier"]
        assert told("leave", "--yes") == (0, {"worker_id": joined["worker_id"], "coordinator": made.url})
        code, refused = told("join", made.url, token, "--yes")
        assert (code, refused["error"]["code"]) == (5, "forbidden")


def answer_no(command: list[str], env: dict[str, str]) -> int:
    """Run a command on a terminal of its own and answer its question with no."""
    import os
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(command, env=env, stdin=follower, stdout=follower, stderr=follower, close_fds=True)
    os.close(follower)
    said = bytearray()

    def read() -> None:
        try:
            while data := os.read(leader, 4096):
                said.extend(data)
        except OSError:
            return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    until(lambda: b"Do you agree" in said, within_s=40, what="the question")
    os.write(leader, b"n\n")
    code = process.wait(30)
    reader.join(5)
    os.close(leader)
    return code
