"""Getting a plugin into a folder of its own: a wheel is fetched and looked at, and nothing of it runs.

pip does the fetching and unpacking, by its owner's configuration; only wheels are taken, since building from source
runs the author's code. What it needs and RMA's own environment lacks comes into the same folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from rma_core import host
from rma_core.builtin.process_install import missing_pip, pip_environment
from rma_core.errors import PluginInstallFailed, PluginInvalid, UsageProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rma_core.host import InstalledPlugin
    from rma_core.plugin_folders import OwnFolder, PluginFolders

#: pip's own time-outs are for one connection; a slow line may take this long for all of it.
PIP_S = 900.0
#: So much of pip's own words is shown.
WORDS = 600
#: Never to be replaced or imitated.
OURS = frozenset({"rma-core", "rma-coordinator"})

_METADATA = re.compile(r"[^/]+\.dist-info/METADATA")


class Requirement(NamedTuple):
    """A distribution that comes along because the plugin needs it: where from, with its hash."""

    name: str
    version: str
    url: str
    sha256: str

    @property
    def pinned(self) -> str:
        """What pip takes for exactly this file."""
        return f"{self.name} @ {self.url}" + (f"#sha256={self.sha256}" if self.sha256 else "")


class Wheel(NamedTuple):
    """A plugin's wheel as its metadata describes it; nobody has vouched for a word of that."""

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
    needs: tuple[Requirement, ...] = ()

    @property
    def distribution(self) -> str:
        """Its normalized name."""
        return host.normalized(self.name)


def fetch(what: str, folder: Path, tell: Callable[[str], None]) -> Wheel:
    """Get the wheel of a file, an address or a name on the package index, and find out what it needs.

    Raises UsageProblem for what is no wheel, PluginInvalid for one that is no plugin, PluginInstallFailed.
    """
    if reason := missing_pip():
        raise PluginInstallFailed(reason)
    path = _file(what)
    source = what
    if path is None:
        tell(f"fetching {what}")
        path, source = _download(what, folder)
    wheel = _read(path, source)
    tell(f"finding out what {wheel.name} needs")
    return wheel._replace(needs=_needs(wheel, folder))


def _download(what: str, folder: Path) -> tuple[Path, str]:
    """Fetch the wheel of a name or address, and return it with the address it came from. Raises PluginInstallFailed."""
    report, into = folder / "found.json", folder / "wheel"
    _pip("install", "--dry-run", "--no-deps", "--ignore-installed", "--report", str(report), what, folder=folder)
    found = [_requirement(item) for item in _items(report)]
    if len(found) != 1:
        raise PluginInstallFailed(f"pip finds no wheel of {what}")
    _pip("download", "--no-deps", "--dest", str(into), found[0].pinned, folder=folder)
    wheels = list(into.glob("*.whl"))
    if len(wheels) != 1:
        raise PluginInstallFailed(f"pip fetched no wheel of {what}")
    return wheels[0], found[0].url


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
        return path
    if "://" in what and not (urlsplit(what).scheme == "https" and urlsplit(what).path.endswith(".whl")):
        raise UsageProblem(f"{what} is not an https address of a wheel", hints=hints)
    if "://" not in what and ("/" in what or "\\" in what or "@" in what):
        raise UsageProblem(f"there is no file {what}")
    return None


