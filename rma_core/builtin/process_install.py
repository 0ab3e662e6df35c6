"""Virtual environments for services that run as processes: one for each version of a distribution, made with pip.

What is installed comes from folders that the machine's owner named; where its dependencies come from is decided by
the owner's pip configuration. An environment is complete once its stamp is there, which is written last.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_core import bare
from rma_core.builtin import supervised
from rma_core.errors import ImagePullFailed, OutOfSpace, RuntimeAbsent, StartFailed
from rma_core.interfaces import PullProgress
from rma_core.service_platforms import python_of
from rma_core.supervise import Order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

logger = logging.getLogger(__name__)

#: Name of the file that says an environment is complete.
STAMP = ".complete"
#: How long pip may be silent before it counts as stuck.
SILENCE_S = 120.0
#: The same for a pip that cannot tell how far a download is.
SILENCE_OLD_PIP_S = 900.0
#: From here on pip prints a line for each piece of a download, when asked.
RAW_PROGRESS_PIP = (24, 1)
#: From here on pip installs into another environment (``--python``).
OLDEST_PIP = (22, 3)
#: How many of pip's last lines are kept for the sentence about its failure.
LAST_LINES = 60
#: The most of pip's own words in one sentence.
WORDS = 600
#: Digits of the hash in an environment's name.
KEY_DIGITS = 12
#: What lies in a source folder and is no source.
NOT_SOURCE = frozenset({"__pycache__", "build", "dist", "node_modules", "venv"})
#: The rest of pip's and Python's variables is the owner's business; these would change what is installed, or tell.
NOT_FOR_PIP = ("RMA_", "PYTHON", "VIRTUAL_ENV", "__PYVENV", "COORDINATOR_URL", "PIP_TARGET", "PIP_PREFIX", "PIP_PYTHON",
               "PIP_REQUIRE_VIRTUALENV", "PIP_USER", "PIP_DRY_RUN", "PIP_QUIET", "PIP_PROGRESS_BAR")  # fmt: skip
SOURCE_HINT = "set `service_sources` to a folder that holds it as a source project or a wheel"


class Source(NamedTuple):
    """A distribution in one of the owner's folders: a source project or a wheel; ``key`` changes with its content."""

    distribution: str
    path: Path
    key: str

    @property
    def constraints(self) -> Path | None:
        """The pinned versions that came along, if any did."""
        pins = self.path / "requirements.txt"
        return pins if pins.is_file() else None


class Stamp(msgspec.Struct, frozen=True, kw_only=True):
    """What an environment holds."""

    distribution: str
    key: str
    python: str


def normalized(name: str) -> str:
    """Return a distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def find_source(distribution: str, folders: Iterable[Path]) -> Source | None:
    """Return the distribution from the first folder that has it, a source project before a wheel."""
    for folder in folders:
        for project in _projects(folder):
            if _project_name(project) == normalized(distribution):
                return Source(distribution, project, _key(project))
        wheels = [w for w in folder.glob("*.whl") if normalized(w.name.split("-", 1)[0]) == normalized(distribution)]
        if wheels:
            newest = max(wheels, key=_wheel_version)
            return Source(distribution, newest, _key(newest))
    return None


def _projects(folder: Path) -> Iterator[Path]:
    for pyproject in (folder / "pyproject.toml", *sorted(folder.glob("*/pyproject.toml"))):
        if pyproject.is_file():
            yield pyproject.parent


def _project_name(project: Path) -> str:
    try:
        table = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
        return normalized(str(table["project"]["name"]))
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _wheel_version(wheel: Path) -> tuple[tuple[int, ...], str]:
    version = [*wheel.name.split("-"), ""][1]
    return tuple(int(digits) for digits in re.findall(r"\d+", version)), wheel.name


def _key(path: Path) -> str:
    """Return a hash over a wheel, or over every file of a project, and over the Python it is installed for."""
    digest = hashlib.sha256(f"{platform.python_version()} {sys.platform} {platform.machine()}".encode())
    files = [path] if path.is_file() else sorted({file for part in _parts(path) for file in _source_files(part)})
    for file in files:
        data = file.read_bytes()
        digest.update(f"\0{Path(os.path.relpath(file, path.parent)).as_posix()}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()[:KEY_DIGITS]


def _parts(project: Path) -> Iterator[Path]:
    """Return the folders a project is written in: its own, and what it shares with others (``dev-mode-dirs``)."""
    yield project
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        table = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
        for folder in table["tool"]["hatch"]["build"]["dev-mode-dirs"]:
            yield (project / str(folder)).resolve()


def _source_files(project: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(project):
        folders[:] = [f for f in folders if f not in NOT_SOURCE and not f.startswith(".") and ".egg-info" not in f]
        yield from (Path(folder, f) for f in files if not f.startswith(".") and not f.endswith(".pyc"))


def environment_of(home: Path, source: Source) -> Path:
    """Return the folder of the source's environment, whether it is there or not."""
    return home / "services" / f"{normalized(source.distribution)}-{source.key}"


