"""The way of a task to a model server that its owner attached, where hardly anything gets through.

The pool's coordinator is not trusted with such a server: only the calls of OpenAI's API that compute go on, for models
that are shared, and with a few headers. Everything else that the server can do (delete a model, read its slots) stays
closed, whatever a task asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from rma_core.agent.attach.asking import by_engine
from rma_core.agent.endpoint import Endpoint, EndpointError
from rma_core.agent.execute import AttemptFailed
from rma_core.agent.incoming import NotNowError
from rma_core.errors import UsageProblem

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

    from rma_core.agent.endpoint import Reply

#: What a task may ask for.
PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings"})
#: Headers of a task's request that go on. Not among them: what llama.cpp would file a stream under for others to read.
PASSED_ON = frozenset({"accept", "accept-encoding", "content-type", "user-agent"})
#: Bytes of a request's body: it is looked into before anything is sent.
MAX_BODY_BYTES = 8 * 1024 * 1024


class Asked(Protocol):
    """What a server is asked, in words of its own where it has some."""

    async def __call__(self, endpoint: Endpoint, path: str, body: bytes, model: str, answer_s: float | None) -> Reply:
        """Ask it. Raises what `Endpoint.request` raises, and AttemptFailed."""


class Guarded:
    """What sends tasks to an attached server: nothing but the shared calls and models gets through.

    ``models`` gives the names that are shared now; ``failed`` is told when the server could not be reached, or has lost
    its engine; ``full`` says why the server has no room just now, if so; ``asked`` gives another way to ask it than
    OpenAI's, if it has one.
    """

    def __init__(
        self,
        url: str,
        *,
        models: Callable[[], frozenset[str]],
        failed: Callable[[], None],
        full: Callable[[], Awaitable[str]],
        asked: Callable[[], Asked | None],
    ) -> None:
        self._endpoint = Endpoint(url)
        self._models, self._failed, self._full, self._asked = models, failed, full, asked

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: Iterable[tuple[str, str]] = (),
        body: AsyncGenerator[bytes, None] | bytes | None = None,
        length: int | None = None,  # noqa: ARG002 - the body is whole before it is sent, and knows its length
        write_s: float | None = None,
        answer_s: float | None = None,
    ) -> Reply:
        """Send a request as `Endpoint.request` does.

        Raises UsageProblem for one that is not shared, AttemptFailed where its owner needs the server now.
        """
        if method != "POST" or path not in PATHS:
            raise UsageProblem(f"{method} {path[:200]!r} is not open on a model server that its owner attached")
        whole = await _whole(body)
        model = self._check(whole)
        kept = [(name, value) for name, value in headers if name.lower() in PASSED_ON]
        try:
            if reason := await self._full():
                raise AttemptFailed("owner", reason)
            if (asked := self._asked()) is not None:
                return await asked(self._endpoint, path, whole, model, answer_s)
            answer = await self._endpoint.request(
                method, path, headers=kept, body=whole, write_s=write_s, answer_s=answer_s
            )
            return await by_engine(answer)
        except NotNowError:
            # It has said so itself, and is well.
            raise
        except EndpointError:
            self._failed()
            raise

    async def aclose(self) -> None:
        """Close every connection."""
        await self._endpoint.aclose()

    def _check(self, body: bytes) -> str:
        """Return the model that a request names, an empty string for none. Raises UsageProblem for one not shared."""
        try:
            given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
            # Some servers take any spelling of a name: `Model` would be read there, and not here.
            named = [key for key in given if key.casefold() == "model"]
            model = msgspec.json.decode(given["model"], type=str) if named == ["model"] else ""
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            raise UsageProblem("the request's body is no JSON object with a model's name") from None
        if named not in ([], ["model"]):
            raise UsageProblem("the request's body names its model twice")
        if named and model not in self._models():
            raise UsageProblem(f"the model {model[:200]!r} is not shared here")
        return model


async def _whole(body: AsyncGenerator[bytes, None] | bytes | None) -> bytes:
    """Return a request's body in one piece. Raises UsageProblem for one that is too large, and what ``body`` raises."""
    if body is None or isinstance(body, bytes):
        gathered = bytearray(body or b"")
    else:
        gathered = bytearray()
        async for chunk in body:
            gathered += chunk
            if len(gathered) > MAX_BODY_BYTES:
                break
    if len(gathered) > MAX_BODY_BYTES:
        raise UsageProblem(f"a request to a model server that its owner attached has {MAX_BODY_BYTES} bytes at most")
    return bytes(gathered)
