"""The end of an agent: finish what runs, give the rest back, say goodbye, leave nothing running."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rma_core.agent.attempts import Stop
from rma_core.agent.engines import let_go
from rma_core.errors import CoordinatorError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rma_core.agent.lifecycle import Agent
    from rma_core.interfaces import ContainerRuntime

logger = logging.getLogger(__name__)

#: Seconds to tell the coordinator goodbye.
GOODBYE_S = 5.0
#: Seconds for answers that wait for their delivery when the agent ends.
DELIVER_S = 5.0
#: Seconds to stop what the agent's runtimes hold, before it ends all the same.
CLOSE_S = 30.0

DRAIN = Stop("owner", "the owner of this machine stops the agent", tell=True)


class Ending:
    """Ends one agent, step by step; ``hurried`` is set when its owner does not want to wait."""

    def __init__(self, agent: Agent, *, hurried: asyncio.Event) -> None:
        self._agent, self._hurried = agent, hurried

    async def drain(self) -> None:
        """Take nothing new, finish what is there, give the rest back, and say goodbye."""
        agent = self._agent
        agent.draining = True
        agent.attempts.closed_because = DRAIN.reason
        running = len(agent.attempts)
        words = f"attempts that are finished first, within {agent.settings.drain_s:.0f} s: {running}"
        about = {"action": "drain", "worker": agent.client.worker_id or None}
        logger.info("stopping; %s", words if running else "nothing runs", extra=about)
        agent.heart.soon()
        drain = asyncio.create_task(agent.attempts.drain(agent.settings.drain_s, DRAIN))
        hurry = asyncio.create_task(self._hurried.wait())
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not drain.done():
            drain.cancel()
            await agent.attempts.drain(0, DRAIN)
        await agent.answers.finish(agent.channel.confirm, within_s=0 if self._hurried.is_set() else DELIVER_S)

    async def goodbye(self) -> None:
        """Tell the coordinator that this worker leaves; nothing can be done where it does not answer."""
        agent = self._agent
        name = agent.client.worker_id
        try:
            async with asyncio.timeout(GOODBYE_S):
                await agent.client.unregister()
        except (CoordinatorError, TimeoutError) as error:
            reason = str(error) or f"no answer within {GOODBYE_S:.0f} s"
            logger.info("the coordinator was not told: %s", reason, extra={"action": "not_told", "worker": name})
        else:
            logger.info("%s has said goodbye to the coordinator", name, extra={"action": "left", "worker": name})

    async def clear_away(self, runtimes: Iterable[ContainerRuntime]) -> None:
        """Stop every container and let go of everything; what an engine cannot stop now, the next start finds."""
        agent = self._agent
        try:
            async with asyncio.timeout(CLOSE_S):
                await agent.reconciler.close(stop=True)
        except TimeoutError:
            words = "not everything was stopped within %.0f s; the next start looks for it"
            logger.warning(words, CLOSE_S, extra={"action": "not_stopped"})
        await agent.attached.aclose()
        await let_go(runtimes, within_s=CLOSE_S)
        await agent.client.aclose()
