"""What only the processor itself says: its instruction sets where the system has no list of them (Windows).

py-cpuinfo asks it, which takes over a second. So it runs in a process of its own under a timeout, once per
processor: the answer is kept in the user's cache folder and a machine does not change its processor while it runs.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from rma_core import bare
from rma_core.builtin.cpu_facts import CpuFacts, instruction_sets

#: Detection has 10 s for everything; without an answer the processor is reported without instruction sets.
TIMEOUT_S = 5.0


def read(folder: Path | None = None) -> CpuFacts:
    """Return name, maker and instruction sets of the processor; whatever cannot be had stays empty."""
    key = " ".join((platform.machine(), platform.processor(), os.environ.get("PROCESSOR_REVISION", "")))
    path = (folder or cache_folder()) / "cpuid.json"
    kept = _kept(path, key)
    if kept is not None:
        return _facts(kept)
    answer = _ask()
    if answer:
        _keep(path, key, answer)
    return _facts(answer)


def cache_folder() -> Path:
    """Return the folder where this user's programs keep what can be made again."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path.home() raises for a user without a home
    local, cache = os.environ.get("LOCALAPPDATA"), os.environ.get("XDG_CACHE_HOME")
    if platform.system() == "Windows":
        return Path(local or home / "AppData" / "Local") / "rma" / "cache"
    return Path(cache or home / ".cache") / "rma"


def windows_board() -> str:
    """Return who made the machine and what they call it, as Windows keeps it from the firmware."""
    if sys.platform == "win32":
        import winreg

        key = r"HARDWARE\DESCRIPTION\System\BIOS"
        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as bios:
                words = [winreg.QueryValueEx(bios, name)[0] for name in ("SystemManufacturer", "SystemProductName")]
        except OSError:
            return ""
        return " ".join(map(str, words))[:200]
    else:  # noqa: RET505 - mypy knows platforms by their branches
        return ""


def _ask() -> dict[str, object]:
    command = bare.module("cpuinfo", "--json")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        answer = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _kept(path: Path, key: str) -> dict[str, object] | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = isinstance(kept, dict) and kept.get("key") == key and isinstance(kept.get("answer"), dict)
    return kept["answer"] if fits else None


def _keep(path: Path, key: str, answer: dict[str, object]) -> None:
    """Keep an answer; a folder that cannot be written to costs only the second it saves."""
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"key": key, "answer": answer}), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return


def _facts(answer: dict[str, object]) -> CpuFacts:
    flags = answer.get("flags")
    words = [str(word) for word in flags] if isinstance(flags, list) else []
    name = answer.get("brand_raw") or platform.processor()
    vendor = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}.get(str(answer.get("vendor_id_raw", "")), "")
    return CpuFacts(
        name=str(name)[:200],
        vendor=vendor,
        instruction_sets=instruction_sets(words),
        hypervisor="hypervisor" in {word.lower() for word in words},
    )
