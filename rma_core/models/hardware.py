"""What a machine has: devices, what each detector said, and the short form that everyone reads."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from rma_core.models import strict
from rma_core.models.sizes import memory_text, parse_size, storage_text

DeviceKind = Literal["host", "cpu", "memory", "storage", "gpu", "npu"]
DeviceApi = Literal["cuda", "rocm", "metal", "level_zero", "vulkan", "cpu"]
Health = Literal["healthy", "unhealthy"]
ProbeState = Literal["healthy", "undetected", "unhealthy"]

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Reason = Annotated[str, Meta(max_length=2000)]
#: A size as people write it, read by `rma_core.models.sizes`.
Size = Annotated[str, Meta(pattern=r"^\d{1,12}(\.\d{1,6})?\s?([KMGTPkmgtp]i?)?B$")]
#: Beyond these a size or a number of cores is a lie; a sum of lies is cut, so that the report itself stays valid.
MAX_BYTES = 2**60
MAX_CORES = 65_536
Bytes = Annotated[int, Meta(ge=0, le=MAX_BYTES)]
Attribute = (
    bool | int | float | Annotated[str, Meta(max_length=2000)] | Annotated[list[Name], Meta(max_length=256)] | None
)

#: More devices than this from one machine is a broken or hostile detector.
MAX_DEVICES = 1024
#: Device nodes that a container may be given; anything else a detector names is refused by the runtimes.
DEVICE_NODES = ("/dev/dri/", "/dev/kfd", "/dev/accel/", "/dev/nvidia", "/dev/dxg", "/dev/davinci", "/dev/apex_")


class ContainerAccess(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a container gets a device: CDI names, or device nodes from a fixed list. Never mounts or environment."""

    cdi: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    device_nodes: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()

    def __post_init__(self) -> None:
        """Refuse device nodes outside DEVICE_NODES and paths that climb out of them."""
        for node in self.device_nodes:
            if ".." in node or not node.startswith(DEVICE_NODES):
                message = f"device node {node!r} is not among those a container may be given: {', '.join(DEVICE_NODES)}"
                raise ValueError(message)


