"""What a detector's child may see on Linux: hardware and programs, and nothing of its owner's."""

from __future__ import annotations

import ctypes
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core import confinement
from rma_core.detection import run_one
from rma_core.host import DetectorPlugin
from tests.needs import need

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rma_core.models.hardware import Detection

HEAD = """
import ctypes, ctypes.util, os, pathlib, signal, socket, subprocess, sys, tempfile
from rma_core import Detection, Device, hookimpl

def board(name):
    return Detection.healthy([Device(id="npu:0", kind="npu", name=str(name)[:100])])

@hookimpl
def rma_detect_devices(config):
"""


@pytest.fixture(autouse=True)
def _landlock() -> None:
    need("landlock")


async def detection(folder: Path, body: str, /, *hidden: str, **table: object) -> Detection:
    """Return what a detector with this body says."""
    (folder / "plugin").mkdir(exist_ok=True)
    (folder / "plugin" / "odd_board.py").write_text(HEAD + textwrap.indent(textwrap.dedent(body), "    "))
    plugin = DetectorPlugin("odd", "odd_board", "rma-detect-odd", "1.0", folder=str(folder / "plugin"))
    return (await run_one(plugin, table, 30.0, hidden)).detection


#: What must fail, with the error that it must fail with.
KEPT = {
    "a file of the owner's": "pathlib.Path(config['owners'][1:]).read_text()",
    "the names in a folder of the owner's": "os.listdir(os.path.dirname(config['owners'][1:]))",
    "writing beside it": "pathlib.Path(config['owners'][1:] + '.new').write_text('x')",
    "changing itself": "pathlib.Path(__file__).write_text('x')",
    "the users of this machine": "pathlib.Path('/etc/passwd').read_text()",
    "a disk": "open(config['disk'][1:], 'rb').read(1)",
    "what its parent was started with": "pathlib.Path(f'/proc/{os.getppid()}/cmdline').read_bytes()",
    "its parent's environment": "pathlib.Path(f'/proc/{os.getppid()}/environ').read_bytes()",
    "its parent's memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "its parent": "os.kill(os.getppid(), 0)",
    "a connection": "socket.create_connection(('127.0.0.1', config['port']), timeout=2)",
    "a datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', config['port']))",
    "the engine's socket": "socket.socket(socket.AF_UNIX).connect(config['engine'][1:])",
    "a packet": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "a port": "socket.socket().bind(('127.0.0.1', 0))",
    "a program that connects": (
        "subprocess.run(['bash', '-c', f\"echo > /dev/tcp/127.0.0.1/{config['port']}\"], check=True)"
    ),
    "a program that reads": "subprocess.run(['cat', config['owners'][1:]], check=True)",
    "another process's memory": "libc('ptrace', 0x4206, os.getppid(), None, None)",
    "another process's files": "libc('syscall', 438, os.pidfd_open(os.getppid()), 0, 0)",
    "a ring": "libc('syscall', 425, 8, (ctypes.c_char * 256)())",
    "the mode of a file": "os.chmod(config['owners'][1:], 0o666)",
    "the times of a file": "os.utime(config['owners'][1:], (1, 1))",
    "the owner of a file": "os.chown(config['owners'][1:], os.getuid(), os.getgid())",
    "an attribute of a file": "os.setxattr(config['owners'][1:], 'user.a', b'x')",
    "all that is in a file": "os.truncate(config['owners'][1:], 0)",
    "the limits of its parent": (
        "__import__('resource').prlimit(os.getppid(), 7, __import__('resource').prlimit(os.getppid(), 7))"
    ),
    "the pace of its parent": "os.setpriority(os.PRIO_PROCESS, os.getppid(), os.getpriority(os.PRIO_PROCESS, 0))",
    "a datagram to a socket": (
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', config['letters'][1:])"
    ),
    "memory that others share": "libc('shmctl', config['shared'], 2, (ctypes.c_char * 256)())",
    "memory that stays": "libc('shmctl', libc('shmget', 0, 4096, 0o1600), 0, None)",
    "an end of its own": "subprocess.Popen(['true'], start_new_session=True).wait()",
    "a large file": "tempfile.TemporaryFile().write(bytes(config['large']))",
}
#: What only root can do, or a kernel may have turned off; of these is not shown that they work otherwise.
UNTRIED = {"a disk", "a packet", "a ring", "another process's memory", "an attribute of a file"}
LIBC = """
def libc(name, *arguments):
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


def a_disk() -> str:
    return f"/dev/{min(entry.name for entry in Path('/sys/block').iterdir())}"


def list_of(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def is_there(path: str) -> bool:
    return Path(path).exists()


@pytest.mark.parametrize("what", KEPT)
async def test_a_detector_gets_at_nothing_but_hardware(
    what: str, tmp_path: Path, listener: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "home" / "secret"
    secret.parent.mkdir()
    secret.write_text("s3cret")
    secret.chmod(0o600)
    engine = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)
    engine.bind("engine.sock")
    engine.listen()
    letters = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    letters.bind("letters.sock")
    body = (
        f"{LIBC}\ntry:\n    {KEPT[what]}\nexcept (OSError, subprocess.CalledProcessError) as error:\n"
        "    return board(type(error).__name__)\nreturn board('done')"
    )
    # With a letter before it no path, and so not what its owner lets it read.
    table: dict[str, object] = {
        "owners": f"_{secret}",
        "engine": f"_{tmp_path}/engine.sock",
        "letters": f"_{tmp_path}/letters.sock",
        "disk": f"_{a_disk()}",
    }
    shared = ctypes.CDLL(None).shmget(0, 4096, 0o1600)
    numbers = {"port": listener, "large": 2**25, "shared": shared}
    found = await detection(tmp_path, body, **table, **numbers)
    assert secret.read_text() == "s3cret"
    assert (secret.stat().st_mode & 0o777, secret.stat().st_mtime > 1) == (0o600, True)
    if what not in UNTRIED:
        free = await detection(tmp_path, body, **table, **numbers, confined=False)
        assert free.devices[0].name == "done", "what fails anyway proves nothing"
    engine.close()
    letters.close()
    ctypes.CDLL(None).shmctl(shared, 0, None)
    assert found.state == "healthy", found.reason
    assert found.devices[0].name in ("PermissionError", "CalledProcessError", "OSError")


@pytest.fixture
def listener() -> Iterator[int]:
    """A port of this machine that takes connections."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


