"""The tier policy ``threshold``: a machine gets the best tier of which it clears every bar.

The table is configuration; ``[[plugins.threshold.tiers]]`` replaces it as a whole::

    [[plugins.threshold.tiers]]
    tier = 1
    name = "GPU"
    gpu_memory = "8GB"
    cpu_cores = 8
    ram = "16GB"

A tier may name services that its machines should get before others: ``prefers = ["ocr", "notes"]``.

``[[plugins.threshold.exceptions]]`` come before the table: the first that fits a machine decides::

    [[plugins.threshold.exceptions]]
    labels = { site = "lab" }
    tier = 1
    reason = "bought for this pool"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from rma_core import TierDecision, hookimpl
from rma_core.catalog import NOMINAL_SHARE, ServiceName
from rma_core.errors import Problem, ValidationProblem
from rma_core.models import strict
from rma_core.models.hardware import Name, Size
from rma_core.models.sizes import human, parse_size, storage_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rma_core import HardwareReport, PluginConfig, PolicyInput, TierPolicy

#: The version of RMA's hooks that this was written for.
RMA_HOOK_VERSION = 1
#: More of a driver's own words than this hides the rest of the sentence.
QUOTE_CHARACTERS = 160
#: What the table ``[plugins.threshold]`` may hold; the second is read by the plugin host.
SETTINGS = ("tiers", "exceptions", "deadline_s")
#: What an exception gives in place of a tier's number.
NO_TIER = "none"
#: What a size that is none is told to match.
SIZE_PATTERN = "([KMGTPkmgtp]i?)?B"


#: Services that machines should get before others, in order.
Prefers = Annotated[tuple[ServiceName, ...], Meta(max_length=32)]


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """One tier and its bars; sizes are nominal ("16GB" is cleared by 15.4 GiB), a bar that is left out is no bar."""

    tier: Annotated[int, Meta(ge=1, le=99)]
    name: Name
    gpu_memory: Size = "0B"
    cpu_cores: Annotated[int, Meta(ge=0, le=65_536)] = 0
    ram: Size = "0B"
    storage: Size = "0B"
    prefers: Prefers = ()


class Exemption(msgspec.Struct, frozen=True, kw_only=True):
    """Machines that get a tier whatever they have: those named, or with all of some labels, or both."""

    tier: Annotated[int, Meta(ge=1, le=99)] | Literal["none"]
    workers: Annotated[tuple[Name, ...], Meta(max_length=1000)] = ()
    labels: Annotated[dict[Name, Annotated[str, Meta(max_length=200)]], Meta(max_length=32)] = {}
    reason: Annotated[str, Meta(max_length=500)] = ""
    prefers: Prefers = ()

    def fits(self, asked: PolicyInput) -> bool:
        """Say whether it is for this machine."""
        named = not self.workers or asked.worker_id in self.workers
        return named and all(asked.labels.get(label) == value for label, value in self.labels.items())

    def decision(self) -> TierDecision:
        """Return the tier, and why."""
        whom = [f"for {_list(sorted(self.workers)[:3])}"] if self.workers else []
        whom += [f"for {label} = {value}" for label, value in sorted(self.labels.items())]
        why = " ".join(self.reason.split()) or f"an exception {' and '.join(whom)}"
        number = self.tier if isinstance(self.tier, int) else None
        reason = f"no tier: {why}" if number is None else f"tier {number}: {why}"
        return TierDecision(tier=number, reason=reason, prefers=self.prefers)


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """The whole table; 1 is the best tier."""

    tiers: Annotated[tuple[Tier, ...], Meta(min_length=1, max_length=32)]
    exceptions: Annotated[tuple[Exemption, ...], Meta(max_length=200)] = ()


#: The table that every pool starts with.
TIERS = (
    Tier(tier=1, name="GPU", gpu_memory="8GB", cpu_cores=8, ram="16GB"),
    Tier(tier=2, name="Service", cpu_cores=4, ram="8GB"),
    Tier(tier=3, name="Data", cpu_cores=2, ram="4GB", storage="10GB"),
)


class Gap(NamedTuple):
    """One bar that a machine does not clear, in words: what it has, what is asked for, and of what."""

    has: str
    bar: str
    unit: str

    @property
    def needs(self) -> str:
        """What is asked for, in full: ``16 GB of RAM``."""
        return self.bar + self.unit


class ThresholdPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Tiers by bars on GPU memory, cores, memory and free storage."""

    name: str = "threshold"
    summary: str = "the best tier of which a machine clears every bar: GPU memory, cores, memory, free storage"
    tiers: tuple[Tier, ...] = TIERS
    exceptions: tuple[Exemption, ...] = ()

    def decide(self, asked: PolicyInput) -> TierDecision:
        """Return the best tier that ``asked.report`` clears, and what keeps it from the next better one."""
        for exemption in self.exceptions:
            if exemption.fits(asked):
                return exemption.decision()
        report = asked.report
        ranked = sorted(self.tiers, key=lambda tier: tier.tier)
        missed: list[tuple[Tier, list[Gap]]] = []
        for tier in ranked:
            missing = gaps(tier, report)
            if not missing:
                reason = _reached(tier, report, missed) + _unwell(report)
                return TierDecision(tier=tier.tier, reason=reason, prefers=tier.prefers)
            missed.append((tier, missing))
        lowest, missing = missed[-1]
        lacks = "; ".join(f"{gap.has}, tier {lowest.tier} needs {gap.bar}" for gap in missing)
        return TierDecision(tier=None, reason=f"no tier: {lacks}{_unwell(report)}")


