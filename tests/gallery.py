"""The gallery of machines: each replayed, given its tier, and offered the services in the repository's catalog.

``NAME.json`` in ``tests/data/machines`` is a hardware report. ``NAME.toml`` is what a machine says of itself, from
which every detector makes its part of the report anew: so the table moves with them. ``python -m tests.gallery`` writes
the table, TIERS.md.
"""

from __future__ import annotations

import json
import tempfile
import tomllib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

import rma_detect_amd
import rma_detect_apple
import rma_detect_intel
from rma_coordinator.domain.placement import place
from rma_core import PolicyInput
from rma_core.builtin import host_detector
from rma_core.builtin.cpu_facts import CpuFacts
from rma_core.builtin.host_storage import Storage
from rma_core.builtin.limits import CgroupLimits
from rma_core.builtin.threshold import ThresholdPolicy
from rma_core.catalog import load_folder
from rma_core.detection import Observation, assemble
from rma_core.model_catalog import ModelEntry
from rma_core.models.hardware import read_reports
from rma_core.models.sizes import human
from rma_core.models.worker import RuntimeReport
from tests import nvml
from tests.machine_files import lay_out, own_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rma_core import Detection, Device, HardwareReport, TierDecision

HERE = Path(__file__).parent
MACHINES = HERE / "data" / "machines"
TABLE = MACHINES / "TIERS.md"
NAMES = sorted(path.stem for path in MACHINES.iterdir() if path.suffix in (".json", ".toml"))
GB, GIB = 10**9, 2**30
#: What would end a cell.
BAR = r"\|"

#: A pool that wants a copy of everything, and has language models of five sizes.
CATALOG = tuple(
    msgspec.structs.replace(entry, wanted=max(1, entry.wanted)) for entry in load_folder(HERE.parent / "containers")
)
MODELS = tuple(
    ModelEntry(name=name, sha256="0" * 64, size_bytes=int(gigabytes * GB), licence="Apache-2.0")
    for name, gigabytes in (("0.5b", 0.4), ("3b", 2), ("8b", 4.9), ("32b", 20), ("70b", 43))
)
#: Every owner here has Docker, and lets services run as plain processes besides.
RUNTIMES = (
    RuntimeReport(name="docker", isolated=True, state="healthy"),
    RuntimeReport(name="process", isolated=False, state="healthy"),
)
HEAD = """# What each machine of the gallery gets

Written by `python -m tests.gallery`; a test compares. A line that changes is a machine that a policy, a detector or
placement has moved: look whether its owner would agree. Services are what the machine gets alone in a pool that wants
all of the catalog in `containers/` and language models of five sizes, with Docker and plain processes; those with a
star compute on the GPU.

| machine | tier and why | GPUs and NPUs | services |
| --- | --- | --- | --- |
"""


class Placed(NamedTuple):
    """A machine, and what becomes of it."""

    report: HardwareReport
    decision: TierDecision
    services: tuple[str, ...]


def recorded(name: str) -> dict[str, Any]:
    """Return what a machine in TOML says of itself; nothing for one that is a report."""
    path = MACHINES / f"{name}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def placed(name: str, library: Callable[[], Path]) -> Placed:
    """Replay a machine; ``library`` gives the folder with the stand-in for NVML where that is needed."""
    report = report_of(name, library)
    decision = ThresholdPolicy().decide(PolicyInput(report=report))
    placement = place(CATALOG, report, decision.tier, models=MODELS, pool={}, runtimes=RUNTIMES)
    return Placed(report, decision, tuple(f"{one.lane}{'*' * one.requires_gpu}" for one in placement.assignments))


def report_of(name: str, library: Callable[[], Path]) -> HardwareReport:
    """Return a machine's hardware report, made by every detector where it is more than a report."""
    facts = recorded(name)
    if not facts:
        (report,) = read_reports(json.loads((MACHINES / f"{name}.json").read_text()), subject=name)
        return report
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        root.mkdir()
        return assemble(
            Observation(detector=detector, distribution=f"rma-{detector}", version="0.1.0", detection=found)
            for detector, found in detected(facts, root, library)
        )


