"""The process that reads one document and ends, so that what a hostile one does to it is over with it.

It is started ahead, imports the parsers, and waits for one job on its input: a line of JSON (`Job`). It answers on its
output with a line of JSON (`Head`) and the body. All that it may take of the machine is limited before it looks at the
document.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec

from rma_notes import compose, media
from rma_notes.envelope import open_envelope
from rma_notes.problems import CorruptDocument, NotesProblem, TooComplex

logger = logging.getLogger(__name__)

#: The answer goes to a pipe, and nothing else is written: no file may grow at all.
_FILE_BYTES = 0
_OPEN_FILES = 64
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
JSON, PROBLEM = "application/json", "application/problem+json"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to read (a file with the request's body, and how it was sent), and within which limits."""

    body: str
    content_type: str
    query: str
    cpu_s: int
    memory_bytes: int


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The answer's status and type; the body follows in ``length`` bytes."""

    status: int
    content_type: str
    length: int


def answer(job: Job) -> tuple[int, str, bytes]:
    """Return status, media type and body of the answer to ``job``."""
    try:
        return 200, JSON, _notes(job)
    except NotesProblem as problem:
        if problem.__cause__ is not None:
            logger.info("document refused: %s (%r)", problem, problem.__cause__)
        return problem.status, PROBLEM, problem.body()


def _notes(job: Job) -> bytes:
    try:
        sent = open_envelope(Path(job.body).read_bytes(), content_type=job.content_type, query=job.query)
        kind = media.kind_of(sent.data, content_type=sent.content_type, filename=sent.filename)
        source = compose.Source(kind, sent.filename, len(sent.data))
        document = compose.read(sent.data, source, sent.options)
        return msgspec.json.encode(compose.compose(document, source, sent.options))
    except NotesProblem:
        raise
    except MemoryError as error:
        raise TooComplex("the document needs more memory than one may take here") from error
    except RecursionError as error:
        raise TooComplex("the document is nested too deeply") from error
    except Exception as error:
        # The boundary around parsers that strangers' files are made to break; whatever they raise, the file did it.
        logger.warning("a parser failed", exc_info=True)
        raise CorruptDocument("the document cannot be read: it is damaged, or of a kind never seen before") from error


def _limit(job: Job) -> None:
    """Take from this process what parsing does not need, where the system has a way to."""
    if sys.platform != "win32":
        import resource

        limits = {
            "RLIMIT_CPU": (job.cpu_s, job.cpu_s + 1),
            "RLIMIT_AS": (job.memory_bytes,) * 2,
            "RLIMIT_FSIZE": (_FILE_BYTES,) * 2,
            "RLIMIT_NOFILE": (_OPEN_FILES,) * 2,
            "RLIMIT_CORE": (0, 0),
        }
        for name, (soft, hard) in limits.items():
            # macOS has names that it then refuses; the deadline that the parent keeps holds everywhere.
            with contextlib.suppress(ValueError, OSError, AttributeError):
                resource.setrlimit(getattr(resource, name), (soft, hard))


def _die_with_parent() -> None:
    """On Linux, end when the server does, even in the middle of a document; and never gain a privilege."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _import_parsers() -> None:
    """Import what is slow to import while nobody waits."""
    from rma_notes.readers import docx, html, markdown, pdf, plain  # noqa: F401 - importing is the purpose


def main() -> None:
    """Serve one job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    # Parsers may print; the answer's pipe is kept apart, and what they print goes where errors go.
    out = os.dup(1)
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for name in ("pypdfium2", "docx", "charset_normalizer"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _import_parsers()
    line = sys.stdin.buffer.readline()
    if not line:
        return
    job = msgspec.json.decode(line, type=Job)
    _limit(job)
    status, content_type, body = answer(job)
    with os.fdopen(out, "wb") as pipe:
        pipe.write(msgspec.json.encode(Head(status=status, content_type=content_type, length=len(body))) + b"\n")
        pipe.write(body)
    # What is left (freeing a large document, object by object) would only keep the client waiting.
    os._exit(0)


if __name__ == "__main__":
    main()
