"""Everything a request can fail with, as one tree; each becomes an RFC 9457 problem document.

ServiceProblem
├── BadRequest            400  the request itself cannot be read
├── BadOptions            422  options that do not fit, every one of them named
├── NotFound              404  there is nothing at that path
├── MethodNotAllowed      405  the path is right, the method is not
├── TooSlow               408  the body came too slowly
├── TooLarge              413  the body is over the limit
├── UnsupportedMediaType  415  a kind of document, or an encoding, that is not read here
├── EmptyDocument         422  there is nothing in it
├── EncryptedDocument     422  it opens with a password only
├── CorruptDocument       422  it is not what it says it is, or it is broken
├── TooComplex            422  it needs more time, memory or space than a document may take
└── Busy                  503  all slots are taken
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Problem types are names, not addresses: nothing has to be reachable for them to mean something.
TYPE_PREFIX = "urn:rma:problem:"


class ServiceProblem(Exception):
    """A failure the client can act on; ``detail`` is the sentence that says how, ``members`` stand beside it."""

    status: ClassVar[int] = 422
    code: ClassVar[str] = "unprocessable"
    title: ClassVar[str] = "The document cannot be processed"

    def __init__(self, detail: str, *, members: Mapping[str, object] | None = None) -> None:
        """Keep the sentence and further members of the problem document."""
        super().__init__(detail)
        self.detail = detail
        self.members = dict(members or {})

    def body(self) -> bytes:
        """Return the problem document as JSON."""
        document = {
            "type": TYPE_PREFIX + self.code,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }
        return msgspec.json.encode(document | self.members)


class BadRequest(ServiceProblem):
    """The request itself cannot be read."""

    status = 400
    code = "bad_request"
    title = "The request cannot be read"


class BadOptions(ServiceProblem):
    """Options that do not fit; ``errors`` names every one of them with what is wrong."""

    code = "bad_options"
    title = "Some options do not fit"

    def __init__(self, errors: Mapping[str, str]) -> None:
        """Take the reason for each option's name."""
        named = [{"name": name, "reason": reason} for name, reason in errors.items()]
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in errors.items()), members={"errors": named})


class NotFound(ServiceProblem):
    """There is nothing at that path."""

    status = 404
    code = "not_found"
    title = "There is nothing here"


class MethodNotAllowed(ServiceProblem):
    """The path is right, the method is not."""

    status = 405
    code = "method_not_allowed"
    title = "This method does not work here"


class TooSlow(ServiceProblem):
    """The body came too slowly."""

    status = 408
    code = "too_slow"
    title = "The request took too long to arrive"


class TooLarge(ServiceProblem):
    """The body is over the limit."""

    status = 413
    code = "too_large"
    title = "The document is too large"


class UnsupportedMediaType(ServiceProblem):
    """A kind of document, or an encoding of the body, that is not read here."""

    status = 415
    code = "unsupported_media_type"
    title = "This kind of document is not supported"


class EmptyDocument(ServiceProblem):
    """There is nothing in the document."""

    code = "empty_document"
    title = "The document is empty"


class EncryptedDocument(ServiceProblem):
    """The document opens with a password only."""

    code = "encrypted_document"
    title = "The document is encrypted"


class CorruptDocument(ServiceProblem):
    """The document is broken, or is not what it says it is."""

    code = "corrupt_document"
    title = "The document is damaged"


class TooComplex(ServiceProblem):
    """The document needs more time, memory or space than one may take here."""

    code = "too_complex"
    title = "The document takes too much to process"


class Busy(ServiceProblem):
    """All slots are taken and the queue is full."""

    status = 503
    code = "busy"
    title = "The service is busy"
