"""The plugin host: finds plugins by entry point, decides by name, calls each one alone. The only module with pluggy.

Detectors are never imported here: `rma_core.detection` runs each in a child and tells the host how it went. Nor are
strangers' policies: each plugin has a child, of a coordinator or of a command (`rma_core.policies_apart`). Runtimes run
in this process; what is blocked or not approved is not imported at all.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pluggy

from rma_core import deprecations, detector_files, hookspecs, signatures
from rma_core.errors import PluginConflict, PluginError, PluginInvalid, RMAError
from rma_core.failures import Failures
from rma_core.hookspecs import GROUPS, PROJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from importlib.metadata import Distribution

    from rma_core.interfaces import ContainerRuntime, PluginConfig, TierPolicy
    from rma_core.models.worker import PluginReport
    from rma_core.plugin_folders import Decisions, OwnFolder, PluginFolders

    PluginTables = Mapping[str, Mapping[str, object]]

Kind = Literal["detector", "runtime", "policy"]
State = Literal["active", "unapproved", "blocked", "failed", "invalid", "quarantined"]

logger = logging.getLogger(__name__)

#: Entry-point group of each kind of plugin.
KINDS: dict[Kind, str] = {"detector": "rma.detectors", "runtime": "rma.runtimes", "policy": "rma.policies"}
#: The distribution whose plugins are built in: found like any other, but they need no approval and go first.
BUILT_IN = "rma-core"
#: In ``approved``: every plugin.
EVERYTHING = "*"
#: A reason is at most this long; models allow 2,000 characters.
MAX_REASON = 1500

_SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)

#: Marks the function that implements a hook.
hookimpl = pluggy.HookimplMarker(PROJECT)

_hookspec = pluggy.HookspecMarker(PROJECT)
for _hook in GROUPS.values():
    _hookspec(getattr(hookspecs, _hook))


class DetectorPlugin(NamedTuple):
    """A detector that may run: ``value`` is what its entry point names, to be imported in its child only."""

    name: str
    value: str
    distribution: str
    version: str
    #: The file that it runs or reads, where it is one.
    path: str = ""
    #: The folder that its distribution has for itself, where it has one.
    folder: str = ""


class PolicyPlugin(NamedTuple):
    """A plugin whose policies may be asked: ``value`` is what its entry point names, to be imported in a child only."""

    name: str
    value: str
    distribution: str
    version: str
    #: The folder that its distribution has for itself, where it has one.
    folder: str = ""


class InstalledPlugin(NamedTuple):
    """A plugin that an installed distribution announces; ``value`` is what its entry point names."""

    name: str
    kind: Kind
    value: str
    shipped_by: str
    folder: str = ""


class _Plugin:
    """One plugin as the host keeps it; ``call`` is there once it is imported and fits, ``refused`` ones never run."""

    def __init__(self, *, name: str, kind: Kind, value: str, distribution: str, version: str) -> None:
        self.name, self.kind, self.value = name, kind, value
        self.distribution, self.version = distribution, version
        self.path = ""
        self.own: OwnFolder | None = None
        self.state: State = "active"
        self.reason = ""
        self.import_seconds: float | None = None
        self.deprecated: tuple[str, ...] = ()
        self.refused = False
        #: It was handed over, not found.
        self.registered = False
        self.call: Callable[[PluginConfig], object] | None = None

    @property
    def shipped_by(self) -> str:
        return f"{self.distribution or 'an unnamed distribution'} {self.version}".rstrip()

    @property
    def folder(self) -> str:
        return str(self.own.path) if self.own else ""


class Plugins:
    """The plugins of this process, each with its state; every failure of one disables that one only."""

    def __init__(self, *, strict: bool = False, trace: bool = False) -> None:
        """Start with none. ``strict`` raises what would disable a plugin; ``trace`` logs every hook call."""
        self.strict = strict
        self.trace = trace
        #: Folders that no detector and no policy may look into.
        self.hidden: tuple[str, ...] = ()
        #: How often each has failed; shared with those that are found later in the same process.
        self.failures = Failures()
        self._plugins: list[_Plugin] = []

    @classmethod
    def discover(
        cls,
        *,
        kinds: Collection[Kind] = tuple(KINDS),
        blocked: frozenset[str] = frozenset(),
        only: frozenset[str] | None = None,
        approved: frozenset[str] = frozenset(),
        approval_required: bool = False,
        strict: bool = False,
        trace: bool = False,
        files: str = "",
        own: PluginFolders | None = None,
        hidden: tuple[str, ...] = (),
    ) -> Plugins:
        """Find the installed plugins of ``kinds``, decide by name, and import those that may be.

        ``only`` (``None``: all) and ``blocked`` name entry points. With ``approval_required`` a plugin that is not
        built in needs its name, or ``*``, in ``approved``; one in a folder of its ``own`` needs its owner's approval of
        exactly those files. ``files`` is a folder of detectors that are files; ``hidden`` folders are kept from all.
        Nothing raises unless ``strict``, but SettingProblem for a folder that is none.
        """
        found = cls(strict=strict, trace=trace)
        found.hidden = hidden
        of_files = _of_files(files) if files and "detector" in kinds else []
        decisions = own.decisions() if own else None
        found._plugins = sorted([*_installed(kinds, own), *of_files], key=_order)
        for plugin in found._plugins:
            if not plugin.refused:
                _decide(plugin, blocked=blocked, only=only, approved=approved if approval_required else {EVERYTHING})
            if decisions and not plugin.refused:
                _decide_as_owner(plugin, decisions)
        found._refuse_twins()
        for plugin in found._plugins:
            found._import(plugin)
        return found

    def register(self, module: object, *, name: str, kind: Kind, distribution: str = "", version: str = "") -> None:
        """Add a plugin that is not installed (tests, notebooks); a detector must be a module its child can import."""
        value = getattr(module, "__name__", type(module).__name__)
        plugin = _Plugin(name=name, kind=kind, value=value, distribution=distribution, version=version)
        plugin.registered = True
        self._plugins.append(plugin)
        self._plugins.sort(key=_order)
        self._refuse_twins()
        self._import(plugin, module)

    def reports(self) -> tuple[PluginReport, ...]:
        """Return how each plugin stands: built-in ones first, then by kind and name."""
        from rma_core.models.worker import PluginReport

        failed = [self.failures.of(p.kind, p.name, p.version) for p in self._plugins]
        return tuple(
            PluginReport(
                name=p.name[:200],
                kind=p.kind,
                state=p.state,
                reason=p.reason,
                distribution=p.distribution[:200],
                version=p.version[:100],
                import_seconds=p.import_seconds,
                failures=count.times,
                failed_at=count.at,
                deprecated=deprecations.words_of(p.deprecated),
            )
            for p, count in zip(self._plugins, failed, strict=True)
        )

    def detectors(self) -> tuple[DetectorPlugin, ...]:
        """Return the detectors that may run, built-in ones first, then by name.

        One that could not be imported last time is among them, for it may have been mended since.
        """
        return tuple(
            DetectorPlugin(p.name, p.value, p.distribution, p.version, p.path, p.folder)
            for p in self._plugins
            if p.kind == "detector" and not p.refused
        )

    def policy_plugins(self) -> tuple[PolicyPlugin, ...]:
        """Return the plugins with policies that may be used and are not imported here, by name."""
        return tuple(
            PolicyPlugin(p.name, p.value, p.distribution, p.version, p.folder)
            for p in self._plugins
            if p.kind == "policy" and not p.refused and self._apart(p)
        )

    def take_over(self, found: Plugins) -> None:
        """Have what was ``found`` later in the place of what was found before; what was registered stays."""
        self.hidden = found.hidden
        self._plugins = sorted([*(p for p in self._plugins if p.registered), *found._plugins], key=_order)

    def _apart(self, plugin: _Plugin) -> bool:
        """Whether a plugin is imported in children only."""
        if plugin.kind == "policy":
            return not plugin.registered and plugin.distribution != BUILT_IN
        return plugin.kind == "detector"

    def note(
        self,
        kind: Kind,
        name: str,
        *,
        state: State,
        reason: str = "",
        import_seconds: float | None = None,
        failed: bool = False,
        deprecated: Sequence[str] = (),
    ) -> None:
        """Keep how a plugin did in its child, and count it where it ``failed``.

        ``deprecated`` is what it uses of that, by the words of `rma_core.deprecations`.
        """
        for plugin in (one for one in self._plugins if (one.kind, one.name) == (kind, name) and not one.refused):
            plugin.import_seconds = import_seconds if import_seconds is not None else plugin.import_seconds
            _move(plugin, state, reason)
            _deprecate(plugin, deprecated)
            if failed:
                self._count(plugin)

    def _count(self, plugin: _Plugin) -> None:
        self.failures.add(plugin.kind, plugin.name, plugin.version)

    def runtimes(self, config: PluginTables | None = None) -> dict[str, ContainerRuntime]:
        """Return every container runtime by its name; ``config`` is the ``[plugins]`` table."""
        return self._collect("runtime", config or {})

    def policies(self, config: PluginTables | None = None) -> dict[str, TierPolicy]:
        """Return the tier policies that run in this process by name: built in, or registered."""
        return self._collect("policy", config or {})

    def _refuse_twins(self) -> None:
        """Refuse all plugins that share an entry-point name: which one is meant, nobody can know."""
        for (kind, name), twins in _by(self._plugins, lambda p: (p.kind, p.name)):
            usable = [p for p in twins if p.state not in ("blocked", "unapproved") and not (p.path and p.refused)]
            if len(usable) > 1:
                for plugin in usable:
                    plugin.refused = True
                text = f"{len(usable)} plugins in {KINDS[kind]} are called {name!r}, from {_distributions(usable)}"
                verdict = self._clash(f"{text}; none of them is used until all but one are uninstalled")
                for plugin in usable:
                    _move(plugin, *verdict)

    def _clash(self, words: str) -> tuple[State, str]:
        """Return what becomes of plugins that claim one name; raise it when ``strict``."""
        if self.strict:
            raise PluginConflict(words)
        return "invalid", words

    def _import(self, plugin: _Plugin, module: object = None) -> None:
        if plugin.refused or self._apart(plugin):
            return
        started = time.perf_counter()
        try:
            if plugin.own:
                _see(plugin.own)
            module = load(plugin.value) if module is None else module
            plugin.import_seconds = time.perf_counter() - started
            _deprecate(plugin, deprecations.used_by(module))
            plugin.call = bind(module, KINDS[plugin.kind])
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - isolation boundary: a stranger's module may raise anything, SystemExit too
            plugin.import_seconds = time.perf_counter() - started
            self._count(plugin)
            _move(plugin, *self._verdict(plugin, error, "cannot be imported"))

    def _collect(self, kind: Kind, config: PluginTables) -> dict[str, Any]:
        """Call the hook of ``kind`` in each plugin alone; return what they give by name, without clashing plugins."""
        given: list[tuple[_Plugin, Any]] = []
        verdicts: dict[_Plugin, tuple[State, str]] = {}
        for plugin in (p for p in self._plugins if p.kind == kind and not p.refused and p.call):
            verdicts[plugin] = "active", ""
            try:
                given += [(plugin, thing) for thing in self._call(plugin, config.get(plugin.name, {}))]
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001 - isolation boundary: a plugin may raise anything, SystemExit too
                self._count(plugin)
                verdicts[plugin] = self._verdict(plugin, error, GROUPS[KINDS[kind]])
        for name, twins in _by(given, lambda pair: pair[1].name):
            if len(twins) > 1:
                plugins = list(dict.fromkeys(plugin for plugin, _ in twins))
                text = f"{kind} {name!r} is given {len(twins)} times, by {_distributions(plugins)}"
                verdict = self._clash(f"{text}; none of their plugins is used until only one is left")
                verdicts |= dict.fromkeys(plugins, verdict)
        for plugin, verdict in verdicts.items():
            _move(plugin, *verdict)
        return {thing.name: thing for plugin, thing in given if plugin.state == "active"}

    def _call(self, plugin: _Plugin, table: Mapping[str, object]) -> list[Any]:
        """Call one plugin's hook and take what it yields, within bounds."""
        from rma_core.offers import offers

        started = time.perf_counter()
        things: list[Any] = []
        try:
            things = offers(plugin.call(dict(table)) if plugin.call else None, GROUPS[KINDS[plugin.kind]])
            return things
        finally:
            seconds = time.perf_counter() - started
            self.log_call(plugin.name, plugin.kind, table, result=f"{len(things)} objects", seconds=seconds)

    def log_call(self, name: str, kind: Kind, table: Mapping[str, object], *, result: str, seconds: float) -> None:
        """Log one hook call when ``trace`` is on; values that look like secrets are not shown."""
        if self.trace:
            shown = {key: "…" if _SECRET.search(key) else value for key, value in table.items()}
            hook = GROUPS[KINDS[kind]]
            about = {"action": "hook", "plugin": name}
            logger.info("%s.%s(config=%r) -> %s in %.1f ms", name, hook, shown, result, seconds * 1000, extra=about)

    def _verdict(self, plugin: _Plugin, error: BaseException, doing: str) -> tuple[State, str]:
        """Return what becomes of a plugin that raised ``error`` while ``doing``; raise it again when ``strict``."""
        if self.strict:
            raise error
        logger.debug("plugin %s of %s", plugin.name, plugin.shipped_by, exc_info=error)
        if isinstance(error, PluginError):
            return "invalid", describe(error)
        return "failed", f"{doing}: {describe(error)}"


