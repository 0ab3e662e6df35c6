"""Forks, answers, and leaves the other one holding every pipe."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    child = os.fork()
    if not child:
        time.sleep(600)
    Path(str(config["pid_file"])).write_text(str(child), encoding="utf-8")
    return Detection.undetected("left a process behind")
