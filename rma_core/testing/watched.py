"""What `rma_core.child` does in conformance runs: uses one plugin once, watched, on this machine or on a broken one.

Python's audit events tell what the plugin opens, connects to, loads and starts; what native code does by itself they do
not show. ``machine`` in the request says what a look at hardware (below /dev and /sys, a native library, a program)
meets: ``real`` leaves it alone, ``bare`` opens and lists nothing, ``hung`` never comes back, ``deadly`` is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rma_core import child

if TYPE_CHECKING:
    from rma_core.interfaces import ContainerRuntime, TierPolicy

#: So many events are kept of each kind, and so much of each.
MOST_EVENTS, MOST_CHARACTERS = 50, 200
#: Where hardware shows as files, files there that are none, and folders there that hold none.
HARDWARE = ("/dev/", "/sys/", "/proc/driver/")
NO_HARDWARE = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
PLAIN_FOLDERS = ("/dev/fd/", "/dev/shm/")  # noqa: S108 - named, not used
#: Flags with which a file is opened to be changed.
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: Audit events that change a file system; the first argument is the path.
CHANGING = frozenset({
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
    "os.utime", "shutil.copyfile", "shutil.move", "shutil.rmtree", "tempfile.mkdtemp", "tempfile.mkstemp",
})  # fmt: skip
STARTING = frozenset({"subprocess.Popen", "os.posix_spawn", "os.system", "os.exec"})
ASKING = frozenset({"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"})
RESOLVING = frozenset({"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"})
LISTING = frozenset({"os.listdir", "os.scandir"})
#: Linux: orphans become ours, so that one that was cut loose is still found.
PR_SET_CHILD_SUBREAPER = 36
#: A container that no runtime has.
NOBODY = "rma-check-nobody"
#: A program that was told to end may take this long to be gone.
ENDING_S = 0.5
#: What was killed is gone within this, on a busy machine too.
KILLED_S = 5.0
#: Calls of a runtime, and the rest, share its time.
CALLS = 5
#: A helper of multiprocessing that ends with the process it helps.
TRACKER = "multiprocessing.resource_tracker"


class Watch:
    """An audit hook: keeps what the plugin does, and breaks the machine when it is to."""

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self.on = False
        #: Whether this thread is in here already: what it does then is ours.
        self._inside = threading.local()
        #: Whether the plugin's hook has been called, and is now being asked through what it gave.
        self.stage = "hook"
        self.events: list[tuple[str, str, str]] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take one audit event; this may be called at any moment, by anything."""
        if not self.on or getattr(self._inside, "now", False):
            return
        self._inside.now = True
        try:
            kind, what = meaning(event, arguments)
            if kind:
                self._keep(kind, what)
                if kind in ("hardware", "program"):
                    self._break(event, what)
        finally:
            self._inside.now = False

    def _keep(self, kind: str, what: str) -> None:
        entry = (self.stage, kind, what[:MOST_CHARACTERS])
        if entry not in self.events and sum(kept == kind for _, kept, _ in self.events) < MOST_EVENTS:
            self.events.append(entry)

    def _break(self, event: str, what: str) -> None:
        if self.machine == "bare":
            if event == "ctypes.dlopen":
                message = f"{what}: cannot open shared object file: No such file or directory"
                raise OSError(message)
            # A folder that was there a moment ago is not gone: it is one that nobody may look into.
            code = errno.EACCES if event in LISTING else errno.ENOENT
            raise OSError(code, os.strerror(code), what)
        if self.machine == "hung":
            time.sleep(3600)
        if self.machine == "deadly":
            if sys.platform == "win32":
                os._exit(1)
            else:
                os.kill(os.getpid(), signal.SIGKILL)


def meaning(event: str, arguments: tuple[Any, ...]) -> tuple[str, str]:  # noqa: PLR0911 - one kind, one return
    """Return what kind of thing an event is (nothing: of no interest), and what it is about."""
    first = arguments[0] if arguments else ""
    if event == "open":
        return _opened(first, arguments[2])
    if event in LISTING:
        path = os.path.join(_absolute(first), "")  # noqa: PTH118 - strings, not files
        return ("hardware", path) if _is_hardware(path) else ("", "")
    if event == "ctypes.dlopen":
        return ("hardware", _text(first)) if first else ("", "")
    if event in CHANGING:
        return "write", _text(first)
    if event in STARTING:
        return "program", _text(first) or event
    if event in RESOLVING:
        return "network", _text(first)
    if event in ASKING:
        return _asked(event, arguments)
    return "", ""


