"""What `rma doctor` looks at: everything that would keep this machine from working, each with what to do."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING, Literal

import msgspec

from rma_core.detection import observe
from rma_core.errors import RMAError
from rma_core.interfaces import PolicyInput
from rma_core.models.sizes import human
from rma_core.record import recording

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rma_core.detection import Observation
    from rma_core.host import Plugins
    from rma_core.interfaces import ContainerRuntime, RuntimeHealth
    from rma_core.settings import AgentSettings

#: Less free space than this and the next image will not fit.
LEAST_FREE_BYTES = 10 * 10**9
#: Seconds an engine may take to answer.
PROBE_S = 15.0


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at; ``advice`` says what to do about it, where something is to be done."""

    level: Literal["ok", "note", "warning", "problem"]
    subject: str
    message: str
    advice: str = ""


async def examine(settings: AgentSettings, plugins: Plugins) -> list[Finding]:
    """Look at everything and return what was found, in the order in which things depend on each other."""
    seen = await observe(plugins, config=settings.plugins, deadline_s=settings.detect_deadline_s)
    runtimes = plugins.runtimes(runtime_tables(settings))
    return [
        *_home(settings.home_path),
        *_plugins(plugins),
        *_detectors(seen),
        *_tier(plugins, seen),
        *await _runtimes(settings, runtimes),
        *await _coordinator(settings),
    ]


def runtime_tables(settings: AgentSettings) -> dict[str, dict[str, object]]:
    """Return the plugins' tables, with what the process runtime must know of the agent put into its own."""
    own = {"home": str(settings.home_path), "sources": list(settings.service_sources)}
    return {**settings.plugins, "process": {**own, **settings.plugins.get("process", {})}}


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
            level: Literal["note", "problem"] = "note" if report.state in ("blocked", "unapproved") else "problem"
            shipped = f"{report.name} ({report.distribution} {report.version})"
            yield Finding(
                level=level,
                subject=f"plugin {shipped}",
                message=f"{report.state}: {report.reason}",
                advice=_plugin_advice(report.state, report.distribution),
            )


def _plugin_advice(state: str, distribution: str) -> str:
    if state == "blocked":
        return "your settings block it"
    if state == "unapproved":
        return "approve it in your settings when you trust it"
    return f"update or remove {distribution}: pip install -U {distribution}"


def _detectors(seen: tuple[Observation, ...]) -> Iterable[Finding]:
    for one in seen:
        state, reason = one.detection.state, one.detection.reason
        level: Literal["ok", "note", "problem"] = {"healthy": "ok", "undetected": "note"}.get(state, "problem")  # type: ignore[assignment]
        devices = f"{len(one.detection.devices)} devices" if one.detection.devices else ""
        yield Finding(
            level=level, subject=f"detector {one.detector}", message="; ".join(filter(None, (devices, reason))) or state
        )


def _tier(plugins: Plugins, seen: tuple[Observation, ...]) -> Iterable[Finding]:
    from datetime import UTC, datetime

    policy = plugins.policies().get("threshold")
    if policy is None:
        return
    decision = policy.decide(PolicyInput(report=recording(seen, at=datetime.now(UTC)).report))
    level: Literal["ok", "warning"] = "ok" if decision.tier else "warning"
    yield Finding(level=level, subject="tier", message=f"by the default policy: {decision.reason}")


async def _runtimes(settings: AgentSettings, runtimes: dict[str, ContainerRuntime]) -> list[Finding]:
    findings, usable = [], False
    for name in settings.runtimes:
        if name not in runtimes:
            advice = f"pip install rma-runtime-{name}, or take it out of `runtimes`"
            findings.append(Finding(level="note", subject=f"runtime {name}", message="is not installed", advice=advice))
            continue
        health = await _probe(runtimes[name])
        usable = usable or health.state == "healthy"
        level: Literal["ok", "note", "problem"] = {"healthy": "ok", "undetected": "note"}.get(health.state, "problem")  # type: ignore[assignment]
        what = "; ".join(filter(None, (health.version, health.reason, ", ".join(health.features)))) or health.state
        findings.append(Finding(level=level, subject=f"runtime {name}", message=what))
    if not usable:
        advice = "install Docker or Podman; on your own machine `process` in `runtimes` runs services without isolation"
        findings.append(
            Finding(level="problem", subject="runtimes", message="nothing here can run a service", advice=advice)
        )
    return findings


async def _probe(runtime: ContainerRuntime) -> RuntimeHealth:
    from rma_core.interfaces import RuntimeHealth

    try:
        return await asyncio.wait_for(runtime.probe(), PROBE_S)
    except TimeoutError:
        return RuntimeHealth(state="unhealthy", reason=f"no answer within {PROBE_S:.0f} s")
    finally:
        await runtime.aclose()


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
