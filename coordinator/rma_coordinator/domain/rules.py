"""Rules of placement beside tiers: how many copies of what the pool wants, on which machines, spread or packed.

An admin writes them as a TOML file, over what the catalog says::

    strategy = "spread"

    [services.ocr]
    wanted = 3
    most = 6
    prefer = { labels = { site = "lab" } }

    [services.postgres]
    only = { workers = ["worker-0a1b2c3d"] }

    [models."llama3.1:8b"]
    wanted = 2
    over = "site"

Everything wrong with a file is said at once, each with the line that it stands on.
"""

from __future__ import annotations

import re
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from rma_core import toml_lines
from rma_core.errors import Problem, ValidationProblem
from rma_core.models import strict
from rma_core.models.hardware import Name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from rma_core.catalog import CatalogEntry
    from rma_core.model_catalog import ModelEntry

#: ``fill``: who can take a copy first takes it. ``spread``: who runs least; ``pack``: who runs most.
Strategy = Literal["fill", "spread", "pack"]
STRATEGIES: tuple[str, ...] = typing.get_args(Strategy)
#: Copies of a service or a model.
Copies = Annotated[int, Meta(ge=0, le=100_000)]
TierNumber = Annotated[int, Meta(ge=1, le=99)]
Workers = Annotated[tuple[Name, ...], Meta(max_length=1000)]
Labels = Annotated[dict[Name, Annotated[str, Meta(max_length=200)]], Meta(max_length=32)]
#: Tables of one file, and names that an error shows.
MAX_TABLES, SHOWN = 1000, 20
#: A name that needs no quotes, and how msgspec names a field that there is not.
BARE, UNKNOWN = re.compile(r"[A-Za-z0-9_-]+"), re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
#: What a file may hold.
TOP = ("strategy", "services", "models")

E = TypeVar("E", "CatalogEntry", "ModelEntry")


