"""Never answers and holds the interpreter's lock, as a wedged driver does."""

from __future__ import annotations

import ctypes

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    ctypes.PyDLL(None).sleep(600)
    return Detection.undetected("late")
