"""Is unwell and does not say why."""

from __future__ import annotations

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    return Detection.unhealthy("")
