"""The Docker runtime on a real engine, a real registry, and the broken ones that owners have."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import io
import ipaddress
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import rma_runtime_docker
from rma_core import (
    ContainerAccess,
    ImageMissing,
    ImagePullFailed,
    Limits,
    NotSupported,
    OutOfSpace,
    PortTaken,
    PullProgress,
    RuntimeAbsent,
    RuntimeFailure,
    StartFailed,
)
from rma_core.container_engine import (
    Action,
    Address,
    Layers,
    cannot_limit,
    container_name,
    explain,
    features,
    images,
    labels,
    locked_down,
    split_tag,
    unusable,
    warnings,
)
from rma_core.container_engine import connection as engine_connection
from rma_core.testing import RuntimeCase, adoption_contract, isolation_contract, runtime_contract
from rma_core.testing.runtimes import answers, becomes, inside, of_worker, started
from rma_runtime_docker import DOCKER, DockerRuntime, locate
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
    pump,
    shell,
)
from tests.needs import need

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from rma_core.testing.runtimes import Check

NO_DOCKER = "unix:///nonexistent/docker.sock"


def make_image(host: str, name: str, *changes: str, files: dict[str, bytes] | None = None) -> str:
    """Make an image on the engine at ``host``; returns its local id."""
    content = image_tar({"service": PROGRAM, "www/cgi-bin/sh": SHELL, "www/index.html": b"ok\n", **(files or {})})
    options = [f"--change={change}" for change in ('CMD ["/service"]', *changes)]
    return docker(host, "import", *options, "-", name, stdin=content).strip()


def docker(host: str, *arguments: str, stdin: bytes | None = None) -> str:
    where = ["--host", host] if host else []
    return engines.call("docker", *where, *arguments, stdin=stdin)


def runtime_at(host: str) -> DockerRuntime:
    return DockerRuntime({"host": host} if host else {})


@pytest.fixture(scope="session")
def engine_host(docker_engine: str) -> str:
    """The engine, with SERVICE in it."""
    make_image(docker_engine, SERVICE)
    return docker_engine


@pytest.fixture
async def runtime(engine_host: str) -> AsyncIterator[DockerRuntime]:
    made = runtime_at(engine_host)
    yield made
    await made.aclose()


@pytest.fixture
async def case(runtime: DockerRuntime, engine_host: str, registry: str) -> RuntimeCase:
    return RuntimeCase(
        runtime=runtime,
        healthy=SPEC,
        exits=doing("exits"),
        stubborn=doing("stubborn"),
        hungry=doing("hungry"),
        no_image=msgspec.structs.replace(SPEC, image=f"{registry}/rma-test/nobody-has-this"),
        absent=DockerRuntime({"host": NO_DOCKER}),
        again=lambda: runtime_at(engine_host),
        shell=shell,
    )


@pytest.mark.parametrize("check", [*runtime_contract, *adoption_contract, *isolation_contract], ids=by_name)
async def test_docker_keeps_the_contract(check: Check, case: RuntimeCase) -> None:
    await check(case)


@pytest.mark.parametrize("kept", [0, 1, 2])
async def test_half_a_copy_passes_for_none_wherever_its_removal_ends(
    runtime: DockerRuntime, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await break_off_a_copy(runtime, kept, monkeypatch)


async def test_no_gpu_and_no_proxy_of_the_owner_gets_into_the_environment(
    engine_host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = secrets.token_hex(8)
    (tmp_path / "config.json").write_text(json.dumps({"proxies": {"default": {"httpProxy": f"http://me:{secret}@x"}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    image = "rma-test/wants-gpus:latest"
    make_image(engine_host, image, "ENV NVIDIA_VISIBLE_DEVICES=all")
    runtime = runtime_at(engine_host)
    case = contract_of(runtime, msgspec.structs.replace(SPEC, image=image))
    async with started(case, of_worker(case.healthy)) as handle:
        said = await inside(case, handle, "env")
    await runtime.aclose()
    assert "NVIDIA_VISIBLE_DEVICES=void" in said
    assert "HOME=/tmp" in said
    assert secret not in said


@pytest.mark.parametrize(
    ("named", "runs_as"),
    [("", "65532:65532"), ("root", "65532:65532"), ("0", "65532:65532"), ("app", "65532:65532"), ("1001:0", "1001:0")],
)
async def test_nothing_runs_as_root_whatever_the_image_says(
    runtime: DockerRuntime, engine_host: str, named: str, runs_as: str
) -> None:
    image = f"rma-test/user-{named.replace(':', '-') or 'none'}:latest"
    make_image(engine_host, image, *([f"USER {named}"] if named else []))
    case = contract_of(runtime, msgspec.structs.replace(SPEC, image=image))
    async with started(case, of_worker(case.healthy)) as handle:
        assert await inside(case, handle, "echo $(id -u):$(id -g)") == runs_as


async def test_what_an_image_declares_as_a_volume_is_memory_of_limited_size(
    runtime: DockerRuntime, engine_host: str
) -> None:
    image = "rma-test/volumes:latest"
    make_image(engine_host, image, "VOLUME /data", "VOLUME /tmp")
    before = docker(engine_host, "volume", "ls", "--quiet")
    case = contract_of(runtime, msgspec.structs.replace(SPEC, image=image))
    async with started(case, of_worker(case.healthy)) as handle:
        mounts = {line.split()[1]: line for line in (await inside(case, handle, "cat /proc/mounts")).splitlines()}
        assert mounts["/data"].startswith("tmpfs")
        assert "noexec" in mounts["/data"]
        assert f"size={8 * 1024}k" in mounts["/data"]
        assert await inside(case, handle, "echo kept > /data/file && cat /data/file") == "kept"
        assert docker(engine_host, "volume", "ls", "--quiet") == before
    assert docker(engine_host, "volume", "ls", "--quiet") == before


async def test_one_that_runs_out_of_memory_says_its_limit(case: RuntimeCase) -> None:
    assert case.hungry is not None
    async with started(case, of_worker(case.hungry)) as handle:
        ended = await becomes(case.runtime, handle, "exited")
    assert "out of memory (limit 64 MiB)" in ended.reason


async def test_an_image_for_another_processor_is_said_to_be_one(runtime: DockerRuntime, engine_host: str) -> None:
    image = "rma-test/foreign:latest"
    # The header of a 64-bit ELF program for s390x, and nothing behind it.
    foreign = b"\x7fELF\x02\x02\x01" + bytes(9) + b"\x00\x02\x00\x16\x00\x00\x00\x01" + bytes(200)
    load_foreign_image(engine_host, image, image_tar({"foreign": foreign}))
    said = await how_it_fails(runtime, msgspec.structs.replace(SPEC, image=image))
    assert "another kind of processor (s390x) than this one" in said


def load_foreign_image(host: str, name: str, layer: bytes) -> None:
    """Make an image that says it is for s390x; ``docker import`` cannot, ``docker load`` can."""
    config = json.dumps(
        {
            "architecture": "s390x",
            "os": "linux",
            "config": {"Cmd": ["/foreign"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        }
    ).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for file, content in {"config.json": config, "manifest.json": manifest, "layer.tar": layer}.items():
            entry = tarfile.TarInfo(file)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    docker(host, "load", stdin=buffer.getvalue())


async def test_an_image_without_its_program_is_said_to_be_one(runtime: DockerRuntime, engine_host: str) -> None:
    image = "rma-test/empty:latest"
    make_image(engine_host, image, 'CMD ["/nothing/here"]')
    said = await how_it_fails(runtime, msgspec.structs.replace(SPEC, image=image))
    assert "/nothing/here" in said
    assert "No such file or directory" in said or "not in it" in said


async def test_last_words_are_one_line_without_control_characters(runtime: DockerRuntime) -> None:
    rude = msgspec.structs.replace(SPEC, env={"MODE": "exits", "GREETING": "\x1b]0;owned\x07\x1b[31mno model\nat /m"})
    said = await how_it_fails(runtime, rude)
    assert said.isprintable()
    assert "no model / at /m" in said


async def test_a_name_held_by_a_stranger_is_no_ones_to_take(runtime: DockerRuntime, engine_host: str) -> None:
    spec = of_worker(SPEC)
    name = container_name(spec)
    held = docker(engine_host, "create", "--name", name, SERVICE).strip()
    try:
        with pytest.raises(StartFailed, match=f"{name} is taken by .* not this worker's .{held[:12]}"):
            await runtime.start(spec)
        assert docker(engine_host, "inspect", "--format", "{{.State.Status}}", held).strip() == "created"
    finally:
        docker(engine_host, "rm", held)


async def test_a_leftover_that_was_never_started_is_listed_and_gives_way(
    runtime: DockerRuntime, engine_host: str
) -> None:
    spec = of_worker(SPEC)
    options = [f"--label={key}={value}" for key, value in labels(spec).items()]
    docker(engine_host, "create", "--name", container_name(spec), *options, SERVICE)
    [leftover] = await runtime.list_owned(spec.worker_id)
    assert (await runtime.inspect(leftover)).reason == "it was made, but never started"
    handle = await runtime.start(spec)
    try:
        assert await runtime.list_owned(spec.worker_id) == [handle]
    finally:
        await runtime.stop(handle)


async def test_giving_up_a_start_leaves_nothing(runtime: DockerRuntime) -> None:
    spec = of_worker(SPEC)
    assert await runtime.has_image(spec)
    starting = asyncio.create_task(runtime.start(spec))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await no_thread_left()
    assert await runtime.list_owned(spec.worker_id) == []


async def test_a_gpu_that_the_engine_cannot_give_is_not_supported(runtime: DockerRuntime) -> None:
    for access in (
        ContainerAccess(cdi=("vendor.example/gpu=0",)),
        ContainerAccess(device_nodes=("/dev/dri/renderD-none",)),
    ):
        spec = of_worker(msgspec.structs.replace(SPEC, access=access))
        with pytest.raises(NotSupported, match=r"Docker (could not|cannot) give"):
            await runtime.start(spec)
        assert await runtime.list_owned(spec.worker_id) == []


async def test_a_taken_port_is_said_by_a_real_engine(engine_host: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        publish = f"--publish=127.0.0.1:{holder.getsockname()[1]}:8000"
        with pytest.raises(engines.EngineProblem) as said:
            docker(engine_host, "run", "--rm", "--detach", publish, SERVICE)
    assert isinstance(explain(str(said.value), "start", DOCKER), PortTaken)


# Where the engine is


def test_docker_host_comes_before_the_context_and_the_configuration_before_both(tmp_path: Path) -> None:
    make_context(tmp_path, "other", "unix:///run/other.sock")
    both = {"DOCKER_HOST": "unix:///run/host.sock", "DOCKER_CONTEXT": "other", "DOCKER_CONFIG": str(tmp_path)}
    assert locate({"host": "unix:///run/mine.sock"}, both, tmp_path).host == "unix:///run/mine.sock"
    assert locate({}, both, tmp_path).host == "unix:///run/host.sock"
    del both["DOCKER_HOST"]
    assert locate({}, both, tmp_path) == Address("unix:///run/other.sock", "context 'other'")


def make_context(folder: Path, name: str, host: str) -> Path:
    """Write a Docker context as the docker command does; returns the folder for its certificates."""
    key = hashlib.sha256(name.encode()).hexdigest()
    meta = folder / "contexts" / "meta" / key
    meta.mkdir(parents=True)
    endpoint = {"Host": host, "SkipTLSVerify": False}
    (meta / "meta.json").write_text(json.dumps({"Name": name, "Metadata": {}, "Endpoints": {"docker": endpoint}}))
    return folder / "contexts" / "tls" / key / "docker"


def test_a_context_made_by_the_docker_command_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("docker") is None:
        pytest.skip("the docker command is not installed")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    engines.call("docker", "context", "create", "mine", "--docker", "host=unix:///run/mine.sock")
    engines.call("docker", "context", "use", "mine")
    assert locate({}, os.environ, tmp_path) == Address("unix:///run/mine.sock", "context 'mine'")


def test_the_current_context_of_the_home_folder_counts_even_without_variables(tmp_path: Path) -> None:
    folder = tmp_path / ".docker"
    make_context(folder, "desktop-linux", "unix:///run/desktop.sock")
    (folder / "config.json").write_text('{"currentContext": "desktop-linux"}')
    assert locate({}, {}, tmp_path).host == "unix:///run/desktop.sock"


@pytest.mark.parametrize("content", [None, "{", "[]", '{"currentContext": "gone"}'])
def test_a_context_that_is_not_there_is_said_and_a_broken_file_counts_as_none(
    tmp_path: Path, content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = tmp_path / "docker.sock"
    usual.touch()
    monkeypatch.setattr(rma_runtime_docker, "_usual_sockets", lambda *_: iter([str(usual)]))
    (tmp_path / ".docker").mkdir()
    if content is not None:
        (tmp_path / ".docker" / "config.json").write_text(content)
    if content and "gone" in content:
        with pytest.raises(RuntimeAbsent, match="names the Docker context 'gone', which cannot be read"):
            locate({}, {}, tmp_path)
        return
    assert locate({}, {}, tmp_path).host == f"unix://{usual}"


def test_certificates_come_from_the_context_or_from_docker_cert_path(tmp_path: Path) -> None:
    tls = make_context(tmp_path, "secure", "tcp://127.0.0.1:2376")
    tls.mkdir(parents=True)
    found = locate({}, {"DOCKER_CONTEXT": "secure", "DOCKER_CONFIG": str(tmp_path)}, tmp_path)
    assert found.tls == (str(tls / "ca.pem"), str(tls / "cert.pem"), str(tls / "key.pem"))
    named = {"DOCKER_HOST": "tcp://127.0.0.1:2376", "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": "/certs"}
    assert locate({}, named, tmp_path).tls == ("/certs/ca.pem", "/certs/cert.pem", "/certs/key.pem")
    del named["DOCKER_TLS_VERIFY"]
    assert locate({}, named, tmp_path).tls is None


def test_rootless_sockets_and_docker_desktops_are_among_the_usual_ones(tmp_path: Path) -> None:
    places = list(rma_runtime_docker._usual_sockets({"XDG_RUNTIME_DIR": "/run/user/7"}, tmp_path))
    assert places[:3] == ["/var/run/docker.sock", "/run/user/7/docker.sock", f"{tmp_path}/.docker/run/docker.sock"]


# Engines that cannot be used


@pytest.mark.parametrize(
    "host", ["ssh://me@elsewhere", "tcp://192.0.2.1:2375", "tcp://127.evil.example:2375", "fd://", "nonsense"]
)
async def test_an_engine_on_another_machine_is_refused_without_calling_it(host: str) -> None:
    health = await DockerRuntime({"host": host}).probe()
    assert health.state == "unhealthy"
    assert "not an engine on this machine" in health.reason


async def test_a_machine_without_docker_is_undetected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rma_runtime_docker, "_usual_sockets", lambda *_: iter(()))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    runtime = DockerRuntime({}, environ={})
    health = await runtime.probe()
    assert (health.state, health.reason.split(":")[0]) == ("undetected", "Docker is not installed")
    (tmp_path / "docker").touch(mode=0o755)
    health = await runtime.probe()
    assert health.state == "unhealthy"
    assert health.reason.startswith("Docker is installed, but its daemon does not run: start it")


async def test_a_socket_that_nobody_listens_on_tells_to_start_the_daemon(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "s"))
    health = await DockerRuntime({"host": f"unix://{tmp_path}/s"}).probe()
    assert health.state == "unhealthy"
    assert "its daemon does not answer at unix://" in health.reason
    assert "start it" in health.reason


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    """Be a user without rights for a while."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can become somebody who may not")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


