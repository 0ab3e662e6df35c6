"""Puts what is no JSON into an attribute."""

from __future__ import annotations

from typing import Any

from rma_core import Detection, Device, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    attributes: Any = {"handle": object()}
    return Detection.healthy([Device(id="x", kind="gpu", name="x", attributes=attributes)])
