"""Is killed as the kernel does it when memory runs out."""

from __future__ import annotations

import os
import signal

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    os.kill(os.getpid(), signal.SIGKILL)
    return Detection.undetected("still alive")
