"""Knows why it cannot look."""

from __future__ import annotations

from rma_core import Detection, DetectionError, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    raise DetectionError("the driver is too old: install 535 or newer")
