"""The engine, the registry and the images that other tests stand on do what those tests take for granted."""

from __future__ import annotations

import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from tests import engines, needs

#: How every service is started; the image must be able to live with it.
LOCKED_DOWN = (
    *("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--pids-limit=64", "--memory=64m"),
    *("--cpus=0.5", "--tmpfs=/tmp:size=8m", "--user=65534:65534"),
)


def docker(host: str, *arguments: str) -> str:
    return engines.call("docker", *(["--host", host] if host else []), *arguments).strip()


def started(host: str, image: str) -> tuple[str, str]:
    """A locked-down container of ``image``, and the address of its port on loopback."""
    container = docker(host, "run", "--detach", *LOCKED_DOWN, "--publish=127.0.0.1::8000", image)
    return container, docker(host, "port", container, "8000/tcp")


def body_of(address: str, limit_s: float = 10) -> bytes:
    """What ``/health`` says, as soon as it says something."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            with urllib.request.urlopen(f"http://{address}/health", timeout=limit_s) as answer:
                body: bytes = answer.read()
                return body
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_a_locked_down_container_answers_on_loopback(docker_engine: str, busybox_image: str) -> None:
    container, address = started(docker_engine, busybox_image)
    try:
        assert body_of(address) == b"ok\n"
        with pytest.raises(engines.EngineProblem, match="Read-only file system"):
            docker(docker_engine, "exec", container, "touch", "/www/more")
    finally:
        docker(docker_engine, "rm", "--force", container)


def test_an_image_is_pushed_to_the_registry_and_pulled_from_it(
    docker_engine: str, busybox_image: str, registry: str
) -> None:
    name = f"{registry}/rma-test/pushed:1"
    docker(docker_engine, "tag", busybox_image, name)
    docker(docker_engine, "push", name)
    docker(docker_engine, "rmi", name)
    assert "Downloaded newer image" in docker(docker_engine, "pull", name)
    docker(docker_engine, "rmi", name)


def test_a_stopped_engine_comes_back_with_its_images_and_stopped_containers(own_engine: engines.Engine) -> None:
    container, address = started(own_engine.host, "rma-test/busybox")
    assert body_of(address) == b"ok\n"
    own_engine.stop()
    assert not engines.answers(own_engine.host)
    own_engine.start()
    assert own_engine.docker("inspect", "--format", "{{.State.Running}}", container).strip() == "false"
    own_engine.docker("start", container)
    assert body_of(docker(own_engine.host, "port", container, "8000/tcp")) == b"ok\n"


def test_a_killed_engine_starts_again(own_engine: engines.Engine) -> None:
    container, _ = started(own_engine.host, "rma-test/busybox")
    own_engine.kill()
    assert not engines.answers(own_engine.host)
    own_engine.start()
    assert container[:12] in own_engine.docker("ps", "--all", "--quiet")


def test_a_closed_engine_leaves_nothing_behind(own_engine: engines.Engine) -> None:
    started(own_engine.host, "rma-test/busybox")
    bridge, folder = own_engine.control_group, own_engine.folder
    own_engine.kill()
    own_engine.close()
    assert not folder.exists()
    assert bridge not in subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert not any(str(folder) in engines.command_line(pid) for pid in engines.process_ids())
    assert str(folder) not in engines.MOUNTS.read_text()
    assert not [*engines.CONTROL_GROUPS.glob(f"*/{bridge}"), *engines.CONTROL_GROUPS.glob(bridge)]


def test_up_twice_is_the_same_engine_and_down_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    needs.need("own-engine")
    folder = Path(tempfile.mkdtemp(prefix="rma-"))
    try:
        engines.up(folder)
        first = capsys.readouterr().out
        engines.up(folder)
        assert capsys.readouterr().out == first
    finally:
        engines.down(folder)
    assert not folder.exists()


def test_what_is_required_and_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(needs.CHECKS, "podman", lambda: "it is not there")
    monkeypatch.setattr(needs, "_found", {})
    monkeypatch.setenv("RMA_REQUIRE", "docker")
    with pytest.raises(pytest.skip.Exception, match="podman: it is not there"):
        needs.need("podman")
    monkeypatch.setenv("RMA_REQUIRE", "docker, podman")
    with pytest.raises(pytest.fail.Exception, match="it is not there"):
        needs.need("podman")
    monkeypatch.setenv("RMA_REQUIRE", "dokcer")
    with pytest.raises(pytest.fail.Exception, match="unknown"):
        needs.need("podman")


def test_what_was_not_run_is_summed_up_from_the_reports_of_all_processes() -> None:
    class Terminal:
        stats: ClassVar = {
            "skipped": [
                SimpleNamespace(longrepr=("x.py", 1, "Skipped: podman: it is not there")),
                SimpleNamespace(longrepr=("y.py", 2, "Skipped: podman: it is not there")),
                SimpleNamespace(longrepr=("z.py", 3, "Skipped: for another reason")),
            ]
        }
        said: ClassVar[list[str]] = []
        section = said.append
        line = said.append

    needs.summary(Terminal())  # type: ignore[arg-type] # of a terminal only these are used
    assert Terminal.said == [
        "not run on this machine",
        "podman: 2 not run: it is not there",
        "RMA_REQUIRE=podman makes these fail instead",
    ]
