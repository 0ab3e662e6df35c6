"""Is a coroutine."""

from __future__ import annotations

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
async def rma_detect_devices(config: PluginConfig) -> Detection:
    return Detection.undetected("never awaited")
