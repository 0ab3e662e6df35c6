"""Puts `rma_service` into the wheel of each service; an editable installation reads it where it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).resolve().parent


class Shared(BuildHookInterface[Any]):
    """A build hook: ``[tool.hatch.build.targets.wheel.hooks.custom]`` with the path of this file."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the package, unless the installation is editable: a copy would hide what is written later."""
        if version == "standard":
            build_data["force_include"][str(HERE / "rma_service")] = "rma_service"
