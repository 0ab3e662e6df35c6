"""Prints far more than a pipe holds, on both streams, and answers well."""

from __future__ import annotations

import os
import sys

from rma_core import Detection, Device, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    for _ in range(256):
        print("o" * 32768)  # noqa: T201 - what is printed is the test
        print("e" * 32768, file=sys.stderr)  # noqa: T201 - what is printed is the test
    os.system("echo from a program it runs")
    return Detection.healthy([Device(id="loud", kind="npu", name="loud")])
