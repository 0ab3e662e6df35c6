"""Has a bug."""

from __future__ import annotations

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    raise ZeroDivisionError("no such luck")
