"""An attached Ollama, asked in its own words: OpenAI's requests go there translated, and its answers come back so.

What `ollama_request` and `ollama_answer` make of bytes is sent and read here. Before a request Ollama is asked what is
loaded, so that none of ours makes it load a model anew that its owner has loaded with another context.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING

from rma_core.agent.attach.asking import whole
from rma_core.agent.attach.ollama_answer import translation
from rma_core.agent.attach.ollama_lines import Broken, error_body, goes_on, refusal
from rma_core.agent.attach.ollama_look import running
from rma_core.agent.attach.ollama_request import PROBE_GOES_ON, Facts, NotForOllama, native, probe
from rma_core.agent.endpoint import EndpointError
from rma_core.agent.execute import AttemptFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from rma_core.agent.attach.ollama_answer import Translation
    from rma_core.agent.attach.ollama_look import Known, Loaded
    from rma_core.agent.attach.ollama_request import Native
    from rma_core.agent.endpoint import Endpoint, Reply

#: Seconds for the question what is loaded, and for which its answer is good.
LOADED_WITHIN_S, LOADED_FRESH_S = 1.0, 1.0
#: Verdicts on models that are remembered.
MOST_VERDICTS = 256
#: Seconds to wait for Ollama to close an answer that is whole, so that its connection can be used again.
CLOSE_WITHIN_S = 1.0
#: Bytes of an answer that are read at once.
READ_BYTES = 64 * 1024
OK, BAD_REQUEST = 200, 400
JSON = (("content-type", "application/json"),)
EVENT_STREAM = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"))


class Ollama:
    """One attached Ollama: what was learnt of it, and how it is asked.

    ``keep_alive`` is the owner's word on how long models stay loaded after a request of the pool's, if there is one.
    ``seen`` is told what is loaded whenever that was asked, ``loaded`` when a request has had a model loaded.
    """

    def __init__(
        self,
        *,
        keep_alive: str = "",
        seen: Callable[[dict[str, Loaded]], None] = lambda _: None,
        loaded: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keep_alive, self._seen, self._has_loaded, self._clock = keep_alive, seen, loaded, clock
        self._known: Known | None = None
        self._loaded: dict[str, Loaded] = {}
        self._loaded_at = -LOADED_FRESH_S
        self._verdicts: dict[tuple[str, str], bool] = {}
        self._trying = asyncio.Lock()

    def heard(self, known: Known) -> None:
        """Keep what a look has found."""
        self._known = known
        self._keep(known.loaded)

    async def __call__(self, endpoint: Endpoint, path: str, body: bytes, model: str, answer_s: float | None) -> Reply:
        """Ask it. Raises EndpointError, TimeoutError, and AttemptFailed for what Ollama itself could not do."""
        loaded = await self._what_is_loaded(endpoint)
        shown = self._known.of(model) if self._known else None
        context = loaded[model].context if model in loaded else 0
        facts = Facts(context, shown.thinks if shown else None, self._keep_alive)
        try:
            wanted = native(path, body, facts)
            if wanted.continues:
                await self._check_that_it_goes_on(endpoint, model, facts, answer_s)
            return await self._asked(endpoint, wanted, answer_s, was_loaded=model in loaded)
        except NotForOllama as error:
            said = error_body(error.message, param=error.param, api_code=error.api_code)
            return Said(error.status, said)

    async def _asked(self, endpoint: Endpoint, wanted: Native, answer_s: float | None, *, was_loaded: bool) -> Reply:
        answer = await endpoint.request("POST", wanted.path, headers=JSON, body=wanted.body, answer_s=answer_s)
        if answer.status != OK:
            return await _refused(answer, answer_s)
        made = translation(wanted.wanted, answer_id=secrets.token_hex(12), created=int(time.time()))
        headers = EVENT_STREAM if wanted.wanted.stream else JSON
        return Translated(answer, made, headers, ended=lambda: None if was_loaded else self._has_loaded())

    async def _what_is_loaded(self, endpoint: Endpoint) -> dict[str, Loaded]:
        """Return what is loaded now; when Ollama does not say, what it said last."""
        if self._clock() - self._loaded_at >= LOADED_FRESH_S:
            try:
                async with asyncio.timeout(LOADED_WITHIN_S):
                    found = await running(endpoint)
            except TimeoutError:
                # It may be busy loading; it is asked all the same.
                found = None
            if found is not None:
                self._keep(found)
                self._seen(found)
        return self._loaded

    def _keep(self, loaded: dict[str, Loaded]) -> None:
        self._loaded, self._loaded_at = loaded, self._clock()

    async def _check_that_it_goes_on(
        self, endpoint: Endpoint, model: str, facts: Facts, answer_s: float | None
    ) -> None:
        """Try, once for each model and version, whether its template goes on from the beginning of an answer.

        Raises NotForOllama where it does not: it would begin another answer, which nobody could tell from the rest.
        """
        known = self._known
        key = (known.digests.get(model) or model, known.version) if known else (model, "")
        async with self._trying:
            if key not in self._verdicts:
                self._verdicts[key] = await self._tried(endpoint, model, facts, answer_s)
                while len(self._verdicts) > MOST_VERDICTS:
                    del self._verdicts[next(iter(self._verdicts))]
        if not self._verdicts.get(key):
            raise NotForOllama(
                f"{model} does not go on from the beginning of an answer, as Ollama runs it",
                param="continue_final_message",
                api_code="continue_unsupported",
            )

    async def _tried(self, endpoint: Endpoint, model: str, facts: Facts, answer_s: float | None) -> bool:
        answer = await endpoint.request("POST", "/api/chat", headers=JSON, body=probe(model, facts), answer_s=answer_s)
        if answer.status != OK:
            refused = await _refused(answer, answer_s)
            raise NotForOllama(refused.message, status=refused.status)
        try:
            return goes_on(await whole(answer, "POST /api/chat", within_s=answer_s), PROBE_GOES_ON)
        except Broken as error:
            raise _failed(error) from None
        finally:
            await answer.aclose()


class Said:
    """An answer that the agent gives itself."""

    over = False
    ready = True

    def __init__(self, status: int, body: bytes, message: str = "") -> None:
        self.status, self.headers, self.message = status, JSON, message
        self._body = body

    async def read(self, limit_bytes: int, *, within_s: float | None = None) -> bytes:  # noqa: ARG002 - it is all there
        """Return what is left of it."""
        data, self._body = self._body[:limit_bytes], self._body[limit_bytes:]
        self.over = not self._body
        return data

    async def aclose(self) -> None:
        """Let go of nothing."""


class Translated:
    """An answer of Ollama's, translated as it is read; ``ended`` is told when all of it has come."""

    def __init__(
        self, answer: Reply, made: Translation, headers: tuple[tuple[str, str], ...], *, ended: Callable[[], object]
    ) -> None:
        self.status, self.headers = OK, headers
        self._answer, self._made, self._ended = answer, made, ended
        self._out = bytearray()
        self._whole = False

    @property
    def over(self) -> bool:
        """Whether all of it has come and been taken."""
        return self._whole and not self._out

    @property
    def ready(self) -> bool:
        """Whether the next `read` returns at once."""
        return bool(self._out) or self._whole

    async def read(self, limit_bytes: int, *, within_s: float | None = None) -> bytes:
        """Return a part as `Answer.read` does; each line of Ollama's is a sign of life, also one that gives nothing.

        Raises EndpointError, TimeoutError, and AttemptFailed where Ollama broke the answer off.
        """
        while not self._out and not self._whole:
            if self._made.broken is not None:
                raise _failed(self._made.broken)
            if self._made.done:
                await self._closed()
            else:
                await self._more(within_s)
        data = bytes(self._out[:limit_bytes])
        del self._out[:limit_bytes]
        return data

    async def _more(self, within_s: float | None) -> None:
        data = await self._answer.read(READ_BYTES, within_s=within_s)
        self._out += self._made.feed(data) if data else self._made.end()
        if not data and self._made.broken is None:
            self._finished()

    async def _closed(self) -> None:
        """Take the end of what is whole already: then the connection is good for another request."""
        self._out += self._made.end()
        try:
            async with asyncio.timeout(CLOSE_WITHIN_S):
                while await self._answer.read(READ_BYTES):
                    pass
        except (EndpointError, TimeoutError):
            pass
        self._finished()

    def _finished(self) -> None:
        self._whole = True
        self._ended()

    async def aclose(self) -> None:
        """Close the request at once, or keep its connection when the whole answer has come."""
        await self._answer.aclose()


async def _refused(answer: Reply, within_s: float | None) -> Said:
    """Return what Ollama said of the request. Raises AttemptFailed for what it says of itself."""
    try:
        data = await whole(answer, "a request", within_s=within_s)
    finally:
        await answer.aclose()
    found = refusal(answer.status, data)
    if not found.status:
        raise AttemptFailed("owner" if found.owner else "service", found.message)
    return Said(found.status, found.body, found.message)


def _failed(error: Broken) -> AttemptFailed:
    return AttemptFailed("service", f"Ollama broke off: {error.message}")
