"""Raises what cannot even be shown."""

from __future__ import annotations

from rma_core import Detection, PluginConfig, hookimpl


class UnshowableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@hookimpl
def rma_detect_devices(config: PluginConfig) -> Detection:
    raise UnshowableError
