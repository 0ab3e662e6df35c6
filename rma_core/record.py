"""Record and replay: what detectors saw on one machine, as a file that gives the same report on any other.

For tests, demos and bug reports. A recording names no host and no user (`rma_core.privacy` has seen to that when it
was observed), no serial number and no secret, and the UUIDs in it are made up: it is there to be passed on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rma_core.detection import Observation, assemble
from rma_core.errors import Problem, UsageProblem, ValidationProblem
from rma_core.models.hardware import (
    MAX_DEVICES,
    Capabilities,
    Device,
    DeviceApi,
    HardwareReport,
    summarize,
)
from rma_core.models.strict import convert, parse
from rma_core.privacy import hide_hardware

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

#: Counted up when the meaning of a recording changes; other versions are refused, never guessed at.
FORMAT: Literal[1] = 1
#: A larger file is no recording.
MAX_FILE_BYTES = 64 * 1024 * 1024


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """One round of detection: when, by which rma-core (its version), and what each detector saw."""

    format: Literal[1] = FORMAT
    rma: Annotated[str, Meta(max_length=100)]
    recorded_at: Annotated[str, Meta(max_length=40)]
    observations: Annotated[tuple[Observation, ...], Meta(max_length=64)]

    @property
    def report(self) -> HardwareReport:
        """The hardware report, as it was when this was recorded but for what tells the machine from others."""
        return assemble(self.observations)


def recording(observations: Sequence[Observation], *, at: datetime) -> Recording:
    """Return a recording of what `rma_core.detection.observe` gave, ``at`` this time."""
    from rma_core import __version__

    seen = hide_hardware(observations)
    return Recording(rma=__version__, recorded_at=at.isoformat(timespec="seconds"), observations=seen)


def save(path: Path, made: Recording) -> None:
    """Write a recording as one JSON document that people can read. Raises UsageProblem."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n")
    except OSError as error:
        raise UsageProblem(f"{path} cannot be written: {error.strerror or error}") from None


def load(path: Path) -> Recording:
    """Read what `save` wrote. Raises ValidationProblem, which names the file and everything wrong with it."""
    data = _read(path)
    if not isinstance(data, dict) or "observations" not in data:
        hints = ("make one with `rma detect --record FILE`",)
        raise ValidationProblem(str(path), [Problem("$", "is no recording")], hints=hints)
    if data.get("format") != FORMAT:
        what = f"is {data.get('format')!r}, and this rma-core reads {FORMAT}"
        raise ValidationProblem(str(path), [Problem("$.format", what)], hints=("replay it with the rma-core it names",))
    return convert(data, Recording, subject=str(path))


def load_report(path: Path) -> HardwareReport:
    """Read a machine from a file, as RMA_FAKE_DEVICES and ``--report`` take it.

    A recording, a hardware report, a list of devices, or a bare ``capabilities`` object. Raises ValidationProblem.
    """
    return read_report(_read(path), subject=str(path), path=path)


def read_report(data: object, *, subject: str, path: Path | None = None) -> HardwareReport:
    """Return the machine in plain JSON data, in any form that `load_report` takes. Raises ValidationProblem."""
    if isinstance(data, list):
        return _listed(data, subject)
    if isinstance(data, dict) and "observations" in data:
        return load(path).report if path else convert(data, Recording, subject=subject).report
    if isinstance(data, dict) and "capabilities" in data:
        return _report(data, subject)
    if isinstance(data, dict):
        return from_capabilities(convert(data, Capabilities, subject=subject))
    what = "is neither a recording, a hardware report, a list of devices nor capabilities"
    raise ValidationProblem(subject, [Problem("$", what)])


def from_capabilities(short: Capabilities) -> HardwareReport:
    """Return a report whose devices are what a short form says: as many GPUs as it counts, each of that size."""
    gpus = max(short.gpu_count, 1) if short.gpu_type or short.gpu_memory_bytes else 0
    name = short.gpu_type or "GPU"
    devices = [
        Device(id="cpu", kind="cpu", name="CPU", api="cpu", attributes={"cores": short.cpu_cores}),
        Device(id="memory", kind="memory", name="memory", memory_bytes=short.memory_bytes),
        Device(id="storage", kind="storage", name="storage", memory_bytes=short.storage_bytes),
        *(
            Device(id=f"gpu:{n}", kind="gpu", name=name, api=_guess_api(name), memory_bytes=short.gpu_memory_bytes)
            for n in range(gpus)
        ),
    ]
    return HardwareReport(capabilities=short, devices=tuple(devices))


def _guess_api(name: str) -> DeviceApi | None:
    """Return what a GPU of this name is programmed with; bare capabilities do not say."""
    words: dict[DeviceApi, tuple[str, ...]] = {
        "cuda": ("nvidia", "geforce", "rtx", "gtx", "tesla", "quadro", "a100", "h100", "h200", "l40"),
        "rocm": ("amd", "radeon", "instinct"),
        "metal": ("apple",),
        "level_zero": ("intel", "arc"),
    }
    return next((api for api, known in words.items() if any(word in name.lower() for word in known)), None)


def _report(data: dict[str, Any], subject: str) -> HardwareReport:
    """Return a hardware report; a worker as the admin API shows it has ``capabilities`` alone."""
    report = convert(data, HardwareReport, subject=subject)
    return report if report.devices else from_capabilities(report.capabilities)


def _listed(data: list[Any], subject: str) -> HardwareReport:
    """Return the report of a bare list of devices; that no id comes twice is for the report to say."""
    short = msgspec.to_builtins(summarize(convert(data[:MAX_DEVICES], tuple[Device, ...], subject=subject)))
    return convert({"capabilities": short, "devices": data}, HardwareReport, subject=subject)


def _read(path: Path) -> object:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValidationProblem(str(path), [Problem("file", error.strerror or str(error))]) from None
    if len(data) > MAX_FILE_BYTES:
        raise ValidationProblem(str(path), [Problem("file", "is larger than any recording")])
    return parse(data, subject=str(path))
