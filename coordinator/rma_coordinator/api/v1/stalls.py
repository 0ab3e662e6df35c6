"""Engines that begin to answer and then say nothing more: a slow one has its time, a stuck one is given up.

The agent looks whether bytes come; some engines send comments for as long as they live, whatever has become of the
answer. Here only pieces of it count.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rma_coordinator.domain.dispatch import STALL_S
from rma_coordinator.domain.timings import Seen

if TYPE_CHECKING:
    from rma_coordinator.api.v1.runs import Run

logger = logging.getLogger(__name__)

#: Seconds between two looks at least.
LEAST_LOOK_S = 0.5


class Watch:
    """Gives up the attempt that answers a run's stream when it has said nothing for too long; `stop` it at the end.

    Whoever takes the pieces calls `heard`.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._heard_at = self._clock()
        #: When its first piece came.
        self._first_at: float | None = None
        task, attempt = run.job.task, run.job.task.holder
        self._attempt = attempt
        # Until its first piece it may read what it was asked, for as long as that was expected to take.
        self._limit_s = max(task.gap_s, (attempt.first_byte_s or 0.0) if attempt is not None else 0.0)
        self._due_at = self._heard_at + self._limit_s
        self._timer = self._loop.call_at(self._due_at, self._look)

    def heard(self) -> None:
        """A piece of the answer has come."""
        self._heard_at = self._clock()
        if self._first_at is None:
            self._begin()

    def _begin(self) -> None:
        """From now on it is to go on."""
        run, attempt = self._run, self._attempt
        self._first_at = self._heard_at
        if attempt is not None and not run.job.asked.bursts:
            self._limit_s = run.job.pool.dispatcher.silence_s(attempt)
            self._again(self._first_at + self._limit_s)

    def stop(self) -> None:
        """Nobody is interested any more."""
        self._timer.cancel()

    def seen(self) -> Seen | None:
        """Return when its pieces came, by the dispatcher's clock; ``None`` where it has not begun."""
        attempt, first_at = self._attempt, self._first_at
        if attempt is None or first_at is None or attempt.started_at is None:
            return None
        ahead = self._run.job.pool.clock() - self._clock()
        return Seen(attempt.started_at, first_at + ahead, max(first_at, self._heard_at - attempt.held_s) + ahead)

    def _again(self, due_at: float) -> None:
        self._timer.cancel()
        self._due_at = due_at
        self._timer = self._loop.call_at(due_at, self._look)

    def _look(self) -> None:
        now, run, attempt = self._clock(), self._run, self._attempt
        if now - self._due_at > STALL_S or run.paces or not run.job.relay.idle:
            # Nobody could hear it: the coordinator stood still, or waits for the client.
            self._heard_at = now
        if now - self._heard_at < self._limit_s:
            self._again(max(self._heard_at + self._limit_s, now + LEAST_LOOK_S))
        elif attempt is not None:
            reason = f"its model server went silent: not a word of the answer for {self._limit_s:.0f} s"
            about = {"action": "engine_silent", "task": run.job.task.id, "worker": attempt.worker_id}
            logger.info("%s on %s: %s", run.job.task.id, attempt.worker_id, reason, extra=about)
            run.job.pool.dispatcher.fail(attempt, "service", reason)
