"""The process that reads one document, see `rma_service.child`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rma_notes import compose, media, options
from rma_service.child import serve_one
from rma_service.envelope import open_envelope

if TYPE_CHECKING:
    from rma_service.child import Job


def read(job: Job) -> bytes:
    """Return the notes on the document of ``job`` as JSON; raises ServiceProblem."""
    body = Path(job.body).read_bytes()
    sent = open_envelope(body, content_type=job.content_type, query=job.query, takes_text=True)
    asked = options.parse(sent.options)
    kind = media.kind_of(sent.data, content_type=sent.content_type, filename=sent.filename)
    source = compose.Source(kind, sent.filename, len(sent.data))
    document = compose.read(sent.data, source, asked)
    return msgspec.json.encode(compose.compose(document, source, asked))


def _import_parsers() -> None:
    """Import what is slow to import while nobody waits."""
    from rma_notes.readers import docx, html, markdown, pdf, plain  # noqa: F401 - importing is the purpose


if __name__ == "__main__":
    serve_one(read, prepare=_import_parsers, quiet=("pypdfium2", "docx", "charset_normalizer"))
