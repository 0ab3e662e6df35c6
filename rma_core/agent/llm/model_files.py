"""The files of models on this machine: those that its owner has anyway, and those that were downloaded.

A downloaded file lies below the state folder under its own hash, and is whole as soon as it has its name. An owner's
file is taken where it lies, when its hash is the one that is asked for. Downloads come one by one, each after a look at
the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import shutil
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from rma_core import model_describe
from rma_core.agent.llm.download import STALL_S, Rules, download
from rma_core.catalog import KEPT_STORAGE_BYTES, KEPT_STORAGE_SHARE
from rma_core.errors import ModelMissing, OutOfSpace, ValidationProblem
from rma_core.interfaces import GivenFile, GivenFiles, PullProgress
from rma_core.models.sizes import human

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Collection, Iterable, Mapping
    from pathlib import Path

    from rma_core.models.weights import AssignedModel, ModelFile

    Told = Callable[[PullProgress], None]

logger = logging.getLogger(__name__)

#: What tells a service where its model is.
VARIABLE = "MODEL_FILE"
#: A file that is not whole yet.
PART = ".part"


class _Seen(NamedTuple):
    """What tells one version of an owner's file from another."""

    path: Path
    size_bytes: int
    modified_ns: int


class ModelFiles:
    """Gets models' files below ``folder``; ``own`` are the owner's files, by the name of the model they hold.

    ``hosts`` are those that the owner downloads from (empty: any public one). ``free`` gives the disk's free bytes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        own: Mapping[str, Path] | None = None,
        hosts: Collection[str] = (),
        context: ssl.SSLContext | None = None,
        stall_s: float = STALL_S,
        free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._folder, self._hosts, self._context, self._stall_s = folder, hosts, context, stall_s
        self.own: dict[str, Path] = dict(own or {})
        self._free = free
        self._busy = asyncio.Lock()
        self._digests: dict[_Seen, str] = {}
        #: Hashes of the files that containers want now: they are not removed to make room.
        self.wanted: frozenset[str] = frozenset()

    def key(self, model: AssignedModel) -> str:
        """Return what stands for a model's content, as far as it is known."""
        parts = "\0".join(f"{one.name} {one.size_bytes} {one.sha256 or self._own_mark(model)}" for one in model.files)
        return hashlib.sha256(parts.encode()).hexdigest()

    def _own_mark(self, model: AssignedModel) -> str:
        """Return what changes when the owner's file does: it need not be hashed for that."""
        path = self.own.get(model.name)
        seen = _seen(path) if path else None
        return f"{seen.path} {seen.modified_ns}" if seen else ""

    async def get(self, model: AssignedModel, told: Told, *, copied: bool = False) -> GivenFiles:
        """Return a model's files, downloaded where they are not here; ``copied``: a container gets a copy of them.

        Raises ModelMissing, DownloadFailed, OutOfSpace.
        """
        found = []
        done, total = 0, model.size_bytes
        for file in model.files:
            path = await asyncio.to_thread(self._here, model, file) or await self._by_hash(file, told)
            if path is None:
                path = await self._download(file, told, before=done, total=total, copied=copied)
            found.append(GivenFile(name=file.name, path=str(path), size_bytes=file.size_bytes))
            done += file.size_bytes
        return GivenFiles(variable=VARIABLE, key=self.key(model), files=tuple(found))

    def _here(self, model: AssignedModel, file: ModelFile) -> Path | None:
        """Return where a file is, if it need not be read for that. Raises ModelMissing for an owner's that is gone."""
        if not file.sha256:
            path = self.own.get(model.name)
            seen = _seen(path) if path else None
            if seen is None or seen.size_bytes != file.size_bytes:
                raise ModelMissing(f"the file of {model.name} is not there any more, or has changed: {path or 'none'}")
            return seen.path
        path = self._place(file)
        if path.is_file():
            with contextlib.suppress(OSError):
                # Of those that nobody wants, the one that was used longest ago goes first.
                path.parent.touch()
            return path
        return None

    def _place(self, file: ModelFile) -> Path:
        return self._folder / file.sha256 / file.name

    async def _by_hash(self, file: ModelFile, told: Told) -> Path | None:
        """Return an owner's file that is the one that is asked for; only files of its size are read."""
        for path in self.own.values():
            seen = await asyncio.to_thread(_seen, path)
            if seen is None or seen.size_bytes != file.size_bytes:
                continue
            if seen not in self._digests:
                told(PullProgress(note=f"looking whether {path.name} is {file.name}"))
                self._digests[seen] = await _digest(path)
            if self._digests[seen] == file.sha256:
                return path
        return None

    async def _download(self, file: ModelFile, told: Told, *, before: int, total: int, copied: bool) -> Path:
        if not file.url:
            raise ModelMissing(f"{file.name} is not on this machine, and its pool names no place to get it from")
        if self._busy.locked():
            told(PullProgress(done_bytes=before, total_bytes=total, note="waits for another download"))
        async with self._busy:
            place = self._place(file)
            part = place.with_name(place.name + PART)
            kept = await asyncio.to_thread(self._make_room, file, part, twice=copied)
            note = f"downloading {file.name}"

            def step(done: int) -> None:
                told(PullProgress(done_bytes=before + done, total_bytes=total, note=note))

            def short() -> str:
                left = self._free(part.parent)
                return "" if left >= kept else f"the disk has {human(left)} left, and {human(kept)} stay with the owner"

            began = time.monotonic()
            rules = Rules(hosts=self._hosts, short=short, context=self._context)
            try:
                await download(file, part, rules=rules, told=step, stall_s=self._stall_s)
            except OutOfSpace:
                # What cannot become whole must not fill the owner's disk.
                await asyncio.to_thread(shutil.rmtree, place.parent, ignore_errors=True)
                raise
            told(PullProgress(done_bytes=before + file.size_bytes, total_bytes=total, note=f"checking {file.name}"))
            await self._approve(file, part, place)
        words = "%s was downloaded: %s in %.0f s"
        about = {"action": "downloaded", "model": file.name}
        logger.info(words, file.name, human(file.size_bytes), time.monotonic() - began, extra=about)
        return place

    async def _approve(self, file: ModelFile, part: Path, place: Path) -> None:
        """Give a file its name once its hash is the one that was asked for. Raises ModelMissing."""
        found = await _digest(part)
        if found != file.sha256:
            await asyncio.to_thread(shutil.rmtree, place.parent, ignore_errors=True)
            raise ModelMissing(f"{file.name} is not the file that was asked for: its SHA-256 is {found}")
        await asyncio.to_thread(part.replace, place)

    def _make_room(self, file: ModelFile, part: Path, *, twice: bool) -> int:
        """See that a file fits beside what stays with the owner, and return that in bytes. Raises OutOfSpace.

        Models that nobody wants any more give way, those that were used longest ago first.
        """
        part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        seen = _seen(part)
        needed = file.size_bytes - (seen.size_bytes if seen else 0) + (file.size_bytes if twice else 0)
        keep = {*self.wanted, file.sha256}
        for folder in [None, *self._unwanted(keep)]:
            if folder is not None:
                logger.info("%s gives way to %s", folder.name[:12], file.name, extra={"action": "model_removed"})
                shutil.rmtree(folder, ignore_errors=True)
            free = self._free(part.parent)
            kept = int(min(free * KEPT_STORAGE_SHARE, KEPT_STORAGE_BYTES))
            if needed <= free - kept:
                return kept
        copies = ", a copy for its container included" if twice else ""
        raise OutOfSpace(
            f"{file.name} needs {human(needed)} of disk{copies}; {human(free)} are free, of which {human(kept)} stay"
            " with the owner"
        )

    def _unwanted(self, keep: Collection[str]) -> list[Path]:
        """Return the folders of files that nobody wants, the one that was used longest ago first."""
        found = [one for one in self._folder.iterdir() if one.is_dir() and one.name not in keep]
        return sorted(found, key=lambda one: one.stat().st_mtime)

    def want(self, models: Iterable[AssignedModel]) -> None:
        """Say which models are wanted from now on."""
        self.wanted = frozenset(file.sha256 for model in models for file in model.files if file.sha256)


def _seen(path: Path) -> _Seen | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return _Seen(path, found.st_size, found.st_mtime_ns)
    return None


class _Given(Exception):
    """Nobody waits for a hash any more."""


async def _digest(path: Path) -> str:
    """Hash a file in a thread, which ends when nobody waits any more. Raises ModelMissing."""
    abandoned = threading.Event()

    def told(_: float) -> None:
        if abandoned.is_set():
            raise _Given

    try:
        return await asyncio.to_thread(model_describe.digest, path, told)
    except asyncio.CancelledError:
        abandoned.set()
        raise
    except ValidationProblem as error:
        raise ModelMissing(str(error)) from None
