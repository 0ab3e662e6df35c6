"""What commands share: JSON or a table, the pool they talk to, and how long things were ago."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import click
import msgspec

from rma_core.errors import CoordinatorError, NotAuthenticated, UsageProblem
from rma_core.models.strict import encode
from rma_core.settings import ALIASES, default_home

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")

#: Columns of a table that is not read on a terminal.
PIPE_WIDTH = 250
#: Longest line of a log, in characters.
LOG_LINE = 4000
#: Whose records are logged at the level that was asked for; libraries only warn.
OUR_LOGGERS = ("rma_core", "rma_coordinator")
#: What every record of `logging` has; anything else is an id or a fact that whoever logged it added.
BARE_RECORD = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"})
#: What to do about an answer that no coordinator of this version gives.
OTHER_SIDE = ("check the address: is it RMA's, or a proxy's?", "rma --version there and here should agree")
#: Pages of a list at most, of a thousand entries each.
MAX_PAGES = 1000
#: What `rma up` leaves for other commands on the same machine: where it answers, and a key.
CLIENT_FILE = "client.json"


class ClientFile(msgspec.Struct, frozen=True, kw_only=True):
    """The pool that commands on this machine talk to when nobody names one."""

    url: str
    key: str = ""
    client_key: str = ""
    certificate: str = ""


class Target(NamedTuple):
    """A coordinator and the key to talk to it with."""

    url: str
    key: str
    certificate: str


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, errors too.")
attach_option = click.option(
    "--attach",
    "attach",
    multiple=True,
    metavar="URL",
    help="Share a model server that already runs on this machine; repeatable (RMA_ATTACH).",
)
model_option = click.option(
    "--model",
    "models",
    multiple=True,
    metavar="FILE",
    help="Share a model on this machine: NAME=FILE.gguf, FILE.gguf or a folder; repeatable (RMA_MODELS).",
)
home_option = click.option("--home", envvar="RMA_HOME", metavar="FOLDER", help="State folder (default ~/.rma).")


errors_option = click.option("--json", "as_json", is_flag=True, expose_value=False, help="Print errors as JSON.")


def pool_options(command: F) -> F:
    """Add the options that say which pool, and with which key; an answer it cannot use is no bug of the command."""
    command = cast("F", _doubting(command))
    for option in (
        click.option(
            "--insecure-http",
            is_flag=True,
            envvar="RMA_INSECURE_HTTP",
            help="Speak plain http to another machine (RMA_INSECURE_HTTP).",
        ),
        click.option("--key", metavar="KEY", help="Key to use (RMA_KEY; after `rma up`, its own)."),
        click.option("--coordinator", "url", metavar="URL", help="The pool's address (RMA_COORDINATOR_URL)."),
        home_option,
    ):
        command = option(command)
    return command


def _doubting(command: Callable[..., T]) -> Callable[..., T]:
    """Return a command that blames the coordinator's answer for what only comes of data of another form."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> T:
        try:
            return command(*arguments, **options)
        except (TypeError, AttributeError, LookupError, ValueError) as error:
            if os.environ.get("RMA_LOG_LEVEL", "").lower() == "debug":
                raise
            raise CoordinatorError(
                f"what the coordinator answered cannot be used ({type(error).__name__}: {error})",
                hints=(*OTHER_SIDE, "RMA_LOG_LEVEL=debug shows where, if it is rma that is wrong"),
            ) from None

    return run


def folder(home: str | None) -> Path:
    """Return the state folder."""
    from pathlib import Path

    return Path(home or os.environ.get("RMA_HOME") or default_home()).expanduser()


