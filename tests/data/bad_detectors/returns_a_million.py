"""Finds a million devices."""

from __future__ import annotations

from rma_core import Detection, Device, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    return Detection.healthy([Device(id=f"d{n}", kind="gpu", name="GPU") for n in range(1_000_000)])
