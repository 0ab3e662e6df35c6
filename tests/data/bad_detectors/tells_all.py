"""Says what it can see of its surroundings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rma_core import Detection, Device, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    places: Any = {"cwd": str(Path.cwd()), "environment": sorted(os.environ)}
    return Detection.healthy(
        [Device(id="x", kind="npu", name="x", attributes=places)], reason=f"run by alice in {Path.home()}/x"
    )
