"""What this machine offers: the containers it was assigned, and the model servers its owner attached, as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rma_core.agent.attach.attached import SERVICE

if TYPE_CHECKING:
    from rma_core.agent.attach.attached import AttachedServers
    from rma_core.agent.keeper import Slot
    from rma_core.agent.reconcile import Reconciler
    from rma_core.models.worker import ContainerStatus, TaskOffer

#: What a heartbeat can list, and the slots of one service that HELLO can say.
MAX_STATUSES, MAX_SERVICE_SLOTS = 256, 1024


class Offering(NamedTuple):
    """Both together, with the questions that a heartbeat, HELLO and an offer ask."""

    containers: Reconciler
    attached: AttachedServers

    def statuses(self) -> tuple[ContainerStatus, ...]:
        """Return everything as a heartbeat carries it."""
        return (*self.attached.statuses(), *self.containers.statuses())[:MAX_STATUSES]

    def slots(self) -> dict[str, int]:
        """Return the slots of each service, free and busy ones."""
        slots = self.containers.slots()
        if count := self.attached.slots():
            slots[SERVICE] = min(MAX_SERVICE_SLOTS, slots.get(SERVICE, 0) + count)
        return slots

    def free(self) -> int:
        """Return how many more requests all of it takes together."""
        return self.containers.free() + self.attached.free()

    def busy_share(self) -> float:
        """Return how busy the busiest part is, from 0 to 1."""
        return max(self.containers.busy_share(), self.attached.busy_share())

    def place(self, offer: TaskOffer) -> Slot | str:
        """Take a slot for an offer, or say why there is none: by service, and by model at an attached server."""
        if offer.service != SERVICE or not self.attached:
            return self.containers.place(offer.service, offer.model)
        at_attached = self.attached.place(offer.model)
        if not isinstance(at_attached, str) or self.attached.lists(offer.model):
            return at_attached
        at_container = self.containers.place(offer.service, offer.model)
        return at_attached if isinstance(at_container, str) else at_container
