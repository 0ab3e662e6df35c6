"""What every container runtime must do, as async functions that take a `RuntimeCase` and assert.

With pytest::

    @pytest.mark.parametrize("check", runtime_contract, ids=lambda check: check.__name__)
    async def test_my_runtime_keeps_the_contract(check, my_case):
        await check(my_case)

`runtime_contract` is for all, `adoption_contract` for runtimes whose containers outlive the agent, `isolation_contract`
for runtimes that are ``isolated``. Every check starts under a worker id of its own and stops what it started.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import msgspec

from rma_core.errors import ImageMissing, RuntimeAbsent, RuntimeFailure, StartFailed
from rma_core.interfaces import (
    ContainerHandle,
    ContainerRuntime,
    ContainerSpec,
    ContainerState,
    GivenFile,
    GivenFiles,
    PullProgress,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from rma_core.interfaces import PullProgress

#: How long a check waits for a service to answer, or for a container to end, before it fails.
PATIENCE_S = 30.0
#: How often a check looks again while it waits.
LOOK_AGAIN_S = 0.05
#: How long one request to a service may take.
REQUEST_S = 5.0
#: What the service of `RuntimeCase.exits` ends with.
EXIT_CODE = 3
#: More interfaces or processes than this in a tiny service are the host's.
A_HANDFUL = 16
#: Bytes whose copying takes long enough to be given up.
COPIED_BYTES = 128 * 1024 * 1024
#: A copy is held up for so long at most.
HOLD_S = 30.0
#: Mount points that engines make in every container, beside those below /proc, /sys and /dev.
EVERY_CONTAINER_MOUNTS = (
    "/",
    "/tmp",  # noqa: S108 - the container's own
    "/run",
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/sbin/docker-init",
    "/run/podman-init",
    "/run/.containerenv",
)
#: The most that `ContainerRuntime.logs` may return, in bytes.
MAX_LOG_BYTES = 65_536


class RuntimeCase(msgspec.Struct, frozen=True, kw_only=True):
    """One runtime, and the services to try it with; their `name`, `worker_id` and `spec_hash` do not matter.

    - ``healthy`` prints the value of its variable ``GREETING`` as its first line and answers ``GET path`` with 200.
    - ``exits`` prints its ``GREETING`` and ends at once with exit code 3.
    - ``stubborn`` is like ``healthy``, but ignores a polite request to stop.
    - ``no_image`` names what nobody has.
    - ``hungry`` takes memory without end; ``None`` where the runtime cannot limit it.
    - ``absent`` is the same runtime on a machine without its engine; ``None`` where no engine can be missing.
    - ``again`` makes another object for the same engine, as a restarted agent would (for `adoption_contract`).
    - ``shell`` runs a shell command inside the healthy service, whose endpoint it is given, and returns what that
      prints (for `isolation_contract`).
    """

    runtime: ContainerRuntime
    healthy: ContainerSpec
    exits: ContainerSpec
    stubborn: ContainerSpec
    no_image: ContainerSpec
    path: str = "/"
    hungry: ContainerSpec | None = None
    absent: ContainerRuntime | None = None
    again: Callable[[], ContainerRuntime] | None = None
    shell: Callable[[str, str], Awaitable[str]] | None = None


#: One check: it returns when the runtime does right, and raises AssertionError with a sentence when not.
Check = Callable[[RuntimeCase], Awaitable[None]]


def of_worker(spec: ContainerSpec, worker_id: str = "") -> ContainerSpec:
    """Return ``spec`` for a worker of its own (or the one given), under a name that nobody else uses."""
    word = secrets.token_hex(4)
    return msgspec.structs.replace(
        spec, worker_id=worker_id or f"worker-{word}", name=f"{spec.service}-{word}", spec_hash=secrets.token_hex(8)
    )


async def fetch(endpoint: str, path: str) -> tuple[int, bytes]:
    """Return status and body of ``GET path`` at an endpoint (``http:`` or ``unix:``). Raises OSError, TimeoutError."""
    async with asyncio.timeout(REQUEST_S):
        reader, writer = await _connect(endpoint)
        try:
            writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read(-1)
        finally:
            writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if len(words) < 2 or not words[1].isdigit():  # noqa: PLR2004 - "HTTP/1.0 200 …"
        message = f"no HTTP answer: {answer[:80]!r}"
        raise ConnectionError(message)
    return int(words[1]), body


async def _connect(endpoint: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if sys.platform != "win32" and endpoint.startswith("unix:"):
        return await asyncio.open_unix_connection(endpoint.removeprefix("unix:"))
    parts = urlsplit(endpoint)
    assert parts.scheme == "http", f"an endpoint is http://… or unix:…, not {endpoint!r}"
    assert parts.hostname == "127.0.0.1", f"only this machine may reach a container, but it listens at {endpoint!r}"
    return await asyncio.open_connection(parts.hostname, parts.port)


async def answers(endpoint: str, path: str = "/") -> bytes:
    """Wait until a service answers 200 and return the body. Raises AssertionError when it does not in time."""
    last = "nothing"
    for _ in range(int(PATIENCE_S / LOOK_AGAIN_S)):
        try:
            status, body = await fetch(endpoint, path)
        except (OSError, TimeoutError) as error:
            last = repr(error)
        else:
            if status == 200:  # noqa: PLR2004 - HTTP's OK
                return body
            last = f"status {status}"
        await asyncio.sleep(LOOK_AGAIN_S)
    message = f"{endpoint}{path} did not answer 200 within {PATIENCE_S:.0f} s; last: {last}"
    raise AssertionError(message)


@asynccontextmanager
async def started(case: RuntimeCase, spec: ContainerSpec) -> AsyncIterator[ContainerHandle]:
    """Pull and start ``spec``, and stop it at the end whatever happens."""
    await case.runtime.pull(spec, _ignore)
    handle = await case.runtime.start(spec)
    try:
        yield handle
    finally:
        await case.runtime.stop(handle, grace_s=1)


def _ignore(_: PullProgress) -> None:
    """Take progress that nobody asked for."""


async def becomes(
    runtime: ContainerRuntime, handle: ContainerHandle, state: Literal["running", "exited", "missing"]
) -> ContainerState:
    """Wait until a container is in ``state``. Raises AssertionError when it is not in time."""
    seen = await runtime.inspect(handle)
    for _ in range(int(PATIENCE_S / LOOK_AGAIN_S)):
        if seen.state == state:
            return seen
        await asyncio.sleep(LOOK_AGAIN_S)
        seen = await runtime.inspect(handle)
    message = f"{handle.name} is {seen.state} ({seen.reason}), not {state}, after {PATIENCE_S:.0f} s"
    raise AssertionError(message)


async def a_working_runtime_is_healthy_and_tells_its_version(case: RuntimeCase) -> None:
    """`probe` says ``healthy``, with a version."""
    health = await case.runtime.probe()
    assert health.state == "healthy", f"probe says {health.state}: {health.reason}"
    assert health.version, "a healthy runtime tells its version"


async def an_absent_engine_is_a_state_with_a_reason(case: RuntimeCase) -> None:
    """`probe` never raises; every other method raises RuntimeAbsent."""
    if case.absent is None:
        return
    health = await case.absent.probe()
    assert health.state != "healthy", "there is no engine"
    assert health.reason, "whoever reads it must learn what to do"
    handle = unknown_handle(case.absent, case.healthy)
    calls: list[Awaitable[object]] = [
        case.absent.has_image(case.healthy),
        case.absent.pull(case.healthy, _ignore),
        case.absent.start(case.healthy),
        case.absent.inspect(handle),
        case.absent.list_owned(case.healthy.worker_id),
    ]
    for call in calls:
        await fails(call, RuntimeAbsent)


async def fails(call: Awaitable[object], kind: type[RuntimeFailure]) -> RuntimeFailure:
    """Return the failure of ``kind`` that ``call`` raises, which must carry a sentence; assert that it does."""
    try:
        answer = await call
    except kind as caught:
        failure = caught
    else:
        message = f"{kind.__name__} was expected, but the answer is {answer!r}"
        raise AssertionError(message)
    assert failure.message, f"{kind.__name__} says nothing"
    return failure


def unknown_handle(runtime: ContainerRuntime, spec: ContainerSpec) -> ContainerHandle:
    """Return a handle of a container that never was."""
    return ContainerHandle(
        runtime=runtime.name, id=secrets.token_hex(32), name="rma-never-was", service=spec.service, spec_hash="none"
    )


async def pulling_what_is_there_is_no_work(case: RuntimeCase) -> None:
    """After a `pull`, `has_image` is true, and another pull succeeds and moves nothing."""
    spec = of_worker(case.healthy)
    await case.runtime.pull(spec, _ignore)
    assert await case.runtime.has_image(spec), "the image was pulled"
    seen: list[PullProgress] = []
    await case.runtime.pull(spec, seen.append)
    assert all(p.done_bytes in (0, p.total_bytes) for p in seen), f"there was nothing to pull: {seen}"


async def an_image_that_nobody_has_is_missing(case: RuntimeCase) -> None:
    """`has_image` is false; `pull` and `start` raise ImageMissing with the image's name."""
    spec = of_worker(case.no_image)
    assert not await case.runtime.has_image(spec), "nobody has it"
    await fails(case.runtime.pull(spec, _ignore), ImageMissing)
    await fails(case.runtime.start(spec), ImageMissing)
    assert await case.runtime.list_owned(spec.worker_id) == [], "a failed start leaves nothing"


