"""What `rma doctor` looks at: everything that would keep this machine from working, each with what to do."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING, Literal

import msgspec

from rma_core import confinement, policies_apart
from rma_core.agent.attach.nearby import find
from rma_core.agent.control import ask
from rma_core.agent.detecting import look
from rma_core.agent.start import plugin_tables
from rma_core.agent.status import AgentStatus
from rma_core.errors import RMAError
from rma_core.interfaces import PolicyInput
from rma_core.models.sizes import human
from rma_core.models.strict import convert

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rma_core.host import Plugins
    from rma_core.interfaces import ContainerRuntime, RuntimeHealth
    from rma_core.models.hardware import HardwareReport
    from rma_core.models.worker import PluginReport, RuntimeReport
    from rma_core.settings import AgentSettings

#: Less free space than this and the next image will not fit.
LEAST_FREE_BYTES = 10 * 10**9
#: Seconds an engine may take to answer.
PROBE_S = 15.0


#: For runtimes that cannot limit all that a container takes.
LOOSE_ADVICE = "as it is, this machine gets no images that its pool does not trust"

Level = Literal["ok", "note", "warning", "problem"]
#: How a detector's or runtime's state weighs: what is not there is no problem in itself.
LEVELS: dict[str, Level] = {"healthy": "ok", "undetected": "note", "unhealthy": "problem"}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at; ``advice`` says what to do about it, where something is to be done."""

    level: Level
    subject: str
    message: str
    advice: str = ""


async def examine(settings: AgentSettings, plugins: Plugins) -> list[Finding]:
    """Look at everything and return what was found, in the order in which things depend on each other."""
    report = await look(settings, plugins)
    async with policies_apart.started(plugins, settings.plugins):
        # How they stand is among the plugins.
        pass
    running = await running_agent(settings)
    runtimes = await _runtimes(settings, plugins) if running is None else list(_as_the_agent_says(running))
    return [
        *_home(settings.home_path),
        *_plugins(plugins),
        *_detectors(report),
        *_tier(settings, plugins, report),
        *runtimes,
        *await _model_servers(settings, running),
        *await _coordinator(settings),
    ]


async def running_agent(settings: AgentSettings) -> AgentStatus | None:
    """Return what the agent on this machine says of itself, if one runs."""
    try:
        return convert(await ask(settings.home_path, "status"), AgentStatus, subject="the agent's status")
    except RMAError:
        return None


def _as_the_agent_says(running: AgentStatus) -> Iterable[Finding]:
    """A running agent knows its runtimes best: it was started with settings that this command does not see."""
    yield Finding(level="ok", subject="agent", message=f"runs as {running.worker_id}, connection: {running.connection}")
    for runtime in running.runtimes:
        message = runtime.reason or runtime.version
        yield _of_runtime(runtime.name, runtime, message)
    for container in running.containers:
        level: Level = "ok" if container.state == "healthy" else "problem" if container.state == "failed" else "note"
        message = f"{container.state}: {container.reason}" if container.reason else container.state
        yield Finding(level=level, subject=f"service {container.service}", message=message)


async def _model_servers(settings: AgentSettings, running: AgentStatus | None) -> list[Finding]:
    """Say what runs here and could be attached; that it is not is the owner's choice, and no fault."""
    if not settings.find_model_servers:
        return []
    known = (running.coordinator, *running.attached) if running else (settings.coordinator_url, _pool_of(settings))
    return [
        Finding(
            level="note",
            subject="model server",
            message=f"{one.words()} is not shared",
            advice=f"to share it: rma agent --attach {one.url}",
        )
        for one in await find((*known, *settings.attach))
    ]


def _home(home: Path) -> Iterable[Finding]:
    place = home if home.exists() else home.parent
    free = shutil.disk_usage(place).free if place.exists() else 0
    if home.exists() and home.stat().st_mode & 0o077:
        yield Finding(
            level="problem", subject="state folder", message=f"others can read {home}", advice=f"chmod 700 {home}"
        )
    if free < LEAST_FREE_BYTES:
        message = f"{human(free)} are free where {home} is"
        yield Finding(level="warning", subject="disk", message=message, advice="free some space: images need gigabytes")
    else:
        yield Finding(level="ok", subject="disk", message=f"{human(free)} are free where {home} is")


def _plugins(plugins: Plugins) -> Iterable[Finding]:
    for report in plugins.reports():
        if report.state != "active":
            level: Level = "note" if report.state in ("blocked", "unapproved") else "problem"
            shipped = f"{report.name} ({report.distribution} {report.version})"
            yield Finding(
                level=level,
                subject=f"plugin {shipped}",
                message=f"{report.state}: {report.reason}",
                advice=_plugin_advice(report.state, report.distribution),
            )
        for words in report.deprecated:
            yield Finding(level="warning", subject=f"plugin {report.name}", message=words, advice=_update(report))