@hookimpl
def rma_tier_policies(config: PluginConfig) -> Iterable[TierPolicy]:
    """Offer the policy with the table in ``config``, or its own. Raises ValidationProblem, naming every problem."""
    table = read_table(config, subject="[plugins.threshold]")
    return (ThresholdPolicy(tiers=table.tiers, exceptions=table.exceptions),)


def read_table(config: PluginConfig, *, subject: str) -> Table:
    """Return a table with the tiers in ``config``, or TIERS. Raises ValidationProblem, naming every problem."""
    known = " and ".join(map(repr, SETTINGS[:2]))
    problems = [Problem(f"$.{key}", f"is unknown; there are {known}") for key in config if key not in SETTINGS]
    for name, kind in (("tiers", Tier), ("exceptions", Exemption)):
        problems += _strange(name, kind, config.get(name))
    problems += _twice(config.get("tiers"))
    table = Table(tiers=TIERS)
    given = {name: config[name] for name in SETTINGS[:2] if name in config}
    try:
        table = strict.convert(
            {"tiers": [msgspec.to_builtins(tier) for tier in TIERS], **given}, Table, subject=subject
        )
    except ValidationProblem as error:
        problems += [
            problem._replace(what='is no size such as "16GB"') if SIZE_PATTERN in problem.what else problem
            for problem in error.problems
        ]
    else:
        problems += _unusable(table)
    if problems:
        raise ValidationProblem(subject, problems, hints=("see the tier table in the reference",))
    return table


def gaps(tier: Tier, report: HardwareReport) -> list[Gap]:
    """Return every bar of ``tier`` that a machine misses, in the order GPU, cores, memory, storage."""
    cores, memory, storage = report.cpu_cores, report.memory_bytes, report.storage_bytes
    gpu, bar = report.gpu_memory_bytes, parse_size(tier.gpu_memory, binary=True)
    checks = (
        (gpu < bar * NOMINAL_SHARE, _gap(_gpu(gpu), f"a GPU with {_nominal(tier.gpu_memory)}")),
        (cores < tier.cpu_cores, Gap(_count(cores), str(tier.cpu_cores), " core" if tier.cpu_cores == 1 else " cores")),
        (
            memory < parse_size(tier.ram, binary=True) * NOMINAL_SHARE,
            _gap(human(memory), _nominal(tier.ram), " of RAM"),
        ),
        (
            storage < parse_size(tier.storage, binary=False),
            _gap(_storage(storage), _nominal(tier.storage), " of free storage"),
        ),
    )
    return [gap for missed, gap in checks if missed]


def _gap(has: str, bar: str, unit: str = "") -> Gap:
    return Gap(has + unit, bar, unit)


def _gpu(size_bytes: int) -> str:
    return f"a GPU with {human(size_bytes)}" if size_bytes else "no GPU"