async def a_started_service_runs_and_answers(case: RuntimeCase) -> None:
    """`start` returns a handle that names what was asked for; its endpoint answers."""
    spec = of_worker(case.healthy)
    async with started(case, spec) as handle:
        named = (handle.runtime, handle.name, handle.service, handle.spec_hash)
        assert named == (case.runtime.name, spec.name, spec.service, spec.spec_hash), f"{handle}"
        assert (await case.runtime.inspect(handle)).state == "running", "start returns once it runs"
        await answers(await case.runtime.endpoint(handle), case.path)


async def a_handle_is_plain_data(case: RuntimeCase) -> None:
    """A handle that went through JSON serves as well as the one that `start` returned."""
    async with started(case, of_worker(case.healthy)) as handle:
        copy = msgspec.json.decode(msgspec.json.encode(handle), type=ContainerHandle)
        assert (await case.runtime.inspect(copy)).state == "running", "the copy names the same container"
        assert await case.runtime.endpoint(copy) == await case.runtime.endpoint(handle), "at the same address"


async def the_environment_arrives_and_output_is_kept(case: RuntimeCase) -> None:
    """The variables of the spec reach the service, and `logs` returns what it prints."""
    greeting = f"hello-{secrets.token_hex(8)}"
    spec = of_worker(msgspec.structs.replace(case.healthy, env={**case.healthy.env, "GREETING": greeting}))
    async with started(case, spec) as handle:
        await answers(await case.runtime.endpoint(handle), case.path)
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        # What it has printed may be on its way while it answers already.
        while greeting not in (logs := await case.runtime.logs(handle)):
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(LOOK_AGAIN_S)
        assert greeting in logs, f"its first line is missing from {logs[-500:]!r}"
        assert len(logs.encode()) <= MAX_LOG_BYTES, "logs are bounded"
        assert len((await case.runtime.logs(handle, tail_lines=1)).splitlines()) <= 1, "tail_lines is honoured"


