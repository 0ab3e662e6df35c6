"""The files of a folder that are detectors: executables that print JSON, and JSON files."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from rma_core.errors import SettingProblem
from rma_core.own_files import others_can_change

if TYPE_CHECKING:
    from pathlib import Path

#: Where a detector that is a file finds its path in its configuration.
PATH = "path"
#: What runs them.
MODULE = "rma_core.builtin.file_detector"
#: In place of a distribution's name.
SHIPPED_BY = "file"
#: More files than this are no folder of detectors.
MOST_FILES = 64

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


class DetectorFile(NamedTuple):
    """One file: the detector's name, where it is, and why it cannot be one."""

    name: str
    path: str
    problem: str = ""


def listed(folder: Path) -> list[DetectorFile]:
    """Return the detectors of a folder by name, but for hidden files. Raises SettingProblem."""
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        loose = others_can_change(folder)
    except OSError as error:
        hints = ("`detectors` in your settings, or RMA_DETECTORS, names the folder",)
        raise SettingProblem(f"the folder of detectors {folder}: {error.strerror}", hints=hints) from None
    if len(paths) > MOST_FILES:
        raise SettingProblem(
            f"the folder of detectors {folder} has {len(paths)} files, and at most {MOST_FILES} may be"
        )
    return [_detector(path, loose) for path in paths]


def _detector(path: Path, folder_problem: str) -> DetectorFile:
    name = path.stem.lower()
    problem = folder_problem
    try:
        problem = problem or others_can_change(path) or _form(path)
    except OSError as error:
        problem = f"{path.name} cannot be looked at: {error.strerror}"
    if not _NAME.fullmatch(name):
        problem = f"{path.name} is no name of a detector: use a-z, 0-9, - and _"
    return DetectorFile(name[:63], str(path.absolute()), problem)


def _form(path: Path) -> str:
    if not path.is_file():
        return f"{path.name} is no file"
    if path.suffix.lower() != ".json" and not os.access(path, os.X_OK):
        return f"{path.name} is neither executable (chmod +x) nor called .json"
    return ""
