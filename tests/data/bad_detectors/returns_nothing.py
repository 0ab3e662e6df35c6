"""Forgets to return."""

from __future__ import annotations

from rma_core import PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> None:
    return None
