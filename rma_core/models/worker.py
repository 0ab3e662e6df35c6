"""What a worker and the coordinator say to each other by HTTP: registration, heartbeat, tasks, results."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rma_core.catalog import ContainerName, Digest, EnvName, ImageName, Limits, Needs, ProcessForm, Route, ServiceName
from rma_core.models.hardware import Capabilities, HardwareReport, Name, Reason
from rma_core.models.weights import AssignedModel, ModelName

WorkerId = Annotated[str, Meta(pattern=r"^worker-[0-9a-f]{8}$")]
TaskId = Annotated[str, Meta(pattern=r"^task-[0-9a-z]{20}$")]
LeaseId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$")]
Attempt = Annotated[int, Meta(ge=1, le=1_000_000)]
Load = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=0, le=31_536_000)]
Generation = Annotated[int, Meta(ge=0, le=2**53)]
HeaderPair = tuple[Annotated[str, Meta(max_length=256)], Annotated[str, Meta(max_length=8192)]]
Headers = Annotated[tuple[HeaderPair, ...], Meta(max_length=64)]

#: What names an owner of machines; empty: nobody in particular.
OWNER_NAME = "^([0-9A-Za-z][0-9A-Za-z._@+-]{0,63})?$"
OwnerName = Annotated[str, Meta(pattern=OWNER_NAME)]
#: What a model can do.
Capability = Annotated[str, Meta(pattern=r"^[a-z_]{1,32}$")]

WorkerStatus = Literal["healthy", "degraded", "offline"]
ContainerState = Literal[
    "pending", "pulling", "starting", "healthy", "unhealthy", "backoff", "failed", "refused", "stopping"
]
Fault = Literal["worker", "service", "request", "owner", "coordinator"]

#: Bodies up to here travel on the channel or inside a poll's answer; larger ones take an HTTP request of their own.
INLINE_BODY_BYTES = 256 * 1024
#: The runtime of what already ran on the machine, and whose owner shares it.
ATTACHED = "attached"
#: No image that a worker tells of is larger.
MOST_IMAGE_BYTES = 2**53


class RuntimeReport(msgspec.Struct, frozen=True, kw_only=True):
    """One container runtime as the agent finds it: usable or not, and why."""

    name: Name
    isolated: bool
    state: Literal["healthy", "undetected", "unhealthy"]
    reason: Reason = ""
    version: Annotated[str, Meta(max_length=200)] = ""
    #: What of a container it cannot limit (``memory``, ``swap``, ``cpu``, ``pids``).
    cannot_limit: Annotated[tuple[Name, ...], Meta(max_length=8)] = ()


class PluginReport(msgspec.Struct, frozen=True, kw_only=True):
    """One plugin: its state and why, who ships it, and what importing it cost in seconds.

    ``failures`` is how often it has failed since the program that runs it started, ``failed_at`` when last;
    ``deprecated`` says what of it a later release may refuse.
    """

    name: Name
    kind: Annotated[str, Meta(max_length=32)]
    state: Literal["active", "unapproved", "blocked", "failed", "invalid", "quarantined"]
    reason: Reason = ""
    distribution: Annotated[str, Meta(max_length=200)] = ""
    version: Annotated[str, Meta(max_length=100)] = ""
    import_seconds: Seconds | None = None
    failures: Annotated[int, Meta(ge=0, le=2**53)] = 0
    failed_at: Annotated[str, Meta(pattern=r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)?$")] = ""
    deprecated: Annotated[tuple[Reason, ...], Meta(max_length=8)] = ()


def lane(service: str, model: str) -> str:
    """Return what a service and one of its models are called together; the service alone where there is no model."""
    return f"{service} {model}" if model else service


class Assignment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One container a worker should run: a catalog entry as it is sent to that worker, with its model if it has one."""

    name: ContainerName
    service: ServiceName
    image: ImageName
    image_digest: Digest | None = None
    port: Annotated[int, Meta(ge=1, le=65_535)]
    requires_gpu: bool = False
    env: Annotated[dict[EnvName, Annotated[str, Meta(max_length=4000)]], Meta(max_length=64)] = {}
    health_path: Annotated[str, Meta(pattern=r"^/[A-Za-z0-9._~/-]{0,200}$")] = "/health"
    start_timeout_s: Seconds = 120
    routes: Annotated[tuple[Route, ...], Meta(max_length=64)] = ()
    slots: Annotated[int, Meta(ge=1, le=1024)] = 1
    needs: Needs = msgspec.field(default_factory=Needs)
    limits: Limits = msgspec.field(default_factory=Limits)
    process: ProcessForm | None = None
    trusted: bool = True
    model: AssignedModel | None = None

    @property
    def lane(self) -> str:
        """The service, with the model where there is one: what the pool counts."""
        return lane(self.service, self.model.name if self.model else "")


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model that a service can answer with; ``context`` in tokens, 0 where it is not known.

    ``capabilities`` are words such as ``completion``, ``embedding``, ``vision`` or ``tools``, where its server says so.
    While it is ``loading``, ``progress`` is the share done and ``eta_s`` the seconds left, where they are known.
    """

    name: ModelName
    state: Literal["loaded", "loading", "cold"] = "loaded"
    context: Annotated[int, Meta(ge=0, le=2**31)] = 0
    capabilities: Annotated[tuple[Capability, ...], Meta(max_length=16)] = ()
    progress: Load | None = None
    eta_s: Seconds | None = None


class ContainerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One container as it stands on the worker; ``progress`` is 0..1 while pulling, when the size is known.

    What the owner attached has the runtime ATTACHED. That, and what is ``by_owner``, nobody assigned: it stands outside
    tiers. A service that answers with models lists them. ``image_bytes`` is what its image takes on that machine,
    unpacked; 0 where that is not known.
    """

    name: ContainerName
    service: ServiceName
    state: ContainerState
    reason: Reason = ""
    runtime: Annotated[str, Meta(max_length=64)] = ""
    isolated: bool = True
    image_id: Annotated[str, Meta(max_length=200)] = ""
    slots: Annotated[int, Meta(ge=0, le=1024)] = 1
    restarts: Annotated[int, Meta(ge=0)] = 0
    progress: Load | None = None
    models: Annotated[tuple[ModelStatus, ...], Meta(max_length=64)] = ()
    by_owner: bool = False
    image_bytes: Annotated[int, Meta(ge=0, le=MOST_IMAGE_BYTES)] = 0

    @property
    def unassigned(self) -> bool:
        """Whether its owner offers it, and nobody assigned it."""
        return self.by_owner or self.runtime == ATTACHED


