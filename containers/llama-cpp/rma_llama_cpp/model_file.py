"""What can be said of a model's file before llama.cpp reads it: there, whole, the right one, not too large."""

from __future__ import annotations

import hashlib
import logging
import struct
import time
from typing import TYPE_CHECKING

from rma_llama_cpp.settings import Unusable
from rma_service import machine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: Read at once while the hash is computed.
PIECE_BYTES = 4 * 1024 * 1024
#: Seconds between two lines about it in the log.
TELL_S = 5.0


def check(path: Path) -> int:
    """Return the file's size in bytes. Raises Unusable for what cannot be a model."""
    try:
        if not path.is_file():
            raise Unusable(f"there is no model file {path}" if not path.exists() else f"{path} is not a file")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise Unusable(f"the model file {path} cannot be read: {error.strerror}") from None
    if len(head) < 8 or head[:4] != MAGIC:  # noqa: PLR2004 - magic and version are four bytes each
        raise Unusable(f"{path} is not a GGUF file")
    [version] = struct.unpack("<I", head[4:])
    if version not in VERSIONS:
        raise Unusable(f"{path} is a GGUF file of version {version}; {' and '.join(map(str, VERSIONS))} can be read")
    return size


def check_room(path: Path, size_bytes: int) -> None:
    """Raise Unusable for a file that is larger than the memory which is free now."""
    free = machine.memory_bytes()
    if free is not None and size_bytes > free:
        has, there = _gb(size_bytes), _gb(free)
        raise Unusable(f"{path} has {has}, more than the {there} of memory that are free for this service")


def check_digest(path: Path, wanted: str, progress: Callable[[float], None]) -> None:
    """Compare the file's SHA-256 with ``wanted`` and tell the share that was read. Raises Unusable."""
    digest, done, told = hashlib.sha256(), 0, time.monotonic()
    try:
        size = path.stat().st_size or 1
        with path.open("rb") as file:
            # Never more than was there at the beginning, in case somebody still writes to it.
            while done < size and (piece := file.read(PIECE_BYTES)):
                digest.update(piece)
                done += len(piece)
                progress(min(1.0, done / size))
                if time.monotonic() - told > TELL_S:
                    told = time.monotonic()
                    logger.info("checking the model file: %d %%", 100 * done // size)
    except OSError as error:
        raise Unusable(f"the model file {path} cannot be read: {error.strerror}") from None
    if digest.hexdigest() != wanted:
        raise Unusable(f"{path} is not the file that was asked for: its SHA-256 is {digest.hexdigest()}, not {wanted}")


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
