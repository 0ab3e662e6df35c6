"""Finds one CPU."""

from __future__ import annotations

from rma_core import Detection, Device, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    return Detection.healthy([Device(id="cpu", kind="cpu", name="a good CPU", attributes={"cores": 4})])
