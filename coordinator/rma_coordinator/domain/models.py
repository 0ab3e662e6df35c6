"""The models of the pool: which there are now, and which were there before, so that a client can be told apart."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from rma_core.models.sizes import duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rma_coordinator.domain.fleet import Worker
    from rma_core.model_catalog import ModelEntry
    from rma_core.models.worker import ContainerStatus, ModelStatus

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
#: States of a container whose model is on its way for the first time.
COMING = frozenset({"pending", "pulling", "starting", "backoff"})
HERE_OR_COMING = COMING | {"healthy"}


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One model that some worker has had; ``context`` in tokens, 0 where nobody said, ``seen_at`` Unix seconds."""

    name: str
    context: int
    seen_at: float


class ModelView(NamedTuple):
    """One model as clients are shown it; ``workers`` may be given work with it now, ``loaded`` of them have it ready.

    ``capabilities`` is what it can do on all of them that say so. While it is loading, ``progress`` (0..1) and
    ``eta_s`` are those of the worker that is furthest, where they are known; ``coming`` are the workers that fetch it
    or load it for the first time. Unix seconds.
    """

    name: str
    state: Literal["loaded", "loading", "cold", "away"]
    workers: int
    context: int
    seen_at: float
    loaded: int = 0
    capabilities: tuple[str, ...] = ()
    progress: float | None = None
    eta_s: float | None = None
    coming: int = 0

    @property
    def sentence(self) -> str:
        """How it stands, for a client that cannot be served: how far it is, and the time left where that is known."""
        if not self.coming:
            return f"the pool has the model {self.name!r}, but no worker offers it now"
        where = "1 worker" if self.coming == 1 else f"{self.coming} workers"
        done = "" if self.progress is None else f": {self.progress:.0%} done"
        left = "" if self.eta_s is None else f", about {duration(self.eta_s)} left"
        return f"the model {self.name!r} is made ready on {where}{done}{left}"


class Models:
    """Every model that the pool has, had, or offers by its catalog; ``wall`` gives Unix seconds."""

    def __init__(self, *, wall: Callable[[], float], offered: Iterable[ModelEntry] = ()) -> None:
        self._wall = wall
        self._offered = {entry.name: entry for entry in offered}
        self._seen: OrderedDict[str, ModelRecord] = OrderedDict()
        #: What is to be written and what is to be forgotten; whoever does that takes them out.
        self.changed, self.gone = set[str](), set[str]()
        #: Whether that holds any model for the first time.
        self.news = False

    def restore(self, records: Iterable[ModelRecord]) -> None:
        """Take in what the store holds, and forget what nobody had for long."""
        since = self._wall() - REMEMBERED_S
        for record in sorted(records, key=lambda record: record.seen_at):
            if record.seen_at < since:
                self.gone.add(record.name)
            else:
                self._seen[record.name] = record

    def __contains__(self, name: object) -> bool:
        return name in self._seen or name in self._offered

    def newest(self, count: int) -> list[str]:
        """Return the names that were noted last, then those of the catalog."""
        return list(islice(dict.fromkeys([*reversed(self._seen), *self._offered]), count))

    def record(self, name: str) -> ModelRecord | None:
        """Return what is known of a model."""
        return self._seen.get(name)

    def note(self, containers: Iterable[ContainerStatus]) -> None:
        """A worker says what it has, or makes ready."""
        now = self._wall()
        models = (model for one in containers if one.state in HERE_OR_COMING for model in one.models)
        for model in islice(models, MOST_OF_ONE):
            known = self._seen.get(model.name)
            context = model.context or (known.context if known else 0)
            if known and known.context == context and 0 <= now - known.seen_at < NOTED_EVERY_S:
                continue
            self.news = self.news or known is None
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
        for entry in self._offered.values():
            if entry.name not in here and entry.name not in away:
                away[entry.name] = ModelView(entry.name, "away", 0, entry.context, 0)
        now = self._wall()
        return {name: view._replace(seen_at=now) for name, view in sorted(here.items())} | dict(sorted(away.items()))


def _best(containers: Iterable[ContainerStatus]) -> dict[str, ModelView]:
    """Return the models of one worker, each once."""
    found: dict[str, ModelView] = {}
    for one in containers:
        if one.state in HERE_OR_COMING:
            for model in one.models:
                view = _seen(model, coming=one.state in COMING)
                known = found.get(model.name)
                found[model.name] = _of_one(known, view) if known else view
    return found


def _seen(model: ModelStatus, *, coming: bool) -> ModelView:
    state: Literal["loaded", "loading", "cold"] = "loading" if coming else model.state
    loading = state == "loading"
    return ModelView(
        name=model.name,
        state=state,
        workers=0 if coming else 1,
        context=model.context,
        seen_at=0,
        loaded=int(state == "loaded"),
        capabilities=model.capabilities,
        progress=model.progress if loading else None,
        eta_s=model.eta_s if loading else None,
        coming=int(coming),
    )


def _of_one(one: ModelView, other: ModelView) -> ModelView:
    both = _joined(one, other)
    workers, loaded = min(1, both.workers), min(1, both.loaded)
    return both._replace(workers=workers, loaded=loaded, coming=min(1, both.coming) if not both.workers else 0)


def _joined(one: ModelView, other: ModelView) -> ModelView:
    states = {one.state, other.state}
    state = next(state for state in STATES if state in states)
    # What every one of them takes is what a client can count on.
    contexts = [view.context for view in (one, other) if view.context]
    loading = [view for view in (one, other) if view.state == "loading"] if state == "loading" else []
    said = [view.capabilities for view in (one, other) if view.capabilities]
    return ModelView(
        name=one.name,
        state=state,
        workers=one.workers + other.workers,
        context=min(contexts, default=0),
        seen_at=0,
        loaded=one.loaded + other.loaded,
        capabilities=tuple(word for word in said[0] if word in said[-1]) if said else (),
        progress=max((view.progress for view in loading if view.progress is not None), default=None),
        eta_s=min((view.eta_s for view in loading if view.eta_s is not None), default=None),
        coming=one.coming + other.coming,
    )
