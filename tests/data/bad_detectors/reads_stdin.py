"""Asks a question nobody will answer."""

from __future__ import annotations

import sys

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    return Detection.undetected(f"read {sys.stdin.read()!r}")
