"""Small questions to a server that is a stranger's program: limited in size, decoded strictly, nothing believed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import msgspec

from rma_core.agent.incoming import EndpointError, NotNowError
from rma_core.errors import ValidationProblem
from rma_core.models.strict import decode

if TYPE_CHECKING:
    from rma_core.agent.endpoint import Client, Reply

#: Bytes of one answer.
MAX_ANSWER_BYTES = 1024 * 1024
#: Tokens of a context at most; more is nonsense.
MAX_CONTEXT = 2**31
#: What models can do, in Ollama's words, and what others call that.
CAPABILITIES = ("completion", "embedding", "vision", "audio", "tools", "thinking")
ALSO_CALLED = {
    "embeddings": "embedding",
    "llm": "completion",
    "supports_tools": "tools",
    "tool_use": "tools",
    "vlm": "vision",
}
OK, NOT_AUTHENTICATED, FORBIDDEN, UNAVAILABLE = 200, 401, 403, 503
#: Statuses by which a model server says that its engine has ended or does not answer: that is no answer.
ENGINE_LOST = frozenset({502, 504})
#: Seconds that it may take to say more then, and characters of that which go on.
SAID_S, MAX_SAID = 5.0, 500

T = TypeVar("T", bound=msgspec.Struct)
R = TypeVar("R", bound="Reply")


async def get(endpoint: Client, path: str) -> tuple[int, bytes]:
    """Return the status and the body of an answer, no body where that means nothing. Raises EndpointError."""
    return await _asked(endpoint, "GET", path, None)


async def post(endpoint: Client, path: str, body: bytes) -> tuple[int, bytes]:
    """Ask with a body, and return the same as `get`."""
    return await _asked(endpoint, "POST", path, body)


async def _asked(endpoint: Client, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
    kinds = (("accept", "application/json"), *((("content-type", "application/json"),) if body else ()))
    answer = await endpoint.request(method, path, headers=kinds, body=body)
    try:
        if answer.status in (NOT_AUTHENTICATED, FORBIDDEN):
            raise EndpointError("it wants an API key, and none can be given to it")
        if answer.status not in (OK, UNAVAILABLE):
            return answer.status, b""
        return answer.status, await whole(answer, f"{method} {path}")
    finally:
        await answer.aclose()


async def whole(answer: Reply, what: str, *, within_s: float | None = None) -> bytes:
    """Return an answer's body; ``what`` was asked. Raises EndpointError, TimeoutError."""
    body = bytearray()
    while data := await answer.read(MAX_ANSWER_BYTES, within_s=within_s):
        body += data
        if len(body) > MAX_ANSWER_BYTES:
            raise EndpointError(f"its answer to {what} is larger than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)


async def by_engine(answer: R) -> R:
    """Return the answer to a task's request if its model server's engine gave it.

    Raises EndpointError where the server says that its engine was lost, NotNowError where that is busy, or loads.
    """
    if answer.status not in ENGINE_LOST | {UNAVAILABLE}:
        return answer
    try:
        async with asyncio.timeout(SAID_S):
            said = await whole(answer, "a request")
    except TimeoutError:
        said = b""
    finally:
        await answer.aclose()
    text = said.decode("utf-8", "replace")[:MAX_SAID].strip()
    words = f"it answered {answer.status}: {text or 'without a reason'}"
    raise NotNowError(words) if answer.status == UNAVAILABLE else EndpointError(words)


def read(body: bytes, kind: type[T]) -> T | None:
    """Return the record in an answer, or nothing where it is another one."""
    try:
        return decode(body, kind, subject="answer")
    except ValidationProblem:
        return None


def tokens(value: object) -> int:
    """Return a context's size, 0 for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_CONTEXT else 0


def capabilities(*said: object) -> tuple[str, ...]:
    """Return what a model can do, from lists of words and tables of yes and no; what nobody knows is left out."""
    words = set[object]()
    for one in said:
        if isinstance(one, list):
            words |= {word for word in one if isinstance(word, str)}
        elif isinstance(one, dict):
            words |= {name for name, yes in one.items() if yes is True}
    known = {ALSO_CALLED.get(str(word), word) for word in words}
    return tuple(word for word in CAPABILITIES if word in known)
