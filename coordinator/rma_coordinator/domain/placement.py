"""Placement: which services of the catalog one machine gets, and why it does not get the others. Pure.

A tier is a ranking, not a fence: what prefers the machine's tier comes first, then whatever the pool lacks. What is
chosen fits the machine together. A service that serves models is chosen once for each model, by what the pool lacks
most, the larger model first. What an admin wants of placement besides is in `rules`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_coordinator.domain.census import NOBODY, NOTHING, Census, Group, Standing
from rma_coordinator.domain.rules import NO_RULES, Machine, Rule, Rules
from rma_coordinator.domain.worker_records import same
from rma_core.catalog import ISOLATED_ONLY, Room
from rma_core.model_catalog import fitting, model_assignment
from rma_core.models.worker import Assignment, lane

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from rma_coordinator.domain.worker_records import WorkerRecord
    from rma_core.catalog import CatalogEntry
    from rma_core.model_catalog import ModelEntry
    from rma_core.models.hardware import HardwareReport
    from rma_core.models.worker import RuntimeReport

#: Comes after every place in an entry's list of tiers, which has at most 32; and before it what a rule prefers. What
#: a policy prefers, at most as many, comes before that.
NOT_PREFERRED, PREFERRED, BY_POLICY = 99, -1, -99
#: Models of one service for which a machine is told why it does not get them; of the rest it is told how many.
TOLD_MODELS = 16

NOT_AGREED = "the owner has not agreed"
#: What a machine is told that has room for what others run.
ENOUGH, AS_MANY = "enough copies in the pool", "the pool runs as many copies as it may"


class Placement(NamedTuple):
    """What a worker should run, best reason first, and for each service it does not get a sentence that says why.

    A model stands beside its service: ``llm llama3.1:8b``.
    """

    assignments: tuple[Assignment, ...]
    reasons: dict[str, str]
    standing: Standing = NOTHING


class Ruling(NamedTuple):
    """The rules of a pool, as they bear on one machine; ``census`` counts all others.

    While machines are ``counted`` it is only said who has what and room for what. A machine that ``takes_nothing``,
    which says why, leaves what others may take to them.
    """

    rules: Rules = NO_RULES
    machine: Machine = Machine()
    census: Census = NOBODY
    counted: bool = False
    takes_nothing: str = ""


NO_RULING = Ruling()


class _Wish(NamedTuple):
    """What bears on one machine's placement beside the machine itself."""

    ruling: Ruling
    pool: Mapping[str, int]
    allowed: Collection[str] | None
    agreed: Collection[str] | None
    own: Collection[str]
    runtimes: Collection[RuntimeReport]
    #: The lanes that the worker has, with their places in the order in which they were placed.
    current: Mapping[str, int]


class _Candidate(NamedTuple):
    """A service that may be placed, with one of the pool's models where it serves those."""

    entry: CatalogEntry
    rule: Rule
    #: Whether the machine is one of those that should have it whatever the pool has.
    liked: bool
    model: ModelEntry | None = None

    @property
    def lane(self) -> str:
        return lane(self.entry.service, self.model.name if self.model else "")

    @property
    def wanted(self) -> int:
        return self.model.wanted if self.model else self.entry.wanted

    @property
    def size(self) -> int:
        return self.model.all_bytes if self.model else 0


def place(
    entries: Iterable[CatalogEntry],
    report: HardwareReport,
    tier: int | None,
    *,
    models: Sequence[ModelEntry] = (),
    pool: Mapping[str, int],
    allowed: Collection[str] | None = None,
    agreed: Collection[str] | None = None,
    own: Collection[str] = (),
    runtimes: Collection[RuntimeReport] = (),
    current: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    ruling: Ruling = NO_RULING,
) -> Placement:
    """Choose services for one machine; the order of ``entries`` and ``models`` does not matter.

    ``pool`` counts the copies of each service, and of each lane (`Assignment.lane`), on *other* workers; ``allowed``
    are the services the owner agreed to, ``agreed`` the models (``None``: all), ``own`` the models that the owner
    offers; ``runtimes`` is what the agent said of its runtimes (empty: it said nothing, and containers are taken for
    granted); ``current`` are the lanes the worker has, in the order of its assignments: they stay as long as they fit,
    so that nothing flaps (leave them out to place anew, as after a change of tier). Only a model of which the pool has
    enough elsewhere gives way to one that nobody offers. ``env`` goes into every container.
    """
    ruling = ruling._replace(machine=ruling.machine._replace(tier=tier))
    candidates, without = _candidates(entries, models, ruling)
    if tier is None:
        services = {candidate.entry.service for candidate in candidates} | {entry.service for entry in without}
        return Placement((), dict.fromkeys(sorted(services), "the machine is below the lowest tier"))
    known = {name: number for number, name in enumerate(current)}
    wish = _Wish(ruling, pool, allowed, agreed, own, runtimes, known)
    places = _Places(report, wish, env or {})
    spare = any(_spare(candidate, wish) for candidate in candidates)
    for candidate in sorted(candidates, key=lambda one: _rank(one, wish, swap=spare)):
        places.try_one(candidate)
    for entry in without:
        # Of several engines one may have models.
        if not any(candidate.entry.service == entry.service for candidate in candidates):
            places.reasons[entry.service] = "the pool has no model for it yet"
    return Placement(tuple(places.chosen), _shortened(places.reasons), places.standing())