def _opened(path: Any, flags: Any) -> tuple[str, str]:  # noqa: ANN401 - as the event has them
    """Return what opening a file means. What has a number was opened before: a pipe, or a file by its path."""
    if isinstance(path, int):
        return "", ""
    name, changes = _absolute(path), isinstance(flags, int) and bool(flags & CHANGES)
    if name in NO_HARDWARE:
        return "", ""
    # A device is opened to be asked, which may take writing; what lies below /sys is changed by that.
    if changes and not (name.startswith("/dev/") and _is_hardware(name)):
        return "write", name
    return ("hardware", name) if _is_hardware(name) else ("", "")


def _is_hardware(path: str) -> bool:
    return path.startswith(HARDWARE) and path not in NO_HARDWARE and not path.startswith(PLAIN_FOLDERS)


def _absolute(path: Any) -> str:  # noqa: ANN401 - as the event has it
    return os.path.abspath(_text(path)) if isinstance(path, (str, bytes, os.PathLike)) else ""  # noqa: PTH100 - strings


def _asked(event: str, arguments: tuple[Any, ...]) -> tuple[str, str]:
    """Return whom a socket was to reach; a Unix socket is no network."""
    address = arguments[1] if len(arguments) > 1 else ""
    if not isinstance(address, tuple):
        return "socket", _text(address)
    if sys.platform == "win32" and str(address[0]) in ("127.0.0.1", "::1"):
        # What other systems have pairs of sockets for.
        return "", ""
    return "network", f"{event.removeprefix('socket.')} {':'.join(map(str, address[:2]))}"


def _text(value: object) -> str:
    return os.fsdecode(value) if isinstance(value, (bytes, os.PathLike)) else str(value)


def watched(request: dict[str, Any], answer: dict[str, Any]) -> None:
    """Use the plugin as its kind is used, watched; ``answer`` also says what it did."""
    sys.dont_write_bytecode = True
    watch = Watch(request["machine"])
    _adopt_orphans()
    use, group = USES[request["kind"]]
    sys.addaudithook(watch)
    before = set(sys.modules)
    watch.on = True
    try:
        hook = child.imported(request, answer, group)
        answer["modules"] = _strangers(set(sys.modules) - before, request["own_folder"])
        use(hook, request, answer, watch)
    finally:
        watch.on = False
        for stream in (sys.stdout, sys.stderr):
            # Before the answer: once that is read, nobody waits for what is still to be printed.
            with contextlib.suppress(Exception):
                stream.flush()
        answer["events"] = [event for event in watch.events if not _came_and_went(event)]
        answer["left"] = _left_running()


def _strangers(names: set[str], folder: str) -> list[str]:
    """Return the packages of those modules that do not lie in the plugin's own folder."""
    packages = {name.partition(".")[0] for name in names}
    files = {name: Path(getattr(sys.modules.get(name), "__file__", None) or os.sep) for name in packages}
    return sorted(name for name, file in files.items() if not folder or Path(folder) not in file.parents)


def _came_and_went(event: tuple[str, str, str]) -> bool:
    """Whether a file was made for a moment where such files belong (the standard library does, to find a library)."""
    _, kind, what = event
    try:
        place = Path(tempfile.gettempdir())
    except OSError:
        # Nothing can be made anywhere, as where policies are kept.
        return False
    there = Path(what)
    return kind == "write" and (there == place or (place in there.parents and not there.exists()))


def _detector(hook: Any, request: dict[str, Any], answer: dict[str, Any], watch: Watch) -> None:  # noqa: ANN401
    del watch
    child.call(hook, request, answer)


def _policy(hook: Any, request: dict[str, Any], answer: dict[str, Any], watch: Watch) -> None:  # noqa: ANN401
    """Let every policy decide for each machine in the request, twice, the second time in the other order."""
    from rma_core.offers import offers

    policies: list[TierPolicy] = offers(hook(request["config"]), "rma_tier_policies")
    watch.stage = "use"
    machines = list(enumerate(request["machines"]))
    answer["given"] = [
        {
            "name": policy.name,
            "summary": policy.summary,
            "first": {number: _decided(policy, machine) for number, machine in machines},
            "second": {number: _decided(policy, machine) for number, machine in reversed(machines)},
        }
        for policy in policies
    ]
    answer["outcome"] = "answered"


def _decided(policy: TierPolicy, machine: dict[str, Any]) -> dict[str, Any]:
    """Return what a policy says of one machine, or why that is nothing."""
    import msgspec

    from rma_core.host import describe
    from rma_core.interfaces import PolicyInput

    asked = msgspec.convert(machine, PolicyInput)
    started = time.perf_counter()
    try:
        decided = policy.decide(asked)
    except Exception as error:  # noqa: BLE001 - isolation boundary: a policy may raise anything
        return {"problem": f"raised {describe(error)}"}
    seconds = time.perf_counter() - started
    if problem := _no_decision(decided):
        return {"problem": problem}
    tier, reason = decided.tier, decided.reason
    if asked.labels != machine["labels"]:
        return {"problem": "changed the labels it was given"}
    return {"problem": "", "tier": tier, "reason": reason.encode(errors="replace").decode(), "seconds": seconds}


