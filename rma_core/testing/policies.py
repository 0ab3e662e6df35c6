"""What every plugin with tier policies must do, as async functions that take a `PolicyCase` and assert."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from rma_core.models.hardware import Capabilities
from rma_core.offers import REASON_CHARACTERS, TIERS
from rma_core.policy_process import confined
from rma_core.record import from_capabilities
from rma_core.testing import watching
from rma_core.testing.watching import NotReached, PluginCase, check_names

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Machines that every policy must have an answer for, in their short form.
MACHINES = (
    Capabilities(cpu_cores=0, ram="0.0GB"),
    Capabilities(cpu_cores=1, ram="2GB", storage="20GB"),
    Capabilities(cpu_cores=4, ram="4GB", storage="32GB"),
    Capabilities(cpu_cores=4, ram="16GB", storage="500GB"),
    Capabilities(cpu_cores=6, ram="16GB", storage="1TB", gpu_type="NVIDIA GeForce GTX 1660", gpu_memory="6GB"),
    Capabilities(cpu_cores=16, ram="64GB", storage="1TB", gpu_type="NVIDIA GeForce RTX 4090", gpu_memory="24GB"),
    Capabilities(cpu_cores=8, ram="16GB", storage="512GB", gpu_type="Apple M2", gpu_memory="11GB"),
    Capabilities(cpu_cores=96, ram="2TB", storage="30TB", gpu_type="NVIDIA H100", gpu_memory="80GB", gpu_count=8),
)
LABELS = {"site": "lab"}
#: One decision takes no longer: a coordinator asks for thousands of machines.
DECISION_MS = 50.0


class PolicyCase(PluginCase):
    """One plugin with tier policies to check."""

    kind = "policy"

    def machines(self) -> list[Any]:
        """Return the machines it is asked about, as plain data."""
        return [
            {"report": msgspec.to_builtins(from_capabilities(short)), "labels": LABELS, "worker_id": f"worker-{n:08x}"}
            for n, short in enumerate(MACHINES)
        ]

    def bounds(self) -> dict[str, object]:
        """Return what a coordinator would keep it from: nobody need trust it to look at it."""
        return confined(self.value, self.config, self.folder, hidden=self.hidden)

    async def decisions(self) -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
        """Return each policy's name, a machine in words, and both decisions. Raises NotReached without any."""
        seen = await self.used()
        found = [
            (policy["name"], _words(int(number)), first, policy["second"][number])
            for policy in seen.given
            for number, first in policy["first"].items()
        ]
        if not found:
            raise NotReached("it gives no policy")
        return found


#: One check, as for detectors.
Check = Callable[[PolicyCase], Awaitable[None]]


def _words(number: int) -> str:
    short = MACHINES[number]
    gpu = f", {short.gpu_count or 1} {short.gpu_type}" if short.gpu_type else ""
    return f"{short.cpu_cores} cores, {short.ram}{gpu}"


async def it_gives_a_policy(case: PolicyCase) -> None:
    """There is at least one policy, with a summary."""
    seen = await case.used()
    assert seen.given, "it gives no policy: return a list with at least one"
    check_names([policy["name"] for policy in seen.given], case, taken="threshold")
    without = [policy["name"] for policy in seen.given if not policy["summary"].strip()]
    assert not without, f"{', '.join(without)} has an empty summary: `rma policies list` shows it"


async def it_decides_for_every_machine(case: PolicyCase) -> None:
    """Each machine gets a tier from 1 to 99, or none, and a sentence that says why."""
    problems = [
        f"{name}, {machine}: {problem}"
        for name, machine, decided, _ in await case.decisions()
        for problem in _flaws(decided)
    ]
    assert not problems, "; ".join(problems[:3])


def _flaws(decided: dict[str, Any]) -> Iterator[str]:
    if decided["problem"]:
        yield decided["problem"]
        return
    tier, reason = decided["tier"], decided["reason"]
    if tier is not None and (type(tier) is not int or tier not in TIERS):
        yield f"its tier is {tier!r}: give a whole number from {TIERS.start} to {TIERS.stop - 1}, or None"
    if not isinstance(reason, str) or not reason.strip():
        yield f"its reason is {reason!r}: write a sentence; owners and admins read it"
    elif len(reason) > REASON_CHARACTERS:
        yield f"its reason has {len(reason)} characters: at most {REASON_CHARACTERS}"


async def it_decides_the_same_twice(case: PolicyCase) -> None:
    """The same machine always gets the same, in whatever order machines are asked about."""
    for name, machine, first, second in await case.decisions():
        same = [first.get(key) == second.get(key) for key in ("problem", "tier", "reason")]
        assert all(same), f"{name}, {machine}: {_short(first)}, and then {_short(second)}"


def _short(decided: dict[str, Any]) -> str:
    return decided["problem"] or f"tier {decided['tier']} ({decided['reason']})"


async def it_decides_quickly(case: PolicyCase) -> None:
    """A fleet of thousands is decided in seconds."""
    for name, machine, first, second in await case.decisions():
        # The first one may load something.
        took_ms = min(first.get("seconds", 0.0), second.get("seconds", 0.0)) * 1000
        assert took_ms <= DECISION_MS, f"{name}, {machine}: took {took_ms:.0f} ms, at most {DECISION_MS:.0f}"


async def it_looks_at_nothing_else(case: PolicyCase) -> None:
    """A decision comes from what is asked alone: no hardware, no program."""
    seen = await case.used()
    looked = [*seen.did("hardware", stage="use"), *seen.did("program", stage="use"), *seen.did("socket", stage="use")]
    assert not looked, f"while it decides it looks at {', '.join(looked[:3])}"


policy_contract: tuple[Check, ...] = (
    watching.its_hook_fits,
    watching.it_answers,
    watching.its_import_is_light,
    watching.it_uses_nothing_deprecated,
    it_gives_a_policy,
    it_decides_for_every_machine,
    it_decides_the_same_twice,
    it_decides_quickly,
    it_looks_at_nothing_else,
    watching.it_prints_nothing,
    watching.it_writes_nothing,
    watching.it_uses_no_network,
    watching.it_leaves_nothing_running,
)