def _candidates(
    entries: Iterable[CatalogEntry], models: Sequence[ModelEntry], ruling: Ruling
) -> tuple[list[_Candidate], list[CatalogEntry]]:
    """Return everything that may be placed, and the engines for which there is no model."""
    found: list[_Candidate] = []
    without = []
    for entry in entries:
        if not entry.model_format:
            found.append(_candidate(entry, None, ruling))
            continue
        own = [m for m in models if (m.service, m.format) == (entry.service, entry.model_format)]
        found += [_candidate(entry, model, ruling) for model in own]
        if not own:
            without.append(entry)
    return found, without


def _candidate(entry: CatalogEntry, model: ModelEntry | None, ruling: Ruling) -> _Candidate:
    rule = ruling.rules.of(entry.service, model.name if model else "")
    return _Candidate(entry, rule, ruling.rules.likes(rule, entry.service, entry.tiers, ruling.machine), model)


class _Places:
    """One machine while it is filled."""

    def __init__(self, report: HardwareReport, wish: _Wish, env: Mapping[str, str]) -> None:
        self._room, self._wish, self._env = Room.of(report), wish, env
        self.chosen: list[Assignment] = []
        self.reasons: dict[str, str] = {}
        self._lanes = set[str]()
        self._with_model = set[str]()
        self._governed: list[_Candidate] = []
        self._left: list[_Candidate] = []

    def try_one(self, candidate: _Candidate) -> None:
        """Take what the candidate needs of the machine, or note why it is not placed."""
        name = candidate.lane
        if name in self._lanes:
            # Another engine serves this model here.
            return
        reason = _refusal(candidate, self._wish) or self._enough(candidate)
        if not reason and (reason := self._left_to_others(candidate)):
            self._left.append(candidate)
        found = reason or self._take(candidate)
        if isinstance(found, str):
            self.reasons.setdefault(name, found)
            return
        self.chosen.append(found)
        self._lanes.add(name)
        if self._governs(candidate):
            self._governed.append(candidate)
        self.reasons.pop(name, None)
        if candidate.model is not None:
            self._with_model.add(candidate.entry.service)

    def _enough(self, candidate: _Candidate) -> str:
        """Say that a further model of a service is not lacked; the first one is always of use."""
        if candidate.model is None or candidate.entry.service not in self._with_model:
            return ""
        if candidate.lane in self._wish.current:
            return ""
        return _enough_copies(candidate, self._wish)

    def _governs(self, candidate: _Candidate) -> bool:
        return self._wish.ruling.rules.govern(candidate.rule)

    def _left_to_others(self, candidate: _Candidate) -> str:
        """Say why a service is not this machine's to take, as things stand in the pool."""
        wish, here = self._wish, candidate.lane in self._wish.current
        enough = "" if candidate.liked or here else _enough_copies(candidate, wish)
        if enough or not self._governs(candidate):
            return enough
        if wish.ruling.counted:
            return "" if here else "who has room for it is being counted"
        if (too_many := _too_many(candidate, wish)) or here:
            return too_many
        bounded = not candidate.liked or candidate.rule.most is not None
        return wish.ruling.takes_nothing or (self._better(candidate) if bounded else "")

    def _better(self, candidate: _Candidate) -> str:
        """Say that other machines come before this one for all copies that there may still be."""
        wish, rule, group = self._wish, candidate.rule, _group(candidate, self._wish)
        bounds = [] if candidate.liked else [candidate.wanted]
        left = min([*bounds, *([] if rule.most is None else [rule.most])]) - _running(candidate, wish)
        # What it runs and has not been looked at yet counts too, as it does with all others.
        runs = len(self._lanes | wish.current.keys())
        count = wish.ruling.census.better(candidate.lane, group, runs, strategy=wish.ruling.rules.strategy_of(rule))
        if count < left:
            return ""
        return f"left to {count} machines that come first" if count > 1 else "left to a machine that comes first"

    def standing(self) -> Standing:
        """Return what the machine has of what rules govern, and what more it has room for."""
        room = [
            candidate
            for candidate in self._left
            if candidate.lane not in self._lanes and self._governs(candidate) and self._fits(candidate)
        ]
        has, more = (
            tuple((candidate.lane, _group(candidate, self._wish)) for candidate in some)
            for some in (self._governed, room)
        )
        return Standing(has, more, len(self.chosen)) if has or more else NOTHING

    def _fits(self, candidate: _Candidate) -> bool:
        entry, model, forms = candidate.entry, candidate.model, _forms(candidate.entry, self._wish.runtimes)
        if model is None:
            return any(not self._room.lacks(entry.needs, contained=contained) for contained in forms)
        return not isinstance(fitting(entry, model, self._room, forms, there=False), str)

    def _take(self, candidate: _Candidate) -> Assignment | str:
        entry, model = candidate.entry, candidate.model
        forms = _forms(entry, self._wish.runtimes)
        if model is None:
            reasons = []
            for contained in forms:
                reason = self._room.lacks(entry.needs, contained=contained)
                if not reason:
                    self._room.take(entry.needs, contained=contained)
                    return assignment(entry, env=self._env)
                reasons.append(reason)
            return reasons[0]
        there = candidate.lane in self._wish.current
        fit = fitting(entry, model, self._room, forms, there=there)
        if isinstance(fit, str):
            return fit
        needs = msgspec.structs.replace(fit.needs, storage="0B") if there else fit.needs
        self._room.take(needs, contained=fit.contained)
        return model_assignment(entry, model, fit, env=self._env)


