"""What the coordinator is told only when it is new, and what it knows: nothing more, once it is another process.

A coordinator writes what a heartbeat told it some seconds later, and one that was killed before knows nothing of it. So
its answers say which process gave them, and to another one everything is told once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from rma_core.models.hardware import HardwareReport
    from rma_core.models.worker import Heartbeat, PluginReport, RuntimeReport


class Told(NamedTuple):
    """What the coordinator is told when it is new, beside what every heartbeat says."""

    report: HardwareReport | None = None
    #: ``None``: not known to have been told.
    runtimes: tuple[RuntimeReport, ...] | None = None
    plugins: tuple[PluginReport, ...] | None = None

    @property
    def states(self) -> list[tuple[object, ...]] | None:
        """How plugins stand: what their last import took is no news, and failures are some once they have doubled."""
        if self.plugins is None:
            return None
        return [
            (one.kind, one.name, one.state, one.distribution, one.version, one.reason, one.failures.bit_length())
            for one in self.plugins
        ]


class News:
    """What of ``now`` the coordinator does not know yet, as far as is known."""

    def __init__(self, now: Callable[[], Told]) -> None:
        self._now = now
        #: What it knows, and what it will know once the registration on its way is answered.
        self._known, self._registering = Told(), Told()
        #: Which process of the coordinator has answered last.
        self._process = ""

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
        """Note which process has answered (empty: it does not say); say whether everything is new again."""
        if not process or process == self._process:
            return False
        # What a registration told was written before it was answered.
        again, self._process = bool(self._process), process
        if again:
            self._known = Told()
        return again