async def a_running_service_has_stats(case: RuntimeCase) -> None:
    """`stats` returns what a running container uses."""
    async with started(case, of_worker(case.healthy)) as handle:
        await answers(await case.runtime.endpoint(handle), case.path)
        stats = await case.runtime.stats(handle)
        assert stats.memory_bytes > 0, f"something that runs takes memory: {stats}"
        assert stats.cpu_seconds >= 0, f"{stats}"


async def stop_ends_it_and_may_be_called_again(case: RuntimeCase) -> None:
    """After `stop` nothing answers and nothing is left; a second stop is no error."""
    spec = of_worker(case.healthy)
    async with started(case, spec) as handle:
        endpoint = await case.runtime.endpoint(handle)
        await answers(endpoint, case.path)
        await case.runtime.stop(handle, grace_s=1)
        await case.runtime.stop(handle, grace_s=1)
        assert (await case.runtime.inspect(handle)).state == "missing", "it was removed"
        assert await case.runtime.list_owned(spec.worker_id) == [], "nothing is left"
        try:
            await fetch(endpoint, case.path)
        except OSError:
            return
        message = f"something still answers at {endpoint}"
        raise AssertionError(message)


async def what_will_not_stop_is_killed(case: RuntimeCase) -> None:
    """A service that ignores the polite request is gone when `stop` returns."""
    async with started(case, of_worker(case.stubborn)) as handle:
        await answers(await case.runtime.endpoint(handle), case.path)
        async with asyncio.timeout(PATIENCE_S):
            await case.runtime.stop(handle, grace_s=0.5)
        assert (await case.runtime.inspect(handle)).state == "missing", "it was removed"