def could_run(entries: Iterable[CatalogEntry], machine: WorkerRecord) -> frozenset[str]:
    """Return the services that a machine could run if it ran nothing else.

    What is installed there might work again, and its owner might agree: neither is asked.
    """
    if machine.tier is None:
        return same(frozenset())
    installed = [one for one in machine.runtimes if one.state != "undetected"]
    runtimes = [msgspec.structs.replace(one, state="healthy") for one in installed] or machine.runtimes
    room = Room.of(machine.report)
    found = frozenset(
        entry.service
        for entry in entries
        if any(not room.lacks(entry.needs, contained=contained) for contained in _forms(entry, runtimes))
    )
    return same(found)


def assignment(entry: CatalogEntry, *, env: Mapping[str, str]) -> Assignment:
    """Return a catalog entry as it is sent to a worker; ``env`` is the pool's and wins over the catalog's."""
    return Assignment(
        name=entry.name,
        service=entry.service,
        image=entry.image,
        image_digest=entry.image_digest,
        port=entry.port,
        requires_gpu=entry.needs.gpu,
        env={**entry.env, **env},
        health_path=entry.health_path,
        start_timeout_s=entry.start_timeout_s,
        routes=entry.routes,
        slots=entry.slots,
        needs=entry.needs,
        limits=entry.limits,
        process=entry.process,
        trusted=entry.trusted,
    )


def _spare(candidate: _Candidate, wish: _Wish) -> bool:
    """Whether a model that this machine has could be spared: the pool has as many elsewhere as it wants."""
    has_it = candidate.model is not None and candidate.lane in wish.current
    return has_it and wish.pool.get(candidate.lane, 0) >= candidate.wanted


def _rank(candidate: _Candidate, wish: _Wish, *, swap: bool) -> tuple[int, int, bool, int, int, str, str]:
    """Order: what runs already; what prefers this tier most; what nobody offers; what is lacked most; large; by name.

    Among what runs already the pool's needs do not count: they change all the time, and nothing may flap for them. It
    goes in the order in which it was placed, for in another it might not fit: who comes first has a GPU for itself.
    Where that has a model which can be spared (``swap``), one that nobody offers goes before it.
    """
    entry, position = candidate.entry, _position(candidate, wish.ruling.machine)
    running = wish.pool.get(candidate.lane, 0)
    last = (-candidate.size, candidate.lane, entry.name)
    if candidate.lane in wish.current:
        return (2 if _spare(candidate, wish) else 0, wish.current[candidate.lane], False, position, *last)
    lacked = swap and candidate.model is not None and not running and candidate.wanted > 0
    return (1 if lacked else 3, position, running > 0, running - candidate.wanted, *last)


def _position(candidate: _Candidate, machine: Machine) -> int:
    """Return how much a service is preferred for a machine: the less, the more."""
    service, tiers = candidate.entry.service, candidate.entry.tiers
    if service in machine.prefers:
        return BY_POLICY + machine.prefers.index(service)
    if candidate.rule.prefer is not None:
        return PREFERRED if candidate.liked else NOT_PREFERRED
    return tiers.index(machine.tier) if machine.tier in tiers else NOT_PREFERRED