def _no_decision(decided: object) -> str:
    """Say what is wrong with what a policy gave; an empty string where it is a decision."""
    from rma_core.host import describe
    from rma_core.interfaces import TierDecision
    from rma_core.offers import decision

    if type(decided) is not TierDecision:
        return f"returned a {type(decided).__name__}: return TierDecision(tier=…, reason=…)"
    tier, reason = decided.tier, decided.reason
    if tier is not None and type(tier) is not int:
        return f"its tier is a {type(tier).__name__}, {tier!r}: give a whole number, or None"
    if type(reason) is not str:
        return f"its reason is a {type(reason).__name__}: write a sentence"
    try:
        decision(TierDecision(tier=None, reason="", prefers=decided.prefers))
    except Exception as error:  # noqa: BLE001 - what a policy has put there may be anything
        return f"what it prefers is no list of services: {describe(error)}"
    return ""


def _runtime(hook: Any, request: dict[str, Any], answer: dict[str, Any], watch: Watch) -> None:  # noqa: ANN401
    """Ask every runtime what can be asked without a container."""
    from rma_core.offers import offers

    runtimes: list[ContainerRuntime] = offers(hook(request["config"]), "rma_container_runtimes")
    watch.stage = "use"
    call_s = request["deadline_s"] / CALLS
    answer["given"] = [asyncio.run(_asked_of(runtime, call_s)) for runtime in runtimes]
    answer["outcome"] = "answered"


async def _asked_of(runtime: ContainerRuntime, call_s: float) -> dict[str, Any]:
    import msgspec

    from rma_core.interfaces import ContainerHandle

    nobody = ContainerHandle(runtime=runtime.name, id=NOBODY, name=NOBODY, service=NOBODY, spec_hash="")
    said: dict[str, Any] = {"name": runtime.name, "isolated": runtime.isolated}
    for name, call in (
        ("probe", runtime.probe),
        ("inspect", lambda: runtime.inspect(nobody)),
        ("stop", lambda: runtime.stop(nobody, grace_s=1)),
        ("list_owned", lambda: runtime.list_owned("worker-00000000")),
    ):
        try:
            async with asyncio.timeout(call_s):
                said[name] = msgspec.to_builtins(await call(), enc_hook=str)
        except Exception as error:  # noqa: BLE001 - isolation boundary: a runtime may raise anything
            said[f"{name}_raised"] = [cls.__name__ for cls in type(error).__mro__] + [str(error)]
    with contextlib.suppress(Exception):
        await runtime.aclose()
    return said


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _left_running() -> list[str]:
    """Return the programs that the plugin has started and that still run."""
    import psutil

    try:
        _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=ENDING_S)
    except psutil.AccessDenied:
        return _left_unseen()
    left = []
    for process in alive:
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and TRACKER not in " ".join(process.cmdline()):
                left.append(process.name()[:MOST_CHARACTERS])
            process.kill()
    # Gone when the answer is read: a signal alone is only on its way.
    psutil.wait_procs(alive, timeout=KILLED_S)
    return left[:MOST_EVENTS]


def _left_unseen() -> list[str]:
    """Return what still runs where this process may look at no other: its children by number, orphans among them."""
    left = _children_after(ENDING_S)
    if sys.platform != "win32":
        for number in left:
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
        _children_after(KILLED_S)
    return [f"process {number}" for number in left[:MOST_EVENTS]]


def _children_after(seconds: float) -> list[int]:
    """Return the children that are still there after so many seconds; at once where there are none before that."""
    ends_at = time.monotonic() + seconds
    while (found := _children()) and time.monotonic() < ends_at:
        time.sleep(ENDING_S / 20)
    return found


def _children() -> list[int]:
    """Return the children of this process that have not ended (Linux), without a look at any of them."""
    found: list[int] = []
    if sys.platform != "win32":
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        for path in Path("/proc/self/task").glob("*/children"):
            # A thread may end meanwhile.
            with contextlib.suppress(OSError):
                found += map(int, path.read_text(encoding="ascii").split())
    return found


#: How each kind of plugin is used, and its entry-point group.
USES = {
    "detector": (_detector, "rma.detectors"),
    "policy": (_policy, "rma.policies"),
    "runtime": (_runtime, "rma.runtimes"),
}
