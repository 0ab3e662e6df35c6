"""Ends its process as if all were well."""

from __future__ import annotations

import os

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    os._exit(0)
