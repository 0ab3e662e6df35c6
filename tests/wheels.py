"""Wheels of plugins, made by hand: what pip installs, without a build."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

#: A detector that finds one board.
BOARD = """
from rma_core import Detection, Device, hookimpl


@hookimpl
def rma_detect_devices(config):
    return Detection.healthy([Device(id="npu:0", kind="npu", name={name!r})])
"""


def wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    *,
    modules: Mapping[str, str] | None = None,
    points: Mapping[str, Mapping[str, str]] | None = None,
    needs: Sequence[str] = (),
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Write a pure wheel: ``modules`` by name and source, entry ``points`` by group, and other files by path."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    files = {f"{module}.py": text for module, text in (modules or {}).items()} | dict(extra or {})
    requires = "".join(f"Requires-Dist: {need}\n" for need in needs)
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: odd\n{requires}"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    lines = [
        line
        for group, found in (points or {}).items()
        for line in (f"[{group}]", *(f"{point} = {value}" for point, value in found.items()))
    ]
    files[f"{info}/entry_points.txt"] = "\n".join(lines) + "\n"
    record = [f"{path},sha256={_digest(text)},{len(text.encode())}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    made = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return made


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def detector(folder: Path, board: str = "Odd board", version: str = "1.0", **more: object) -> Path:
    """Write the wheel of ``rma-detect-odd``, which finds ``board``."""
    return wheel(
        folder,
        "rma-detect-odd",
        version,
        modules={"rma_detect_odd": BOARD.format(name=board)},
        points={"rma.detectors": {"odd": "rma_detect_odd"}},
        **more,  # type: ignore[arg-type]
    )
