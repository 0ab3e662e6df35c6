"""Files for containers: copied into a volume of the engine's own, which a container reads and nothing writes to again.

A copy works everywhere: where the engine runs in a virtual machine, where labels guard the host's files, and without a
host's folder being shown to anybody. From before a volume is there until it is filled, or gone again, a container of a
known name marks it, which never runs; so a copy that was broken off is known as such, whatever broke it off and when.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from rma_core.container_engine.sayings import unless_absent
from rma_core.errors import ImagePullFailed
from rma_core.interfaces import PullProgress

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Collection, Iterator

    from docker.types import Mount

    from rma_core.container_engine.connection import Engine
    from rma_core.interfaces import ContainerSpec, GivenFile, GivenFiles

#: Where a container finds its files.
FOLDER = "/models"
#: Bytes that are read and sent at once, and the size of a block of an archive.
PIECE_BYTES, BLOCK_BYTES = 2**20, 512
#: Characters of a key in a volume's name.
KEY_CHARACTERS = 24
CONFLICT, NOT_FOUND = 409, 404


def volume_name(worker_id: str, key: str) -> str:
    """Return ``rma-<8 hex digits of the worker>-files-<key>``: two workers on one engine do not meet."""
    return f"{_prefix(worker_id)}{key[:KEY_CHARACTERS]}"


def _prefix(worker_id: str) -> str:
    return f"rma-{worker_id.removeprefix('worker-')}-files-"


def inside(files: GivenFiles) -> str:
    """Return where a container finds its file, or the folder of several."""
    return f"{FOLDER}/{files.files[0].name}" if len(files.files) == 1 else FOLDER


def is_filled(engine: Engine, spec: ContainerSpec) -> bool:
    """Say whether the volume of a spec is there, and was filled to its end."""
    if spec.files is None:
        return True
    name = volume_name(spec.worker_id, spec.files.key)
    volume = unless_absent(lambda: engine.api.inspect_volume(name))
    return volume is not None and unless_absent(lambda: engine.api.inspect_container(_mark(name))) is None


def _mark(volume: str) -> str:
    return f"{volume}-filling"


def _filler(volume: str) -> str:
    return f"{volume}-filler"


def fill(
    engine: Engine, spec: ContainerSpec, image_id: str, progress: Callable[[PullProgress], None],
    abandoned: threading.Event,
) -> None:  # fmt: skip
    """Copy a spec's files into its volume; what an earlier try left is removed first, and this one's if it fails."""
    files = spec.files
    if files is None:
        return
    if missing := next((file for file in files.files if not Path(file.path).is_file()), None):
        raise ImagePullFailed(f"the file {missing.name} is not on this machine any more")
    name = volume_name(spec.worker_id, files.key)
    remove(engine, name)
    try:
        _make_idle(engine, _mark(name), image_id)
        made = _make_filler(engine, name, image_id)
        pieces = _archive(files.files, progress, abandoned)
        engine.slow.api.put_archive(made, FOLDER, pieces)
        engine.slow.api.remove_container(made, force=True)
        engine.slow.api.remove_container(_mark(name), force=True)
    except BaseException:
        remove(engine, name)
        raise


def _make_filler(engine: Engine, name: str, image_id: str) -> str:
    """Make a container that has the volume to write to; making it makes the volume."""
    from docker.types import Mount

    return _make_idle(engine, _filler(name), image_id, Mount(target=FOLDER, source=name, type="volume", no_copy=True))


def _make_idle(engine: Engine, name: str, image_id: str, *mounts: Mount) -> str:
    """Make a container that never runs; return its id."""
    api = engine.slow.api
    host = api.create_host_config(mounts=list(mounts), network_mode="none", cap_drop=["ALL"])
    # It needs a program's name, although it is never started.
    made = api.create_container(image_id, entrypoint=["/none"], name=name, host_config=host)
    return str(made["Id"])


def _archive(
    files: tuple[GivenFile, ...], progress: Callable[[PullProgress], None], abandoned: threading.Event
) -> Iterator[bytes]:
    """Give an archive of the files piece by piece, readable by anyone inside."""
    total = sum(file.size_bytes for file in files)
    done = 0
    for file in files:
        head = tarfile.TarInfo(file.name)
        head.size, head.mode = file.size_bytes, 0o444
        yield head.tobuf(tarfile.GNU_FORMAT)
        for piece in _pieces(file):
            if abandoned.is_set():
                raise ImagePullFailed("nobody waits for the files any more")
            done += len(piece)
            progress(PullProgress(done_bytes=done, total_bytes=total, note="copying the model's file into a volume"))
            yield piece
        yield bytes(-file.size_bytes % BLOCK_BYTES)
    yield bytes(2 * BLOCK_BYTES)


def _pieces(file: GivenFile) -> Iterator[bytes]:
    """Give a file's bytes, exactly as many as were said."""
    left = file.size_bytes
    with Path(file.path).open("rb") as opened:
        while left:
            piece = opened.read(min(left, PIECE_BYTES))
            if not piece:
                raise ImagePullFailed(f"the file {file.name} is shorter than it was")
            left -= len(piece)
            yield piece


def remove(engine: Engine, name: str) -> None:
    """Remove a volume, what was filling it, and at last the mark that it is not whole; one that is in use stays."""
    from docker.errors import APIError

    api = engine.slow.api
    steps: list[Callable[[], object]] = [
        lambda: api.remove_container(_filler(name), force=True),
        lambda: api.remove_volume(name),
        lambda: api.remove_container(_mark(name), force=True),
    ]
    for step in steps:
        try:
            step()
        except APIError as error:
            if error.status_code not in (NOT_FOUND, CONFLICT):
                raise


def forget(engine: Engine, worker_id: str, keep: Collection[str]) -> None:
    """Remove a worker's volumes of files, except those of the keys in ``keep``."""
    kept = {volume_name(worker_id, key) for key in keep}
    found = engine.api.volumes(filters={"name": _prefix(worker_id)}).get("Volumes") or ()
    for name in [str(one["Name"]) for one in found]:
        if name.startswith(_prefix(worker_id)) and name not in kept:
            remove(engine, name)
