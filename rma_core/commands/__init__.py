"""The `rma` command: finds its subcommands by entry point, prints data on stdout and all else on stderr."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import click
import msgspec

import rma_core
from rma_core.errors import RMAError, UsageProblem, ValidationProblem
from rma_core.hookspecs import COMMANDS_GROUP

if TYPE_CHECKING:
    from collections.abc import Sequence

#: What a shell expects of a program that Ctrl-C ended.
INTERRUPTED = 130


class Commands(click.Group):
    """A group whose commands come from every distribution that has an ``rma.commands`` entry point.

    Each entry point names a module with ``COMMANDS``, a list of click commands. One that cannot be imported is named
    on stderr and costs its own commands only.
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
            for point in sorted(entry_points(group=COMMANDS_GROUP), key=lambda point: point.name):
                try:
                    commands = point.load().COMMANDS
                except Exception as error:  # noqa: BLE001 - one broken distribution costs its own commands only
                    click.echo(f"rma: the commands of {point.name!r} cannot be loaded: {error}", err=True)
                    continue
                for command in commands:
                    self._found.setdefault(command.name, command)
        return self._found


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


def _usage(error: click.ClickException, *, as_json: bool) -> int:
    if as_json:
        return failed(UsageProblem(error.format_message()), as_json=True)
    error.show()
    return UsageProblem.exit_code


def failed(error: RMAError, *, as_json: bool) -> int:
    """Tell a person, or a program, what went wrong and what to do; return the exit code."""
    if as_json:
        body: dict[str, Any] = {"code": error.code, "message": error.message, "hints": list(error.hints)}
        click.echo(msgspec.json.encode({"error": body}).decode())
        return error.exit_code
    message = error.message
    if isinstance(error, ValidationProblem) and len(error.problems) > 1:
        message = "\n  ".join([f"{error.subject}:", *map(str, error.problems)])
    click.echo(click.style("error: ", fg="red", bold=True) + message, err=True)
    for hint in error.hints:
        click.echo(f"  → {hint}", err=True)
    return error.exit_code
