"""What the owner attached: model servers that already run on this machine, looked at and shared, never changed."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from rma_core.addresses import is_loopback
from rma_core.agent import model_server
from rma_core.agent.endpoint import Endpoint, EndpointError
from rma_core.agent.guarded import Guarded
from rma_core.agent.keeper import Slot
from rma_core.agent.model_server import LOOK_TIMEOUT_S, StillLoading, quoted
from rma_core.backoff import Backoff
from rma_core.errors import UsageProblem
from rma_core.models.worker import ATTACHED, ContainerStatus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from rma_core.agent.model_server import Found
    from rma_core.models.worker import ContainerState

logger = logging.getLogger(__name__)

#: The service that an attached server is part of.
SERVICE = "llm"
#: Addresses that can be attached, and the slots that all of them share.
MAX_ATTACHED, MAX_SLOTS = 16, 64
#: Seconds between two looks at a server that is well, and at one that loads its model.
LOOK_EVERY_S, LOADING_EVERY_S = 10.0, 2.0
#: Seconds until one that is away is looked at again: at first, and at most.
AWAY_BASE_S, AWAY_CAP_S = 1.0, 30.0
#: Seconds between a task's failure to reach a server and the look that it brings about.
NUDGED_AFTER_S = 0.25

_HINT = "the address is http://127.0.0.1:PORT, http://localhost:PORT, http://[::1]:PORT or unix:/path"


class Address(NamedTuple):
    """One address as the owner gave it: ``name`` goes to the pool, ``url`` does not; ``slots`` 0 where not told."""

    url: str
    slots: int
    name: str


def addresses(texts: Iterable[str]) -> tuple[Address, ...]:
    """Return what the owner attached, each once. Raises UsageProblem for what is not on this machine."""
    found: dict[str, Address] = {}
    for text in texts:
        one = _address(text)
        if one.url not in found:
            taken = sum(other.name.partition("--")[0] == one.name for other in found.values())
            found[one.url] = one._replace(name=f"{one.name}--{taken + 1}") if taken else one
    if len(found) > MAX_ATTACHED:
        raise UsageProblem(f"at most {MAX_ATTACHED} model servers can be attached, not {len(found)}")
    return tuple(found.values())


def _address(text: str) -> Address:
    if "," in text:
        raise UsageProblem(f"{text!r} cannot be attached: an address has no comma; --attach can be repeated")
    url, _, fragment = text.strip().partition("#")
    slots = _told_slots(text, fragment)
    if url.startswith("unix:/"):
        name = re.sub(r"[^a-z0-9]+", "-", url.rpartition("/")[2].lower()).strip("-")[:40]
        return Address(url, slots, f"attached-{name or 'socket'}")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise UsageProblem(f"{text!r} cannot be attached: {error}", hints=(_HINT,)) from None
    if parts.scheme != "http" or "@" in parts.netloc or not (host == "localhost" or _is_own(host)):
        raise UsageProblem(f"{text!r} cannot be attached: it is not an address on this machine", hints=(_HINT,))
    # The address that clients are told often ends in /v1; the paths are known.
    if not port or parts.path not in ("", "/", "/v1", "/v1/") or parts.query:
        raise UsageProblem(f"{text!r} cannot be attached: it needs a port, and nothing behind that", hints=(_HINT,))
    return Address(f"http://{parts.netloc}", slots, f"attached-{port}")


def _is_own(host: str) -> bool:
    # Not names that end in .localhost: some resolvers ask a name server for those.
    return not host.endswith("localhost") and is_loopback(host)


def _told_slots(text: str, fragment: str) -> int:
    if not fragment:
        return 0
    number = fragment.removeprefix("slots=")
    if number == fragment or not (number.isascii() and number.isdecimal() and 1 <= int(number[:9]) <= MAX_SLOTS):
        raise UsageProblem(f"{text!r} cannot be attached: only #slots=1 to #slots={MAX_SLOTS} may stand behind it")
    return int(number)


class AttachedServer:
    """One server: looked at by `run` until cancelled, its slots taken by `place`."""

    def __init__(
        self,
        address: Address,
        *,
        most_slots: int = MAX_SLOTS,
        changed: Callable[[], None] = lambda: None,
        freed: Callable[[], None] = lambda: None,
        look: Callable[[Endpoint, str], Awaitable[Found]] = model_server.look,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.address = address
        self.state: ContainerState = "pending"
        self.reason = ""
        self.found: Found | None = None
        self.busy = 0
        #: Set while no attempt is at it.
        self.idle = asyncio.Event()
        self.idle.set()
        self.client = Guarded(address.url, models=self.names, failed=self._nudge)
        self._probe = Endpoint(address.url)
        self._most_slots, self._changed, self._freed, self._look = most_slots, changed, freed, look
        self._uniform = uniform
        self._backoff = Backoff(base_s=AWAY_BASE_S, cap_s=AWAY_CAP_S, uniform=uniform)
        self._nudged = asyncio.Event()
        self._way = self._logged = ""

    @property
    def slots(self) -> int:
        """Requests it takes at once: what the owner said, else what it says, within what a machine may attach."""
        return min(self._most_slots, self.address.slots or (self.found.slots if self.found else 1))

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
            return self._judge(await self._look(self._probe, self._way))
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
        return LOOK_EVERY_S

    def place(self) -> Slot | None:
        """Take one of its slots, or nothing when none is free."""
        return Slot(self, self.client, self._freed) if self.free else None

    async def aclose(self) -> None:
        """Close every connection."""
        await self._probe.aclose()
        await self.client.aclose()

    def _nudge(self) -> None:
        self._nudged.set()

    def _here(self, found: Found) -> None:
        self._backoff.reset()
        self._way = found.way
        before = (self.found, self.state)
        self.found = found
        self.reason = _described(found, self.slots)
        self.state = "healthy"
        if before == (found, "healthy"):
            return
        if self.reason != self._logged:
            about = {"action": "attached_healthy", "container": self.address.name}
            logger.info("%s", self.sentence(), extra=about)
            for reason, names in found.left_out:
                logger.info("%s keeps back models %s: %s", self.address.name, reason, quoted(names), extra=about)
            self._logged = self.reason
        self._changed()

    def _away(self, state: ContainerState, reason: str, wait_s: float | None = None) -> float:
        before = (self.state, self.reason)
        self.state, self.reason, self.found, self._way, self._logged = state, reason, None, "", ""
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
        """Return how busy they are together, from 0 to 1."""
        slots = self.slots()
        return min(1.0, sum(one.busy for one in self.servers) / slots) if slots else 0.0

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