def installed(own: PluginFolders | None = None) -> tuple[InstalledPlugin, ...]:
    """Return what the installed distributions announce, whatever its state; nothing is imported."""
    found = sorted(_installed(tuple(KINDS), own), key=_order)
    return tuple(InstalledPlugin(p.name, p.kind, p.value, p.shipped_by, p.folder) for p in found)


def load(value: str) -> object:
    """Import what an entry point names: ``package.module`` or ``package.module:attribute``."""
    module_name, _, attribute = value.partition("[")[0].strip().partition(":")
    found: object = importlib.import_module(module_name.strip())
    for part in filter(None, attribute.strip().split(".")):
        found = getattr(found, part)
    return found


def bind(plugin: object, group: str) -> Callable[[PluginConfig], object]:
    """Return a function that calls this plugin's hook of ``group``, and no other plugin's. Raises PluginInvalid."""
    hook = GROUPS[group]
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    signatures.check(plugin, group, _implementations(manager, plugin), getattr(hookspecs, hook))
    try:
        manager.register(plugin)
    except pluggy.PluginValidationError as error:
        raise PluginInvalid(str(error)) from error
    caller = getattr(manager.hook, hook)

    def call(config: PluginConfig) -> object:
        results: list[object] = caller(config=config)
        return results[0] if results else None

    return call


