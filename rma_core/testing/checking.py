"""Finds the plugins that a name or a folder means, and runs the checks of their kinds, one by one."""

from __future__ import annotations

import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from rma_core import detector_files
from rma_core.deprecations import PluginDeprecation
from rma_core.detection import DEADLINE_S, deadline_of
from rma_core.errors import NotFound, Problem, UsageProblem, ValidationProblem
from rma_core.host import KINDS, describe, installed, normalized
from rma_core.testing.detectors import DetectorCase, detector_contract
from rma_core.testing.policies import PolicyCase, policy_contract
from rma_core.testing.runtime_offers import OfferCase, offer_contract
from rma_core.testing.watching import NotReached

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from rma_core.host import InstalledPlugin, Kind
    from rma_core.plugin_folders import PluginFolders
    from rma_core.testing.watching import PluginCase

#: What each kind of plugin is checked with.
CONTRACTS: dict[Kind, tuple[type[PluginCase], tuple[Callable[[Any], Awaitable[None]], ...]]] = {
    "detector": (DetectorCase, detector_contract),
    "policy": (PolicyCase, policy_contract),
    "runtime": (OfferCase, offer_contract),
}
#: A sentence of a check is cut here.
MOST_CHARACTERS = 500
#: Folders below a project's own in which its modules may lie.
SOURCE_FOLDERS = (".", "src")


class Target(NamedTuple):
    """A plugin to check: ``value`` is what its entry point names, ``folder`` where that lies if it is not installed.

    ``own`` are the packages that its distribution has installed, ``given`` what the host adds to its table.
    """

    name: str
    kind: Kind
    value: str
    folder: str = ""
    own: tuple[str, ...] = ()
    given: tuple[tuple[str, object], ...] = ()

    def case(self, tables: Mapping[str, dict[str, object]], hidden: Sequence[str] = ()) -> PluginCase:
        """Return its case, with its own table of the ``[plugins]`` table. Raises UsageProblem for a wrong deadline.

        ``hidden`` folders are kept from one that is confined.
        """
        table = tables.get(self.name, {})
        deadline_s, words = deadline_of(self.name, table, DEADLINE_S)
        if words:
            raise UsageProblem(words)
        return CONTRACTS[self.kind][0](
            self.value,
            folder=self.folder,
            config={**table, **dict(self.given)},
            deadline_s=deadline_s,
            own=self.own,
            hidden=hidden,
        )


class _Project(msgspec.Struct, rename="kebab"):
    entry_points: dict[str, dict[str, str]] = {}


class _Pyproject(msgspec.Struct):
    """The part of a pyproject.toml that announces plugins."""

    project: _Project = msgspec.field(default_factory=_Project)


class Result(NamedTuple):
    """How one check ended: ``kept``, ``broken`` with a sentence, or ``open`` with why it could not be told.

    One is ``deprecated`` that is kept and warns: a later release may refuse the plugin for it.
    """

    check: str
    state: Literal["kept", "broken", "open", "deprecated"]
    message: str = ""


def targets(named: str, own: PluginFolders | None = None) -> list[Target]:
    """Return the plugins of a folder with a pyproject.toml, or a file's, else the installed ones of that name.

    Raises NotFound, UsageProblem and, for a broken pyproject.toml, ValidationProblem.
    """
    path = Path(named)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return [_of_file(path)]
    all_of_them = installed(own)
    found = [Target(p.name, p.kind, p.value, p.folder, _packages(p)) for p in all_of_them if p.name == named]
    if not found:
        there = ", ".join(sorted({plugin.name for plugin in all_of_them}))
        message = f"no plugin called {named!r} is installed, and there is no such folder"
        raise NotFound(message, hints=(f"installed are {there}",))
    return found


def _of_file(path: Path) -> Target:
    """Return the detector that a file is, as it would be in a folder of detectors."""
    found = next(one for one in detector_files.listed(path.parent) if one.path == str(path.absolute()))
    if found.problem:
        raise UsageProblem(found.problem)
    return Target(found.name, "detector", detector_files.MODULE, given=((detector_files.PATH, found.path),))


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
    """Return the folder below which the module lies. Raises UsageProblem where it lies in none."""
    module = value.partition(":")[0].strip()
    path = module.replace(".", "/")
    if not module or module.partition(".")[0] in sys.stdlib_module_names:
        why = f"{module!r} is a module of Python's own" if module else "an entry point names no module"
        raise UsageProblem(f"{folder / 'pyproject.toml'}: {why}", hints=("rename it, in its entry point too",))
    places = [folder / name for name in SOURCE_FOLDERS]
    for place in places:
        if (place / f"{path}.py").exists() or (place / path).is_dir():
            return str(place.resolve())
    looked = " or ".join(str(place / f"{path}.py") for place in places)
    raise UsageProblem(f"the entry point names {value!r}, and there is no {looked}")


def _packages(plugin: InstalledPlugin) -> tuple[str, ...]:
    """Return the packages that a plugin's distribution has installed."""
    name = plugin.shipped_by.partition(" ")[0]
    there = metadata.packages_distributions().items()
    return tuple(package for package, names in there if any(normalized(one) == name for one in names))


def _short(words: str) -> str:
    return words if len(words) <= MOST_CHARACTERS else f"{words[:MOST_CHARACTERS]}…"


async def results(case: PluginCase) -> AsyncIterator[Result]:
    """Run every check of the case's kind; each result comes as soon as it is known."""
    for check in CONTRACTS[case.kind][1]:
        yield await result_of(check, case)


async def result_of(check: Callable[[Any], Awaitable[None]], case: PluginCase) -> Result:
    """Run one check."""
    name = check.__name__.replace("_", " ")
    try:
        words = await _warned(check, case)
    except NotReached as why:
        return Result(name, "open", str(why))
    except AssertionError as error:
        return Result(name, "broken", _short(str(error)))
    except Exception as error:  # noqa: BLE001 - isolation boundary: what a plugin gave may be anything
        return Result(name, "broken", _short(f"its answer cannot be used ({describe(error)})"))
    return Result(name, "deprecated", _short(words)) if words else Result(name, "kept")


async def _warned(check: Callable[[Any], Awaitable[None]], case: PluginCase) -> str:
    """Run one check; return what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PluginDeprecation)
        await check(case)
    for one in caught:
        if not issubclass(one.category, PluginDeprecation):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return "; ".join(str(one.message) for one in caught if issubclass(one.category, PluginDeprecation))