def target(options: Mapping[str, Any]) -> Target:
    """Return the pool and key that options, environment, or `rma up` on this machine name.

    Raises UsageProblem without a pool, NotAuthenticated without a key.
    """
    from rma_core.http import check_url

    saved = read_client(folder(options.get("home")))
    named = options.get("url") or os.environ.get("RMA_COORDINATOR_URL") or os.environ.get(ALIASES["coordinator_url"])
    url = named or (saved.url if saved else "")
    if not url:
        raise UsageProblem(
            "which pool?", hints=("--coordinator URL, or set RMA_COORDINATOR_URL", "or start one here: rma up")
        )
    ours = saved if saved and saved.url.rstrip("/") == url.rstrip("/") else None
    key = options.get("key") or os.environ.get("RMA_KEY") or (ours.key if ours else "")
    if not key:
        raise NotAuthenticated(
            "a key is needed", hints=("--key KEY, or set RMA_KEY", "an admin makes one: rma keys create")
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise NotAuthenticated("that is no key: it is mistyped or cut off", hints=("copy it again, whole",))
    address = check_url(url, insecure_http=bool(options.get("insecure_http")))
    return Target(address, key, ours.certificate if ours else "")


def read_client(home: Path) -> ClientFile | None:
    """Return what `rma up` left in its folder, if anything."""
    try:
        return msgspec.json.decode((home / CLIENT_FILE).read_bytes(), type=ClientFile)
    except (OSError, msgspec.MsgspecError):
        return None


def write_client(home: Path, client: ClientFile) -> None:
    """Leave the pool's address and a key for other commands of the same user."""
    path = home / CLIENT_FILE
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(encode(client))


def call(
    options: Mapping[str, Any],
    method: str,
    path: str,
    *,
    body: object = None,
    query: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> Any:
    """Make one call to the pool and return its JSON; ``timeout_s`` where it may take long. Raises CoordinatorError."""
    from rma_core import http

    to = target(options)
    context = http.tls_context(to.certificate) if to.certificate else None
    timeout_s = http.CALL_TIMEOUT_S if timeout_s is None else timeout_s
    with http.open_sync_client(to.url, context=context, token=to.key, timeout_s=timeout_s) as client:
        try:
            content = None if body is None else encode(body)
            kind = {"content-type": "application/json"} if content is not None else {}
            with client.stream(method, path, content=content, headers=kind, params=dict(query or {})) as response:
                if not response.is_success:
                    raise http.error_of(response.status_code, response.headers, http.read_problem_sync(response))
                return json_of(to.url, http.read_sync(response))
        except http.HTTPError as error:
            raise http.unreachable(to.url, error) from None


class Answer(dict[str, Any]):
    """A JSON object of the coordinator; what it lacks is the coordinator's fault, and said so."""

    def __missing__(self, name: str) -> Any:
        """Raise CoordinatorError."""
        raise CoordinatorError(f"the coordinator's answer has no {name!r}", hints=OTHER_SIDE)


def json_of(url: str, content: bytes) -> Answer:
    """Return an answer as data. Raises CoordinatorError for one that is no JSON object."""
    try:
        found = json.loads(content, object_hook=Answer)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, Answer):
        raise CoordinatorError(f"what answers at {url} does not speak as a coordinator does", hints=OTHER_SIDE)
    return found


def part(name: str) -> str:
    """Return a name as one part of a path, whatever is in it."""
    from urllib.parse import quote

    return quote(name.encode("utf-8", "surrogateescape"), safe="") or "%00"


def pages(options: Mapping[str, Any], path: str, name: str) -> list[dict[str, Any]]:
    """Return every entry of a paged list."""
    items: list[dict[str, Any]] = []
    after = ""
    for _ in range(MAX_PAGES):
        query = {"limit": "1000", **({"after": after} if after else {})}
        page = call(options, "GET", path, query=query)
        items += page[name]
        after = page["next"]
        if not after:
            return items
    raise CoordinatorError("the coordinator's list does not end", hints=OTHER_SIDE)


def console(*, err: bool = False) -> Console:
    """Return where people read data: stdout (or stderr), in colour only on a terminal."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    # A pipe has no width: folding there would break what grep and awk look for.
    return Console(stderr=err, highlight=False, emoji=False, width=None if stream.isatty() else PIPE_WIDTH)


def say(message: str) -> None:
    """Tell the person something that is not data, in characters that a terminal only shows."""
    click.echo(printable(message), err=True)


def show(value: object, as_json: bool, human: Callable[[Console], None]) -> None:
    """Print data: as JSON for programs, else the way ``human`` prints it."""
    if as_json:
        click.echo(plain_json(value))
    else:
        human(console())


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> Callable[[Console], None]:
    """Return what prints rows under columns, or one sentence when there are none."""

    def human(out: Console) -> None:
        from rich import box
        from rich.table import Table

        if not rows:
            out.print(safe(empty))
            return
        made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in columns:
            made.add_column(name, overflow="fold")
        for row in rows:
            made.add_row(*("" if cell is None else safe(str(cell)) for cell in row))
        out.print(made)

    return human


def printable(text: str, *, keep: str = "\n") -> str:
    """Return text from outside without control characters, which a terminal would obey; ``keep`` lists exceptions."""
    return "".join(c if c.isprintable() or c in keep else "�" for c in text)


def safe(text: str) -> str:
    """Return text from outside for rich: without control characters and without markup."""
    from rich.markup import escape

    return escape(printable(text))


def plain_json(value: object) -> str:
    """Return indented JSON in which what a terminal would obey is escaped: the same data, for eyes and programs."""
    return escaped_json(msgspec.json.format(encode(value), indent=2).decode())


def escaped_json(text: str) -> str:
    """Return the same JSON with the unprintable characters of its strings written as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def ago(when: str | None) -> str:
    """Return how long ago a time of CONTRACT's form was: ``3 s``, ``2 h``."""
    if not when:
        return "never"
    try:
        moment = datetime.strptime(when, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    except (TypeError, ValueError):
        return "?"
    seconds = max(0.0, time.time() - moment)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def failed(one: Mapping[str, Any]) -> str:
    """Return how often a plugin or a policy has failed and when last; nothing where it has not."""
    times = one.get("failures", 0)
    if not times:
        return ""
    when = f"{ago(one['failed_at'])} ago"
    return f"once, {when}" if times == 1 else f"{times} times, last {when}"


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end."""
    return asyncio.run(main)


class OneLine(logging.Formatter):
    """Writes each record on one line of at most LOG_LINE characters; only a traceback has lines of its own, indented.

    What came from elsewhere can so neither pass for a record nor reach a terminal as a command.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the record's line."""
        return _log_line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line, and its traceback's lines."""
        first, *more = super().format(record).split("\n")
        return "\n".join([first, *(_log_line(f"  {line}") for line in more)])


def on_one_line() -> None:
    """Have warnings of a command that keeps no log shown on a line each: they may quote what comes from elsewhere."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(OneLine("%(message)s"))


def shown_in_a_table() -> None:
    """Have no warning of what is deprecated: the command shows it."""
    logging.getLogger("rma_core.deprecations").setLevel(logging.ERROR)


def _log_line(text: str) -> str:
    # Cut first: what nobody will read need not be looked at.
    line = text[: LOG_LINE + 1]
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= LOG_LINE else f"{line[: LOG_LINE - 1]}…"


class JSONLine(logging.Formatter):
    """Writes each record as one JSON object on one line: time, level, logger, message, action, and what it is about.

    The ids have the same names everywhere: ``worker``, ``task``, ``attempt``, ``token``, ``key``, ``container`` ….
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON; long texts are cut as `OneLine` cuts them."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        found: dict[str, object] = {
            "time": f"{moment.partition('+')[0]}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "action": "",
        }
        found |= {name: value for name, value in vars(record).items() if name not in BARE_RECORD and value is not None}
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)[-LOG_LINE:]
        return json.dumps({name: _short(value) for name, value in found.items()})


