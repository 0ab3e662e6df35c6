"""What the owner says to a running agent: pause, resume, drain, and how do you stand; a pause outlives a restart."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from rma_core.agent.attempts import Stop
from rma_core.agent.state import PAUSE_FILE
from rma_core.agent.status import AgentStatus
from rma_core.errors import UsageProblem, ValidationProblem
from rma_core.models.strict import decode, encode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rma_core.agent.lifecycle import Agent
    from rma_core.agent.state import StateFolder

logger = logging.getLogger(__name__)

#: Seconds that a call waits until everything has stopped; what takes longer goes on stopping.
WAIT_S = 8.0
PAUSED = Stop("owner", "the owner of this machine has paused it", tell=True)


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """That the owner wants the machine back for now, since a Unix time."""

    since: float

    @property
    def sentence(self) -> str:
        """Return it for the owner."""
        return f"since {datetime.fromtimestamp(self.since, UTC):%Y-%m-%d %H:%M} UTC, by its owner"


def load_pause(folder: StateFolder) -> Pause | None:
    """Return what was said before a restart. A file that cannot be read was a pause: nothing runs unasked."""
    data = folder.read(PAUSE_FILE)
    if data is None:
        return None
    try:
        return decode(data, Pause, subject=PAUSE_FILE)
    except ValidationProblem:
        return Pause(since=0.0)


class Owner:
    """Answers the control socket's calls for one agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.pause = load_pause(agent.folder)
        #: What a pause stops may take longer than its caller waits.
        self._stopping: asyncio.Task[None] | None = None
        if self.pause is not None:
            self._hold()
            about = {"action": "paused"}
            logger.info("this machine is paused (%s): `rma resume` lets it go on", self.pause.sentence, extra=about)

    @property
    def handlers(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[object]]]:
        """The calls by their names."""
        return {
            "status": self._on_status,
            "drain": self._on_drain,
            "pause": self._on_pause,
            "resume": self._on_resume,
            "look": self._on_look,
        }

    def _hold(self) -> None:
        """Take nothing new, and give what runs back to the pool."""
        self._agent.attempts.closed_because = PAUSED.reason
        self._agent.reconciler.paused = True

    async def _on_status(self, _: dict[str, Any]) -> AgentStatus:
        return status(self._agent)

    async def _on_look(self, arguments: dict[str, Any]) -> dict[str, object]:
        """Look at the hardware now; with ``since`` say instead whether a look that was asked for has ended."""
        lookout = self._agent.lookout
        since = arguments.get("since")
        if since is not None and not isinstance(since, int):
            raise UsageProblem(f"since is a number of looks, not {since!r}")
        rounds = lookout.ask() if since is None else lookout.rounds
        if since is not None and rounds > since and lookout.error:
            raise UsageProblem(f"the agent cannot look at its hardware now: {lookout.error}")
        return {"rounds": rounds, "report": lookout.report if since is not None and rounds > since else None}

    async def _on_drain(self, _: dict[str, Any]) -> dict[str, int]:
        self._agent.stop()
        return {"running": len(self._agent.attempts)}

    async def _on_pause(self, _: dict[str, Any]) -> dict[str, object]:
        """Stop everything, and say what that took; a second pause changes nothing."""
        agent = self._agent
        if agent.draining:
            raise UsageProblem("the agent is stopping already")
        began, first = time.monotonic(), self.pause is None
        if first:
            self.pause = Pause(since=time.time())
            agent.folder.write(PAUSE_FILE, encode(self.pause))
            logger.info("the owner has paused this machine", extra={"action": "paused"})
        given_back = len(agent.attempts.refs())
        self._hold()
        # Before anything else is waited for: nothing new is to be sent here.
        agent.changed()
        self._stopping = stopping = asyncio.create_task(self._stop_all())
        done = (await asyncio.wait({stopping}, timeout=WAIT_S))[0]
        for one in done:
            one.result()
        left = [one.name for one in agent.reconciler.statuses()]
        return {
            "given_back": given_back,
            "still_stopping": left,
            "seconds": round(time.monotonic() - began, 2),
            "paused": self.pause.sentence if self.pause else "",
        }

    async def _stop_all(self) -> None:
        agent = self._agent
        agent.attempts.stop_all(PAUSED)
        await agent.reconciler.pause()

    async def _on_resume(self, _: dict[str, Any]) -> dict[str, object]:
        """Run again what is wanted."""
        agent = self._agent
        was = self.pause is not None
        agent.folder.remove(PAUSE_FILE)
        self.pause = None
        if was and not agent.draining:
            agent.attempts.closed_because = ""
            agent.reconciler.resume()
            agent.changed()
            logger.info("the owner lets this machine go on", extra={"action": "resumed"})
        return {"was_paused": was}


def status(agent: Agent) -> AgentStatus:
    """Return how the agent stands, as `rma status` shows it."""
    return AgentStatus(
        worker_id=agent.client.worker_id,
        coordinator=agent.client.base_url,
        connection=agent.connection,
        standing=agent.link.standing,
        standing_reason=agent.link.reason,
        tier=agent.tier,
        tier_reason=agent.tier_reason,
        generation=max(0, agent.reconciler.generation),
        containers=agent.offering.statuses(),
        attempts=agent.attempts.refs(),
        runtimes=tuple(engine.report() for engine in agent.engines),
        plugins=tuple(agent.plugins()),
        probes=agent.report.probes,
        attached=tuple(one.address.url for one in agent.attached.servers),
        current_load=agent.current_load,
        draining=agent.draining,
        paused=agent.owner.pause.sentence if agent.owner.pause else "",
        left_out=agent.own.offered.left_out,
        uptime_s=agent.uptime_s,
        tasks_succeeded=agent.attempts.succeeded,
        tasks_failed=agent.attempts.failed,
    )
