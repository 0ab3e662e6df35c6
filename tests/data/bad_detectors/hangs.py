"""Never answers, and ignores polite requests to end."""

from __future__ import annotations

import signal
import time

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("waiting for the driver", flush=True)  # noqa: T201 - what is printed is the test
    while True:
        time.sleep(60)
