"""The plugins with tier policies that are installed, looked at whenever an admin says so, and versions of before.

What is in force stays so in its child, whatever is installed over it, until somebody activates another.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib
import importlib.machinery
import stat
import sys
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_coordinator.policy_versions import PolicyVersion, Unusable
from rma_core.errors import PluginError
from rma_core.host import Plugins
from rma_core.plugin_folders import MOST_BYTES, digest_of
from rma_core.policies_apart import clashes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from rma_coordinator.policy_versions import ChildPolicy
    from rma_core.host import PolicyPlugin, State
    from rma_core.models.worker import PluginReport
    from rma_core.settings import CoordinatorSettings

#: A child that nobody needs is ended when it was not asked for so long.
IDLE_S = 60.0
#: Versions of before whose children are kept: their code is in no file any more, and a rollback needs it.
MOST_OLD = 3
#: Files of one plugin that are looked at to tell its versions apart.
MOST_FILES = 5000


class Changed(NamedTuple):
    """A policy that is another version's now; where both are called the same, its files or settings are others."""

    name: str
    was: str
    now: str


class Found(NamedTuple):
    """What a look has found: policies that are new, of another version, or gone, and plugins that are not used."""

    new: list[ChildPolicy]
    changed: list[Changed]
    gone: list[str]
    refused: list[PluginReport]

    @property
    def words(self) -> str:
        """All of it in a sentence, for the log."""
        said = [f"{one.name} {one.version} is new" for one in self.new]
        said += [f"{one.name} {one.now} is there, {one.was} was" for one in self.changed]
        said += [f"{name} is gone" for name in self.gone]
        said += [f"{one.name} of {one.distribution} {one.version} is {one.state}: {one.reason}" for one in self.refused]
        return "; ".join(said) or "nothing has changed"


class PolicyPlugins:
    """The plugins with policies of a coordinator, each version in a child of its own."""

    def __init__(
        self,
        plugins: Plugins,
        settings: Callable[[], CoordinatorSettings],
        *,
        taken: Collection[str],
        clock: Callable[[], float],
    ) -> None:
        """Begin with none; `look` finds them.

        ``plugins`` is the host, which keeps how each one stands; ``settings`` returns what the admin says now;
        ``taken`` are names that no plugin's policy may have.
        """
        self._plugins, self._settings, self._taken, self._clock = plugins, settings, frozenset(taken), clock
        #: What is installed and can be used, by entry point.
        self._now: dict[str, PolicyVersion] = {}
        #: What was before, oldest first, as long as it has its child.
        self._before: list[PolicyVersion] = []
        #: Why a policy cannot be used, by its name.
        self.refused: dict[str, str] = {}
        self._one = asyncio.Lock()

    @property
    def policies(self) -> dict[str, ChildPolicy]:
        """The policies that are installed and can be used, by name."""
        return {name: policy for version in self._now.values() for name, policy in version.policies.items()}

    def find(self, name: str, version: str, files: str) -> ChildPolicy | None:
        """Return exactly that policy; ``None`` where it is not there any more."""
        for one in (*self._now.values(), *reversed(self._before)):
            policy = one.policies.get(name)
            if policy and (policy.version, policy.files) == (version, files) and (one.alive or one in self._installed):
                return policy
        return None

    @property
    def _installed(self) -> Collection[PolicyVersion]:
        return self._now.values()

    def unused(self) -> list[PluginReport]:
        """Return the plugins with policies that are installed and not used, each with its reason."""
        return [one for one in self._plugins.reports() if one.kind == "policy" and one.state != "active"]

    async def look(self, *, first: bool = False) -> Found:
        """Look at what is installed now, and start a child of each version that is new.

        ``first``: the host has just looked. Raises PluginError where that is strict, SettingProblem, ValidationProblem.
        """
        async with self._one:
            settings = self._settings() if first else await asyncio.to_thread(self._settings)
            if not first:
                await asyncio.to_thread(self._discover, settings)
            before, was = self._now, self.policies
            found: dict[str, PolicyVersion] = {}
            known = {*before.values(), *self._before}
            try:
                for plugin in self._plugins.policy_plugins():
                    table = settings.plugins.get(plugin.name, {})
                    version = await self._version(plugin, table, before.get(plugin.name), tries=1 + first)
                    if version is not None:
                        found[plugin.name] = version
                for name in self._twins(found):
                    if found[name] not in known:
                        await found[name].close()
                    del found[name]
            except BaseException:
                await asyncio.gather(*(one.close() for one in found.values() if one not in known))
                raise
            kept = [one for one in self._before if one not in found.values()]
            self._before = kept + [one for name, one in before.items() if found.get(name) is not one]
            self._now = found
            self.refused = self._reasons(before)
            return self._compared(was)

    def _discover(self, settings: CoordinatorSettings) -> None:
        # Python remembers folders that it has looked through.
        importlib.invalidate_caches()
        rules = settings.plugin_rules()
        self._plugins.take_over(Plugins.discover(kinds=["policy"], **rules))

    async def _version(
        self, plugin: PolicyPlugin, table: Mapping[str, object], before: PolicyVersion | None, *, tries: int
    ) -> PolicyVersion | None:
        """Return a plugin as it is now, maybe the version of ``before``; ``None`` for one that cannot be used."""
        _, files = await asyncio.to_thread(_look_at, plugin, table)
        for same in (before, *self._before):
            if same is not None and (same.plugin, same.files) == (plugin, files):
                self._note(same)
                return same

        def installed() -> tuple[str, str]:
            return _look_at(plugin, table)

        hidden = self._plugins.hidden
        failed = functools.partial(self._plugins.failures.add, "policy", plugin.name, plugin.version)
        version = PolicyVersion(
            plugin, table, files=files, installed=installed, failed=failed, hidden=hidden, clock=self._clock
        )
        # Where everything starts at once, one may be slow; a pool must not lose what is in force by that.
        for left in reversed(range(tries)):
            try:
                await version.open()
                break
            except Unusable as error:
                if not left:
                    self._refuse(plugin.name, error.state, str(error))
                    return None
        self._note(version)
        return version

    def _note(self, version: PolicyVersion) -> None:
        seconds, deprecated = version.import_seconds, version.deprecated
        self._plugins.note("policy", version.plugin.name, state="active", import_seconds=seconds, deprecated=deprecated)

    def _refuse(self, plugin: str, state: State, reason: str) -> None:
        if self._plugins.strict:
            raise PluginError(f"the policy plugin {plugin}: {reason}")
        self._plugins.note("policy", plugin, state=state, reason=reason)

    def _twins(self, found: Mapping[str, PolicyVersion]) -> set[str]:
        """Return the plugins that cannot be used because their policies are called like others."""
        given = {plugin: version.policies for plugin, version in found.items()}
        shipped_by = {plugin: f"{one.plugin.distribution} {one.plugin.version}" for plugin, one in found.items()}
        refused = clashes(given, shipped_by=shipped_by, taken=self._taken)
        for plugin, words in refused.items():
            self._refuse(plugin, "invalid", words)
        return set(refused)

    def _reasons(self, before: Mapping[str, PolicyVersion]) -> dict[str, str]:
        """Return why policies cannot be used: those that unused plugins had, or are called like."""
        reasons: dict[str, str] = {}
        for one in self.unused():
            words = f"{one.distribution} {one.version} is {one.state}: {one.reason}"
            reasons |= dict.fromkeys((one.name, *(before[one.name].policies if one.name in before else ())), words)
        for version in self._before:
            # A policy stays refused when what it was once is long gone.
            if version.plugin.name in reasons:
                reasons |= dict.fromkeys(version.policies, reasons[version.plugin.name])
        return {name: words for name, words in reasons.items() if name not in self.policies}

    def _compared(self, was: Mapping[str, ChildPolicy]) -> Found:
        now = self.policies
        changed = [
            Changed(name, was[name].version, policy.version)
            for name, policy in sorted(now.items())
            if name in was and was[name] is not policy
        ]
        return Found(
            new=[policy for name, policy in sorted(now.items()) if name not in was],
            changed=changed,
            gone=sorted(was.keys() - now.keys() - self.refused.keys()),
            refused=self.unused(),
        )

    async def tidy(self, needed: Sequence[ChildPolicy], *, idle_s: float = IDLE_S) -> None:
        """End children that nobody needs and that were not asked lately. ``needed`` are policies, the newest last."""
        if not self._one.locked():
            async with self._one:
                await self._tidy(needed, idle_s)

    async def _tidy(self, needed: Sequence[ChildPolicy], idle_s: float) -> None:
        keep = list(dict.fromkeys(one.of for one in reversed(needed)))
        old = [one for one in keep if one in self._before and one.alive][:MOST_OLD]
        for one in [*self._now.values(), *self._before]:
            idle = not one.busy and self._clock() - one.used_at >= idle_s
            if one.alive and idle and one not in old and not (one in keep and one in self._installed):
                await one.end()
        for one in [one for one in self._before if not one.alive and not one.busy and one not in keep]:
            self._before.remove(one)
            await one.close()

    async def close(self) -> None:
        """End every child."""
        await asyncio.gather(*(one.close() for one in [*self._now.values(), *self._before]))


