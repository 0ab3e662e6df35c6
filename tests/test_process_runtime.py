"""The process runtime with a real service of its own, real pip and real processes."""

from __future__ import annotations

import ast
import asyncio
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import psutil
import pytest

from rma_core import process_tree
from rma_core.builtin import process_install, process_runtime, process_service
from rma_core.builtin.process_runtime import ProcessRuntime
from rma_core.catalog import Limits
from rma_core.errors import (
    ImageMissing,
    ImagePullFailed,
    NotSupported,
    OutOfSpace,
    PortTaken,
    RuntimeAbsent,
    StartFailed,
)
from rma_core.interfaces import GivenFile, GivenFiles
from rma_core.testing import RuntimeCase, runtime_contract
from rma_core.testing.runtimes import answers, becomes
from tests.needs import need
from tests.pools import runs
from tests.tiny_service import tiny_spec, write_wheel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from rma_core.interfaces import PullProgress

NOTES = Path(__file__).parent.parent / "containers" / "notes"
PATIENCE_S = 30.0
T = TypeVar("T")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    write_wheel(folder)
    return folder


@pytest.fixture(scope="session")
def installed(wheels: Path) -> Iterator[Path]:
    """A state folder, under a short path, in which the service is installed already."""
    home = Path(tempfile.mkdtemp(prefix="rma-"))
    runtime = ProcessRuntime(home=str(home), sources=[str(wheels)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        asyncio.run(runtime.pull(tiny_spec(), ignore))
    yield home
    shutil.rmtree(home)


@pytest.fixture
async def runtime(installed: Path, wheels: Path) -> AsyncIterator[ProcessRuntime]:
    runtime = ProcessRuntime(home=str(installed), sources=[str(wheels)], grace_s=0.5)
    yield runtime
    await runtime.aclose()
    assert list((installed / "run").iterdir()) == []
    assert process_tree.marked(str(installed)) == []


@pytest.fixture
async def empty(tmp_path: Path, wheels: Path) -> AsyncIterator[ProcessRuntime]:
    """A runtime under a path too long for a Unix socket, with nothing installed."""
    runtime = ProcessRuntime(home=str(tmp_path / ("long" * 25)), sources=[str(wheels)], grace_s=0.5)
    yield runtime
    await runtime.aclose()


@pytest.fixture(autouse=True)
def _offline_and_patient(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Keep pip from any index, except where a test is about one; see a crash at the start on a slow machine too."""
    monkeypatch.setattr(process_runtime, "SETTLE_S", PATIENCE_S)
    if "notes" not in request.node.name:
        monkeypatch.setenv("PIP_NO_INDEX", "1")


def ignore(_: PullProgress) -> None:
    """Take progress that nobody asked for."""


def case_of(runtime: ProcessRuntime) -> RuntimeCase:
    return RuntimeCase(
        runtime=runtime,
        healthy=tiny_spec(),
        exits=tiny_spec("exits"),
        stubborn=tiny_spec("stubborn"),
        no_image=tiny_spec(distribution="rma-nobody-has-this"),
        hungry=tiny_spec("hungry", limits=Limits(memory="100MB")),
    )


@pytest.mark.parametrize("check", runtime_contract, ids=lambda check: str(check.__name__))
async def test_the_process_runtime_keeps_the_contract(
    check: Callable[[RuntimeCase], Awaitable[None]], runtime: ProcessRuntime
) -> None:
    await check(case_of(runtime))


@pytest.mark.parametrize("check", runtime_contract, ids=lambda check: str(check.__name__))
async def test_the_process_runtime_keeps_the_contract_on_ports(
    check: Callable[[RuntimeCase], Awaitable[None]], empty: ProcessRuntime
) -> None:
    await check(case_of(empty))


async def test_a_service_listens_on_a_socket_only_its_owner_can_reach(runtime: ProcessRuntime) -> None:
    handle = await runtime.start(tiny_spec())
    assert_private_socket(Path((await runtime.endpoint(handle)).removeprefix("unix:")))


def assert_private_socket(path: Path) -> None:
    assert path.is_socket()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0


async def test_a_path_too_long_for_a_socket_means_a_port_on_loopback(empty: ProcessRuntime) -> None:
    await empty.pull(tiny_spec(), ignore)
    handle = await empty.start(tiny_spec())
    endpoint = await empty.endpoint(handle)
    assert endpoint.startswith("http://127.0.0.1:")
    await answers(endpoint)


async def test_a_service_sees_nothing_of_the_agents_environment(
    runtime: ProcessRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RMA_JOIN_TOKEN", "rmaj_secret")
    handle = await runtime.start(tiny_spec(GREETING="hello"))
    body = await answers(await runtime.endpoint(handle), "/environment")
    names = set(ast.literal_eval(body.decode()))
    assert names <= {"GREETING", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "MODE", "PATH", "RMA_SUPERVISED", "TEMP", "TMP",
                     "TMPDIR", "TZ"}  # fmt: skip
    assert "GREETING" in names
    assert (await answers(await runtime.endpoint(handle), "/cwd")).decode().startswith(str(runtime._home))


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONPATH", "PATH", "HTTPS_PROXY", "RMA_SUPERVISED"])
async def test_a_catalog_cannot_make_a_process_load_other_code(runtime: ProcessRuntime, name: str) -> None:
    with pytest.raises(NotSupported, match=name):
        await runtime.start(tiny_spec(more={name: "/tmp/evil"}))


async def test_a_crash_at_the_start_is_told_with_the_last_words(runtime: ProcessRuntime) -> None:
    with pytest.raises(StartFailed, match=r"exit code 1.*the model file is not there"):
        await runtime.start(tiny_spec("crashes"))


async def test_a_crash_in_native_code_is_called_so(runtime: ProcessRuntime) -> None:
    with pytest.raises(StartFailed, match="SIGABRT"):
        await runtime.start(tiny_spec("aborts"))


async def test_a_port_taken_again_and_again_is_its_own_failure(empty: ProcessRuntime) -> None:
    await empty.pull(tiny_spec(), ignore)
    with pytest.raises(PortTaken, match="3 times"):
        await empty.start(tiny_spec("port-taken"))


async def test_megabytes_of_output_are_kept_within_bounds(runtime: ProcessRuntime, installed: Path) -> None:
    handle = await runtime.start(tiny_spec("loud"))
    await answers(await runtime.endpoint(handle))
    # Who keeps it may not have read all of it when the service answers.
    logs = await once(lambda: runtime.logs(handle, tail_lines=1000), lambda found: found.splitlines()[-1:] == ["ready"])
    assert len(logs.encode()) <= process_service.LOG_BYTES
    folder = installed / "run" / handle.id
    assert sum(file.stat().st_size for file in folder.glob("log*")) < 2.5 * 1024 * 1024


async def test_a_sudden_hunger_for_memory_fails_inside_the_service(runtime: ProcessRuntime) -> None:
    with pytest.raises(StartFailed, match="out of memory, its limit is 100MB"):
        await runtime.start(tiny_spec("gobbles", limits=Limits(memory="100MB")))


async def test_more_processes_than_the_limit_end_the_service(runtime: ProcessRuntime) -> None:
    handle = await runtime.start(tiny_spec("bomb", limits=Limits(pids=20)))
    state = await becomes(runtime, handle, "exited")
    assert "more than its limit of 20" in state.reason


@pytest.mark.parametrize("mode", ["daemon", "hidden-daemon"])
async def test_what_left_its_parents_is_gone_after_stop(runtime: ProcessRuntime, tmp_path: Path, mode: str) -> None:
    handle = await runtime.start(tiny_spec(mode, PIDFILE=str(tmp_path / "pid")))
    await answers(await runtime.endpoint(handle))
    daemon = await process_in(tmp_path / "pid")
    await runtime.stop(handle, grace_s=0.2)
    assert not runs(daemon)


async def process_in(path: Path) -> psutil.Process:
    await until(path.exists)
    return psutil.Process(int(await asyncio.to_thread(path.read_text)))


async def once(look: Callable[[], Awaitable[T]], good: Callable[[T], bool]) -> T:
    """Look until what is there is good; return that."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if good(found := await look()):
                return found
            await asyncio.sleep(0.05)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what other processes do comes with no event
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("who", ["guard", "keeper"])
@pytest.mark.parametrize("mode", ["daemon", "hidden-daemon"])
async def test_half_a_supervisor_killed_still_ends_everything(
    runtime: ProcessRuntime, tmp_path: Path, who: str, mode: str
) -> None:
    handle = await runtime.start(tiny_spec(mode, PIDFILE=str(tmp_path / "pid")))
    await answers(await runtime.endpoint(handle))
    daemon = await process_in(tmp_path / "pid")
    program = runtime._runs[handle.id].program
    assert program.started is not None
    service = psutil.Process(program.started.pid)
    os.kill(program.keeper.pid if who == "keeper" else program._process.pid, signal.SIGKILL)
    state = await becomes(runtime, handle, "exited")
    await asyncio.wait_for(program.gone.wait(), PATIENCE_S)
    assert state.reason
    assert not runs(daemon)
    assert not runs(service)


async def test_a_whole_supervisor_killed_leaves_nothing_that_bears_its_mark(
    runtime: ProcessRuntime, tmp_path: Path
) -> None:
    handle = await runtime.start(tiny_spec("daemon", PIDFILE=str(tmp_path / "pid")))
    daemon = await process_in(tmp_path / "pid")
    program = runtime._runs[handle.id].program
    guard = psutil.Process(program._process.pid)
    guard.suspend()
    os.kill(program.keeper.pid, signal.SIGKILL)
    guard.kill()
    await asyncio.wait_for(program.gone.wait(), PATIENCE_S)
    assert "supervisor was killed" in (await runtime.inspect(handle)).reason
    assert not runs(daemon)


AGENT = """
import asyncio, sys
from rma_core.builtin.process_runtime import ProcessRuntime
from tests.tiny_service import tiny_spec
async def main():
    runtime = ProcessRuntime(home=sys.argv[1], sources=[sys.argv[2]], grace_s=0.5)
    handle = await runtime.start(tiny_spec("daemon", PIDFILE=sys.argv[3]))
    program = runtime._runs[handle.id].program
    print(program._process.pid, program.keeper.pid, program.started.pid, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


async def an_agent(home: Path, wheels: Path, pid_file: Path) -> tuple[asyncio.subprocess.Process, list[psutil.Process]]:
    """Start a real agent process that runs the service; return it and all that must end with it."""
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AGENT, str(home), str(wheels), str(pid_file),
        stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert agent.stdout is not None
    line = await asyncio.wait_for(agent.stdout.readline(), PATIENCE_S)
    return agent, [*(psutil.Process(int(pid)) for pid in line.split()), await process_in(pid_file)]


async def test_everything_ends_when_the_agent_is_killed(runtime: ProcessRuntime, wheels: Path, tmp_path: Path) -> None:
    agent, others = await an_agent(runtime._state_folder(), wheels, tmp_path / "pid")
    agent.kill()
    await agent.wait()
    await until(lambda: not any(runs(p) for p in others))
    await runtime.list_owned("worker-00000001")


async def test_what_a_killed_agent_and_its_killed_supervisor_left_is_swept_up(
    runtime: ProcessRuntime, wheels: Path, tmp_path: Path
) -> None:
    agent, (guard, keeper, service, daemon) = await an_agent(runtime._state_folder(), wheels, tmp_path / "pid")
    agent.send_signal(signal.SIGSTOP)
    guard.suspend()
    keeper.kill()
    guard.kill()
    agent.kill()
    await agent.wait()
    await until(lambda: not any(map(runs, (service, keeper, guard))))
    assert runs(daemon)
    assert await runtime.list_owned("worker-00000001") == []
    await until(lambda: not runs(daemon))


async def test_a_living_supervisor_of_another_agent_is_left_alone(
    runtime: ProcessRuntime, wheels: Path, tmp_path: Path
) -> None:
    agent, others = await an_agent(runtime._state_folder(), wheels, tmp_path / "pid")
    assert await runtime.list_owned("worker-00000001") == []
    assert all(runs(p) for p in others)
    agent.kill()
    await agent.wait()
    await until(lambda: not any(runs(p) for p in others))
    runtime._swept = False
    await runtime.list_owned("worker-00000001")


async def test_closing_the_runtime_ends_its_services(installed: Path, wheels: Path) -> None:
    runtime = ProcessRuntime(home=str(installed), sources=[str(wheels)], grace_s=0.5)
    handle = await runtime.start(tiny_spec("stubborn"))
    service = psutil.Process(runtime._runs[handle.id].program.started.pid)  # type: ignore[union-attr]
    await asyncio.gather(runtime.stop(handle, grace_s=0.1), runtime.aclose())
    assert not runs(service)


async def test_stats_count_the_whole_tree(runtime: ProcessRuntime, tmp_path: Path) -> None:
    handle = await runtime.start(tiny_spec("daemon", PIDFILE=str(tmp_path / "pid")))
    await process_in(tmp_path / "pid")
    # Who started the two may still be on its way out.
    stats = await once(lambda: runtime.stats(handle), lambda found: found.pids == 2)
    assert stats.memory_bytes > 10_000_000
    assert stats.cpu_seconds > 0


async def test_without_folders_the_reason_names_the_setting(tmp_path: Path) -> None:
    runtime = ProcessRuntime(home=str(tmp_path), sources=[])
    health = await runtime.probe()
    assert (health.state, "service_sources" in health.reason) == ("unhealthy", True)
    with pytest.raises(ImageMissing, match="service_sources"):
        await runtime.pull(tiny_spec(), ignore)


async def test_without_a_state_folder_the_runtime_is_absent() -> None:
    (runtime,) = process_runtime.rma_container_runtimes({})
    assert (await runtime.probe()).state == "unhealthy"
    with pytest.raises(RuntimeAbsent, match="home"):
        await runtime.list_owned("worker-00000001")


async def test_a_python_without_pip_and_ensurepip_is_told_with_what_to_install(
    empty: ProcessRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    health = await empty.probe()
    assert health.state == "unhealthy"
    assert "python3-venv" in health.reason
    with pytest.raises(RuntimeAbsent, match="python3-venv"):
        await empty.pull(tiny_spec(), ignore)


async def test_an_agent_without_pip_uses_the_one_that_python_brings(
    empty: ProcessRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_install, "pip_version", lambda: ())
    await empty.pull(tiny_spec(), ignore)
    handle = await empty.start(tiny_spec())
    assert (await empty.inspect(handle)).state == "running"


async def test_a_service_for_containers_only_is_said_to_be_missing(runtime: ProcessRuntime) -> None:
    spec = msgspec.structs.replace(tiny_spec(), process=None)
    assert not await runtime.has_image(spec)
    with pytest.raises(ImageMissing, match="in containers only"):
        await runtime.pull(spec, ignore)


async def test_a_new_version_gets_an_environment_and_the_old_one_goes_once_unused(tmp_path: Path) -> None:
    wheels, home = tmp_path / "wheels", tmp_path / "h"
    write_wheel(wheels)
    runtime = ProcessRuntime(home=str(home), sources=[str(wheels)])
    await runtime.pull(tiny_spec(), ignore)
    handle = await runtime.start(tiny_spec())
    write_wheel(wheels, version="1.10")
    write_wheel(wheels, version="1.9")
    assert not await runtime.has_image(tiny_spec())
    await runtime.pull(tiny_spec(), ignore)
    assert len(list((home / "services").iterdir())) == 2
    await runtime.stop(handle)
    write_wheel(wheels, version="1.11")
    await runtime.pull(tiny_spec(), ignore)
    (environment,) = (home / "services").iterdir()
    assert list(environment.glob("**/rma_tiny-1.11.dist-info"))
    await runtime.aclose()


async def test_a_half_made_environment_is_made_anew(empty: ProcessRuntime) -> None:
    source = process_install.find_source("rma-tiny", empty._folders)
    assert source is not None
    environment = process_install.environment_of(empty._state_folder(), source)
    environment.mkdir(parents=True)
    (environment / "left-over").touch()
    assert not await empty.has_image(tiny_spec())
    notes: list[str] = []
    await empty.pull(tiny_spec(), lambda p: notes.append(p.note))
    assert await empty.has_image(tiny_spec())
    assert not (environment / "left-over").exists()
    assert "installing 1 package" in notes
    handle = await empty.start(tiny_spec())
    assert (await empty.inspect(handle)).state == "running"


async def test_what_pip_complains_about_is_in_the_failure_and_nothing_stays(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", requires="rma-there-is-no-such-thing-at-all==9")
    runtime = ProcessRuntime(home=str(tmp_path / "h"), sources=[str(tmp_path / "wheels")])
    with pytest.raises(ImagePullFailed, match="rma-there-is-no-such-thing-at-all"):
        await runtime.pull(tiny_spec(), ignore)
    assert list((tmp_path / "h" / "services").iterdir()) == []
    assert list((tmp_path / "h" / "run").iterdir()) == []


def slow_project(folder: Path, backend: str) -> None:
    """Write a source project whose build does what ``backend`` says."""
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "rma-tiny"\nversion = "1"\n'
    )
    (folder / "backend.py").write_text(
        f"def build_wheel(*args, **options):\n{backend}\ndef get_requires_for_build_wheel(options=None): return []\n"
    )


async def test_a_cancelled_pull_ends_pip_and_leaves_nothing(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    slow_project(
        tmp_path / "sources" / "tiny",
        f"    import os, time\n    open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n    time.sleep(1000)",
    )
    runtime = ProcessRuntime(home=str(tmp_path / "h"), sources=[str(tmp_path / "sources")])
    pulling = asyncio.create_task(runtime.pull(tiny_spec(), ignore))
    await until(lambda: pid_file.exists() and bool(pid_file.read_text()))
    builder = psutil.Process(int(pid_file.read_text()))
    pulling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    assert not runs(builder)
    assert list((tmp_path / "h" / "services").iterdir()) == []
    assert list((tmp_path / "h" / "run").iterdir()) == []


async def test_a_silent_pip_is_stopped_and_said_to_be_stuck(tmp_path: Path) -> None:
    slow_project(tmp_path / "sources" / "tiny", "    import time; time.sleep(1000)")
    source = process_install.find_source("rma-tiny", [tmp_path / "sources"])
    assert source is not None
    with pytest.raises(ImagePullFailed, match="saying nothing for 3 s since: "):
        await process_install.install(source, home=tmp_path / "h", folders=[], progress=ignore, silence_s=3)
    assert process_tree.marked(str(tmp_path)) == []


async def test_a_full_disk_is_called_so(tmp_path: Path) -> None:
    slow_project(tmp_path / "sources" / "tiny", "    raise OSError(28, 'No space left on device')")
    runtime = ProcessRuntime(home=str(tmp_path / "h"), sources=[str(tmp_path / "sources")])
    with pytest.raises(OutOfSpace, match="is full"):
        await runtime.pull(tiny_spec(), ignore)


def test_a_source_is_known_by_its_content_and_not_by_what_building_left(tmp_path: Path) -> None:
    slow_project(tmp_path / "tiny", "    pass")
    first = process_install.find_source("rma_Tiny", [tmp_path])
    (tmp_path / "tiny" / "build").mkdir()
    (tmp_path / "tiny" / "build" / "x.py").touch()
    assert process_install.find_source("rma_Tiny", [tmp_path]) == first
    (tmp_path / "tiny" / "new.py").touch()
    assert process_install.find_source("rma_Tiny", [tmp_path]) != first


async def test_notes_is_installed_from_its_source_and_answers(tmp_path: Path) -> None:
    if not (NOTES / "catalog.toml").is_file():
        pytest.skip("containers/notes is not there")
    need("pypi")
    from rma_core.catalog import load

    entry = load(NOTES / "catalog.toml")
    spec = msgspec.structs.replace(tiny_spec(), process=entry.process, limits=entry.limits, env=entry.env)
    runtime = ProcessRuntime(home=str(tmp_path / "h"), sources=[str(NOTES.parent)])
    notes: list[str] = []
    await runtime.pull(spec, lambda p: notes.append(p.note))
    handle = await runtime.start(spec)
    await answers(await runtime.endpoint(handle), entry.health_path)
    await runtime.aclose()
    assert len(set(notes)) > 5


async def test_a_service_is_told_where_its_one_file_lies_and_no_copy_is_made(
    runtime: ProcessRuntime, tmp_path: Path
) -> None:
    file = GivenFile(name="m.gguf", path=str(tmp_path / "Models of mine" / "m.gguf"), size_bytes=3)
    given = GivenFiles(variable="MODEL_FILE", key="1" * 64, files=(file,))
    spec = msgspec.structs.replace(tiny_spec(), files=given)
    assert await runtime.has_image(spec), "there is nothing to bring"
    handle = await runtime.start(spec)
    assert (await answers(await runtime.endpoint(handle), "/variable/MODEL_FILE")).decode() == file.path
    await runtime.stop(handle, grace_s=5)
    await runtime.forget_files(spec.worker_id, ())
    two = msgspec.structs.replace(given, files=(file, msgspec.structs.replace(file, name="n.gguf")))
    with pytest.raises(NotSupported, match="needs its files in one folder, which only containers get"):
        await runtime.start(msgspec.structs.replace(spec, files=two))
