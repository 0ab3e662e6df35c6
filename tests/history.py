"""What clients saw, and the checker: whether a pool that keeps its promises could have shown them that.

Each operation is invoked, and then known to be ``ok``, known to have ``fail``-ed (it did not and will not happen), or
``unknown`` (its answer was lost: it may have happened, or may yet). The promises:
what was acknowledged ends exactly once and its end never changes; an answer is the right service's, to that very
request; what failed has no effect; a key has one task; a lease has one holder; numbers of attempts only grow; the
ledger is the succeeded tasks, each once, credited to who answered; the end of a task whose client wants to be told is
told at least once, once it is on disk, always with the same id and the same words; in the end nothing is left open.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from rma_coordinator.domain.records import LedgerEntry, LedgerPage, LedgerTotal, TaskRecord, TaskResult
from rma_coordinator.domain.webhooks import WebhookRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rma_coordinator.store.base import Row
    from tests.simulation import Disk

Outcome = Literal["invoked", "ok", "fail", "unknown"]
#: A request that was answered at once is in the ledger this soon, unless the coordinator died or could not write.
CREDITED_WITHIN_S = 60.0
#: How a task has ended of which only that is known: failed or cancelled.
UNSUCCESSFUL = "failed or cancelled"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Operation:
    """One call of one client."""

    number: int
    kind: str
    client: int
    invoked: float
    service: str = ""
    #: Of the request's body, which no other request has.
    digest: str = ""
    key: str = ""
    task_id: str = ""
    outcome: Outcome = "invoked"
    ended: float = 0.0
    #: How its task has ended, where that was seen, and the digest of the answer.
    state: str = ""
    answer: str = ""
    status: int = 0
    #: Whether its client wants to be told of its task's end.
    hook: bool = False


@dataclass
class History:
    """Everything that was seen, in order, and what is wrong with it."""

    operations: list[Operation] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    #: What each task was asked, as its workers saw it.
    asked: dict[str, str] = field(default_factory=dict)
    #: What was told of each task's end: the id and the words, and how often that arrived.
    told: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    arrivals: Counter[str] = field(default_factory=Counter)
    _ends: dict[str, tuple[str, str]] = field(default_factory=dict)
    _credits: dict[str, tuple[str, int]] = field(default_factory=dict)
    _folded: Counter[str] = field(default_factory=Counter)
    #: The tasks that one record of the ledger credits, by its key.
    _written: dict[str, list[str]] = field(default_factory=dict)

    def invoke(self, kind: str, client: int, now: float, **facts: Any) -> Operation:
        operation = Operation(len(self.operations), kind, client, now, **facts)
        self.operations.append(operation)
        return operation

    def complain(self, text: str) -> None:
        self.wrong.append(text)

    # -- while it goes on --------------------------------------------------------------------------------------

    def watch(self, rows: list[Row]) -> None:
        """Look at what is committed: an end that is on disk stays, and nobody is credited twice."""
        for kind, key, data in rows:
            if kind == "LedgerEntry":
                self._credited(key, () if data is None else (msgspec.json.decode(data, type=LedgerEntry),))
            elif kind == "LedgerPage":
                self._credited(key, () if data is None else msgspec.json.decode(data, type=LedgerPage).entries)
            elif kind == "TaskRecord" and data is not None:
                record = msgspec.json.decode(data, type=TaskRecord)
                if record.ended_at is not None:
                    self.end(key, record.state, "")
                elif key in self._ends:
                    self.complain(f"{key} has ended, and is written as {record.state}")

    def _credited(self, key: str, entries: tuple[LedgerEntry, ...]) -> None:
        """Entries are written together, or, without any, those that were are added up."""
        for entry in entries:
            who = (entry.worker_id, entry.attempt)
            if self._credits.setdefault(entry.task_id, who) != who:
                self.complain(f"{entry.task_id} is credited to {self._credits[entry.task_id]} and to {who}")
        if not entries:
            self._folded.update(self._written.pop(key))
        else:
            self._written[key] = [entry.task_id for entry in entries]

    def end(self, task_id: str, state: str, answer: str) -> None:
        """Note how a task has ended, as somebody saw it."""
        known = self._ends.get(task_id)
        if known is None:
            self._ends[task_id] = (state, answer)
            return
        if known[0] != state and (UNSUCCESSFUL not in (known[0], state) or "succeeded" in (known[0], state)):
            self.complain(f"{task_id} has ended as {known[0]} and as {state}")
        if known[1] and answer and known[1] != answer:
            self.complain(f"{task_id} has two answers")
        self._ends[task_id] = (state if known[0] == UNSUCCESSFUL else known[0], known[1] or answer)

    def hear(self, disk: Disk, headers: dict[str, str], body: bytes) -> None:
        """A webhook has arrived: what it says is on disk, and is what it said before."""
        data = msgspec.json.decode(body)["data"]
        task_id, message_id = data["task_id"], headers["webhook-id"]
        kept = disk.tables.get("TaskRecord", {}).get(task_id)
        record = None if kept is None else msgspec.json.decode(kept, type=TaskRecord)
        if record is None or record.ended_at is None or record.state != data["status"]:
            self.complain(f"{task_id} was told to be {data['status']}, and is {record and record.state}")
        elif not record.webhook:
            self.complain(f"{task_id} was told, and nobody wants that")
        if self.told.setdefault(task_id, (message_id, body)) != (message_id, body):
            self.complain(f"{task_id} was told in two ways, {self.told[task_id][0]} and {message_id}")
        self.arrivals[task_id] += 1

    def seen(self, operation: Operation, body: bytes, service: str, asked: str) -> None:
        """Check an answer: it is the service's own, and to this request."""
        try:
            answer = msgspec.json.decode(body)
            right = (answer["service"], answer["digest"])
        except (msgspec.DecodeError, KeyError, TypeError):
            self.complain(f"operation {operation.number}: {body[:80]!r} is no answer of any worker")
            return
        if right != (service, asked):
            self.complain(f"operation {operation.number} got the answer to another request")

    # -- in the end --------------------------------------------------------------------------------------------

    def check(self, disk: Disk, offers: list[tuple[str, int, str, str]], troubles: list[float]) -> list[str]:
        """Return everything that must not be; ``troubles`` are when the coordinator died or could not write."""
        self._offers(offers)
        records = {record.task_id: record for record in disk.load(TaskRecord)}
        for operation in self.operations:
            self._operation(operation, records)
        self._keys()
        self._webhooks(disk)
        self._ledger(disk, records, troubles)
        return self.wrong

    def _offers(self, offers: list[tuple[str, int, str, str]]) -> None:
        holders: dict[str, str] = {}
        last: dict[str, int] = {}
        for task_id, number, lease_id, worker_id in offers:
            if holders.setdefault(lease_id, worker_id) != worker_id:
                self.complain(f"lease {lease_id} has two holders")
            if number <= last.get(task_id, 0):
                self.complain(f"{task_id}: attempt {number} follows attempt {last[task_id]}")
            last[task_id] = number

    def _operation(self, operation: Operation, records: dict[str, TaskRecord]) -> None:
        if operation.outcome == "invoked":
            self.complain(f"operation {operation.number} has never ended")
        if operation.kind in ("async", "keyed", "get", "result", "delete") and operation.outcome == "ok":
            record = records.get(operation.task_id)
            if record is None:
                self.complain(f"{operation.task_id} was acknowledged (operation {operation.number}) and is gone")
            elif record.ended_at is None:
                self.complain(f"{operation.task_id} was acknowledged and never ends: {record.state}")
        if operation.state:
            self.end(operation.task_id, operation.state, operation.answer)

    def _keys(self) -> None:
        made: dict[tuple[int, str], set[str]] = {}
        for one in self.operations:
            if one.key and one.task_id and one.outcome == "ok":
                made.setdefault((one.client, one.key), set()).add(one.task_id)
        for (client, key), found in made.items():
            if len(found) > 1:
                self.complain(f"client {client}'s key {key} has {len(found)} tasks")

    def _webhooks(self, disk: Disk) -> None:
        ids = Counter(message_id for message_id, _ in self.told.values())
        for one in self.operations:
            if one.hook and one.outcome == "ok" and not self.arrivals[one.task_id]:
                self.complain(f"{one.task_id} was acknowledged (operation {one.number}) and its end was never told")
        for record in disk.load(WebhookRecord):
            if record.state != "delivered" or not self.arrivals[record.task_id]:
                arrived = self.arrivals[record.task_id]
                self.complain(f"the webhook of {record.task_id} is {record.state} and has arrived {arrived} times")
        for message_id in [message_id for message_id, count in ids.items() if count > 1]:
            self.complain(f"{message_id} tells of {ids[message_id]} tasks")

    def _ledger(self, disk: Disk, records: dict[str, TaskRecord], troubles: list[float]) -> None:
        pages = [entry for page in disk.load(LedgerPage) for entry in page.entries]
        entries = {entry.task_id for entry in [*disk.load(LedgerEntry), *pages]}
        if len(entries) != len(disk.load(LedgerEntry)) + len(pages):
            self.complain("a task is twice in the ledger")
        totals = sum(total.tasks for total in disk.load(LedgerTotal))
        if totals != sum(self._folded.values()) or any(count > 1 for count in self._folded.values()):
            self.complain(f"{totals} tasks are in the ledger's totals, and {len(self._folded)} left its rows")
        credited = entries | set(self._folded)
        durable = {task_id for task_id, record in records.items() if record.state == "succeeded"}
        self._complain_of(durable - credited, "has succeeded and is not in the ledger")
        self._complain_of((credited & set(records)) - durable, "is in the ledger and has not succeeded")
        live = {one.task_id: one for one in self.operations if one.kind == "live" and one.task_id}
        for task_id in credited - set(records):
            if task_id in live and live[task_id].outcome == "fail":
                self.complain(f"{task_id} has failed and is in the ledger")
        for task_id, one in live.items():
            calm = not any(one.invoked <= moment <= one.ended + CREDITED_WITHIN_S for moment in troubles)
            if one.outcome == "ok" and calm and task_id not in credited:
                self.complain(f"{task_id} was answered (operation {one.number}) and is not in the ledger")
        self._failures({self.asked[task_id] for task_id in credited if task_id in self.asked})
        for result in disk.load(TaskResult):
            self._result(result, records)

    def _failures(self, done: set[str]) -> None:
        hopeful = {one.digest for one in self.operations if one.digest and one.outcome != "fail"}
        for one in self.operations:
            if one.outcome == "fail" and one.digest in done and one.digest not in hopeful:
                self.complain(f"operation {one.number} failed, and was done")

    def _result(self, result: TaskResult, records: dict[str, TaskRecord]) -> None:
        """The answer that is kept is of the attempt that is credited."""
        if result.data is None:
            return
        answer = msgspec.json.decode(result.data)
        record = records[result.task_id]
        won = [(one.worker_id, one.number) for one in record.attempts if one.state == "succeeded"]
        if won != [self._credits.get(result.task_id)] or won != [(answer["worker"], answer["attempt"])]:
            credited, who = self._credits.get(result.task_id), f"{answer['worker']} ({answer['attempt']})"
            self.complain(f"{result.task_id}: {won} won, {credited} is credited, {who} answered")

    def _complain_of(self, tasks: set[str], what: str) -> None:
        for task_id in sorted(tasks):
            self.complain(f"{task_id} {what}")

    def summary(self) -> dict[str, int]:
        """Count the operations by kind and outcome."""
        return dict(sorted(Counter(f"{one.kind} {one.outcome}" for one in self.operations).items()))

    def lines(self) -> Iterator[str]:
        """Yield the history as text: two runs of one seed give the same."""
        for one in self.operations:
            yield (
                f"{one.number} {one.kind} {one.client} {one.invoked:.6f} {one.ended:.6f} {one.outcome} {one.status} "
                f"{one.task_id} {one.state} {one.answer}"
            )
