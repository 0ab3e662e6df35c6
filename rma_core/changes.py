"""What differs between two looks at one machine, in words; what changes by itself does not count."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rma_core.models.hardware import Device, HardwareReport, ProbeReport

#: Attributes that may change by themselves begin with one of these.
CHANGING = ("available_", "free_")
#: Free room counts as changed when it differs by this share.
ROOM_SHARE = 0.1
#: Changes that are said one by one.
MOST_SAID = 8


def changes(old: HardwareReport, new: HardwareReport) -> list[str]:
    """Return what became of devices and detectors, as sentences for a log; empty where nothing did."""
    found = [*_of_devices(old, new), *_of_detectors(old, new)]
    more = len(found) - MOST_SAID
    return [*found[:MOST_SAID], f"and {more} more"] if more > 0 else found


def worse(old: HardwareReport, new: HardwareReport) -> bool:
    """Whether a device that was well is gone or unwell, or a detector fails that did not."""
    well = {device.id for device in new.devices if device.health != "unhealthy"}
    if any(device.id not in well for device in old.devices if device.health != "unhealthy"):
        return True
    failing = {probe.detector for probe in old.probes if probe.state == "unhealthy"}
    return any(probe.state == "unhealthy" and probe.detector not in failing for probe in new.probes)


def has_trouble(report: HardwareReport) -> bool:
    """Whether something is there that does not work, and might again."""
    return any(one.state == "unhealthy" for one in report.probes) or any(
        device.health == "unhealthy" for device in report.devices
    )


def steady(device: Device) -> dict[str, Any]:
    """Return a device without what may change by itself."""
    plain: dict[str, Any] = msgspec.to_builtins(device)
    if device.kind == "storage":
        plain.pop("memory_bytes", None)
    facts = plain.get("attributes", {})
    plain["attributes"] = {name: value for name, value in facts.items() if not name.startswith(CHANGING)}
    return plain


def _of_devices(old: HardwareReport, new: HardwareReport) -> Iterator[str]:
    before = {device.id: device for device in old.devices}
    after = {device.id: device for device in new.devices}
    for name in [*before, *(name for name in after if name not in before)]:
        was, now = before.get(name), after.get(name)
        if now is None:
            yield f"{name} has vanished"
        elif was is None:
            yield f"{name} is there ({now.name})"
        elif was.health != now.health:
            yield f"{name} is {now.health}" + (f": {now.reason}" if now.reason else "")
        elif steady(was) != steady(now) or _room(was, now):
            yield f"{name} is another"


def _room(was: Device, now: Device) -> bool:
    """Whether the free room of a storage is another, by more than comes and goes."""
    before, after = was.memory_bytes or 0, now.memory_bytes or 0
    return now.kind == "storage" and abs(after - before) > ROOM_SHARE * max(before, after)


def _of_detectors(old: HardwareReport, new: HardwareReport) -> Iterator[str]:
    before = {probe.detector: probe for probe in old.probes}
    for probe in new.probes:
        was = before.pop(probe.detector, None)
        if was is None or _said(was) != _said(probe):
            yield f"detector {probe.detector} says {probe.state}" + (f": {probe.reason}" if probe.reason else "")
    yield from (f"detector {name} is gone" for name in before)


def _said(probe: ProbeReport) -> tuple[str, str, str]:
    """Return what a detector says, but for numbers: they count seconds and tries."""
    return probe.version, probe.state, re.sub(r"\d+", "0", probe.reason)
