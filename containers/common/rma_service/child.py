"""The process that reads one document and ends, so that what a hostile one does to it is over with it.

It is started ahead, imports what is slow to import, and waits for one job on its input: a line of JSON (`Job`). It
answers on its output with a line of JSON (`Head`) and the body. All that it may take of the machine is limited before
it looks at the document.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

import msgspec

from rma_service.problems import CorruptDocument, ServiceProblem, TooComplex

if TYPE_CHECKING:
    from collections.abc import Callable

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


def answer(job: Job, read: Callable[[Job], bytes]) -> tuple[int, str, bytes]:
    """Return status, media type and body of the answer to ``job``; what ``read`` cannot cope with is a problem."""
    try:
        return 200, JSON, _guarded(job, read)
    except ServiceProblem as problem:
        if problem.__cause__ is not None:
            logger.info("document refused: %s (%r)", problem, problem.__cause__)
        return problem.status, PROBLEM, problem.body()


def _guarded(job: Job, read: Callable[[Job], bytes]) -> bytes:
    try:
        return read(job)
    except ServiceProblem:
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


def serve_one(read: Callable[[Job], bytes], *, prepare: Callable[[], object], quiet: tuple[str, ...] = ()) -> None:
    """Serve one job: ``prepare`` while nobody waits, then answer with what ``read`` returns, and end.

    ``quiet`` names loggers of libraries that talk about every odd document.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    # Parsers may print; the answer's pipe is kept apart, and what they print goes where errors go.
    out = os.dup(1)
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for name in quiet:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    prepare()
    line = sys.stdin.buffer.readline()
    if not line:
        return
    job = msgspec.json.decode(line, type=Job)
    _limit(job)
    status, content_type, body = answer(job, read)
    with os.fdopen(out, "wb") as pipe:
        pipe.write(msgspec.json.encode(Head(status=status, content_type=content_type, length=len(body))) + b"\n")
        pipe.write(body)
    # What is left (freeing a large document, object by object) would only keep the client waiting.
    os._exit(0)