def describe(error: BaseException) -> str:
    """Return a failure as a person should read it: an expected one as it is, a bug with its type."""
    if isinstance(error, RMAError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"module {error.name!r} is not installed here: install it, or reinstall the plugin with what it needs"
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _implementations(manager: pluggy.PluginManager, plugin: object) -> dict[str, Callable[..., object]]:
    """Return the marked functions of a plugin by the hook they implement."""
    found: dict[str, Callable[..., object]] = {}
    for name in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, name)
        if options is None:
            continue
        hook = options.get("specname") or name
        if options.get("wrapper") or options.get("hookwrapper"):
            raise PluginInvalid(f"{name} is a wrapper, and RMA's hooks take none: write @hookimpl without arguments")
        if hook in found:
            raise PluginInvalid(f"implements {hook} twice: keep one function")
        found[hook] = getattr(plugin, name)
    return found


def _installed(kinds: Collection[Kind], own: PluginFolders | None = None) -> Iterator[_Plugin]:
    """Yield every plugin that an installed distribution announces, without importing any.

    Distributions are read one by one, because one with unreadable metadata must not hide all others. What is in
    Python's own environment hides what its owner installed under the same name: it is being worked on.
    """
    from importlib.metadata import distributions

    # A runtime that was imported has put its own folder on the path, where another version may be by now.
    path = [entry for entry in sys.path if own is None or own.path not in (Path(entry), *Path(entry).parents)]
    there: list[tuple[Distribution, OwnFolder | None]] = [(one, None) for one in distributions(path=path)]
    for place in own.listed() if own else ():
        distribution = place.distribution()
        if distribution is not None:
            there.append((distribution, place))
    seen: set[str] = set()
    for distribution, folder in there:
        name, plugins = _announced(distribution, {KINDS[kind]: kind for kind in kinds})
        if name not in seen:
            seen |= {name} if plugins else set()
            for plugin in plugins:
                plugin.own = folder
                yield plugin