class Device(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing a detector found.

    ``id`` is stable across reboots and unique on the machine (``gpu:GPU-8c2f…``, ``cpu``); ``memory_bytes`` is what
    the device can use in all; ``attributes`` are facts with their unit in the name (``power_limit_w``).
    """

    id: Name
    kind: DeviceKind
    name: Name
    vendor: Annotated[str, Meta(max_length=200)] = ""
    api: DeviceApi | None = None
    memory_bytes: Bytes | None = None
    health: Health = "healthy"
    reason: Reason = ""
    attributes: Annotated[dict[Name, Attribute], Meta(max_length=64)] = {}
    access: ContainerAccess | None = None


class Detection(msgspec.Struct, frozen=True, kw_only=True):
    """What one detector answers; make it with ``healthy``, ``undetected`` or ``unhealthy``."""

    state: ProbeState
    reason: Reason = ""
    devices: Annotated[tuple[Device, ...], Meta(max_length=MAX_DEVICES)] = ()

    @classmethod
    def healthy(cls, devices: list[Device] | tuple[Device, ...], *, reason: str = "") -> Detection:
        """Everything there is works."""
        return cls(state="healthy", reason=reason, devices=tuple(devices))

    @classmethod
    def undetected(cls, reason: str) -> Detection:
        """This machine has nothing of that kind, which is no error; ``reason`` says how that is known."""
        return cls(state="undetected", reason=reason)

    @classmethod
    def unhealthy(cls, reason: str, *, devices: list[Device] | tuple[Device, ...] = ()) -> Detection:
        """Something is there and does not work; ``devices`` are those that do, ``reason`` says what to do."""
        return cls(state="unhealthy", reason=reason, devices=tuple(devices))


class ProbeReport(msgspec.Struct, frozen=True, kw_only=True):
    """How one detector's run went: its state and reason, who ships it, and what it cost in seconds."""

    detector: Name
    distribution: Annotated[str, Meta(max_length=200)]
    version: Annotated[str, Meta(max_length=100)]
    state: ProbeState
    reason: Reason = ""
    seconds: Annotated[float, Meta(ge=0, le=86_400)] = 0.0
    import_seconds: Annotated[float, Meta(ge=0, le=86_400)] = 0.0
    devices: Annotated[tuple[Name, ...], Meta(max_length=MAX_DEVICES)] = ()


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """The short form of a machine, with the field names people rely on.

    ``cpu_cores`` are physical cores, or the CPUs granted by a quota or a virtual machine; ``ram`` and ``gpu_memory``
    (of the largest GPU; nothing where no GPU has memory that counts) are binary sizes, ``storage`` is free space.
    """

    cpu_cores: Annotated[int, Meta(ge=0, le=MAX_CORES)]
    ram: Size
    storage: Size = "0.0GB"
    gpu_memory: Size | None = None
    gpu_type: Annotated[str, Meta(max_length=200)] | None = None
    gpu_count: Annotated[int, Meta(ge=0, le=1024)] = 0

    @property
    def memory_bytes(self) -> int:
        """``ram`` in bytes."""
        return parse_size(self.ram, binary=True)

    @property
    def storage_bytes(self) -> int:
        """``storage`` in bytes."""
        return parse_size(self.storage, binary=False)

    @property
    def gpu_memory_bytes(self) -> int:
        """``gpu_memory`` in bytes, 0 without a GPU."""
        return parse_size(self.gpu_memory or "0B", binary=True)


class HardwareReport(msgspec.Struct, frozen=True, kw_only=True):
    """All devices of a worker, the short form made from them, and a probe report for each detector."""

    capabilities: Capabilities
    devices: Annotated[tuple[Device, ...], Meta(max_length=MAX_DEVICES)] = ()
    probes: Annotated[tuple[ProbeReport, ...], Meta(max_length=64)] = ()

    def __post_init__(self) -> None:
        """Refuse two devices with one id."""
        twice = sorted(name for name, times in Counter(device.id for device in self.devices).items() if times > 1)
        if twice:
            message = f"two devices with one id: {', '.join(twice)}"
            raise ValueError(message)

    def of_kind(self, kind: DeviceKind) -> tuple[Device, ...]:
        """Return the healthy devices of one kind, in the order they were found."""
        return tuple(d for d in self.devices if d.kind == kind and d.health == "healthy")

    @property
    def gpus(self) -> tuple[Device, ...]:
        """Return the healthy GPUs, largest memory first."""
        return tuple(sorted(self.of_kind("gpu"), key=lambda d: -(d.memory_bytes or 0)))

    @property
    def cpu_cores(self) -> int:
        """Cores of all CPUs, from the devices where there are any, else from the short form."""
        return sum(map(_cores, self.of_kind("cpu"))) if self._knows("cpu") else self.capabilities.cpu_cores

    @property
    def memory_bytes(self) -> int:
        """Memory, exact from the devices where there are any, else as the short form says it."""
        return self._total("memory") if self._knows("memory") else self.capabilities.memory_bytes

    @property
    def storage_bytes(self) -> int:
        """Free storage, exact from the devices where there are any, else as the short form says it."""
        return self._total("storage") if self._knows("storage") else self.capabilities.storage_bytes

    @property
    def gpu_memory_bytes(self) -> int:
        """Memory of the largest healthy GPU; an unhealthy one is never replaced by what the short form says."""
        if self._knows("gpu"):
            return max((gpu.memory_bytes or 0 for gpu in self.gpus), default=0)
        return self.capabilities.gpu_memory_bytes

    @property
    def os(self) -> str:
        """``linux``, ``darwin``, ``windows``, or an empty string when no host detector ran."""
        return self._host("os")

    @property
    def architecture(self) -> str:
        """``x86_64``, ``arm64``, …, or an empty string when no host detector ran."""
        return self._host("architecture")

    def _knows(self, kind: DeviceKind) -> bool:
        return any(device.kind == kind for device in self.devices)

    def _total(self, kind: DeviceKind) -> int:
        return sum(device.memory_bytes or 0 for device in self.of_kind(kind))

    def _host(self, name: str) -> str:
        return next((str(d.attributes.get(name, "")) for d in self.devices if d.kind == "host"), "")


def summarize(devices: tuple[Device, ...]) -> Capabilities:
    """Return the short form of a machine from the devices its detectors found; unhealthy ones do not count."""
    usable = [d for d in devices if d.health == "healthy"]

    def total(kind: str) -> int:
        return min(sum(d.memory_bytes or 0 for d in usable if d.kind == kind), MAX_BYTES)

    gpus = sorted((d for d in usable if d.kind == "gpu"), key=lambda d: -(d.memory_bytes or 0))
    return Capabilities(
        cpu_cores=min(sum(_cores(d) for d in usable if d.kind == "cpu"), MAX_CORES),
        ram=memory_text(total("memory")),
        storage=storage_text(total("storage")),
        gpu_memory=memory_text(gpus[0].memory_bytes) if gpus and gpus[0].memory_bytes is not None else None,
        gpu_type=gpus[0].name if gpus else None,
        gpu_count=len(gpus),
    )


def read_reports(data: object, *, subject: str) -> tuple[HardwareReport, ...]:
    """Read one machine or a list of them from plain JSON data: full reports, or bare ``capabilities`` objects.

    Raises ValidationProblem, which names every problem of the first machine that has some.
    """
    machines = data if isinstance(data, list) else [data]
    return tuple(
        _read_report(machine, f"{subject}[{n}]" if isinstance(data, list) else subject)
        for n, machine in enumerate(machines)
    )


def _read_report(data: object, subject: str) -> HardwareReport:
    if isinstance(data, dict) and "capabilities" in data:
        return strict.convert(data, HardwareReport, subject=subject)
    return HardwareReport(capabilities=strict.convert(data, Capabilities, subject=subject))


def _cores(device: Device) -> int:
    value = device.attributes.get("cores", 0)
    return max(0, value) if isinstance(value, int) and not isinstance(value, bool) else 0
