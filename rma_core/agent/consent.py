"""What the machine's owner agreed to: asked before anything is pulled, and stronger than any coordinator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rma_core.models.weights import AssignedModel
    from rma_core.models.worker import Assignment


def repository(image: str) -> str:
    """Return an image's name without tag and digest: new versions of an agreed image need no new consent."""
    name = image.partition("@")[0]
    head, _, last = name.rpartition("/")
    last = last.partition(":")[0]
    return f"{head}/{last}" if head else last


class Consent(msgspec.Struct, frozen=True, kw_only=True):
    """Services, each with the image repositories that were shown (an empty list: any); or ``everything``.

    ``models`` are those that were shown, each with its licence; ``None`` is any.
    """

    everything: bool = False
    services: dict[str, list[str]] = {}
    models: dict[str, str] | None = None

    @classmethod
    def to(cls, assignments: Iterable[Assignment]) -> Consent:
        """Return the consent to exactly what was shown."""
        services: dict[str, list[str]] = {}
        models: dict[str, str] = {}
        for wanted in assignments:
            if wanted.model is not None:
                models[wanted.model.name] = wanted.model.licence
            images = services.setdefault(wanted.service, [])
            if repository(wanted.image) not in images:
                images.append(repository(wanted.image))
        return cls(services=services, models=models)

    def narrowed(self, services: Sequence[str]) -> Consent:
        """Return what the owner's setting ``services`` makes of it: when given, that list is the owner's word."""
        if not services:
            return self
        return Consent(services={name: self.services.get(name, []) for name in services}, models=self.models)

    @property
    def names(self) -> tuple[str, ...] | None:
        """The agreed services, or ``None`` for whatever the pool chooses."""
        return None if self.everything else tuple(sorted(self.services))

    @property
    def model_names(self) -> tuple[str, ...] | None:
        """The agreed models, or ``None`` for whatever the pool chooses."""
        return None if self.everything or self.models is None else tuple(sorted(self.models))

    def refusal(self, wanted: Assignment) -> str:
        """Say why the owner's consent does not cover an assignment; an empty string when it does."""
        if self.everything:
            return ""
        images = self.services.get(wanted.service)
        if images is None:
            return f"the owner of this machine has not agreed to run {wanted.service}"
        if images and repository(wanted.image) not in images:
            return f"the owner agreed to {wanted.service} from {', '.join(images)}, not from {repository(wanted.image)}"
        return self._model_refusal(wanted.model) if wanted.model else ""

    def _model_refusal(self, model: AssignedModel) -> str:
        if self.models is None:
            return ""
        licence = self.models.get(model.name)
        if licence is None:
            return f"the owner of this machine has not agreed to the model {model.name} ({model.licence})"
        if licence != model.licence:
            return f"the owner agreed to {model.name} under {licence or 'no licence'}, not under {model.licence}"
        return ""