def _announced(distribution: Distribution, groups: Mapping[str, Kind]) -> tuple[str, list[_Plugin]]:
    """Return a distribution's normalized name and the plugins that it announces."""
    try:
        points = [point for point in distribution.entry_points if point.group in groups]
        name, version = (distribution.metadata["Name"] or "", distribution.version) if points else ("", "")
    except Exception as error:  # noqa: BLE001 - isolation boundary: metadata of strangers
        logger.warning("plugins of %s cannot be listed: %s", distribution, describe(error))
        return "", []
    normal = normalized(name)
    return normal, [
        _Plugin(name=p.name, kind=groups[p.group], value=p.value, distribution=normal, version=version or "")
        for p in points
    ]


def _of_files(folder: str) -> list[_Plugin]:
    """Return the detectors of a folder; its owner chose it, which approves them."""
    found = []
    for file in detector_files.listed(Path(folder)):
        name, module = file.name, detector_files.MODULE
        plugin = _Plugin(name=name, kind="detector", value=module, distribution=detector_files.SHIPPED_BY, version="")
        plugin.path = file.path
        if file.problem:
            plugin.refused, plugin.state, plugin.reason = True, "invalid", file.problem
        found.append(plugin)
    return found


def normalized(name: str) -> str:
    """Return a distribution's name as package indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _decide(
    plugin: _Plugin, *, blocked: frozenset[str], only: frozenset[str] | None, approved: Collection[str]
) -> None:
    """Decide by name, before anything is imported."""
    plugin.refused = True
    # Those in folders of their own are approved by their files, not by a name.
    known = plugin.distribution == BUILT_IN or bool(plugin.path or plugin.own)
    if plugin.name in blocked:
        plugin.state, plugin.reason = "blocked", "the owner blocks it (block_plugins, RMA_BLOCK_PLUGINS)"
    elif only is not None and plugin.name not in only:
        plugin.state, plugin.reason = "blocked", "not among the only plugins allowed (only_plugins, RMA_ONLY_PLUGINS)"
    elif not known and not {plugin.name, EVERYTHING} & set(approved):
        plugin.state, plugin.reason = (
            "unapproved",
            f"not approved yet: add {plugin.name!r} to `approve_plugins` in your settings once you trust it",
        )
    else:
        plugin.refused = False


def _decide_as_owner(plugin: _Plugin, decisions: Decisions) -> None:
    """Decide by what the owner approved and blocked with `rma plugins`."""
    plugin.refused = True
    approval = decisions.approved.get(plugin.distribution)
    if {plugin.name, plugin.distribution} & set(decisions.blocked):
        plugin.state, plugin.reason = "blocked", f"you blocked it; `rma plugins approve {plugin.name}` takes that back"
    elif plugin.own and plugin.own.problem:
        plugin.state, plugin.reason = "unapproved", plugin.own.problem
    elif plugin.own and approval is None:
        words = f"not approved yet: `rma plugins approve {plugin.distribution}` once you trust it"
        plugin.state, plugin.reason = "unapproved", words
    elif plugin.own and approval and approval.sha256 != plugin.own.digest:
        words = f"its files are not those of {approval.version} that you approved on {approval.at[:10]}"
        plugin.state = "unapproved"
        plugin.reason = f"{words}: look at them, then `rma plugins approve {plugin.distribution}`"
    else:
        plugin.refused = False


def _see(own: OwnFolder) -> None:
    """Let modules of a plugin's own folder be imported here, after all others."""
    # A cached module would be one more file, and one that nobody approved.
    sys.dont_write_bytecode = True
    if str(own.path) not in sys.path:
        sys.path.append(str(own.path))


def _move(plugin: _Plugin, state: State, reason: str) -> None:
    """Set a plugin's state; a change of it is logged once."""
    reason = reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}…"
    if plugin.state != state:
        words = f"{state}: {reason}" if reason else state
        extra = {"action": f"plugin_{state}", "plugin": plugin.name}
        logger.info("%s %s of %s is %s", plugin.kind, plugin.name, plugin.shipped_by, words, extra=extra)
    plugin.state, plugin.reason = state, reason


def _deprecate(plugin: _Plugin, used: Sequence[str]) -> None:
    """Keep what is deprecated of what a plugin uses, and warn of it."""
    # One that was left alone has not told it.
    plugin.deprecated = tuple(used) or plugin.deprecated
    for words in deprecations.words_of(used):
        deprecations.warn(plugin.kind, plugin.name, plugin.shipped_by, words)


def _order(plugin: _Plugin) -> tuple[bool, str, str, str]:
    return plugin.distribution != BUILT_IN, plugin.kind, plugin.name, plugin.distribution


def _by(items: list[Any], key: Callable[[Any], Any]) -> list[tuple[Any, list[Any]]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())


def _distributions(plugins: list[_Plugin]) -> str:
    return " and ".join(p.shipped_by for p in plugins)
