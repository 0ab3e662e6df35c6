"""What the coordinator is told only when it is new, and what it knows: nothing more, once it is another process.

A coordinator writes what a heartbeat told it some seconds later, and one that was killed before knows nothing of it. So
its answers say which process gave them, and to another one everything is told once more.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_core.backoff import Backoff

if TYPE_CHECKING:
    from collections.abc import Callable

    from rma_core.models.hardware import HardwareReport
    from rma_core.models.worker import Heartbeat, PluginReport, RuntimeReport


#: Processes of a coordinator that are remembered to have answered.
LATELY = 8
#: First and longest wait before everything is told once more to yet another process.
AGAIN_S, LONGEST_AGAIN_S = 60.0, 3600.0


class Told(NamedTuple):
    """What the coordinator is told when it is new, beside what every heartbeat says."""

    report: HardwareReport | None = None
    #: ``None``: not known to have been told.
    runtimes: tuple[RuntimeReport, ...] | None = None
    plugins: tuple[PluginReport, ...] | None = None

    @staticmethod
    def _identity(one: PluginReport) -> tuple[str, ...]:
        return (one.kind, one.name, one.distribution, one.version)

    @property
    def states(self) -> list[tuple[object, ...]] | None:
        """How plugins stand: what their last import took is no news, and failures are some once they have doubled."""
        if self.plugins is None:
            return None
        return [
            (*self._identity(one), one.state, one.reason, one.deprecated, one.failures.bit_length())
            for one in self.plugins
        ]


class News:
    """What of ``now`` the coordinator does not know yet, as far as is known."""

    def __init__(self, now: Callable[[], Told], clock: Callable[[], float] = time.monotonic) -> None:
        self._now, self._clock = now, clock
        #: What it knows, and what it will know once the registration on its way is answered.
        self._known, self._registering = Told(), Told()
        #: Which processes of the coordinator have answered lately (empty: one that does not say).
        self._processes: deque[str] = deque(maxlen=LATELY)
        #: Everything is to be told again, but not before then: each time later, whoever answers.
        self._due, self._not_before = False, 0.0
        self._again = Backoff(base_s=AGAIN_S, cap_s=LONGEST_AGAIN_S)

    def registering(self) -> Told:
        """Return everything, for a registration."""
        self._registering = self._now()
        return self._registering

    def registered(self) -> None:
        """A registration was answered: what it told is kept."""
        self._known = self._registering

    def added_to(self, beat: Heartbeat) -> Heartbeat:
        """Return a heartbeat with all that is new."""
        now, known = self._now(), self._known
        return msgspec.structs.replace(
            beat,
            report=now.report if now.report is not known.report else None,
            runtimes=now.runtimes if now.runtimes != known.runtimes else None,
            plugins=now.plugins if now.states != known.states else None,
        )

    def read(self, beat: Heartbeat) -> None:
        """A heartbeat was read; what has changed meanwhile is still new."""
        known = self._known
        self._known = Told(
            known.report if beat.report is None else beat.report,
            known.runtimes if beat.runtimes is None else beat.runtimes,
            known.plugins if beat.plugins is None else beat.plugins,
        )

    def answered_by(self, process: str) -> bool:
        """Note which process has answered (empty: it does not say); say whether everything is new again.

        Who answers with another word each time has no more of it: what is told is much.
        """
        if process not in self._processes:
            # What a registration told was written before it was answered.
            self._due = self._due or (bool(process) and len(self._processes) > 0)
            self._processes.append(process)
        now = self._clock()
        if not self._due or now < self._not_before:
            return False
        if now > self._not_before + LONGEST_AGAIN_S:
            self._again.reset()
        self._due, self._not_before = False, now + self._again.next_s()
        self._known = Told()
        return True