class Machines(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some of a pool's machines: those named, of these tiers, with all of these labels; what is left out is any."""

    workers: Workers = ()
    tiers: Annotated[tuple[TierNumber, ...], Meta(max_length=99)] = ()
    labels: Labels = {}

    def have(self, machine: Machine) -> bool:
        """Say whether a machine is one of them."""
        named = not self.workers or machine.worker_id in self.workers
        of_tier = not self.tiers or machine.tier in self.tiers
        return named and of_tier and all(machine.labels.get(name) == value for name, value in self.labels.items())

    @property
    def words(self) -> str:
        """What they are called in a sentence: ``machines of tier 1 with site = lab``."""
        tiers = f" of tier {', '.join(map(str, self.tiers))}" if self.tiers else ""
        labels = " and ".join(f"{name} = {value}" for name, value in sorted(self.labels.items()))
        some = ", ".join(self.workers[:3]) + (f" and {len(self.workers) - 3} more" if len(self.workers) > 3 else "")  # noqa: PLR2004 - as many as are named
        return (some or "machines") + tiers + (f" with {labels}" if labels else "")


class Machine(NamedTuple):
    """What rules ask of a machine."""

    worker_id: str = ""
    tier: int | None = None
    labels: Mapping[str, str] = {}
    #: Services that its policy would have it run before others, in order.
    prefers: Sequence[str] = ()


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What holds for one service, or for one model; what is left out is as the catalog says.

    ``wanted`` copies are enough, ``most`` is never exceeded; machines that it would ``prefer`` get it first, and
    ``only`` some may have it. ``over`` names a label: copies are shared out evenly over its values.
    """

    wanted: Copies | None = None
    most: Copies | None = None
    prefer: Machines | None = None
    only: Machines | None = None
    strategy: Strategy | None = None
    over: Annotated[str, Meta(max_length=64)] = ""


NO_RULE = Rule()


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """All rules of a pool: by service, and by model, whose own stand in place of its service's."""

    strategy: Strategy = "fill"
    services: dict[str, Rule] = {}
    models: dict[str, Rule] = {}

    def of(self, service: str, model: str = "") -> Rule:
        """Return what holds for a service, or for one of its models."""
        own = self.models.get(model) if model else None
        return own or self.services.get(service, NO_RULE)

    def strategy_of(self, rule: Rule) -> Strategy:
        """Return how copies under a rule are given out."""
        return rule.strategy or self.strategy

    def govern(self, rule: Rule) -> bool:
        """Say whether who gets a copy depends on what all others have, and not on the first who asks."""
        return rule.most is not None or bool(rule.over) or self.strategy_of(rule) != "fill"

    @property
    def governing(self) -> bool:
        """Whether any of them does."""
        return self.strategy != "fill" or any(map(self.govern, (*self.services.values(), *self.models.values())))

    def likes(self, rule: Rule, service: str, tiers: Sequence[int], machine: Machine) -> bool:
        """Say whether a machine is one of those that are to have a service whatever the pool has of it.

        ``tiers`` are those for which the catalog prefers it.
        """
        if service in machine.prefers:
            return True
        return rule.prefer.have(machine) if rule.prefer else machine.tier in tiers

    def entries(self, catalog: Iterable[CatalogEntry]) -> tuple[CatalogEntry, ...]:
        """Return the catalog with as many copies wanted as they say."""
        return tuple(_wanting(entry, self.services.get(entry.service, NO_RULE)) for entry in catalog)

    def wanted_models(self, catalog: Iterable[ModelEntry]) -> tuple[ModelEntry, ...]:
        """Return the models with as many copies wanted as they say; none of a service that is not wanted."""
        found = []
        for entry in catalog:
            own = self.models.get(entry.name, NO_RULE)
            off = self.services.get(entry.service, NO_RULE).wanted == 0
            found.append(msgspec.structs.replace(entry, wanted=0) if off else _wanting(entry, own))
        return tuple(found)

    def unknown(self, entries: Iterable[CatalogEntry], models: Iterable[ModelEntry]) -> list[str]:
        """Return what they name that the pool does not have."""
        services, names = {entry.service for entry in entries}, {entry.name for entry in models}
        return sorted(self.services.keys() - services) + sorted(self.models.keys() - names)


NO_RULES = Rules()


def _wanting(entry: E, rule: Rule) -> E:
    wanted = entry.wanted if rule.wanted is None else rule.wanted
    # Nobody lacks what there may never be.
    wanted = wanted if rule.most is None else min(wanted, rule.most)
    return entry if wanted == entry.wanted else msgspec.structs.replace(entry, wanted=wanted)


def read_rules(
    text: str,
    *,
    entries: Sequence[CatalogEntry] | None = None,
    models: Sequence[ModelEntry] = (),
    subject: str = "the rules",
) -> Rules:
    """Return the rules in a file, for what a pool has (``None``: what they name is not looked up).

    Raises ValidationProblem, naming every problem with its line.
    """
    found = toml_lines.read(text, subject=subject)
    known = None if entries is None else {entry.service: bool(entry.model_format) for entry in entries}
    problems = [Problem(f"$.{key}", f"is unknown; there are {', '.join(TOP)}") for key in found if key not in TOP]
    if (strategy := found.get("strategy", "fill")) not in STRATEGIES:
        problems.append(Problem("$.strategy", f"is {_one_of(STRATEGIES)}"))
    services = _tables(found, "services", known, problems)
    for name, rule in services.items():
        if known and known.get(name) and (rule.wanted or rule.most is not None):
            what = f"{name} serves models: say how many of each under [models.NAME]"
            problems.append(Problem(_path("services", name), what))
    of_models = _tables(found, "models", None if known is None else {entry.name for entry in models}, problems)
    if problems:
        raise toml_lines.placed(subject, problems, text)
    return Rules(strategy=strategy, services=services, models=of_models)


def _tables(
    found: dict[str, Any], kind: str, known: Collection[str] | None, problems: list[Problem]
) -> dict[str, Rule]:
    """Return the rules under ``[services]`` or ``[models]``, and note what is wrong there."""
    tables, rules = found.get(kind, {}), dict[str, Rule]()
    if not isinstance(tables, dict):
        problems.append(Problem(f"$.{kind}", f"has a table for each: [{kind}.NAME]"))
        return rules
    if len(tables) > MAX_TABLES:
        problems.append(Problem(f"$.{kind}", f"has more than {MAX_TABLES} tables"))
        return rules
    for name, table in tables.items():
        where = _path(kind, name)
        if known is not None and name not in known:
            problems.append(Problem(where, f"the pool has no such {kind[:-1]}; there are {_few(known)}"))
        if not isinstance(table, dict):
            problems.append(Problem(where, f"is a table: {where.replace('$.', '[')}]"))
            continue
        try:
            rules[name] = rule = strict.convert(table, Rule, subject=where)
        except ValidationProblem as error:
            problems += [_named(problem, where) for problem in error.problems]
            continue
        problems += [Problem(f"{where}{path}", what) for path, what in _contradictions(rule)]
    return rules


def _named(problem: Problem, where: str) -> Problem:
    """Return a problem of one table as one of the file; msgspec names a field that is unknown beside its path."""
    path, what = problem.where.removeprefix("$"), problem.what
    if unknown := UNKNOWN.fullmatch(what):
        fields = Machines if path in (".prefer", ".only") else Rule
        what = f"is unknown; there are {', '.join(one.name for one in msgspec.structs.fields(fields))}"
        path += f".{unknown[1]}"
    elif "enum" in what:
        what = f"is {_one_of(STRATEGIES)}"
    return Problem(where + path, what)


def _contradictions(rule: Rule) -> Iterable[tuple[str, str]]:
    if rule.wanted is not None and rule.most is not None and rule.wanted > rule.most:
        yield ".most", f"is less than the {rule.wanted} that are wanted"
    for name, machines in (("prefer", rule.prefer), ("only", rule.only)):
        if machines is not None and machines == Machines():
            yield f".{name}", "names no machines: it needs workers, tiers or labels"


def _path(kind: str, name: str) -> str:
    return f"$.{kind}.{name}" if BARE.fullmatch(name) else f'$.{kind}["{name}"]'


def _one_of(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _few(names: Iterable[str]) -> str:
    """Return some names in words; there may be thousands."""
    known = sorted(names)
    return ", ".join(known[:SHOWN]) + (f" and {len(known) - SHOWN} more" if len(known) > SHOWN else "") or "none"
