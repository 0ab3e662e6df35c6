"""One wanted container: brought up, looked after, restarted with backoff, given up with a reason, taken down.

`Keeper.step` does what is due now and says when to come again, so the same code runs under a real clock and in tests.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import TYPE_CHECKING, Protocol

from rma_core.agent.endpoint import Endpoint
from rma_core.agent.engines import STOP_GRACE_S, asked, being_cancelled, last_line, looked_up, stopped
from rma_core.agent.llm.model_service import Fetching, ModelService
from rma_core.agent.placing import Spot, adopted, find_spot, spec_hash
from rma_core.agent.restarts import RESCAN_S, Restarts
from rma_core.errors import ImageMissing, RuntimeAbsent, RuntimeFailure, StartFailed
from rma_core.models.worker import MOST_IMAGE_BYTES, ContainerStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from rma_core.agent.context import Context
    from rma_core.agent.endpoint import Client
    from rma_core.agent.engines import Engine
    from rma_core.interfaces import ContainerHandle, GivenFiles, PullProgress
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
#: A missing image is looked for on this machine this often, which asks no registry.
LOCAL_LOOK_S = 60.0
#: Seconds between two looks at an engine that is down.
ENGINE_WAIT_S = 15.0
#: Seconds between two looks at a model that is being loaded.
LOADING_CHECK_S = 1.0


class Keeper:
    """One container's life; `step` until `take_down`."""

    def __init__(self, wanted: Assignment, context: Context) -> None:
        self.wanted, self.hash = wanted, spec_hash(wanted)
        self.state: ContainerState = "pending"
        self.reason = ""
        self.client: Endpoint | None = None
        self.spot: Spot | None = None
        self.busy = 0
        self.leaving = False
        #: Set while no attempt is at it, once it is gone for good, and when it should look again at once.
        self.idle, self.gone, self.nudged = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.idle.set()
        self._context = context
        self._restarts = Restarts(context.uniform)
        self.model = self._model_service() if wanted.model else None
        self._handle: ContainerHandle | None = None
        self._fetching: Fetching | None = None
        self._misses = 0
        self._since = 0.0
        self._engine_was_down = False
        self._before = ""

    def _model_service(self) -> ModelService:
        def gpu() -> Device | None:
            return self._context.gpu_for(self.wanted.name, self.wanted) if self.wanted.requires_gpu else None

        return ModelService(
            self.wanted,
            gpu,
            self._context.room,
            busy=lambda: self.busy,
            idle_s=self._context.model_idle_s,
            clock=self._context.clock,
            changed=self._context.changed,
        )

    # What others read.

    @property
    def free(self) -> int:
        """Requests it takes now beside those it has."""
        return 0 if self.why_not else max(0, self.wanted.slots - self.busy)

    @property
    def why_not(self) -> str:
        """Why it takes no requests now, however many slots it has; empty when it does."""
        if self.state != "healthy" or self.client is None or self.leaving:
            return f"{self.wanted.name} is {'stopping' if self.leaving else self.state}"
        reason = self.model.why_not if self.model else ""
        return f"{self.wanted.name} cannot load its model now: {reason}" if reason else ""

    def serves(self, model: str) -> bool:
        """Say whether it answers for a model of that name; any, where none is named."""
        return not model or self.model is None or self.model.name == model

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
        engine, handle, fetching = self.engine, self._handle, self._fetching if self.state == "pulling" else None
        # A runtime is a plugin: what it says of an image must not have the whole heartbeat refused.
        return ContainerStatus(
            name=self.wanted.name,
            service=self.wanted.service,
            state="stopping" if self.leaving else self.state,
            reason=self.reason[:2000],
            runtime=engine.name if engine else "",
            isolated=engine.runtime.isolated if engine else True,
            image_id=handle.image_id[:200] if handle else "",
            image_bytes=min(max(0, handle.image_bytes), MOST_IMAGE_BYTES) if handle else 0,
            slots=self.wanted.slots,
            restarts=self._restarts.count,
            progress=fetching.pace.share if fetching else None,
            models=(self.model.status(self.state, fetching),) if self.model else (),
            by_owner=self._context.by_owner(self.wanted),
        )

    def nudge(self) -> None:
        """Try at once what was given up or waits: the pool or the owner has changed something."""
        self._restarts.again()
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
        if now < self._restarts.not_before and not await self._image_came():
            return min(LOCAL_LOOK_S, self._restarts.not_before - now)
        self._restarts.given_up_for = None
        if self.state not in ("starting", "unhealthy"):
            self._become("pending")
        self.spot = await adopted(self.wanted, self.hash, self._context) or await self._new_spot()
        self._restarts.fetched()
        self._fetching = None
        self._become("starting", self._before)
        await self._start(self.spot)
        self._since = self._context.clock()
        return 0.0

    async def _new_spot(self) -> Spot:
        """Return where to start it, with its image and its model's files there. Raises RuntimeFailure."""
        files = await self._files()
        return await find_spot(
            self.wanted, self.hash, self._context, last=self.engine, pulling=self._pulling, files=files
        )  # fmt: skip

    async def _files(self) -> GivenFiles | None:
        """Return its model's files, downloaded where they are not on this machine yet."""
        model = self.wanted.model
        if model is None:
            return None
        first = next((e for e in self._context.engines if e.health.state == "healthy"), None)
        copied = first is not None and first.runtime.isolated
        return await self._context.files.get(model, self._fetched, copied=copied)

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
        return self._judge(await self._asked())

    async def _asked(self) -> str:
        """Ask the service how it is; an empty string is good, anything else the reason."""
        if self.model is not None:
            return await self.model.look()
        return await self._context.check(self.client, self.wanted.health_path) if self.client else "it has no address"

    def _judge(self, reason: str) -> float:
        """Draw the conclusion from one health check."""
        now, loading = self._context.clock(), self.model is not None and self.model.state == "loading"
        if not reason:
            self._misses = 0
            if self.state != "healthy":
                self._since, self._before = now, ""
                self._become("healthy")
            else:
                self._restarts.well(now - self._since)
            return LOADING_CHECK_S if loading else CHECK_EVERY_S
        if self.state == "starting" and loading:
            # It is bounded by its own progress.
            self._misses, self.reason = 0, reason
            return LOADING_CHECK_S
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
        if told := self._restarts.failed(error, words, now):
            self._become("failed", told)
            return LOCAL_LOOK_S
        self._before = f"started again: {words}"
        self._become("backoff", words)
        return self._restarts.not_before - now

    async def _image_came(self) -> bool:
        """Say whether an image that nobody had has been put on this machine since."""
        if self._restarts.given_up_for is not ImageMissing:
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
        if self.client is not None and not await self._asked():
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

    async def take_down(self, *, grace_s: float = STOP_GRACE_S) -> None:
        """Stop and remove the container for good. Raises RuntimeFailure when its engine cannot."""
        self.leaving = True
        await self._remove(grace_s=grace_s)

    async def let_go(self) -> None:
        """Leave the container as it is, for the next start of the agent."""
        await self._disconnect()

    def orphan(self) -> None:
        """Leave a container that cannot be stopped now to whoever finds its engine well again."""
        if self._handle is not None and self.spot is not None:
            self.spot.engine.orphans[self.wanted.name] = self._handle

    async def _remove(self, *, grace_s: float = STOP_GRACE_S) -> None:
        await self._disconnect()
        if self._handle is not None and self.spot is not None:
            await stopped(self.spot.engine.runtime, self._handle, grace_s=grace_s)
        self._handle = None
        self._misses = 0
        self._engine_was_down = False

    async def _connect(self, endpoint: str) -> None:
        await self._disconnect()
        self.client = self.model.connect(endpoint) if self.model else Endpoint(endpoint)

    async def _disconnect(self) -> None:
        client, self.client = self.client, None
        if client is not None:
            await client.aclose()
        if self.model is not None:
            await self.model.disconnect()

    def _pulling(self, engine: Engine, progress: PullProgress | None) -> None:
        """Show that a pull begins, or how far it is."""
        if progress is None:
            self._fetching = Fetching(self._context.clock())
            self._become("pulling", f"from {engine.name}")
        elif self.state == "pulling":
            self._show(progress, f"from {engine.name}" + (f": {progress.note}" if progress.note else ""))

    def _fetched(self, progress: PullProgress) -> None:
        """Show how far its model's files are."""
        if self.state != "pulling":
            self._become("pulling", progress.note)
        self._show(progress, progress.note)

    def _show(self, progress: PullProgress, words: str) -> None:
        """Tell the coordinator of a step, now and then: bytes, and the time left where that is known."""
        now = self._context.clock()
        fetching = self._fetching = self._fetching or Fetching(now)
        worth_telling = fetching.take(progress, now)
        self.reason = words + fetching.words(progress, now)
        if worth_telling:
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
