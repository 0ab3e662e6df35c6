"""A container engine under a running pool: images come from a registry, engines go and come back."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests import base_image, engines
from tests.pools import Running, environment, pool, rma, runs, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engines import Engine
    from tests.podmans import Podman
    from tests.pools import Pool

#: Whether control groups of version 2 are here; with version 1 nothing can be limited without root.
UNIFIED = Path("/sys/fs/cgroup/cgroup.controllers").exists()
#: Large enough for a pull to be seen on its way.
LAYER_MIB = 96

ENTRY = """
service = "hello"
name = "rma-hello-worker"
image = "{image}"
port = 8000
health_path = "/health"
routes = ["POST /hello"]
tiers = [1, 2, 3]

[needs]
cpu_cores = 0.1
memory = "16MB"

[limits]
memory = "64MB"
pids = 32
tmp = "8MB"
"""


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine-pool")


def catalog(folder: Path, image: str) -> str:
    folder.mkdir()
    (folder / "hello.toml").write_text(ENTRY.format(image=image), encoding="utf-8")
    return str(folder)


def hello(made: Pool) -> dict[str, Any]:
    [worker] = made.workers()
    [status] = worker["containers"] or [{"state": "none", "reason": ""}]
    return {**status, "worker": worker["status"], "worker_reason": worker["status_reason"]}


def wait(made: Pool, right: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        seen = hello(made)
        return seen if right(seen) else None

    found: dict[str, Any] = until(look, within_s=90, what=f"{what}; it is {hello(made)}")
    return found


def test_an_engine_that_goes_and_comes_back_is_said_once_and_serves_again(
    home: Path, tmp_path: Path, own_engine: Engine
) -> None:
    env = {"DOCKER_HOST": own_engine.host, "RMA_CATALOG": catalog(tmp_path / "catalog", base_image.BUSYBOX)}
    with pool(home, "--port", "0", env=env) as made:
        assert hello(made)["state"] == "healthy"
        own_engine.stop()
        down = wait(made, lambda seen: seen["worker"] == "degraded", "the worker says that its engine is gone")
        assert "Docker" in down["worker_reason"]
        assert "start it" in down["worker_reason"]
        own_engine.start()
        wait(made, lambda seen: (seen["worker"], seen["state"]) == ("healthy", "healthy"), "it serves again")
    log = (home / "agent.log").read_text(encoding="utf-8")
    assert len(re.findall(r"docker cannot be used: ", log)) == 1
    assert len(re.findall(r"docker \S+ can be used again", log)) == 1
    assert "Traceback" not in log


def ids(engine: Engine) -> list[str]:
    return engine.docker("ps", "-q", "--no-trunc", "--filter", "label=rma.service=hello").split()


def test_an_agent_that_was_killed_takes_over_the_container_it_had(
    home: Path, tmp_path: Path, own_engine: Engine
) -> None:
    env = {"DOCKER_HOST": own_engine.host, "RMA_CATALOG": catalog(tmp_path / "catalog", base_image.BUSYBOX)}
    with pool(home, "--port", "0", "--no-agent", env=env) as made:
        token = made.json("tokens", "create")["token"]
        own = {**env, "RMA_COORDINATOR_URL": made.url, "RMA_JOIN_TOKEN": token, "RMA_RUNTIMES": "docker"}
        agent = Running(rma("agent"), environment(home / "agent", own))
        until(made.workers, within_s=30, what="the agent registers")
        served = wait(made, lambda seen: seen["state"] == "healthy", "it serves")
        size = int(own_engine.docker("inspect", "--format", "{{.Size}}", base_image.BUSYBOX))
        assert served["image_bytes"] == size > 0
        [before] = ids(own_engine)
        agent.stop(signal.SIGKILL)
        assert ids(own_engine) == [before]
        agent = Running(rma("agent"), environment(home / "agent", own))
        agent.wait_for("rma-hello-worker goes on in docker", within_s=30)
        agent.wait_for("rma-hello-worker is healthy", within_s=30)
        assert ids(own_engine) == [before]
        assert agent.stop(signal.SIGTERM) == 0
        assert ids(own_engine) == []


@pytest.fixture(params=["rootful", "rootless"])
def podman(request: pytest.FixtureRequest) -> Podman:
    """Podman with root, and without, with BUSYBOX in it."""
    found: Podman = request.getfixturevalue(f"{request.param}_podman")
    changes = [f"--change={change}" for change in base_image.CHANGES[base_image.BUSYBOX]]
    found.run("import", *changes, "-", base_image.BUSYBOX, stdin=base_image.busybox_tarball().read_bytes())
    return found


def of_podman(podman: Podman) -> list[str]:
    return podman.run("ps", "-q", "--no-trunc", "--filter", "label=rma.service=hello").split()


def test_podman_serves_with_no_socket_enabled_and_its_service_may_die(
    home: Path, tmp_path: Path, podman: Podman
) -> None:
    env = {**podman.agent_environ, "RMA_CATALOG": catalog(tmp_path / "catalog", base_image.BUSYBOX)}
    # So long that the socket goes to the user's own folder: root's is closed to a Podman without root.
    place = home / ("h" * 80)
    with pool(place, "--port", "0", "--runtime", "podman", env=env) as made:
        seen = hello(made)
        assert (seen["state"], seen["runtime"], seen["isolated"]) == ("healthy", "podman", True)
        [before] = of_podman(podman)
        worker = made.get(f"/api/admin/workers/{made.workers()[0]['worker_id']}")
        [runtime] = [found for found in worker["runtimes"] if found["name"] == "podman"]
        assert bool(runtime["cannot_limit"]) == bool(podman.user and not UNIFIED)
        service = until(lambda: child_of(made), within_s=60, what="its service")
        os.kill(service, signal.SIGKILL)
        until(lambda: child_of(made, but=service), within_s=60, what="a new service is started")
        wait(made, lambda seen: (seen["worker"], seen["state"]) == ("healthy", "healthy"), "it serves on")
        assert of_podman(podman) == [before]
    assert of_podman(podman) == []
    assert "Traceback" not in (place / "agent.log").read_text(encoding="utf-8")


def child_of(made: Pool, *, but: int = 0) -> int:
    """Return the service that the pool's agent started; 0 when there is none."""
    below = psutil.Process(made.up.process.pid).children(recursive=True)
    found = [p.pid for p in below if "system service" in engines.command_line(p.pid) and p.pid != but]
    return found[0] if found else 0


