"""Plugins that their owner installed, each in a folder of its own, and which of them may run.

``DISTRIBUTION/`` holds a distribution with what it needs, as pip has put it there; ``decisions.json`` beside them says
what the owner approved, by a hash over every file, and what is blocked. What has changed since is not approved.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from rma_core import own_files
from rma_core.errors import NotFound, SettingProblem, UsageProblem, ValidationProblem
from rma_core.models.strict import decode
from rma_core.own_files import others_can_change

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from importlib.metadata import Distribution

DECISIONS = "decisions.json"
#: Folders in the making, and those on their way out, begin with this.
HIDDEN = "."
#: A distribution with all it needs has at most so many files and bytes: each start reads them all.
MOST_FILES, MOST_BYTES = 20_000, 512 * 1024 * 1024
#: Distributions that are looked at, and decisions that are kept.
MOST = 64
#: Nothing longer is a file of decisions.
MOST_DECISION_BYTES = 256 * 1024

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,98}[a-z0-9])?")

Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Meta(max_length=200)]


class Approval(msgspec.Struct, frozen=True, kw_only=True):
    """What was approved: the hash of a distribution's files, its version, and when (ISO 8601)."""

    sha256: Digest
    version: Annotated[str, Meta(max_length=100)]
    at: Annotated[str, Meta(max_length=40)]


