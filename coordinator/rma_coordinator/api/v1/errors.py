"""Failures under /v1, in the one form that OpenAI's SDKs read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rma_coordinator.api import limits, problems
from rma_coordinator.api.problems import HTTPProblem
from rma_coordinator.domain.tasks import new_task_id
from rma_core import errors
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from rma_coordinator.api.asgi import Call
    from rma_core.errors import RMAError

#: What SDKs obey: Node's takes longer waits for no wait at all, Python's gives up.
LEAST_WAIT_S, MOST_WAIT_S = 1, 60
#: What is waited where nobody says how long, and after which statuses.
USUAL_WAIT_S, WAITED_FOR = 5, (429, 503)
#: Digits of a number of seconds.
MOST_DIGITS = 9
#: Characters of a service's own message that go on.
MAX_MESSAGE = 4000
#: Where a request's id stands in its ASGI scope.
REQUEST_ID = "rma.request_id"
#: What a client may call its own request.
CLIENT_ID = re.compile(rb"[\x21-\x7e]{1,128}")
#: Where headers for a request's answer stand in its ASGI scope.
NOTED = "rma.headers"
#: Statuses that SDKs try again by themselves and that may then go well; below 500, that is.
WORTH_RETRYING = frozenset({408, 429})
TOO_LATE, BAD_GATEWAY, SERVER_ERROR, CLIENT_ERROR, CONFLICT = 504, 502, 500, 400, 409


class Words(NamedTuple):
    """What a status is called."""

    type: str
    code: str | None


WORDS: dict[int, Words] = {
    400: Words("invalid_request_error", None),
    401: Words("invalid_request_error", "invalid_api_key"),
    403: Words("invalid_request_error", "permission_denied"),
    404: Words("invalid_request_error", "not_found"),
    405: Words("invalid_request_error", "method_not_allowed"),
    408: Words("invalid_request_error", "request_timeout"),
    413: Words("invalid_request_error", "request_too_large"),
    415: Words("invalid_request_error", "unsupported_encoding"),
    422: Words("invalid_request_error", None),
    429: Words("rate_limit_error", "rate_limit_exceeded"),
    500: Words("server_error", "internal_error"),
    502: Words("server_error", "worker_failed"),
    503: Words("server_error", "service_unavailable"),
    504: Words("server_error", "deadline_exceeded"),
}

#: Which statuses of a model server say something about the request; all others are the pool's own trouble.
PASSED_ON: dict[int, int] = {400: 400, 404: 404, 405: 400, 413: 413, 415: 400, 422: 422, 429: 429, 501: 400}
#: How engines name what OpenAI has a code for, or say it where they have no name for it.
ENGINE_CODES: dict[str, str] = {"exceed_context_size_error": "context_length_exceeded"}
ENGINE_WORDS: dict[str, str] = {"maximum context length": "context_length_exceeded"}


class APIProblem(HTTPProblem):
    """A failure with OpenAI's further members: the parameter it is about, and a code of its own."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        api_code: str | None = None,
        hints: tuple[str, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(status, message, hints=hints, retry_after_s=retry_after_s)
        self.param = param
        self.api_code = api_code


def request_id(call: Call) -> str:
    """Return the id of a request: that of the task it becomes, so that the pool's admin can look it up."""
    known = call.scope.get(REQUEST_ID)
    if known is None:
        known = call.scope[REQUEST_ID] = new_task_id()
    return str(known)


def note(call: Call, headers: dict[str, str]) -> None:
    """Give the answer to a request further headers, whatever it becomes: whole, streamed, or a failure."""
    call.scope[NOTED] = {**call.scope.get(NOTED, {}), **headers}


def noted(call: Call) -> dict[str, str]:
    """Return the headers noted for the answer to a request, what is left to its key, and what its client calls it."""
    found: dict[str, str] = {**call.scope.get(NOTED, {}), **limits.headers(call)}
    theirs = client_id(call)
    return {**found, "x-client-request-id": theirs} if theirs else found


def client_id(call: Call) -> str:
    """Return what a client calls its request, for its logs and ours; empty where it has no such name."""
    theirs = call.raw.get(b"x-client-request-id") or call.raw.get(b"x-request-id")
    return theirs.decode("ascii") if theirs is not None and CLIENT_ID.fullmatch(theirs) else ""


def problem(error: RMAError, call: Call) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of a failure."""
    status, headers, _ = problems.problem(error)
    limits.failed(call)
    if status == CONFLICT:
        # SDKs take it for a lock, and try again.
        status = CLIENT_ERROR
    headers |= {"content-type": "application/json", "x-request-id": request_id(call), **noted(call)}
    if "retry-after" in headers or status in WAITED_FOR:
        wait_s = int(headers.get("retry-after", USUAL_WAIT_S))
        headers["retry-after"] = str(min(MOST_WAIT_S, max(LEAST_WAIT_S, wait_s)))
    if status == TOO_LATE or (status < SERVER_ERROR and status not in WORTH_RETRYING):
        headers["x-should-retry"] = "false"
        headers.pop("retry-after", None)
    return status, headers, encode({"error": body(error, status)})


def unexpected(call: Call) -> tuple[int, dict[str, str], bytes]:
    """Return what is answered for a bug."""
    return problem(HTTPProblem(500, "something went wrong in the coordinator; its log has the details"), call)


def body(error: RMAError, status: int) -> dict[str, Any]:
    """Return the error object."""
    words = WORDS.get(status) or WORDS[CLIENT_ERROR if status < SERVER_ERROR else SERVER_ERROR]
    said = f"{error.message} ({'; '.join(error.hints)})" if error.hints else error.message
    param = code = None
    if isinstance(error, APIProblem):
        param, code = error.param, error.api_code
    elif isinstance(error, limits.OverLimit):
        code = error.name
    elif isinstance(error, errors.ValidationProblem) and error.problems:
        param = error.problems[0].where.removeprefix("$").removeprefix(".") or None
    return {"message": said, "type": words.type, "param": param, "code": code or words.code}


def nothing_here() -> APIProblem:
    """Return the refusal of an address that is not there."""
    hints = ("the calls are listed at /openapi.json",)
    return APIProblem(404, "there is nothing at this address of the pool's OpenAI API", hints=hints)


def of_service(status: int, data: bytes, who: str, *, retry_after: str = "") -> APIProblem:
    """Return a model server's refusal as ours, with its own message; ``who`` names the worker.

    ``retry_after`` is what it said of that in its header, if anything.
    """
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        found = data.decode("utf-8", "replace").strip()
    said = _said(found)
    ours = PASSED_ON.get(status)
    if ours is None:
        message = f"the model server of {who or 'a worker'} answered {status}: {said.message or 'without a reason'}"
        return APIProblem(BAD_GATEWAY, message, retry_after_s=5)
    message = said.message or f"the model server refused it ({status})"
    # A date, which it may be too, or nonsense is no number of seconds.
    wait_s = float(retry_after) if retry_after.isdigit() and len(retry_after) <= MOST_DIGITS else None
    return APIProblem(ours, message, param=said.param, api_code=said.code, retry_after_s=wait_s)


class Said(NamedTuple):
    """What a model server's error says, however it is written."""

    message: str
    param: str | None = None
    code: str | None = None


def _said(found: object) -> Said:
    """Read OpenAI's form, Ollama's, FastAPI's, and RFC 9457's."""
    inner = found.get("error", found) if isinstance(found, dict) else found
    if not isinstance(inner, dict):
        return Said(str(inner or "")[:MAX_MESSAGE])
    named = next((inner[name] for name in ("message", "detail", "title") if inner.get(name)), inner)
    message = named if isinstance(named, str) else encode(named).decode()
    param, code, kind = inner.get("param"), inner.get("code"), inner.get("type")
    code = ENGINE_CODES.get(str(kind), code)
    if not isinstance(code, str):
        code = next((ours for words, ours in ENGINE_WORDS.items() if words in message), None)
    return Said(
        message[:MAX_MESSAGE],
        param if isinstance(param, str) and param else None,
        code if isinstance(code, str) and code else None,
    )


def in_stream(error: object) -> APIProblem:
    """Return what an engine said inside its stream; a status in it counts where it is about the request."""
    found = error if isinstance(error, dict) else {"message": error}
    status = found.get("code")
    ours = PASSED_ON.get(status, BAD_GATEWAY) if isinstance(status, int) else BAD_GATEWAY
    said = _said({"error": found})
    return APIProblem(ours, said.message, param=said.param, api_code=said.code)
