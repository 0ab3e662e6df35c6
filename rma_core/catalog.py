"""The catalog: the services a pool offers, what each needs, and how it is run as a container or a process.

One TOML file a service (``catalog.toml``), read by `load` and `load_folder`; CONTRACT names the fields a worker sees.
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from rma_core.errors import Problem, ValidationProblem
from rma_core.models.hardware import ContainerAccess, Device, DeviceApi, Name, Size
from rma_core.models.sizes import GB, GIB, human, parse_size
from rma_core.models.strict import convert
from rma_core.models.weights import ModelFormat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from rma_core.models.hardware import Capabilities, HardwareReport

ServiceName = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
ContainerName = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
ImageName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._:/-]{0,254}$")]
Digest = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
EnvName = Annotated[str, Meta(pattern=r"^[A-Z][A-Z0-9_]{0,63}$")]
Route = Annotated[str, Meta(pattern=r"^(GET|POST|PUT|DELETE|PATCH) /[A-Za-z0-9._~/{}-]{0,200}$")]
Module = Annotated[str, Meta(pattern=r"^[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*$")]

#: A machine reports less memory than it is sold with: firmware, kernel and graphics keep some.
NOMINAL_SHARE = 7 / 8
#: What of a machine's memory stays with its owner and the operating system: this share, at most that much.
KEPT_MEMORY_SHARE = 1 / 4
KEPT_MEMORY_BYTES = 4 * GIB
#: A volunteer's disk is never filled to the brim: this share of what is free stays free, at most that much.
KEPT_STORAGE_SHARE = 1 / 10
KEPT_STORAGE_BYTES = 10 * GB
#: Services that run strangers' code: only where the runtime keeps it apart from the host.
ISOLATED_ONLY = frozenset({"compute"})
#: The attribute with which a detector says that a GPU's memory is the machine's own.
UNIFIED_MEMORY = "unified_memory"


class Needs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one copy of a service takes of a machine; sizes as people write them, empty lists mean any.

    Everything a machine runs has to fit together, beside what stays with its owner (KEPT_MEMORY_SHARE). A GPU without
    ``gpu_memory`` is taken whole; with it, services may share one.
    """

    cpu_cores: Annotated[float, Meta(ge=0, le=4096)] = 1
    memory: Size = "0B"
    storage: Size = "0B"
    gpu_memory: Size = "0B"
    gpu_api: tuple[DeviceApi, ...] = ()
    os: tuple[Name, ...] = ()
    architecture: tuple[Name, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """``memory`` in bytes."""
        return parse_size(self.memory, binary=True)

    @property
    def storage_bytes(self) -> int:
        """``storage`` in bytes."""
        return parse_size(self.storage, binary=False)

    @property
    def gpu_memory_bytes(self) -> int:
        """``gpu_memory`` in bytes."""
        return parse_size(self.gpu_memory, binary=True)

    @property
    def gpu(self) -> bool:
        """Whether a GPU is needed at all."""
        return bool(self.gpu_api or self.gpu_memory_bytes)


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one container may take at most; every container has every limit."""

    memory: Size = "1GB"
    cpus: Annotated[float, Meta(gt=0, le=1024)] = 1.0
    pids: Annotated[int, Meta(ge=1, le=32_768)] = 256
    tmp: Size = "256MB"
    shm: Size = "64MB"

    @property
    def memory_bytes(self) -> int:
        """``memory`` in bytes."""
        return parse_size(self.memory, binary=True)

    @property
    def tmp_bytes(self) -> int:
        """``tmp`` (the writable /tmp) in bytes."""
        return parse_size(self.tmp, binary=True)

    @property
    def shm_bytes(self) -> int:
        """``shm`` (/dev/shm) in bytes."""
        return parse_size(self.shm, binary=True)


class ProcessForm(msgspec.Struct, frozen=True, kw_only=True):
    """How the service runs without a container: ``python -m module`` of a distribution the owner's agent has.

    The agent looks ``distribution`` up in its owner's own sources; a coordinator can never name a place to fetch from.
    ``gpu_api`` are those that it computes with where it finds them.
    """

    distribution: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    module: Module
    gpu_api: tuple[DeviceApi, ...] = ()


class CatalogEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One service of the pool.

    ``tiers`` are those it is preferred for, in order; ``routes`` what the pool passes on (``POST /notes``), the first
    one being the service's own call; ``slots`` the requests one copy takes at once; ``wanted`` how many copies the
    pool would like before it counts as enough. An image that is not ``trusted`` runs only where an engine keeps it
    apart from the host and can limit all it takes.
    """

    service: ServiceName
    name: ContainerName
    image: ImageName
    port: Annotated[int, Meta(ge=1, le=65_535)] = 8000
    image_digest: Digest | None = None
    health_path: Annotated[str, Meta(pattern=r"^/[A-Za-z0-9._~/-]{0,200}$")] = "/health"
    start_timeout_s: Annotated[float, Meta(gt=0, le=86_400)] = 120
    #: Seconds for a request in all (``None``: the pool's setting), for its first byte, and between two bytes.
    timeout_s: Annotated[float, Meta(gt=0, le=604_800)] | None = None
    first_byte_s: Annotated[float, Meta(gt=0, le=604_800)] | None = None
    gap_s: Annotated[float, Meta(gt=0, le=86_400)] = 60
    #: Bytes of a request's body at most (``None``: the pool's setting).
    max_body_bytes: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    routes: Annotated[tuple[Route, ...], Meta(min_length=1, max_length=64)]
    slots: Annotated[int, Meta(ge=1, le=1024)] = 1
    tiers: Annotated[tuple[Annotated[int, Meta(ge=1, le=99)], ...], Meta(max_length=32)] = ()
    wanted: Annotated[int, Meta(ge=0, le=100_000)] = 1
    env: Annotated[dict[EnvName, Annotated[str, Meta(max_length=4000)]], Meta(max_length=64)] = {}
    needs: Needs = msgspec.field(default_factory=Needs)
    limits: Limits = msgspec.field(default_factory=Limits)
    process: ProcessForm | None = None
    trusted: bool = True
    model_format: ModelFormat | Literal[""] = ""
    gpu_images: Annotated[dict[DeviceApi, ImageName], Meta(max_length=8)] = {}
    whole_gpu: bool = False


class Room(msgspec.Struct, kw_only=True):
    """What of a machine is still to be given away while its services are chosen.

    ``gpu_taken`` is how many bytes of each GPU, by device id, are given away already.
    """

    cpu_cores: float
    memory_bytes: float
    storage_bytes: float
    gpus: list[Device]
    os: str
    architecture: str
    gpu_taken: dict[str, float] = {}

    @classmethod
    def of(cls, report: HardwareReport) -> Room:
        """Return a whole machine, less what stays with its owner."""
        memory, storage = report.memory_bytes, report.storage_bytes
        return cls(
            cpu_cores=report.cpu_cores,
            memory_bytes=memory - min(memory * KEPT_MEMORY_SHARE, KEPT_MEMORY_BYTES),
            storage_bytes=storage - min(storage * KEPT_STORAGE_SHARE, KEPT_STORAGE_BYTES),
            gpus=list(report.gpus) if report.devices else _claimed(report.capabilities),
            os=report.os,
            architecture=report.architecture,
        )

    def lacks(self, needs: Needs, *, contained: bool = True) -> str:
        """Say why ``needs`` do not fit into what is left; an empty string when they do.

        ``contained``: in a container, which is Linux wherever it runs, and gets only GPUs with a way in; otherwise as
        a process. A system or architecture that the machine did not tell is not held against it.
        """
        system = "linux" if contained else self.os
        memory = self._memory(needs, self.gpu_for(needs, contained=contained))
        # Asked for every service of every machine: words are made only for what is missing.
        words = []
        if needs.cpu_cores > self.cpu_cores:
            words.append(f"needs {_cores(needs.cpu_cores)}, {max(0, self.cpu_cores):g} free")
        if memory > self.memory_bytes:
            words.append(f"needs {human(memory)} of memory, {_free(self.memory_bytes)}")
        if needs.storage_bytes > self.storage_bytes:
            words.append(f"needs {human(needs.storage_bytes)} of storage, {_free(self.storage_bytes)}")
        if _outside(system, needs.os):
            words.append(f"runs on {', '.join(needs.os)}, this is {system}")
        if _outside(self.architecture, needs.architecture):
            words.append(f"runs on {', '.join(needs.architecture)}, this is {self.architecture}")
        return "; ".join([*words, *self._lacks_gpu(needs, contained=contained)])

    def take(self, needs: Needs, *, contained: bool = True) -> Device | None:
        """Give ``needs`` away and return the GPU they get, if any; call it only when `lacks` is empty."""
        gpu = self.gpu_for(needs, contained=contained)
        self.cpu_cores -= needs.cpu_cores
        self.memory_bytes -= self._memory(needs, gpu)
        self.storage_bytes -= needs.storage_bytes
        if gpu is not None:
            taken = self.gpu_taken.get(gpu.id, 0) + gpu_share(gpu, needs)
            self.gpu_taken = {**self.gpu_taken, gpu.id: taken}
        return gpu

    def gpu_for(self, needs: Needs, *, contained: bool = True) -> Device | None:
        """Return the GPU that ``needs`` get of what is left, see `choose_gpu`."""
        gpus = [gpu for gpu in self.gpus if not contained or _reachable(gpu)]
        return choose_gpu(gpus, self.gpu_taken, needs)

    def _memory(self, needs: Needs, gpu: Device | None) -> int:
        """Return the bytes of main memory that ``needs`` take: where memory is unified, the GPU's share too."""
        unified = gpu is not None and gpu.attributes.get(UNIFIED_MEMORY) is True
        return needs.memory_bytes + (needs.gpu_memory_bytes if unified else 0)

    def _lacks_gpu(self, needs: Needs, *, contained: bool) -> list[str]:
        if not needs.gpu or self.gpu_for(needs, contained=contained) is not None:
            return []
        wanted = f"needs a GPU{_gpu_words(needs)}"
        hidden = self.gpu_for(needs, contained=False) if contained else None
        if hidden is not None:
            advice = str(hidden.attributes.get("container_access_reason") or "")
            return [f"{wanted}: a GPU is there, but containers cannot use it{f': {advice}' if advice else ''}"]
        there = ", ".join(self._gpu_left(gpu) for gpu in self.gpus)
        return [f"{wanted}, there is {there}" if there else f"{wanted}, there is none"]

    def _gpu_left(self, gpu: Device) -> str:
        left = max(0, (gpu.memory_bytes or 0) - self.gpu_taken.get(gpu.id, 0))
        return f"{gpu.name} ({gpu.api or 'no API'}, {human(left)} free)"


def choose_gpu(gpus: Iterable[Device], taken: Mapping[str, float], needs: Needs) -> Device | None:
    """Return the GPU that ``needs`` get: one of their own rather than a shared one, a small rather than a large.

    ``taken`` are the bytes given away of each GPU, by its id. Coordinator and agent choose by this same function.
    """
    fits = [gpu for gpu in gpus if needs.gpu and _gpu_fits(gpu, taken.get(gpu.id), needs)]
    return min(fits, key=lambda gpu: (gpu.id in taken, gpu.memory_bytes or 0, gpu.id), default=None)


def gpu_share(gpu: Device, needs: Needs) -> int:
    """Return the bytes of a GPU that ``needs`` take; who names no size takes all."""
    return needs.gpu_memory_bytes or gpu.memory_bytes or 1


def _gpu_fits(gpu: Device, taken: float | None, needs: Needs) -> bool:
    """Whether a GPU does: sizes are nominal for a whole one, exact for a share."""
    if needs.gpu_api and gpu.api not in needs.gpu_api:
        return False
    memory, wanted = gpu.memory_bytes or 0, needs.gpu_memory_bytes
    if taken is None:
        return memory >= wanted * NOMINAL_SHARE
    return 0 < wanted <= memory - taken


def _claimed(short: Capabilities) -> list[Device]:
    """Return the GPUs that a machine's short form claims, for one that sends nothing else."""
    if not short.gpu_memory_bytes:
        return []
    name = short.gpu_type or "GPU"
    apis: tuple[tuple[str, DeviceApi], ...] = (
        ("apple", "metal"),
        ("amd", "rocm"),
        ("radeon", "rocm"),
        ("intel", "level_zero"),
    )
    api: DeviceApi = next((api for word, api in apis if word in name.lower()), "cuda")
    return [
        Device(
            id=f"gpu:{number}",
            kind="gpu",
            name=name,
            api=api,
            memory_bytes=short.gpu_memory_bytes,
            attributes={UNIFIED_MEMORY: api == "metal"},
            access=None if api == "metal" else ContainerAccess(),
        )
        for number in range(max(1, short.gpu_count))
    ]


def _reachable(gpu: Device) -> bool:
    """Whether containers can be given a GPU: by its own words, or by a toolkit of its maker's in the engine."""
    return gpu.access is not None or gpu.attributes.get("container_access") not in {None, "none"}


def _outside(value: str, allowed: tuple[str, ...]) -> bool:
    return bool(allowed) and bool(value) and value not in allowed


def _cores(count: float) -> str:
    return "1 core" if count == 1 else f"{count:g} cores"


def _free(size_bytes: float) -> str:
    return f"{human(max(0, size_bytes))} free"


def _gpu_words(needs: Needs) -> str:
    memory = f" with {human(needs.gpu_memory_bytes)}" if needs.gpu_memory_bytes else ""
    return memory + (f" and {'/'.join(needs.gpu_api)}" if needs.gpu_api else "")


def load(path: Path) -> CatalogEntry:
    """Read one ``catalog.toml``. Raises ValidationProblem, which names the file and every problem."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise ValidationProblem(str(path), [Problem("file", str(error))]) from None
    return convert(data, CatalogEntry, subject=str(path))


def load_folder(folder: Path) -> tuple[CatalogEntry, ...]:
    """Read every ``*/catalog.toml`` and ``*.toml`` below ``folder``, by service and name.

    Raises ValidationProblem, also when two files describe one service, unless both serve its models.
    """
    paths = sorted([*folder.glob("*/catalog.toml"), *folder.glob("*.toml")])
    entries: list[CatalogEntry] = []
    for path in paths:
        entry = load(path)
        for other in entries:
            one_of_many = entry.model_format and other.model_format
            if entry.name == other.name or (entry.service == other.service and not one_of_many):
                what = "$.name" if entry.name == other.name else "$.service"
                raise ValidationProblem(str(path), [Problem(what, f"{entry.service!r} is described twice")])
        entries.append(entry)
    return tuple(sorted(entries, key=lambda entry: (entry.service, entry.name)))
