"""One wanted container: brought up, looked after, restarted with backoff, given up with a reason, taken down.

`Keeper.step` does what is due now and says when to come again, so the same code runs under a real clock and in tests.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
from collections import deque
from typing import TYPE_CHECKING, Protocol

from rma_core.agent.endpoint import Endpoint
from rma_core.agent.engines import asked, being_cancelled, last_line, looked_up, stopped
from rma_core.agent.placing import Spot, find_spot
from rma_core.errors import (
    ImageMissing,
    ImagePullFailed,
    NotSupported,
    OutOfSpace,
    RuntimeAbsent,
    RuntimeFailure,
    StartFailed,
)
from rma_core.models.strict import encode
from rma_core.models.worker import ContainerStatus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from rma_core.agent.endpoint import Client
    from rma_core.agent.engines import Engine
    from rma_core.interfaces import ContainerHandle, PullProgress
    from rma_core.models.hardware import Device
    from rma_core.models.worker import Assignment, ContainerState

logger = logging.getLogger(__name__)

#: How loud a change of a container's state is; any other is told at INFO.
LEVELS = {"pending": logging.DEBUG, "starting": logging.DEBUG, "failed": logging.WARNING, "unhealthy": logging.WARNING}
#: Seconds between two looks at a healthy container, and after a look that found it silent.
CHECK_EVERY_S, CHECK_AGAIN_S = 10.0, 3.0
#: Seconds between two looks at one that starts: at first, and at most.
START_CHECK_S, START_CHECK_MAX_S = 0.2, 2.0
#: Seconds in which a runtime must have started a container, whatever it says of time limits of its own.
START_WITHIN_S = 600.0
#: Looks in a row without an answer after which it is restarted.
MISSES_TO_RESTART = 3
#: Restarts wait 0, 10, 20, 40 … seconds; this long healthy and it starts over.
RESTART_BASE_S, RESTART_CAP_S, RESET_AFTER_S = 10.0, 300.0, 600.0
#: So many failures within the window, and it is given up.
MAX_FAILURES, FAILURE_WINDOW_S = 5, 1800.0
#: Something given up is tried again after this: images get built, drivers installed, bugs mended.
RESCAN_S = 3600.0
#: A missing image is looked for on this machine this often, which asks no registry.
LOCAL_LOOK_S = 60.0
#: Seconds between two looks at an engine that is down.
ENGINE_WAIT_S = 15.0
#: Part of a pull after which its progress is told anew.
PROGRESS_STEP = 0.05
#: Seconds after which it is told anew even where no total is known.
PROGRESS_EVERY_S = 1.0


class Context(Protocol):
    """What a keeper needs of the agent."""

    worker_id: str
    engines: Sequence[Engine]

    def clock(self) -> float:
        """Return monotonic seconds."""

    def uniform(self, low: float, high: float) -> float:
        """Return a random number."""

    def refusal(self, wanted: Assignment) -> str:
        """Say why the owner's consent does not cover it, or nothing."""

    def gpu_for(self, name: str, wanted: Assignment) -> Device | None:
        """Return the GPU for a container: one that fits and that no other has."""

    def changed(self) -> None:
        """Something that the coordinator should know has changed."""

    def check(self, client: Endpoint, path: str) -> Awaitable[str]:
        """Ask a service for its health; an empty string is good, anything else the reason."""


def spec_hash(wanted: Assignment) -> str:
    """Return what tells one version of an assignment from another."""
    return hashlib.sha256(encode(wanted)).hexdigest()


