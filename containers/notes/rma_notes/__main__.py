"""``python -m rma_notes``: serve, on a port or a Unix socket."""

from __future__ import annotations

from rma_notes import __version__
from rma_notes.media import SUPPORTED
from rma_service import server

#: Documents read at once.
SLOTS = 2
#: Seconds a document may take.
DEADLINE_S = 60.0
#: Address space of one process, which has about 200 MB of it before it has read anything.
MEMORY_BYTES = 640 * 1024 * 1024


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    server.main(
        server.Service(
            name="notes", module="rma_notes", version=__version__, description="Document processing over HTTP.",
            facts={"media_types": SUPPORTED}, slots=SLOTS, deadline_s=DEADLINE_S, memory_bytes=MEMORY_BYTES,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