@pytest.mark.parametrize(
    "look",
    [
        "os.listdir('/sys/bus')",
        "os.listdir('/sys/class')",
        "pathlib.Path('/proc/cpuinfo').read_text()",
        "pathlib.Path('/proc/self/status').read_text()",
        "os.listdir('/dev')",
        "open('/dev/null', 'r+b').write(b'x')",
        "open('/dev/urandom', 'rb').read(8)",
        "subprocess.run(['uname', '-r'], check=True, capture_output=True).stdout",
        "ctypes.util.find_library('c')",
        "ctypes.util.find_library('nobody-has-this') or 'nothing'",
        "ctypes.CDLL(ctypes.util.find_library('c')).getpid()",
        "tempfile.NamedTemporaryFile().write(b'x')",
        "tempfile.TemporaryDirectory().name",
        "os.statvfs('/').f_bavail",
        "__import__('json').dumps(1)",
        "[one.close() for one in socket.socketpair()]",
        "os.sched_setaffinity(0, os.sched_getaffinity(0)) or 'its own'",
        "os.sched_setaffinity(os.getpid(), os.sched_getaffinity(0)) or 'one of its threads, by its number'",
    ],
)
async def test_a_detector_can_look_for_hardware(look: str, tmp_path: Path) -> None:
    found = await detection(tmp_path, f"return board({look})")
    assert found.state == "healthy", found.reason
    assert found.devices[0].name


async def test_every_thread_of_a_detector_is_confined(tmp_path: Path) -> None:
    body = """
    import threading
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    states = [
        line.split()[1]
        for task in os.listdir("/proc/self/task")
        for line in pathlib.Path("/proc/self/task", task, "status").read_text().splitlines()
        if line.startswith(("Seccomp:", "NoNewPrivs:"))
    ]
    return board(" ".join(sorted(states)))
    """
    found = await detection(tmp_path, body)
    # This one, the one that writes down where it is before its deadline, and the plugin's own.
    assert found.devices[0].name == "1 1 1 2 2 2"


