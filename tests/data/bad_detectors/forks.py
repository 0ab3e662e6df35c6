"""Forks and answers; the other one stays, and holds every pipe."""

from __future__ import annotations

import os
import time

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    if not os.fork():
        time.sleep(600)
    return Detection.undetected("forked")
