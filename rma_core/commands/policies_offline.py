"""What a tier policy says of machines in a file, without a pool."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rma_core.errors import Problem, UsageProblem, ValidationProblem
from rma_core.settings import AgentSettings, CoordinatorSettings, load_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rma_core.interfaces import PolicyInput, TierDecision, TierPolicy

    #: What it is called, and what a policy is asked about it.
    Machine = tuple[str, PolicyInput]

#: A file of machines is never read further: 100,000 short reports are 20 MB.
MAX_REPORT_BYTES = 64 * 1024 * 1024
#: What a policy's name ends with that is a file's.
POLICY_FILES = ".toml"


def machines_in(report: str) -> list[Machine]:
    """Return the machines of a file (``-``: of stdin), each named. Raises UsageProblem, ValidationProblem."""
    try:
        # A pipe or a device may have no end.
        with sys.stdin.buffer if report == "-" else Path(report).open("rb") as file:
            content = file.read(MAX_REPORT_BYTES + 1)
        if len(content) > MAX_REPORT_BYTES:
            raise UsageProblem(f"{report} has more than {MAX_REPORT_BYTES} bytes, which no list of machines needs")
        data = json.loads(content)
    except OSError as error:
        raise UsageProblem(f"{report} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValidationProblem(report, [Problem("$", f"not JSON: {error}")]) from None
    return [_named(one, index) for index, one in enumerate(data if isinstance(data, list) else [data])]


def _named(data: Any, index: int) -> Machine:
    """Return what a machine of a list is called, and what a policy is asked about it."""
    from rma_core.interfaces import PolicyInput
    from rma_core.record import read_report

    label = str(data.get("name", f"#{index + 1}")) if isinstance(data, dict) else f"#{index + 1}"
    return label, PolicyInput(report=read_report(data, subject=f"machine {label}"))


async def decided(name: str, home: str | None, machines: Sequence[Machine]) -> list[dict[str, Any]]:
    """Ask a policy about machines: a file's, or an installed one as the settings on this machine have it.

    A plugin's is asked in a child, as a coordinator does. Raises UsageProblem where there is no such policy.
    """
    from rma_core import policies_apart
    from rma_core.host import Plugins

    if name.endswith(POLICY_FILES):
        from rma_core.policy_file import read_file

        return _ask_here(read_file(Path(name)), machines)
    settings = load_settings(CoordinatorSettings, flags={"home": home}, known=(AgentSettings,))
    plugins = Plugins.discover(kinds=["policy"], **settings.plugin_rules())
    ours = plugins.policies(settings.plugins)
    if name in ours:
        return _ask_here(ours[name], machines)
    async with policies_apart.started(plugins, settings.plugins) as theirs:
        if name not in theirs:
            why = next((f": {p.state}: {p.reason}" for p in plugins.reports() if p.name == name and p.reason), "")
            hints = (f"installed: {', '.join(sorted({*ours, *theirs}))}",)
            raise UsageProblem(f"there is no tier policy {name!r}{why}", hints=hints)
        said = await theirs[name].decide([asked for _, asked in machines])
    failed = f"the tier policy {name!r}"
    return [
        {"name": label, "tier": None, "reason": f"{failed} {one}"} if isinstance(one, str) else _row(label, one)
        for (label, _), one in zip(machines, said, strict=True)
    ]


def _ask_here(policy: TierPolicy, machines: Sequence[Machine]) -> list[dict[str, Any]]:
    return [_row(label, policy.decide(asked)) for label, asked in machines]


def _row(label: str, decision: TierDecision) -> dict[str, Any]:
    return {"name": label, "tier": decision.tier, "reason": decision.reason}
