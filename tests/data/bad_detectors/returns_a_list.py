"""Returns devices without saying how they are."""

from __future__ import annotations

from rma_core import Device, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> list[Device]:
    return [Device(id="cpu", kind="cpu", name="CPU")]
