"""One service as a process: where it listens, what it is given, and what it leaves to be read.

See `rma_core.builtin.process_runtime` for the convention.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, NamedTuple

import psutil

from rma_core import platforms, process_tree, service_platforms
from rma_core.builtin import supervised
from rma_core.errors import NotSupported, RuntimeFailure
from rma_core.interfaces import ContainerStats
from rma_core.supervise import Order

if TYPE_CHECKING:
    from pathlib import Path

    from rma_core.interfaces import ContainerSpec
    from rma_core.process_tree import Identity
    from rma_core.supervise import Event

#: The most that `logs` returns.
LOG_BYTES = 65_536
#: Lines and characters of a service's last words.
LAST_LINES, LAST_CHARACTERS = 5, 500
#: Files in the folder of a running service.
LOG, SOCKET, COMPLAINTS = "log", "s", "supervisor.log"
#: Variables by which a catalog could make a process load code, look elsewhere for programs, or send its traffic away.
DANGEROUS = ("LD_", "DYLD_", "PYTHON", "RMA_SUPERVISED", "GCONV_PATH", "BASH_", "PERL5", "RUBY", "NODE_", "JAVA_TOOL",
             "GIT_", "SSL_", "OPENSSL_", "GLIBC_", "MALLOC_", "LOCPATH", "HOSTALIASES")  # fmt: skip
RESERVED = frozenset({"PATH", "HOME", "TMPDIR", "TEMP", "TMP", "ENV", "IFS", "SHELL", "USER", "HTTP_PROXY",
                      "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
                      *service_platforms.WINDOWS_VARIABLES})  # fmt: skip
#: What a server says when its port is not free, on the systems there are.
IN_USE = ("address already in use", "errno 98", "errno 48", "winerror 10048", "only one usage of each socket address")


class Address(NamedTuple):
    """Where a service listens, and how it is told."""

    endpoint: str
    arguments: tuple[str, ...]


def refuse_dangerous(spec: ContainerSpec) -> None:
    """Keep a catalog from reaching past its own service. Raises NotSupported."""
    # Windows knows one variable under any spelling: `Path` beside `PATH` would be the same one twice.
    wrong = sorted(name for name in spec.env if name.upper() in RESERVED or name.upper().startswith(DANGEROUS))
    if wrong:
        message = f"the catalog sets {', '.join(wrong)} for {spec.service}, which no process of this machine is given"
        raise NotSupported(message)


def make_folders(folder: Path) -> None:
    """Make the folder of one run, which only this user can enter."""
    supervised.claim(folder)
    (folder / "work" / "tmp").mkdir(mode=0o700, parents=True)


def choose_address(folder: Path) -> Address:
    """Choose where a service listens: a Unix socket where its path is short enough, else a free port."""
    path = folder / SOCKET
    if len(bytes(path)) <= service_platforms.SOCKET_PATH_BYTES:
        return Address(f"unix:{path}", ("--uds", str(path)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Address(f"http://127.0.0.1:{port}", ("--host", "127.0.0.1", "--port", str(port)))


def order_for(spec: ContainerSpec, folder: Path, python: Path, address: Address, *, grace_s: float) -> Order:
    """Put a spec into the supervisor's words."""
    assert spec.process is not None  # noqa: S101 - its source was found by it
    work = folder / "work"
    env = {
        **service_platforms.environment_of_a_service(),
        **spec.env,
        **where_files_are(spec),
        "PATH": f"{python.parent}{os.pathsep}{service_platforms.search_path()}",
        "HOME": str(work), "TMPDIR": str(work / "tmp"), "TEMP": str(work / "tmp"), "TMP": str(work / "tmp"),
    }  # fmt: skip
    return Order(
        argv=(str(python), "-I", "-u", "-m", spec.process.module, *address.arguments),
        env=env, cwd=str(work), mark=str(folder), log=str(folder / LOG), state=str(folder / supervised.STATE),
        memory_bytes=spec.limits.memory_bytes, processes=spec.limits.pids, grace_s=grace_s,
    )  # fmt: skip


def where_files_are(spec: ContainerSpec) -> dict[str, str]:
    """Return the variable that tells a service where its file is: where it lies. Raises NotSupported for several."""
    if spec.files is None:
        return {}
    if len(spec.files.files) != 1:
        raise NotSupported(f"{spec.service} needs its files in one folder, which only containers get")
    return {spec.files.variable: spec.files.files[0].path}


def listens(address: Address, folder: Path, root: Identity, mark: str) -> bool:
    """Say whether the service listens at its address: it, and not somebody else who took the port meanwhile."""
    if address.endpoint.startswith("unix:"):
        return (folder / SOCKET).exists()
    port = int(address.endpoint.rpartition(":")[2])
    keeper = process_tree.living(root)
    for process in process_tree.descendants(keeper, mark) if keeper else ():
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("tcp4"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


def in_use(words: str) -> bool:
    """Say whether a service's last words are about a port that is not free."""
    return any(sign in words.lower() for sign in IN_USE)


def how_it_ended(ended: Event | None, folder: Path, spec: ContainerSpec) -> str:
    """Say how a service ended: exit code or signal, the supervisor's reason, its last words."""
    how = [platforms.exit_words(ended.code)] if ended is not None and ended.code is not None else []
    if ended is not None and ended.reason:
        how.append(ended.reason)
    words = " | ".join(filter(None, read_log(folder, LAST_LINES).splitlines()))[-LAST_CHARACTERS:]
    if "MemoryError" in words or "Cannot allocate memory" in words:
        how.append(f"out of memory, its limit is {spec.limits.memory}")
    return f"{'; '.join(how) or 'ended'}; its last words: {words or 'none'}"


def read_log(folder: Path, lines: int) -> str:
    """Return the last lines of a log in two files, as text, at most LOG_BYTES of it."""
    tail = b""
    for name in (LOG, f"{LOG}.1"):
        if len(tail) < LOG_BYTES:
            with contextlib.suppress(OSError), (folder / name).open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - LOG_BYTES))
                tail = file.read() + tail
    text = tail[-LOG_BYTES:].decode(errors="ignore")
    return "\n".join(text.splitlines()[-lines:]) if lines > 0 else ""


def measure(keeper: process_tree.Identity, mark: str) -> ContainerStats:
    """Add up a service's processes and what its ended ones used. Raises RuntimeFailure."""
    root = process_tree.living(keeper)
    if root is None:
        raise RuntimeFailure("it does not run any more")
    found = process_tree.descendants(root, mark)
    cpu_s, memory = 0.0, 0
    with contextlib.suppress(psutil.Error):
        cpu_s += root.cpu_times().children_user + root.cpu_times().children_system
    for process in found:
        with contextlib.suppress(psutil.Error):
            cpu_s += sum(process.cpu_times()[:4])
            memory += process.memory_info().rss
    return ContainerStats(cpu_seconds=cpu_s, memory_bytes=memory, pids=len(found))
