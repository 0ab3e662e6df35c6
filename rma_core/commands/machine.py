"""Commands about this machine: detect, doctor."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from rma_core.commands import common
from rma_core.errors import UsageProblem
from rma_core.models.hardware import HardwareReport
from rma_core.models.sizes import human
from rma_core.models.strict import convert
from rma_core.settings import AgentSettings, CoordinatorSettings, load_settings

if TYPE_CHECKING:
    from rich.console import Console

    from rma_core.detection import Observation
    from rma_core.models.hardware import Device

#: An agent's look has ended within this: each detector has its deadline, and what got worse is looked at twice.
RESCAN_S = 700.0
RESCAN_LOOK_S = 0.25
STATES = {"healthy": "● healthy", "undetected": "○ nothing there", "unhealthy": "▲ unhealthy"}


def settings_of(home: str | None, **flags: Any) -> AgentSettings:
    """Return the agent's settings for a command."""
    settings = load_settings(AgentSettings, flags={"home": home, **flags}, known=(CoordinatorSettings,))
    if settings.trace_hooks:
        common.set_up_logging("info", as_json=settings.log_json)
    return settings


def agent_settings(settings: AgentSettings) -> AgentSettings:
    """Return the settings with the agent's own folder: the one that `rma up` keeps inside its folder, where it does."""
    inner = settings.home_path / "agent"
    if (inner / "worker.json").exists() and not (settings.home_path / "worker.json").exists():
        return msgspec.structs.replace(settings, home=str(inner))
    return settings


def agent_home(settings: AgentSettings) -> Path:
    """Return the folder of the agent: the state folder itself, or the one `rma up` keeps inside it."""
    return agent_settings(settings).home_path


async def _observe(settings: AgentSettings) -> tuple[Observation, ...]:
    from rma_core.detection import observe, without
    from rma_core.host import Plugins

    plugins = Plugins.discover(kinds=["detector"], **settings.plugin_rules())
    seen = await observe(plugins, config=settings.plugins, deadline_s=settings.detect_deadline_s)
    return without(seen, settings.exclude_devices)


async def _rescan(home: Path) -> HardwareReport:
    """Let the agent of a state folder look at its hardware; return what it goes by afterwards."""
    from rma_core.agent import control

    since = (await control.ask(home, "look"))["rounds"]
    with common.console(err=True).status("the agent looks"):
        async with asyncio.timeout(RESCAN_S):
            while True:
                found = (await control.ask(home, "look", since=since))["report"]
                if found is not None:
                    return convert(found, HardwareReport, subject="the agent's report")
                await asyncio.sleep(RESCAN_LOOK_S)


@click.command()
@click.option(
    "--record",
    metavar="FILE",
    help="Write what the detectors saw, without serial numbers and secrets, for a bug report.",
)
@click.option("--replay", metavar="FILE", help="Show a recording instead of this machine.")
@click.option("--rescan", is_flag=True, help="Let the running agent look now, and tell its pool what has changed.")
@common.home_option
@common.json_option
def detect(record: str | None, replay: str | None, rescan: bool, home: str | None, as_json: bool) -> None:
    """Find out what this machine's hardware can do."""
    from rma_core import record as records
    from rma_core.detection import assemble

    if bool(record) + bool(replay) + rescan > 1:
        raise UsageProblem("--record, --replay and --rescan exclude each other")
    settings = settings_of(home)
    if rescan:
        report = common.run_async(_rescan(agent_home(settings)))
    elif replay or settings.fake_devices:
        report = records.load_report(Path(replay or settings.fake_devices))
    else:
        seen = common.run_async(_observe(settings))
        report = assemble(seen)
        if record:
            records.save(Path(record), records.recording(seen, at=datetime.now(UTC)))
            common.say(f"written to {record}")
    common.show(report, as_json, lambda out: print_report(out, report))


def print_report(out: Console, report: HardwareReport) -> None:
    """Print a machine: the short form, its devices, and how each detector went."""
    short = report.capabilities
    gpu = " with ".join(filter(None, (short.gpu_type, short.gpu_memory))) or "no GPU"
    out.print(common.safe(f"{short.cpu_cores} cores, {short.ram} memory, {short.storage} free storage, {gpu}"))
    rows = [(d.kind, d.name, human(d.memory_bytes) if d.memory_bytes else "", _facts(d)) for d in report.devices]
    common.table(("device", "name", "size", "facts"), rows, empty="No devices.")(out)
    probes = [(p.detector, STATES[p.state], f"{p.seconds:.2f} s", p.reason) for p in report.probes]
    common.table(("detector", "state", "took", "why"), probes, empty="No detectors ran.")(out)


def _facts(device: Device) -> str:
    sick = [f"UNHEALTHY: {device.reason}"] if device.health == "unhealthy" else []
    return ", ".join(
        sick + [f"{name} {_value(value)}" for name, value in device.attributes.items() if value not in (None, "")]
    )


def _value(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


@click.command()
@common.home_option
@common.json_option
@click.pass_context
def doctor(ctx: click.Context, home: str | None, as_json: bool) -> None:
    """Look for everything that would keep this machine from working, each with what to do."""
    from rma_core.diagnosis import examine
    from rma_core.host import Plugins

    common.shown_in_a_table()
    settings = agent_settings(settings_of(home))
    findings = common.run_async(examine(settings, Plugins.discover(**settings.plugin_rules())))
    marks = {"ok": "✓", "note": "·", "warning": "!", "problem": "✗"}
    rows = [(marks[f.level], f.subject, f.message, f.advice) for f in findings]
    bad = sum(f.level == "problem" for f in findings)
    common.show(
        {"findings": [msgspec.to_builtins(f) for f in findings], "problems": bad},
        as_json,
        common.table(("", "about", "finding", "what to do"), rows, empty="Nothing to say."),
    )
    ctx.exit(1 if bad else 0)
