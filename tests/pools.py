"""Real pools for tests: `rma up` and agents as processes, as a user starts them, with nothing left after."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

#: Seconds a pool may take to be ready here; the promise to users is 60 once packages are installed.
READY_S = 100.0
STOP_S = 50.0
#: What keeps any engine out of a test's sight.
NO_ENGINE = {"DOCKER_HOST": "unix:///nonexistent/docker.sock", "CONTAINER_HOST": "unix:///nonexistent/podman.sock"}


def until(true: Callable[[], Any], *, within_s: float, what: str) -> Any:
    """Return the first true value of a condition; fail with ``what`` when none comes."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if value := true():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {within_s:.0f} s: {what}")


def environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return a clean environment with a state folder; nothing of the caller's RMA settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RMA_")}
    return {**clean, "RMA_HOME": str(home), **(more or {})}


def rma(*arguments: str) -> list[str]:
    """Return the command line of an `rma` command."""
    return [sys.executable, "-m", "rma_core", *arguments]


class Running:
    """A command that runs in the background and whose words are kept."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
            errors="replace",
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        # Closed while it is read, where something else still holds its other end.
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, *, within_s: float = READY_S) -> re.Match[str]:
        """Return the first match in what the command says."""

        def look() -> re.Match[str] | None:
            if self.process.poll() is not None and not re.search(pattern, self.text):
                raise AssertionError(f"ended with {self.process.returncode} before {pattern!r}:\n{self.text}")
            return re.search(pattern, self.text)

        try:
            found: re.Match[str] = until(look, within_s=within_s, what=pattern)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text}") from None
        return found

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Stop it as Ctrl-C does; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_S)
            raise AssertionError(f"did not stop within {STOP_S:.0f} s:\n{self.text}") from None
        finally:
            self._reader.join(5)
            if self.process.stdout is not None:
                self.process.stdout.close()
        return code


class Pool:
    """A running `rma up`."""

    def __init__(self, home: Path, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self.home = home
        self.env = environment(home, {"RMA_CATALOG": notes_alone(home), **env})
        self.up = Running(rma("up", *arguments), self.env)

    def ready(self) -> Pool:
        """Wait until it says so; return itself."""
        self.up.wait_for(r"Ctrl-C stops everything")
        found = self.up.wait_for(r"Status page +(\S+)/#key=(\S+)")
        self.url, self.key = found[1], found[2]
        return self

    def ask(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run an `rma` command against this pool."""
        done = subprocess.run(
            rma(*arguments),
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ask(*arguments, "--json").stdout)

    def get(self, path: str) -> Any:
        """Return what an admin call answers."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def call(self, method: str, path: str) -> None:
        """Make one admin call for which there is no command yet."""
        request = urllib.request.Request(
            self.url + path, method=method, headers={"Authorization": f"Bearer {self.key}"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.status == 200

    def workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.json("workers")["workers"]
        return found


def notes_alone(home: Path) -> str:
    """Return a catalog with `notes` alone: what a pool runs must not depend on how large this machine is."""
    folder = home.with_name(f"{home.name}-catalog")
    folder.mkdir(parents=True, exist_ok=True)
    entry = Path(__file__).resolve().parents[1] / "containers" / "notes" / "catalog.toml"
    (folder / "notes.toml").write_bytes(entry.read_bytes())
    return str(folder)


@contextlib.contextmanager
def pool(home: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[Pool]:
    """Run `rma up` until it is ready; stop it as Ctrl-C does and see that nothing of it is left."""
    made = Pool(home, arguments, env or {})
    try:
        yield made.ready()
    finally:
        code = made.up.stop()
    assert code == 0, made.up.text
    # What was killed before may still be on its way out.
    until(lambda: not left_over(home), within_s=10, what=f"nothing is left over: {made.up.text}")


def runs(process: psutil.Process) -> bool:
    """Say whether it still does anything: what nobody has collected yet does not."""
    # It may be collected between two looks.
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def left_over(home: Path) -> list[str]:
    """Return the command lines of processes that still have to do with a state folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                words = " ".join(process.cmdline())
                if str(home) in words or process.environ().get("RMA_HOME", "").startswith(str(home)):
                    found.append(words)
    return found
