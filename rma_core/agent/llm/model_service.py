"""The model behind one container: how it stands by its service's own word, loaded, unloaded, and watched meanwhile.

The services of RMA tell at their health path whether the model is loaded (``{"status": "ok"}``), on its way
(``loading``, with the share that is done) or in its file (``cold``), and take ``POST /load`` and ``POST /unload``.
Another engine that only says that it is well has its model loaded, and keeps it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from rma_core.agent.attach.asking import by_engine
from rma_core.agent.endpoint import Endpoint, EndpointError
from rma_core.agent.incoming import NotNowError
from rma_core.agent.llm.model_room import Claim, NoRoomError
from rma_core.agent.pace import Pace
from rma_core.errors import StartFailed, UsageProblem, ValidationProblem
from rma_core.models.sizes import duration, human
from rma_core.models.strict import decode
from rma_core.models.worker import ModelStatus

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    from rma_core.agent.endpoint import Answer
    from rma_core.agent.llm.model_room import ModelRoom
    from rma_core.interfaces import PullProgress
    from rma_core.models.hardware import Device
    from rma_core.models.worker import Assignment, ContainerState

logger = logging.getLogger(__name__)

#: Seconds a service has to say how its model stands, and to load or unload; bytes of its answer.
ASK_S, MAX_ANSWER_BYTES = 5.0, 64 * 1024
#: Seconds in which an engine that was told to end has ended.
UNLOAD_S = 10.0
#: Calls that are the agent's alone, whatever a task asks for.
CONTROL = ("/load", "/unload")
#: Part of the way after which its progress is told anew.
STEP = 0.02
OK, UNAVAILABLE = 200, 503


class _Told(msgspec.Struct):
    """What a service says of itself at its health path."""

    status: Any = None
    phase: Any = None
    progress: Any = None


class ModelEndpoint(Endpoint):
    """The connections to a service with a model that tasks use: the model is loaded first, if it has to be."""

    def __init__(self, address: str, model: ModelService) -> None:
        super().__init__(address)
        self._model = model

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: Iterable[tuple[str, str]] = (),
        body: AsyncGenerator[bytes, None] | bytes | None = None,
        length: int | None = None,
        write_s: float | None = None,
        answer_s: float | None = None,
    ) -> Answer:
        """Send a request as `Endpoint.request` does. Raises UsageProblem for a call that is the agent's alone."""
        if path.partition("?")[0].rstrip("/") in CONTROL:
            raise UsageProblem(f"{method} {path[:200]!r} is for this machine's agent")
        await self._model.wanted_now()
        answer = await super().request(
            method, path, headers=headers, body=body, length=length, write_s=write_s, answer_s=answer_s
        )
        return await by_engine(answer)


