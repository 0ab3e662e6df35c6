"""What dispatch tells of itself in the log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rma_core.models.channel import RESUME_WITHIN_S

if TYPE_CHECKING:
    from rma_coordinator.domain.tasks import Attempt, Seat, Task

logger = logging.getLogger(__name__)


def breaker(worker_id: str, lane: str, *, shut_s: float, reason: str = "") -> None:
    """Say that a worker is not given one kind of work any more for a while, or that it is again."""
    about = {"action": "breaker_shut" if shut_s else "breaker_open", "worker": worker_id, "service": lane}
    if shut_s:
        words = "%s is given no %s for %.0f s, it failed again and again: %s"
        logger.warning(words, worker_id, lane, shut_s, reason, extra=about)
    else:
        logger.info("%s is given %s again", worker_id, lane, extra=about)


def channel_ended(seat: Seat) -> None:
    """Say that a worker's channel broke: it comes and goes by itself, and matters when tasks are on it."""
    count = len(seat.running)
    words = "%s: its channel ended%s"
    waits = f"; attempts that wait {RESUME_WITHIN_S:.0f} s for it to come back: {count}" if count else ""
    about = {"action": "channel_down", "worker": seat.worker_id}
    logger.log(logging.INFO if count else logging.DEBUG, words, seat.worker_id, waits, extra=about)


def attempt_lost(attempt: Attempt) -> None:
    """Say why an attempt came to nothing, for whoever looks closer: the task's own line will tell it too."""
    task, number, worker_id = attempt.task, attempt.number, attempt.worker_id
    about = {"action": f"attempt_{attempt.state}", "task": task.id, "attempt": number, "worker": worker_id}
    logger.debug("%s attempt %d on %s: %s", task.id, number, worker_id, attempt.reason, extra=about)


def task_ended(task: Task) -> None:
    """Write the one line of a task: how it ended, where, and all that stood in its way."""
    level = logging.WARNING if task.state == "failed" else logging.INFO
    if not logger.isEnabledFor(level):
        return
    attempt = task.attempt
    seconds = (task.ended_at or 0) - task.created_at
    about: dict[str, object] = {"action": f"task_{task.state}", "task": task.id, "service": task.service}
    if task.model:
        about["model"] = task.model
    if attempt:
        about |= {"attempt": attempt.number, "worker": attempt.worker_id}
    logger.log(
        level,
        "%s %s %s in %.2f s%s%s",
        task.id,
        task.lane,
        task.state,
        seconds,
        f" on {attempt.worker_id}, attempt {attempt.number}" if attempt else "",
        f": {'; '.join(task.reasons)}" if task.reasons else "",
        extra=about | {"seconds": round(seconds, 3), "key": task.key_id.removeprefix("key:")},
    )
