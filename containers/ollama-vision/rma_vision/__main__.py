"""``python -m rma_vision``: serve, on a port or a Unix socket, with Ollama as a child where it is named."""

from __future__ import annotations

import os
import subprocess
import threading

from rma_service import server
from rma_vision import __version__, ollama, pictures

#: Pictures looked at once: Ollama is told the same.
SLOTS = 1
#: Seconds a picture may take, the loading of the model among them.
DEADLINE_S = 550.0
#: Address space of the process that holds one picture and its answer.
MEMORY_BYTES = 640 * 1024 * 1024


def main() -> None:
    """Serve until SIGTERM or SIGINT, or until Ollama ends."""
    if program := os.environ.get("OLLAMA_PROGRAM"):
        child = subprocess.Popen([program, "serve"], stdin=subprocess.DEVNULL)
        threading.Thread(target=_end_with, args=(child,), name="ollama", daemon=True).start()
    server.main(
        server.Service(
            name="vision", module="rma_vision", version=__version__, description="Questions about pictures over HTTP.",
            facts={"media_types": pictures.SUPPORTED, "model": ollama.model()},
            slots=SLOTS, deadline_s=DEADLINE_S, memory_bytes=MEMORY_BYTES,
        )
    )  # fmt: skip


def _end_with(child: subprocess.Popen[bytes]) -> None:
    """End this process when its child has ended: whoever started it starts it again."""
    child.wait()
    os._exit(1)


if __name__ == "__main__":
    main()
