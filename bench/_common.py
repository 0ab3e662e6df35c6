"""What the measurements share: options, cores, a coordinator of their own, percentiles, and how results are shown."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import psutil

from rma_core.commands.common import read_client

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

#: A process that has not answered by then will not.
READY_WITHIN_S = 30.0
#: A process that was told to stop and has not by then is killed.
STOP_WITHIN_S = 15.0
MIB = 1024 * 1024


class Options(NamedTuple):
    """What every script takes; those that have no use for one ignore it, so that `make bench ARGS=…` suits all."""

    workers: int
    seconds: float
    as_json: bool
    check: bool


def options(about: str | None) -> Options:
    """Read the command line."""
    return read_options(parser(about).parse_args())


def parser(about: str | None) -> argparse.ArgumentParser:
    """Return what reads the options that all scripts have, for a script to add its own."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--workers", type=int, default=1000, help="workers in the pool (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the main phase (default %(default)g)")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a stated target is missed")
    return parser


def read_options(given: argparse.Namespace) -> Options:
    """Return the options that all scripts have."""
    return Options(max(1, given.workers), max(0.1, given.seconds), given.as_json, given.check)


class Target(NamedTuple):
    """A stated bar and what was measured; ``value`` stays below ``limit``, or reaches it if that is the ``least``."""

    name: str
    value: float
    limit: float
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether it holds; nothing measured (NaN) is not met."""
        return self.value >= self.limit if self.least else self.value < self.limit


def show(result: Mapping[str, Any], lines: Iterable[str], targets: Sequence[Target], asked: Options) -> int:
    """Print the result as asked, and return the exit code."""
    checked = [{"target": t.name, "value": t.value, "limit": t.limit, "met": t.met} for t in targets]
    if asked.as_json:
        # It writes NaN, which is not JSON, as null.
        print(msgspec.json.format(msgspec.json.encode({**result, "targets": checked})).decode())
    else:
        print("\n".join(lines))
        for target in targets:
            print(f"{'met   ' if target.met else 'MISSED'}  {target.name}: {target.value:.4g} of {target.limit:g}")
    return 1 if asked.check and not all(target.met for target in targets) else 0


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return count, p50, p95, p99 and max in milliseconds; a percentile is a value that was measured, never between."""
    ranked = sorted(seconds)
    if not ranked:
        return {"count": 0, "p50_ms": math.nan, "p95_ms": math.nan, "p99_ms": math.nan, "max_ms": math.nan}
    points = {f"p{share}_ms": ranked[math.ceil(len(ranked) * share / 100) - 1] for share in (50, 95, 99)}
    return {
        "count": len(ranked),
        **{name: round(value * 1000, 2) for name, value in {**points, "max_ms": ranked[-1]}.items()},
    }


def median(values: Iterable[float], digits: int = 3) -> float:
    """Return the median, rounded."""
    return round(statistics.median(values), digits)


# -- cores -------------------------------------------------------------------------------------------------------


def split_cores() -> tuple[set[int], set[int]]:
    """Return the core for what is measured and the cores for the load; both empty where cores cannot be chosen."""
    if not hasattr(os, "sched_getaffinity"):
        return set(), set()
    allowed = sorted(os.sched_getaffinity(0))
    return {allowed[-1]}, set(allowed[:-1]) or set(allowed)


def pin(cores: set[int]) -> None:
    """Keep this process, and what it starts from now on, on these cores."""
    if cores:
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def pinned(cores: set[int]) -> Iterator[None]:
    """Start on these cores what is started meanwhile."""
    own = os.sched_getaffinity(0) if cores else set[int]()
    pin(cores)
    try:
        yield
    finally:
        pin(own)


# -- processes ---------------------------------------------------------------------------------------------------


class Server(NamedTuple):
    """A server under measurement; ``key`` opens the coordinator's admin API, ``answered_s`` is how long it took."""

    url: str
    key: str
    process: psutil.Process
    answered_s: float = 0.0


@contextlib.contextmanager
def started(
    command: Sequence[str],
    *,
    home: Path,
    cores: set[int],
    env: Mapping[str, str] | None = None,
    program: str = sys.executable,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``program`` on ``cores`` with ``home`` as its state folder and log; it is gone when this ends."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("RMA_")}
    home.mkdir(parents=True, exist_ok=True)
    with (home / "log").open("ab") as log, pinned(cores):
        process = subprocess.Popen(
            [program, *command],
            env={**settings, "RMA_HOME": str(home), **(env or {})},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def coordinator(
    home: Path, *, cores: set[int], arguments: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a real coordinator on a free port of loopback, with its state in ``home``."""
    port = free_port()
    command = ["-m", "rma_core", "coordinator", "--port", str(port), *arguments]
    began = time.perf_counter()
    with started(command, home=home, cores=cores, env=env) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_answered(f"{url}/health", process, home)
        answered_s = time.perf_counter() - began
        yield Server(url, _first_key(home), psutil.Process(process.pid), answered_s)


def _first_key(home: Path) -> str:
    """Return the key that a coordinator writes a moment after its first answer."""
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if (client := read_client(home)) is not None:
            return client.key
        time.sleep(0.005)
    sys.exit(f"no key in {home}:\n{log_of(home)}")


def free_port() -> int:
    """Return a port of loopback that is free now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_answered(url: str, process: subprocess.Popen[bytes], home: Path) -> None:
    """Return as soon as ``url`` answers; end the measurement with the log when it never will."""
    if not answers(url, process):
        sys.exit(f"{url} does not answer:\n{log_of(home)}")


def answers(url: str, process: subprocess.Popen[bytes], within_s: float = READY_WITHIN_S) -> bool:
    """Wait until ``url`` answers, and say whether it does before the time is over or the process."""
    # A proxy from the environment is for the way out of this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(url, timeout=within_s):
                return True
        except OSError:  # among them every status that is an error
            time.sleep(0.005)
    return False


def log_of(home: Path) -> str:
    """Return the end of what a process that was `started` has said."""
    return (home / "log").read_text(encoding="utf-8", errors="replace")[-2000:]


def memory(process: psutil.Process) -> dict[str, float]:
    """Return the MiB a process holds: all (``rss``), shared pages divided (``pss``), none of these (``uss``)."""
    whole = process.memory_full_info()
    kinds = {"rss": whole.rss, "pss": getattr(whole, "pss", whole.uss), "uss": whole.uss}
    return {f"{kind}_mib": round(value / MIB, 2) for kind, value in kinds.items()}


def waited_s(process: psutil.Process) -> float:
    """Return the seconds a process was ready and had no core, because of others; NaN where nobody counts them."""
    tasks = Path("/proc", str(process.pid), "task")
    try:
        return sum(int(task.joinpath("schedstat").read_text("ascii").split()[1]) for task in tasks.iterdir()) / 1e9
    except OSError:
        return math.nan


def cpu_s(process: psutil.Process) -> float:
    """Return the CPU seconds a process has used: of all its threads, to the nanosecond where the system tells."""
    tasks = Path("/proc", str(process.pid), "task")
    try:
        # cpu_times has steps of 10 ms.
        return sum(int(task.joinpath("schedstat").read_text("ascii").split()[0]) for task in tasks.iterdir()) / 1e9
    except OSError:
        used = process.cpu_times()
        return float(used.user + used.system)
