"""Crashes in native code."""

from __future__ import annotations

import ctypes

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    ctypes.string_at(0)
    return Detection.undetected("still alive")
