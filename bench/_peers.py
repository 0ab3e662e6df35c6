"""Where peers come from, and those of bench/durable.py: Celery on Redis and procrastinate on PostgreSQL, real.

Servers are the machine's own (Debian: redis-server, postgresql), the libraries come from bench/peers.txt into a virtual
environment that is thrown away, or that of ``RMA_BENCH_PEERS`` (the path of its python; ``none`` leaves the peers out).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import _common

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = Path(__file__).parent
#: Seconds in which a server must answer, and a virtual environment be made.
SERVER_S, INSTALL_S = 30.0, 300.0
#: Seconds for one peer to do its cycles.
RUN_S = 300.0


class NoPeerError(Exception):
    """A peer cannot be measured here; the sentence says why."""


def python(folder: Path, *, requirements: str = "peers.txt", variable: str = "RMA_BENCH_PEERS") -> str:
    """Return a python that has the peers: that of the environment's ``variable``, or a new one. Raises NoPeerError."""
    given = os.environ.get(variable, "")
    if given == "none":
        raise NoPeerError(f"left out ({variable}=none)")
    if given:
        return given
    found = folder / "venv" / "bin" / "python"
    if not found.exists():
        _quietly([sys.executable, "-m", "venv", str(folder / "venv")])
        _quietly([str(found), "-m", "pip", "install", "--quiet", "-r", str(HERE / requirements)])
    return str(found)


def _quietly(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    if done.returncode:
        raise NoPeerError(f"{' '.join(command[:4])} failed: {done.stderr.strip()[-300:]}")


def celery(folder: Path, cycles: int, waiting: int) -> dict[str, Any]:
    """Measure Celery with late acknowledgement on a Redis that syncs each write. Raises NoPeerError."""
    interpreter = python(folder)
    with redis(folder / "redis") as port:
        return _run([interpreter, str(HERE / "_peer_celery.py"), str(port), str(cycles), str(waiting)], folder)


def procrastinate(folder: Path, cycles: int, waiting: int) -> dict[str, Any]:
    """Measure procrastinate on a PostgreSQL as it comes. Raises NoPeerError."""
    interpreter = python(folder)
    with postgres(folder / "postgres") as port:
        return _run([interpreter, str(HERE / "_peer_procrastinate.py"), str(port), str(cycles), str(waiting)], folder)


def _run(command: Sequence[str], folder: Path) -> dict[str, Any]:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=RUN_S, check=False)
    except subprocess.TimeoutExpired:
        raise NoPeerError(f"{Path(command[1]).name} was not done within {RUN_S:.0f} s") from None
    if done.returncode:
        raise NoPeerError(f"{Path(command[1]).name} failed: {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[int]:
    """Run a Redis whose every write is on disk before it is answered; give its port."""
    program = shutil.which("redis-server")
    if program is None:
        raise NoPeerError("redis-server is not installed")
    folder.mkdir()
    port = _common.free_port()
    options = ["--bind", "127.0.0.1", "--dir", str(folder), "--appendonly", "yes", "--appendfsync", "always"]
    command = [program, "--port", str(port), *options, "--save", "", "--maxmemory-policy", "noeviction"]
    with _server(command, folder, ready=["redis-cli", "-p", str(port), "ping"]):
        yield port


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[int]:
    """Run a PostgreSQL with its own defaults (fsync, synchronous_commit); give its port."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "initdb")]
    home = programs[-1].parent
    if not programs[-1].exists():
        raise NoPeerError("PostgreSQL's programs (initdb, postgres) are not installed")
    folder.mkdir()
    # It refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    data = str(folder / "data")
    made = subprocess.run(
        [str(home / "initdb"), "-D", data, "-A", "trust", "-U", "bench"],
        cwd=folder,
        user=user,
        capture_output=True,
        text=True,
        timeout=SERVER_S,
        check=False,
    )
    if made.returncode:
        raise NoPeerError(f"initdb failed: {made.stderr.strip()[-300:]}")
    port = _common.free_port()
    command = [str(home / "postgres"), "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", str(folder)]
    ready = [str(home / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
    with _server(command, folder, ready=ready, user=user):
        yield port


@contextlib.contextmanager
def _server(command: Sequence[str], folder: Path, *, ready: Sequence[str], user: str | None = None) -> Iterator[None]:
    """Run a server until this ends; it is there once ``ready`` succeeds. Raises NoPeerError."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, user=user, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + SERVER_S
        while subprocess.run(ready, capture_output=True, timeout=SERVER_S, check=False).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                raise NoPeerError(f"{command[0]} did not start: {(folder / 'log').read_text('utf-8')[-300:]}")
            time.sleep(0.05)
        yield
    finally:
        # What PostgreSQL calls a fast shutdown, and Redis a shutdown.
        process.send_signal(2)
        try:
            process.wait(_common.STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
