"""Simulated workers: they speak the channel's frames or the plain calls, and are late, broken, killed and repeated."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rma_core.agent.keys import DeviceKey
from rma_core.models import channel as frames
from rma_core.models.worker import AttemptRef, ContainerStatus, Heartbeat, RegisterRequest, TaskOffer
from tests.coordinator_fixtures import MACHINE
from tests.history import digest
from tests.simulation import Broken, Connection, Link, Reply, scope_of

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from tests.history import History
    from tests.simulation import World

    #: Offers whose bodies come as frames, each with what has come, by stream.
    Waiting = dict[int, tuple[TaskOffer, bytes]]

SERVICES = ("notes", "ner")
#: Seconds for which an answer that was sent is kept, in case the connection breaks under it.
KEPT_S = 15.0
#: How long the work takes, at least and at most, and how often.
WORK_S, WORK_WEIGHTS = ((0.05, 3.0), (3.0, 20.0), (30.0, 70.0)), (80, 14, 6)
#: How many answers that nobody waits for are delivered all the same.
LATE = 0.6
JSON_HEAD = (("content-type", "application/json"),)


class Job:
    """One attempt on its worker."""

    def __init__(self, offer: TaskOffer, body: bytes) -> None:
        self.offer, self.body = offer, body
        self.answer: bytes | None = None
        self.error: tuple[Any, str] | None = None
        self.sent = False
        self.ref = AttemptRef(task_id=offer.task_id, attempt=offer.attempt, lease_id=offer.lease_id)
        self.stream = int(offer.lease_id[:8], 16) or 1


class SimulatedWorker:
    """A machine with a key; its process can be killed and frozen, its link broken."""

    def __init__(self, world: World, history: History, index: int, *, plain: bool, slots: int = 3) -> None:
        self.world, self.history, self.plain, self.slots = world, history, plain, slots
        self.link = Link(world)
        private = Ed25519PrivateKey.from_private_bytes(bytes([index + 1]) * 32)
        # Its statements are compared with the real clock, by the JWT library.
        self.key = DeviceKey(private)
        self.id = self.token = ""
        self.jobs: dict[str, Job] = {}
        self.context = world.loop.new_life()
        self.alive = False
        self._ws: Connection | None = None

    # -- the process -------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.context = self.world.loop.new_life()
        self.alive, self.jobs, self._ws = True, {}, None
        work = self._poll_for_ever() if self.plain else self._channel_for_ever()
        self.world.loop.run(self.context, work, f"{self.id} works")
        if self.plain:
            self.world.loop.run(self.context, self._beat_for_ever(), f"{self.id} beats")

    def kill(self) -> None:
        self.alive = False
        self.world.loop.kill(self.context)
        self.link.cut()

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Do something beside the rest, in this process."""
        self.world.loop.run(self.context, work, name)

    async def enrol(self, join_token: str) -> None:
        found = (await self.world.call(self.link, "GET", "/api/worker/nonce")).json
        proof = self.key.proof(issuer=found["issuer"], nonce=found["nonce"], join_token=join_token)
        request = RegisterRequest(capabilities=MACHINE, public_key=self.key.public_key, proof=proof)
        body = msgspec.json.encode(request)
        reply = await self.world.call(self.link, "POST", "/api/worker/register", secret=join_token, body=body)
        assert reply.status == 201, reply
        self.id, self.token = reply.json["worker_id"], reply.json["access_token"]

    async def _call(self, method: str, path: str, **more: Any) -> Reply:
        """Make a call as this worker, with a new token where the old one has expired. Raises Broken."""
        reply = await self.world.call(self.link, method, path, secret=self.token, **more)
        if reply.status != 401:
            return reply
        await self._renew()
        return await self.world.call(self.link, method, path, secret=self.token, **more)

    async def _renew(self) -> None:
        found = await self.world.call(self.link, "GET", "/api/worker/nonce")
        if found.status != 200:
            raise Broken
        issuer, nonce = found.json["issuer"], found.json["nonce"]
        assertion = self.key.assertion(issuer=issuer, nonce=nonce, worker_id=self.id)
        body = json.dumps({"assertion": assertion}).encode()
        reply = await self.world.call(self.link, "POST", "/api/worker/token", body=body)
        if reply.status != 200:
            raise Broken
        self.token = reply.json["access_token"]

    # -- the work ----------------------------------------------------------------------------------------------

    def _take(self, offer: TaskOffer, body: bytes) -> None:
        job = self.jobs[offer.lease_id] = Job(offer, body)
        self._begin(self._work(job), f"{self.id} {offer.task_id}")

    async def _work(self, job: Job) -> None:
        chance = self.world.random
        await self.world.pause(*chance.choices(WORK_S, WORK_WEIGHTS)[0])
        offer = job.offer
        if offer.body_url is not None and not await self._fetch(job):
            return
        self.history.asked[offer.task_id] = digest(job.body)
        if chance.random() < 0.04:
            job.error = chance.choice(("service", "worker", "owner", "coordinator")), "it broke"
        else:
            pad = chance.choice((0, 0, 0, 0, 100, 70_000)) if chance.random() < 0.3 else 0
            answer = {"service": offer.service, "digest": digest(job.body), "worker": self.id, "attempt": offer.attempt}
            job.answer = msgspec.json.encode({**answer, "pad": "x" * pad})
        with contextlib.suppress(Broken):
            await self._finish(job)

    async def _fetch(self, job: Job) -> bool:
        """Read a large body by a request of its own."""
        path = f"{job.offer.body_url}?attempt={job.offer.attempt}&lease_id={job.offer.lease_id}"
        with contextlib.suppress(Broken):
            reply = await self._call("GET", path)
            if reply.status == 200:
                job.body = reply.body
                return True
        job.error = "coordinator", "its body could not be read"
        with contextlib.suppress(Broken):
            await self._finish(job)
        return False

    async def _finish(self, job: Job) -> None:
        wanted = job.offer.lease_id in self.jobs
        if self.plain or not wanted:
            # What was taken away meanwhile may be delivered all the same, late.
            if wanted or self.world.random.random() < LATE:
                await self._upload(job)
        elif self._ws is not None:
            await self._send_answer(self._ws, job)
        elif self.world.random.random() < LATE:
            await self._upload(job)

    def _lose(self, lease_id: str) -> None:
        """The coordinator does not want an attempt any more; an answer that is ready may be delivered late."""
        job = self.jobs.pop(lease_id, None)
        if job is not None and job.answer is not None and not self.plain and self.world.random.random() < LATE:
            self._begin(self._upload(job), f"{self.id} is late")

    async def _upload(self, job: Job) -> None:
        """Deliver by a plain call, again and again until it is known to have arrived, or not to be wanted."""
        for _ in range(8):
            with contextlib.suppress(Broken):
                reply = await self._deliver(job)
                if reply.status < 500:
                    if reply.status == 200 and self.world.random.random() < 0.1:
                        await self._deliver(job)
                    break
            await self.world.pause(0.2, 6.0)
        self.jobs.pop(job.offer.lease_id, None)

    async def _deliver(self, job: Job) -> Reply:
        offer = job.offer
        named = {"task_id": offer.task_id, "attempt": offer.attempt, "lease_id": offer.lease_id}
        if job.error is not None or (job.answer is not None and self.world.random.random() < 0.5):
            done: dict[str, Any] = {**named, "status": "succeeded", "body": job.answer, "http_status": 200}
            if job.error is not None:
                done = {**named, "status": "failed", "fault": job.error[0], "reason": job.error[1]}
            return await self._call("POST", "/api/worker/task-complete", body=msgspec.json.encode(done))
        path = f"/api/worker/tasks/{offer.task_id}/result?attempt={offer.attempt}&lease_id={offer.lease_id}"
        headers = {"rma-answer-headers": json.dumps(JSON_HEAD)}
        return await self._call("POST", path, body=job.answer or b"", headers=headers)

    # -- the plain way -----------------------------------------------------------------------------------------

    async def _poll_for_ever(self) -> None:
        while True:
            try:
                if len(self.jobs) >= self.slots:
                    await self.world.pause(0.1, 0.5)
                    continue
                reply = await self._call("GET", "/api/worker/tasks?wait=20&max=2", leave_after_s=30.0)
                if reply.status == 200:
                    for data in reply.json["tasks"]:
                        offer = msgspec.convert(data, TaskOffer)
                        self._take(offer, offer.body or b"")
                    await self._beat()
                elif reply.status != 204:
                    await self.world.pause(0.5, 2.0)
            except Broken:
                await self.world.pause(0.2, 3.0)

    async def _beat_for_ever(self) -> None:
        while True:
            with contextlib.suppress(Broken):
                await self._beat()
            await self.world.pause(8.0, 15.0)

    def _heartbeat(self) -> Heartbeat:
        containers = tuple(
            ContainerStatus(name=f"{service}-worker", service=service, state="healthy", slots=self.slots)
            for service in SERVICES
        )
        refs = tuple(job.ref for job in self.jobs.values())
        return Heartbeat(worker_id=self.id, containers=containers, attempts=refs)

    async def _beat(self) -> None:
        said = self._heartbeat()
        reply = await self._call("POST", "/api/worker/heartbeat", body=msgspec.json.encode(said))
        if reply.status == 200:
            self._drop(reply.json.get("cancel", ()))

    def _drop(self, cancelled: Any) -> None:
        for ref in cancelled:
            self._lose(ref["lease_id"])

    # -- the channel -------------------------------------------------------------------------------------------

    async def _channel_for_ever(self) -> None:
        while True:
            with contextlib.suppress(Broken):
                await self._session()
            self._ws = None
            await self.world.pause(0.1, 4.0 if self.world.random.random() < 0.8 else 14.0)

    async def _session(self) -> None:
        scope = scope_of("websocket", "GET", "/api/worker/channel", self.token, {})
        ws = Connection(self.link, scope)
        ws.up.put({"type": "websocket.connect"})
        try:
            if (await self._next(ws, 20.0))["type"] != "websocket.accept":
                await self._renew()
                raise Broken
            await self._speak(ws)
        finally:
            ws.leave()

    async def _speak(self, ws: Connection) -> None:
        slots = dict.fromkeys(SERVICES, self.slots)
        held = tuple(self.jobs.values())
        self._say(ws, frames.Hello(worker_id=self.id, slots=slots, attempts=tuple(job.ref for job in held)))
        self._ws = ws
        beating = asyncio.create_task(self._beats(ws), name=f"{self.id} beats")
        try:
            for job in held:
                self._say(ws, frames.Accept(stream=job.stream))
                if job.answer is not None or job.error is not None:
                    self._begin(self._send_answer(ws, job), f"{self.id} answers again")
            await self._read(ws)
        finally:
            self._ws = None
            beating.cancel()

    async def _beats(self, ws: Connection) -> None:
        while True:
            await self.world.pause(20.0, 30.0)
            self._say(ws, frames.Beat(beat=self._heartbeat(), slots=dict.fromkeys(SERVICES, self.slots)))

    async def _next(self, ws: Connection, within_s: float) -> Any:
        try:
            async with asyncio.timeout(within_s):
                event = await ws.down.get()
        except TimeoutError:
            raise Broken from None
        if event["type"] in ("websocket.disconnect", "http.response.start"):
            raise Broken
        return event

    async def _read(self, ws: Connection) -> None:
        waiting: Waiting = {}
        while True:
            event = await self._next(ws, 100.0)
            if event["type"] == "websocket.close":
                raise Broken
            found = event.get("bytes")
            for record in frames.records(event["text"] if found is None else found):
                self._record(ws, waiting, record)

    def _record(self, ws: Connection, waiting: Waiting, record: tuple[int, int, bytes]) -> None:
        stream, kind, content = record
        if kind == frames.CONTROL:
            self._control(ws, waiting, frames.unpack_down(content))
            return
        offer, body = waiting.pop(stream)
        if kind == frames.DATA_LAST:
            self._accept(ws, offer, body + content)
        else:
            waiting[stream] = offer, body + content

    def _control(self, ws: Connection, waiting: Waiting, frame: frames.Down) -> None:
        if isinstance(frame, frames.Task):
            if frame.offer.body_url is None:
                waiting[frame.stream] = frame.offer, b""
            else:
                self._accept(ws, frame.offer, b"")
        elif isinstance(frame, frames.Cancel):
            self._cancel(frame.stream)
        elif isinstance(frame, frames.Assign):
            self._drop([{"lease_id": ref.lease_id} for ref in frame.answer.cancel])

    def _accept(self, ws: Connection, offer: TaskOffer, body: bytes) -> None:
        if self.world.random.random() < 0.02:
            return
        self._say(ws, frames.Accept(stream=int(offer.lease_id[:8], 16) or 1))
        self._take(offer, body)

    def _cancel(self, stream: int) -> None:
        for job in [job for job in self.jobs.values() if job.stream == stream]:
            self._lose(job.offer.lease_id)

    async def _send_answer(self, ws: Connection, job: Job) -> None:
        if job.error is not None:
            self._say(ws, frames.Error(stream=job.stream, fault=job.error[0], reason=job.error[1]))
            self.jobs.pop(job.offer.lease_id, None)
            return
        answer = job.answer or b""
        self._say(ws, frames.Head(stream=job.stream, status=200, headers=JSON_HEAD))
        step = 30 if self.world.random.random() < 0.2 and len(answer) < 1000 else 30_000
        for start in range(0, len(answer), step):
            data = frames.pack_data(job.stream, answer[start : start + step])
            ws.up.put({"type": "websocket.receive", "bytes": data, "text": None})
            if step < 1000:
                await self.world.pause(0.0, 1.0)
        self._say(ws, frames.End(stream=job.stream, usage={"tokens": 1.0}))
        if self.world.random.random() < 0.05:
            self._say(ws, frames.End(stream=job.stream, usage={"tokens": 1.0}))
        job.sent = True
        self.world.loop.call_later(KEPT_S, self._let_go, job, ws)

    def _let_go(self, job: Job, ws: Connection) -> None:
        """Forget an answer that was sent on a connection that still stands: it has arrived."""
        if self._ws is ws:
            self.jobs.pop(job.offer.lease_id, None)

    def _say(self, ws: Connection, frame: frames.Frame) -> None:
        ws.up.put({"type": "websocket.receive", "text": frames.pack(frame), "bytes": None})
