"""How many threads a document gets: by the processors this process was granted, not by what the machine has."""

from __future__ import annotations

import os

from rma_service import machine

#: More threads than this make a page hardly faster.
MAX_THREADS = 4


def threads(slots: int) -> int:
    """Return the threads for one document, where ``slots`` of them are read at once."""
    return max(1, min(MAX_THREADS, machine.cpus() // slots))


def mine() -> int:
    """Return the threads this process was told to use, which reads one document."""
    told = os.environ.get("OMP_THREAD_LIMIT", "")
    return int(told) if told.isdecimal() and int(told) else threads(1)
