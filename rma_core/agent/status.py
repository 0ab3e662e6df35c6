"""What the control socket answers to ``status``."""

from __future__ import annotations

from typing import Literal

import msgspec

from rma_core.models.hardware import ProbeReport
from rma_core.models.worker import AttemptRef, ContainerStatus, PluginReport, RuntimeReport


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a running agent stands.

    ``connection`` is how tasks come now; ``standing`` whether the coordinator can be spoken to, and why not.
    """

    worker_id: str
    coordinator: str
    connection: Literal["channel", "polling", "none"]
    standing: Literal["joining", "registered", "unreachable", "unknown", "refused"]
    standing_reason: str = ""
    tier: int | None = None
    tier_reason: str = ""
    generation: int = 0
    containers: tuple[ContainerStatus, ...] = ()
    attempts: tuple[AttemptRef, ...] = ()
    runtimes: tuple[RuntimeReport, ...] = ()
    plugins: tuple[PluginReport, ...] = ()
    probes: tuple[ProbeReport, ...] = ()
    #: Addresses of the model servers that the owner attached.
    attached: tuple[str, ...] = ()
    current_load: float = 0.0
    draining: bool = False
    #: Since when the owner has paused the machine; empty while it works.
    paused: str = ""
    #: Why models are not offered that the owner wants to share.
    left_out: tuple[str, ...] = ()
    uptime_s: float = 0.0
    tasks_succeeded: int = 0
    tasks_failed: int = 0
