"""A stand-in coordinator for tests of the agent.

It speaks the contracts, checks what is signed, and misbehaves on request.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import secrets
import socket
from typing import TYPE_CHECKING, Any, TypeVar

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypercorn.asyncio import serve
from hypercorn.config import Config
from quart import Quart, Response, request, websocket

from rma_core.models import channel as frames
from rma_core.models.strict import decode, encode
from rma_core.models.worker import (
    Assignment,
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
from tests.agent_service import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

F = TypeVar("F")


class Line:
    """One channel as the coordinator sees it."""

    def __init__(self, ws: Any) -> None:
        self._ws = ws
        self.control: list[frames.Up] = []
        self.data: dict[int, bytearray] = {}
        self.news = asyncio.Condition()
        self.closed = asyncio.Event()
        self.drop = asyncio.Event()

    async def read(self) -> None:
        while True:
            message = await self._ws.receive()
            async with self.news:
                for stream, kind, content in frames.records(message):
                    if kind == frames.CONTROL:
                        self.control.append(frames.unpack_up(content))
                    else:
                        self.data.setdefault(stream, bytearray()).extend(content)
                self.news.notify_all()

    async def say(self, frame: frames.Frame) -> None:
        await self._ws.send(frames.pack(frame))

    async def body(self, stream: int, data: bytes, *, end: bool = True) -> None:
        await self._ws.send(frames.pack_data(stream, data, end=end))

    async def wait(self, what: Callable[[], Any]) -> Any:
        """Wait until ``what`` gives something and return it."""
        async with asyncio.timeout(PATIENCE_S), self.news:
            await self.news.wait_for(lambda: bool(what()))
        return what()

    async def frame(self, kind: type[F], stream: int | None = None) -> F:
        """Wait for a frame of a kind, of one stream, and take it."""

        def find() -> list[Any]:
            return [f for f in self.control if isinstance(f, kind) and stream in (None, getattr(f, "stream", None))]

        found: F = (await self.wait(find))[0]
        self.control.remove(found)  # type: ignore[arg-type]
        return found

    async def bytes_of(self, stream: int, count: int) -> bytes:
        await self.wait(lambda: len(self.data.get(stream, b"")) >= count)
        return bytes(self.data[stream])


class StandIn:
    """The coordinator's side of the worker API."""

    def __init__(self) -> None:
        self.url = ""
        self.issuer = "rma-stand-in"
        self.join_tokens = {"rmaj_" + "a" * 36}
        self.workers: dict[str, str] = {}
        self.tokens: dict[str, str] = {}
        self.token_life_s = 900.0
        self.interval_s = 30.0
        self.generation = 1
        self.assignments: tuple[Assignment, ...] = ()
        self.nonces: set[str] = set()
        self.calls: list[str] = []
        self.registrations: list[RegisterRequest] = []
        self.beats: list[Heartbeat] = []
        self.lines: list[Line] = []
        self.line_opened = asyncio.Event()
        self.offers: asyncio.Queue[TaskOffer] = asyncio.Queue()
        self.completed: list[TaskComplete] = []
        self.results: dict[str, tuple[dict[str, str], bytes, str]] = {}
        self.bodies: dict[str, bytes] = {}
        self.answer_more: dict[str, Any] = {}
        self.fail: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.happened = asyncio.Event()
        self.drops_channels = False

    @property
    def token(self) -> str:
        return next(iter(self.join_tokens))

    def forget(self) -> None:
        """As after a new database: nobody is known, old tokens are worth nothing."""
        self.workers.clear()
        self.tokens.clear()

    async def until(self, what: Callable[[], Any]) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            while not what():
                self.happened.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.happened.wait(), 0.05)
        return what()

    async def line(self, number: int = 0) -> Line:
        await self.until(lambda: len(self.lines) > number)
        return self.lines[number]

    def answer(self, generation: int) -> HeartbeatAnswer:
        more = {"heartbeat_interval_s": self.interval_s, "generation": self.generation, **self.answer_more}
        containers = self.assignments if generation != self.generation else None
        return HeartbeatAnswer(containers=containers, **more)

    def make_token(self, worker_id: str) -> str:
        token = secrets.token_hex(16)
        self.tokens[token] = worker_id
        return token

    def verify(self, token: str, public_key: str, kind: str) -> dict[str, Any]:
        key = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(public_key + "="))
        assert jwt.get_unverified_header(token)["typ"] == kind
        claims: dict[str, Any] = jwt.decode(token, key, algorithms=["EdDSA"], audience=self.issuer)
        if claims["nonce"] not in self.nonces:
            raise Problem(401, "the nonce is not ours", nonce=self.make_nonce())
        self.nonces.discard(claims["nonce"])
        return claims

    def make_nonce(self) -> str:
        nonce = secrets.token_hex(8)
        self.nonces.add(nonce)
        return nonce