def test_an_agent_that_was_killed_leaves_no_service_and_takes_over_its_podman_container(
    home: Path, tmp_path: Path, podman: Podman
) -> None:
    env = {**podman.agent_environ, "RMA_CATALOG": catalog(tmp_path / "catalog", base_image.BUSYBOX)}
    with pool(home, "--port", "0", "--no-agent", env=env) as made:
        token = made.json("tokens", "create")["token"]
        own = {**env, "RMA_COORDINATOR_URL": made.url, "RMA_JOIN_TOKEN": token, "RMA_RUNTIMES": "podman"}
        settings = environment(home / ("h" * 80), own)
        agent = Running(rma("agent"), settings)
        until(made.workers, within_s=30, what="the agent registers")
        wait(made, lambda seen: seen["state"] == "healthy", "it serves")
        [before] = of_podman(podman)
        service = [p for p in psutil.Process(agent.process.pid).children() if "podman" in engines.command_line(p.pid)]
        assert service
        agent.stop(signal.SIGKILL)
        until(lambda: not any(map(runs, service)), within_s=60, what="the service ends with its agent")
        assert of_podman(podman) == [before]
        agent = Running(rma("agent"), settings)
        agent.wait_for("rma-hello-worker goes on in podman", within_s=60)
        agent.wait_for("rma-hello-worker is healthy", within_s=60)
        assert of_podman(podman) == [before]
        assert agent.stop(signal.SIGTERM) == 0
        assert of_podman(podman) == []


def push(engine: Engine, registry: str) -> str:
    """Put an image with a large layer into the registry, and take it off the engine."""
    name = f"{registry}/rma-test/hello:1"
    build = f"FROM {base_image.BUSYBOX}\nUSER 0\nRUN dd if=/dev/urandom of=/www/large bs=1048576 count={LAYER_MIB}\n"
    build = build.replace("RUN dd", "RUN /bin/busybox dd")
    subprocess.run(
        ["docker", "--host", engine.host, "build", "-q", "-t", name, "-"], input=build.encode(), check=True, timeout=300
    )
    engine.docker("push", name)
    engine.docker("rmi", name)
    return name


def test_an_image_comes_from_a_registry_with_progress(
    home: Path, tmp_path: Path, own_engine: Engine, registry: str
) -> None:
    image = push(own_engine, registry)
    env = {"DOCKER_HOST": own_engine.host, "RMA_CATALOG": catalog(tmp_path / "catalog", image)}
    with pool(home, "--port", "0", "--runtime", "docker", env=env) as made:
        assert hello(made)["state"] == "healthy"
        shares = [int(share) for share in re.findall(r"hello: pulling (\d+)%", made.up.text)]
        assert shares
        assert shares == sorted(shares)


def test_an_image_that_nobody_has_is_a_reason_and_no_process_takes_its_place(
    home: Path, tmp_path: Path, own_engine: Engine, registry: str
) -> None:
    env = {"DOCKER_HOST": own_engine.host, "RMA_CATALOG": catalog(tmp_path / "catalog", f"{registry}/no/body:1")}
    with pool(home, "--port", "0", "--runtime", "docker", env=env) as made:
        status = hello(made)
        assert (status["state"], status["runtime"]) == ("failed", "")
        assert f"{registry}/no/body" in status["reason"]
        assert "hello is not ready yet" in made.up.text
        asked = made.ask("infer", "hello", "a text", check=False)
        assert asked.returncode == 75
        assert "hello cannot be served now: failed:" in asked.stderr