class AttemptRef(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt and the proof of who was given it."""

    task_id: TaskId
    attempt: Attempt
    lease_id: LeaseId


class RegisterRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A machine asks to be a worker.

    ``public_key`` is the raw Ed25519 key, base64url; ``proof`` a JWT signed with its private half over the nonce and
    the join token's hash; ``services`` and ``agreed_models`` what the owner agreed to run (``None``: whatever the pool
    chooses); ``own_models`` what the owner offers from files of the machine.
    """

    capabilities: Capabilities
    report: HardwareReport | None = None
    public_key: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{43}$")] | None = None
    proof: Annotated[str, Meta(max_length=4096)] | None = None
    agent_version: Annotated[str, Meta(max_length=100)] = ""
    runtimes: Annotated[tuple[RuntimeReport, ...], Meta(max_length=16)] = ()
    plugins: Annotated[tuple[PluginReport, ...], Meta(max_length=256)] = ()
    services: Annotated[tuple[ServiceName, ...], Meta(max_length=64)] | None = None
    agreed_models: Annotated[tuple[ModelName, ...], Meta(max_length=256)] | None = None
    own_models: Annotated[tuple[ModelName, ...], Meta(max_length=64)] = ()
    labels: Annotated[dict[Name, Name], Meta(max_length=32)] = {}


class RegisterResponse(msgspec.Struct, frozen=True, kw_only=True):
    """What the pool makes of the machine; the token is empty in a preview."""

    worker_id: WorkerId
    tier: int | None
    tier_reason: str
    containers: tuple[Assignment, ...]
    placement: dict[str, str] = {}
    generation: Generation
    heartbeat_interval_s: Seconds
    access_token: str = ""
    expires_in: Seconds = 0
    signed_catalog: bool = False


class TokenRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A signed assertion (JWT, EdDSA) over a nonce, to be exchanged for a worker token."""

    assertion: Annotated[str, Meta(max_length=4096)]


class TokenResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A worker token and the seconds it lasts."""

    access_token: str
    expires_in: Seconds


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker's sign of life; ``report`` only when it changed, ``attempts`` are all it still works on."""

    worker_id: WorkerId
    status: Literal["healthy", "degraded"] = "healthy"
    reason: Reason = ""
    current_load: Load = 0.0
    containers: Annotated[tuple[ContainerStatus, ...], Meta(max_length=256)] = ()
    attempts: Annotated[tuple[AttemptRef, ...], Meta(max_length=1024)] = ()
    generation: Generation = 0
    draining: bool = False
    #: The owner wants the machine back for now; nothing runs on it.
    paused: bool = False
    report: HardwareReport | None = None
    runtimes: Annotated[tuple[RuntimeReport, ...], Meta(max_length=16)] | None = None
    plugins: Annotated[tuple[PluginReport, ...], Meta(max_length=256)] | None = None


class HeartbeatAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the worker should do next; ``containers`` only when the worker's generation is old.

    ``process`` is a word for the coordinator's process: what one before it was told, another may not know.
    """

    heartbeat_interval_s: Seconds
    generation: Generation
    tier: int | None = None
    tier_reason: str = ""
    containers: tuple[Assignment, ...] | None = None
    cancel: tuple[AttemptRef, ...] = ()
    nonce: str = ""
    connect: bool = True
    messages: tuple[str, ...] = ()
    process: Annotated[str, Meta(max_length=64)] = ""


class TaskOffer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One task with its lease, as a long poll or the channel's TASK hands it out.

    ``body`` is there (base64) up to INLINE_BODY_BYTES in a poll; otherwise it is read from ``body_url``.
    Deadlines are seconds from now: until the first byte of the answer, between two bytes, and in all.
    """

    task_id: TaskId
    attempt: Attempt
    lease_id: LeaseId
    service: ServiceName
    #: With which of the service's models, where it has several.
    model: ModelName | Literal[""] = ""
    method: Annotated[str, Meta(pattern=r"^[A-Z]{3,7}$")]
    path: Annotated[str, Meta(max_length=4096)]
    headers: Headers = ()
    body_bytes: Annotated[int, Meta(ge=0)] = 0
    body: bytes | None = None
    body_url: str | None = None
    lease_s: Seconds = 60
    first_byte_s: Seconds = 60
    gap_s: Seconds = 60
    total_s: Seconds = 600


class TaskOffers(msgspec.Struct, frozen=True, kw_only=True):
    """What a long poll answers when there is work."""

    tasks: tuple[TaskOffer, ...]


class TaskComplete(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Closes an attempt; a small answer may ride along in ``body`` with its HTTP ``http_status`` and ``headers``."""

    task_id: TaskId
    attempt: Attempt
    lease_id: LeaseId
    status: Literal["succeeded", "failed", "returned"]
    fault: Fault | None = None
    reason: Reason = ""
    usage: Annotated[dict[Name, float], Meta(max_length=32)] = {}
    http_status: Annotated[int, Meta(ge=200, le=599)] | None = None
    headers: Headers = ()
    body: bytes | None = None


def plain(value: msgspec.Struct) -> dict[str, Any]:
    """Return a record as plain JSON data."""
    data: dict[str, Any] = msgspec.to_builtins(value)
    return data
