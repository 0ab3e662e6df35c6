"""Writes into the pipe that its answer takes."""

from __future__ import annotations

import contextlib
import os

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    for descriptor in range(3, 16):
        with contextlib.suppress(OSError):
            os.write(descriptor, b'{"outcome": 7}\n')
    return Detection.undetected("forged")
