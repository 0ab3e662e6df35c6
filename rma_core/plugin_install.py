"""Getting a plugin into a folder of its own: a wheel is fetched and looked at, and nothing of it runs.

pip does the fetching and unpacking, by its owner's configuration, one wheel at a time and never what one depends on:
that is looked at here first, because pip builds what a requirement names by its address, and building runs code. What
a plugin needs and RMA's own environment lacks comes into the same folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, PathDistribution, distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_version, parse_wheel_filename

from rma_core import bare, host
from rma_core.builtin.process_install import missing_pip, pip_environment
from rma_core.errors import PluginInstallFailed, PluginInvalid, UsageProblem
from rma_core.plugin_folders import MOST_BYTES, digest_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from importlib.metadata import Distribution

    from rma_core.host import InstalledPlugin

#: pip's own time-outs are for one connection; a slow line may take this long for all of it.
PIP_S = 900.0
#: So much of pip's own words is shown.
WORDS = 600
#: Distributions that one plugin may bring along.
MOST_NEEDS = 32
#: Never to be replaced or imitated.
OURS = frozenset({"rma-core", "rma-coordinator"})

_METADATA = re.compile(r"[^/]+\.dist-info/METADATA")
#: Files that would land in place of another's description.
_FOREIGN_METADATA = re.compile(r".*\.data/.*\.(dist-info|egg-info)(/.*)?", re.IGNORECASE | re.DOTALL)


class Wheel(NamedTuple):
    """A wheel as its metadata describes it; nobody has vouched for a word of that."""

    path: Path
    name: str
    version: str
    summary: str
    author: str
    #: Where it came from: a file, or the address it was fetched from.
    source: str
    sha256: str
    #: What it gives: kind, name and module.
    plugins: tuple[tuple[str, str, str], ...]
    requires: tuple[str, ...] = ()
    #: What has to come along.
    needs: tuple[Wheel, ...] = ()

    @property
    def distribution(self) -> str:
        """Its normalized name."""
        return host.normalized(self.name)


class Unpacked(NamedTuple):
    """A wheel with all it needs, in a folder: what its files are called together."""

    folder: Path
    digest: str


def fetch(what: str, folder: Path, tell: Callable[[str], None]) -> Wheel:
    """Get the wheel of a file, an address or a name on the package index, and all that it needs.

    Raises UsageProblem for what is no wheel, PluginInvalid for one that is no plugin, PluginInstallFailed.
    """
    if reason := missing_pip():
        raise PluginInstallFailed(reason)
    path, source, extras = _file(what), what, frozenset[str]()
    if path is None:
        tell(f"fetching {what}")
        if "://" in what:
            path, source = _download(what, folder)
        else:
            wanted = _wanted(what)
            path, source = _download(_named(wanted), folder)
            extras = frozenset(wanted.extras)
    wheel = _read(path, source)
    if not wheel.plugins:
        hints = (f"a plugin has an entry point in one of {', '.join(host.KINDS.values())}",)
        raise PluginInvalid(f"{path.name} is no plugin of RMA's", hints=hints)
    return wheel._replace(needs=_needs(wheel, extras, folder, tell))


def _file(what: str) -> Path | None:
    """Return the wheel that is a file; ``None`` for what is to be fetched. Raises UsageProblem."""
    path = Path(what)
    hints = ("build one: pip wheel --no-deps -w dist ./FOLDER", "while you write it: pip install -e ./FOLDER")
    if what.startswith("-"):
        raise UsageProblem(f"{what!r} is neither a wheel nor a name")
    if path.is_dir() or what.endswith((".tar.gz", ".zip", ".tar.bz2")):
        raise UsageProblem(f"{what} is no wheel, and installing from source would run its code", hints=hints)
    if path.suffix == ".whl" and "://" not in what:
        if not path.is_file():
            raise UsageProblem(f"there is no file {what}")
        return path.absolute()
    if "://" in what and not (urlsplit(what).scheme == "https" and urlsplit(what).path.endswith(".whl")):
        raise UsageProblem(f"{what} is not an https address of a wheel", hints=hints)
    if "://" not in what and ("/" in what or "\\" in what or "@" in what):
        raise UsageProblem(f"there is no file {what}")
    return None


def _wanted(what: str) -> Requirement:
    """Return what a name on the command line asks for. Raises UsageProblem."""
    try:
        wanted = Requirement(what)
    except InvalidRequirement:
        raise UsageProblem(f"{what!r} is neither a wheel nor a name, such as rma-detect-coral==1.0") from None
    if wanted.marker is not None or not _comparable(wanted):
        raise UsageProblem(f"{what!r} says more than a name and its versions")
    return wanted


def _comparable(need: Requirement) -> bool:
    """Whether versions are compared as versions: ``===`` takes any text, and pip a path for one."""
    return all(one.operator != "===" for one in need.specifier)


def _named(need: Requirement) -> str:
    """Return a requirement as pip is asked for it: by a name that cannot be taken for a file's."""
    return f"{host.normalized(need.name)}{need.specifier}"


