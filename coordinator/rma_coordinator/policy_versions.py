"""One version of a plugin with tier policies: a child while it is needed, what is asked in batches, answers kept.

A policy is a pure function, so an answer is asked for once and kept. Whoever may wait prepares the answers that it
will need, `ChildPolicy.prepare`; `ChildPolicy.decide` then only looks, and never waits for anyone's code.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_core.backoff import Backoff
from rma_core.interfaces import TierDecision
from rma_core.policy_process import PolicyProcess, Question, decision_deadline, unusable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from rma_core.host import PolicyPlugin, State
    from rma_core.interfaces import PolicyInput
    from rma_core.policy_process import Answer

logger = logging.getLogger(__name__)

#: Machines that a child is asked about at a time.
AT_ONCE = 10
#: Answers that are kept of one version; about 350 bytes each.
KEPT = 10_000
#: Questions that wait, and their bytes; what is more than that is not asked now.
MOST_WAITING, MOST_WAITING_BYTES = 1000, 16 * 1024 * 1024
#: Nobody waits longer for an answer; each decision has a deadline of its own.
PREPARED_S = 120.0
#: So long a machine that a policy failed for is not asked about again.
FAILED_S = 600.0
#: A policy whose child dies of so many machines in a row, or so often within a minute, is left alone for a while.
IN_A_ROW, DEATHS, DEATHS_WITHIN_S = 3, 12, 60.0
#: First and longest wait before a child is started again, and while it is left alone.
AGAIN_S, LONGEST_AGAIN_S = 0.2, 5.0
ALONE_S, LONGEST_ALONE_S = 30.0, 600.0


class NotAskedYet(Exception):
    """There is no answer yet; who prepares it will find it."""


class PolicyFailed(Exception):
    """What a policy did instead of deciding, in words that go on from its name."""


class Unusable(Exception):
    """Why a child cannot be started, and which state its plugin is in."""

    def __init__(self, state: State, reason: str) -> None:
        super().__init__(reason)
        self.state: State = state


class NotNow(Exception):
    """This machine cannot start a child just now; nobody's policy is to blame."""


class _Kept(NamedTuple):
    """A decision, or the words why there is none, and until when that counts."""

    decision: TierDecision | None
    words: str = ""
    until: float = 0.0


class _Waiting(NamedTuple):
    """A question that waits, the worker that it is about, and who waits for its answer."""

    line: bytes
    worker_id: str
    asked: asyncio.Future[None]


class ChildPolicy:
    """A policy of a plugin, as the pool asks it."""

    def __init__(self, of: PolicyVersion, name: str, summary: str) -> None:
        self.of, self.name, self.summary = of, name, summary

    @property
    def version(self) -> str:
        """The version of its distribution."""
        return self.of.plugin.version

    @property
    def files(self) -> str:
        """A word for what its code and its settings were."""
        return self.of.files

    def decide(self, asked: PolicyInput) -> TierDecision:
        """Return what it has said of this machine. Raises NotAskedYet, PolicyFailed."""
        return self.of.answer(self._line(asked))

    async def prepare(self, asked: Iterable[PolicyInput], *, within_s: float = PREPARED_S) -> None:
        """Ask about these machines, and wait until `decide` has an answer or a failure for each, but no longer."""
        await self.of.prepare([(self._line(one), one.worker_id) for one in asked], within_s)

    def _line(self, asked: PolicyInput) -> bytes:
        question = Question(policy=self.name, deadline_s=self.of.deadline_s, asked=asked)
        return msgspec.json.encode(question) + b"\n"


