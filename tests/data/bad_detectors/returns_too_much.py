"""Answers with more than a report may hold."""

from __future__ import annotations

from typing import Any

from rma_core import Detection, Device, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    text = "x" * 2000
    attributes: Any = {f"a{n}": text for n in range(60)}
    return Detection.healthy([Device(id=f"d{n}", kind="gpu", name="g", attributes=attributes) for n in range(100)])
