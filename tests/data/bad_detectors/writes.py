"""Leaves a file in the home folder of whoever runs it."""

from __future__ import annotations

from pathlib import Path

from rma_core import Detection, PluginConfig, hookimpl


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    Path.home().joinpath("was-here").write_text("x", encoding="utf-8")
    return Detection.undetected("wrote a file")
