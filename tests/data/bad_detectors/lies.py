"""Claims the devices of another detector."""

from __future__ import annotations

from rma_core import Detection, Device, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    return Detection.healthy([Device(id="memory", kind="memory", name="a million gigabytes", memory_bytes=2**60)])
