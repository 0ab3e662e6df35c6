"""The NVIDIA detector in a child, through pynvml and the loader, on the stand-in for NVML."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rma_core import Detection, Device
from rma_core.models.strict import decode, encode

DATA = Path(__file__).parent / "data" / "nvidia"
#: Seconds a child may take that should not hang at all.
PATIENCE_S = 60
#: The child writes its answer to a file, so that its stdout can be seen to stay empty.
CHILD = """
import os, pathlib, sys, types, psutil
from rma_core.models.strict import encode
import rma_detect_nvidia
if memory := int(os.environ.get("FAKE_MEMORY_BYTES", 0)):  # another machine's than the one of these tests
    psutil.virtual_memory = lambda: types.SimpleNamespace(total=memory, available=memory)
pathlib.Path(sys.argv[2]).write_bytes(encode(rma_detect_nvidia.detect(pathlib.Path(sys.argv[1]))))
"""


def build(folder: Path) -> Path:
    """Compile the stand-in as libnvidia-ml.so.1 into a folder, and return that."""
    name = "libnvidia-ml.so.1"
    flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
    subprocess.run(["gcc", *flags, str(DATA / "nvml_stand_in.c")], check=True, timeout=PATIENCE_S)
    return folder


def environment(folder: Path | None, **settings: str) -> dict[str, str]:
    """Return a child's environment, in which the loader finds what is in ``folder``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FAKE_", "LD_"))}
    path = {} if folder is None else {"LD_LIBRARY_PATH": str(folder)}
    return {**kept, "PATH": "/nonexistent", **path, **settings}


def run(root: Path, folder: Path | None, **settings: str) -> tuple[Detection, str]:
    """Run the detector in a child; return its answer and what it wrote to stderr."""
    answer = root.parent / "answer.json"
    command = [sys.executable, "-c", CHILD, str(root), str(answer)]
    done = subprocess.run(
        command, env=environment(folder, **settings), capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b""
    detection = decode(answer.read_bytes(), Detection, subject="answer")
    for device in detection.devices:
        assert decode(encode(device), Device, subject="device") == device
    return detection, done.stderr.decode()