async def an_unknown_handle_is_missing_and_no_crash(case: RuntimeCase) -> None:
    """A container that never was: missing, silent, stopped already, and without an address or stats."""
    handle = unknown_handle(case.runtime, case.healthy)
    assert (await case.runtime.inspect(handle)).state == "missing", "it never was"
    assert await case.runtime.logs(handle) == "", "it never spoke"
    await case.runtime.stop(handle)
    await fails(case.runtime.stats(handle), RuntimeFailure)
    await fails(case.runtime.endpoint(handle), RuntimeFailure)


async def one_that_ends_at_once_tells_its_last_words(case: RuntimeCase) -> None:
    """Either `start` raises StartFailed and leaves nothing, or `inspect` says ``exited``; both with the last words."""
    words = f"no-model-{secrets.token_hex(4)}"
    spec = of_worker(msgspec.structs.replace(case.exits, env={**case.exits.env, "GREETING": words}))
    await case.runtime.pull(spec, _ignore)
    handle: ContainerHandle | None = None
    said = ""
    try:
        handle = await case.runtime.start(spec)
    except StartFailed as failure:
        said = failure.message
    if handle is not None:
        await _ended_with(case, handle, words)
        return
    assert words in said, f"its last words are missing from {said!r}"
    assert str(EXIT_CODE) in said, f"its exit code is missing from {said!r}"
    assert await case.runtime.list_owned(spec.worker_id) == [], "a failed start leaves nothing"


async def _ended_with(case: RuntimeCase, handle: ContainerHandle, words: str) -> None:
    """Assert that a container has ended as ``exits`` does, then stop it."""
    try:
        ended = await becomes(case.runtime, handle, "exited")
        assert ended.exit_code == EXIT_CODE, f"{ended}"
        assert words in ended.reason, f"its last words are missing from {ended.reason!r}"
        assert words in await case.runtime.logs(handle), "its logs stay until it is stopped"
        await fails(case.runtime.stats(handle), RuntimeFailure)
    finally:
        await case.runtime.stop(handle)


async def too_much_memory_is_said(case: RuntimeCase) -> None:
    """What takes more memory than its limit ends, and the reason says so."""
    if case.hungry is None:
        return
    async with started(case, of_worker(case.hungry)) as handle:
        ended = await becomes(case.runtime, handle, "exited")
        assert "memory" in ended.reason, f"the reason is {ended.reason!r}"


