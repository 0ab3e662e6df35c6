"""Asks for an argument that the hook does not have."""

from __future__ import annotations

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(context: PluginConfig) -> Detection:
    return Detection.undetected(str(context))
