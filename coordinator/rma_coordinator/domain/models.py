"""The models of the pool: which there are now, and which were there before, so that a client can be told apart."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rma_coordinator.domain.fleet import Worker
    from rma_core.models.worker import ContainerStatus

#: Models that are remembered: workers name them, and a name costs nothing.
MOST_MODELS = 2000
#: Of these, what one worker can have.
MOST_OF_ONE = 256
#: Seconds after which a model that nobody has any more is forgotten.
REMEMBERED_S = 30 * 86_400.0
#: A model is noted anew when it was last noted longer ago than this.
NOTED_EVERY_S = 3600.0
#: The readiest state of several workers counts.
STATES: tuple[Literal["loaded", "loading", "cold"], ...] = ("loaded", "loading", "cold")


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One model that some worker has had; ``context`` in tokens, 0 where nobody said, ``seen_at`` Unix seconds."""

    name: str
    context: int
    seen_at: float


class ModelView(NamedTuple):
    """One model as clients are shown it; ``workers`` may be given work with it now, ``loaded`` of them have it ready.

    ``capabilities`` is what it can do on all of them that say so.
    """

    name: str
    state: Literal["loaded", "loading", "cold", "away"]
    workers: int
    context: int
    seen_at: float
    loaded: int = 0
    capabilities: tuple[str, ...] = ()


class Models:
    """Every model that the pool has, or had; ``wall`` gives Unix seconds."""

    def __init__(self, *, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._seen: OrderedDict[str, ModelRecord] = OrderedDict()
        #: What is to be written and what is to be forgotten; whoever does that takes them out.
        self.changed, self.gone = set[str](), set[str]()

    def restore(self, records: Iterable[ModelRecord]) -> None:
        """Take in what the store holds, and forget what nobody had for long."""
        since = self._wall() - REMEMBERED_S
        for record in sorted(records, key=lambda record: record.seen_at):
            if record.seen_at < since:
                self.gone.add(record.name)
            else:
                self._seen[record.name] = record

    def __contains__(self, name: object) -> bool:
        return name in self._seen

    def newest(self, count: int) -> list[str]:
        """Return the names that were noted last."""
        return list(islice(reversed(self._seen), count))

    def record(self, name: str) -> ModelRecord | None:
        """Return what is known of a model."""
        return self._seen.get(name)

    def note(self, containers: Iterable[ContainerStatus]) -> None:
        """A worker says what it has."""
        now = self._wall()
        models = (model for one in containers if one.state == "healthy" for model in one.models)
        for model in islice(models, MOST_OF_ONE):
            known = self._seen.get(model.name)
            context = model.context or (known.context if known else 0)
            if known and known.context == context and 0 <= now - known.seen_at < NOTED_EVERY_S:
                continue
            self._seen[model.name] = ModelRecord(name=model.name, context=context, seen_at=now)
            self._seen.move_to_end(model.name)
            self.changed.add(model.name)
            self.gone.discard(model.name)
        while len(self._seen) > MOST_MODELS:
            name, _ = self._seen.popitem(last=False)
            self.changed.discard(name)
            self.gone.add(name)

    def view(self, workers: Iterable[Worker]) -> dict[str, ModelView]:
        """Return every model by name: those of workers that may be given work, then those that are away."""
        here: dict[str, ModelView] = {}
        for worker in workers:
            if worker.usable:
                for name, model in _best(worker.containers).items():
                    here[name] = model if name not in here else _joined(here[name], model)
        away = {
            record.name: ModelView(record.name, "away", 0, record.context, record.seen_at)
            for record in self._seen.values()
            if record.name not in here
        }
        now = self._wall()
        return {name: view._replace(seen_at=now) for name, view in sorted(here.items())} | dict(sorted(away.items()))


def _best(containers: Iterable[ContainerStatus]) -> dict[str, ModelView]:
    found: dict[str, ModelView] = {}
    for one in containers:
        if one.state == "healthy":
            for model in one.models:
                loaded = int(model.state == "loaded")
                view = ModelView(model.name, model.state, 1, model.context, 0, loaded, model.capabilities)
                known = found.get(model.name)
                if known:
                    view = _joined(known, view)
                    view = view._replace(workers=1, loaded=min(1, view.loaded))
                found[model.name] = view
    return found


def _joined(one: ModelView, other: ModelView) -> ModelView:
    states = {one.state, other.state}
    state = next(state for state in STATES if state in states)
    # What every one of them takes is what a client can count on.
    contexts = [view.context for view in (one, other) if view.context]
    said = [view.capabilities for view in (one, other) if view.capabilities]
    return ModelView(
        name=one.name,
        state=state,
        workers=one.workers + other.workers,
        context=min(contexts, default=0),
        seen_at=0,
        loaded=one.loaded + other.loaded,
        capabilities=tuple(word for word in said[0] if word in said[-1]) if said else (),
    )
