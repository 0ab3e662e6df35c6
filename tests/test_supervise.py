"""The supervisor as a program of its own: orders in, events out, nothing left behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import msgspec
import psutil
import pytest

from rma_core import process_tree
from rma_core.builtin.process_service import refuse_dangerous
from rma_core.errors import NotSupported
from rma_core.supervise import LOG_FILE_BYTES, Event, Order, RollingLog, State
from tests.pools import runs
from tests.tiny_service import tiny_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PATIENCE_S = 30.0
#: A program that ignores polite requests and starts another that does, in a session of its own, without environment.
FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "1000"], start_new_session=True, env={}, preexec_fn=lambda: os.nice(0))
print(os.getpid(), child.pid, flush=True)
time.sleep(1000)
"""


class Supervisor:
    """A running supervisor, spoken to as the agent does."""

    def __init__(self, order: Order, *program: str) -> None:
        words = program or ("-m", "rma_core.supervise")
        self.process = subprocess.Popen([sys.executable, "-P", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.say(msgspec.json.encode(order))

    def say(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def hear(self, kind: str) -> Event:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = msgspec.json.decode(line, type=Event)
            if event.kind == kind:
                return event
        pytest.fail(f"the supervisor ended without {kind!r}")

    def gone(self) -> None:
        """Wait for the end of both of its processes, which hold its output open."""
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        if self.process.stdout.closed:
            return
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait(PATIENCE_S)
        self.process.stdout.close()


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    """Start supervisors; every one of them is gone afterwards."""
    all_of_them: list[Supervisor] = []

    def start(*argv: str, grace_s: float = 0.2, program: tuple[str, ...] = (), **options: object) -> Supervisor:
        order = Order(
            argv=argv, env={"PATH": os.environ["PATH"]}, cwd=str(tmp_path), mark=str(tmp_path), grace_s=grace_s,
            echo=True, **options,  # type: ignore[arg-type]  # the tests' own keywords
        )  # fmt: skip
        all_of_them.append(Supervisor(order, *program))
        return all_of_them[-1]

    yield start
    for supervisor in all_of_them:
        supervisor.gone()
    assert process_tree.marked(str(tmp_path)) == []


def family(supervisor: Supervisor) -> list[psutil.Process]:
    supervisor.hear("started")
    return [psutil.Process(int(pid)) for pid in supervisor.hear("output").text.split()]


def none_runs(processes: list[psutil.Process]) -> bool:
    return not any(map(runs, processes))


def test_a_program_ends_by_itself_and_its_code_is_told(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise(sys.executable, "-c", "print('hello'); raise SystemExit(7)")
    assert supervisor.hear("output").text == "hello"
    assert supervisor.hear("ended").code == 7


def test_a_signal_is_told_as_a_number_below_zero(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise(sys.executable, "-c", "import os; os.kill(os.getpid(), 11)")
    assert supervisor.hear("ended").code == -signal.SIGSEGV


def test_a_program_that_is_not_there_is_told_with_its_name(supervise: Callable[..., Supervisor]) -> None:
    reason = supervise("/nowhere/at-all").hear("ended").reason
    assert "/nowhere/at-all" in reason
    assert "cannot be started" in reason


def test_asked_to_stop_it_ends_all_that_ignores_the_question(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise(sys.executable, "-c", FAMILY)
    members = family(supervisor)
    supervisor.say(b"stop 0.1")
    assert supervisor.hear("ended").code == -signal.SIGKILL
    supervisor.gone()
    assert none_runs(members)


def test_the_end_of_its_input_ends_everything(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise(sys.executable, "-c", FAMILY)
    members = family(supervisor)
    supervisor.gone()
    assert none_runs(members)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_guard_ends_everything(supervise: Callable[..., Supervisor], number: signal.Signals) -> None:
    supervisor = supervise(sys.executable, "-c", FAMILY)
    members = family(supervisor)
    supervisor.process.send_signal(number)
    assert supervisor.hear("ended").code == -signal.SIGKILL
    supervisor.gone()
    assert none_runs(members)


def test_a_signal_to_the_keeper_ends_everything(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise(sys.executable, "-c", FAMILY)
    started = supervisor.hear("started")
    members = [psutil.Process(int(pid)) for pid in supervisor.hear("output").text.split()]
    os.kill(started.keeper, signal.SIGTERM)
    supervisor.gone()
    assert none_runs(members)


def test_what_restarts_itself_when_killed_is_ended_too(supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
    respawn = "while true; do sh -c 'while true; do sleep 0.01; done' & wait; done"
    supervisor = supervise("sh", "-c", f"trap '' TERM; ({respawn}) & ({respawn}) & {respawn}")
    supervisor.hear("started")
    supervisor.gone()
    assert process_tree.marked(str(tmp_path)) == []


def test_what_a_program_leaves_behind_when_it_ends_is_ended(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise("sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!")
    left = int(supervisor.hear("output").text)
    assert supervisor.hear("ended").code == 0
    assert supervisor.process.stdout is not None
    supervisor.process.stdout.read()
    # Mostly it was gone before anybody could look at it.
    assert not psutil.pid_exists(left) or none_runs([psutil.Process(left)])


@pytest.mark.parametrize("killed", ["nobody", "guard", "keeper"])
def test_where_orphans_are_not_adopted_the_mark_finds_them(supervise: Callable[..., Supervisor], killed: str) -> None:
    program = (
        "from rma_core import service_platforms, supervise; service_platforms.ADOPTS_ORPHANS = False; supervise.main()"
    )
    leaves = "(setsid sleep 1000 >/dev/null 2>&1 & echo $$ $!); sleep 1000"
    supervisor = supervise("sh", "-c", leaves, program=("-c", program))
    started = supervisor.hear("started")
    members = [psutil.Process(int(pid)) for pid in supervisor.hear("output").text.split()]
    if killed != "nobody":
        os.kill(supervisor.process.pid if killed == "guard" else started.keeper, signal.SIGKILL)
        assert supervisor.process.stdout is not None
        supervisor.process.stdout.read()
    supervisor.gone()
    assert none_runs(members)


def test_a_limit_of_memory_is_for_all_processes_together(supervise: Callable[..., Supervisor]) -> None:
    hungry = "import os, time\nfor _ in range(3):\n    if not os.fork(): break\nx = b'x' * 60_000_000\ntime.sleep(1000)"
    supervisor = supervise(sys.executable, "-c", hungry, memory_bytes=150_000_000)
    ended = supervisor.hear("ended")
    assert "memory, more than its limit of 143 MiB" in ended.reason


def test_a_service_is_limited_and_steps_back(supervise: Callable[..., Supervisor]) -> None:
    said = "import os, resource; print(resource.getrlimit(resource.RLIMIT_CORE)[1], os.nice(0) - {}, oct(os.umask(0)))"
    supervisor = supervise(sys.executable, "-c", said.format(os.nice(0)))
    assert supervisor.hear("output").text == "0 5 0o77"


def test_the_state_file_names_who_runs(supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
    supervisor = supervise("sleep", "1000", state=str(tmp_path / "state"))
    started = supervisor.hear("started")
    state = msgspec.json.decode((tmp_path / "state").read_bytes(), type=State)
    assert [pid for pid, _ in state.supervisors] == [supervisor.process.pid, started.keeper]
    assert process_tree.living(process_tree.Identity(*state.program)) == psutil.Process(started.pid)


def test_a_number_given_to_another_process_is_not_taken_for_the_old_one() -> None:
    me = process_tree.identity(psutil.Process())
    assert process_tree.living(me) is not None
    assert process_tree.living(process_tree.Identity(me.pid, me.created - 1)) is None


def test_a_log_keeps_the_last_of_it_in_two_bounded_files(tmp_path: Path) -> None:
    log = RollingLog(tmp_path / "log")
    for _ in range(40):
        log.write(b"x" * 100_000)
    log.write(b"the end")
    sizes = [(tmp_path / name).stat().st_size for name in ("log", "log.1")]
    assert max(sizes) <= LOG_FILE_BYTES + 100_000
    assert (tmp_path / "log").read_bytes().endswith(b"the end")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_log_without_a_new_file_never_writes_into_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RollingLog(tmp_path / "log")

    def no_more_files(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("rma_core.supervise.os.open", no_more_files)
        log.write(b"x" * LOG_FILE_BYTES)
    numbers = [os.open(tmp_path / f"other-{n}", os.O_WRONLY | os.O_CREAT) for n in range(16)]
    try:
        log.write(b"late")
    finally:
        for number in numbers:
            os.close(number)
    assert [path.read_bytes() for path in tmp_path.glob("other-*")] == [b""] * 16
    log.write(b"x" * LOG_FILE_BYTES)
    log.write(b"back")
    assert (tmp_path / "log").read_bytes() == b"back"


@pytest.mark.parametrize("name", ["SYSTEMROOT", "COMSPEC", "PATHEXT", "WINDIR", "Path", "Ld_Preload"])
def test_a_catalog_cannot_change_what_a_process_is_given_under_any_spelling(name: str) -> None:
    with pytest.raises(NotSupported, match=name):
        refuse_dangerous(tiny_spec(more={name: "evil"}))


def test_a_log_on_a_full_disk_holds_nobody_up() -> None:
    from pathlib import Path

    log = RollingLog(Path("/dev/full"))
    log.write(b"lost")


def test_the_supervisor_loads_little() -> None:
    code = (
        "import sys, rma_core.supervise; print({'asyncio', 'httpx2', 'click', 'rich', 'cryptography'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"set()\n"


def test_without_an_order_it_ends_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rma_core.supervise"],
        input=b"",
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_waiting_for_what_never_comes_ends_at_the_deadline() -> None:
    before = time.monotonic()
    assert not process_tree.wait_until(lambda: False, within_s=0.05)
    assert time.monotonic() - before >= 0.05
