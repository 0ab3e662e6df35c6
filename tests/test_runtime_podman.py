"""The Podman runtime on a real Podman, with root and without, and the broken ones that owners have."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docker.errors
import msgspec
import pytest
import requests

import rma_runtime_podman
from rma_core import (
    ContainerAccess,
    ImageMissing,
    ImagePullFailed,
    NotSupported,
    OutOfSpace,
    PortTaken,
    PullProgress,
    RuntimeAbsent,
    RuntimeFailure,
    StartFailed,
)
from rma_core.container_engine import Action, child, connection, container_name, explain, labels
from rma_core.container_engine.containers import owned, program, without_program
from rma_core.container_engine.sayings import unless_absent
from rma_core.testing import RuntimeCase, adoption_contract, isolation_contract, runtime_contract
from rma_core.testing.runtimes import a_fork_bomb_stays_inside as fork_bomb
from rma_core.testing.runtimes import answers, becomes, inside, its_limits_are_the_specs, of_worker, started
from rma_runtime_podman import PODMAN, PodmanRuntime, completed
from rma_runtime_podman import container as made_with
from tests import engines
from tests.engine_service import (
    MIB,
    PROGRAM,
    SERVICE,
    SHELL,
    SPEC,
    Valve,
    break_off_a_copy,
    by_name,
    contract_of,
    doing,
    from_registry,
    how_it_fails,
    image_tar,
    no_thread_left,
    shell,
)
from tests.fixtures import podman_of_our_own
from tests.needs import need

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from rma_core.testing.runtimes import Check
    from tests.podmans import Podman

#: Whether control groups of version 2 are here; with version 1 nothing can be limited without root.
UNIFIED = Path("/sys/fs/cgroup/cgroup.controllers").exists()
LIMITS = (its_limits_are_the_specs, fork_bomb)


def make_image(podman: Podman, name: str, *changes: str, files: dict[str, bytes] | None = None) -> str:
    """Make an image; returns its local id."""
    content = image_tar({"service": PROGRAM, "www/cgi-bin/sh": SHELL, "www/index.html": b"ok\n", **(files or {})})
    options = [f"--change={change}" for change in ('CMD ["/service"]', *changes)]
    return podman.run("import", "--quiet", *options, "-", name, stdin=content).strip()


def runtime_of(podman: Podman, **more: str) -> PodmanRuntime:
    return PodmanRuntime({"home": str(podman.home)}, environ={**podman.agent_environ, **more})


@pytest.fixture(params=["rootful", "rootless"])
def podman(request: pytest.FixtureRequest) -> Podman:
    """Podman with root, and without, with SERVICE in it."""
    found: Podman = request.getfixturevalue(f"{request.param}_podman")
    if SERVICE not in found.run("images", "--format={{.Repository}}:{{.Tag}}"):
        make_image(found, SERVICE)
    return found


@pytest.fixture
async def runtime(podman: Podman) -> AsyncIterator[PodmanRuntime]:
    made = runtime_of(podman)
    yield made
    await made.aclose()


def case_of(runtime: PodmanRuntime, podman: Podman, registry: str) -> RuntimeCase:
    limited = not podman.user or UNIFIED
    return RuntimeCase(
        runtime=runtime,
        healthy=SPEC,
        exits=doing("exits"),
        stubborn=doing("stubborn"),
        hungry=doing("hungry") if limited else None,
        no_image=msgspec.structs.replace(SPEC, image=f"{registry}/rma-test/nobody-has-this"),
        absent=PodmanRuntime({"host": "unix:///nonexistent/podman.sock"}),
        again=lambda: runtime_of(podman),
        shell=shell,
    )


@pytest.mark.parametrize("check", [*runtime_contract, *adoption_contract, *isolation_contract], ids=by_name)
async def test_podman_keeps_the_contract(check: Check, runtime: PodmanRuntime, podman: Podman, registry: str) -> None:
    if podman.user and not UNIFIED and check in LIMITS:
        assert set((await runtime.probe()).cannot_limit) == {"memory", "swap", "cpu", "pids"}
        return
    await check(case_of(runtime, podman, registry))


@pytest.mark.parametrize("kept", [0, 1, 2])
async def test_half_a_copy_passes_for_none_wherever_its_removal_ends(
    runtime: PodmanRuntime, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await break_off_a_copy(runtime, kept, monkeypatch)


async def test_what_can_be_limited_is_told(runtime: PodmanRuntime, podman: Podman) -> None:
    health = await runtime.probe()
    if podman.user and not UNIFIED:
        assert health.cannot_limit == ("memory", "swap", "cpu", "pids")
        assert "cgroup v2" in health.reason
        assert "security:rootless" in health.features
    else:
        assert {"limit:memory", "limit:cpu", "limit:pids", "security:seccomp"} <= set(health.features)


async def test_no_proxy_of_the_owner_gets_into_the_environment(podman: Podman) -> None:
    secret = secrets.token_hex(8)
    runtime = runtime_of(podman, http_proxy=f"http://me:{secret}@127.0.0.1:1", HTTPS_PROXY=f"http://{secret}")
    case = contract_of(runtime, SPEC)
    async with started(case, of_worker(SPEC)) as handle:
        said = await inside(case, handle, "env")
    await runtime.aclose()
    assert "HOME=/tmp" in said
    assert secret not in said


@pytest.mark.parametrize(("named", "runs_as"), [("root", "65532:65532"), ("app", "65532:65532"), ("1001:0", "1001:0")])
async def test_nothing_runs_as_root_whatever_the_image_says(
    runtime: PodmanRuntime, podman: Podman, named: str, runs_as: str
) -> None:
    image = f"rma-test/user-{named.replace(':', '-')}:latest"
    make_image(podman, image, f"USER {named}")
    case = contract_of(runtime, msgspec.structs.replace(SPEC, image=image))
    async with started(case, of_worker(case.healthy)) as handle:
        assert await inside(case, handle, "echo $(id -u):$(id -g)") == runs_as


async def test_an_image_that_poses_as_systemd_gets_nothing_for_it(runtime: PodmanRuntime, podman: Podman) -> None:
    image = "rma-test/systemd:latest"
    make_image(podman, image, 'CMD ["/sbin/init"]', files={"sbin/init": PROGRAM})
    case = contract_of(runtime, msgspec.structs.replace(SPEC, image=image))
    async with started(case, of_worker(case.healthy)) as handle:
        mounts = [line.split() for line in (await inside(case, handle, "cat /proc/mounts")).splitlines()]
    assert [words for words in mounts if words[2].startswith("cgroup") and "rw" in words[3].split(",")] == []


async def test_what_an_image_declares_as_a_volume_is_memory_of_limited_size(
    runtime: PodmanRuntime, podman: Podman
) -> None:
    image = "rma-test/volumes:latest"
    make_image(podman, image, "VOLUME /data", "VOLUME /tmp")
    case = contract_of(runtime, msgspec.structs.replace(SPEC, image=image))
    async with started(case, of_worker(case.healthy)) as handle:
        mounts = {line.split()[1]: line for line in (await inside(case, handle, "cat /proc/mounts")).splitlines()}
        assert mounts["/data"].startswith("tmpfs")
        assert "noexec" in mounts["/data"]
        assert f"size={8 * 1024}k" in mounts["/data"]
        assert await inside(case, handle, "echo kept > /data/file && cat /data/file") == "kept"
    assert podman.run("volume", "ls", "--quiet") == ""


async def test_one_that_runs_out_of_memory_says_its_limit(rootful_podman: Podman) -> None:
    make_image(rootful_podman, SERVICE)
    runtime = runtime_of(rootful_podman)
    case = contract_of(runtime, SPEC)
    async with started(case, of_worker(doing("hungry"))) as handle:
        ended = await becomes(runtime, handle, "exited")
    await runtime.aclose()
    assert "out of memory (limit 64 MiB)" in ended.reason


async def test_an_image_without_its_program_is_said_to_be_one(runtime: PodmanRuntime, podman: Podman) -> None:
    image = "rma-test/empty:latest"
    make_image(podman, image, 'CMD ["/nothing/here"]')
    said = await how_it_fails(runtime, msgspec.structs.replace(SPEC, image=image))
    assert "No such file or directory" in said or "not in it" in said


async def test_a_missing_program_is_found_out_where_the_engine_has_lost_its_own_words(
    runtime: PodmanRuntime, podman: Podman
) -> None:
    for command, reason in (("/nothing/here", "the image's own program is not in it: /nothing/here"), ("/service", "")):
        made = podman.run("create", SERVICE, command).strip()
        try:

            def look(engine: connection.Engine, made: str = made) -> list[str]:
                found = engine.api.inspect_container(made)
                return [without_program(engine, {**found, "State": {"ExitCode": code}}) for code in (0, 1)]

            assert await runtime._run(look, "ask") == ["", reason]
        finally:
            podman.run("rm", made)


def test_the_program_is_looked_for_behind_the_engines_init() -> None:
    assert program({"Path": "/run/podman-init", "Args": ["--", "/service", "-x"]}) == "/service"
    assert program({"Path": "/service", "Args": ["--", "/other"]}) == "/service"
    assert program({"Path": "/sbin/my-init", "Args": []}) == "/sbin/my-init"


class BrokenImages:
    """An engine that has containers, and can say little of their images."""

    def __init__(self, **images: dict[str, Any] | Exception) -> None:
        self.images, self.asked = images, list[str]()

    def containers(self, **_: object) -> list[dict[str, Any]]:
        both = [*self.images, *self.images]
        return [{"Id": f"c{n}", "ImageID": image, "Created": n, "Labels": {}} for n, image in enumerate(both)]

    def inspect_image(self, image: str) -> dict[str, Any]:
        self.asked.append(image)
        if isinstance(found := self.images[image], Exception):
            raise found
        return found


def test_containers_are_taken_over_whatever_can_be_said_of_their_images_which_are_asked_for_once() -> None:
    api = BrokenImages(
        whole={"Size": 700},
        silent={},
        odd={"Size": -1},
        gone=docker.errors.NotFound("no such image"),
        broken=docker.errors.APIError("a layer is missing"),
    )
    engine = connection.Engine(api, api, {}, "", connection.Address(""))  # type: ignore[arg-type]
    found = owned(PODMAN, engine, "worker-00000000")
    sizes = {"whole": 700, "silent": 0, "odd": 0, "gone": 0, "broken": 0}
    assert [(one.image_id, one.image_bytes) for one in found] == [*sizes.items(), *sizes.items()]
    assert sorted(api.asked) == sorted(sizes)


async def test_a_name_held_by_a_stranger_is_no_ones_to_take(runtime: PodmanRuntime, podman: Podman) -> None:
    spec = of_worker(SPEC)
    name = container_name(spec)
    held = podman.run("create", "--name", name, SERVICE).strip()
    try:
        with pytest.raises(StartFailed, match=f"{name} is taken by .* not this worker's .{held[:12]}"):
            await runtime.start(spec)
        assert podman.run("inspect", "--format", "{{.State.Status}}", held).strip() == "created"
    finally:
        podman.run("rm", held)


async def test_a_leftover_that_was_never_started_is_listed_and_gives_way(
    runtime: PodmanRuntime, podman: Podman
) -> None:
    spec = of_worker(SPEC)
    options = [f"--label={key}={value}" for key, value in labels(spec).items()]
    podman.run("create", "--name", container_name(spec), *options, SERVICE)
    [leftover] = await runtime.list_owned(spec.worker_id)
    assert (await runtime.inspect(leftover)).reason == "it was made, but never started"
    handle = await runtime.start(spec)
    try:
        assert await runtime.list_owned(spec.worker_id) == [handle]
    finally:
        await runtime.stop(handle)


async def test_giving_up_a_start_leaves_nothing(runtime: PodmanRuntime) -> None:
    spec = of_worker(SPEC)
    assert await runtime.has_image(spec)
    starting = asyncio.create_task(runtime.start(spec))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await no_thread_left()
    assert await runtime.list_owned(spec.worker_id) == []


# GPUs


@pytest.fixture
def made_up_gpu() -> Iterator[str]:
    """A GPU that CDI knows and nobody has; its name."""
    need("podman")
    vendor = f"rma-{secrets.token_hex(4)}.example"
    device = {"name": "0", "containerEdits": {"env": ["RMA_GPU=here"], "deviceNodes": [{"path": "/dev/null"}]}}
    file = Path("/var/run/cdi") / f"{vendor}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"cdiVersion": "0.5.0", "kind": f"{vendor}/gpu", "devices": [device]}))
    yield f"{vendor}/gpu=0"
    file.unlink()
    with contextlib.suppress(OSError):
        file.parent.rmdir()


async def test_a_gpu_comes_by_its_cdi_name(rootful_podman: Podman, made_up_gpu: str) -> None:
    make_image(rootful_podman, SERVICE)
    runtime = runtime_of(rootful_podman)
    case = contract_of(runtime, msgspec.structs.replace(SPEC, access=ContainerAccess(cdi=(made_up_gpu,))))
    async with started(case, of_worker(case.healthy)) as handle:
        assert "RMA_GPU=here" in await inside(case, handle, "env")
        assert "gpu:cdi" in (await runtime.probe()).features
    await runtime.aclose()


async def test_a_gpu_that_podman_cannot_give_is_not_supported(runtime: PodmanRuntime, made_up_gpu: str) -> None:
    spec = of_worker(msgspec.structs.replace(SPEC, access=ContainerAccess(cdi=(f"{made_up_gpu}1",))))
    with pytest.raises(NotSupported, match="Podman could not give"):
        await runtime.start(spec)
    assert await runtime.list_owned(spec.worker_id) == []


def test_an_image_that_preloads_a_library_gets_no_gpu_and_none_comes_without_cdi() -> None:
    spec = msgspec.structs.replace(SPEC, access=ContainerAccess(cdi=("nvidia.com/gpu=0",)))
    image = {"Id": "sha256:0", "Config": {"Env": ["LD_PRELOAD=/evil.so"]}}
    with pytest.raises(NotSupported, match="LD_PRELOAD"):
        made_with(spec, image, {"CDISpecDirs": ["/etc/cdi"]})
    with pytest.raises(NotSupported, match="nvidia-ctk cdi generate"):
        made_with(spec, {"Id": "sha256:0"}, {})
    assert made_with(spec, {"Id": "0"}, {"CDISpecDirs": ["/etc/cdi"]})["devices"] == [{"path": "nvidia.com/gpu=0"}]


# The service that the agent starts


def service(runtime: PodmanRuntime) -> int:
    pid = runtime._child.pid
    assert pid is not None
    return pid


def ended(runtime: PodmanRuntime) -> bool:
    return runtime._child.pid is None


async def test_the_socket_is_this_users_alone_and_goes_with_the_runtime(rootful_podman: Podman) -> None:
    runtime = runtime_of(rootful_podman)
    assert (await runtime.probe()).state == "healthy"
    [place] = [p for p in (rootful_podman.home / "podman").iterdir() if p.name.startswith(f"{os.getpid()}-")]
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE((place / child.SOCKET).stat().st_mode) == 0o600
    pid = service(runtime)
    await runtime.aclose()
    assert not place.exists()
    assert not engines.command_line(pid)


async def test_a_home_too_long_for_a_socket_is_no_trouble(rootful_podman: Podman, tmp_path: Path) -> None:
    runtime = PodmanRuntime({"home": str(tmp_path / ("x" * 100))}, environ=rootful_podman.agent_environ)
    assert (await runtime.probe()).state == "healthy"
    await runtime.aclose()


async def test_a_service_killed_comes_back_at_once_and_its_containers_went_on(
    runtime: PodmanRuntime, podman: Podman
) -> None:
    handle = await runtime.start(of_worker(SPEC))
    try:
        endpoint = await runtime.endpoint(handle)
        before = service(runtime)
        os.kill(before, signal.SIGKILL)
        await asyncio.to_thread(engines.wait_for, functools.partial(ended, runtime), 10)
        await answers(endpoint)
        assert (await runtime.inspect(handle)).state == "running"
        assert service(runtime) != before
        assert await runtime.endpoint(handle) == endpoint
    finally:
        await runtime.stop(handle)


async def test_a_service_that_ends_again_and_again_is_started_less_and_less_often(rootful_podman: Podman) -> None:
    runtime = runtime_of(rootful_podman)
    assert (await runtime.probe()).state == "healthy"
    for _ in range(2):
        pid = service(runtime)
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(engines.wait_for, functools.partial(ended, runtime), 10)
        health = await runtime.probe()
    assert health.state == "unhealthy"
    assert "Podman's service ended" in health.reason
    assert "started again in" in health.reason
    assert await healthy_again(runtime)
    await runtime.aclose()


async def healthy_again(runtime: PodmanRuntime) -> bool:
    for _ in range(300):
        if (await runtime.probe()).state == "healthy":
            return True
        await asyncio.sleep(0.1)
    return False


async def test_a_service_that_freezes_is_unhealthy_and_recovers(
    rootful_podman: Podman, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = runtime_of(rootful_podman)
    assert (await runtime.probe()).state == "healthy"
    os.kill(service(runtime), signal.SIGSTOP)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(connection, "CONNECT_S", 1)
            health = await runtime.probe()
    finally:
        os.kill(service(runtime), signal.SIGCONT)
    assert health.state == "unhealthy"
    assert "does not answer" in health.reason
    assert (await runtime.probe()).state == "healthy"
    await runtime.aclose()


AGENT = """
import asyncio, sys
from rma_runtime_podman import PodmanRuntime
async def main():
    runtime = PodmanRuntime({"home": sys.argv[1]})
    health = await runtime.probe()
    print(health.state, runtime._child.pid, health.reason, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


async def test_an_agent_killed_leaves_no_service_and_the_next_one_sweeps(podman: Podman) -> None:
    path = os.pathsep.join([str(Path(rma_runtime_podman.__file__).parent), str(Path(__file__).parent.parent)])
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AGENT, str(podman.home), stdout=asyncio.subprocess.PIPE,
        env={**podman.agent_environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert agent.stdout is not None
    async with asyncio.timeout(60):
        state, pid, *reason = (await agent.stdout.readline()).decode().split()
    assert state == "healthy", reason
    left = [p for p in (podman.home / "podman").iterdir() if p.name.startswith(f"{agent.pid}-")]
    assert left
    assert engines.command_line(int(pid))
    agent.kill()
    await agent.wait()
    addressed = str(left[0])
    assert await asyncio.to_thread(engines.wait_for, lambda: not engines.processes_of(Path(addressed)), 10)
    runtime = runtime_of(podman)
    assert (await runtime.probe()).state == "healthy"
    await runtime.aclose()
    assert not left[0].exists()


@pytest.mark.parametrize("rootless", [False, True], ids=["rootful", "rootless"])
def test_a_podman_of_our_own_leaves_nothing(rootless: bool) -> None:
    need("podman-rootless" if rootless else "podman")
    with podman_of_our_own(rootless=rootless) as podman:
        make_image(podman, SERVICE)
        limits = ("--ulimit=nofile=1024:1024", f"--ulimit=nproc={rma_runtime_podman.most_processes()}")
        podman.run("run", "--detach", *limits, "--publish=127.0.0.1::8000", SERVICE)
        number = "" if rootless else (podman.folder / "number").read_text()
    assert not podman.folder.exists()
    assert engines.processes_of(podman.folder) == []
    assert str(podman.folder) not in engines.MOUNTS.read_text()
    assert not rootless or podman.user not in Path("/etc/passwd").read_text() + Path("/etc/subuid").read_text()
    assert rootless or not re.search(rf"rmapod(lock)?{number}\b", engines.call("ip", "link"))


# Podmans that cannot be used


@contextlib.contextmanager
def pretending(info: dict[str, Any] | None, *, complaint: str = "", code: int = 0) -> Iterator[str]:
    """A podman program that says this of itself; gives its folder, for PATH."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "info.json"
        said.write_text(json.dumps(info))
        program = Path(folder) / "podman"
        program.write_text(f"#!/bin/sh\ncat {said}\ncat >&2 <<'END'\n{complaint}\nEND\nexit {code}\n")
        program.chmod(0o755)
        yield folder


async def said_by(folder: str) -> str:
    runtime = PodmanRuntime({}, environ={"PATH": f"{folder}:/usr/bin:/bin"})
    health = await runtime.probe()
    await runtime.aclose()
    assert health.state == "unhealthy"
    return health.reason


async def test_a_machine_without_podman_is_undetected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rma_runtime_podman, "DAEMONS", ())
    runtime = PodmanRuntime({}, environ={"PATH": str(tmp_path)})
    for _ in range(3):
        health = await runtime.probe()
        assert (health.state, health.reason) == ("undetected", "Podman is not installed: no podman program")
    await runtime.aclose()


async def test_an_old_podman_is_said_to_be_too_old() -> None:
    with pretending({"host": {}, "version": {"Version": "3.4.4"}}) as folder:
        assert "Podman 3.4.4 is too old: version 4.0 or newer is needed" in await said_by(folder)


async def test_crun_alone_on_control_groups_of_version_1_tells_to_install_runc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rma_runtime_podman, "UNIFIED", tmp_path / "not-here")
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == "runc" else which(name, path=path))
    with pretending({"host": {"ociRuntime": {"name": "crun"}}, "version": {"Version": "4.3.1"}}) as folder:
        assert "install runc" in await said_by(folder)


@pytest.mark.parametrize(
    ("complaint", "advice"),
    [
        ("Error: database static dir /a does not match our static dir /b: mismatch", "podman system reset"),
        ("Error: mkdir /home/me/.local/share/containers: no space left on device", "podman system prune"),
        ("cannot find newuidmap: exec: newuidmap: executable file not found in $PATH", "--add-subuids"),
        ("", "it says nothing"),
    ],
)  # fmt: skip
async def test_what_podman_says_of_itself_when_it_cannot_start_is_told_with_what_to_do(
    complaint: str, advice: str
) -> None:
    with pretending(None, complaint=complaint, code=125) as folder:
        reason = await said_by(folder)
    assert "Podman does not work for this user" in reason
    assert advice in reason


def take_ids_away(user: str) -> None:
    for option, file in (("--del-subuids", "/etc/subuid"), ("--del-subgids", "/etc/subgid")):
        [(first, count)] = re.findall(rf"(?m)^{user}:(\d+):(\d+)$", Path(file).read_text())
        engines.call("usermod", f"{option}={first}-{int(first) + int(count) - 1}", user)


async def test_a_user_without_a_range_of_ids_is_told_how_to_get_one() -> None:
    need("podman-rootless")
    with podman_of_our_own(rootless=True) as podman:
        take_ids_away(podman.user)
        runtime = runtime_of(podman)
        health = await runtime.probe()
        await runtime.aclose()
    assert health.state == "unhealthy"
    assert "usermod --add-subuids" in health.reason


async def test_broken_storage_is_said_to_be_broken() -> None:
    need("podman")
    with podman_of_our_own() as podman:
        podman.run("info")
        [database] = [*podman.folder.rglob("bolt_state.db"), *podman.folder.rglob("db.sql")]
        database.write_bytes(b"x" * 65_536)
        runtime = runtime_of(podman)
        health = await runtime.probe()
        await runtime.aclose()
    assert health.state == "unhealthy"
    assert "storage is broken" in health.reason
    assert "podman system reset" in health.reason


async def test_docker_is_left_to_its_own_runtime(docker_engine: str) -> None:
    runtime = PodmanRuntime({"host": docker_engine or "unix:///var/run/docker.sock"})
    health = await runtime.probe()
    await runtime.aclose()
    assert health.state == "undetected"
    assert "not Podman" in health.reason


# Pulls from a real registry


def pushed(podman: Podman, registry: str, *, layer_mib: int = 8) -> tuple[str, str]:
    """Make an image with a layer that no compression shrinks, push it, forget it; returns repository and digest."""
    repository = f"rma-test/pushed-{secrets.token_hex(4)}"
    name = f"{registry}/{repository}:latest"
    make_image(podman, name, files={"blob": secrets.token_bytes(layer_mib * MIB)})
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        podman.run("push", f"--digestfile={folder}/digest", name)
        digest = (Path(folder) / "digest").read_text().strip()
    podman.run("rmi", name)
    return repository, digest


@pytest.mark.parametrize("by_digest", [False, True], ids=["by tag", "by digest"])
async def test_a_pull_tells_of_its_layers(
    runtime: PodmanRuntime, podman: Podman, registry: str, by_digest: bool
) -> None:
    repository, digest = pushed(podman, registry)
    spec = from_registry(registry, repository, digest if by_digest else None)
    assert not await runtime.has_image(spec)
    seen: list[PullProgress] = []
    await runtime.pull(spec, seen.append)
    assert await runtime.has_image(spec)
    assert seen, "each layer is said, its size only where it takes more than a moment"
    assert seen[-1].total_bytes in (None, seen[-1].done_bytes)
    handle = await runtime.start(spec)
    try:
        await answers(await runtime.endpoint(handle))
        assert handle.image_bytes >= 8 * MIB
        assert await runtime.list_owned(spec.worker_id) == [handle]
    finally:
        await runtime.stop(handle)


async def test_a_tag_that_moved_on_is_not_what_a_digest_asks_for(
    runtime: PodmanRuntime, podman: Podman, registry: str
) -> None:
    repository, old = pushed(podman, registry, layer_mib=1)
    name = f"{registry}/{repository}:latest"
    make_image(podman, name, files={"other": b"other"})
    podman.run("push", name)
    spec = from_registry(registry, repository, old)
    assert not await runtime.has_image(spec), "an image of that name is here, in another digest"
    await runtime.pull(spec, lambda _: None)
    assert await runtime.has_image(spec)


async def test_a_local_image_may_be_pinned_by_its_id(runtime: PodmanRuntime, podman: Podman) -> None:
    local = podman.run("image", "inspect", "--format", "{{.Id}}", SERVICE).strip()
    assert await runtime.has_image(msgspec.structs.replace(SPEC, image_digest=f"sha256:{local}"))
    assert not await runtime.has_image(msgspec.structs.replace(SPEC, image_digest="sha256:" + "0" * 64))


async def test_a_registry_that_is_down_may_be_tried_again(runtime: PodmanRuntime) -> None:
    with pytest.raises(ImagePullFailed, match="refused"):
        await runtime.pull(from_registry("127.0.0.1:1", "rma-test/any"), lambda _: None)


async def test_a_transfer_that_stalls_is_given_up_for_lack_of_progress(
    runtime: PodmanRuntime, podman: Podman, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rma_core.container_engine import images

    monkeypatch.setattr(images, "PULL_IDLE_S", 2.0)
    repository, digest = pushed(podman, registry)
    async with Valve(registry, most_bytes=4 * MIB, then="stall").open() as address:
        with pytest.raises(ImagePullFailed, match="broke off"):
            await runtime.pull(from_registry(address, repository, digest), lambda _: None)
        await no_thread_left()
    again = from_registry(registry, repository, digest)
    await runtime.pull(again, lambda _: None)
    assert await runtime.has_image(again)


async def test_a_service_killed_in_the_middle_of_a_pull_is_absent(podman: Podman, registry: str) -> None:
    repository, digest = pushed(podman, registry)
    runtime = runtime_of(podman)
    valve = Valve(registry, most_bytes=4 * MIB, then="stall")
    async with valve.open() as address:
        pulling = asyncio.create_task(runtime.pull(from_registry(address, repository, digest), lambda _: None))
        await valve.closed_up.wait()
        os.kill(service(runtime), signal.SIGKILL)
        with pytest.raises(RuntimeAbsent):
            await pulling
    await runtime.aclose()


async def test_a_full_disk_is_said_with_what_to_do(rootful_podman: Podman, registry: str) -> None:
    need("mount")
    repository, digest = pushed(rootful_podman, registry, layer_mib=32)
    with podman_of_our_own() as small:
        engines.call("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(small.folder / "storage"))
        runtime = runtime_of(small, TMPDIR=str(small.folder / "storage"))
        with pytest.raises(OutOfSpace, match="podman system prune"):
            await runtime.pull(from_registry(registry, repository, digest), lambda _: None)
        assert (await runtime.probe()).state == "healthy"
        await runtime.aclose()


# What is said, and what is asked for


@pytest.mark.parametrize(
    ("action", "said", "kind"),
    [
        ("pull", "storing blob to file: write /var/tmp/1: no space left on device", OutOfSpace),
        ("pull", "reading manifest latest in 127.0.0.1:5000/x: manifest unknown: manifest unknown", ImageMissing),
        ("pull", "Requesting bearer token: invalid status code from registry 403 (Forbidden)", ImagePullFailed),
        ("pull", "pinging container registry x:5000: http: server gave HTTP response to HTTPS client", ImagePullFailed),
        ("pull", "choosing image instance: no image found in manifest list for architecture arm64", ImageMissing),
        ("start", "rootlessport listen tcp 127.0.0.1:8000: bind: address already in use", PortTaken),
        ("start", 'could not find "netavark" in one of [/usr/libexec/podman]', NotSupported),
        ("start", "/usr/bin/slirp4netns failed: open(/dev/net/tun): Permission denied", NotSupported),
        ("start", "container-init binary not found on the host: stat /usr/libexec/podman/catatonit", NotSupported),
        ("start", "setting up CDI devices: unresolvable CDI devices nvidia.com/gpu=9", NotSupported),
        ("start", "error setting rlimit type 7: operation not permitted: OCI permission denied", NotSupported),
        ("start", "crun: executable file `/nothing` not found in $PATH: No such file or directory", StartFailed),
        ("ask", "something new", RuntimeFailure),
    ],
)  # fmt: skip
def test_what_podman_and_registries_say_is_understood(action: Action, said: str, kind: type[RuntimeFailure]) -> None:
    failure = explain(said, action, PODMAN)
    assert type(failure) is kind
    assert said in failure.message


LIMITABLE = {"MemoryLimit": True, "SwapLimit": True, "CpuCfsQuota": True, "PidsLimit": True}


@pytest.mark.parametrize(
    ("status", "said", "absent"),
    [
        (404, "no such container", True),
        # As recorded of one that was removed between Podman's own two looks at it.
        (500, f"container {'2d3f' * 16} does not exist in database: no such container", True),
        (500, "database is locked", False),
    ],
)
def test_a_container_that_is_removed_while_podman_looks_is_not_there(status: int, said: str, absent: bool) -> None:
    answer = requests.Response()
    answer.status_code = status

    def look() -> str:
        kind = docker.errors.NotFound if status == 404 else docker.errors.APIError
        raise kind("inspect", response=answer, explanation=said)

    with contextlib.nullcontext() if absent else pytest.raises(docker.errors.APIError, match="locked"):
        assert unless_absent(look) is None
    assert unless_absent(lambda: "there") == "there"


def test_a_container_is_made_with_these_options_and_no_others() -> None:
    made = made_with(SPEC, {"Id": "sha256:0"}, {**LIMITABLE, "NCPU": 2})
    asked_for_elsewhere = {"name", "hostname", "labels", "env", "image", "r_limits", "log_configuration", "mounts"}
    assert {key: value for key, value in made.items() if key not in asked_for_elsewhere} == {
        "httpproxy": False,
        "systemd": "false",
        "portmappings": [{"host_ip": "127.0.0.1", "container_port": 8000, "host_port": 0, "protocol": "tcp"}],
        "user": "65532:65532",
        "cap_drop": ["ALL"],
        "no_new_privileges": True,
        "privileged": False,
        "read_only_filesystem": True,
        "image_volume_mode": "ignore",
        "manage_password": False,
        "shm_size": 4 * MIB,
        "oom_score_adj": 800,
        "ipcns": {"nsmode": "private"},
        "cgroupns": {"nsmode": "private"},
        "init": True,
        "restart_policy": "no",
        "resource_limits": {
            "memory": {"limit": 64 * MIB, "swap": 64 * MIB},
            "cpu": {"shares": 128, "quota": 50_000, "period": 100_000},
            "pids": {"limit": 64},
        },
    }
    assert {mount["destination"] for mount in made["mounts"]} == {"/tmp", "/run"}
    assert {mount["type"] for mount in made["mounts"]} == {"tmpfs"}


def test_limits_that_exist_on_paper_only_are_not_believed() -> None:
    rootless = {"security": {"rootless": True, "seccompEnabled": True}, "cgroupControllers": ["memory", "pids"]}
    for host, able in (
        ({"cgroupVersion": "v1", "cgroupManager": "cgroupfs"}, set()),
        ({"cgroupVersion": "v2", "cgroupManager": "cgroupfs"}, set()),
        ({"cgroupVersion": "v2", "cgroupManager": "systemd"}, {"MemoryLimit", "SwapLimit", "PidsLimit"}),
    ):
        info = completed(LIMITABLE, {"host": {**rootless, **host}})
        assert {name for name in LIMITABLE if info[name]} == able
        assert info["SecurityOptions"] == ["name=rootless", "name=seccomp,profile=default"]


def test_importing_the_plugin_does_not_import_the_sdk() -> None:
    heavy = "('docker', 'requests', 'urllib3', 'psutil')"
    code = f"import sys, rma_runtime_podman; sys.exit(any(name in sys.modules for name in {heavy}))"
    path = os.pathsep.join([str(Path(rma_runtime_podman.__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=False, timeout=60)
    assert done.returncode == 0


def test_the_hook_registers_one_runtime_and_starts_nothing() -> None:
    [runtime] = rma_runtime_podman.rma_container_runtimes({})
    assert (runtime.name, runtime.isolated) == ("podman", True)