def _group(candidate: _Candidate, wish: _Wish) -> Group:
    over = candidate.rule.over
    return Group(candidate.liked, wish.ruling.machine.labels.get(over, "") if over else "")


def _refusal(candidate: _Candidate, wish: _Wish) -> str:
    """Say why the machine does not get a service, whatever room there is; an empty string when nothing does."""
    entry = candidate.entry
    if not candidate.wanted:
        return "the pool wants no copies of it"
    if wish.allowed is not None and entry.service not in wish.allowed:
        return NOT_AGREED
    if candidate.model is not None and (reason := _not_this_model(candidate.model.name, wish)):
        return reason
    if not _forms(entry, wish.runtimes):
        return _no_runtime(entry, wish.runtimes)
    only = candidate.rule.only
    return f"it is kept to {only.words}" if only and not only.have(wish.ruling.machine) else ""


def _not_this_model(name: str, wish: _Wish) -> str:
    if name in wish.own:
        return "the owner offers this model already"
    return f"{NOT_AGREED} to this model" if wish.agreed is not None and name not in wish.agreed else ""


def _too_many(candidate: _Candidate, wish: _Wish) -> str:
    """Say that the pool runs as many copies as it may; one that runs here goes unless others should go before it."""
    most = candidate.rule.most
    if most is None or (surplus := _running(candidate, wish) + 1 - most) <= 0:
        return ""
    here = candidate.lane in wish.current
    if here and wish.ruling.census.worse(candidate.lane, _group(candidate, wish)) >= surplus:
        return ""
    return f"{AS_MANY} ({most})"


def _running(candidate: _Candidate, wish: _Wish) -> int:
    """Return the copies on other machines that count here.

    For a machine that is liked only those on such machines do: it takes its copy first, and then one of the others, for
    whom all count, gives up its own.
    """
    liked = candidate.liked and candidate.rule.most is not None
    return wish.ruling.census.copies(candidate.lane, liked=True) if liked else wish.pool.get(candidate.lane, 0)


def _enough_copies(candidate: _Candidate, wish: _Wish) -> str:
    running = wish.pool.get(candidate.lane, 0)
    if running < candidate.wanted:
        return ""
    return f"{ENOUGH} ({running} running, {candidate.wanted} wanted)"


def _shortened(reasons: dict[str, str]) -> dict[str, str]:
    """Return the reasons with those of many models of one service summed up: every worker's record has them."""
    kept: dict[str, str] = {}
    left: dict[str, int] = {}
    told: dict[str, int] = {}
    for name, reason in reasons.items():
        service, _, model = name.partition(" ")
        told[service] = told.get(service, 0) + bool(model)
        if told[service] > TOLD_MODELS:
            left[service] = left.get(service, 0) + 1
        else:
            kept[name] = reason
    return kept | {service: f"and {count} more models" for service, count in left.items()}


def runs_containers(runtimes: Collection[RuntimeReport]) -> bool:
    """Whether a machine with these runtimes runs services as containers; one that tells of none is thought to."""
    return not runtimes or any(runtime.isolated for runtime in runtimes if runtime.state == "healthy")


def _forms(entry: CatalogEntry, runtimes: Collection[RuntimeReport]) -> list[bool]:
    """Return how the service can run here: ``True`` as a container, ``False`` as a process."""
    usable = [runtime for runtime in runtimes if runtime.state == "healthy"]
    if not entry.trusted:
        return [True] * any(runtime.isolated and not runtime.cannot_limit for runtime in usable)
    contained = runs_containers(runtimes)
    as_process = entry.process is not None and entry.service not in ISOLATED_ONLY
    bare = as_process and any(not runtime.isolated for runtime in usable)
    return [True] * contained + [False] * bare


def _no_runtime(entry: CatalogEntry, runtimes: Collection[RuntimeReport]) -> str:
    ill = "; ".join(
        sorted(f"{r.name}: {r.reason}" for r in runtimes if r.isolated and r.reason and r.state != "healthy")
    )
    why = f" ({ill})" if ill else ""
    loose = [r for r in runtimes if r.isolated and r.state == "healthy"]
    if not entry.trusted and (loose or not runtimes):
        told = "; ".join(sorted(f"{r.name} cannot limit {', '.join(r.cannot_limit)}" for r in loose))
        return f"its image is not trusted, and no engine here can limit it ({told or 'the worker told of none'})"
    if entry.process is None or entry.service in ISOLATED_ONLY:
        return f"only as a container, and no engine works here{why}"
    return f"no engine works here{why}, and the owner does not let services run as plain processes"
