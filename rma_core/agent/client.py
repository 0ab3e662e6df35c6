"""The agent's calls to its coordinator by HTTP; the channel has a module of its own.

One method a call of the worker API, as CONTRACT.md lists them. Every failure is a CoordinatorError.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec

from rma_core import http
from rma_core.errors import CoordinatorError, NotAuthenticated, Refused, TryLater, ValidationProblem
from rma_core.models.strict import decode, encode
from rma_core.models.worker import (
    AttemptRef,
    Heartbeat,
    HeartbeatAnswer,
    RegisterRequest,
    RegisterResponse,
    TaskComplete,
    TaskOffer,
    TaskOffers,
    TokenRequest,
    TokenResponse,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping

    from rma_core.agent.keys import DeviceKey

logger = logging.getLogger(__name__)

#: Share of a worker token's life after which a new one is asked for.
RENEW_AT = 0.67
#: Seconds a long poll may take beyond what was asked for.
POLL_SLACK_S = 15.0
#: Seconds a nonce from a heartbeat's answer is used; the coordinator takes it for 60.
NONCE_FRESH_S = 40.0
#: Seconds a streamed result may be held back, because whoever asked reads slowly, before it is given up.
RESULT_STALL_S = 120.0
#: A larger answer is not read: 64 tasks with their bodies are 22 MiB.
MAX_ANSWER_BYTES = 32 * 1024 * 1024
#: Headers of a service's answer, as JSON, beside its streamed body.
ANSWER_HEADERS = "RMA-Answer-Headers"

Method = Literal["GET", "POST", "DELETE"]
T = TypeVar("T")


class Nonce(msgspec.Struct, frozen=True, kw_only=True):
    """A coordinator's challenge, and its own name that every signed statement is addressed to."""

    nonce: str
    issuer: str


class Answer(NamedTuple):
    """A whole answer of the coordinator."""

    status: int
    headers: http.Headers
    content: bytes

    def good(self) -> Answer:
        """Return it, or raise the CoordinatorError that an error status means; only a 4xx speaks of the request."""
        if 200 <= self.status < 300:  # noqa: PLR2004 - the successful ones
            return self
        error = http.error_of(self.status, self.headers, self.content)
        if isinstance(error, Refused) and not 400 <= self.status < 500:  # noqa: PLR2004 - the client's faults
            raise TryLater(error.message, hints=error.hints)
        raise error


class Credential(NamedTuple):
    """A worker token and the moment (monotonic) from which a new one is wanted."""

    token: str
    renew_at: float