async def test_a_user_who_may_not_use_docker_is_told_which_group(engine_host: str, runtime: DockerRuntime) -> None:
    assert (await runtime.probe()).state == "healthy"
    denied = runtime_at(engine_host)
    with somebody_else():
        health = await denied.probe()
        with pytest.raises(RuntimeAbsent, match="docker group"):
            await denied.list_owned("worker-00000000")
    assert health.state == "unhealthy"
    assert "add this user to the docker group" in health.reason
    assert (await denied.probe()).state == "healthy"
    await denied.aclose()


@contextlib.contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """Serve one answer to whoever asks at a Unix socket; None says nothing at all, like an engine that hangs."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen()
        kept: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    caller, _ = listener.accept()
                    kept.append(caller)
                    if answer is not None and caller.recv(65536):
                        caller.sendall(answer)
                        caller.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"unix://{folder}/s"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for caller in kept:
            caller.close()


async def test_an_engine_that_hangs_is_unhealthy_and_holds_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_connection, "CONNECT_S", 0.3)
    with listening(None) as host:
        runtime = DockerRuntime({"host": host})
        health = await runtime.probe()
        assert health.state == "unhealthy"
        assert "does not answer at" in health.reason
        with pytest.raises(RuntimeAbsent):
            await runtime.list_owned("worker-00000000")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"220 mail.example ESMTP\r\n",
        b"HTTP/1.1 500 No\r\n\r\nboom",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
    ],
)
async def test_what_is_no_docker_is_unhealthy_and_never_a_traceback(answer: bytes) -> None:
    with listening(answer) as host:
        assert (await DockerRuntime({"host": host}).probe()).state == "unhealthy"


async def test_podman_behind_dockers_socket_is_left_to_the_podman_runtime(tmp_path: Path) -> None:
    need("podman")
    address = f"unix://{tmp_path}/podman.sock"
    service = await asyncio.create_subprocess_exec("podman", "system", "service", "--time=0", address)
    try:
        assert await asyncio.to_thread(engines.wait_for, (tmp_path / "podman.sock").exists, 30)
        health = await DockerRuntime({"host": address}).probe()
    finally:
        service.terminate()
        await service.wait()
    assert health.state == "undetected"
    assert "Podman, not Docker" in health.reason


def test_windows_containers_and_missing_limits_are_said() -> None:
    assert "switch it to Linux containers" in unusable({"OSType": "windows"}, "Docker")
    assert unusable({"OSType": "linux"}, "Docker") == ""
    pi = {
        "MemoryLimit": False,
        "SwapLimit": False,
        "CpuCfsQuota": True,
        "PidsLimit": True,
        "SecurityOptions": ["name=seccomp,profile=x"],
    }
    [said] = warnings(pi, "Docker")
    assert said.startswith("Docker cannot limit memory, swap of containers here (the kernel may need cgroup_enable")
    assert cannot_limit(pi) == ("memory", "swap")
    bare = {"CgroupVersion": "1", "SecurityOptions": ["name=rootless", "name=seccomp,profile=unconfined"]}
    limits, seccomp = warnings(bare, "Docker")
    assert limits.startswith("Docker cannot limit memory, swap, cpu, pids of containers here (without root this takes")
    assert seccomp == "Docker runs containers without seccomp here"


def test_features_are_those_the_engine_has() -> None:
    new = {
        "MemoryLimit": True,
        "CgroupVersion": "2",
        "SecurityOptions": ["name=apparmor", "name=seccomp,profile=builtin"],
        "CDISpecDirs": ["/etc/cdi"],
        "Runtimes": {"nvidia": {}, "runc": {}},
    }
    assert list(features(new)) == [
        "limit:memory",
        "cgroup:v2",
        "security:seccomp",
        "security:apparmor",
        "gpu:cdi",
        "gpu:nvidia",
    ]
    assert "gpu:cdi" not in set(features({**new, "DiscoveredDevices": []}))


async def test_the_features_of_a_real_engine_are_told(runtime: DockerRuntime) -> None:
    health = await runtime.probe()
    assert {"limit:memory", "limit:cpu", "limit:pids", "security:seccomp"} <= set(health.features)


# Pulls from a real registry


def pushed(host: str, registry: str, *, layer_mib: int = 8) -> tuple[str, str]:
    """Make an image with a layer that no compression shrinks, push it, forget it; returns repository and digest."""
    repository = f"rma-test/pushed-{secrets.token_hex(4)}"
    name = f"{registry}/{repository}:latest"
    make_image(host, name, files={"blob": secrets.token_bytes(layer_mib * MIB)})
    said = docker(host, "push", name)
    docker(host, "rmi", name)
    [digest] = re.findall(r"sha256:[0-9a-f]{64}", said)
    return repository, digest


@pytest.mark.parametrize("by_digest", [False, True], ids=["by tag", "by digest"])
async def test_a_pull_shows_progress_up_to_its_total(
    runtime: DockerRuntime, engine_host: str, registry: str, by_digest: bool
) -> None:
    repository, digest = pushed(engine_host, registry)
    spec = from_registry(registry, repository, digest if by_digest else None)
    assert not await runtime.has_image(spec)
    seen: list[PullProgress] = []
    await runtime.pull(spec, seen.append)
    assert await runtime.has_image(spec)
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)
    assert any(0 < p.done_bytes < 8 * MIB for p in seen), "something in between was shown"
    assert seen[-1].total_bytes is not None
    assert seen[-1].done_bytes == seen[-1].total_bytes >= 8 * MIB
    assert {p.note for p in seen} >= {"downloading", "complete"}
    handle = await runtime.start(spec)
    try:
        local = docker(engine_host, "inspect", "--format", "{{.Image}}", handle.id).strip()
        assert handle.image_id == local
        size = int(docker(engine_host, "inspect", "--format", "{{.Size}}", local))
        assert handle.image_bytes == size >= 8 * MIB
        await answers(await runtime.endpoint(handle))
    finally:
        await runtime.stop(handle)


async def test_a_tag_that_moved_on_is_not_what_a_digest_asks_for(
    runtime: DockerRuntime, engine_host: str, registry: str
) -> None:
    repository, old = pushed(engine_host, registry, layer_mib=1)
    name = f"{registry}/{repository}:latest"
    make_image(engine_host, name, files={"other": b"other"})
    docker(engine_host, "push", name)
    spec = from_registry(registry, repository, old)
    assert not await runtime.has_image(spec), "an image of that name is here, in another digest"
    await runtime.pull(spec, lambda _: None)
    assert await runtime.has_image(spec)


async def test_a_local_image_may_be_pinned_by_its_id(runtime: DockerRuntime, engine_host: str) -> None:
    local = docker(engine_host, "inspect", "--format", "{{.Id}}", SERVICE).strip()
    assert await runtime.has_image(msgspec.structs.replace(SPEC, image_digest=local))
    assert not await runtime.has_image(msgspec.structs.replace(SPEC, image_digest="sha256:" + "0" * 64))


async def test_a_digest_that_the_registry_does_not_have_is_missing(
    runtime: DockerRuntime, engine_host: str, registry: str
) -> None:
    repository, _ = pushed(engine_host, registry, layer_mib=1)
    spec = from_registry(registry, repository, "sha256:" + "0" * 64)
    with pytest.raises(ImageMissing, match="manifest unknown"):
        await runtime.pull(spec, lambda _: None)
    assert not await runtime.has_image(spec)


async def test_a_registry_that_is_down_may_be_tried_again(runtime: DockerRuntime) -> None:
    with pytest.raises(ImagePullFailed, match="refused"):
        await runtime.pull(from_registry("127.0.0.1:1", "rma-test/any"), lambda _: None)


@pytest.mark.parametrize("then", ["stall", "cut"])
async def test_a_transfer_that_breaks_off_midway_is_given_up_for_lack_of_progress(
    runtime: DockerRuntime, engine_host: str, registry: str, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "PULL_IDLE_S", 2.0)
    repository, digest = pushed(engine_host, registry)
    seen: list[PullProgress] = []
    async with Valve(registry, most_bytes=4 * MIB, then=then).open() as address:
        spec = from_registry(address, repository, digest)
        with pytest.raises(ImagePullFailed, match="broke off"):
            await runtime.pull(spec, seen.append)
        await no_thread_left()
    assert all(p.note == "downloading" for p in seen)
    again = from_registry(registry, repository, digest)
    await runtime.pull(again, lambda _: None)
    assert await runtime.has_image(again)


async def test_a_pull_that_is_cancelled_leaves_no_thread_waiting(
    runtime: DockerRuntime, engine_host: str, registry: str
) -> None:
    repository, digest = pushed(engine_host, registry)
    valve = Valve(registry, most_bytes=4 * MIB, then="stall")
    async with valve.open() as address, asyncio.timeout(60):
        pulling = asyncio.create_task(runtime.pull(from_registry(address, repository, digest), lambda _: None))
        await valve.closed_up.wait()
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        await no_thread_left()


def test_progress_has_a_total_once_every_layer_is_known() -> None:
    layers = Layers()
    for event in (
        {"status": "Pulling from x", "id": "latest"},
        {"status": "Pulling fs layer", "id": "a"},
        {"status": "Pulling fs layer", "id": "b"},
        {"status": "Already exists", "id": "c"},
        {"status": "Downloading", "id": "a", "progressDetail": {"current": 10, "total": 100}},
    ):
        layers.take(event)
    assert layers.progress() == PullProgress(done_bytes=10, total_bytes=None, note="downloading")
    assert layers.take({"status": "Downloading", "id": "b", "progressDetail": {"current": 5, "total": 50}})
    assert layers.progress().total_bytes == 150
    assert not layers.take({"status": "Downloading", "id": "b", "progressDetail": {"current": 5, "total": 50}})
    assert not layers.take({"status": "Retrying in 5 seconds", "id": "a"})
    assert layers.progress() == PullProgress(done_bytes=5, total_bytes=None, note="downloading")
    assert layers.take({"status": "Downloading", "id": "a", "progressDetail": {"current": 10, "total": 90}})
    assert layers.patience_s == images.PULL_IDLE_S
    layers.take({"status": "Download complete", "id": "a"})
    layers.take({"status": "Download complete", "id": "b"})
    assert layers.progress() == PullProgress(done_bytes=140, total_bytes=140, note="unpacking")
    assert layers.patience_s == images.UNPACK_IDLE_S


async def test_an_engine_behind_a_context_with_certificates_is_used(
    engine_host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not engine_host.startswith("unix://"):
        pytest.skip("the engine does not listen on a Unix socket that TLS could be put before")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "of-the-company.pem"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    authority = Authority()
    async with tls_before(engine_host.removeprefix("unix://"), authority, tmp_path) as port:
        folder = make_context(tmp_path, "secure", f"tcp://127.0.0.1:{port}")
        authority.sign("client", folder)
        environ = {"DOCKER_CONTEXT": "secure", "DOCKER_CONFIG": str(tmp_path)}
        runtime = DockerRuntime({}, environ=environ)
        health = await runtime.probe()
        assert health.state == "healthy", health.reason
        assert await runtime.has_image(SPEC)
        await runtime.aclose()
        Authority().sign("client", folder)
        stranger = DockerRuntime({}, environ=environ)
        health = await stranger.probe()
        assert health.state == "unhealthy"
        assert "does not answer at tcp://127.0.0.1" in health.reason
        await stranger.aclose()


class Authority:
    """A certificate authority for one test."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"authority {secrets.token_hex(4)}")])
        self._own = self._certificate(self._name, self._key.public_key(), authority=True)

    def sign(self, name: str, folder: Path) -> None:
        """Write ca.pem, cert.pem and key.pem for somebody at 127.0.0.1, as Docker wants them."""
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        signed = self._certificate(subject, key.public_key(), authority=False)
        pem = serialization.Encoding.PEM
        (folder / "ca.pem").write_bytes(self._own.public_bytes(pem))
        (folder / "cert.pem").write_bytes(signed.public_bytes(pem))
        plain = serialization.NoEncryption()
        (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))

    def _certificate(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, authority: bool) -> x509.Certificate:
        now = dt.datetime.now(tz=dt.UTC)
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        made = x509.CertificateBuilder(self._name, subject, key, x509.random_serial_number())
        made = made.not_valid_before(now - dt.timedelta(hours=1)).not_valid_after(now + dt.timedelta(days=1))
        made = made.add_extension(address, critical=False)
        made = made.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        return made.sign(self._key, hashes.SHA256())