class ModelService:
    """One assignment's model; a `Tenant` of the machine's room.

    ``gpu`` gives the one it runs on, if any; ``busy`` says how many requests are at it, ``idle_s`` after how many
    seconds without one it is unloaded (0: never).
    """

    def __init__(
        self,
        wanted: Assignment,
        gpu: Callable[[], Device | None],
        room: ModelRoom,
        *,
        busy: Callable[[], int],
        idle_s: float,
        clock: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        assert wanted.model is not None  # noqa: S101 - whoever makes it has looked
        self._model, self._room, self._busy = wanted.model, room, busy
        self._idle_s, self._clock, self._changed = idle_s, clock, changed
        self._context = int(text) if (text := wanted.env.get("CONTEXT", "")).isdecimal() else 0
        self._needs, self._gpu = wanted.needs, gpu
        self.state: Literal["loaded", "loading", "cold"] = "cold"
        self.last_used = clock()
        self.leaving = False
        #: Requests that wait for its turn: they are not at it yet.
        self._waiting = 0
        self._control: Endpoint | None = None
        self._health_path = wanted.health_path
        #: Whether it has been loaded once, or found no room: until then its container is starting.
        self.settled = False
        #: Whether its service can be told to load and unload.
        self._ours = True
        #: Loaded without being asked: until it was unloaded once.
        self._ahead = True
        self._pace: Pace | None = None
        self._phase: object = None
        self._told = 0.0

    # What others ask.

    @property
    def name(self) -> str:
        """What clients call it."""
        return self._model.name

    @property
    def claim(self) -> Claim:
        """What it takes of memory while it is loaded."""
        return Claim.of(self._needs, self._gpu())

    @property
    def in_memory(self) -> bool:
        """Whether it is loaded, or on its way."""
        return self.state != "cold"

    @property
    def loading(self) -> bool:
        """Whether it is on its way into memory."""
        return self.state == "loading"

    @property
    def asked(self) -> bool:
        """Whether requests are at it."""
        return self._busy() > self._waiting

    @property
    def at_work(self) -> bool:
        """Whether requests are at it, or it is on its way."""
        return self.asked or self.loading

    @property
    def why_not(self) -> str:
        """Why no request can be taken, now or after others' turn; empty when it can."""
        return "" if self.in_memory else self._room.never(self)

    def status(self, container: ContainerState, fetching: Fetching | None = None) -> ModelStatus:
        """Return it as a heartbeat carries it; ``fetching``: its files are on their way still."""
        pace = fetching.pace if fetching else self._pace if self.state == "loading" else None
        on_its_way = container in ("pending", "pulling", "starting") and not self.settled
        return ModelStatus(
            name=self.name,
            state="loading" if on_its_way else self.state,
            context=self._context,
            progress=round(min(1.0, pace.share), 3) if pace and pace.share is not None else None,
            eta_s=round(eta, 1) if pace and (eta := pace.eta_s(self._clock())) is not None else None,
        )

    # Its service.

    def connect(self, address: str) -> ModelEndpoint:
        """Use the service at an address from now on; returns the connections for tasks."""
        self._control = Endpoint(address)
        return ModelEndpoint(address, self)

    async def disconnect(self) -> None:
        """The service has ended, or is about to: nothing of the model is in memory."""
        control, self._control = self._control, None
        self.state, self._pace, self.settled = "cold", None, False
        if control is not None:
            await control.aclose()

    async def look(self) -> str:
        """Ask the service how its model stands, and do what is due; an empty string is good, anything else the reason.

        Raises StartFailed for a model that is not waited for any longer.
        """
        told = await self._ask()
        if isinstance(told, str):
            return told
        now = self._clock()
        if self._busy():
            self.last_used = now
        if told.status == "cold":
            return await self._cold()
        if told.status == "loading":
            return self._loading(told, now)
        self._ours = told.status is not None
        self._become("loaded")
        if self._ours and self._idle_s and not self._busy() and now - self.last_used > self._idle_s:
            logger.info("%s is unloaded: nobody asked for it", self.name, extra={"action": "model_idle"})
            await self.unload()
        return ""

    async def _cold(self) -> str:
        if self.state == "loaded":
            self._become("cold")
        if self.state == "cold" and not (self._ahead and self._room.fits(self)):
            self._settle()
            return ""
        # For a request that waits, or for the first that will come; said twice it does no harm.
        if not self.in_memory:
            self.reserve()
        try:
            await self._post("/load")
        except EndpointError as error:
            return f"it could not be told to load its model: {error}"
        return "" if self.settled else "it is about to load its model"

    def _loading(self, told: _Told, now: float) -> str:
        if not self.in_memory:
            self.reserve()
        if self._pace is None or told.phase != self._phase:
            self._pace, self._phase, self._told = Pace(now), told.phase, 0.0
        number = isinstance(told.progress, float | int) and not isinstance(told.progress, bool)
        self._pace.at(now, min(1.0, max(0.0, float(told.progress))) if number else None)
        if late := self._pace.overdue(now, self._model.size_bytes):
            raise StartFailed(f"the model {self.name} is {late}")
        share = self._pace.share
        if share is not None and share - self._told >= STEP:
            self._told = share
            self._changed()
        done = "" if share is None else f" {share:.0%}"
        return "" if self.settled else f"loading its model{done}"

    async def _ask(self) -> _Told | str:
        """Return what the service says, or why it says nothing."""
        if self._control is None:
            return "it has no address yet"
        try:
            async with asyncio.timeout(ASK_S):
                status, data = await self._call("GET", self._health_path)
        except TimeoutError:
            return f"no answer to GET {self._health_path} within {ASK_S:g} s"
        except EndpointError as error:
            return f"no answer to GET {self._health_path}: {error}"
        try:
            told = decode(data, _Told, subject="health")
        except ValidationProblem:
            told = _Told()
        if status == OK or (status == UNAVAILABLE and told.status == "loading"):
            return told
        return f"GET {self._health_path} answered {status}"

    async def _post(self, path: str) -> bool:
        """Tell the service something; say whether it did so. Raises EndpointError."""
        try:
            async with asyncio.timeout(UNLOAD_S):
                status, _ = await self._call("POST", path)
        except TimeoutError:
            raise EndpointError(f"no answer to POST {path} within {UNLOAD_S:g} s") from None
        return status == OK

    async def _call(self, method: str, path: str) -> tuple[int, bytes]:
        if self._control is None:
            raise EndpointError("the service is being stopped")
        body = b"{}" if method == "POST" else None
        headers = (("content-type", "application/json"),) if body else ()
        answer = await self._control.request(method, path, headers=headers, body=body)
        try:
            data = bytearray()
            while len(data) <= MAX_ANSWER_BYTES and (piece := await answer.read(MAX_ANSWER_BYTES)):
                data += piece
            return answer.status, bytes(data)
        finally:
            await answer.aclose()

    # Into memory and out of it.

    async def wanted_now(self) -> None:
        """A request is about to be sent: see that the model is on its way into memory.

        While others are at work that are in its way, it waits. Raises NotNowError, EndpointError.
        """
        self.last_used = self._clock()
        if self.in_memory and not self.leaving and not self._room.must_wait(self):
            return
        self._waiting += 1
        try:
            if not await self._room.make_room(self):
                return
        except NoRoomError as error:
            raise NotNowError(f"{self.name} cannot be loaded now: {error}") from None
        finally:
            self._waiting -= 1
        try:
            if not await self._post("/load"):
                raise EndpointError(f"{self.name} cannot be loaded: its service refused")
        except EndpointError:
            self._become("cold")
            raise

    def reserve(self) -> None:
        """From now on it is on its way into memory."""
        self._pace = None
        self._become("loading")

    async def unload(self) -> bool:
        """Give its memory back; say whether it did."""
        if not self._ours or self.asked:
            return False
        self.leaving = True
        try:
            done = await self._post("/unload")
        except EndpointError as error:
            logger.info("%s could not be unloaded: %s", self.name, error, extra={"action": "model_stuck"})
            return False
        finally:
            self.leaving = False
        if done:
            self._ahead = False
            self._settle()
            self._become("cold")
        return done

    def _settle(self) -> None:
        if not self.settled:
            self.settled = True
            self._changed()

    def _become(self, state: Literal["loaded", "loading", "cold"]) -> None:
        if state == "loaded":
            self._settle()
        if self.state == state:
            return
        self.state = state
        if state != "loading":
            self._pace = None
        logger.info("%s is %s", self.name, state, extra={"action": f"model_{state}", "model": self.name})
        self._changed()


class Fetching:
    """A model's files on their way: what is shown of that, and when it is told anew."""

    #: Seconds after which it is told anew even where no total is known.
    EVERY_S = 1.0

    def __init__(self, now: float) -> None:
        self.pace = Pace(now)
        self.note = ""
        self._told_at = float("-inf")

    def take(self, progress: PullProgress, now: float) -> bool:
        """Take note of a step; say whether it is worth being told."""
        if progress.note != self.note:
            # Another thing is under way, at another pace.
            self.pace, self.note, self._told_at = Pace(now), progress.note, float("-inf")
        self.pace.at(now, progress.done_bytes / progress.total_bytes if progress.total_bytes else None)
        if now - self._told_at < self.EVERY_S:
            return False
        self._told_at = now
        return True

    def words(self, progress: PullProgress, now: float) -> str:
        """Return how many bytes there are, and the time left, each where it is known."""
        size = f": {human(progress.done_bytes)} of {human(progress.total_bytes)}" if progress.total_bytes else ""
        eta_s = self.pace.eta_s(now)
        return size if eta_s is None else f"{size}, about {duration(eta_s)} left"