def _download(what: str, folder: Path) -> tuple[Path, str]:
    """Fetch the wheel of a name or address, and return it with the address it came from. Raises PluginInstallFailed."""
    into = Path(tempfile.mkdtemp(dir=folder))
    report = into / "found.json"
    _pip("install", "--dry-run", "--no-deps", "--ignore-installed", "--report", str(report), what, folder=folder)
    try:
        [item] = json.loads(report.read_text(encoding="utf-8"))["install"]
        name, url = str(item["metadata"]["name"]), str(item["download_info"]["url"])
        sha256 = str(item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PluginInstallFailed(f"what pip finds of {what} cannot be read: {error}") from None
    if not urlsplit(url).path.endswith(".whl"):
        raise PluginInstallFailed(f"of {what} there is no wheel")
    exactly = f"{name} @ {url}" + (f"#sha256={sha256}" if sha256 else "")
    _pip("download", "--no-deps", "--dest", str(into), exactly, folder=folder)
    wheels = list(into.glob("*.whl"))
    if len(wheels) != 1:
        raise PluginInstallFailed(f"pip fetched no wheel of {what}")
    return wheels[0], url


def _read(path: Path, source: str) -> Wheel:
    """Look into a wheel without unpacking it. Raises PluginInvalid."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES // 2**20} MiB")
        named, said = parse_wheel_filename(path.name)[:2]
        with zipfile.ZipFile(path) as archive:
            files = archive.namelist()
            inside = [name for name in files if _METADATA.fullmatch(name)]
            if len(inside) != 1 or len(files) != len(set(files)):
                raise ValueError("it has no metadata, or a file twice")
            if any(_FOREIGN_METADATA.fullmatch(name) for name in files):
                raise ValueError("it has files that would take the place of its description")
            info = inside[0].removesuffix("METADATA")
            distribution = PathDistribution(zipfile.Path(archive, info))
            about = distribution.metadata
            name, version_ = str(about["Name"] or ""), str(about["Version"] or "")
            summary, author = str(about["Summary"] or ""), str(about["Author-email"] or about["Author"] or "")
            plugins, requires = _plugins(distribution), tuple(distribution.requires or ())
        folder = info.removesuffix(".dist-info/").rpartition("-")
        names = {str(named), host.normalized(name), host.normalized(folder[0])}
        versions = {canonicalize_version(one) for one in (str(said), version_, folder[2].replace("_", "+"))}
        if len(names) > 1 or len(versions) > 1:
            raise ValueError("its file, its folder and its metadata are called differently")
    except (OSError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, InvalidWheelFilename) as error:
        raise PluginInvalid(f"{path.name} cannot be read as a wheel: {error}") from None
    if host.normalized(name) in OURS:
        raise PluginInvalid(f"{path.name} calls itself {name}, which is RMA itself")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Wheel(path, name, version_, summary, author, source, sha256, plugins, requires)


def _plugins(distribution: Distribution) -> tuple[tuple[str, str, str], ...]:
    """Return what a distribution gives: kind, name and module."""
    groups = {group: str(kind) for kind, group in host.KINDS.items()}
    points = distribution.entry_points
    return tuple(sorted((groups[point.group], point.name, point.value) for point in points if point.group in groups))


def _needs(wheel: Wheel, extras: frozenset[str], folder: Path, tell: Callable[[str], None]) -> tuple[Wheel, ...]:
    """Fetch what a wheel needs and RMA's environment lacks, and what that needs. Raises PluginInstallFailed."""
    found: dict[str, Wheel] = {wheel.distribution: wheel}
    waiting = [(wheel, text, extras) for text in wheel.requires]
    while waiting:
        who, text, with_ = waiting.pop(0)
        need = _requirement(who, text, with_)
        if need is None or ((there := _version_of(need, found)) and _suits(who, need, there, found)):
            continue
        if len(found) > MOST_NEEDS:
            raise PluginInstallFailed(f"{wheel.name} needs more than {MOST_NEEDS} distributions that are not here")
        tell(f"fetching {need.name}, which {who.name} needs")
        fetched = _read(*_download(_named(need), folder))
        if fetched.distribution != host.normalized(need.name):
            raise PluginInstallFailed(f"pip fetched {fetched.name} for {need.name}, which {who.name} needs")
        found[fetched.distribution] = fetched
        waiting += [(fetched, one, frozenset(need.extras)) for one in fetched.requires]
    return tuple(one for one in found.values() if one is not wheel)


def _requirement(who: Wheel, text: str, extras: frozenset[str]) -> Requirement | None:
    """Return what a line of a wheel asks for, ``None`` where not of this machine. Raises PluginInstallFailed."""
    try:
        need = Requirement(text)
        if need.marker is not None and not any(need.marker.evaluate({"extra": one}) for one in ("", *extras)):
            return None
    except (InvalidRequirement, ValueError) as error:
        raise PluginInstallFailed(f"what {who.name} needs cannot be read: {text}: {error}") from None
    hints = ("ask its author for one that names versions on a package index",)
    if need.url:
        raise PluginInstallFailed(f"{who.name} needs {need.name} from {need.url}, an address", hints=hints)
    if not _comparable(need):
        raise PluginInstallFailed(f"{who.name} needs {text}, whose version may be anything", hints=hints)
    return need


def _version_of(need: Requirement, found: dict[str, Wheel]) -> str:
    """Return the version that is here, or that comes along; nothing where there is none."""
    coming = found.get(host.normalized(need.name))
    if coming is not None:
        return coming.version
    try:
        return version(need.name)
    except PackageNotFoundError:
        return ""


def _suits(who: Wheel, need: Requirement, there: str, found: dict[str, Wheel]) -> bool:
    """Return that a version does. Raises PluginInstallFailed where it does not: there is room for one."""
    if need.specifier.contains(there, prereleases=True):
        return True
    where = "comes along" if host.normalized(need.name) in found else "RMA has here"
    message = f"{who.name} needs {need.name} {need.specifier}, and {there} {where}"
    raise PluginInstallFailed(message, hints=("ask its author for a version that does not",))


def unpack(wheel: Wheel, staging: Path, tell: Callable[[str], None]) -> Unpacked:
    """Unpack a wheel and what it needs into a new folder. Raises PluginInstallFailed, PluginInvalid."""
    tell(f"unpacking {wheel.name} {wheel.version}")
    made = staging / "made"
    made.mkdir(mode=0o700)
    files = [str(one.path) for one in (wheel, *wheel.needs)]
    _pip("install", "--no-deps", "--no-warn-script-location", "--target", str(made), *files, folder=staging)
    expected = {one.distribution: one.plugins for one in (wheel, *wheel.needs)}
    found = [(host.normalized(one.metadata["Name"] or ""), _plugins(one)) for one in distributions(path=[str(made)])]
    if len(found) != len(expected) or dict(found) != expected:
        raise PluginInvalid(f"{wheel.name} unpacks to something else than it says")
    try:
        return Unpacked(made, digest_of(made))
    except (OSError, ValueError) as error:
        raise PluginInstallFailed(f"{wheel.name} cannot be installed: {error}") from None


def taken(wheel: Wheel, there: Iterable[InstalledPlugin]) -> str:
    """Say which of a wheel's plugins cannot be used beside those that are there, or nothing."""
    for kind, name, _ in wheel.plugins:
        for one in there:
            other = one.shipped_by.partition(" ")[0]
            if (one.kind, one.name) == (kind, name) and other != wheel.distribution:
                return f"{wheel.name} has a {kind} called {name!r}, and so has {one.shipped_by}: one of them has to go"
    return ""


def _pip(*arguments: str, folder: Path) -> None:
    """Run pip to its end, with wheels only. Raises PluginInstallFailed."""
    quiet = ("--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--only-binary", ":all:")
    compiled = ("--no-compile",) if arguments[0] == "install" else ()
    command = bare.module("pip", arguments[0], *quiet, *compiled, *arguments[1:])
    # What pip takes for a file is not to be found here.
    empty = tempfile.mkdtemp(dir=folder)
    with tempfile.TemporaryFile(dir=folder) as said:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, timeout=PIP_S, check=False,
                env=pip_environment(folder), cwd=empty,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise PluginInstallFailed(f"pip was stopped after {PIP_S:.0f} s") from None
        said.seek(0)
        words = said.read().decode(errors="replace")
    if done.returncode != 0:
        errors = [line.removeprefix("ERROR: ") for line in words.splitlines() if line.startswith(("ERROR", "error:"))]
        hints = ("what pip may fetch, and from where, is in your pip configuration",)
        raise PluginInstallFailed(" ".join(errors or words.splitlines()[-3:])[:WORDS] or "pip failed", hints=hints)
