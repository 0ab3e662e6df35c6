"""Finds the device that `works` finds, and one of its own."""

from __future__ import annotations

from rma_core import Detection, Device, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    devices = [Device(id=i, kind="cpu", name="another CPU") for i in ("cpu", "own")]
    return Detection.healthy(devices)
