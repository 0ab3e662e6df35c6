"""Fills fields with the wrong things; records do not check that when they are made."""

from __future__ import annotations

from typing import Any

from rma_core import Detection, Device, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    devices: Any = [Device(id=5, kind="toaster", name="")]  # type: ignore[arg-type]
    return Detection.healthy(devices)