def _reached(tier: Tier, report: HardwareReport, missed: list[tuple[Tier, list[Gap]]]) -> str:
    facts = [_gpus(report)] if parse_size(tier.gpu_memory, binary=True) else []
    facts += [_count(report.cpu_cores), human(report.memory_bytes)]
    facts += [f"{_storage(report.storage_bytes)} of free storage"] if parse_size(tier.storage, binary=False) else []
    sentence = f"tier {tier.tier}: {_list(facts)}"
    if not missed:
        return sentence
    better, missing = missed[-1]
    if len(missing) == 1 and missing[0].has == "no GPU":
        return f"{sentence}, but {missing[0].needs.replace('a GPU', 'no GPU', 1)}"
    return f"{sentence}, but tier {better.tier} needs {_list([gap.needs for gap in missing])}"


def _gpus(report: HardwareReport) -> str:
    """Return the largest GPU in words, and how many there are of its name: others do not have its memory."""
    short = report.capabilities
    name = report.gpus[0].name if report.gpus else short.gpu_type or "a GPU"
    count = sum(gpu.name == name for gpu in report.gpus) or short.gpu_count
    return f"{f'{count} x ' if count > 1 else ''}{name} with {human(report.gpu_memory_bytes)}"


def _unwell(report: HardwareReport) -> str:
    """Mention GPUs that do not work, and detectors that could not look: they may be why a tier is missed."""
    sick = [device for device in report.devices if device.kind == "gpu" and device.health == "unhealthy"]
    if sick:
        there = "a GPU is there but unhealthy" if len(sick) == 1 else f"{len(sick)} GPUs are there but unhealthy"
        return f"; {there}: {_quote(sick[0].reason or sick[0].name)}"
    blind = next((probe for probe in report.probes if probe.state == "unhealthy"), None)
    return f"; detector {blind.detector} is unhealthy: {_quote(blind.reason)}" if blind else ""


def _quote(words: str) -> str:
    line = " ".join(words.split())
    return line if len(line) <= QUOTE_CHARACTERS else f"{line[:QUOTE_CHARACTERS]}…"


def _count(cores: int) -> str:
    return f"{cores} core" if cores == 1 else f"{cores} cores"


def _storage(size_bytes: int) -> str:
    return storage_text(size_bytes).replace("GB", " GB").replace("TB", " TB")


def _nominal(size: str) -> str:
    """Return a size of the table as people write it in a sentence: ``8GB`` as ``8 GB``."""
    number = size.rstrip("BbIiKkMmGgTtPp ")
    return f"{number} {size[len(number) :].strip()}"


def _list(words: list[str]) -> str:
    return " and ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else "".join(words)


def _unusable(table: Table) -> list[Problem]:
    """Name exceptions that are for nobody, or give a tier that the table does not have."""
    numbers = {tier.tier for tier in table.tiers} | {NO_TIER}
    problems = []
    for index, one in enumerate(table.exceptions):
        if not one.workers and not one.labels:
            problems.append(Problem(f"$.exceptions[{index}]", "is for nobody: it needs workers or labels"))
        if one.tier == NO_TIER and one.prefers:
            problems.append(Problem(f"$.exceptions[{index}].prefers", "a machine without a tier gets no service"))
        if one.tier not in numbers:
            problems.append(Problem(f"$.exceptions[{index}].tier", f"there is no tier {one.tier} among the tiers"))
    return problems


def _strange(name: str, kind: type[msgspec.Struct], given: object) -> list[Problem]:
    """Name keys that a table does not have: a typing error would otherwise silently drop a bar."""
    known = {field.name for field in msgspec.structs.fields(kind)}
    rows = given if isinstance(given, list) else []
    return [
        Problem(f"$.{name}[{index}].{key}", f"is unknown; there are {', '.join(sorted(known))}")
        for index, row in enumerate(rows)
        if isinstance(row, dict)
        for key in row
        if key not in known
    ]


def _twice(tiers: object) -> list[Problem]:
    rows = tiers if isinstance(tiers, list) else []
    numbers = [row["tier"] for row in rows if isinstance(row, dict) and isinstance(row.get("tier"), int)]
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    return [Problem("$.tiers", f"tier {number} is there twice") for number in twice]