def _plugin_advice(state: str, distribution: str) -> str:
    if state in ("blocked", "unapproved"):
        # The reason says by what, and how that is changed.
        return "nothing, if you do not trust it"
    return f"update or remove {distribution}: pip install -U {distribution}"


def _update(report: PluginReport) -> str:
    return f"look for a newer {report.distribution} than {report.version}, or tell its author"


def _detectors(report: HardwareReport) -> Iterable[Finding]:
    bounds = confinement.available()
    words = bounds.words()
    yield Finding(level="ok" if bounds.files and bounds.network else "note", subject="detectors", message=words)
    for probe in report.probes:
        devices = f"{len(probe.devices)} devices" if probe.devices else ""
        message = "; ".join(filter(None, (devices, probe.reason))) or probe.state
        yield Finding(level=LEVELS[probe.state], subject=f"detector {probe.detector}", message=message)


def _tier(settings: AgentSettings, plugins: Plugins, report: HardwareReport) -> Iterable[Finding]:
    policy = plugins.policies(settings.plugins).get("threshold")
    if policy is None:
        return
    decision = policy.decide(PolicyInput(report=report))
    level: Level = "ok" if decision.tier else "warning"
    yield Finding(level=level, subject="tier", message=f"by the default policy: {decision.reason}")


async def _runtimes(settings: AgentSettings, plugins: Plugins) -> list[Finding]:
    runtimes = plugins.runtimes(plugin_tables(settings))
    findings, usable = [], False
    for name in settings.runtimes:
        if name not in runtimes:
            findings.append(Finding(level="note", subject=f"runtime {name}", message="no installed plugin drives it"))
            continue
        health = await _probe(runtimes[name])
        usable = usable or health.state == "healthy"
        what = "; ".join(filter(None, (health.version, health.reason, ", ".join(health.features)))) or health.state
        findings.append(_of_runtime(name, health, what))
    if not usable:
        advice = "install Docker or Podman; on your own machine `process` in `runtimes` runs services without isolation"
        findings.append(
            Finding(level="problem", subject="runtimes", message="nothing here can run a service", advice=advice)
        )
    return findings


def _of_runtime(name: str, health: RuntimeHealth | RuntimeReport, message: str) -> Finding:
    """Say how a runtime stands; one that cannot limit everything works, and is not given everything."""
    loose = health.state == "healthy" and bool(health.cannot_limit)
    return Finding(
        level="warning" if loose else LEVELS[health.state],
        subject=f"runtime {name}",
        message=message,
        advice=LOOSE_ADVICE if loose else "",
    )


async def _probe(runtime: ContainerRuntime) -> RuntimeHealth:
    from rma_core.interfaces import RuntimeHealth

    try:
        return await asyncio.wait_for(runtime.probe(), PROBE_S)
    except TimeoutError:
        return RuntimeHealth(state="unhealthy", reason=f"no answer within {PROBE_S:.0f} s")
    finally:
        await runtime.aclose()


def _pool_of(settings: AgentSettings) -> str:
    """Return the address of the pool that this machine has joined, an empty string for none."""
    from rma_core.agent.state import StateFolder

    try:
        record = StateFolder(settings.home_path).load_record() if settings.home_path.exists() else None
    except RMAError:
        return ""
    return record.coordinator_url if record else ""


async def _coordinator(settings: AgentSettings) -> list[Finding]:
    from rma_core.agent.state import StateFolder

    folder = StateFolder(settings.home_path)
    try:
        record = folder.load_record() if settings.home_path.exists() else None
    except RMAError as error:
        return [Finding(level="problem", subject="enrolment", message=error.message, advice="; ".join(error.hints))]
    if record is None:
        return [
            Finding(
                level="note",
                subject="enrolment",
                message="this machine has joined no pool",
                advice="rma join URL TOKEN",
            )
        ]
    return [await _reach(record.coordinator_url, record.certificate)]


async def _reach(url: str, certificate: str) -> Finding:
    from rma_core import http

    context = http.tls_context(certificate) if certificate else None
    async with http.open_client(url, context=context, timeout_s=PROBE_S) as client:
        try:
            answer = await client.get("/health")
        except http.HTTPError as error:
            problem = http.unreachable(url, error)
            return Finding(level="problem", subject="coordinator", message=problem.message, advice=problem.hints[0])
    if not answer.is_success:
        return Finding(
            level="problem",
            subject="coordinator",
            message=f"{url} answers {answer.status_code}",
            advice="is that the right address?",
        )
    return Finding(level="ok", subject="coordinator", message=f"{url} answers")
