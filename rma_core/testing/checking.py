"""Finds the plugins that a name or a folder means, and runs the checks of their kinds, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from rma_core.errors import NotFound, Problem, UsageProblem, ValidationProblem
from rma_core.host import KINDS, installed
from rma_core.testing.detectors import DetectorCase, detector_contract
from rma_core.testing.policies import PolicyCase, policy_contract
from rma_core.testing.runtime_offers import OfferCase, offer_contract
from rma_core.testing.watching import NotReached

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from rma_core.host import Kind
    from rma_core.testing.watching import PluginCase

#: What each kind of plugin is checked with.
CONTRACTS: dict[Kind, tuple[type[PluginCase], tuple[Callable[[Any], Awaitable[None]], ...]]] = {
    "detector": (DetectorCase, detector_contract),
    "policy": (PolicyCase, policy_contract),
    "runtime": (OfferCase, offer_contract),
}
#: Folders below a project's own in which its modules may lie.
SOURCE_FOLDERS = (".", "src")


class Target(NamedTuple):
    """A plugin to check: ``value`` is what its entry point names, ``folder`` where that lies if it is not installed."""

    name: str
    kind: Kind
    value: str
    folder: str = ""

    def case(self, tables: Mapping[str, dict[str, object]]) -> PluginCase:
        """Return its case, with its own table of the ``[plugins]`` table."""
        table = tables.get(self.name, {})
        given = table.get("deadline_s")
        more = {"deadline_s": float(given)} if isinstance(given, (int, float)) and given > 0 else {}
        return CONTRACTS[self.kind][0](self.value, folder=self.folder, config=dict(table), **more)


class _Project(msgspec.Struct, rename="kebab"):
    entry_points: dict[str, dict[str, str]] = {}


class _Pyproject(msgspec.Struct):
    """The part of a pyproject.toml that announces plugins."""

    project: _Project = msgspec.field(default_factory=_Project)


class Result(NamedTuple):
    """How one check ended: ``kept``, ``broken`` with a sentence, or ``open`` with why it could not be told."""

    check: str
    state: Literal["kept", "broken", "open"]
    message: str = ""


def targets(named: str) -> list[Target]:
    """Return the plugins of a folder with a pyproject.toml, else the installed ones of that entry-point name.

    Raises NotFound, UsageProblem and, for a broken pyproject.toml, ValidationProblem.
    """
    path = Path(named)
    if path.is_dir():
        return _of_folder(path)
    found = [Target(p.name, p.kind, p.value) for p in installed() if p.name == named]
    if not found:
        there = ", ".join(sorted({plugin.name for plugin in installed()}))
        message = f"no plugin called {named!r} is installed, and there is no such folder"
        raise NotFound(message, hints=(f"installed are {there}",))
    return found


def _of_folder(folder: Path) -> list[Target]:
    file = folder / "pyproject.toml"
    try:
        text = file.read_bytes()
    except OSError as error:
        hints = ("give a plugin's folder, or the name of its entry point",)
        raise UsageProblem(f"{file}: {error.strerror or error}", hints=hints) from None
    try:
        points = msgspec.toml.decode(text, type=_Pyproject).project.entry_points
    except ValueError as error:
        raise ValidationProblem(str(file), [Problem("file", f"cannot be read: {error}")]) from None
    found = [
        Target(name, kind, value, _place(folder, value))
        for kind, group in KINDS.items()
        for name, value in points.get(group, {}).items()
    ]
    if not found:
        wanted = ", ".join(f'[project.entry-points."{group}"]' for group in KINDS.values())
        raise UsageProblem(f"{file} announces no plugin", hints=(f"it has one of {wanted}",))
    return found


def _place(folder: Path, value: str) -> str:
    """Return the folder below which the module lies, the project's own where it lies nowhere."""
    module = value.partition(":")[0].strip().replace(".", "/")
    places = [folder / name for name in SOURCE_FOLDERS]
    there = (p for p in places if (p / f"{module}.py").exists() or (p / module / "__init__.py").exists())
    return str(next(there, folder).resolve())


async def results(case: PluginCase) -> AsyncIterator[Result]:
    """Run every check of the case's kind; each result comes as soon as it is known."""
    for check in CONTRACTS[case.kind][1]:
        yield await result_of(check, case)


async def result_of(check: Callable[[Any], Awaitable[None]], case: PluginCase) -> Result:
    """Run one check."""
    name = check.__name__.replace("_", " ")
    try:
        await check(case)
    except NotReached as why:
        return Result(name, "open", str(why))
    except AssertionError as error:
        return Result(name, "broken", str(error))
    return Result(name, "kept")
