"""What a run under /v1 works on: one task of dispatch at a time, with the relay of its answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rma_coordinator.api import tasks
from rma_coordinator.api.v1 import errors as openai_errors
from rma_coordinator.api.v1.errors import APIProblem
from rma_coordinator.domain import timings

if TYPE_CHECKING:
    from collections.abc import Callable

    from rma_coordinator.api.v1.sse import Answer
    from rma_coordinator.domain.tasks import Task
    from rma_coordinator.domain.timings import Seen
    from rma_coordinator.pool import Pool
    from rma_coordinator.relay import Head, Relay
    from rma_coordinator.spool import Body
    from rma_core.errors import RMAError

#: As much of a model server's refusal is read.
MAX_REFUSAL_BYTES = 64 * 1024
#: Good statuses of a model server.
GOOD = range(200, 300)

EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
    "x-content-type-options": "nosniff",
}
PLAIN = {"content-type": "application/json", "x-content-type-options": "nosniff"}


class Asked(NamedTuple):
    """How the client wants its answer."""

    answer: Answer
    stream: bool
    #: Whether embeddings are wanted as base64, which not every engine knows.
    base64: bool
    #: Whether engines may keep much of it back for long: several give a call of a tool only when they have all of it.
    bursts: bool = False


class Job(NamedTuple):
    """A request that has become a task, and what is needed to answer it.

    ``origin`` is the body that its first worker got; ``again`` makes a task for what is left of it, whose body has so
    many bytes.
    """

    pool: Pool
    task: Task
    relay: Relay
    asked: Asked
    origin: Body
    again: Callable[[int], Task]

    def who(self) -> str:
        """Return the worker that speaks for the task."""
        return self.task.attempt.worker_id if self.task.attempt else ""

    def measured(
        self, told: object, usage: object, seen: Seen | None = None, *, said: int, tokens: int | None = None
    ) -> None:
        """Learn from what the engine says of an answer that is there, or was ``seen`` to do.

        The answer says ``said`` bytes, and has ``tokens`` in all where that is known.
        """
        found = timings.told(told) or timings.counted(usage, seen)
        if found is not None:
            length = found.answer_tokens if tokens is None else tokens
            self.pool.dispatcher.measured(self.task, found, tokens=length, said=said)

    def failed(self) -> RMAError:
        """Return why the task ended without an answer, with every reason."""
        task = self.task
        return tasks.failure(task.model, task.id, task.reasons, task.fault, too_late=task.late)

    async def refusal(self) -> RMAError:
        """Return what the model server said instead of an answer."""
        relay = self.relay
        while True:
            head = await relay.ready()
            if head is None:
                return self.failed()
            starts, data = relay.starts, bytearray()
            async for piece in relay.pieces():
                data += piece[: max(0, MAX_REFUSAL_BYTES - len(data))]
            if relay.starts == starts:
                break
        if not relay.complete:
            return self.failed()
        if head.status in GOOD:
            return APIProblem(502, f"the model server of {self.who()} did not stream its answer", retry_after_s=5)
        return self.refused(head, bytes(data))

    def refused(self, head: Head, data: bytes) -> RMAError:
        """Return what the model server said with a status that is none of an answer."""
        wait = next((value for name, value in head.headers if name.lower() == "retry-after"), "")
        return openai_errors.of_service(head.status, data, self.who(), retry_after=wait.strip())
