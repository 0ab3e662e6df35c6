"""What third parties implement and are given: container runtimes, tier policies, and their small records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, runtime_checkable

import msgspec
from msgspec import Meta

from rma_core.catalog import Limits, ProcessForm, ServiceName
from rma_core.models.hardware import ContainerAccess, HardwareReport

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

PluginConfig = dict[str, object]
"""The read-only table ``[plugins.NAME]`` of the plugin that is called, NAME being its entry point."""


class PolicyInput(msgspec.Struct, frozen=True, kw_only=True):
    """What a tier policy decides on."""

    report: HardwareReport
    labels: dict[str, str] = {}
    worker_id: str = ""


class TierDecision(msgspec.Struct, frozen=True, kw_only=True):
    """A tier (``None``: below the lowest bar) and the sentence that the admin and the owner read.

    ``prefers`` are services that the machine should get before all others, in order: what else it gets is said by the
    catalog, which knows tiers by number.
    """

    tier: int | None
    reason: str
    prefers: Annotated[tuple[ServiceName, ...], Meta(max_length=32)] = ()


@runtime_checkable
class TierPolicy(Protocol):
    """A named, pure function from a hardware report to a tier; the same input always gives the same answer."""

    @property
    def name(self) -> str:
        """Lower-case, unique among installed policies; chosen in configuration."""

    @property
    def summary(self) -> str:
        """One sentence for ``rma policies list``."""

    def decide(self, asked: PolicyInput) -> TierDecision:
        """Return the tier and its reason, in milliseconds, without looking at anything but ``asked``."""


class RuntimeHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a runtime can be used now, and if not, what its owner should do."""

    state: Literal["healthy", "undetected", "unhealthy"]
    reason: str = ""
    version: str = ""
    #: What containers may be given or limited by here (``gpu:cdi``, ``limit:memory``, …); free words, shown by doctor.
    features: tuple[str, ...] = ()
    #: What of a container it cannot limit here (``memory``, ``swap``, ``cpu``, ``pids``); untrusted images need all.
    cannot_limit: tuple[str, ...] = ()


class PullProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a pull is; ``total_bytes`` is ``None`` until it is known."""

    done_bytes: int = 0
    total_bytes: int | None = None
    note: str = ""


class GivenFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of this machine that a container is given to read; the agent chose ``path``, never a coordinator."""

    name: str
    path: str
    size_bytes: int


class GivenFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Files that belong together: ``key`` stands for their content, ``variable`` tells the container where they are.

    That is the path of the file, or of the folder of several. A runtime that is ``isolated`` copies them into a volume
    of its own, which the container can only read; others let them lie where they are.
    """

    variable: str
    key: str
    files: tuple[GivenFile, ...]


class ContainerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One container to run, in words every runtime understands.

    ``worker_id``, ``name``, ``service`` and ``spec_hash`` become labels, by which a restarted agent adopts its own;
    ``access`` is how it gets its GPU, if it has one, ``files`` what it is given to read. Nothing else of the host can
    be expressed: no mount, no capability.
    """

    worker_id: str
    name: str
    service: str
    image: str
    image_digest: str | None
    port: int
    env: dict[str, str]
    limits: Limits
    spec_hash: str
    access: ContainerAccess | None = None
    process: ProcessForm | None = None
    files: GivenFiles | None = None


class ContainerHandle(msgspec.Struct, frozen=True, kw_only=True):
    """One container of a runtime, as plain data that survives a restart of the agent.

    ``image_bytes`` is what its image takes on this machine, unpacked; 0 where that is not known.
    """

    runtime: str
    id: str
    name: str
    service: str
    spec_hash: str
    image_id: str = ""
    image_bytes: int = 0


class ContainerState(msgspec.Struct, frozen=True, kw_only=True):
    """How a container stands; ``reason`` says why it ended (``out of memory``, its last words)."""

    state: Literal["running", "exited", "missing"]
    exit_code: int | None = None
    reason: str = ""


class ContainerStats(msgspec.Struct, frozen=True, kw_only=True):
    """What a container uses now; ``cpu_seconds`` counts from its start."""

    cpu_seconds: float
    memory_bytes: int
    pids: int = 0


class ContainerRuntime(ABC):
    """What starts containers. Every method may be called at any time and answers within its own timeouts.

    Failures are the exceptions below `RuntimeFailure`. A blocking SDK is wrapped with ``asyncio.to_thread``.
    """

    #: Lower-case and unique; owners name it in ``runtimes``.
    name: str
    #: Whether what it starts is kept apart from the host.
    isolated: bool

    @abstractmethod
    async def probe(self) -> RuntimeHealth:
        """Say whether the engine can be used now; never raises for an absent or broken engine."""

    @abstractmethod
    async def has_image(self, spec: ContainerSpec) -> bool:
        """Say whether `start` needs no pull: the image is there, and copies of the files. Raises RuntimeAbsent."""

    @abstractmethod
    async def pull(self, spec: ContainerSpec, progress: Callable[[PullProgress], None]) -> None:
        """Get the image, and copy the files; what is there already is no work. Cancelled, it leaves nothing half done.

        Reports at least every twenty minutes, from any thread. A digest in the spec is what must arrive.
        Raises ImageMissing, ImagePullFailed, OutOfSpace, RuntimeAbsent, and NotSupported for what `start` would not do:
        the agent then asks the next runtime, while a `start` that fails so is given up.
        """

    @abstractmethod
    async def start(self, spec: ContainerSpec) -> ContainerHandle:
        """Make and start the container, locked down, and return once it runs (not: once it is healthy), in 10 minutes.

        Raises StartFailed, PortTaken, OutOfSpace, ImageMissing, RuntimeAbsent, NotSupported.
        """

    @abstractmethod
    async def inspect(self, handle: ContainerHandle) -> ContainerState:
        """Say how it stands; ``missing`` is only what certainly is not there. Raises RuntimeAbsent."""

    @abstractmethod
    async def endpoint(self, handle: ContainerHandle) -> str:
        """Return where it answers: ``http://127.0.0.1:PORT`` or ``unix:/path``; only this machine can reach it."""

    @abstractmethod
    async def logs(self, handle: ContainerHandle, *, tail_lines: int = 100) -> str:
        """Return its last output, at most 64 KiB; an unknown handle gives an empty string."""

    @abstractmethod
    async def stats(self, handle: ContainerHandle) -> ContainerStats:
        """Return what it uses now. Raises RuntimeFailure for one that does not run."""

    @abstractmethod
    async def stop(self, handle: ContainerHandle, *, grace_s: float = 10.0) -> None:
        """Stop it (politely, then not) and remove it with its volumes; an unknown handle is no error."""

    @abstractmethod
    async def list_owned(self, worker_id: str) -> list[ContainerHandle]:
        """Return this worker's containers by their labels, as `start` did, stopped ones too. Raises RuntimeAbsent."""

    async def forget_files(self, worker_id: str, keep: Collection[str]) -> None:  # noqa: B027 - some make no copies
        """Remove the copies of files that were made for a worker, except those of the keys in ``keep``."""

    async def aclose(self) -> None:  # noqa: B027 - most runtimes hold nothing
        """Let go of connections; containers go on."""
