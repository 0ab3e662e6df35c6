"""Runs what stands between fences in README.md and docs/: commands in a sandbox, with what they print compared.

The first word of a fence says what it is, the others how it is run:

- ``console``: lines that begin with ``$ `` are run, and what follows must be printed, line for line in this order;
  ``…`` stands for anything, other lines may come between. Further words:
  ``pool`` runs it on the machine of a running ``rma up`` instead of on the page's own;
  ``notes`` asks that pool's notes service;
  ``up`` compares with what that ``rma up`` printed when it started;
  ``terminal`` runs the last command in a terminal, says yes to every question, and ends it with Ctrl-C once everything
  was printed, or later (``stays``): at the end of the page, or before a block that says ``stops``;
  ``fails`` says that the last command ends with an exit code other than 0;
  ``real`` detects the hardware of this very machine, not of the one in the examples.
- ``python`` is executed, all blocks of a page in one namespace; ``toml`` and ``json`` are parsed. ``toml settings``,
  ``toml catalog``, ``toml policy`` and ``toml rules`` are read as such.
- ``text`` is not run.
- Each of them is also written to a file of the sandbox with ``file=NAME``, with ``more`` to the end of that file.
  Python that is a ``part`` of something, or ``more`` of it, is executed only by the commands that use it.
- ``needs=NAME`` skips a page, or fails it, where ``need(NAME)`` does.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sysconfig
import time
import venv
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
LANGUAGES = frozenset({"console", "python", "toml", "json", "text"})
#: The machine in the examples: a recording, so that they look the same everywhere.
MACHINE = ROOT / "tests" / "data" / "machines" / "ryzen-16-cores-no-gpu.json"
#: The document in the examples.
SAMPLE = ROOT / "coordinator" / "rma_coordinator" / "static" / "sample.pdf"
#: Seconds for one command, and for `rma up` to be ready: the notes service is installed meanwhile.
COMMAND_S, READY_S = 120.0, 180.0
LOOK_S = 0.05
#: How click ends a question that is answered yes or no.
QUESTION = "[y/N]: "

FENCE = re.compile(r"^```(\S*)[ \t]*([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Snippet(NamedTuple):
    """One fenced block, and where it stands."""

    page: Path
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def place(self) -> str:
        """``README.md:12``."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str:
        """The file it is written to, or nothing."""
        return self._named("file=")

    @property
    def needs(self) -> str:
        """What it asks of the machine, or nothing."""
        return self._named("needs=")

    @property
    def is_part(self) -> bool:
        """Whether it is only a part of its file."""
        return bool({"part", "more"} & set(self.words))

    def _named(self, begin: str) -> str:
        return next((word.removeprefix(begin) for word in self.words if word.startswith(begin)), "")


