"""The process that reads one document, see `rma_service.child`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rma_ocr import media, options, rapid, reading
from rma_service.child import serve_one
from rma_service.envelope import open_envelope

if TYPE_CHECKING:
    from rma_service.child import Job


def read(job: Job) -> bytes:
    """Return the text of the document of ``job`` as JSON; raises ServiceProblem."""
    sent = open_envelope(Path(job.body).read_bytes(), content_type=job.content_type, query=job.query)
    asked = options.parse(sent.options)
    media_type, warnings = media.kind_of(sent.data, content_type=sent.content_type)
    found = reading.read(sent.data, media_type, asked, filename=sent.filename, warnings=warnings)
    return msgspec.json.encode(found)


if __name__ == "__main__":
    serve_one(read, prepare=rapid.engine, quiet=("RapidOCR", "PIL", "pypdfium2"))
