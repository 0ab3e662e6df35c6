"""Takes a while, as it was told."""

from __future__ import annotations

import time

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    time.sleep(float(str(config["seconds"])))
    return Detection.undetected("nothing, slowly")
