"""What the keeper of one container needs of the agent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from rma_core.agent.endpoint import Endpoint
    from rma_core.agent.engines import Engine
    from rma_core.agent.llm.model_files import ModelFiles
    from rma_core.agent.llm.model_room import ModelRoom
    from rma_core.models.hardware import Device
    from rma_core.models.worker import Assignment


class Context(Protocol):
    """What a keeper needs of the agent."""

    worker_id: str
    engines: Sequence[Engine]
    room: ModelRoom
    files: ModelFiles
    model_idle_s: float

    def clock(self) -> float:
        """Return monotonic seconds."""

    def uniform(self, low: float, high: float) -> float:
        """Return a random number."""

    def refusal(self, wanted: Assignment) -> str:
        """Say why the owner's consent does not cover it, or nothing."""

    def gpu_for(self, name: str, wanted: Assignment) -> Device | None:
        """Return the GPU for a container: one that fits and that no other has."""

    def by_owner(self, wanted: Assignment) -> bool:
        """Say whether its owner offers it, and nobody assigned it."""

    def changed(self) -> None:
        """Something that the coordinator should know has changed."""

    def check(self, client: Endpoint, path: str) -> Awaitable[str]:
        """Ask a service for its health; an empty string is good, anything else the reason."""