async def a_second_start_of_one_name_replaces_the_first(case: RuntimeCase) -> None:
    """A leftover of this worker under the same name never blocks a start."""
    spec = of_worker(case.healthy)
    async with started(case, spec) as first, started(case, spec) as second:
        await answers(await case.runtime.endpoint(second), case.path)
        owned = [h.id for h in await case.runtime.list_owned(spec.worker_id)]
        assert owned == [second.id], f"one name, one container: {owned}, first {first.id}"


async def services_with_one_port_run_side_by_side(case: RuntimeCase) -> None:
    """The port of a spec is the service's own: two of them are reached at different endpoints, started at once."""
    worker_id = of_worker(case.healthy).worker_id
    one, other = of_worker(case.healthy, worker_id), of_worker(case.healthy, worker_id)
    await case.runtime.pull(one, _ignore)
    handles = await asyncio.gather(case.runtime.start(one), case.runtime.start(other))
    try:
        endpoints = {await case.runtime.endpoint(h) for h in handles}
        assert len(endpoints) == len(handles), f"two services, one address: {endpoints}"
        for endpoint in endpoints:
            await answers(endpoint, case.path)
    finally:
        await asyncio.gather(*(case.runtime.stop(h, grace_s=1) for h in handles))


async def a_worker_sees_only_its_own(case: RuntimeCase) -> None:
    """`list_owned` tells workers apart, and its handles serve like those of `start`."""
    mine, theirs = of_worker(case.healthy), of_worker(case.healthy)
    async with started(case, mine) as handle, started(case, theirs):
        owned = await case.runtime.list_owned(mine.worker_id)
        assert owned == [handle], f"exactly the one that was started: {owned}"
        assert await case.runtime.list_owned("worker-00000000") == [], "nobody has that id"


async def a_restarted_agent_adopts_what_runs(case: RuntimeCase) -> None:
    """Another object for the same engine finds, reaches and stops what the first one started."""
    assert case.again is not None, "the adoption contract needs `again`"
    spec = of_worker(case.healthy)
    async with started(case, spec) as handle:
        endpoint = await case.runtime.endpoint(handle)
        other = case.again()
        try:
            assert await other.list_owned(spec.worker_id) == [handle], "found by its labels"
            assert (await other.inspect(handle)).state == "running", "it went on running"
            assert await other.endpoint(handle) == endpoint, "at the same address"
            await answers(endpoint, case.path)
            await other.stop(handle, grace_s=1)
            assert (await case.runtime.inspect(handle)).state == "missing", "one object's stop is the other's news"
        finally:
            await other.aclose()


async def closing_leaves_containers_running(case: RuntimeCase) -> None:
    """`aclose` lets go of connections only; it may be called twice."""
    assert case.again is not None, "the adoption contract needs `again`"
    spec = of_worker(case.healthy)
    other = case.again()
    await case.runtime.pull(spec, _ignore)
    assert await other.has_image(spec), "the image is there for one object and not for the other"
    handle = await other.start(spec)
    await other.aclose()
    await other.aclose()
    try:
        assert (await case.runtime.inspect(handle)).state == "running", "closing stopped it"
    finally:
        await case.runtime.stop(handle, grace_s=1)


async def one_that_ended_is_still_listed(case: RuntimeCase) -> None:
    """`list_owned` returns stopped containers too, or they would stay on the machine for ever."""
    assert case.again is not None, "the adoption contract needs `again`"
    if case.hungry is None:
        return
    spec = of_worker(case.hungry)
    async with started(case, spec) as handle:
        await becomes(case.runtime, handle, "exited")
        assert await case.runtime.list_owned(spec.worker_id) == [handle], "ended, but not gone"


async def inside(case: RuntimeCase, handle: ContainerHandle, command: str) -> str:
    """Return what a shell command prints inside a running service."""
    assert case.shell is not None, "the isolation contract needs `shell`"
    endpoint = await case.runtime.endpoint(handle)
    await answers(endpoint, case.path)
    return (await case.shell(endpoint, command)).strip()


