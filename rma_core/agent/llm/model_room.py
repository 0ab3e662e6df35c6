"""Which models are in memory at one time: as many as fit beside everything else, the others wait in their files.

What a model takes was reckoned beforehand and is reserved before it is loaded, so two that do not fit together are
never loaded together. One that nobody is asking gives way to one that somebody asks for, the one that was used longest
ago first. One at work is waited for; while others wait for its memory it takes new requests for a moment only, so that
everybody's turn comes.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from rma_core.catalog import UNIFIED_MEMORY, Room
from rma_core.models.sizes import human

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rma_core.catalog import Needs
    from rma_core.models.hardware import Device, HardwareReport

#: Seconds for which models in memory take new requests although another has been waiting for its turn.
PATIENCE_S = 20.0
#: Seconds that a request waits for its model's turn.
MOST_WAIT_S = 300.0
#: Seconds between two looks whether those at work are done.
LOOK_S = 0.1


class Claim(NamedTuple):
    """Bytes of main memory, and of one GPU by its id."""

    main_bytes: int
    gpu: str = ""
    gpu_bytes: int = 0

    @classmethod
    def of(cls, needs: Needs, gpu: Device | None) -> Claim:
        """Return what ``needs`` claim; where memory is unified, the GPU's share is main memory."""
        if gpu is None:
            return cls(needs.memory_bytes)
        share = needs.gpu_memory_bytes or gpu.memory_bytes or 0
        unified = gpu.attributes.get(UNIFIED_MEMORY) is True
        return cls(needs.memory_bytes + (share if unified else 0), gpu.id, share)


class Tenant(Protocol):
    """A model that takes memory while it is loaded or being loaded."""

    @property
    def name(self) -> str:
        """What clients call it."""

    @property
    def claim(self) -> Claim:
        """What it takes."""

    @property
    def in_memory(self) -> bool:
        """Whether it is loaded, or on its way."""

    @property
    def loading(self) -> bool:
        """Whether it is on its way into memory."""

    @property
    def at_work(self) -> bool:
        """Whether requests are at it, or it is on its way for some."""

    @property
    def leaving(self) -> bool:
        """Whether it is on its way out of memory."""

    @property
    def last_used(self) -> float:
        """When it was asked last, in monotonic seconds."""

    def reserve(self) -> None:
        """From now on it is on its way into memory."""

    async def unload(self) -> bool:
        """Give its memory back; say whether it did."""


class NoRoomError(Exception):
    """A model cannot be loaded now; the sentence says why."""


