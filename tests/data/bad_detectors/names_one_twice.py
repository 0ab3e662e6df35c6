"""Gives two devices one id."""

from __future__ import annotations

from rma_core import Detection, Device, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    names = ("first", "second")
    return Detection.healthy([Device(id="gpu:0", kind="gpu", name=name) for name in names])