def is_complete(environment: Path) -> bool:
    """Say whether an environment was finished, and its Python is still there."""
    return (environment / STAMP).is_file() and python_of(environment).exists()


def missing_tools() -> str:
    """Say why no environment can be made with this Python; an empty string when one can."""
    if pip_version() >= OLDEST_PIP or importlib.util.find_spec("ensurepip") is not None:
        return ""
    return "this Python has neither pip (22.3 or newer) nor ensurepip; on Debian and Ubuntu: apt install python3-venv"


def missing_pip() -> str:
    """Say why this Python's own pip cannot be used; an empty string when it can."""
    if pip_version() >= OLDEST_PIP:
        return ""
    return f"this Python has no pip ({'.'.join(map(str, OLDEST_PIP))} or newer): python -m ensurepip --upgrade"


def pip_version() -> tuple[int, ...]:
    """Return the version of the agent's own pip; empty when it has none."""
    if importlib.util.find_spec("pip") is None:
        return ()
    return tuple(int(digits) for digits in re.findall(r"\d+", importlib.metadata.version("pip"))[:2])


async def install(
    source: Source, *, home: Path, folders: Iterable[Path], progress: Callable[[PullProgress], None],
    silence_s: float | None = None,
) -> None:  # fmt: skip
    """Make the environment of ``source``; on failure or cancellation nothing of it stays.

    ``folders`` may hold wheels of what it depends on. Raises ImagePullFailed, OutOfSpace, RuntimeAbsent.
    """
    if reason := missing_tools():
        raise RuntimeAbsent(reason)
    environment = environment_of(home, source)
    work = home / "run" / f"pip-{secrets.token_hex(4)}"
    progress(PullProgress(note=f"making an environment for {source.distribution}"))
    done = False
    try:
        await _whole(_make, environment, work)
        await _Installer(source, home, progress).run(environment, work, folders, silence_s)
        await _whole(_stamp, environment, source)
        done = True
    except OSError as error:
        if is_out_of_space(error):
            raise out_of_space(home) from None
        message = f"{source.distribution} cannot be installed: {error}"
        raise ImagePullFailed(message) from None
    finally:
        await _whole(_remove, work, *(() if done else (environment,)))


async def _whole(call: Callable[..., None], *args: object) -> None:
    """Run ``call`` in a thread and wait for its end even when cancelled, so that nothing comes after the clean-up."""
    running = asyncio.ensure_future(asyncio.to_thread(call, *args))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait((running,))
        raise


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _make(environment: Path, work: Path) -> None:
    """Make an empty environment, with a pip of its own where the agent's cannot be used."""
    environment.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    supervised.claim(work)
    own_pip = pip_version() < OLDEST_PIP
    try:
        venv.EnvBuilder(clear=True, symlinks=os.name != "nt", with_pip=own_pip).create(environment)
    except subprocess.SubprocessError as error:
        message = f"this Python could not put pip into a new environment: {error}"
        raise ImagePullFailed(message, hints=("install pip beside rma-core",)) from None


def _stamp(environment: Path, source: Source) -> None:
    """Say that all is there, in one step."""
    stamp = Stamp(distribution=source.distribution, key=source.key, python=platform.python_version())
    new = environment / f"{STAMP}.new"
    new.write_bytes(msgspec.json.encode(stamp))
    new.replace(environment / STAMP)


