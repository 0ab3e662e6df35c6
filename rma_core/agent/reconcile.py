"""Reconciliation: what runs here is brought to what the coordinator wants, within what the owner agreed to."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rma_core.agent.endpoint import EndpointError
from rma_core.agent.engines import STOP_GRACE_S, looked_up, stopped
from rma_core.agent.keeper import ENGINE_WAIT_S, Keeper, Slot
from rma_core.agent.llm.model_files import ModelFiles
from rma_core.agent.llm.model_room import Claim, ModelRoom
from rma_core.agent.placing import spec_hash
from rma_core.catalog import choose_gpu, gpu_share
from rma_core.errors import RuntimeFailure
from rma_core.models.worker import lane

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence

    from rma_core.agent.consent import Consent
    from rma_core.agent.endpoint import Endpoint
    from rma_core.agent.engines import Engine
    from rma_core.models.hardware import Device
    from rma_core.models.worker import Assignment, ContainerStatus

logger = logging.getLogger(__name__)

#: Seconds a service has to answer its health check, and the statuses that are good.
HEALTH_TIMEOUT_S, GOOD = 5.0, range(200, 300)
#: Seconds a container that is no longer wanted may finish what it has.
WITHDRAW_DRAIN_S = 30.0
#: Tries to take a container down before it is left to the next start of the agent.
TAKE_DOWN_TRIES = 5
TAKE_DOWN_PAUSE_S = 3.0
#: Seconds a service has to end by itself when its owner wants the machine back.
PAUSE_GRACE_S = 1.0
#: Containers of one machine; more is a broken coordinator, and a heartbeat could not list them.
MAX_CONTAINERS = 256
#: Name of the task of a container that must go.
LEAVING = "leaving"


async def ask_health(client: Endpoint, path: str) -> str:
    """Ask a service for its health; an empty string is good, anything else the reason."""
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            answer = await client.request("GET", path)
            await answer.aclose()
    except TimeoutError:
        return f"no answer to GET {path} within {HEALTH_TIMEOUT_S:g} s"
    except EndpointError as error:
        return f"no answer to GET {path}: {error}"
    return "" if answer.status in GOOD else f"GET {path} answered {answer.status}"


class Reconciler:
    """Desired state in, containers out; the `Context` of its keepers.

    With `start` every container has a task of its own; without, `round` does what is due, for tests and one-shot use.
    ``stop_attempts`` is asked to end the attempts at a container that must go.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        worker_id: str = "",
        consent: Consent,
        gpus: Iterable[Device] = (),
        changed: Callable[[], None] = lambda: None,
        freed: Callable[[], None] = lambda: None,
        stop_attempts: Callable[[Keeper], None] = lambda _: None,
        check: Callable[[Endpoint, str], Awaitable[str]] = ask_health,
        room: ModelRoom | None = None,
        files: ModelFiles | None = None,
        model_idle_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.engines, self.worker_id, self.consent = engines, worker_id, consent
        self.gpus = tuple(gpus)
        self.clock, self.uniform, self.changed, self.check = clock, uniform, changed, check
        self.room, self.model_idle_s = room or ModelRoom(clock=clock), model_idle_s
        self.files = files or ModelFiles(Path())
        self._stop_attempts, self._freed = stop_attempts, freed
        #: What the owner offers from files of the machine, whatever the coordinator wants.
        self._own: dict[str, Assignment] = {}
        self._assigned: tuple[Assignment, ...] = ()
        self.paused = False
        self._keepers: dict[str, Keeper] = {}
        self._leaving: list[Keeper] = []
        self._tasks: dict[Keeper, asyncio.Task[None]] = {}
        self._given: dict[str, tuple[Device, int]] = {}
        self._watch: asyncio.Task[None] | None = None
        #: The desired state that is worked on; -1 before there is one.
        self.generation = -1

    # The desired state.

    def offer(self, own: Iterable[Assignment]) -> None:
        """Serve what the owner offers from now on, beside what is assigned."""
        self._own = {one.name: one for one in own}
        self._renew()

    def want(self, generation: int, assignments: Iterable[Assignment]) -> None:
        """Take a new desired state; what it no longer has is drained and removed."""
        self._assigned = tuple(itertools.islice(assignments, MAX_CONTAINERS))
        if generation != self.generation:
            names = ", ".join(sorted(one.name for one in self._assigned)) or "nothing"
            logger.info("generation %d: this machine is to run %s", generation, names, extra={"action": "desired"})
            for keeper in self._keepers.values():
                keeper.nudge()
        self.generation = generation
        self._renew()

    def _renew(self) -> None:
        """Bring the keepers to what is wanted now: nothing while the owner has paused the machine."""
        wanted = {} if self.paused else {one.name: one for one in (*self._own.values(), *self._assigned)}
        for name, keeper in list(self._keepers.items()):
            if name not in wanted or spec_hash(wanted[name]) != keeper.hash:
                self._leave(self._keepers.pop(name))
        for name, one in wanted.items():
            if name not in self._keepers:
                self._keepers[name] = Keeper(one, self)
        self._share_memory(wanted.values())
        if self._watch is not None:
            self._spawn()
        self.changed()

    def _share_memory(self, wanted: Iterable[Assignment]) -> None:
        """Say which models there are, and what else takes memory."""
        self.files.want(one.model for one in wanted if one.model)
        self.room.tenants = [keeper.model for keeper in self._keepers.values() if keeper.model]
        self.room.others(Claim.of(one.needs, self.gpu_for(one.name, one)) for one in wanted if not one.model)

    async def pause(self) -> None:
        """Give back all that containers take, at once; what is wanted meanwhile is remembered."""
        self.paused = True
        self._renew()
        leaving = [task for keeper, task in self._tasks.items() if keeper.leaving]
        if leaving:
            await asyncio.wait(leaving)

    def resume(self) -> None:
        """Run again what is wanted."""
        self.paused = False
        self._renew()

    def by_owner(self, wanted: Assignment) -> bool:
        """Say whether its owner offers it, and nobody assigned it."""
        return wanted.name in self._own

    def refusal(self, wanted: Assignment) -> str:
        """Say why the owner's consent does not cover it, or nothing."""
        if self.by_owner(wanted):
            return ""
        offered = {one.model.name for one in self._own.values() if one.model}
        if wanted.model is not None and wanted.model.name in offered:
            return f"the owner of this machine offers {wanted.model.name} from a file of their own"
        if wanted.model is not None and not all(file.sha256 for file in wanted.model.files):
            return f"the pool does not say by its hash which file {wanted.model.name} is"
        return self.consent.refusal(wanted)

    def gpu_for(self, name: str, wanted: Assignment) -> Device | None:
        """Return the GPU for a container: the one it has, else what the coordinator's own rule gives it."""
        if name in self._given:
            return self._given[name][0]
        if self.by_owner(wanted):
            # They are not all in memory at one time: who is, the room for models decides.
            return choose_gpu(self.gpus, {}, wanted.needs)
        taken: dict[str, int] = {}
        for gpu, share in self._given.values():
            taken[gpu.id] = taken.get(gpu.id, 0) + share
        chosen = choose_gpu(self.gpus, taken, wanted.needs)
        if chosen is not None:
            self._given[name] = (chosen, gpu_share(chosen, wanted.needs))
        return chosen

    # What others ask.

    def statuses(self) -> tuple[ContainerStatus, ...]:
        """Return every container as a heartbeat carries it."""
        # What leaves comes first, so that of two with one name the wanted one is what a reader by name is left with.
        return tuple(keeper.status() for keeper in [*self._leaving, *self._keepers.values()])

    def slots(self) -> dict[str, int]:
        """Return the slots of each service's healthy containers, free and busy ones."""
        slots: dict[str, int] = {}
        for keeper in self._keepers.values():
            if keeper.state == "healthy" and not keeper.leaving:
                slots[keeper.wanted.service] = slots.get(keeper.wanted.service, 0) + keeper.wanted.slots
        return slots

    def free(self) -> int:
        """Return how many more requests all containers take together."""
        return sum(keeper.free for keeper in self._keepers.values())

    def busy_share(self) -> float:
        """Return how busy the busiest service is, from 0 to 1."""
        slots = self.slots()
        busy = dict.fromkeys(slots, 0)
        for keeper in self._keepers.values():
            if keeper.wanted.service in busy:
                busy[keeper.wanted.service] += keeper.busy
        return max((min(1.0, busy[name] / count) for name, count in slots.items() if count), default=0.0)

    def place(self, service: str, model: str = "") -> Slot | str:
        """Take a slot of the least busy healthy container of a service, with a model of that name where it has models.

        Returns why there is none. A model that is loaded comes before one that is not.
        """
        keepers = [k for k in self._keepers.values() if k.wanted.service == service and k.serves(model)]
        best = max(keepers, key=lambda k: (k.free > 0, k.model is None or k.model.in_memory, k.free), default=None)
        if best is not None and best.free and best.client is not None:
            return Slot(best, best.client, self._freed)
        if not keepers:
            runs = any(k.wanted.service == service for k in self._keepers.values())
            return f"this machine does not run {lane(service, model) if runs else service}"
        return next((why for k in keepers if (why := k.why_not)), f"{lane(service, model)} is busy")

    # Its work.

    def start(self) -> None:
        """Work on the desired state from now on, in tasks."""
        self._watch = asyncio.create_task(self._watch_engines())
        self._watch.add_done_callback(_never_silent)
        self._spawn()

    async def round(self) -> None:
        """Do everything that is due now, once."""
        for keeper in list(self._leaving):
            await self._take_down(keeper, tries=1)
        for keeper in list(self._keepers.values()):
            await keeper.step()
        await self._look_round()

    async def close(self, *, stop: bool) -> None:
        """End all work; with ``stop`` every container is stopped, without it engines keep theirs for the next start."""
        tasks = [*self._tasks.values(), *([self._watch] if self._watch else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._watch = None
        keepers = [*self._keepers.values(), *self._leaving]
        self._keepers.clear()
        if stop:
            self._leaving = list(keepers)
            await asyncio.gather(*(self._take_down(keeper, tries=2) for keeper in keepers))
            await self._clear_orphans()
        else:
            await asyncio.gather(*(keeper.let_go() for keeper in keepers))

    def _leave(self, keeper: Keeper) -> None:
        keeper.leaving = True
        self._leaving.append(keeper)

    def _spawn(self) -> None:
        """Give every keeper the task it needs now."""
        for keeper in [*self._keepers.values(), *self._leaving]:
            task = self._tasks.get(keeper)
            if keeper.leaving and (task is None or task.get_name() != LEAVING):
                self._task(keeper, self._withdraw(keeper, task), LEAVING)
            elif task is None:
                self._task(keeper, self._keep(keeper), keeper.wanted.name)

    def _task(self, keeper: Keeper, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks[keeper] = task
        task.add_done_callback(lambda done: self._done(keeper, done))

    def _done(self, keeper: Keeper, task: asyncio.Task[None]) -> None:
        if self._tasks.get(keeper) is task:
            del self._tasks[keeper]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            about = {"action": "bug", "container": keeper.wanted.name}
            logger.error("%s is no longer looked after", keeper.wanted.name, exc_info=error, extra=about)
            keeper.neglected(error)

    async def _keep(self, keeper: Keeper) -> None:
        for former in [k for k in self._leaving if k.wanted.name == keeper.wanted.name]:
            await former.gone.wait()
        while True:
            keeper.nudged.clear()
            wait_s = await keeper.step()
            try:
                async with asyncio.timeout(wait_s):
                    await keeper.nudged.wait()
            except TimeoutError:
                continue

    async def _withdraw(self, keeper: Keeper, work: asyncio.Task[None] | None) -> None:
        """Let a container finish what it has, then take it down."""
        if work is not None:
            # Its end is awaited: a start that is on its way must leave its handle first.
            work.cancel()
            await asyncio.wait({work})
        try:
            async with asyncio.timeout(0 if self.paused else WITHDRAW_DRAIN_S):
                await keeper.idle.wait()
        except TimeoutError:
            self._stop_attempts(keeper)
        await self._take_down(keeper, tries=TAKE_DOWN_TRIES)
        await self._forget_files()
        self.changed()

    async def _forget_files(self) -> None:
        """Let engines drop the copies of files that nobody wants: what was downloaded stays, to be copied again."""
        keep = {self.files.key(one.model) for one in (*self._own.values(), *self._assigned) if one.model}
        for engine in self.engines:
            if engine.health.state == "healthy":
                try:
                    forget = functools.partial(engine.runtime.forget_files, self.worker_id, keep)
                    await looked_up(engine.runtime, forget)
                except RuntimeFailure as error:
                    logger.debug("%s keeps copies of files: %s", engine.name, error)

    async def _take_down(self, keeper: Keeper, *, tries: int) -> None:
        try:
            await self._try_to_stop(keeper, tries)
        finally:
            # Whatever happened: a new container of its name waits for this.
            keeper.gone.set()
        if keeper in self._leaving:
            self._leaving.remove(keeper)
        if keeper.wanted.name not in self._keepers:
            self._given.pop(keeper.wanted.name, None)

    async def _try_to_stop(self, keeper: Keeper, tries: int) -> None:
        for left in reversed(range(tries)):
            try:
                await keeper.take_down(grace_s=PAUSE_GRACE_S if self.paused else STOP_GRACE_S)
                break
            except RuntimeFailure as error:
                about = {"action": "container_stuck", "container": keeper.wanted.name}
                logger.warning("%s could not be stopped: %s", keeper.wanted.name, error, extra=about)
                if left:
                    await asyncio.sleep(TAKE_DOWN_PAUSE_S)
        else:
            keeper.orphan()

    async def _watch_engines(self) -> None:
        """Keep an eye on the engines and on memory, and clear away what an earlier run left and nobody wants."""
        while True:
            await self._look_round()
            await self.room.tidy()
            await asyncio.sleep(ENGINE_WAIT_S)

    async def _look_round(self) -> None:
        for engine in self.engines:
            await engine.look(self.worker_id)
        await self._clear_orphans()

    async def _clear_orphans(self) -> None:
        if self.generation < 0:
            return
        for engine in self.engines:
            for name, handle in list(engine.orphans.items()):
                keeper = self._keepers.get(name)
                if keeper is not None and (keeper.handle is None or keeper.engine is engine):
                    continue
                try:
                    await stopped(engine.runtime, handle)
                except RuntimeFailure as error:
                    logger.debug("%s of an earlier run could not be stopped: %s", name, error)
                else:
                    engine.orphans.pop(name, None)


def _never_silent(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("the engines are no longer watched", exc_info=task.exception(), extra={"action": "bug"})
