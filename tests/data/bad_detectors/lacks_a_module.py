"""Needs a module that is not there."""

from __future__ import annotations

import nothing_of_that_name  # type: ignore[import-not-found]

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    return Detection.undetected(nothing_of_that_name.reason)
