"""Simulated clients: they ask, leave in the middle, repeat themselves, look, cancel; and note what they saw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.history import UNSUCCESSFUL, digest
from tests.simulated_workers import SERVICES
from tests.simulation import CALL_WITHIN_S, Broken, Link, Reply

if TYPE_CHECKING:
    from tests.history import History, Operation
    from tests.simulation import World

#: What a client does next, and how often.
KINDS = {"live": 25, "async": 20, "keyed": 25, "repeat": 10, "get": 12, "result": 5, "delete": 3}
ENDED = ("succeeded", "failed", "cancelled")
#: The coordinator refused before anything was made.
REFUSED = (401, 403, 404, 408, 413, 429, 503)


class SimulatedClient:
    """One client with a key of its own, one call after the other."""

    def __init__(self, world: World, history: History, number: int, secret: str) -> None:
        self.world, self.history, self.number, self.secret = world, history, number, secret
        self.link = Link(world)
        self.tasks: list[Operation] = []
        self.keyed: list[tuple[Operation, bytes, bool]] = []

    async def run(self, operations: int) -> None:
        for _ in range(operations):
            await self.step()
            await self.world.pause(0.0, 1.2)
            if self.history.operations[-1].outcome == "unknown":
                await self.world.pause(0.2, 5.0)

    async def step(self) -> None:
        kind = self.world.random.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "repeat" and self.keyed:
            await self._repeat()
        elif kind in ("get", "result", "delete") and self.tasks:
            recent = self.tasks[-1:] if kind == "delete" else self.tasks[-30:]
            await self.ask(kind, self.world.random.choice(recent).task_id)
        else:
            await self._request(kind if kind in ("live", "async", "keyed") else "async")

    # -- requests ----------------------------------------------------------------------------------------------

    async def _request(self, kind: str) -> None:
        chance = self.world.random
        pad = b"." * chance.choice((0, 0, 0, 0, 0, 0, 0, 0, 2000, 90_000))
        body = chance.randbytes(12).hex().encode() + pad
        key = chance.randbytes(8).hex() if kind == "keyed" else ""
        detached = kind == "async" or (kind == "keyed" and chance.random() < 0.5)
        service = chance.choice(SERVICES)
        operation = self._invoke(kind, service=service, digest=digest(body), key=key)
        if key:
            self.keyed.append((operation, body, detached))
        await self._send(operation, body, detached=detached)

    async def _repeat(self) -> None:
        """Make a keyed request again, as one does whose answer was lost."""
        first, body, detached = self.world.random.choice(self.keyed[-20:])
        operation = self._invoke("keyed", service=first.service, digest=first.digest, key=first.key)
        await self._send(operation, body, detached=detached)

    async def _send(self, operation: Operation, body: bytes, *, detached: bool) -> None:
        headers = {"content-type": "text/plain"}
        if operation.key:
            headers["idempotency-key"] = operation.key
        if detached:
            headers["prefer"] = "respond-async"
            # A repetition has the same as the first.
            if operation.digest[0] in "01234567":
                headers["rma-webhook"] = f"https://hooks.example/{self.number}"
                operation.hook = True
        path = f"/api/inference/{operation.service}"
        patience_s = self.world.random.uniform(0.05, 3.0) if self.world.random.random() < 0.1 else CALL_WITHIN_S
        try:
            reply = await self.world.call(
                self.link, "POST", path, secret=self.secret, body=body, headers=headers, leave_after_s=patience_s
            )
        except Broken:
            self._over(operation, "unknown")
            return
        operation.status = reply.status
        self._answered(operation, reply)

    def _answered(self, operation: Operation, reply: Reply) -> None:
        task_id = reply.headers.get("rma-task-id", "")
        if reply.status == 202:
            operation.task_id = reply.json["task_id"]
            self._state(operation, reply.json)
            self.tasks.append(operation)
            self._over(operation, "ok")
        elif reply.status == 200:
            operation.task_id, operation.state, operation.answer = task_id, "succeeded", digest(reply.body)
            self.history.seen(operation, reply.body, operation.service, operation.digest)
            self._over(operation, "ok")
        elif reply.status == 409 and operation.key:
            operation.task_id = reply.headers["location"].rpartition("/")[2]
            self.tasks.append(operation)
            self._over(operation, "ok")
        elif reply.status in REFUSED:
            self._over(operation, "fail")
        elif reply.status in (400, 502, 504) and task_id:
            # A live task has failed for good; that of a key has ended so, and stays what it is.
            operation.task_id, operation.state = task_id, UNSUCCESSFUL
            self._over(operation, "fail" if operation.kind == "live" else "ok")
        else:
            self.history.complain(f"operation {operation.number}: {reply.status} {reply.body[:200]!r}")
            self._over(operation, "unknown")

    # -- questions ---------------------------------------------------------------------------------------------

    async def ask(self, kind: str, task_id: str) -> Operation:
        """Look at a task, fetch its answer, or cancel it."""
        operation = self._invoke(kind, task_id=task_id)
        path = f"/api/inference/tasks/{task_id}"
        method = "DELETE" if kind == "delete" else "GET"
        path += {"get": f"?wait={self.world.random.choice((0, 0, 5))}", "result": "/result", "delete": ""}[kind]
        try:
            reply = await self.world.call(self.link, method, path, secret=self.secret)
        except Broken:
            self._over(operation, "unknown")
            return operation
        operation.status = reply.status
        if kind == "result" and reply.status == 200:
            operation.state, operation.answer = "succeeded", digest(reply.body)
            asked = next(one.digest for one in self.tasks if one.task_id == task_id)
            self.history.seen(operation, reply.body, reply_service(self.tasks, task_id), asked)
        elif kind != "result" and reply.status == 200:
            self._state(operation, reply.json)
            if kind == "delete" and operation.state != "cancelled":
                self.history.complain(f"{task_id} was cancelled and is {reply.json['status']}")
        elif not (reply.status == 503 or (reply.status in (409, 502, 504, 400) and kind in ("result", "delete"))):
            said = f"{reply.status} {reply.body[:200]!r}"
            self.history.complain(f"operation {operation.number}: {kind} {task_id}: {said}")
        self._over(operation, "ok" if reply.status == 200 else "fail")
        return operation

    def _state(self, operation: Operation, shown: Any) -> None:
        if shown["status"] in ENDED:
            operation.state = shown["status"]

    # -- the history -------------------------------------------------------------------------------------------

    def _invoke(self, kind: str, **facts: Any) -> Operation:
        return self.history.invoke(kind, self.number, self.world.loop.time(), **facts)

    def _over(self, operation: Operation, outcome: Any) -> None:
        operation.outcome, operation.ended = outcome, self.world.loop.time()


def reply_service(tasks: list[Operation], task_id: str) -> str:
    """Return the service that a task was asked of."""
    return next(one.service for one in tasks if one.task_id == task_id)