def _short(value: object) -> object:
    if isinstance(value, bool | int | float):
        return value
    text = str(value)
    return text if len(text) <= LOG_LINE else f"{text[: LOG_LINE - 1]}…"


def set_up_logging(level: str, *, as_json: bool = False) -> None:
    """Send log lines to stderr: for a person, or for a program that wants one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    for_people = OneLine("%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    handler.setFormatter(JSONLine() if as_json else for_people)
    ours = logging.getLevelNamesMapping()[level.upper()]
    # What libraries say below WARNING is not for an admin, and on DEBUG it holds headers with credentials.
    logging.basicConfig(level=max(logging.WARNING, ours), handlers=[handler])
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(ours)


def log_options(command: F) -> F:
    """Add the options that say what is logged and how."""
    for option in (
        click.option("--log-json", is_flag=True, default=None, help="Log one JSON object a line (RMA_LOG_JSON)."),
        click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error (RMA_LOG_LEVEL)."),
    ):
        command = option(command)
    return command


def outer(options: dict[str, Any]) -> dict[str, Any]:
    """Return a subcommand's options, with those given before its name where it has none itself."""
    given = click.get_current_context().obj or {}
    return {name: value or given.get(name) for name, value in options.items()}


def ask(question: str) -> None:
    """Ask; raises UsageProblem for a no, and where nobody can be asked."""
    if not sys.stdin.isatty():
        raise UsageProblem("nobody can be asked here, and nothing was changed", hints=("--yes does not ask",))
    if not click.confirm(printable(question), default=False, err=True):
        raise UsageProblem("nothing was changed")