class _Installer:
    """One run of pip, told to the person as it goes."""

    def __init__(self, source: Source, home: Path, progress: Callable[[PullProgress], None]) -> None:
        self._source = source
        self._home = home
        self._progress = progress
        self._said: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._spoke = asyncio.Event()
        self._done_bytes = 0
        self._file_bytes = 0
        self._note = ""

    async def run(self, environment: Path, work: Path, folders: Iterable[Path], silence_s: float | None) -> None:
        """Run pip to its end. Raises ImagePullFailed, OutOfSpace; ends pip's processes when cancelled."""
        raw = pip_version() >= RAW_PROGRESS_PIP
        patience_s = silence_s if silence_s is not None else SILENCE_S if raw else SILENCE_OLD_PIP_S
        order = Order(
            argv=(*_pip(environment, raw=raw), *_what(self._source, folders)),
            env=pip_environment(work), cwd=str(work), mark=str(work),
            state=str(work / supervised.STATE), echo=True, grace_s=1,
        )  # fmt: skip
        try:
            pip = await supervised.launch(order, errors=work / "supervisor.log", on_output=self._take)
        except StartFailed as failure:
            raise self._failure(str(failure)) from None
        try:
            silent = await self._until_gone_or_silent(pip, patience_s)
        finally:
            await asyncio.shield(pip.stop(grace_s=1))
        if silent:
            raise self._failure(f"pip was stopped after saying nothing for {patience_s:g} s since: {self._last()}")
        if pip.ended is None or pip.ended.code != 0:
            raise self._failure(self._errors() or (pip.ended.reason if pip.ended else ""))

    async def _until_gone_or_silent(self, pip: supervised.Supervised, patience_s: float) -> bool:
        """Wait for pip's end; say whether it fell silent before."""
        gone = asyncio.create_task(pip.gone.wait())
        try:
            while not gone.done():
                self._spoke.clear()
                spoke = asyncio.create_task(self._spoke.wait())
                await asyncio.wait((gone, spoke), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                spoke.cancel()
                if not gone.done() and not self._spoke.is_set():
                    return True
        finally:
            gone.cancel()
        return False

    def _take(self, line: str) -> None:
        """Turn a line of pip's into progress."""
        self._spoke.set()
        words = line.split()
        if line.startswith("Progress ") and len(words) == 4 and words[1].isdigit():  # noqa: PLR2004 - Progress 1 of 2
            done = int(words[1])
            self._done_bytes += done - self._file_bytes
            self._file_bytes = 0 if words[3] == words[1] else done
        else:
            self._said.append(line)
            note = _note(words)
            if not note:
                return
            self._note, self._file_bytes = note, 0
        self._progress(PullProgress(done_bytes=self._done_bytes, note=self._note))

    def _errors(self) -> str:
        """Return what pip calls errors, else its last lines."""
        causes = [line.strip() for line in self._said if _CAUSE.match(line.strip())]
        errors = [line for line in self._said if line.startswith(("ERROR", "error:"))]
        return " ".join(dict.fromkeys([*causes, *errors] or list(self._said)[-3:]))[:WORDS]

    def _last(self) -> str:
        return (self._said[-1] if self._said else "none")[:WORDS]

    def _failure(self, words: str) -> ImagePullFailed | OutOfSpace:
        everything = " ".join(self._said)
        if "No space left on device" in everything or "[Errno 28]" in everything or "Disk quota exceeded" in everything:
            return out_of_space(self._home)
        message = f"{self._source.distribution} could not be installed: {words or 'pip failed without a word'}"
        return ImagePullFailed(message, hints=("what pip may fetch, and from where, is in your pip configuration",))


#: What a build says of itself inside pip's own words: the line a traceback ends with.
_CAUSE = re.compile(r"[\w.]*(?:Error|Exception): \S")


def is_out_of_space(error: OSError) -> bool:
    """Say whether ``error`` means that the disk, or this user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def out_of_space(near: Path) -> OutOfSpace:
    """Return the failure for a full disk, which holds ``near``."""
    return OutOfSpace(f"the disk that holds {near} is full", hints=("free some space, or move the state folder",))


def _note(words: list[str]) -> str:
    """Return what a line of pip's means to a person; an empty string when nothing."""
    match words:
        case ["Collecting" | "Downloading" as verb, what, *_]:
            return f"{verb.lower()} {what}"
        case ["Building", "wheel", "for", what, *_]:
            return f"building {what}"
        case ["Processing", path, *_]:
            return f"reading {Path(path).name.partition('-')[0]}"
        case ["Installing", "build", "dependencies:", "started"]:
            return "fetching what is needed to build it"
        case ["Installing", "collected", "packages:", *packages]:
            return "installing 1 package" if len(packages) == 1 else f"installing {len(packages)} packages"
    return ""


def _pip(environment: Path, *, raw: bool) -> tuple[str, ...]:
    """Return how pip is called: the agent's own for the environment, else the environment's own."""
    python = str(python_of(environment))
    agents = tuple(bare.module("pip", "--python", python))
    who = agents if pip_version() >= OLDEST_PIP else (python, "-m", "pip")
    # Compiling all of it would take a third of the time, for modules most of which are never imported.
    return (*who, "install", "--no-input", "--disable-pip-version-check", "--no-warn-script-location", "--no-compile",
            "--progress-bar", "raw" if raw else "off")  # fmt: skip


def _what(source: Source, folders: Iterable[Path]) -> tuple[str, ...]:
    links = [part for folder in folders if any(folder.glob("*.whl")) for part in ("--find-links", str(folder))]
    pins = ["--constraint", str(source.constraints)] if source.constraints else []
    return (*links, *pins, str(source.path))


def pip_environment(work: Path) -> dict[str, str]:
    """Return the owner's environment without what is RMA's; temporary files go to the disk that is installed to."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(NOT_FOR_PIP)}
    return {**ours, "PYTHONUNBUFFERED": "1", "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}


def remove_others(source: Source, *, home: Path, used: frozenset[Path]) -> None:
    """Remove the environments of other versions of ``source`` that nothing runs from."""
    name = re.compile(re.escape(normalized(source.distribution)) + rf"-[0-9a-f]{{{KEY_DIGITS}}}")
    keep = environment_of(home, source)
    for folder in keep.parent.iterdir():
        if name.fullmatch(folder.name) and folder != keep and folder not in used:
            with contextlib.suppress(OSError):
                (folder / STAMP).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            logger.info("removed the environment %s, which an other version has replaced", folder.name)