@contextlib.asynccontextmanager
async def tls_before(path: str, authority: Authority, folder: Path) -> AsyncIterator[int]:
    """Put TLS with client certificates before a Unix socket; gives the port."""
    authority.sign("server", folder / "server")
    own = folder / "server"
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=own / "ca.pem")
    context.load_cert_chain(own / "cert.pem", own / "key.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, front = await asyncio.open_unix_connection(path)
        upward = asyncio.create_task(pump(reader, front))
        try:
            await pump(behind, writer)
        finally:
            upward.cancel()
            front.close()
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# Engines that go away, and full disks


async def test_an_engine_that_is_stopped_and_started_is_said_once_and_used_again(
    own_engine: engines.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    make_image(own_engine.host, SERVICE)
    runtime = runtime_at(own_engine.host)
    spec = of_worker(SPEC)
    handle = await runtime.start(spec)
    with caplog.at_level(logging.DEBUG, logger="rma_core.container_engine"):
        own_engine.stop()
        assert "start it" in (await runtime.probe()).reason
        for call in (
            runtime.has_image(spec),
            runtime.pull(spec, lambda _: None),
            runtime.start(spec),
            runtime.inspect(handle),
            runtime.endpoint(handle),
            runtime.logs(handle),
            runtime.stats(handle),
            runtime.stop(handle),
            runtime.list_owned(spec.worker_id),
        ):
            with pytest.raises(RuntimeAbsent):
                await call
        own_engine.start()
        assert (await runtime.probe()).state == "healthy"
        assert await runtime.list_owned(spec.worker_id) == [handle]
        assert (await runtime.inspect(handle)).state == "exited"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said
    assert "answers again" in said[1]
    again = await runtime.start(spec)
    await answers(await runtime.endpoint(again))
    await runtime.stop(again)
    await runtime.aclose()


async def test_an_engine_that_freezes_while_it_is_used_is_unhealthy_and_recovers(
    own_engine: engines.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = runtime_at(own_engine.host)
    assert (await runtime.probe()).state == "healthy"
    assert own_engine.pid is not None
    os.kill(own_engine.pid, signal.SIGSTOP)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine_connection, "CONNECT_S", 1)
            health = await runtime.probe()
    finally:
        os.kill(own_engine.pid, signal.SIGCONT)
    assert health.state == "unhealthy"
    assert "does not answer" in health.reason
    assert (await runtime.probe()).state == "healthy"
    await runtime.aclose()


async def test_an_engine_that_crashes_loses_nothing_of_ours(own_engine: engines.Engine) -> None:
    make_image(own_engine.host, SERVICE)
    runtime = runtime_at(own_engine.host)
    spec = of_worker(SPEC)
    handle = await runtime.start(spec)
    own_engine.kill()
    with pytest.raises(RuntimeAbsent):
        await runtime.inspect(handle)
    own_engine.start()
    assert await runtime.list_owned(spec.worker_id) == [handle]
    again = await runtime.start(spec)
    await answers(await runtime.endpoint(again))
    await runtime.stop(again)
    await runtime.aclose()


async def test_an_engine_that_dies_in_the_middle_of_a_pull_is_absent(own_engine: engines.Engine, registry: str) -> None:
    repository, digest = pushed(own_engine.host, registry)
    runtime = runtime_at(own_engine.host)
    valve = Valve(registry, most_bytes=4 * MIB, then="stall")
    async with valve.open() as address:
        pulling = asyncio.create_task(runtime.pull(from_registry(address, repository, digest), lambda _: None))
        await valve.closed_up.wait()
        await asyncio.to_thread(own_engine.kill)
        with pytest.raises(RuntimeAbsent):
            await pulling
    await runtime.aclose()


@pytest.fixture
def small_engine() -> Iterator[engines.Engine]:
    """An engine whose disk has 24 MiB."""
    if engines.can_start_engine() is not None:
        need("own-engine")
    with tempfile.TemporaryDirectory(prefix="rma-small-") as folder:
        engine = engines.Engine(Path(folder) / "engine")
        data = engine.folder / "data"
        data.mkdir(parents=True, mode=0o700)
        engines.call("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(data))
        try:
            engine.start()
            yield engine
        finally:
            engine.close()


async def test_a_full_disk_is_said_with_what_to_do(
    small_engine: engines.Engine, engine_host: str, registry: str
) -> None:
    repository, digest = pushed(engine_host, registry, layer_mib=32)
    runtime = runtime_at(small_engine.host)
    with pytest.raises(OutOfSpace, match="docker system prune"):
        await runtime.pull(from_registry(registry, repository, digest), lambda _: None)
    assert (await runtime.probe()).state == "healthy"
    await runtime.aclose()


# What is said, and what is asked for


@pytest.mark.parametrize(
    ("action", "said", "kind"),
    [
        ("pull", "failed to register layer: Error processing tar file(exit status 1): write b: no space left on device",
         OutOfSpace),
        ("start", "mkdir /var/lib/docker/overlay2/0f-init: no space left on device", OutOfSpace),
        ("pull", "write /var/lib/docker/tmp/GetImageBlob1: disk quota exceeded", OutOfSpace),
        ("pull", "manifest for 127.0.0.1:5000/x:latest not found: manifest unknown: manifest unknown", ImageMissing),
        ("pull", "pull access denied for nobody/nothing, repository does not exist or may require 'docker login'",
         ImageMissing),
        ("pull", "denied: requested access to the resource is denied", ImageMissing),
        ("start", 'exec: "/service": permission denied: unknown', StartFailed),
        ("pull", 'Head "https://ghcr.io/v2/x/y/manifests/latest": unauthorized', ImageMissing),
        ("pull", "no matching manifest for linux/arm64/v8 in the manifest list entries", ImageMissing),
        ("pull", 'failed to resolve reference "docker.io/library/x:y": docker.io/library/x:y: not found', ImageMissing),
        ("pull", "invalid reference format", ImageMissing),
        ("pull", "toomanyrequests: You have reached your pull rate limit.", ImagePullFailed),
        ("pull", 'Get "https://ghcr.io/v2/": dial tcp: lookup ghcr.io: no such host', ImagePullFailed),
        ("pull", 'Get "https://ghcr.io/v2/": net/http: TLS handshake timeout', ImagePullFailed),
        ("pull", "filesystem layer verification failed for digest sha256:00", ImagePullFailed),
        ("pull", "unexpected EOF", ImagePullFailed),
        ("start", "driver failed programming external connectivity: Bind for 127.0.0.1:80: port is already allocated",
         PortTaken),
        ("start", "Ports are not available: exposing port TCP 127.0.0.1:8000", PortTaken),
        ("start", "No such image: x:latest", ImageMissing),
        ("start", 'could not select device driver "cdi" with capabilities: []', NotSupported),
        ("start", "failed to inject CDI devices: unresolvable CDI devices nvidia.com/gpu=9", NotSupported),
        ("start", "nvidia-container-cli: initialization error: nvml error: driver/library version mismatch",
         NotSupported),
        ("start", 'error gathering device information while adding custom device "/dev/kfd": no such file or directory',
         NotSupported),
        ("start", 'exec: "/service": exec format error: unknown', StartFailed),
        ("start", 'exec: "docker-init": executable file not found in $PATH', NotSupported),
        ("start", 'exec: "/nothing": stat /nothing: no such file or directory: unknown', StartFailed),
        ("start", "Minimum memory limit allowed is 6MB", StartFailed),
        ("ask", "something new", RuntimeFailure),
    ],
)  # fmt: skip
def test_what_engines_and_registries_say_is_understood(action: Action, said: str, kind: type[RuntimeFailure]) -> None:
    failure = explain(said, action, DOCKER)
    assert type(failure) is kind
    assert said in failure.message


def test_a_container_is_made_with_these_options_and_no_others() -> None:
    options = locked_down(SPEC)
    asked_for_elsewhere = {"name", "hostname", "labels", "environment", "ports", "ulimits", "log_config", "tmpfs"}
    assert {key: value for key, value in options.items() if key not in asked_for_elsewhere} == {
        "user": "65532:65532",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "privileged": False,
        "read_only": True,
        "use_config_proxy": False,
        "shm_size": 4 * MIB,
        "mem_limit": 64 * MIB,
        "memswap_limit": 64 * MIB,
        "nano_cpus": 500_000_000,
        "cpu_shares": 128,
        "pids_limit": 64,
        "oom_score_adj": 800,
        "network_mode": "bridge",
        "ipc_mode": "private",
        "cgroupns": "private",
        "init": True,
        "restart_policy": {"Name": "no"},
    }
    assert options["ports"] == {"8000/tcp": ("127.0.0.1", None)}
    assert options["name"] == "rma-0badcafe-tiny"


def test_no_more_processors_are_asked_for_than_there_are() -> None:
    many = msgspec.structs.replace(SPEC, limits=Limits(cpus=64))
    assert locked_down(many, info={"NCPU": 2})["nano_cpus"] == 2_000_000_000


def gpu(access: ContainerAccess, info: dict[str, Any]) -> dict[str, Any]:
    options = locked_down(msgspec.structs.replace(SPEC, access=access), info=info)
    return {key: options[key] for key in ("device_requests", "devices", "group_add") if key in options}


def test_a_gpu_comes_by_cdi_or_by_the_older_toolkit_or_as_device_nodes() -> None:
    named = ContainerAccess(cdi=("nvidia.com/gpu=GPU-1234",))
    [request] = gpu(named, {"CDISpecDirs": ["/etc/cdi"]})["device_requests"]
    assert (request["Driver"], request["DeviceIDs"]) == ("cdi", ["nvidia.com/gpu=GPU-1234"])
    [request] = gpu(named, {"Runtimes": {"nvidia": {}}})["device_requests"]
    assert (request["DeviceIDs"], request["Capabilities"]) == (["GPU-1234"], [["gpu", "compute", "utility"]])
    with pytest.raises(NotSupported, match="nvidia-ctk cdi generate"):
        gpu(named, {})
    nodes = gpu(ContainerAccess(device_nodes=("/dev/dri/renderD-none",)), {})
    assert nodes == {"devices": ["/dev/dri/renderD-none:/dev/dri/renderD-none:rw"], "group_add": []}


def test_an_image_that_preloads_a_library_gets_no_gpu() -> None:
    spec = msgspec.structs.replace(SPEC, access=ContainerAccess(cdi=("nvidia.com/gpu=0",)))
    image = {"Config": {"Env": ["LD_PRELOAD=/evil.so"]}}
    with pytest.raises(NotSupported, match="LD_PRELOAD"):
        locked_down(spec, image=image, info={"CDISpecDirs": ["/etc/cdi"]})
    locked_down(SPEC, image=image)


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("redis", ("redis", "latest")),
        ("ghcr.io/rma/notes:1.2", ("ghcr.io/rma/notes", "1.2")),
        ("localhost:5000/notes", ("localhost:5000/notes", "latest")),
        ("localhost:5000/notes:dev", ("localhost:5000/notes", "dev")),
    ],
)
def test_a_port_is_not_taken_for_a_tag(image: str, parts: tuple[str, str]) -> None:
    assert split_tag(image) == parts


def test_importing_the_plugin_does_not_import_the_sdk() -> None:
    heavy = "{'docker', 'requests', 'urllib3', 'psutil'}"
    code = f"import sys, rma_runtime_docker, rma_core.container_engine; sys.exit(bool({heavy} & set(sys.modules)))"
    path = os.pathsep.join([str(Path(rma_runtime_docker.__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=False, timeout=60)
    assert done.returncode == 0


def test_where_no_engine_answers_the_sdk_is_not_imported() -> None:
    code = (
        "import asyncio, sys\n"
        "from rma_runtime_docker import DockerRuntime\n"
        f"health = asyncio.run(DockerRuntime({{'host': {NO_DOCKER!r}}}).probe())\n"
        "sys.exit(health.state != 'unhealthy' or 'docker' in sys.modules)"
    )
    path = os.pathsep.join([str(Path(rma_runtime_docker.__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=False, timeout=60)
    assert done.returncode == 0


def test_the_hook_registers_one_runtime_and_contacts_nothing() -> None:
    [runtime] = rma_runtime_docker.rma_container_runtimes({"host": NO_DOCKER})
    assert (runtime.name, runtime.isolated) == ("docker", True)
