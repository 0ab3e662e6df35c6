"""Leaves a thread that would keep an interpreter from ending."""

from __future__ import annotations

import threading
import time

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    threading.Thread(target=time.sleep, args=(600,)).start()
    return Detection.undetected("left a thread")