def _read(path: Path, source: str) -> Wheel:
    """Look into a wheel without unpacking it. Raises PluginInvalid."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [
                name for name in archive.namelist() if name.count("/") == 1 and name.endswith(".dist-info/METADATA")
            ]
            if len(inside) != 1:
                raise ValueError("it has no metadata")
            distribution = PathDistribution(zipfile.Path(archive, inside[0].removesuffix("METADATA")))
            about, points = distribution.metadata, list(distribution.entry_points)
            groups = {group: kind for kind, group in host.KINDS.items()}
            name, version = str(about["Name"] or ""), str(about["Version"] or "")
            summary = str(about["Summary"] or "")
            author = str(about["Author-email"] or about["Author"] or "")
    except (OSError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile) as error:
        raise PluginInvalid(f"{path.name} cannot be read as a wheel: {error}") from None
    plugins = tuple((str(groups[p.group]), p.name, p.value) for p in points if p.group in groups)
    if not plugins:
        hints = (f"a plugin has an entry point in one of {', '.join(host.KINDS.values())}",)
        raise PluginInvalid(f"{path.name} is no plugin of RMA's", hints=hints)
    if host.normalized(name) in OURS:
        raise PluginInvalid(f"{path.name} calls itself {name}, which is RMA itself")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(path, name, version, summary, author, source, sha256, plugins)


def _needs(wheel: Wheel, folder: Path) -> tuple[Requirement, ...]:
    """Return what would have to come along, as pip resolves it here. Raises PluginInstallFailed."""
    report = folder / "report.json"
    _pip("install", "--dry-run", "--report", str(report), str(wheel.path), folder=folder)
    found = []
    for one in map(_requirement, _items(report)):
        if host.normalized(one.name) == wheel.distribution:
            continue
        if here := _version_here(one.name):
            message = f"{wheel.name} needs another {one.name} ({one.version}) than RMA has here ({here})"
            raise PluginInstallFailed(message, hints=("ask its author for a version that does not",))
        found.append(one)
    return tuple(found)


def _requirement(item: dict[str, Any]) -> Requirement:
    """Return one line of pip's report."""
    about, names = item["download_info"], item["metadata"]
    hashes = about.get("archive_info", {}).get("hashes", {})
    return Requirement(str(names["name"]), str(names["version"]), str(about["url"]), str(hashes.get("sha256", "")))


def _items(report: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from json.loads(report.read_text(encoding="utf-8"))["install"]
    except (OSError, ValueError, KeyError) as error:
        raise PluginInstallFailed(f"what pip says it would install cannot be read: {error}") from None


def _version_here(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def install(wheel: Wheel, folders: PluginFolders, staging: Path, tell: Callable[[str], None]) -> OwnFolder:
    """Unpack a wheel and what it needs into its own folder, in place of an older one. Raises PluginInstallFailed."""
    tell(f"installing {wheel.name} {wheel.version}")
    made = staging / "made"
    made.mkdir(mode=0o700)
    needs = [one.pinned for one in wheel.needs]
    arguments = ("install", "--no-deps", "--no-warn-script-location", "--target", str(made), str(wheel.path), *needs)
    _pip(*arguments, folder=staging)
    return folders.put(wheel.distribution, made)


def taken(wheel: Wheel, there: tuple[InstalledPlugin, ...]) -> str:
    """Say which of a wheel's plugins cannot be used beside those that are there, or nothing."""
    for kind, name, _ in wheel.plugins:
        for one in there:
            other = one.shipped_by.partition(" ")[0]
            if (one.kind, one.name) == (kind, name) and other != wheel.distribution:
                return f"{wheel.name} has a {kind} called {name!r}, and so has {one.shipped_by}: one of them has to go"
    return ""


def _pip(*arguments: str, folder: Path) -> str:
    """Run pip to its end, with wheels only, and return what it said. Raises PluginInstallFailed."""
    quiet = ("--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--only-binary", ":all:")
    compiled = ("--no-compile",) if arguments[0] == "install" else ()
    command = [sys.executable, "-P", "-m", "pip", arguments[0], *quiet, *compiled, *arguments[1:]]
    with tempfile.TemporaryFile(dir=folder) as said:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, timeout=PIP_S, check=False,
                env=pip_environment(folder),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise PluginInstallFailed(f"pip was stopped after {PIP_S:.0f} s") from None
        said.seek(0)
        words = said.read().decode(errors="replace")
    if done.returncode != 0:
        errors = [line.removeprefix("ERROR: ") for line in words.splitlines() if line.startswith(("ERROR", "error:"))]
        hints = ("what pip may fetch, and from where, is in your pip configuration",)
        raise PluginInstallFailed(" ".join(errors or words.splitlines()[-3:])[:WORDS] or "pip failed", hints=hints)
    return words
