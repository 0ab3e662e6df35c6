"""Commands about plugins: which there are, a new one, and whether one does what it must."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from rma_core.commands import common
from rma_core.commands.machine import agent_settings, settings_of
from rma_core.commands.plugin_owner import plugins_approve, plugins_block, plugins_install, plugins_remove
from rma_core.errors import UsageProblem
from rma_core.host import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rich.console import Console

    from rma_core.host import Kind, Plugins
    from rma_core.models.worker import PluginReport
    from rma_core.plugin_folders import PluginFolders
    from rma_core.settings import AgentSettings
    from rma_core.testing.checking import Result, Target

MARKS = {"kept": "✓", "broken": "✗", "open": "·", "deprecated": "!"}


@click.group(invoke_without_command=True)
@common.home_option
@common.json_option
@click.pass_context
def plugins(ctx: click.Context, home: str | None, as_json: bool) -> None:
    """List installed plugins: in which state, and why."""
    ctx.obj = {"home": home, "as_json": as_json}
    if ctx.invoked_subcommand is None:
        _list_plugins(home, as_json=as_json)


for _command in (plugins_install, plugins_approve, plugins_block, plugins_remove):
    plugins.add_command(_command)


@plugins.command("list")
@common.home_option
@common.json_option
def plugins_list(home: str | None, as_json: bool) -> None:
    """List installed plugins: in which state, and why."""
    outer = click.get_current_context().obj or {}
    _list_plugins(home or outer.get("home"), as_json=as_json or bool(outer.get("as_json")))


def _list_plugins(home: str | None, *, as_json: bool) -> None:
    common.shown_in_a_table()
    settings = settings_of(home)
    found = _used_plugins(settings)
    reports = [msgspec.to_builtins(report) for report in _with_the_agents(settings, found.reports())]
    some = any(report["failures"] for report in reports)
    rows = [
        (
            p["name"],
            p["kind"],
            p["state"],
            f"{p['distribution']} {p['version']}",
            "" if p["import_seconds"] is None else f"{p['import_seconds'] * 1000:.0f} ms",
            *([common.failed(p)] if some else []),
            "; ".join(filter(None, (p["reason"], *p["deprecated"]))),
        )
        for p in reports
    ]
    columns = ("plugin", "kind", "state", "from", "import", *(["failed"] if some else []), "why")
    common.show({"plugins": reports}, as_json, common.table(columns, rows, empty="No plugins are installed."))


def _with_the_agents(settings: AgentSettings, reports: Iterable[PluginReport]) -> Iterator[PluginReport]:
    """Add what a running agent has counted since it started to what has just failed here."""
    from rma_core.diagnosis import running_agent

    running = common.run_async(running_agent(agent_settings(settings)))
    counted = {(one.kind, one.name): one for one in (running.plugins if running else ())}
    for report in reports:
        if (theirs := counted.get((report.kind, report.name))) is not None:
            times, last = report.failures + theirs.failures, max(report.failed_at, theirs.failed_at)
            yield msgspec.structs.replace(report, failures=times, failed_at=last)
        else:
            yield report


def _used_plugins(settings: AgentSettings) -> Plugins:
    """Return all plugins after each was really used once: detectors and policies in children, runtimes here."""
    from rma_core import policies_apart
    from rma_core.detection import observe
    from rma_core.host import Plugins

    found = Plugins.discover(**settings.plugin_rules())
    found.runtimes(settings.plugins)

    async def use() -> None:
        async with policies_apart.started(found, settings.plugins):
            await observe(found, config=settings.plugins, deadline_s=settings.detect_deadline_s)

    common.run_async(use())
    return found


@plugins.command("new")
@click.argument("name")
@click.option("--kind", type=click.Choice(list(KINDS)), help="What it is (default: as its name says, else a detector).")
@common.json_option
def plugins_new(name: str, kind: Kind | None, as_json: bool) -> None:
    """Make a new plugin in a folder of its own: it works as it is, and has its test.

    NAME tells its kind (detect_foo, runtime_foo, policy_foo), or --kind does.
    """
    from rma_core.scaffold import create

    made = create(name, kind, Path())
    value = {"plugin": made.name, "kind": made.kind, "folder": str(made.folder), "files": list(made.files)}
    common.show(value, as_json, lambda out: out.print(f"{made.folder}: {', '.join(made.files)}"))
    if not as_json:
        common.say(f"Change {made.files[1]}, then:")
        common.say(f"  rma plugins check {made.folder}")
        common.say(f"  pip install -e {made.folder}      and it is in `rma plugins`")
    if made.kind == "runtime" and not as_json:
        common.say("It is for an engine with Docker's API; for another, write the methods of a ContainerRuntime.")


@plugins.command("check")
@click.argument("plugin", metavar="PATH|NAME")
@common.home_option
@common.json_option
@click.pass_context
def plugins_check(ctx: click.Context, plugin: str, home: str | None, as_json: bool) -> None:
    """Check that a plugin does what it must: an installed one by its name, or the one in a folder.

    It runs in children of its own, several times, also on a machine that is made to look empty, hung or deadly. Exit
    code 1 when it breaks a rule.
    """
    from rma_core.testing.checking import targets

    outer = click.get_current_context().obj or {}
    settings = settings_of(home or outer.get("home"))
    as_json = as_json or bool(outer.get("as_json"))
    found = targets(plugin, settings.plugin_folders)
    for target in found:
        _refuse_unapproved(target, settings.plugin_folders)
    common.shown_in_a_table()
    hidden = settings.plugin_rules()["hidden"]
    done = common.run_async(_check_all(found, settings.plugins, hidden, quiet=as_json))
    broken = sum(result.state == "broken" for _, results in done for result in results)
    common.show(
        {
            "plugins": [
                {"plugin": target.name, "kind": target.kind, "checks": [result._asdict() for result in results]}
                for target, results in done
            ],
            "broken": broken,
        },
        as_json,
        lambda out: _print_checks(out, done),
    )
    ctx.exit(1 if broken else 0)


def _refuse_unapproved(target: Target, folders: PluginFolders) -> None:
    """Raise UsageProblem for one that was installed and may not run: checking it is running it."""
    folder = Path(target.folder)
    if target.folder and folder.parent == folders.path and not folders.approves(folders.get(folder.name)):
        hints = (f"`rma plugins approve {folder.name}` once you trust it",)
        raise UsageProblem(f"{folder.name} is not approved, and a check runs it", hints=hints)


async def _check_all(
    found: list[Target], tables: Mapping[str, dict[str, object]], hidden: Sequence[str], *, quiet: bool
) -> list[tuple[Target, list[Result]]]:
    """Run every check of every plugin; what runs is shown meanwhile."""
    from rma_core.testing.checking import results

    done = []
    with contextlib.nullcontext() if quiet else common.console(err=True).status("") as status:
        for target in found:
            kept: list[Result] = []
            async for result in results(target.case(tables, hidden)):
                kept.append(result)
                if status is not None:
                    status.update(common.safe(f"{target.name}: {len(kept)} checks done, {result.check}"))
            done.append((target, kept))
    return done


def _print_checks(out: Console, done: Sequence[tuple[Target, list[Result]]]) -> None:
    """Print each plugin's checks, and their sum."""
    for target, results in done:
        rows = [(MARKS[result.state], result.check, result.message) for result in results]
        common.table(("", f"{target.kind} {target.name}", "why"), rows, empty="No checks.")(out)
        broken = sum(result.state == "broken" for result in results)
        warned = ", and a warning" if any(result.state == "deprecated" for result in results) else ""
        words = f"{broken} broken" if broken else f"all {len(results)} kept"
        out.print(common.safe(f"{target.name}: {words}{warned}"))
    if any(target.kind == "runtime" for target, _ in done):
        suites = "runtime_contract, adoption_contract and isolation_contract in rma_core.testing"
        common.say(f"What needs containers is for its author to try: {suites}.")
