"""Ends its process with a code and last words."""

from __future__ import annotations

import os
import sys

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    print("licence expired", file=sys.stderr, flush=True)  # noqa: T201 - what is printed is the test
    os._exit(3)
