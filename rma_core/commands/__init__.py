"""The `rma` command: finds its subcommands by entry point, prints data on stdout and all else on stderr."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import click

import rma_core
from rma_core.commands import common
from rma_core.errors import Bug, RMAError, UsageProblem, ValidationProblem
from rma_core.hookspecs import COMMANDS_GROUP

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.metadata import EntryPoint

#: What a shell expects of a program that Ctrl-C ended.
INTERRUPTED = 130


#: Distributions whose commands nobody else can take over.
OURS = ("rma-core", "rma-coordinator")


class Commands(click.Group):
    """A group whose commands come from every distribution that has an ``rma.commands`` entry point.

    Each entry point names a module with ``COMMANDS``, a list of click commands. Ours come first and cannot be replaced;
    others are imported only if the owner's settings allow, and one that fails costs its own commands only.
    """

    _found: dict[str, click.Command] | None = None

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's form
        """Return every command's name."""
        return sorted(self._all())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's form
        """Return one command."""
        return self._all().get(cmd_name)

    def _all(self) -> dict[str, click.Command]:
        if self._found is None:
            self._found = {}
            owners: dict[str, str] = {}
            points = entry_points(group=COMMANDS_GROUP)
            for point in sorted(points, key=lambda point: (_shipped_by(point) not in OURS, point.name)):
                for command in _commands(point):
                    owner = owners.setdefault(str(command.name), _shipped_by(point))
                    if owner == _shipped_by(point):
                        self._found[str(command.name)] = command
                    else:
                        words = f"rma: {command.name!r} of {_shipped_by(point)} is not used: {owner} has that command"
                        common.say(words)
        return self._found


def _shipped_by(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else ""


def _commands(point: EntryPoint) -> list[click.Command]:
    """Import one distribution's commands, if it is ours or the owner's settings let it run."""
    if _shipped_by(point) not in OURS and not _may_run(point.name):
        return []
    try:
        return list(point.load().COMMANDS)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a stranger's module may end in anything, SystemExit too
        common.say(f"rma: the commands of {point.name!r} cannot be loaded: {type(error).__name__}: {error}")
        return []


def _may_run(name: str) -> bool:
    """Whether the settings let a third party's commands be imported."""
    from rma_core.settings import AgentSettings, CoordinatorSettings, Settings, load_settings

    try:
        rules = load_settings(Settings, flags={}, known=(AgentSettings, CoordinatorSettings)).plugin_rules()
    except RMAError:
        # The command that is run says what is wrong with the settings; until then no stranger's code runs.
        return False
    allowed = rules["only"] is None or name in rules["only"]
    return allowed and name not in rules["blocked"] and bool(rules["approved"] & {"*", name})


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(rma_core.__version__, prog_name="rma")
def rma() -> None:
    """RMA: a compute pool made of other people's machines.

    \b
    Try it:            rma up
    Give a machine:    rma join URL TOKEN
    Use a pool:        rma infer SERVICE FILE
    """  # noqa: D301 - click reads the escape as "keep these lines"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with CONTRACT's exit codes."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(args))


def run(args: list[str]) -> int:  # noqa: PLR0911 - one ending, one return
    """Run one command line; return its exit code."""
    as_json = "--json" in args
    common.on_one_line()
    try:
        code = rma.main(args=args, prog_name="rma", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.Abort:
        click.echo("stopped", err=True)
        return INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except click.ClickException as error:
        return _usage(error, as_json=as_json)
    except RMAError as error:
        return failed(error, as_json=as_json)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; python would complain once more when it closes stdout.
        sys.stderr.close()
        return 0
    except OSError as error:
        return failed(RMAError(_words(error)), as_json=as_json)
    except Exception as error:
        # The boundary to a person, who can do nothing with a traceback; whoever mends it asks for one.
        if os.environ.get("RMA_LOG_LEVEL", "").lower() == "debug":
            raise
        return failed(_bug(error), as_json=as_json)


def _words(error: OSError) -> str:
    """Return a system's refusal as a sentence."""
    name = f"{error.filename}: " if error.filename is not None else ""
    return f"{name}{error.strerror or error}"


def _bug(error: Exception) -> Bug:
    hints = ("RMA_LOG_LEVEL=debug shows where; please report that",)
    return Bug(f"something went wrong in rma itself ({type(error).__name__}: {error})", hints=hints)


def _usage(error: click.ClickException, *, as_json: bool) -> int:
    if as_json:
        return failed(UsageProblem(error.format_message()), as_json=True)
    error.show()
    return UsageProblem.exit_code


def failed(error: RMAError, *, as_json: bool) -> int:
    """Tell a person, or a program, what went wrong and what to do; return the exit code."""
    if as_json:
        body: dict[str, Any] = {"code": error.code, "message": error.message, "hints": list(error.hints)}
        # A file's name may be no UTF-8: it is written as escapes.
        click.echo(common.escaped_json(json.dumps({"error": body}, ensure_ascii=False, separators=(",", ":"))))
        return error.exit_code
    message = error.message
    if isinstance(error, ValidationProblem) and len(error.problems) > 1:
        message = "\n  ".join([f"{error.subject}:", *map(str, error.problems)])
    click.echo(click.style("error: ", fg="red", bold=True) + common.printable(message), err=True)
    for hint in error.hints:
        common.say(f"  → {hint}")
    return error.exit_code