class CoordinatorClient:
    """One worker's calls; ``worker_id`` is empty until `register` was answered."""

    def __init__(
        self,
        base_url: str,
        key: DeviceKey,
        *,
        worker_id: str = "",
        context: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.base_url, self.worker_id, self.key = base_url, worker_id, key
        self.context = context or (http.tls_context() if base_url.startswith("https:") else None)
        self._clock = clock
        self._http = http.open_client(base_url, context=self.context)
        self._credential: Credential | None = None
        self._refreshing = asyncio.Lock()
        self._nonce: tuple[str, float] | None = None
        self._issuer = ""

    @property
    def local(self) -> bool:
        """Whether the coordinator is on this machine."""
        return http.is_loopback(urlsplit(self.base_url).hostname or "")

    async def aclose(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def nonce(self) -> Nonce:
        """Ask for a challenge; needs no credential."""
        found = _read(await self._call("GET", "/api/worker/nonce"), Nonce)
        self._issuer = found.issuer
        return found

    async def register(
        self, request: RegisterRequest, *, join_token: str = "", preview: bool = False
    ) -> RegisterResponse:
        """Register this machine: with a join token the first time, with its worker token again later.

        ``preview`` asks what would be, leaves nothing behind and needs no key.
        """
        if not preview:
            request = await self._signed(request, join_token)
        query = "?preview=1" if preview else ""
        token = join_token or await self.token()
        response = await self._call("POST", f"/api/worker/register{query}", request, token=token)
        answer = _read(response, RegisterResponse)
        if not preview:
            self.worker_id = answer.worker_id
            if answer.access_token:
                self._keep(answer.access_token, answer.expires_in)
        return answer

    async def _signed(self, request: RegisterRequest, join_token: str) -> RegisterRequest:
        """Add the public key and, when it is new to the coordinator, the proof of holding the private one."""
        proof = None
        if join_token:
            found = await self.nonce()
            proof = self.key.proof(issuer=found.issuer, nonce=found.nonce, join_token=join_token)
        return msgspec.structs.replace(request, public_key=self.key.public_key, proof=proof)

    async def token(self, *, stale: str = "") -> str:
        """Return a worker token that is fresh; ``stale`` names one that the coordinator just refused.

        Raises NotAuthenticated or NotFound when the coordinator does not know this worker.
        """
        async with self._refreshing:
            kept = self._credential
            if kept is not None and kept.token != stale and self._clock() < kept.renew_at:
                return kept.token
            response = await self._exchange()
            answer = _read(response, TokenResponse)
            return self._keep(answer.access_token, answer.expires_in)

    async def _exchange(self) -> Answer:
        """Sign a kept or a new nonce; one that is refused is replaced once."""
        nonce = self._nonce[0] if self._nonce and self._clock() < self._nonce[1] else ""
        self._nonce = None
        if not nonce or not self._issuer:
            nonce = (await self.nonce()).nonce
        response = await self._send("POST", "/api/worker/token", self._assertion(nonce))
        if response.status == 401:  # noqa: PLR2004 - Unauthorized
            fresh = http.problem_of(response.content).get("nonce") or (await self.nonce()).nonce
            response = await self._send("POST", "/api/worker/token", self._assertion(str(fresh)))
        return response.good()

    def _assertion(self, nonce: str) -> TokenRequest:
        return TokenRequest(assertion=self.key.assertion(issuer=self._issuer, nonce=nonce, worker_id=self.worker_id))

    def _keep(self, token: str, expires_in: float) -> str:
        self._credential = Credential(token, self._clock() + expires_in * RENEW_AT)
        return token

    def keep_nonce(self, nonce: str) -> None:
        """Keep the nonce of a heartbeat's answer for the next token, which saves a round trip."""
        if nonce:
            self._nonce = (nonce, self._clock() + NONCE_FRESH_S)

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatAnswer:
        """Send a heartbeat by HTTP."""
        return _read(await self._as_worker("POST", "/api/worker/heartbeat", beat), HeartbeatAnswer)

    async def unregister(self) -> None:
        """Leave: what this worker still has goes to others at once; its key stays known."""
        await self._as_worker("DELETE", f"/api/worker/unregister/{self.worker_id}")

    async def poll(self, *, wait_s: float, limit: int) -> tuple[TaskOffer, ...]:
        """Ask for up to ``limit`` tasks and wait up to ``wait_s`` for the first."""
        path = f"/api/worker/tasks?{urlencode({'wait': f'{wait_s:g}', 'max': limit})}"
        response = await self._as_worker("GET", path, timeout_s=wait_s + POLL_SLACK_S)
        return () if not response.content else _read(response, TaskOffers).tasks

    async def complete(self, done: TaskComplete) -> None:
        """Close an attempt; a small answer may ride along."""
        await self._as_worker("POST", "/api/worker/task-complete", done)

    async def body(self, offer: TaskOffer) -> AsyncGenerator[bytes, None]:
        """Yield a task's request body from its ``body_url``, which must be the coordinator's own."""
        url = self._own(offer.body_url or "")
        proof = urlencode({"attempt": offer.attempt, "lease_id": offer.lease_id})
        if "lease_id=" not in url:
            url += f"{'&' if '?' in url else '?'}{proof}"
        headers = {"Authorization": f"Bearer {await self.token()}"}
        request = self._http.build_request("GET", url, headers=headers)
        try:
            response = await self._http.send(request, stream=True)
            try:
                await http.raise_for(response)
                async for chunk in response.aiter_raw():
                    yield chunk
            finally:
                await response.aclose()
        except http.HTTPError as error:
            raise http.unreachable(self.base_url, error) from None

    def _own(self, url: str) -> str:
        """Return the path in ``url``; a coordinator must not send an agent (and its token) to another host."""
        parts, own = urlsplit(url), urlsplit(self.base_url)
        if (parts.scheme or own.scheme, parts.netloc or own.netloc) != (own.scheme, own.netloc):
            raise Refused(f"the task's body lies at {parts.netloc}, which is not the coordinator")
        if not parts.path.startswith("/"):
            raise Refused("the task's body has no absolute path")
        prefix = "" if parts.netloc else own.path
        return f"{own.scheme}://{own.netloc}{prefix}{parts.path}" + (f"?{parts.query}" if parts.query else "")

    async def result(
        self,
        ref: AttemptRef,
        status: int,
        headers: Iterable[tuple[str, str]],
        chunks: Callable[[], AsyncIterator[bytes]],
    ) -> None:
        """Stream an answer up in a request of its own; an exception in ``chunks`` breaks it off.

        When the token is refused, once more with a new one: then ``chunks`` is called again.
        """
        query = urlencode({"attempt": ref.attempt, "lease_id": ref.lease_id, "status": status})
        extra = {
            # ASCII only: a header carries nothing else safely, so other characters travel escaped.
            ANSWER_HEADERS: json.dumps([list(pair) for pair in headers], separators=(",", ":")),
            "Content-Type": "application/octet-stream",
        }
        path = f"/api/worker/tasks/{ref.task_id}/result?{query}"

        async def post(token: str) -> Answer:
            return await self._send("POST", path, chunks(), token=token, headers=extra, timeout_s=RESULT_STALL_S)

        token = await self.token()
        response = await post(token)
        if response.status == 401:  # noqa: PLR2004 - Unauthorized
            response = await post(await self.token(stale=token))
        response.good()

    async def _as_worker(
        self, method: Method, path: str, body: msgspec.Struct | None = None, *, timeout_s: float = http.CALL_TIMEOUT_S
    ) -> Answer:
        """Call with a worker token; when it is refused, once more with a new one."""
        token = await self.token()
        try:
            return await self._call(method, path, body, token=token, timeout_s=timeout_s)
        except NotAuthenticated:
            token = await self.token(stale=token)
            return await self._call(method, path, body, token=token, timeout_s=timeout_s)

    async def _call(
        self,
        method: Method,
        path: str,
        body: msgspec.Struct | None = None,
        *,
        token: str = "",
        timeout_s: float = http.CALL_TIMEOUT_S,
    ) -> Answer:
        return (await self._send(method, path, body, token=token, timeout_s=timeout_s)).good()

    async def _send(
        self,
        method: Method,
        path: str,
        body: msgspec.Struct | AsyncIterator[bytes] | None = None,
        *,
        token: str = "",
        headers: Mapping[str, str] | None = None,
        timeout_s: float = http.CALL_TIMEOUT_S,
    ) -> Answer:
        sent = dict(headers or {})
        if token:
            sent["Authorization"] = f"Bearer {token}"
        if isinstance(body, msgspec.Struct):
            sent["Content-Type"] = "application/json"
        content = encode(body) if isinstance(body, msgspec.Struct) else body
        request = self._http.build_request(method, path, content=content, headers=sent, timeout=timeout_s)
        try:
            response = await self._http.send(request, stream=True)
            try:
                content = await (self._whole(response) if response.is_success else http.read_problem(response))
                return Answer(response.status_code, response.headers, content)
            finally:
                await response.aclose()
        except http.HTTPError as error:
            raise http.unreachable(self.base_url, error) from None

    async def _whole(self, response: http.Response) -> bytes:
        content = bytearray()
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > MAX_ANSWER_BYTES:
                raise CoordinatorError(f"the coordinator's answer is larger than {MAX_ANSWER_BYTES // 2**20} MiB")
        return bytes(content)


def _read(response: Answer, kind: type[T]) -> T:
    """Return an answer as a record; an answer that does not fit is a coordinator's error, not a bug of ours."""
    try:
        return decode(response.content, kind, subject="the coordinator's answer")
    except ValidationProblem as error:
        raise CoordinatorError(
            str(error), hints=("is this really an RMA coordinator, and of the same version as this agent?",)
        ) from None
