"""Takes more and more memory."""

from __future__ import annotations

import itertools

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    kept = [bytearray(16 * 2**20) for _ in itertools.repeat(None)]
    return Detection.undetected(f"took {len(kept)} pieces")
