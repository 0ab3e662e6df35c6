"""Engines that begin to answer and then say nothing more: a slow one has its time, a stuck one is given up.

The agent looks whether bytes come; some engines send comments for as long as they live, whatever has become of the
answer. Here only pieces of it count.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rma_coordinator.api.waiting import Silence
from rma_coordinator.domain.timings import Seen

if TYPE_CHECKING:
    from rma_coordinator.api.v1.runs import Run

logger = logging.getLogger(__name__)


class Watch:
    """Gives up the attempt that answers a run's stream when it has said nothing for too long; `stop` it at the end.

    Whoever takes the pieces calls `heard`.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        task, self._attempt = run.job.task, run.job.task.holder
        # Until its first piece it may read what it was asked, for as long as that was expected to take.
        left_s = max(0.0, task.deadline - run.job.pool.clock())
        first_s = self._attempt.first_byte_s if self._attempt is not None else None
        limit_s = max(task.gap_s, left_s if first_s is None else first_s)
        self._silence = Silence(limit_s, self._give_up, self._held_up)
        self._clock = self._silence.clock
        #: When its first piece came, and its last.
        self._first_at: float | None = None
        self._last_at = 0.0

    def heard(self) -> None:
        """A piece of the answer has come."""
        self._last_at = self._silence.heard_at = self._clock()
        if self._first_at is None:
            self._begin()

    def _begin(self) -> None:
        """From now on it is to go on."""
        run, attempt = self._run, self._attempt
        self._first_at = self._last_at
        if attempt is not None:
            silence_s = run.job.task.gap_s if run.job.asked.bursts else run.job.pool.dispatcher.silence_s(attempt)
            self._silence.expect(silence_s)

    def stop(self) -> None:
        """Nobody is interested any more."""
        self._silence.stop()

    def seen(self) -> Seen | None:
        """Return when its pieces came, by the dispatcher's clock; ``None`` where it has not begun."""
        attempt, first_at = self._attempt, self._first_at
        if attempt is None or first_at is None:
            return None
        ahead = self._run.job.pool.clock() - self._clock()
        return Seen(attempt.offered_at, first_at + ahead, max(first_at, self._last_at - attempt.held_s) + ahead)

    def _held_up(self) -> bool:
        """Say whether it is its client that does not take more."""
        return self._run.paces or not self._run.job.relay.idle

    def _give_up(self) -> None:
        attempt, job = self._attempt, self._run.job
        if attempt is not None:
            reason = f"its model server went silent: not a word of the answer for {self._silence.limit_s:.0f} s"
            about = {"action": "engine_silent", "task": job.task.id, "worker": attempt.worker_id}
            logger.info("%s on %s: %s", job.task.id, attempt.worker_id, reason, extra=about)
            job.pool.dispatcher.fail(attempt, "service", reason)