async def it_has_no_capabilities_and_can_gain_none(case: RuntimeCase) -> None:
    """Every capability set is empty, no-new-privileges is on, seccomp filters, and the user is not root."""
    async with started(case, of_worker(case.healthy)) as handle:
        lines = (await inside(case, handle, "cat /proc/self/status")).splitlines()
        status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
        sets = {name: status.get(name, "") for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
        assert all(value and int(value, 16) == 0 for value in sets.values()), f"capabilities: {sets}"
        assert status.get("NoNewPrivs") == "1", "no-new-privileges is off"
        assert status.get("Seccomp") == "2", "no system call is filtered"
        assert "0" not in status.get("Uid", "0").split(), f"it runs as root: {status.get('Uid')}"


async def its_file_system_is_read_only(case: RuntimeCase) -> None:
    """Nothing outside /tmp, /run and /dev/shm can be written; /tmp can, is bounded and runs no programs."""
    async with started(case, of_worker(case.healthy)) as handle:
        roots = [line.split() for line in (await inside(case, handle, "cat /proc/mounts")).splitlines()]
        options = {words[1]: words[3].split(",") for words in roots}
        assert "ro" in options["/"], f"the root is writable: {options['/']}"
        wrote = await inside(case, handle, "(echo x > /written) 2>/dev/null && echo yes || echo no")
        assert wrote == "no", "a file at / could be written"
        wrote = await inside(case, handle, "(echo x > /tmp/written) 2>/dev/null && echo yes || echo no")
        assert wrote == "yes", "no file in /tmp can be written"
        for place in ("/tmp", "/run"):  # noqa: S108 - names inside the container
            missing = {"rw", "noexec", "nosuid", "nodev"} - set(options.get(place, []))
            assert not missing, f"{place} lacks {sorted(missing)}: {options.get(place)}"
        kib = case.healthy.limits.tmp_bytes // 1024
        assert f"size={kib}k" in options["/tmp"], f"/tmp is not bounded to {kib} KiB: {options['/tmp']}"  # noqa: S108


async def it_sees_nothing_of_the_host(case: RuntimeCase) -> None:
    """No engine's socket, no mount of the host's, its own processes only, no host network."""
    async with started(case, of_worker(case.healthy)) as handle:
        sockets = await inside(
            case, handle, "ls -d /var/run/docker.sock /run/docker.sock /run/podman /run/containerd 2>/dev/null; true"
        )
        assert sockets == "", f"an engine's socket is inside: {sockets}"
        mounts = [line.split()[1] for line in (await inside(case, handle, "cat /proc/mounts")).splitlines()]
        strange = [m for m in mounts if not _expected_mount(m)]
        assert not strange, f"mounted inside: {strange}"
        for command in ("ls /sys/class/net | wc -l", "ls /proc | grep -c '^[0-9]'"):
            count = int(await inside(case, handle, command))
            assert count < A_HANDFUL, f"the host's interfaces or processes are inside: {command} says {count}"


def _expected_mount(where: str) -> bool:
    """Tell whether a mount point is one that every container has."""
    return where in EVERY_CONTAINER_MOUNTS or where.startswith(("/proc", "/sys", "/dev"))


async def its_limits_are_the_specs(case: RuntimeCase) -> None:
    """Memory, processes and CPU time are limited to what the spec says, as seen by the kernel (cgroup v1 or v2)."""
    limits = case.healthy.limits
    async with started(case, of_worker(case.healthy)) as handle:
        memory = await inside(case, handle, _first("memory.max", "memory/memory.limit_in_bytes"))
        assert memory == str(limits.memory_bytes), f"memory limit {memory}, not {limits.memory_bytes}"
        pids = await inside(case, handle, _first("pids.max", "pids/pids.max"))
        assert pids == str(limits.pids), f"limit of processes {pids}, not {limits.pids}"
        quota = await inside(case, handle, _first("cpu.max", "cpu/cpu.cfs_quota_us"))
        period = await inside(case, handle, _first("cpu.max", "cpu/cpu.cfs_period_us"))
        share = float(quota.split()[0]) / float(period.split()[-1])
        assert abs(share - limits.cpus) < 0.01, f"CPU limit {share}, not {limits.cpus}"  # noqa: PLR2004 - rounding


def _first(v2: str, v1: str) -> str:
    """Return a command that prints a cgroup file of version 2, else of version 1."""
    return f"cat /sys/fs/cgroup/{v2} 2>/dev/null || cat /sys/fs/cgroup/{v1}"


async def a_fork_bomb_stays_inside(case: RuntimeCase) -> None:
    """More processes than the limit cannot be made, and the service lives on."""
    count = case.healthy.limits.pids + 50
    async with started(case, of_worker(case.healthy)) as handle:
        command = f"i=0; while [ $i -lt {count} ]; do sleep 2 & i=$((i+1)); done 2>&1; echo made them all"
        said = await inside(case, handle, command)
        assert "fork" in said, f"{count} processes could be made: {said[-200:]}"
        assert "made them all" not in said, f"{count} processes could be made: {said[-200:]}"
        await answers(await case.runtime.endpoint(handle), case.path)


@contextmanager
def given_files(spec: ContainerSpec, *contents: bytes) -> Iterator[ContainerSpec]:
    """Return a spec of a worker of its own with files of these contents, which only this user can read."""
    with tempfile.TemporaryDirectory(prefix="rma-given-") as folder:
        files = []
        for number, content in enumerate(contents):
            path = Path(folder) / f"file-{number}"
            path.write_bytes(content)
            path.chmod(0o600)
            files.append(GivenFile(name=f"file-{number}", path=str(path), size_bytes=len(content)))
        given = GivenFiles(variable="GIVEN", key=secrets.token_hex(16), files=tuple(files))
        yield msgspec.structs.replace(of_worker(spec), files=given)


async def its_files_can_be_read_and_not_written(case: RuntimeCase) -> None:
    """`pull` brings copies of the files that a spec gives, and the service can read them and nothing more."""
    words = secrets.token_hex(8)
    with given_files(case.healthy, words.encode(), b"x" * 1_000_001) as spec:
        await _files_are_missing(case, spec)
        async with started(case, spec) as handle:
            assert await case.runtime.has_image(spec), "after `pull`, `start` needs nothing more"
            assert await inside(case, handle, 'cat "$GIVEN/file-0"') == words, "the file is not inside"
            assert await inside(case, handle, 'wc -c < "$GIVEN/file-1"') == "1000001", "the second one is not whole"
            for command in ('echo x > "$GIVEN/file-0"', 'echo x > "$GIVEN/new"', 'mv "$GIVEN/file-0" "$GIVEN/other"'):
                tried = await inside(case, handle, f"({command}) 2>/dev/null && echo yes || echo no")
                assert tried == "no", f"it could be done: {command}"
        await case.runtime.forget_files(spec.worker_id, {spec.files.key if spec.files else ""})
        assert await case.runtime.has_image(spec), "what is kept is there after its container has gone"
        await case.runtime.forget_files(spec.worker_id, ())
        await _files_are_missing(case, spec)


async def _files_are_missing(case: RuntimeCase, spec: ContainerSpec) -> None:
    assert not await case.runtime.has_image(spec), "without its files a service cannot start"
    without = msgspec.structs.replace(spec, files=None)
    await case.runtime.pull(without, _ignore)
    assert await case.runtime.has_image(without), "the image alone is there"


async def one_file_is_named_itself_and_another_worker_has_its_own(case: RuntimeCase) -> None:
    """With one file the variable is its path; a worker's copies are not another's to remove."""
    with given_files(case.healthy, b"mine") as mine, given_files(case.healthy, b"its") as its:
        async with started(case, mine) as one, started(case, its) as other:
            assert await inside(case, one, 'cat "$GIVEN"') == "mine", "the variable is not the file's path"
            assert await inside(case, other, 'cat "$GIVEN"') == "its", "the variable is not the file's path"
        await case.runtime.forget_files(mine.worker_id, ())
        assert await case.runtime.has_image(its), "another worker's copy was removed"
        await case.runtime.forget_files(its.worker_id, ())


async def a_file_that_is_not_there_is_said(case: RuntimeCase) -> None:
    """`pull` fails with a reason, and leaves nothing behind that would pass for a copy."""
    with given_files(case.healthy, b"x") as spec:
        pass
    said = ""
    try:
        await case.runtime.pull(spec, _ignore)
    except RuntimeFailure as failure:
        said = failure.message
    assert "file-0" in said, f"it should fail and name the file, but says {said!r}"
    assert not await case.runtime.has_image(spec), "half a copy passes for a whole one"


async def a_copy_that_is_given_up_is_none_and_can_be_made_anew(case: RuntimeCase) -> None:
    """A `pull` that is cancelled while it copies leaves nothing that would pass for the files."""
    loop, here = asyncio.get_running_loop(), threading.get_ident()
    begun, given_up = asyncio.Event(), threading.Event()

    def told(step: PullProgress) -> None:
        if step.done_bytes:
            loop.call_soon_threadsafe(begun.set)
            if threading.get_ident() != here:
                # Whatever else this machine does, the copy is not done before it is given up.
                given_up.wait(HOLD_S)

    with given_files(case.healthy, bytes(COPIED_BYTES)) as spec:
        copying = asyncio.create_task(case.runtime.pull(spec, told))
        waiting = asyncio.create_task(begun.wait())
        await asyncio.wait({copying, waiting}, return_when=asyncio.FIRST_COMPLETED)
        assert begun.is_set(), "it says nothing of the bytes it copies"
        assert not copying.done(), "it was too quick to be given up"
        copying.cancel()
        await asyncio.sleep(0)
        given_up.set()
        await asyncio.wait({copying})
        waiting.cancel()
        assert copying.cancelled(), "it goes on although nobody waits for it"
        assert not await case.runtime.has_image(spec), "half a copy passes for a whole one"
        await case.runtime.pull(spec, _ignore)
        assert await case.runtime.has_image(spec), "after one that was given up there is no other"
        await case.runtime.forget_files(spec.worker_id, ())


runtime_contract: tuple[Check, ...] = (
    a_working_runtime_is_healthy_and_tells_its_version,
    an_absent_engine_is_a_state_with_a_reason,
    pulling_what_is_there_is_no_work,
    an_image_that_nobody_has_is_missing,
    a_started_service_runs_and_answers,
    a_handle_is_plain_data,
    the_environment_arrives_and_output_is_kept,
    a_running_service_has_stats,
    stop_ends_it_and_may_be_called_again,
    what_will_not_stop_is_killed,
    an_unknown_handle_is_missing_and_no_crash,
    one_that_ends_at_once_tells_its_last_words,
    too_much_memory_is_said,
    a_second_start_of_one_name_replaces_the_first,
    services_with_one_port_run_side_by_side,
    a_worker_sees_only_its_own,
)

adoption_contract: tuple[Check, ...] = (
    a_restarted_agent_adopts_what_runs,
    closing_leaves_containers_running,
    one_that_ended_is_still_listed,
)

isolation_contract: tuple[Check, ...] = (
    it_has_no_capabilities_and_can_gain_none,
    its_file_system_is_read_only,
    it_sees_nothing_of_the_host,
    its_limits_are_the_specs,
    a_fork_bomb_stays_inside,
    its_files_can_be_read_and_not_written,
    one_file_is_named_itself_and_another_worker_has_its_own,
    a_file_that_is_not_there_is_said,
    a_copy_that_is_given_up_is_none_and_can_be_made_anew,
)