class Decisions(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner has decided: approvals by distribution, and names of plugins or distributions that never run."""

    format: Literal[1] = 1
    approved: Annotated[dict[Name, Approval], Meta(max_length=MOST)] = {}
    blocked: Annotated[tuple[Name, ...], Meta(max_length=MOST)] = ()

    def approve(self, name: str, approval: Approval) -> Decisions:
        """Return these with one more approval."""
        return msgspec.structs.replace(self, approved={**self.approved, name: approval})

    def block(self, name: str) -> Decisions:
        """Return these with one more name that never runs."""
        return msgspec.structs.replace(self, blocked=tuple(sorted({*self.blocked, name})))

    def free(self, *names: str) -> Decisions:
        """Return these with none of the names blocked."""
        return msgspec.structs.replace(self, blocked=tuple(sorted(set(self.blocked) - set(names))))

    def forget(self, name: str) -> Decisions:
        """Return these as if nothing had been decided about a distribution."""
        approved = {one: approval for one, approval in self.approved.items() if one != name}
        return msgspec.structs.replace(self.free(name), approved=approved)


class OwnFolder(NamedTuple):
    """One distribution in a folder of its own: its normalized name, and the hash of its files or why there is none."""

    name: str
    path: Path
    digest: str
    problem: str = ""

    def distribution(self) -> Distribution | None:
        """Return what is installed there under its name; ``None`` where nothing is."""
        from importlib.metadata import distributions

        there = distributions(name=self.name, path=[str(self.path)])
        return next(iter(there), None)


class PluginFolders:
    """All folders of one owner, and the decisions about them."""

    def __init__(self, path: Path) -> None:
        """Take the folder that holds them; it need not be there."""
        self.path = path

    def listed(self) -> list[OwnFolder]:
        """Return what is installed, by name; a folder that others could change has a problem instead of a hash."""
        try:
            names = sorted(entry.name for entry in self.path.iterdir() if _NAME.fullmatch(entry.name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise SettingProblem(f"the folder of plugins {self.path} cannot be read: {error.strerror}") from None
        problem = others_can_change(self.path)
        return [self._look(name, problem) for name in names[:MOST] if (self.path / name).is_dir()]

    def get(self, name: str) -> OwnFolder:
        """Return what is installed under a distribution's name. Raises NotFound."""
        if _NAME.fullmatch(name) and (self.path / name).is_dir():
            return self._look(name, others_can_change(self.path))
        raise NotFound(f"no plugin {name!r} was installed by `rma plugins install`")

    def _look(self, name: str, problem: str) -> OwnFolder:
        path = self.path / name
        try:
            if problem := problem or _open_to_others(path):
                return OwnFolder(name, path, "", problem)
            return OwnFolder(name, path, digest_of(path))
        except (OSError, ValueError) as error:
            return OwnFolder(name, path, "", f"its files cannot be read: {error}")

    def decisions(self) -> Decisions:
        """Return what was decided. Raises SettingProblem for a file that cannot be read: it may block something."""
        file = self.path / DECISIONS
        try:
            with file.open("rb") as handle:
                data = handle.read(MOST_DECISION_BYTES + 1)
            if problem := others_can_change(file):
                raise SettingProblem(f"{file}: {problem}")
            return decode(data, Decisions, subject=str(file))
        except FileNotFoundError:
            return Decisions()
        except OSError as error:
            raise SettingProblem(f"{file} cannot be read: {error.strerror}") from None
        except ValidationProblem as error:
            hints = ("remove it; then approve and block anew",)
            raise SettingProblem(f"{file} is damaged: {error}", hints=hints) from None

    def approves(self, folder: OwnFolder) -> bool:
        """Whether exactly these files were approved, and their distribution is not blocked."""
        decisions = self.decisions()
        approval = decisions.approved.get(folder.name)
        approved = approval is not None and not folder.problem and approval.sha256 == folder.digest
        return approved and folder.name not in decisions.blocked

    def decide(self, change: Callable[[Decisions], Decisions]) -> Decisions:
        """Keep a decision; two that are made at one time are both kept. Raises UsageProblem, SettingProblem."""
        with self._locked():
            changed = change(self.decisions())
            if max(len(changed.approved), len(changed.blocked)) > MOST:
                raise UsageProblem(f"at most {MOST} decisions are kept: remove plugins that you do not use")
            data = msgspec.json.encode(changed)
            # What cannot be read again would keep every program from starting.
            decode(data, Decisions, subject="decisions")
            self._write(lambda: own_files.replace(self.path / DECISIONS, data))
            return changed

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """Give a new folder beside the others, which is gone afterwards. Raises SettingProblem."""
        staging = self.path / f"{HIDDEN}new-{secrets.token_hex(6)}"
        self._make()
        self._write(lambda: staging.mkdir(mode=0o700))
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def put(self, name: str, made: Path) -> OwnFolder:
        """Let a finished folder take the place of what was installed under that name. Raises SettingProblem."""
        if not _NAME.fullmatch(name):
            raise UsageProblem(f"{name!r} is no name of a distribution")
        with self._locked():
            old = self.path / f"{HIDDEN}old-{secrets.token_hex(6)}"
            self._write(lambda: _swap(made, self.path / name, old))
        shutil.rmtree(old, ignore_errors=True)
        return self.get(name)

    def remove(self, name: str) -> None:
        """Remove a distribution and what was decided about it. Raises NotFound, SettingProblem."""
        gone = self.get(name)
        out = self.path / f"{HIDDEN}old-{secrets.token_hex(6)}"
        self._write(lambda: gone.path.rename(out))
        shutil.rmtree(out, ignore_errors=True)
        self.decide(lambda known: known.forget(name))

    def _make(self) -> None:
        """Make the folder, and the state folder that holds it, for nobody else. Raises SettingProblem."""
        for folder in (self.path.parent, self.path):
            self._write(lambda folder=folder: folder.mkdir(mode=0o700, parents=True, exist_ok=True))  # type: ignore[misc]
        if problem := others_can_change(self.path):
            raise SettingProblem(f"the folder of plugins {self.path}: {problem}")

    def _write(self, step: Callable[[], object]) -> None:
        try:
            step()
        except OSError as error:
            raise SettingProblem(f"the folder of plugins {self.path}: {error.strerror or error}") from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One program at a time changes something; what it does takes moments."""
        self._make()
        with (self.path / f"{HIDDEN}lock").open("ab") as handle:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)
            else:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _open_to_others(path: Path) -> str:
    """Say what lets others at the files below a folder, or nothing: pip leaves those as open as the umask lets it."""
    if sys.platform != "win32" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        return f"others can get at its files: chmod 700 {path}"
    return others_can_change(path)


def _swap(made: Path, place: Path, old: Path) -> None:
    if place.exists():
        place.rename(old)
    made.rename(place)
    own_files.sync_folder(place.parent)


def digest_of(folder: Path) -> str:
    """Return a hash over the names and contents of all files. Raises OSError, ValueError for what is no plain file."""
    whole, room = hashlib.sha256(), MOST_BYTES
    for number, file in enumerate(_files(folder)):
        with file.open("rb", buffering=0) as handle:
            size = os.fstat(handle.fileno()).st_size
            room -= size
            if number >= MOST_FILES or room < 0:
                raise ValueError(f"more than {MOST_FILES} files or {MOST_BYTES // 2**20} MiB are no plugin")
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        whole.update(f"{file.relative_to(folder).as_posix()}\0{content}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()


def _files(folder: Path) -> list[Path]:
    """Return every file below a folder, in one order everywhere."""
    found: list[Path] = []

    def refuse(error: OSError) -> None:
        raise error

    # What cannot be listed cannot be approved.
    for place, folders, names in os.walk(folder, onerror=refuse):
        for name in (*folders, *names):
            path = Path(place, name)
            mode = path.lstat().st_mode
            # A link's target could change and this would not tell.
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"{path.relative_to(folder)} is neither a file nor a folder")
            if stat.S_ISREG(mode):
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())