class PolicyVersion:
    """One version of a plugin, and its child."""

    def __init__(
        self,
        plugin: PolicyPlugin,
        table: Mapping[str, object],
        *,
        files: str,
        installed: Callable[[], tuple[str, str]],
        failed: Callable[[], None],
        hidden: Sequence[str],
        clock: Callable[[], float],
    ) -> None:
        """Keep what it is: its configuration ``table``, and ``files``, a word for both code and table.

        ``installed`` says which version is there now, and that version's word; a child is started only of this one.
        ``failed`` is told each time that one fails; ``hidden`` folders are kept from it.
        """
        self.plugin, self.files = plugin, files
        self.policies: dict[str, ChildPolicy] = {}
        self.import_seconds: float | None = None
        self.deprecated: tuple[str, ...] = ()
        self.used_at = clock()
        self.deadline_s, self._wrong = decision_deadline(plugin.name, table)
        self._table, self._installed, self._failed = table, installed, failed
        self._hidden, self._clock = hidden, clock
        self._process: PolicyProcess | None = None
        self._kept: dict[bytes, _Kept] = {}
        self._waiting: dict[bytes, _Waiting] = {}
        self._waiting_bytes = 0
        self._work: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._again = Backoff(base_s=AGAIN_S, cap_s=LONGEST_AGAIN_S)
        self._alone = Backoff(base_s=ALONE_S, cap_s=LONGEST_ALONE_S)
        #: Workers of whom its child died, one after the other; how often of each lately, and until when that counts.
        self._row: set[str] = set()
        self._blamed: dict[str, tuple[int, float]] = {}
        self._deaths: deque[float] = deque(maxlen=DEATHS)
        #: Until when it is left alone, and why.
        self._left: tuple[float, str] = (0.0, "")

    @property
    def alive(self) -> bool:
        """Whether it has a child, as far as is known."""
        return self._process is not None and self._process.lives()

    @property
    def busy(self) -> bool:
        """Whether it is being asked."""
        return self._work is not None and not self._work.done()

    async def open(self) -> None:
        """Start its child and take in which policies it has. Raises Unusable."""
        try:
            process = await self._living()
        except NotNow as error:
            raise Unusable("failed", str(error)) from None
        self.import_seconds, self.deprecated = process.hello.import_seconds, process.hello.deprecated
        self.policies = {one.name: ChildPolicy(self, one.name, one.summary) for one in process.hello.given}

    # -- answers -----------------------------------------------------------------------------------------------

    def answer(self, line: bytes) -> TierDecision:
        """Return the answer to a question. Raises NotAskedYet, PolicyFailed."""
        found = self._kept.get(_key(line))
        if found is None or (found.decision is None and found.until <= self._clock()):
            raise NotAskedYet
        if found.decision is None:
            raise PolicyFailed(found.words)
        return found.decision

    async def prepare(self, lines: Iterable[tuple[bytes, str]], within_s: float) -> None:
        """Ask what has no answer yet, each line about a worker, and wait for that."""
        self.used_at = self._clock()
        futures = {asked for line, worker_id in lines if (asked := self._enqueue(line, worker_id)) is not None}
        if futures:
            # Whoever else waits for the same still does when this one is cancelled.
            await asyncio.wait(futures, timeout=within_s)

    def _enqueue(self, line: bytes, worker_id: str) -> asyncio.Future[None] | None:
        """Have a question wait, unless there is an answer; ``None`` too where too many wait."""
        with contextlib.suppress(NotAskedYet):
            try:
                self.answer(line)
            except PolicyFailed:
                return None
            # What is used stays longest.
            self._kept[_key(line)] = self._kept.pop(_key(line))
            return None
        key = _key(line)
        times, until = self._blamed.get(worker_id, (0, 0.0))
        if times >= IN_A_ROW and until > self._clock():
            # Whatever else it says of itself: it must not cost the others their policy.
            self._settle(key, _Kept(None, f"failed {times} times for this machine, and does not look at it now", until))
            return None
        if key in self._waiting:
            return self._waiting[key].asked
        if len(self._waiting) >= MOST_WAITING or self._waiting_bytes + len(line) > MOST_WAITING_BYTES:
            return None
        asked = asyncio.get_running_loop().create_future()
        self._waiting[key] = _Waiting(line, worker_id, asked)
        self._waiting_bytes += len(line)
        if not self.busy:
            self._work = asyncio.create_task(self._ask_all(), name=f"what asks the policies of {self.plugin.name}")
            self._work.add_done_callback(self._worked)
        return asked

    def _settle(self, key: bytes, kept: _Kept) -> None:
        self._kept.pop(key, None)
        self._kept[key] = kept
        if len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        self._let_go(key)

    def _let_go(self, key: bytes) -> None:
        """Nobody waits for that any more."""
        waiting = self._waiting.pop(key, None)
        if waiting is not None:
            self._waiting_bytes -= len(waiting.line)
            if not waiting.asked.done():
                waiting.asked.set_result(None)

    # -- the child ---------------------------------------------------------------------------------------------

    async def _ask_all(self) -> None:
        while self._waiting:
            await self._ask(dict(islice(self._waiting.items(), AT_ONCE)))

    def _worked(self, work: asyncio.Task[None]) -> None:
        """Nothing is asked any more; who waits is told, whatever happened."""
        if not work.cancelled() and work.exception() is not None:
            logger.error("%s failed", work.get_name(), exc_info=work.exception(), extra={"action": "bug"})
        if not self.busy:
            for key in list(self._waiting):
                self._let_go(key)

    async def _ask(self, batch: dict[bytes, _Waiting]) -> None:
        """Ask about some machines until each has an answer or a failure."""
        todo = deque(batch)
        while todo:
            until, why = self._left
            if until > self._clock():
                for key in todo:
                    self._settle(key, _Kept(None, f"{why}; it is left alone for a while", until))
                return
            try:
                process = await self._living()
            except NotNow as error:
                logger.warning("policies of %s: %s", self.plugin.name, error, extra={"action": "policy"})
                # They are asked later: whoever waits for an answer does not get one now.
                for key in list(self._waiting):
                    self._let_go(key)
                return
            except Unusable as error:
                self._leave_alone(f"cannot be asked: {error}")
                continue
            answers = await process.ask([batch[key].line for key in todo], self.deadline_s)
            for answer in answers:
                self._settle(todo.popleft(), self._taken(answer))
            if answers:
                self._row.clear()
                self._again.reset()
            if process.ended:
                self._died(process, todo, batch)
            else:
                self._alone.reset()

    def _taken(self, answer: Answer) -> _Kept:
        if answer.error:
            self._failed()
            return _Kept(None, f"failed: {answer.error}", self._clock() + FAILED_S)
        return _Kept(TierDecision(tier=answer.tier, reason=answer.reason, prefers=answer.prefers))

    def _died(self, process: PolicyProcess, todo: deque[bytes], batch: Mapping[bytes, _Waiting]) -> None:
        """Blame a machine only where it was the first that the child was asked about: others may have brought it on."""
        words = "policies of %s: their child %s"
        logger.info(words, self.plugin.name, process.ended, extra={"action": "policy", "plugin": self.plugin.name})
        self._failed()
        now = self._clock()
        if todo and not process.answered:
            worker_id = batch[todo[0]].worker_id
            self._settle(todo.popleft(), _Kept(None, process.ended, now + FAILED_S))
            self._blame(worker_id, now)
            self._row.add(worker_id)
        # One machine that is asked about again and again has its own bound.
        if len(self._row) != 1:
            self._deaths.append(now)
        last = f"the last time it {process.ended}"
        if len(self._row) >= IN_A_ROW:
            self._leave_alone(f"has failed for {len(self._row)} machines in a row, {last}")
        elif len(self._deaths) == DEATHS and now - self._deaths[0] < DEATHS_WITHIN_S:
            self._leave_alone(f"has failed {DEATHS} times within a minute, {last}")

    def _blame(self, worker_id: str, now: float) -> None:
        """Count that its child died of a worker; those of previews have no id, and are not counted."""
        times, until = self._blamed.pop(worker_id, (0, 0.0))
        if worker_id:
            self._blamed[worker_id] = (times + 1 if until > now else 1, now + FAILED_S)
        if len(self._blamed) > KEPT:
            del self._blamed[next(iter(self._blamed))]

    def _leave_alone(self, why: str) -> None:
        self._left = self._clock() + self._alone.next_s(), why

    async def _living(self) -> PolicyProcess:
        """Return the child; start one where there is none. Raises Unusable, NotNow."""
        async with self._starting:
            if self._process is not None and self._process.lives():
                return self._process
            if self._process is not None:
                # It may have died while nobody asked it anything.
                await self._process.close()
                await asyncio.sleep(self._again.next_s())
            self._process = await self._started()
            return self._process

    async def _started(self) -> PolicyProcess:
        if self._wrong:
            raise Unusable("failed", self._wrong)
        await self._same()
        try:
            process = await PolicyProcess.start(
                self.plugin.value, self._table, folder=self.plugin.folder, hidden=self._hidden
            )
        except OSError as error:
            raise NotNow(f"no child process can be started: {error}") from None
        if process.ended:
            self._failed()
            raise Unusable(*unusable(process.hello, process.ended))
        try:
            # They may have been replaced while they were imported.
            await self._same()
        except BaseException:
            await process.close()
            raise
        return process

    async def _same(self) -> None:
        """Raise Unusable where another version is there by now."""
        version, files = await asyncio.to_thread(self._installed)
        if files == self.files:
            return
        now = f"{version} is installed now" if files else "it is not installed any more"
        if version == self.plugin.version:
            now = "its files or settings are others now"
        raise Unusable("failed", f"{self.plugin.version} cannot be started again: {now} (`rma policies rescan`)")

    async def end(self) -> None:
        """End the child; its answers are kept, and another is started when there is something to ask."""
        process, self._process = self._process, None
        if process is not None:
            await process.close()

    async def close(self) -> None:
        """End the child, and ask nothing more."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait({self._work})
        await self.end()
        self._kept.clear()


def _key(line: bytes) -> bytes:
    return hashlib.sha256(line).digest()[:16]
