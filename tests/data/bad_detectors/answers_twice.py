"""Forks, and both of them return."""

from __future__ import annotations

import os

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    os.fork()
    return Detection.undetected("said by two")