def detected(facts: dict[str, Any], root: Path, library: Callable[[], Path]) -> Iterable[tuple[str, Detection]]:
    """Let every detector look at one machine."""
    texts = [(HERE / "data" / kind / f"{facts[kind]}.txt").read_text() for kind in ("amd", "intel") if kind in facts]
    for text in (*texts, facts.get("files", "")):
        lay_out(text, root)
    own = {node: size for text in texts for node, size in own_memory(text).items()}

    def asked(node: Path) -> bytes:
        size = own[node.relative_to(root).as_posix()]
        return b"\1".ljust(16, b"\0") + rma_detect_intel.REGION.pack(1, 0, 0, size).ljust(88, b"\0")

    yield "host", host(facts, root)
    yield "amd", rma_detect_amd.detect(root, allowed=Path.exists)
    yield "apple", apple(facts)
    yield "intel", rma_detect_intel.detect(root, allowed=Path.exists, ask=asked)
    if "nvidia" in facts:
        settings = {f"FAKE_NVML_{name}": str(value) for name, value in facts["nvidia"].items()}
        found, _ = nvml.run(root, library(), FAKE_MEMORY_BYTES=str(round(facts["memory_gib"] * GIB)), **settings)
        yield "nvidia", found


def host(facts: dict[str, Any], root: Path) -> Detection:
    """Let the host detector look at a machine."""
    memory = round(facts["memory_gib"] * GIB)
    readings = host_detector.Readings(
        system=facts["system"],
        kernel=facts.get("kernel", ""),
        machine=facts["machine"],
        os_version=facts["os_version"],
        logical_cpus=facts["logical_cpus"],
        physical_cores=facts["cores"],
        memory_bytes=memory,
        available_bytes=memory,
        cpu=CpuFacts(name=facts["cpu"], hypervisor=facts.get("virtual", False)),
    )
    granted = facts.get("granted", {})
    limits = CgroupLimits(
        cpus=granted.get("cpus"), memory_bytes=round(granted["memory_gib"] * GIB) if "memory_gib" in granted else None
    )
    free = facts["free_gb"] * GB
    return host_detector.detect(readings, limits, root, storage=Storage("docker", free, 2 * free, "ext4"))


def apple(facts: dict[str, Any]) -> Detection:
    """Let the Apple detector look at a machine."""
    if "apple" not in facts:
        return rma_detect_apple.detect(facts["system"])
    profile, sysctl = (HERE / "data" / "apple" / f"{facts['apple']}.{kind}" for kind in ("json", "sysctl"))
    return rma_detect_apple.describe(profile.read_text(), rma_detect_apple.parse_sysctl(sysctl.read_text()))


def row(name: str, found: Placed) -> str:
    """Return a machine's line of the table."""
    cells = (name, found.decision.reason, accelerators(found.report.devices), ", ".join(found.services))
    return f"| {' | '.join(cell.replace('|', BAR) or 'none' for cell in cells)} |"


def accelerators(devices: Iterable[Device]) -> str:
    """Return GPUs and NPUs in words, those that are alike once."""
    words = Counter(
        ", ".join(
            filter(
                None,
                (
                    device.name,
                    device.api or "no API",
                    human(device.memory_bytes) if device.memory_bytes else "",
                    "of the system's memory" if device.attributes.get("unified_memory") else "",
                    "unhealthy" if device.health != "healthy" else "",
                ),
            )
        )
        for device in devices
        if device.kind in ("gpu", "npu")
    )
    return "; ".join(f"{count} x {text}" if count > 1 else text for text, count in words.items())


def rows() -> dict[str, str]:
    """Return the lines of the table as it is checked in, by machine."""
    lines = (line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| "))
    return {line.split(" | ")[0].removeprefix("| "): line for line in list(lines)[2:]}


def main() -> None:
    """Write the table."""
    with tempfile.TemporaryDirectory() as folder:
        library = nvml.build(Path(folder))
        lines = [row(name, placed(name, lambda: library)) for name in NAMES]
    TABLE.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
