"""The owner's container runtimes in the owner's order: which can be used now, and what each has of this worker's."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from rma_core.errors import RuntimeFailure
from rma_core.interfaces import RuntimeHealth
from rma_core.models.worker import RuntimeReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rma_core.interfaces import ContainerHandle, ContainerRuntime

logger = logging.getLogger(__name__)

#: Seconds for which a probe's answer is believed.
PROBE_FRESH_S = 15.0
#: Seconds a runtime has to say how it is; one that hangs with its engine is unhealthy.
PROBE_TIMEOUT_S = 30.0
UNKNOWN = RuntimeHealth(state="undetected", reason="not looked at yet")


class Engine:
    """One runtime; a change of its health is logged once."""

    def __init__(self, runtime: ContainerRuntime, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.runtime, self._clock = runtime, clock
        self.health = UNKNOWN
        self._looked_at = float("-inf")
        self._swept = False
        #: Containers of an earlier run of this agent that nobody has taken over yet, by name.
        self.orphans: dict[str, ContainerHandle] = {}

    @property
    def name(self) -> str:
        """The runtime's name."""
        return self.runtime.name

    async def look(self, worker_id: str, *, anew: bool = False) -> bool:
        """Say whether it can be used now; the first time it can, find out what it has of ours."""
        if anew or self._clock() - self._looked_at >= PROBE_FRESH_S:
            before, self.health = self.health, await self._probe()
            self._looked_at = self._clock()
            self._say(before)
        if self.health.state == "healthy" and not self._swept:
            await self._sweep(worker_id)
        return self.health.state == "healthy" and self._swept

    async def _probe(self) -> RuntimeHealth:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                return await self.runtime.probe()
        except TimeoutError:
            return RuntimeHealth(state="unhealthy", reason=f"no answer within {PROBE_TIMEOUT_S:.0f} s")
        except Exception as error:  # noqa: BLE001 - isolation boundary: a runtime is a plugin and may raise anything
            return RuntimeHealth(state="unhealthy", reason=_bug(error))

    async def _sweep(self, worker_id: str) -> None:
        try:
            owned = await self.runtime.list_owned(worker_id)
        except RuntimeFailure as error:
            self.doubt(error)
            return
        except Exception as error:  # noqa: BLE001 - isolation boundary, as above
            self.doubt(RuntimeFailure(_bug(error)))
            return
        self.orphans = {handle.name: handle for handle in owned}
        self._swept = True

    def doubt(self, error: RuntimeFailure) -> None:
        """Take a call's failure for the engine's state, until the next probe."""
        before, self.health = self.health, RuntimeHealth(state="unhealthy", reason=error.message)
        self._looked_at = self._clock()
        self._say(before)

    def _say(self, before: RuntimeHealth) -> None:
        if before.state == self.health.state:
            return
        extra = {"action": f"runtime_{self.health.state}", "runtime": self.name}
        if self.health.state == "healthy":
            back = "" if before is UNKNOWN else " again"
            logger.info("%s %s can be used%s", self.name, self.health.version, back, extra=extra)
        else:
            logger.info("%s cannot be used: %s", self.name, self.health.reason, extra=extra)

    def report(self) -> RuntimeReport:
        """Return it as a heartbeat carries it."""
        return RuntimeReport(
            name=self.name,
            isolated=self.runtime.isolated,
            state=self.health.state,
            reason=self.health.reason[:2000],
            version=self.health.version[:200],
        )


def _bug(error: Exception) -> str:
    return f"the plugin failed unexpectedly: {type(error).__name__}: {error}"


def in_order(
    runtimes: Mapping[str, ContainerRuntime], order: Sequence[str], *, clock: Callable[[], float] = time.monotonic
) -> tuple[Engine, ...]:
    """Return the owner's runtimes as the owner lists them; a name that no plugin provides is left out."""
    engines = []
    for name in dict.fromkeys(order):
        if name in runtimes:
            engines.append(Engine(runtimes[name], clock=clock))
        else:
            logger.debug("no plugin provides the container runtime %r", name)
    return tuple(engines)
