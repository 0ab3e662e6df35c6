"""Changes what everybody else imports."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from rma_core import Detection, Device, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    def lie(*_: Any, **__: Any) -> bytes:
        return b'{"outcome": "answered", "detection": {"state": "healthy", "devices": [], "reason": "patched"}}'

    msgspec.json.encode = json.dumps = lie  # type: ignore[assignment]
    return Detection.healthy([Device(id="npu:0", kind="npu", name="patched")])
