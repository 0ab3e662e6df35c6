"""What the owner attached: model servers that already run on this machine, looked at and shared, never changed."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING

from rma_core.agent.attach import model_server
from rma_core.agent.attach.attachable import MAX_SLOTS
from rma_core.agent.attach.guarded import Guarded
from rma_core.agent.attach.model_server import LLAMA_CPP, LOOK_TIMEOUT_S, StillLoading, quoted
from rma_core.agent.attach.ollama import Ollama
from rma_core.agent.attach.others import Others
from rma_core.agent.endpoint import Endpoint, EndpointError
from rma_core.agent.keeper import Slot
from rma_core.backoff import Backoff
from rma_core.models.worker import ATTACHED, ContainerStatus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from rma_core.agent.attach.attachable import Address
    from rma_core.agent.attach.guarded import Asked
    from rma_core.agent.attach.model_server import Found
    from rma_core.agent.attach.ollama_look import Loaded, Shown
    from rma_core.models.worker import ContainerState

logger = logging.getLogger(__name__)

#: The service that an attached server is part of.
SERVICE = "llm"
#: Seconds between two looks at a server that is well, at one that loads its model, and at one that others use.
LOOK_EVERY_S, LOADING_EVERY_S, OTHERS_EVERY_S = 10.0, 2.0, 2.0
#: Seconds until one that is away is looked at again: at first, and at most.
AWAY_BASE_S, AWAY_CAP_S = 1.0, 30.0
#: Seconds between a task's failure to reach a server and the look that it brings about.
NUDGED_AFTER_S = 0.25
#: Seconds for which it is known how many slots of a llama.cpp are at work, and for which one that did not say is not
#: asked again; how often it is asked before a task is given back, and the seconds between: it lets go of a slot a
#: moment after it has answered.
SLOTS_FRESH_S, SLOTS_BLIND_S, SLOTS_TRIES, SLOTS_AGAIN_S = 1.0, 60.0, 3, 0.1


class AttachedServer:
    """One server: looked at by `run` until cancelled, its slots taken by `place`."""

    def __init__(
        self,
        address: Address,
        *,
        most_slots: int = MAX_SLOTS,
        changed: Callable[[], None] = lambda: None,
        freed: Callable[[], None] = lambda: None,
        look: Callable[[Endpoint, str, dict[str, Shown]], Awaitable[Found]] = model_server.look,
        uniform: Callable[[float, float], float] = random.uniform,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = address
        self.state: ContainerState = "pending"
        self.reason = ""
        self.found: Found | None = None
        self.busy = 0
        #: Set while no attempt is at it.
        self.idle = asyncio.Event()
        self.idle.set()
        self.others = Others(clock)
        self.client = Guarded(
            address.url, models=self.names, failed=self._nudge, full=self._full, asked=self._in_its_words
        )
        self._ollama = Ollama(keep_alive=address.keep_alive, seen=self._seen_loaded, loaded=self._nudge, clock=clock)
        self._probe = Endpoint(address.url)
        self._most_slots, self._changed, self._freed, self._look = most_slots, changed, freed, look
        self._uniform, self._clock = uniform, clock
        self._backoff = Backoff(base_s=AWAY_BASE_S, cap_s=AWAY_CAP_S, uniform=uniform)
        self._nudged = asyncio.Event()
        self._way = self._logged = ""
        self._shown: dict[str, Shown] = {}
        self._slots_until = clock()
        self._told_slots = 0

    @property
    def slots(self) -> int:
        """Requests it takes at once: what the owner said, else what it says, within what a machine may attach.

        Less what others use of it: its owner has it first.
        """
        told = self._all_slots
        room = max(told, self.found.slots if self.found else 1) - self.others.taken
        return max(0, min(self._most_slots, told, room))

    @property
    def _all_slots(self) -> int:
        return self.address.slots or (self.found.slots if self.found else 1)

    @property
    def free(self) -> int:
        """Requests it takes now beside those it has."""
        return max(0, self.slots - self.busy) if self.state == "healthy" else 0

    def names(self) -> frozenset[str]:
        """Return the names of the models that it shares now."""
        return frozenset(one.name for one in self.found.models) if self.found else frozenset()

    def status(self) -> ContainerStatus:
        """Return it as a heartbeat carries it."""
        return ContainerStatus(
            name=self.address.name,
            service=SERVICE,
            state=self.state,
            reason=self.reason[:2000],
            runtime=ATTACHED,
            isolated=False,
            slots=self.slots,
            models=self.found.models if self.found else (),
        )

    def sentence(self) -> str:
        """Return how it stands, with its address, for its owner."""
        words = self.reason if self.state == "healthy" else f"{self.state}: {self.reason}"
        return f"attached {self.address.url}: {words}"

    async def run(self) -> None:
        """Look at it now and then, until cancelled."""
        while True:
            wait_s = await self.look()
            try:
                async with asyncio.timeout(wait_s * self._uniform(0.8, 1.0)):
                    await self._nudged.wait()
            except TimeoutError:
                continue
            # Many tasks may fail in one moment; one look is enough for all of them.
            await asyncio.sleep(NUDGED_AFTER_S)
            self._nudged.clear()

    async def look(self) -> float:
        """Look at it once and return the seconds until the next look."""
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                found = await self._look(self._probe, self._way, self._shown)
                await self._look_at_others(found)
            return self._judge(found)
        except StillLoading as error:
            return self._away("starting", error.message, LOADING_EVERY_S)
        except EndpointError as error:
            return self._away("unhealthy", error.message)
        except TimeoutError:
            if self.busy and self.found is not None:
                # A server that works may be too busy to say so; the attempts have deadlines of their own.
                return LOOK_EVERY_S
            return self._away("unhealthy", f"no answer within {LOOK_TIMEOUT_S:g} s")
        except Exception as error:
            # Isolation boundary: a server is a stranger's program, and no answer of it may end the agent.
            if self.state != "failed":
                logger.exception("the look at %s failed", self.address.url, extra={"action": "bug"})
            return self._away("failed", f"a bug in the agent, whose log has the details: {type(error).__name__}")

    def _judge(self, found: Found) -> float:
        if not found.models:
            words = f"{found.server} has no model to share" + (f": {found.missing}" if found.missing else "")
            return self._away("unhealthy", words)
        self._here(found)
        return OTHERS_EVERY_S if self.others.taken else LOOK_EVERY_S

    def place(self) -> Slot | None:
        """Take one of its slots, or nothing when none is free."""
        if not self.free:
            return None
        self.others.ours()
        return Slot(self, self.client, self._released)

    def _released(self) -> None:
        self.others.ours()
        self._freed()

    # What others use of it.

    async def _look_at_others(self, found: Found) -> None:
        """See what others use, where that can be seen without waking up what sleeps."""
        if found.ollama is not None:
            self._seen_loaded(found.ollama.loaded)
        elif found.way == LLAMA_CPP and (self.busy or self.others.taken) and self._clock() >= self._slots_until:
            before = self.busy
            self._seen_at_work(await model_server.at_work(self._probe), max(before, self.busy))

    def _seen_loaded(self, loaded: dict[str, Loaded]) -> None:
        self.others.expiries_seen({name: one.expires for name, one in loaded.items()}, self.busy)

    def _seen_at_work(self, at_work: int | None, ours: int) -> None:
        self._slots_until = self._clock() + (SLOTS_BLIND_S if at_work is None else SLOTS_FRESH_S)
        self.others.slots_seen(at_work or 0, ours)

    async def _full(self) -> str:
        """Say why a task that has a slot here cannot have it after all: its owner has just taken it.

        Asked now, when the server is to work anyway: asked all the time, it would never sleep.
        """
        if self.found is None or self.found.way != LLAMA_CPP:
            return ""
        for left in reversed(range(SLOTS_TRIES)):
            if self._clock() >= self._slots_until or self._is_full:
                try:
                    async with asyncio.timeout(LOOK_TIMEOUT_S):
                        # The task that asks has a slot of ours, and is not at work yet.
                        self._seen_at_work(await model_server.at_work(self._probe), max(0, self.busy - 1))
                except TimeoutError:
                    # One that is too busy to say so may still queue a request.
                    self._seen_at_work(None, 0)
            if not self._is_full:
                break
            if left:
                await asyncio.sleep(SLOTS_AGAIN_S)
        if self.slots != self._told_slots:
            # The pool is told by the next look.
            self._nudge()
        if not self._is_full:
            return ""
        return f"{self.address.name} is used by others on this machine just now"

    @property
    def _is_full(self) -> bool:
        return self.slots < self.busy

    def _in_its_words(self) -> Asked | None:
        return self._ollama if self.found is not None and self.found.ollama is not None else None

    async def aclose(self) -> None:
        """Close every connection."""
        await self._probe.aclose()
        await self.client.aclose()

    def _nudge(self) -> None:
        self._nudged.set()

    def _here(self, found: Found) -> None:
        self._backoff.reset()
        self._way = found.way
        if found.ollama is not None:
            self._ollama.heard(found.ollama)
        before = (self.found and self.found._replace(ollama=None), self.state, self._told_slots)
        self.found, self.state = found, "healthy"
        self._told_slots = self.slots
        described = _described(found, min(self._most_slots, self._all_slots))
        taken = self.others.taken
        self.reason = f"{described}; {taken} in use by others" if taken else described
        if before == (found._replace(ollama=None), "healthy", self._told_slots):
            return
        if described != self._logged:
            self._log(found, described)
        self._changed()

    def _log(self, found: Found, described: str) -> None:
        about = {"action": "attached_healthy", "container": self.address.name}
        logger.info("%s", self.sentence(), extra=about)
        for reason, names in found.left_out:
            logger.info("%s keeps back models %s: %s", self.address.name, reason, quoted(names), extra=about)
        self._logged = described

    def _away(self, state: ContainerState, reason: str, wait_s: float | None = None) -> float:
        before = (self.state, self.reason)
        self.state, self.reason, self.found, self._way, self._logged = state, reason, None, "", ""
        self.others.forget()
        if before[0] != state:
            about = {"action": f"attached_{state}", "container": self.address.name}
            logger.info("%s", self.sentence(), extra=about)
        if before != (state, reason):
            self._changed()
        if wait_s is None:
            return self._backoff.next_s()
        self._backoff.reset()
        return wait_s


def _described(found: Found, slots: int) -> str:
    """Return what is shared, in the words of `rma status`: ``llama.cpp, 1 model (tiny), 2 slots``."""
    names = [one.name for one in found.models]
    shown = ", ".join(names[: model_server.QUOTED]) + (", …" if len(names) > model_server.QUOTED else "")
    parts = [found.server, f"{_count(len(names), 'model')} ({shown})", _count(slots, "slot")]
    return ", ".join(parts) + (f"; kept back: {found.missing}" if found.missing else "")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


class AttachedServers:
    """Everything that the owner attached; false when that is nothing."""

    def __init__(
        self,
        attached: Sequence[Address],
        *,
        changed: Callable[[], None] = lambda: None,
        freed: Callable[[], None] = lambda: None,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        most = MAX_SLOTS // max(1, len(attached))
        self.servers = tuple(
            AttachedServer(one, most_slots=most, changed=changed, freed=freed, uniform=uniform) for one in attached
        )

    def __bool__(self) -> bool:
        return bool(self.servers)

    @property
    def healthy(self) -> bool:
        """Whether any of them can take requests."""
        return any(one.state == "healthy" for one in self.servers)

    def statuses(self) -> tuple[ContainerStatus, ...]:
        """Return each as a heartbeat carries it."""
        return tuple(one.status() for one in self.servers)

    def slots(self) -> int:
        """Return the slots of those that are healthy, free and busy ones."""
        return sum(one.slots for one in self.servers if one.state == "healthy")

    def free(self) -> int:
        """Return how many more requests they take together."""
        return sum(one.free for one in self.servers)

    def busy_share(self) -> float:
        """Return how busy they are together, with what others do there, from 0 to 1."""
        taken = sum(one.others.taken for one in self.servers if one.state == "healthy")
        slots = self.slots() + taken
        return min(1.0, (sum(one.busy for one in self.servers) + taken) / slots) if slots else 0.0

    def lists(self, model: str) -> bool:
        """Say whether one of them has a model."""
        return any(model in one.names() for one in self.servers)

    def place(self, model: str) -> Slot | str:
        """Take a slot of the least busy server that has the model, or say why there is none."""
        having = [one for one in self.servers if one.state == "healthy" and model in one.names()]
        best = max(having, key=lambda one: one.free, default=None)
        slot = best.place() if best is not None else None
        if slot is not None:
            return slot
        if having:
            return f"{model} is busy"
        there = sorted({name for one in self.servers for name in one.names()})
        if there:
            return f"this machine has no model {model!r}; it has: {', '.join(there)}"[:2000]
        return "; ".join(f"{one.address.name} is {one.state}: {one.reason}" for one in self.servers)[:2000]

    async def look(self) -> None:
        """Look at each of them once."""
        await asyncio.gather(*(one.look() for one in self.servers))

    async def run(self) -> None:
        """Look at all of them now and then, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for one in self.servers:
                group.create_task(one.run(), name=one.address.name)

    async def aclose(self) -> None:
        """Close every connection."""
        for one in self.servers:
            await one.aclose()