class Keeper:
    """One container's life; `step` until `take_down`."""

    def __init__(self, wanted: Assignment, context: Context) -> None:
        self.wanted, self.hash = wanted, spec_hash(wanted)
        self.state: ContainerState = "pending"
        self.reason = ""
        self.client: Endpoint | None = None
        self.spot: Spot | None = None
        self.busy = self.restarts = 0
        self.leaving = False
        #: Set while no attempt is at it, once it is gone for good, and when it should look again at once.
        self.idle, self.gone, self.nudged = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.idle.set()
        self._context = context
        self._handle: ContainerHandle | None = None
        self._failures: deque[float] = deque(maxlen=MAX_FAILURES)
        self._pull_failures = 0
        self._misses = 0
        self._since = 0.0
        self._not_before = 0.0
        self._given_up_for: type[RuntimeFailure] | None = None
        self._engine_was_down = False
        self._progress: float | None = None
        self._told_progress = float("-inf")
        self._before = ""

    # What others read.

    @property
    def free(self) -> int:
        """Requests it takes now beside those it has."""
        usable = self.state == "healthy" and self.client is not None and not self.leaving
        return max(0, self.wanted.slots - self.busy) if usable else 0

    @property
    def engine(self) -> Engine | None:
        """Where it runs, or is to run."""
        return self.spot.engine if self.spot else None

    @property
    def handle(self) -> ContainerHandle | None:
        """The container, once there is one."""
        return self._handle

    def status(self) -> ContainerStatus:
        """Return it as a heartbeat carries it."""
        engine = self.engine
        return ContainerStatus(
            name=self.wanted.name,
            service=self.wanted.service,
            state="stopping" if self.leaving else self.state,
            reason=self.reason[:2000],
            runtime=engine.name if engine else "",
            isolated=engine.runtime.isolated if engine else True,
            image_id=self._handle.image_id[:200] if self._handle else "",
            slots=self.wanted.slots,
            restarts=self.restarts,
            progress=self._progress if self.state == "pulling" else None,
        )

    def nudge(self) -> None:
        """Try at once what was given up or waits: the pool or the owner has changed something."""
        self._given_up_for = None
        self._not_before = 0.0
        self._failures.clear()
        self.nudged.set()

    # What its task does.

    async def step(self) -> float:
        """Do what is due and return the seconds until the next step."""
        try:
            return await (self._bring_up() if self._handle is None else self._look_after())
        except RuntimeAbsent as error:
            return await self._engine_down(error)
        except RuntimeFailure as error:
            return await self._failed(error)
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            # Isolation boundary: a runtime is a plugin and may raise anything; one container must not end the agent.
            if being_cancelled(error):
                raise
            about = {"action": "bug", "container": self.wanted.name}
            logger.exception("%s: the runtime failed unexpectedly", self.wanted.name, extra=about)
            return await self._failed(StartFailed(f"the runtime failed unexpectedly: {type(error).__name__}: {error}"))

    async def _bring_up(self) -> float:
        now = self._context.clock()
        refusal = self._context.refusal(self.wanted)
        if refusal:
            self._become("refused", refusal)
            return RESCAN_S
        if now < self._not_before and not await self._image_came():
            return min(LOCAL_LOOK_S, self._not_before - now)
        self._given_up_for = None
        if self.state not in ("starting", "unhealthy"):
            self._become("pending")
        self.spot = await find_spot(self.wanted, self.hash, self._context, last=self.engine, pulling=self._pulling)
        self._pull_failures = 0
        self._become("starting", self._before)
        await self._start(self.spot)
        self._since = self._context.clock()
        return 0.0

    async def _start(self, spot: Spot) -> None:
        """Start the container, or take over the one that is there; not cut in half by a cancellation."""
        if spot.adopted is not None:
            self._handle = spot.adopted
            about = {"action": "container_adopted", "container": self.wanted.name, "runtime": spot.engine.name}
            logger.info("%s goes on in %s", self.wanted.name, spot.engine.name, extra=about)
            return
        # A task of its own that raised SystemExit would end the agent: `asked` keeps it in.
        runtime = spot.engine.runtime
        starting = asyncio.ensure_future(
            asked(runtime, lambda: runtime.start(spot.spec), within_s=START_WITHIN_S, silence=StartFailed)
        )
        try:
            self._handle = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # Without its handle nobody could stop what has just been started.
            await asyncio.wait({starting})
            if not starting.cancelled() and starting.exception() is None:
                self._handle = starting.result()
            raise

    async def _look_after(self) -> float:
        spot, handle = self.spot, self._handle
        assert spot is not None  # noqa: S101 - a handle comes from a spot
        assert handle is not None  # noqa: S101 - asked by `step`
        runtime = spot.engine.runtime
        found = await looked_up(runtime, lambda: runtime.inspect(handle))
        if found.state != "running":
            if self._engine_was_down:
                # Its engine went down and took it along, which is no failure of its own.
                await self._remove()
                return 0.0
            raise StartFailed(found.reason or f"ended with exit code {found.exit_code}")
        if self.client is None or self._engine_was_down:
            await self._connect(await looked_up(runtime, lambda: runtime.endpoint(handle)))
            self._engine_was_down = False
        assert self.client is not None  # noqa: S101 - just made
        return self._judge(await self._context.check(self.client, self.wanted.health_path))

    def _judge(self, reason: str) -> float:
        """Draw the conclusion from one health check."""
        now = self._context.clock()
        if not reason:
            self._misses = 0
            if self.state != "healthy":
                self._since, self._before = now, ""
                self._become("healthy")
            elif now - self._since >= RESET_AFTER_S:
                self._failures.clear()
            return CHECK_EVERY_S
        if self.state == "starting":
            if now - self._since > self.wanted.start_timeout_s:
                raise StartFailed(f"not healthy within {self.wanted.start_timeout_s:g} s: {reason}")
            return min(START_CHECK_MAX_S, max(START_CHECK_S, (now - self._since) / 4))
        if self.busy:
            # A service that works may be too busy to say so; the attempts have deadlines of their own.
            return CHECK_EVERY_S
        self._misses += 1
        if self._misses >= MISSES_TO_RESTART:
            raise StartFailed(f"stopped answering: {reason}")
        return CHECK_AGAIN_S

    async def _failed(self, error: RuntimeFailure) -> float:
        """Clear away, and decide when to try again, or that it is given up."""
        now = self._context.clock()
        words = await self._last_words(error)
        try:
            await self._remove()
        except RuntimeFailure as failure:
            logger.debug("%s could not be removed: %s", self.wanted.name, failure)
        if isinstance(error, ImageMissing | NotSupported):
            return self._give_up(type(error), words)
        if isinstance(error, ImagePullFailed | OutOfSpace):
            self._pull_failures += 1
            wait_s = RESTART_CAP_S if isinstance(error, OutOfSpace) else self._wait_s(self._pull_failures + 1)
        else:
            self._failures.append(now)
            self.restarts += 1
            recent = sum(1 for moment in self._failures if now - moment < FAILURE_WINDOW_S)
            if recent >= MAX_FAILURES:
                return self._give_up(type(error), f"failed {recent} times in {FAILURE_WINDOW_S / 60:.0f} min: {words}")
            wait_s = self._wait_s(len(self._failures))
        self._before = f"started again: {words}"
        self._become("backoff", words)
        self._not_before = now + wait_s
        return wait_s

    def _wait_s(self, failures: int) -> float:
        """Return how long to wait after so many failures in a row: nothing after the first."""
        if failures <= 1:
            return 0.0
        wait_s = min(RESTART_CAP_S, RESTART_BASE_S * 2.0 ** min(failures - 2, 16))
        return wait_s * self._context.uniform(1.0, 1.1)

    def _give_up(self, kind: type[RuntimeFailure], words: str) -> float:
        self._given_up_for = kind
        self._failures.clear()
        self._become("failed", words)
        self._not_before = self._context.clock() + RESCAN_S
        return LOCAL_LOOK_S

    async def _image_came(self) -> bool:
        """Say whether an image that nobody had has been put on this machine since."""
        if self._given_up_for is not ImageMissing:
            return False
        for engine in self._context.engines:
            spot = Spot.on(engine, self.wanted, self.hash, self._context)
            if isinstance(spot, Spot) and await engine.look(self._context.worker_id):
                try:
                    if await looked_up(engine.runtime, functools.partial(engine.runtime.has_image, spot.spec)):
                        return True
                except RuntimeFailure as error:
                    logger.debug("%s cannot be asked for an image: %s", engine.name, error)
        return False

    async def _engine_down(self, error: RuntimeAbsent) -> float:
        """Wait for an engine; what still answers goes on serving meanwhile."""
        self._engine_was_down = self._handle is not None
        if self._engine_was_down and self.engine is not None and self.engine.health.state == "healthy":
            self.engine.doubt(error)
        if self.client is not None and not await self._context.check(self.client, self.wanted.health_path):
            return ENGINE_WAIT_S
        down = any(e.health.state == "unhealthy" for e in self._context.engines)
        self._become("unhealthy" if down else "failed", error.message)
        return ENGINE_WAIT_S

    async def _last_words(self, error: RuntimeFailure) -> str:
        """Return the failure, with the container's last line where the runtime gave none."""
        if self._handle is None or self.spot is None or not isinstance(error, StartFailed):
            return error.message
        last = await last_line(self.spot.engine.runtime, self._handle)
        return error.message if not last or last in error.message else f"{error.message}; its last words: {last}"

    def neglected(self, error: BaseException) -> None:
        """Show that nobody looks after it any more, which is a bug of the agent."""
        self._become("failed", f"a bug in the agent, whose log has the details: {type(error).__name__}")

    async def take_down(self) -> None:
        """Stop and remove the container for good. Raises RuntimeFailure when its engine cannot."""
        self.leaving = True
        await self._remove()

    async def let_go(self) -> None:
        """Leave the container as it is, for the next start of the agent."""
        await self._disconnect()

    def orphan(self) -> None:
        """Leave a container that cannot be stopped now to whoever finds its engine well again."""
        if self._handle is not None and self.spot is not None:
            self.spot.engine.orphans[self.wanted.name] = self._handle

    async def _remove(self) -> None:
        await self._disconnect()
        if self._handle is not None and self.spot is not None:
            await stopped(self.spot.engine.runtime, self._handle)
        self._handle = None
        self._misses = 0
        self._engine_was_down = False

    async def _connect(self, endpoint: str) -> None:
        await self._disconnect()
        self.client = Endpoint(endpoint)

    async def _disconnect(self) -> None:
        client, self.client = self.client, None
        if client is not None:
            await client.aclose()

    def _pulling(self, engine: Engine, progress: PullProgress | None) -> None:
        """Show that a pull begins, or how far it is; the coordinator is told of every step and every second."""
        if progress is None:
            self._progress = None
            self._become("pulling", f"from {engine.name}")
        elif self.state == "pulling":
            self.reason = f"from {engine.name}" + (f": {progress.note}" if progress.note else "")
            share = min(1.0, progress.done_bytes / progress.total_bytes) if progress.total_bytes else None
            further = share is not None and share - (self._progress or 0.0) >= PROGRESS_STEP
            now = self._context.clock()
            if further or now - self._told_progress >= PROGRESS_EVERY_S:
                self._progress, self._told_progress = share, now
                self._context.changed()

    def _become(self, state: ContainerState, reason: str = "") -> None:
        before, self.state, self.reason = self.state, state, reason
        if before != state:
            extra = {"action": f"container_{state}", "container": self.wanted.name}
            level = LEVELS.get(state, logging.INFO)
            logger.log(level, "%s is %s%s", self.wanted.name, state, f": {reason}" if reason else "", extra=extra)
            self._context.changed()


class Holder(Protocol):
    """What has slots: ``busy`` of them are taken, ``idle`` is set while none is."""

    busy: int
    idle: asyncio.Event


class Slot:
    """One of a container's slots, or of an attached server's, taken by an attempt."""

    def __init__(self, holder: Holder, client: Client, released: Callable[[], None]) -> None:
        self.owner, self.client, self._released = holder, client, released
        holder.busy += 1
        holder.idle.clear()

    def release(self) -> None:
        """Give the slot back."""
        self.owner.busy -= 1
        if not self.owner.busy:
            self.owner.idle.set()
        self._released()
