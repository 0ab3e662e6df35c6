"""``python -m rma_ocr``: serve, on a port or a Unix socket."""

from __future__ import annotations

from rma_ocr import __version__, cpus, engines
from rma_ocr.media import SUPPORTED
from rma_service import server

#: Documents read at once.
SLOTS = 2
#: Seconds a document may take; below what a pool gives a request.
DEADLINE_S = 500.0
#: Address space of one process, which has 800 MB of it before it has read anything, and uses a fifth of that.
MEMORY_BYTES = 2560 * 1024 * 1024


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    server.main(
        server.Service(
            name="ocr", module="rma_ocr", version=__version__, description="Text of pictures and scans over HTTP.",
            facts={"media_types": SUPPORTED, "engines": engines.described()},
            slots=SLOTS, deadline_s=DEADLINE_S, memory_bytes=MEMORY_BYTES, threads=cpus.threads,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
