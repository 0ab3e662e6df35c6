"""The owner's container runtimes in the owner's order: which can be used now, and what each has of this worker's."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, TypeVar

from rma_core.errors import RuntimeAbsent, RuntimeFailure
from rma_core.interfaces import RuntimeHealth
from rma_core.models.worker import RuntimeReport

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from rma_core.interfaces import ContainerHandle, ContainerRuntime

logger = logging.getLogger(__name__)

#: Seconds for which a probe's answer is believed.
PROBE_FRESH_S = 15.0
#: Seconds a runtime has to say how it is; one that hangs with its engine is unhealthy.
PROBE_TIMEOUT_S = 30.0
#: Seconds a runtime has to say how a container is, where it listens, or whether an image is there.
LOOK_TIMEOUT_S = 30.0
#: Seconds a container has to stop politely, and a runtime beyond that.
STOP_GRACE_S, STOP_SLACK_S = 10.0, 60.0
#: Seconds a runtime has to tell a container's last words, and the most of them.
LOGS_TIMEOUT_S = 10.0
LAST_LINE_CHARACTERS = 300
UNKNOWN = RuntimeHealth(state="undetected", reason="not looked at yet")

T = TypeVar("T")


async def asked(
    runtime: ContainerRuntime,
    call: Callable[[], Awaitable[T]],
    *,
    within_s: float | None = None,
    silence: type[RuntimeFailure] = RuntimeFailure,
) -> T:
    """Make one call to a runtime and return its answer.

    Whatever else it raises than a RuntimeFailure becomes one that names the runtime, and so does its silence after
    ``within_s`` seconds, as a ``silence``.
    """
    limit = asyncio.timeout(within_s)
    try:
        async with limit:
            return await call()
    except RuntimeFailure:
        raise
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        # Isolation boundary: a runtime is a plugin and may raise anything, a cancellation that nobody asked for too.
        if being_cancelled(error):
            raise
        if limit.expired():
            raise silence(f"{runtime.name}: no answer within {within_s:.0f} s") from None
        logger.debug("%s failed unexpectedly", runtime.name, exc_info=error)
        words = f"{runtime.name}: the plugin failed unexpectedly: {type(error).__name__}: {error}"
        raise RuntimeFailure(words) from error


async def looked_up(runtime: ContainerRuntime, call: Callable[[], Awaitable[T]]) -> T:
    """Ask a runtime how something stands, which takes it no time; a hanging one is as good as absent."""
    return await asked(runtime, call, within_s=LOOK_TIMEOUT_S, silence=RuntimeAbsent)


def being_cancelled(error: BaseException) -> bool:
    """Say whether somebody cancels this task; a plugin can raise CancelledError without that."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


async def stopped(runtime: ContainerRuntime, handle: ContainerHandle, *, grace_s: float = STOP_GRACE_S) -> None:
    """Stop and remove a container. Raises RuntimeFailure, whatever the runtime raises."""
    await asked(runtime, lambda: runtime.stop(handle, grace_s=grace_s), within_s=grace_s + STOP_SLACK_S)


async def last_line(runtime: ContainerRuntime, handle: ContainerHandle) -> str:
    """Return the last thing a container said, or nothing when its runtime cannot tell."""

    async def lines() -> list[str]:
        return str(await runtime.logs(handle, tail_lines=20)).strip().splitlines()

    try:
        found = await asked(runtime, lines, within_s=LOGS_TIMEOUT_S)
    except RuntimeFailure as error:
        logger.debug("%s has no last words: %s", handle.name, error)
        return ""
    return found[-1].strip()[:LAST_LINE_CHARACTERS] if found else ""


async def let_go(runtimes: Iterable[ContainerRuntime], *, within_s: float) -> None:
    """Close every runtime, each within so many seconds; nothing can be done about one that fails."""
    for runtime in runtimes:
        try:
            await asked(runtime, runtime.aclose, within_s=within_s)
        except RuntimeFailure as error:
            logger.info("%s was not closed: %s", runtime.name, error)


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
            health: object = await asked(self.runtime, self.runtime.probe, within_s=PROBE_TIMEOUT_S)
        except RuntimeFailure as error:
            return RuntimeHealth(state="unhealthy", reason=error.message)
        if isinstance(health, RuntimeHealth):
            return health
        return RuntimeHealth(state="unhealthy", reason=f"{self.name}: its health is a {type(health).__name__}")

    async def _sweep(self, worker_id: str) -> None:
        async def owned() -> dict[str, ContainerHandle]:
            return {handle.name: handle for handle in await self.runtime.list_owned(worker_id)}

        try:
            self.orphans = await asked(self.runtime, owned, within_s=PROBE_TIMEOUT_S)
        except RuntimeFailure as error:
            self.doubt(error)
        else:
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
            cannot_limit=self.health.cannot_limit[:8],
        )


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