class Problem(Exception):
    """An answer in the form of a problem document."""

    def __init__(self, status: int, detail: str, **more: str) -> None:
        super().__init__(detail)
        self.status, self.detail, self.more = status, detail, more

    def response(self) -> Response:
        body = {"type": "about:blank", "title": "No", "detail": self.detail, "hints": ["try this"], **self.more}
        return Response(encode(body), self.status, content_type="application/problem+json")


def bearer(headers: Any) -> str:
    return str(headers.get("Authorization", "")).removeprefix("Bearer ")


def make_app(me: StandIn) -> Quart:  # noqa: C901, PLR0915 - one short function a route
    app = Quart("stand-in")
    app.config["MAX_CONTENT_LENGTH"] = None

    def worker() -> str:
        found = me.tokens.get(bearer(request.headers))
        if found is None or found not in me.workers:
            raise Problem(401, "the pool has forgotten the worker")
        return found

    def give(value: Any, status: int = 200) -> Response:
        return Response(encode(value), status, content_type="application/json")

    @app.errorhandler(Problem)
    async def problem(error: Problem) -> Response:
        return error.response()

    @app.before_request
    async def note() -> Response | None:
        me.calls.append(f"{request.method} {request.path}")
        me.happened.set()
        if request.path in me.fail:
            status, headers, body = me.fail[request.path]
            return Response(body, status, headers)
        return None

    @app.get("/api/worker/nonce")
    async def nonce() -> Response:
        return give({"nonce": me.make_nonce(), "issuer": me.issuer})

    @app.post("/api/worker/register")
    async def register() -> Response:
        asked = decode(await request.get_data(), RegisterRequest, subject="registration")
        token = bearer(request.headers)
        preview = request.args.get("preview") == "1"
        if token.startswith("rmaj_"):
            if token not in me.join_tokens:
                raise Problem(401, "this join token is not known")
            print_ = "0" * 64
            if not preview:
                claims = me.verify(asked.proof or "", asked.public_key or "", "rma-proof+jwt")
                print_ = hashlib.sha256(base64.urlsafe_b64decode((asked.public_key or "") + "=")).hexdigest()
                assert claims["iss"] == claims["sub"] == print_
                assert claims["tkn"] == hashlib.sha256(token.encode()).hexdigest()
            worker_id = f"worker-{print_[:8]}"
        else:
            worker_id = worker()
        me.registrations.append(asked)
        if not preview:
            me.workers[worker_id] = asked.public_key or me.workers.get(worker_id, "")
        access = "" if preview else me.make_token(worker_id)
        answer = RegisterResponse(
            worker_id=worker_id,
            tier=2,
            tier_reason="tier 2",
            containers=me.assignments,
            generation=me.generation,
            heartbeat_interval_s=me.interval_s,
            access_token=access,
            expires_in=me.token_life_s,
        )
        me.happened.set()
        return give(answer, 201)

    @app.post("/api/worker/token")
    async def token() -> Response:
        asked = decode(await request.get_data(), TokenRequest, subject="token")
        claimed = jwt.decode(asked.assertion, options={"verify_signature": False})["sub"]
        if claimed not in me.workers:
            raise Problem(404, "this pool does not know that worker")
        claims = me.verify(asked.assertion, me.workers[claimed], "rma-assertion+jwt")
        assert claims["iss"] == claimed
        return give(TokenResponse(access_token=me.make_token(claimed), expires_in=me.token_life_s))

    @app.post("/api/worker/heartbeat")
    async def heartbeat() -> Response:
        worker()
        beat = decode(await request.get_data(), Heartbeat, subject="heartbeat")
        me.beats.append(beat)
        me.happened.set()
        return give(me.answer(beat.generation))

    @app.delete("/api/worker/unregister/<worker_id>")
    async def unregister(worker_id: str) -> Response:
        assert worker() == worker_id
        return give({})

    @app.get("/api/worker/tasks")
    async def tasks() -> Response:
        worker()
        try:
            offer = await asyncio.wait_for(me.offers.get(), min(2.0, float(request.args["wait"])))
        except TimeoutError:
            return Response(b"", 204)
        return give(TaskOffers(tasks=(offer,)))

    @app.get("/api/worker/tasks/<task_id>/body")
    async def body(task_id: str) -> Response:
        worker()
        assert request.args["lease_id"]
        return Response(me.bodies[task_id])

    @app.post("/api/worker/tasks/<task_id>/result")
    async def result(task_id: str) -> Response:
        worker()
        data = bytearray()
        try:
            async for chunk in request.body:
                data += chunk
        except asyncio.CancelledError:
            me.results[task_id] = (dict(request.args), bytes(data), "broken off")
            raise
        me.results[task_id] = (dict(request.args), bytes(data), request.headers["RMA-Answer-Headers"])
        me.happened.set()
        return give({})

    @app.post("/api/worker/task-complete")
    async def complete() -> Response:
        worker()
        me.completed.append(decode(await request.get_data(), TaskComplete, subject="task-complete"))
        me.happened.set()
        return give({})

    @app.websocket("/api/worker/channel")
    async def channel() -> Any:
        me.calls.append("WS /api/worker/channel")
        if "/api/worker/channel" in me.fail:
            status, headers, text = me.fail["/api/worker/channel"]
            return Response(text, status, headers)
        if me.tokens.get(bearer(websocket.headers)) not in me.workers:
            return Problem(401, "the pool has forgotten the worker").response()
        line = Line(websocket._get_current_object())  # type: ignore[attr-defined]
        await websocket.accept()
        if me.drops_channels:
            return None
        me.lines.append(line)
        me.happened.set()
        reader = asyncio.create_task(line.read())
        dropper = asyncio.create_task(line.drop.wait())
        try:
            await asyncio.wait({reader, dropper}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reader, dropper):
                task.cancel()
            await asyncio.gather(reader, dropper, return_exceptions=True)
            line.closed.set()
        return None

    return app


