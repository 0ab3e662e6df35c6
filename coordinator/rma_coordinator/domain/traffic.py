"""How many bytes of requests and answers went through the coordinator this month: in all, by key, by worker. Pure.

What is counted, bodies only (what headers, heartbeats and TLS add is not known here):

- of a key, its requests as they come in and its answers as they go out to it,
- of a worker, the requests that it is given, each attempt of one, and its answers as they come,
- in all, what leaves the coordinator: requests to workers and answers to clients. That is what hosts charge for.

Months are the calendar's, in UTC.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rma_coordinator.domain.tasks import Task

logger = logging.getLogger(__name__)

#: Who stands for everyone.
POOL = "pool"
#: Parts of what may pass in a month at which the log says so, the largest first.
TOLD_AT = (1.0, 0.8)

Month = Literal["this", "last"]


class TrafficRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What passed for one key, one worker, or everyone in one month, as it is kept."""

    subject: str
    #: As `2026-11`.
    month: str
    request_bytes: int = 0
    answer_bytes: int = 0

    @property
    def key(self) -> str:
        """Its key in the store."""
        return f"{self.month}/{self.subject}"


class Passed:
    """Bytes that passed for one subject in a month."""

    __slots__ = ("answers", "requests")

    def __init__(self, requests: int = 0, answers: int = 0) -> None:
        self.requests, self.answers = requests, answers

    @property
    def total(self) -> int:
        """Both together."""
        return self.requests + self.answers


class Traffic:
    """What passed this month and the one before it, and what may; ``most`` and ``most_worker`` of 0 is any number.

    ``now`` is Unix seconds. A clock that is set back into the month before goes on counting there.
    """

    def __init__(self, *, most: int = 0, most_worker: int = 0, now: float = 0.0) -> None:
        self.most, self.most_worker = most, most_worker
        self.month, self.ends_at = month_of(now)
        self._months: dict[str, dict[str, Passed]] = {}
        #: Whose count is newer than what the store holds, by month, and what is to go from there.
        self._changed: dict[str, set[str]] = {}
        self._gone: set[str] = set()
        self._told = 0.0
        self._begin()

    def restore(self, records: Iterable[TrafficRecord]) -> None:
        """Take in what was counted before the coordinator started."""
        for one in records:
            self._months.setdefault(one.month, {})[one.subject] = Passed(one.request_bytes, one.answer_bytes)
        self._begin()
        # What was said before the start is not said again.
        self._told = self._part()

    # -- counting ------------------------------------------------------------------------------------------------------

    def task(self, task: Task) -> None:
        """Count a task that has ended: what its workers were given and sent, and what its key sent."""
        given = 0
        for attempt in task.attempts:
            if attempt.started_at is None and not attempt.answer_bytes:
                continue
            given += task.body_bytes
            self._add(attempt.worker_id, task.body_bytes, attempt.answer_bytes)
        # A kept answer goes out when it is fetched, as often as that is.
        gone_out = not task.durable and (task.committed or task.state == "succeeded")
        out = task.holder.answer_bytes if gone_out and task.holder is not None else 0
        self._add(task.key_id, task.body_bytes, out)
        self._add(POOL, given, out)

    def answer(self, key_id: str, size: int) -> None:
        """Count an answer that was kept and goes out now."""
        self._add(key_id, 0, size)
        self._add(POOL, 0, size)

    def _add(self, subject: str, requests: int, answers: int) -> None:
        passed = self._passed.get(subject)
        if passed is None:
            passed = self._passed[subject] = Passed()
        passed.requests += requests
        passed.answers += answers
        self._now_changed.add(subject)

    # -- limits --------------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether as much has passed as may; then no new work is taken before the month ends."""
        return 0 < self.most <= self._all.total

    def full_for(self, worker_id: str) -> bool:
        """Say whether as much has passed for a worker as may for one."""
        if not self.most_worker:
            return False
        passed = self._passed.get(worker_id)
        return passed is not None and passed.total >= self.most_worker

    def of(self, subject: str, month: Month = "this") -> Passed:
        """Return what passed for a key, a worker, or POOL."""
        found = self._passed if month == "this" else self._months.get(_before(self.month), {})
        return found.get(subject) or Passed()

    def show(self, subject: str, most: int | None = None) -> dict[str, Any]:
        """Return what passed for a subject as plain JSON data; ``most`` is what may, ``None`` any number."""
        now, last = self.of(subject), self.of(subject, "last")
        return {
            "month": self.month,
            "request_bytes": now.requests,
            "answer_bytes": now.answers,
            "limit_bytes": most or None,
            "last_month": {"request_bytes": last.requests, "answer_bytes": last.answers},
        }

    # -- time ----------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Begin a new month when there is one, and say when most of what may pass has passed, or all of it."""
        month, ends_at = month_of(now)
        if month != self.month:
            self.month, self.ends_at, self._told = month, ends_at, 0.0
            self._begin()
        part = self._part()
        if part > self._told:
            self._told = part
            self._tell(part)

    def _begin(self) -> None:
        """Count in the month that it is; what is older than the one before is forgotten."""
        kept = {self.month, _before(self.month), _after(self.month)}
        for month in [month for month in self._months if month not in kept]:
            self._gone |= {f"{month}/{subject}" for subject in self._months.pop(month)}
            self._changed.pop(month, None)
        self._passed = self._months.setdefault(self.month, {})
        self._all = self._passed.setdefault(POOL, Passed())
        self._now_changed = self._changed.setdefault(self.month, set())

    def _part(self) -> float:
        """Return the largest of TOLD_AT that is reached."""
        return next((part for part in TOLD_AT if self.most and self._all.total >= part * self.most), 0.0)

    def _tell(self, part: float) -> None:
        words = "%d of the %d bytes that may pass in %s have passed%s"
        more = ": no new work is taken before the next month" if part >= 1 else f" ({part:.0%})"
        about = {"action": "traffic_full" if part >= 1 else "traffic_high"}
        logger.warning(words, self._all.total, self.most, self.month, more, extra=about)

    # -- what is kept --------------------------------------------------------------------------------------------------

    def take(self) -> tuple[list[TrafficRecord], set[str]]:
        """Return what is to be written, and the keys of what is to go; from here on that counts as done."""
        found = [self._record(month, subject) for month, subjects in self._changed.items() for subject in subjects]
        gone, self._gone = self._gone, set()
        for subjects in self._changed.values():
            subjects.clear()
        return found, gone

    def put_back(self, records: Iterable[TrafficRecord], gone: set[str]) -> None:
        """What was taken could not be written: it is to be taken again."""
        for one in records:
            if one.month in self._months:
                self._changed.setdefault(one.month, set()).add(one.subject)
        self._gone |= gone

    def _record(self, month: str, subject: str) -> TrafficRecord:
        passed = self._months[month][subject]
        return TrafficRecord(subject=subject, month=month, request_bytes=passed.requests, answer_bytes=passed.answers)


def month_of(now: float) -> tuple[str, float]:
    """Return the month of a moment, as `2026-11`, and when it ends, both in UTC and Unix seconds."""
    today = datetime.fromtimestamp(now, UTC)
    name = f"{today:%Y-%m}"
    year, month = map(int, _after(name).split("-"))
    return name, datetime(year, month, 1, tzinfo=UTC).timestamp()


def _after(month: str) -> str:
    year, number = map(int, month.split("-"))
    return f"{year + number // 12:04d}-{number % 12 + 1:02d}"


def _before(month: str) -> str:
    year, number = map(int, month.split("-"))
    return f"{year - (number == 1):04d}-{(number - 2) % 12 + 1:02d}"