class ModelRoom:
    """The memory of one machine that models share."""

    def __init__(self, report: HardwareReport | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._main_bytes: int | None = None
        self._gpu_bytes: dict[str, int] = {}
        if report is not None:
            self.measure(report)
        self._others: tuple[Claim, ...] = ()
        self.tenants: list[Tenant] = []
        self._busy = asyncio.Lock()
        #: Those for which requests wait, and how many; the first one's turn is next, and has been since then.
        self._line: dict[Tenant, int] = {}
        self._since = 0.0

    def measure(self, report: HardwareReport) -> None:
        """Go by this machine's memory from now on; what is loaded stays."""
        self._main_bytes = int(Room.of(report).memory_bytes)
        self._gpu_bytes = {gpu.id: gpu.memory_bytes or 0 for gpu in report.gpus}

    def others(self, claims: Iterable[Claim]) -> None:
        """Say what containers without a model take."""
        self._others = tuple(claims)

    def lacks(self, claim: Claim, *, beside: Iterable[Tenant]) -> str:
        """Say what of a claim does not fit beside these models; an empty string when all of it does."""
        taken = [*self._others, *(one.claim for one in beside)]
        main = sum(one.main_bytes for one in taken)
        if self._main_bytes is not None and main + claim.main_bytes > self._main_bytes:
            return self._short("memory", claim.main_bytes, self._main_bytes - main)
        has = self._gpu_bytes.get(claim.gpu)
        on_gpu = sum(one.gpu_bytes for one in taken if one.gpu == claim.gpu)
        if has is not None and on_gpu + claim.gpu_bytes > has:
            return self._short("memory of its GPU", claim.gpu_bytes, has - on_gpu)
        return ""

    def _short(self, what: str, wanted: int, left: int) -> str:
        return f"it needs {human(wanted)} of {what}, and {human(max(0, left))} are free"

    def why_not(self, tenant: Tenant) -> str:
        """Say why a model cannot be loaded now, even if those at no work gave way; an empty string when it can."""
        at_work = [one for one in self.tenants if one is not tenant and one.in_memory and one.at_work]
        reason = self.lacks(tenant.claim, beside=at_work)
        if not reason or not at_work:
            return reason
        return f"{reason} while {', '.join(one.name for one in at_work)} is at work"

    def never(self, tenant: Tenant) -> str:
        """Say why a model cannot be loaded whatever other models do; an empty string when its turn comes."""
        return self.lacks(tenant.claim, beside=())

    def fits(self, tenant: Tenant) -> bool:
        """Say whether a model can be loaded now beside all that is in memory, and keeps nobody from their turn."""
        return not self._line and not self.lacks(tenant.claim, beside=self._in_memory(tenant))

    def must_wait(self, tenant: Tenant) -> bool:
        """Say whether new requests to a model in memory wait, for others have been waiting too long."""
        first = next(iter(self._line), None)
        return first is not None and first is not tenant and self._clock() - self._since > PATIENCE_S

    async def make_room(self, tenant: Tenant, *, within_s: float = MOST_WAIT_S) -> bool:
        """Wait for a model's turn; say whether it is to be loaded now, with what it takes reserved.

        What is in its way is unloaded once it is at no work. Raises NoRoomError.
        """
        if not self._line:
            self._since = self._clock()
        self._line[tenant] = self._line.get(tenant, 0) + 1
        try:
            async with asyncio.timeout(within_s):
                while True:
                    if tenant.in_memory and not tenant.leaving and not self.must_wait(tenant):
                        return False
                    if next(iter(self._line)) is tenant and not tenant.leaving and await self._make(tenant):
                        return True
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise NoRoomError(self.why_not(tenant) or "its turn did not come") from None
        finally:
            self._go(tenant)

    def _go(self, tenant: Tenant) -> None:
        """One request waits no longer; when its model waits no longer, it is the next one's turn."""
        self._line[tenant] -= 1
        if not self._line[tenant]:
            if next(iter(self._line)) is tenant:
                self._since = self._clock()
            del self._line[tenant]

    async def _make(self, tenant: Tenant) -> bool:
        if reason := self.never(tenant):
            raise NoRoomError(reason)
        async with self._busy:
            if tenant.in_memory:
                # Another request has seen to it.
                return False
            if any(one.loading for one in self._in_memory(tenant)):
                # The time that a model takes to load is none in which it works.
                self._since = self._clock()
            while self.lacks(tenant.claim, beside=self._in_memory(tenant)):
                idle = [one for one in self._in_memory(tenant) if not one.at_work]
                # Only where room comes of it.
                if self.why_not(tenant) or not idle:
                    return False
                victim = min(idle, key=lambda one: one.last_used)
                if not await victim.unload() and not victim.at_work:
                    raise NoRoomError(f"{victim.name} could not be unloaded")
            tenant.reserve()
        return True

    async def tidy(self) -> None:
        """Unload models that nobody asks until all that is there fits: other services may have come."""
        async with self._busy:
            for tenant in sorted(self.tenants, key=lambda one: one.last_used):
                if not self._crowded():
                    return
                if tenant.in_memory and not tenant.at_work:
                    await tenant.unload()

    def _crowded(self) -> bool:
        there = self._in_memory(None)
        return any(self.lacks(Claim(0, gpu), beside=there) for gpu in ("", *self._gpu_bytes))

    def _in_memory(self, besides: Tenant | None) -> list[Tenant]:
        return [one for one in self.tenants if one is not besides and one.in_memory]
