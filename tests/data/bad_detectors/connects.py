"""Calls home."""

from __future__ import annotations

import socket

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    socket.create_connection(("127.0.0.1", int(str(config.get("port", 9)))), timeout=2).close()
    return Detection.undetected("called home")
