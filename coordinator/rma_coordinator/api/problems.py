"""Failures as HTTP: RFC 9457 problems with a sentence, hints, and the status each kind of error has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rma_coordinator.store import StoreFailed
from rma_core import errors
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from rma_core.errors import RMAError

#: First match wins, so subclasses stand before their parents.
STATUSES: tuple[tuple[type[RMAError], int], ...] = (
    (errors.ValidationProblem, 400),
    (errors.UsageProblem, 400),
    (errors.NotAuthenticated, 401),
    (errors.Forbidden, 403),
    (errors.NotFound, 404),
    (errors.Refused, 409),
    (errors.OutOfSpace, 503),
    (StoreFailed, 503),
    (errors.TryLater, 503),
)

#: For each status its title, and the stable code of a problem that has no better one.
STATUS_WORDS: dict[int, tuple[str, str]] = {
    400: ("Bad request", "bad_request"),
    401: ("Not authenticated", "not_authenticated"),
    403: ("Forbidden", "forbidden"),
    404: ("Not found", "not_found"),
    405: ("Method not allowed", "method"),
    408: ("Request timeout", "timeout"),
    409: ("Conflict", "refused"),
    411: ("Length required", "length"),
    413: ("Body too large", "too_large"),
    414: ("Address too long", "too_long"),
    415: ("Unsupported media type", "encoding"),
    422: ("Unprocessable content", "unprocessable"),
    426: ("Upgrade required", "upgrade"),
    429: ("Too many requests", "try_later"),
    431: ("Header too large", "header"),
    500: ("Internal error", "internal"),
    501: ("Not possible", "impossible"),
    502: ("Bad gateway", "task_failed"),
    503: ("Not now", "try_later"),
    504: ("Too late", "deadline"),
}
CONTENT_TYPE = "application/problem+json"
NOT_AUTHENTICATED, NOT_NOW = 401, 503
#: Seconds after which it is worth trying again, where a refusal for now does not say.
RETRY_AFTER_S = 10.0


class HTTPProblem(errors.RMAError):
    """A failure whose HTTP status is part of its meaning (413, 415, 429 …)."""

    code = "http"

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "",
        retry_after_s: float | None = None,
        hints: tuple[str, ...] = (),
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, hints=hints)
        self.status = status
        self.name = code or STATUS_WORDS.get(status, ("", self.code))[1]
        self.retry_after_s = retry_after_s
        self.headers = headers or {}


def wrong_method(methods: list[str]) -> HTTPProblem:
    """Return the refusal of a method that an address does not take."""
    names = ", ".join(sorted(set(methods)))
    return HTTPProblem(405, f"this address takes {names}", headers={"allow": names})


def status_of(error: RMAError) -> int:
    """Return the HTTP status of an expected failure."""
    if isinstance(error, HTTPProblem):
        return error.status
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 400)


def problem(error: RMAError, **more: object) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of a problem; ``more`` are further members."""
    status = status_of(error)
    code = error.name if isinstance(error, HTTPProblem) else error.code
    body: dict[str, Any] = {
        "type": f"urn:rma:problem:{code}",
        "title": STATUS_WORDS.get(status, ("Error", ""))[0],
        "status": status,
        "detail": error.message,
        "code": code,
    }
    if error.hints:
        body["hints"] = list(error.hints)
    if isinstance(error, errors.ValidationProblem):
        body["errors"] = [{"where": p.where, "what": p.what} for p in error.problems]
    headers = {"content-type": CONTENT_TYPE, "cache-control": "no-store"}
    if isinstance(error, HTTPProblem):
        headers |= error.headers
    wait = getattr(error, "retry_after_s", None)
    if wait is None and status == NOT_NOW:
        wait = RETRY_AFTER_S
    if wait is not None:
        headers["retry-after"] = str(max(1, round(wait)))
    if status == NOT_AUTHENTICATED:
        headers["www-authenticate"] = 'Bearer realm="rma"'
    return status, headers, encode({**body, **more})


def unexpected() -> tuple[int, dict[str, str], bytes]:
    """Return the problem for a bug; the traceback is in the coordinator's log, never in the answer."""
    return problem(HTTPProblem(500, "something went wrong in the coordinator; its log has the details"))
