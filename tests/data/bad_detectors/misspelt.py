"""Implements a hook that does not exist."""

from __future__ import annotations

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_device(config: PluginConfig) -> Detection:
    return Detection.undetected("never called")
