"""Commands of those who install plugins: a folder for each, shown before it may run; taken back just as easily."""

from __future__ import annotations

import contextlib
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from rma_core import confinement, host
from rma_core.commands import common
from rma_core.commands.machine import settings_of
from rma_core.errors import NotFound, PluginConflict, UsageProblem
from rma_core.plugin_folders import Approval

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from rich.console import Console

    from rma_core.host import InstalledPlugin
    from rma_core.plugin_folders import OwnFolder, PluginFolders
    from rma_core.plugin_install import Wheel

#: What each kind of plugin may do once it is approved.
MAY = {
    "detector": "looks at the hardware in a process of its own, for seconds",
    "runtime": "runs inside the agent, with all that the agent may do",
    "policy": "decides which tier machines get",
}
AGAIN = "A running agent goes by that when it looks again (`rma detect --rescan`: now); runtimes when it restarts."
RESCAN = "A running coordinator goes by that after `rma policies rescan`."


def _folders(home: str | None) -> PluginFolders:
    outer = click.get_current_context().obj or {}
    return settings_of(home or outer.get("home")).plugin_folders


def _json(as_json: bool) -> bool:
    return as_json or bool((click.get_current_context().obj or {}).get("as_json"))


@contextlib.contextmanager
def _telling(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show what goes on while it does."""
    if quiet:
        yield lambda _: None
        return
    with common.console(err=True).status("") as status:
        yield lambda words: status.update(common.safe(words))


@click.command("install")
@click.argument("what", metavar="WHEEL|NAME|URL")
@click.option("--yes", is_flag=True, help="Let it run at once: agree to what would be shown.")
@common.home_option
@common.json_option
def plugins_install(what: str, yes: bool, home: str | None, as_json: bool) -> None:
    """Install a plugin into a folder of its own: shown, and run only once you agree.

    Only wheels are taken, and nothing of them runs while they are installed.
    """
    # Every other command would wait for these.
    from rma_core import plugin_install
    from rma_core.publisher import publisher_of

    folders, as_json = _folders(home), _json(as_json)
    with folders.staging() as staging:
        with _telling(quiet=as_json) as tell:
            wheel = plugin_install.fetch(what, staging, tell)
            if words := plugin_install.taken(wheel, host.installed(folders)):
                raise PluginConflict(words, hints=("rma plugins remove, or pip uninstall",))
            tell(f"asking who published {wheel.name}")
            publisher = publisher_of(wheel.source, wheel.distribution, wheel.sha256)
            new = plugin_install.unpack(wheel, staging, tell)
        about = {
            "plugin": wheel.distribution,
            "version": wheel.version,
            "source": wheel.source,
            "wheel_sha256": wheel.sha256,
            "publisher": publisher,
            "sha256": new.digest,
        }
        names = _own_names(wheel.distribution, (name for _, name, _ in wheel.plugins), folders)
        rows = _of_wheel(wheel, new.digest, publisher, blocked=names & set(folders.decisions().blocked))
        yes = _asked(f"{wheel.name} {wheel.version}", rows, yes=yes, as_json=as_json)
        if not yes and (before := _approved(folders, wheel.distribution)):
            _say(f"Nothing has changed: {before} that you approved stays.", as_json=as_json)
            common.show({**about, "installed": False, "approved": False}, as_json, _nothing)
            return
        made = folders.put(wheel.distribution, new.folder)
        if yes:
            _approve(folders, wheel.distribution, new.digest, wheel.version, names)
        _say_what_follows(wheel.distribution, {kind for kind, _, _ in wheel.plugins}, approved=yes, as_json=as_json)
    common.show({**about, "folder": str(made.path), "installed": True, "approved": yes}, as_json, _nothing)


@click.command("approve")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Agree to what would be shown, without being asked.")
@common.home_option
@common.json_option
def plugins_approve(name: str, yes: bool, home: str | None, as_json: bool) -> None:
    """Let a plugin run: one that was installed, has changed since, or was blocked.

    NAME is the plugin's name or its distribution's. What is approved are exactly its files as they are now.
    """
    folders, as_json = _folders(home), _json(as_json)
    found = _named(name, folders)
    distribution = found[0].shipped_by.partition(" ")[0]
    names = _own_names(distribution, (one.name for one in found), folders)
    blocked = names & set(folders.decisions().blocked)
    if not found[0].folder:
        if not blocked:
            hints = ("`approve_plugins` in your settings says which of those may run",)
            raise UsageProblem(f"{distribution} is installed in Python's own environment", hints=hints)
        folders.decide(lambda known: known.free(*blocked))
        common.show({"plugin": distribution, "approved": True}, as_json, _prints(f"{name} may run again."))
        return
    made = folders.get(distribution)
    version = found[0].shipped_by.partition(" ")[2]
    if made.problem:
        raise UsageProblem(made.problem)
    rows = [*_of_folder(made, found), *_blocked(blocked)]
    yes = _asked(f"{distribution} {version}", rows, yes=yes, as_json=as_json)
    if yes:
        _approve(folders, distribution, made.digest, version, names)
    _say_what_follows(distribution, {one.kind for one in found}, approved=yes, as_json=as_json)
    about = {"plugin": made.name, "version": version, "folder": str(made.path), "sha256": made.digest}
    common.show({**about, "approved": yes}, as_json, _nothing)


@click.command("block")
@click.argument("name")
@common.home_option
@common.json_option
def plugins_block(name: str, home: str | None, as_json: bool) -> None:
    """Never run a plugin, wherever it is installed; `rma plugins approve NAME` takes that back.

    NAME is the plugin's name or its distribution's.
    """
    folders, as_json = _folders(home), _json(as_json)
    found = _named(name, folders)
    folders.decide(lambda known: known.block(name))
    common.show({"plugin": name, "blocked": True}, as_json, _prints(f"{name} does not run any more."))
    _say(_taken_up({one.kind for one in found}), as_json=as_json)


@click.command("remove")
@click.argument("name")
@common.home_option
@common.json_option
def plugins_remove(name: str, home: str | None, as_json: bool) -> None:
    """Remove a plugin that `rma plugins install` has put into a folder of its own.

    NAME is the plugin's name or its distribution's.
    """
    folders, as_json = _folders(home), _json(as_json)
    distribution, found = name, list[host.InstalledPlugin]()
    with contextlib.suppress(NotFound):
        found = _named(name, folders)
        distribution = found[0].shipped_by.partition(" ")[0]
        if not found[0].folder:
            hints = (f"pip uninstall {distribution}",)
            raise UsageProblem(f"{distribution} is installed in Python's own environment", hints=hints)
    folders.remove(distribution)
    common.show({"plugin": distribution, "removed": True}, as_json, _prints(f"{distribution} is gone."))
    _say(_taken_up({one.kind for one in found}), as_json=as_json)


def _named(name: str, folders: PluginFolders) -> list[InstalledPlugin]:
    """Return the plugins of one distribution: the one called so, or the one that has a plugin called so."""
    there = host.installed(folders)
    found = [one for one in there if name in (one.name, one.shipped_by.partition(" ")[0])]
    owners = {one.shipped_by for one in found}
    if not found:
        hints = (f"installed are {', '.join(sorted({one.name for one in there}))}",)
        raise NotFound(f"no plugin {name!r} is installed", hints=hints)
    if len(owners) > 1:
        hints = ("name the distribution",)
        raise UsageProblem(f"{name!r} is in {' and '.join(sorted(owners))}", hints=hints)
    return [one for one in there if one.shipped_by in owners]


def _asked(title: str, rows: list[tuple[str, str]], *, yes: bool, as_json: bool) -> bool:
    """Show what it is and ask whether it may run; where nobody can be asked it may not."""
    if not as_json:
        common.table(("", title), rows, empty="")(common.console(err=True))
    if yes or as_json or not sys.stdin.isatty():
        return yes
    return click.confirm("Let it run on this machine?", default=False, err=True)


def _approved(folders: PluginFolders, distribution: str) -> str:
    """Return the version of a distribution that is there and may run; nothing where none may."""
    with contextlib.suppress(NotFound):
        there = folders.get(distribution)
        if folders.approves(there):
            return folders.decisions().approved[distribution].version
    return ""


def _approve(folders: PluginFolders, distribution: str, digest: str, version: str, names: set[str]) -> None:
    """Keep that these files may run, and that none of these names is blocked."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    approval = Approval(sha256=digest, version=version[:100], at=now)
    folders.decide(lambda known: known.free(*names).approve(distribution, approval))


def _own_names(distribution: str, plugins: Iterable[str], folders: PluginFolders) -> set[str]:
    """Return the names under which a distribution may be blocked, but for those that mean another one too."""
    others = [one for one in host.installed(folders) if one.shipped_by.partition(" ")[0] != distribution]
    return {distribution, *plugins} - {name for one in others for name in (one.name, one.shipped_by.partition(" ")[0])}


def _blocked(names: Iterable[str]) -> list[tuple[str, str]]:
    return [("blocked", f"{name}: you blocked it, and a yes takes that back") for name in sorted(names)]


def _say_what_follows(distribution: str, kinds: Collection[str], *, approved: bool, as_json: bool) -> None:
    if not approved:
        _say(f"It is installed and does not run: `rma plugins approve {distribution}` lets it.", as_json=as_json)
        return
    _say(f"It may run. {_taken_up(kinds)}", as_json=as_json)


def _taken_up(kinds: Collection[str]) -> str:
    """Say when programs that run go by a decision about plugins of these kinds."""
    # Of one that is not listed any more nobody knows the kind.
    of_agents = [AGAIN] if set(kinds) != {"policy"} else []
    return " ".join([*of_agents, *([RESCAN] if "policy" in kinds else [])])


def _of_wheel(wheel: Wheel, digest: str, publisher: str, *, blocked: Collection[str]) -> list[tuple[str, str]]:
    """Return what a person should know of a wheel before it may run."""
    needs = (f"{one.name} {one.version} ({urlsplit(one.source).hostname or 'a file'})" for one in wheel.needs)
    return [
        ("says of itself", wheel.summary),
        ("author, as it says", wheel.author or "not said"),
        ("from", wheel.source),
        ("sha256 of the wheel", wheel.sha256),
        ("published by", publisher),
        ("comes with", ", ".join(needs) or "nothing else"),
        *[("gives", f"{kind} {name} ({value})") for kind, name, value in wheel.plugins],
        *_may(kind for kind, _, _ in wheel.plugins),
        *_blocked(blocked),
        ("sha256 of its files", digest),
    ]


def _of_folder(made: OwnFolder, found: list[InstalledPlugin]) -> list[tuple[str, str]]:
    """Return what a person should know of an installed one."""
    distribution = made.distribution()
    about: Any = distribution.metadata if distribution else {}
    return [
        ("says of itself", str(about["Summary"] or "")),
        ("lies in", str(made.path)),
        *[("gives", f"{one.kind} {one.name} ({one.value})") for one in found],
        *_may(one.kind for one in found),
        ("sha256 of its files", made.digest),
    ]


def _may(kinds: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Say what plugins of these kinds may do."""
    for kind in dict.fromkeys(kinds):
        yield "may", MAY[kind]
        if kind == "detector":
            yield "", confinement.available().words()


def _prints(words: str) -> Callable[[Console], None]:
    return lambda out: out.print(common.safe(words))


def _nothing(out: Console) -> None:
    """Print no data: all there is to say was said."""


def _say(words: str, *, as_json: bool) -> None:
    if not as_json:
        common.say(words)
