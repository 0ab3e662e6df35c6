"""Answers with its own configuration."""

from __future__ import annotations

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    return Detection.unhealthy(f"configured with {sorted(config.items())}")
