"""The process that asks about one picture, see `rma_service.child`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rma_service.child import serve_one
from rma_service.envelope import open_envelope
from rma_vision import ollama, options, pictures

if TYPE_CHECKING:
    from rma_service.child import Job


def read(job: Job) -> bytes:
    """Return what the model says of the picture of ``job`` as JSON; raises ServiceProblem."""
    sent = open_envelope(Path(job.body).read_bytes(), content_type=job.content_type, query=job.query)
    asked = options.parse(sent.options)
    pictures.check(sent.data)
    return msgspec.json.encode(ollama.ask(sent.data, prompt=asked.prompt, max_tokens=asked.max_tokens))


def prepare() -> None:
    """Nothing is slow to import here."""


if __name__ == "__main__":
    serve_one(read, prepare=prepare)