def snippets(page: Path) -> list[Snippet]:
    """Return every fenced block of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Snippet(page, text.count("\n", 0, found.start()) + 1, found[1], tuple(found[2].split()), found[3])
        for found in FENCE.finditer(text)
    ]


def steps(text: str) -> list[tuple[str, list[str]]]:
    """Return each command of a console block with the lines that it should print."""
    made: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            made.append((line[2:], []))
        elif made and made[-1][0].endswith("\\"):
            made[-1] = (f"{made[-1][0][:-1]}{line.strip()}", [])
        elif line.strip() not in ("", "…"):
            assert made, f"a console block begins with `$ `, not with {line!r}"
            made[-1][1].append(line)
    return made


def missing(documented: list[str], printed: str) -> str:
    """Return the first documented line that was not printed after those before it, or nothing."""
    lines = iter([_plain(line) for line in printed.splitlines()])
    for wanted in documented:
        pattern = re.compile(".*".join(re.escape(_plain(part)) for part in wanted.split("…")))
        if not any(pattern.search(line) for line in lines):
            return wanted
    return ""


def _plain(text: str) -> str:
    """Return text without what a terminal draws: colours, widths of tables, runs of spaces."""
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("─", " ").split())


class Sandbox:
    """A machine of its own for a page: a home, a folder to work in, and an environment that plugins go into."""

    def __init__(
        self,
        folder: Path,
        *,
        replaced: Mapping[str, str] | None = None,
        more: Mapping[str, str] | None = None,
        builds: bool = True,
    ) -> None:
        """Make it in ``folder``; ``replaced`` are made-up words of the pages and what they mean here.

        ``more`` joins the environment. With ``builds`` pip installs plugins with the tools that are there, in seconds
        and without a network.
        """
        self._more = {**({"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_DEPS": "1"} if builds else {}), **(more or {})}
        self.home, self.work = folder / "home", folder / "home" / "work"
        self.work.mkdir(parents=True)
        shutil.copyfile(SAMPLE, self.work / "paper.pdf")
        self.replaced = dict(replaced or {})
        self._programs = _environment(folder / "python")
        self._running: list[Terminal] = []

    @property
    def environment(self) -> dict[str, str]:
        """What its commands see; of ours only what a shell needs."""
        kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
        index = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_"))}
        return {
            **kept, **index, **self._more,
            "HOME": str(self.home),
            "PATH": f"{self._programs}{os.pathsep}{os.environ['PATH']}",
            "TERM": "xterm",
            "NO_COLOR": "1",
            "COLUMNS": "250",
            # Examples look the same with and without a Docker on this machine, and on a small one.
            "DOCKER_HOST": "unix:///run/no-docker.sock",
            "CONTAINER_HOST": "unix:///run/no-podman.sock",
            "RMA_FAKE_DEVICES": str(MACHINE),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }  # fmt: skip

    def path(self, name: str) -> Path:
        """Return a file's place; ``~`` is the sandbox's home."""
        return self.home / name[2:] if name.startswith("~/") else self.work / name

    def command(self, written: str) -> str:
        """Return a documented command as it is run here."""
        for words, meant in self.replaced.items():
            written = written.replace(words, meant)
        return written

    def run(self, written: str, documented: list[str], *, fails: bool = False, real: bool = False) -> None:
        """Run a command and compare; ``real`` looks at this very machine."""
        environment = {n: v for n, v in self.environment.items() if n != "RMA_FAKE_DEVICES" or not real}
        done = subprocess.run(
            ["bash", "-c", self.command(written)], env=environment, cwd=self.work, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_S, check=False,
        )  # fmt: skip
        self._compare(written, documented, done.stdout)
        assert bool(done.returncode) == fails, f"`{written}` ended with {done.returncode}:\n{done.stdout}"

    def run_in_terminal(self, written: str, documented: list[str], *, stays: bool = False) -> None:
        """Run a command that asks or does not end: yes to every question, Ctrl-C when all has been printed."""
        terminal = Terminal(self.command(written), self.environment, self.work)
        self._running.append(terminal)
        terminal.wait_for([self.command(line) for line in documented])
        printed = terminal.screen() if stays else terminal.close()
        self._compare(written, documented, printed)

    def close(self) -> None:
        """End what still runs."""
        for terminal in self._running:
            terminal.close()

    def _compare(self, written: str, documented: list[str], printed: str) -> None:
        wanted = missing([self.command(line) for line in documented], printed)
        assert not wanted, f"`{written}` did not print {wanted!r} (or not in that order), but:\n{printed}"


def _environment(folder: Path) -> Path:
    """Make a virtual environment that sees everything in ours, so that what is installed there ends with the test."""
    venv.EnvBuilder(with_pip=False).create(folder)
    ours = sysconfig.get_path("purelib")
    theirs = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    Path(theirs, "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n", encoding="utf-8")
    for name, module in (("rma", "rma_core"), ("pip", "pip"), ("python", "")):
        program = folder / "bin" / name
        if module:
            program.write_text(f'#!/bin/sh\nexec "{folder}/bin/python" -m {module} "$@"\n', encoding="utf-8")
            program.chmod(0o755)
    return folder / "bin"


class Terminal:
    """A command in a pseudo-terminal, whose screen is read as it comes."""

    def __init__(self, command: str, environment: Mapping[str, str], folder: Path) -> None:
        """Start it, in a session of its own."""
        self._ours, theirs = pty.openpty()
        os.set_blocking(self._ours, False)
        self.process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], env=environment, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self._screen = b""

    def screen(self) -> str:
        """Return all that was printed so far."""
        # At the end of a terminal Linux says EIO; until then there may be nothing to read.
        with contextlib.suppress(OSError):  # closed, too
            while data := os.read(self._ours, 65_536):
                self._screen += data
        return self._screen.decode(errors="replace")

    def wait_for(self, lines: list[str]) -> None:
        """Wait until lines were printed or the command has ended; answer yes to what is asked meanwhile."""
        answered, deadline = 0, time.monotonic() + COMMAND_S
        while missing(lines, self.screen()) and self.process.poll() is None and time.monotonic() < deadline:
            if self.screen().count(QUESTION) > answered:
                answered += 1
                os.write(self._ours, b"y\n")
            time.sleep(LOOK_S)

    def close(self) -> str:
        """End the command as Ctrl-C does, and return what was printed; may be called again."""
        stop(self.process)
        self.screen()
        if self._ours >= 0:
            os.close(self._ours)
            self._ours = -1
        return self._screen.decode(errors="replace")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a command as Ctrl-C does; one that does not end fails the test."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(COMMAND_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


class Pool:
    """A running `rma up` on a machine of its own, and what other machines need to reach it."""

    def __init__(self, folder: Path, *, lan: bool) -> None:
        """Start it, and wait until it says that it is ready."""
        self.machine = Sandbox(folder, builds=False)
        self._log = folder / "up.log"
        with self._log.open("wb") as file:
            self.process = subprocess.Popen(
                ["rma", "up", *(["--lan", "--lan-host", "127.0.0.1", "--lan-port", "0"] if lan else [])],
                env=self.machine.environment, cwd=self.machine.work, stdin=subprocess.DEVNULL,
                stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        self.url, self.key = self._find(r"(http://[\d.:]+)/#key=(\w+)")
        # Without --lan only this machine can join, which is enough for an example.
        self.lan_url = self._find(r"rma join (\S+) (\S+)")[0] if lan else self.url

    @property
    def printed(self) -> str:
        """What it printed so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _wait(self) -> None:
        deadline = time.monotonic() + READY_S
        while "Ctrl-C stops everything" not in self.printed:
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(LOOK_S)

    def _find(self, pattern: str) -> tuple[str, str]:
        found = re.search(pattern, self.printed)
        assert found, self.printed
        return found[1], found[2]

    def rma(self, *arguments: str) -> str:
        """Run `rma` on the pool's machine; return what it prints on stdout."""
        done = subprocess.run(
            ["rma", *arguments],
            env=self.machine.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=True,
        )
        return done.stdout.strip()

    def replaced(self) -> dict[str, str]:
        """Return the made-up words of the pages, and what they mean with this pool."""
        return {
            "https://192.168.1.20:8443": self.lan_url,
            "http://127.0.0.1:8080": self.url,
            "rmaj_YOUR_TOKEN": self.rma("tokens", "create", "--uses", "9"),
            # Any free port will do where the page names one.
            "--port 8443": "--port 0",
            "rmac_YOUR_KEY": self.rma("keys", "create", "--client", "--label", "docs"),
        }

    def close(self) -> None:
        """Stop it as Ctrl-C does."""
        stop(self.process)