def test_a_process_that_has_threads_is_not_confined_by_half() -> None:
    script = (
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "from rma_core import confinement as c\n"
        "try: c.confine([], writes=[], hidden=[])\n"
        "except OSError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "it has threads, which would not be" in ran.stdout


async def test_root_keeps_no_capability_but_to_read(tmp_path: Path) -> None:
    body = """
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    mine = {line.split()[0]: int(line.split()[1], 16) for line in lines if line.startswith("Cap")}
    return board(mine["CapEff:"] | mine["CapPrm:"] | mine["CapInh:"])
    """
    found = await detection(tmp_path, body)
    assert int(found.devices[0].name) & ~(1 << 2) == 0


async def test_what_its_owner_names_in_its_table_can_be_read_and_no_more(tmp_path: Path) -> None:
    for name in ("given", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fact").write_text(name)
    read = """
    place = config["other"][1:] if "other" in config else config["bus"]["path"]
    return board(pathlib.Path(place, "fact").read_text())
    """
    given = {"path": str(tmp_path / "given")}
    found = await detection(tmp_path, read, bus=given)
    assert found.devices[0].name == "given"
    assert "PermissionError" in (await detection(tmp_path, read, bus=given, other=f"_{tmp_path}/kept")).reason
    free = await detection(tmp_path, read, bus=given, other=f"_{tmp_path}/kept", confined=False)
    assert free.devices[0].name == "kept"


async def test_the_state_folder_is_kept_even_where_what_holds_it_is_given(tmp_path: Path) -> None:
    for name in ("state", "state/agent", "tools"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "device.key").write_text(name)
    (tmp_path / "current").symlink_to("state")
    read = "return board(pathlib.Path(config['place'], config['name'], 'device.key').read_text())"
    hidden = str(tmp_path / "state")
    for name in ("state", "state/agent", "current"):
        found = await detection(tmp_path, read, hidden, place=str(tmp_path), name=name)
        assert "PermissionError" in found.reason
    found = await detection(tmp_path, read, hidden, place=str(tmp_path), name="tools")
    assert found.devices[0].name == "tools"
    found = await detection(tmp_path, read, hidden, place=str(tmp_path / "state"), name="agent")
    assert "PermissionError" in found.reason


@pytest.mark.parametrize("depth", [100, 3000])
async def test_temporary_files_are_gone_afterwards_however_deep(
    depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"""
    os.chdir(tempfile.mkdtemp())
    for _ in range({depth}):
        os.mkdir("d")
        os.chdir("d")
    return board("deep")
    """
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "here"))
    found = await detection(tmp_path, body)
    # Deeper than anyone looks is too much.
    assert found.state == "healthy" or "its temporary folder" in found.reason
    assert list_of(tmp_path / "here") == []


async def test_a_closed_temporary_folder_is_removed_and_a_full_one_ends_its_detector(tmp_path: Path) -> None:
    closed = """
    folder = tempfile.mkdtemp()
    pathlib.Path(folder, "x").write_text("x")
    os.mkdir(folder + "/closed")
    os.rename(folder + "/x", folder + "/closed/x")
    return board(folder)
    """
    found = await detection(tmp_path, closed)
    assert not is_there(found.devices[0].name.rpartition("/")[0])
    fills = """
    import time
    for number in range(6):
        pathlib.Path(tempfile.gettempdir(), str(number)).write_bytes(bytes(2**24 - 1))
    time.sleep(60)
    """
    assert "more than 64 MiB or 5000 files into its temporary folder" in (await detection(tmp_path, fills)).reason


folders = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4).map("/".join)


@given(st.sets(folders, max_size=8), st.sets(folders, max_size=3))
def test_what_is_granted_around_hidden_folders_holds_none_of_them_and_all_else(
    there: set[str], hidden: set[str]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "root")
        root.mkdir()
        for part in there:
            (root / part).mkdir(parents=True, exist_ok=True)
        kept = [str(root / part) for part in hidden]
        granted = list(confinement._around(str(root), kept))
        for folder in [root, *root.rglob("*")]:
            beneath = any(str(folder) == one or str(folder).startswith(f"{one}/") for one in kept)
            above = any(one.startswith(f"{folder}/") for one in kept)
            given_it = any(str(folder) == one or str(folder).startswith(f"{one}/") for one in granted)
            assert given_it is not (beneath or above)


def test_what_a_system_cannot_keep_from_a_detector_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert confinement.available() == confinement.Confined(files=True, network=True, signals=confinement.version() >= 6)
    monkeypatch.setattr(confinement, "version", lambda: 0)
    assert "it could read your files" in confinement.available().words()
    assert confinement.confine([], writes=[], hidden=[]) == confinement.Confined()
    monkeypatch.setattr(confinement, "version", lambda: 1)
    monkeypatch.setattr(platform, "machine", lambda: "mips")
    words = confinement.available().words()
    assert words.endswith("this kernel cannot keep from it: the network, other programs")


@pytest.mark.parametrize("version", range(1, 8))
def test_each_version_of_landlock_is_asked_for_no_more_than_it_has(version: int, tmp_path: Path) -> None:
    """The kernel refuses rights that it does not know; older ones are tried on this one, which knows them all."""
    version = min(version, confinement.version())
    (tmp_path / "kept").write_text("x")
    script = f"""
import os, sys
from rma_core import confinement
confinement.version = lambda: {version}
print(confinement.confine([p for p in sys.path if p] + [sys.prefix, sys.base_prefix], writes=[], hidden=[]))
def kept(call, *arguments):
    try:
        call(*arguments)
    except PermissionError:
        return "kept"
file = {str(tmp_path / "kept")!r}
print(kept(open, "/etc/passwd"), kept(os.truncate, file, 0), kept(os.open, file, os.O_TRUNC | os.O_RDONLY))
print(len(open("/proc/self/status").read()) > 100)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    signals = version >= 6
    assert ran.stdout.splitlines() == [
        f"Confined(files=True, network=True, {signals=})",
        "kept kept kept",
        "True",
    ]
    assert (tmp_path / "kept").read_text() == "x"


def test_the_signal_that_ends_a_child_still_reaches_it() -> None:
    script = "import signal, sys; from rma_core import confinement as c; c.confine([], writes=[], hidden=[]); "
    child = subprocess.Popen(
        [sys.executable, "-c", script + "print('in', flush=True); signal.pause()"], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "in\n"
    child.send_signal(signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    child.stdout.close()
