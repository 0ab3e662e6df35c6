"""Closes every file it did not open, as daemons do, and goes on."""

from __future__ import annotations

import os
import time

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    os.closerange(3, 256)
    time.sleep(60)
    return Detection.undetected("late")