@contextlib.asynccontextmanager
async def stand_in(*, certificate: tuple[Path, Path] | None = None) -> AsyncIterator[StandIn]:
    me = StandIn()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = Config()
    config.bind = [f"fd://{listener.fileno()}"]
    config.graceful_timeout = config.shutdown_timeout = 0.2
    config.loglevel = "CRITICAL"
    scheme = "http"
    if certificate is not None:
        config.certfile, config.keyfile = map(str, certificate)
        config.alpn_protocols = ["http/1.1"]
        scheme = "https"
    me.url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
    stop = asyncio.Event()
    server = asyncio.create_task(serve(make_app(me), config, shutdown_trigger=stop.wait))
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", listener.getsockname()[1])
                except OSError:
                    await asyncio.sleep(0.01)
                else:
                    writer.close()
                    await writer.wait_closed()
                    break
        yield me
    finally:
        for line in me.lines:
            line.drop.set()
        stop.set()
        await asyncio.wait({server}, timeout=5)
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)
        with contextlib.suppress(OSError):
            listener.close()


def offer(path: str = "/echo", *, number: int = 1, **more: Any) -> TaskOffer:
    """Return a task for the service of `tests.agent_service`."""
    plain = {
        "task_id": f"task-{number:020d}",
        "attempt": 1,
        "lease_id": f"{number:032x}",
        "service": "notes",
        "method": "GET",
        "path": path,
    }
    return msgspec.convert(plain | more, TaskOffer)
