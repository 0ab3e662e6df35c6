"""What every plugin with container runtimes must do before any container: the part that needs no image to try it with.

The rest is `rma_core.testing.runtimes`, for which its author makes a `RuntimeCase`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from rma_core.testing import watching
from rma_core.testing.watched import CALLS
from rma_core.testing.watching import NotReached, PluginCase, check_names

if TYPE_CHECKING:
    from rma_core.testing.watching import Machine, Seen

#: What a runtime may raise when its engine is not there, by the name of its class or of one it is derived from.
EXPECTED = "RuntimeFailure"


class OfferCase(PluginCase):
    """One plugin with container runtimes to check."""

    kind = "runtime"

    async def run(self, machine: Machine = "real", *, deadline_s: float | None = None) -> Seen:
        """Ask every runtime once; each call may take as long as a detector."""
        return await super().run(machine, deadline_s=(deadline_s or self.deadline_s) * CALLS)

    async def runtimes(self) -> tuple[dict[str, Any], ...]:
        """Return what each runtime answered. Raises NotReached without any."""
        seen = await self.used()
        if not seen.given:
            raise NotReached("it gives no runtime")
        return seen.given


#: One check, as for detectors.
Check = Callable[[OfferCase], Awaitable[None]]


async def it_gives_a_runtime(case: OfferCase) -> None:
    """There is at least one runtime."""
    seen = await case.used()
    assert seen.given, "it gives no runtime: return a list with at least one"
    check_names([said["name"] for said in seen.given], case, taken="process")


async def it_contacts_nothing_yet(case: OfferCase) -> None:
    """Being asked what it can drive starts and opens nothing: that is for `probe`."""
    seen = await case.used()
    did = [what for kind in ("hardware", "program", "socket", "network") for what in seen.did(kind, stage="hook")]
    assert not did, f"its hook already looks at {', '.join(did[:3])}: leave that to probe()"


async def its_probe_always_answers(case: OfferCase) -> None:
    """`probe` raises nothing, has a reason where the runtime cannot be used, and a version where it can."""
    for said in await case.runtimes():
        raised = said.get("probe_raised")
        assert not raised, f"{said['name']}: probe raised {raised[0]} ({raised[-1]}): return a state with a reason"
        health = said["probe"]
        assert isinstance(health, dict) and "state" in health, f"{said['name']}: probe returned {health!r}"  # noqa: PT018
        if health["state"] == "healthy":
            assert health.get("version"), f"{said['name']}: a healthy runtime tells its version"
        else:
            assert health.get("reason"), f"{said['name']}: {health['state']} without a reason that its owner can act on"


async def what_is_unknown_is_missing(case: OfferCase) -> None:
    """A container that never was is `missing` and stopped already; an engine that is away is a RuntimeFailure."""
    for said in await case.runtimes():
        for call in ("inspect", "stop", "list_owned"):
            raised = said.get(f"{call}_raised")
            assert not raised or EXPECTED in raised, f"{said['name']}: {call} raised {raised[0]} ({raised[-1]})"
        if "inspect" in said:
            state = said["inspect"].get("state") if isinstance(said["inspect"], dict) else said["inspect"]
            words = f"{said['name']}: inspect says {state!r} of a container that never was: return `missing`"
            assert state == "missing", words
        assert not said.get("list_owned"), f"{said['name']}: it lists containers of a worker that has none"


offer_contract: tuple[Check, ...] = (
    watching.its_hook_fits,
    watching.it_answers,
    watching.its_import_is_light,
    watching.it_uses_nothing_deprecated,
    it_gives_a_runtime,
    it_contacts_nothing_yet,
    its_probe_always_answers,
    what_is_unknown_is_missing,
    watching.it_prints_nothing,
    watching.it_leaves_nothing_running,
)