def _look_at(plugin: PolicyPlugin, table: Mapping[str, object]) -> tuple[str, str]:
    """Return the version that is installed now, and a word for its files and its settings; empty where there is none.

    Nothing is imported.
    """
    importlib.invalidate_caches()
    where = [plugin.folder] if plugin.folder else sys.path
    found = next(iter(distributions(name=plugin.distribution, path=where)), None)
    if found is None:
        return "", ""
    said = msgspec.json.encode([plugin, found.version, dict(table)], enc_hook=str, order="sorted")
    digest = hashlib.sha256(said)
    if plugin.folder:
        # What it needs is there too, and its owner has approved all of it.
        with contextlib.suppress(OSError, ValueError):
            digest.update(digest_of(Path(plugin.folder)).encode())
        return found.version or "", digest.hexdigest()[:16]
    home = Path(str(found.locate_file("")))
    listed = [Path(str(found.locate_file(one))) for one in found.files or () if ".dist-info/" not in one.as_posix()]
    # Its list of files is a stranger's: it may name anything, and what never ends.
    own = [path for path in listed if ".." not in path.parts and path.is_relative_to(home)]
    room = MOST_BYTES
    for path in islice(sorted({*own, *_module(plugin.value, where)}), MOST_FILES):
        if path.suffix == ".pyc":
            continue
        digest.update(f"\0{path.name}\0".encode(errors="replace"))
        # One that is not there, or no longer, is told from one that is.
        with contextlib.suppress(OSError):
            about = path.lstat()
            room -= about.st_size
            if stat.S_ISREG(about.st_mode) and room >= 0:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return found.version or "", digest.hexdigest()[:16]


def _module(value: str, where: Sequence[str]) -> Iterator[Path]:
    """Yield the files of the module or package that an entry point names; of an editable one nothing else is known."""
    name = value.partition(":")[0].partition(".")[0].strip()
    spec = importlib.machinery.PathFinder.find_spec(name, where)
    if spec is None:
        return
    if spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            yield from islice(Path(folder).rglob("*.py"), MOST_FILES)
    elif spec.origin:
        yield Path(spec.origin)
