"""Write docs/reference/ from the code: settings, commands, HTTP calls, hooks, errors. ``make docs`` runs it.

``python docs/generate.py --check`` writes nothing and fails when a page is not what the code says.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

import rma_coordinator
from rma_coordinator.api.problems import STATUS_WORDS, STATUSES
from rma_coordinator.api.routes import ROUTES
from rma_core import catalog, errors, hookspecs, interfaces, sysfs
from rma_core.commands import rma
from rma_core.models import hardware
from rma_core.settings import ALIASES, AgentSettings, CoordinatorSettings, Settings, default_home, describe

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rma_coordinator.api.routes import Route
    from rma_core.settings import SettingInfo

HERE = Path(__file__).resolve().parent / "reference"
GENERATED = "<!-- Written by docs/generate.py from the code: change that, then run `make docs`. -->"
#: What problems that are no kind of failure by themselves are raised as.
PROBLEMS = ("HTTPProblem", "OverLimit")
#: Commands of other installed plugins are theirs to document.
OURS = ("rma_core", "rma_coordinator")


def pages() -> dict[str, str]:
    """Return every page of the reference by its file name."""
    made = {
        "commands.md": commands(),
        "errors.md": failures(),
        "hooks.md": hooks(),
        "http.md": http(),
        "settings.md": settings(),
    }
    return {name: f"{GENERATED}\n\n{text.strip()}\n" for name, text in made.items()}


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def code(value: object) -> str:
    """Return a value as code, nothing as nothing."""
    return f"`{value}`" if str(value) else ""


# -- settings ----------------------------------------------------------------------------------------------------------


def settings() -> str:
    """The settings of every program."""
    common = {info.name for info in describe(Settings)}
    parts = [
        "# Settings",
        (
            "A setting is taken from its flag, else from the environment, else from the file `rma.toml` in the state "
            "folder, else it has its default. Lists are written with commas in the environment. The file is one flat "
            "table; a plugin's own settings stand under `[plugins.NAME]`, and the plugin explains them."
        ),
        "## Both programs",
        _settings(Settings, frozenset()),
        "## The agent",
        _settings(AgentSettings, common),
        "## The coordinator",
        _settings(CoordinatorSettings, common),
    ]
    return "\n\n".join(parts)


def _settings(kind: type[Settings], without: Iterable[str]) -> str:
    rows = [
        (code(info.name), _kind(info.kind), code(_default(info.default)), _variables(info), info.sentence)
        for info in describe(kind)
        if info.name not in without
    ]
    return table(("setting", "type", "default", "environment", "what it does"), rows)


def _kind(name: str) -> str:
    return "table" if name.startswith("dict") else name.replace("str", "text")


def _default(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict)):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]" if isinstance(value, list) else "{}"
    if isinstance(value, str):
        return f'"{"~/.rma" if value == default_home() else value}"'
    return str(value)


def _variables(info: SettingInfo) -> str:
    if info.kind.startswith("dict"):
        return "(file only)"
    return ", ".join(map(code, filter(None, (info.environment, ALIASES.get(info.name)))))


# -- commands ----------------------------------------------------------------------------------------------------------


def walk() -> Iterator[tuple[str, click.Command]]:
    """Yield every command of ours with its full name, groups before what is in them."""
    ctx = click.Context(rma, info_name="rma")
    for name in rma.list_commands(ctx):
        command = rma.get_command(ctx, name)
        if command and command.callback and command.callback.__module__.partition(".")[0] in OURS:
            yield f"rma {name}", command
            if isinstance(command, click.Group):
                yield from ((f"rma {name} {inner}", sub) for inner, sub in sorted(command.commands.items()))


def shown(command: click.Command) -> list[click.Option]:
    """Return the options that people may use."""
    return [p for p in command.params if isinstance(p, click.Option) and not p.hidden]


def commands() -> str:
    """The command line."""
    parts = [
        "# Commands",
        (
            "Data goes to stdout, everything else to stderr. `--json` prints JSON, errors too "
            '(`{"error": {"code", "message", "hints"}}`). [Errors](errors.md) lists the exit codes. Every command has '
            "`--help`."
        ),
    ]
    for name, command in walk():
        arguments = [p.make_metavar(click.Context(command)) for p in command.params if isinstance(p, click.Argument)]
        usage = " ".join([name, *(["[OPTIONS]"] if shown(command) else []), *arguments])
        parts += [f"## `{name}`", _paragraphs(command.help or ""), f"`{usage}`"]
        if shown(command):
            parts.append(table(("option", "does"), map(_option, shown(command))))
    return "\n\n".join(parts)


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _option(option: click.Option) -> tuple[str, str]:
    metavar = "" if option.is_flag else f" {option.make_metavar(click.Context(click.Command('')))}"
    given = option.default
    default = f" Default: {given:.0f}." if option.show_default and isinstance(given, (int, float)) else ""
    return code(", ".join(option.opts) + metavar), f"{option.help or ''}{default}"


# -- HTTP --------------------------------------------------------------------------------------------------------------

#: The parts of the page, each with what its credential is and the beginning of its paths.
SECTIONS = (
    ("Open to all", "No credential.", "/"),
    ("Workers", "What agents call. `join` means a join token, `worker` a worker token.", "/api/worker/"),
    ("Admins", "An admin key that holds the scope.", "/api/admin/"),
    ("Clients", "A key that holds `infer:SERVICE` or `infer:*`.", "/api/inference/"),
    (
        "OpenAI's API",
        'A key that holds `infer:llm` or `infer:*`. Errors are OpenAI\'s: `{"error": {message, type, param, code}}`.',
        "/v1/",
    ),
)


def http() -> str:
    """Every call the coordinator answers."""
    parts = [
        "# HTTP calls",
        (
            "The same table feeds the coordinator's router and its OpenAPI document at `/openapi.json`. Credentials go "
            "into `Authorization: Bearer …`. Errors are problem documents (RFC 9457), see [Errors](errors.md)."
        ),
    ]
    for title, words, start in SECTIONS:
        routes = [route for route in ROUTES if _start(route) == start]
        parts += [f"## {title}", words, table(("call", "needs", "does", "takes", "gives"), map(_route, routes))]
        parts += [
            f"`{r.method} {r.path}` takes {where}: " + "; ".join(f"`{k}` {v.words}" for k, v in named.items()) + "."
            for r in routes
            for where, named in (("in its query", r.query), ("as headers", r.headers))
            if named
        ]
    return "\n\n".join([*parts, "## Bodies", "Fields without a `?` are required.", *_bodies()])


def _start(route: Route) -> str:
    return next((start for _, _, start in SECTIONS[1:] if route.path.startswith(start)), "/")


def _route(route: Route) -> tuple[str, ...]:
    gives = f"{route.status} {_body(route.gives)}".strip()
    return code(f"{route.method} {route.path}"), route.access, route.summary, _body(route.takes), gives


def _body(kind: Any) -> str:  # noqa: ANN401 - a record, a media type, or nothing
    if isinstance(kind, type):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    return {"object": "JSON", None: ""}.get(kind, code(kind))


def _bodies() -> Iterator[str]:
    kinds = {kind for route in ROUTES for kind in (route.takes, route.gives) if isinstance(kind, type)}
    _, schemas = msgspec.json.schema_components(sorted(kinds, key=str), ref_template="{name}")
    for name, schema in sorted(schemas.items()):
        required = schema.get("required", [])
        rows = [
            (code(field if field in required else f"{field}?"), _type(form))
            for field, form in schema.get("properties", {}).items()
        ]
        sentence = _markup(schema.get("description", ""))
        yield "\n\n".join(filter(None, (f"### {name}", sentence, table(("field", "type"), rows) if rows else "")))


def _type(form: dict[str, Any]) -> str:
    """Return a JSON schema in a few words."""
    if "$ref" in form:
        return f"[{form['$ref']}](#{form['$ref'].lower()})"
    if "anyOf" in form:
        return " or ".join(map(_type, form["anyOf"]))
    if "enum" in form:
        return ", ".join(code(value) for value in form["enum"])
    kind = str(form.get("type", "anything"))
    if kind == "array":
        return f"list of {_type(form.get('items') or {})}"
    if kind == "object" and isinstance(form.get("additionalProperties"), dict):
        return f"object of {_type(form['additionalProperties'])}"
    limits = [f"{words} {form[key]}" for key, words in (("minimum", "from"), ("maximum", "to")) if key in form]
    return " ".join([{"string": "text"}.get(kind, kind), *limits])


# -- hooks -------------------------------------------------------------------------------------------------------------


def hooks() -> str:
    """The hooks with their exact signatures, and what they return."""
    parts = [
        "# Hooks",
        (
            f"This is version {hookspecs.HOOK_VERSION} of the hooks. A hook may gain an argument; it never loses one. "
            "An implementation names the arguments it wants. `config` is the plugin's own table `[plugins.NAME]`, NAME "
            "being its entry point."
        ),
    ]
    for group, name in hookspecs.GROUPS.items():
        hook = getattr(hookspecs, name)
        parts += [
            f"## `{name}`",
            f"Entry-point group `{group}`.",
            f"```text\n{_signature(hook)}\n```",
            _markup(inspect.getdoc(hook) or ""),
        ]
    parts += ["# What hooks return and are given", "All of it is imported from `rma_core`."]
    for kind in (
        hardware.Detection, hardware.Device, hardware.ContainerAccess, hardware.HardwareReport, hardware.Capabilities,
        interfaces.ContainerRuntime, interfaces.ContainerSpec, interfaces.ContainerHandle, interfaces.ContainerState,
        interfaces.ContainerStats, interfaces.RuntimeHealth, interfaces.PullProgress, interfaces.GivenFiles,
        interfaces.GivenFile, catalog.Limits, catalog.ProcessForm,
        interfaces.TierPolicy, interfaces.PolicyInput, interfaces.TierDecision,
    ):  # fmt: skip
        parts += [f"## `{kind.__name__}`", _markup(inspect.getdoc(kind) or ""), _members(kind)]
    helpers = [getattr(sysfs, name) for name in sysfs.__all__ if inspect.isfunction(getattr(sysfs, name))]
    parts += [
        "# What detectors read with",
        f"`from rma_core import sysfs`. {_paragraphs(inspect.getdoc(sysfs) or '').replace('``', '`')}",
        "\n".join(f"- `{_signature(helper)}`: {_first(helper)}" for helper in helpers),
        f"## `{sysfs.PciDevice.__name__}`",
        _markup(inspect.getdoc(sysfs.PciDevice) or ""),
        _members(sysfs.PciDevice),
    ]
    return "\n\n".join(filter(None, parts))


def _signature(function: Any) -> str:  # noqa: ANN401 - a function
    words = "async def" if inspect.iscoroutinefunction(function) else "def"
    # Annotations are text in these modules, which inspect shows in quotes.
    shown_as = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(function)))
    return f"{words} {function.__name__}{shown_as}"


def _markup(docstring: str) -> str:
    return _paragraphs(docstring.replace("``", "`"))


def _members(kind: type) -> str:
    """Return the fields of a record, and the methods that people call or write."""
    if issubclass(kind, msgspec.Struct):
        annotations = kind.__annotations__
        rows = [(code(f.name), code(annotations.get(f.name, "")), _given(f)) for f in msgspec.structs.fields(kind)]
        fields = table(("field", "type", "default"), rows)
    else:
        forms = vars(kind).get("__annotations__", {}).items()
        # A named tuple keeps its annotations as references to what they name.
        fields = "\n".join(f"- `{name}: {getattr(form, '__forward_arg__', form)}`" for name, form in forms)
    methods = "\n".join(f"- {line}" for name in vars(kind) if not name.startswith("_") if (line := _method(kind, name)))
    return "\n\n".join(filter(None, (fields, methods)))


def _given(field: msgspec.structs.FieldInfo) -> str:
    if field.default is not msgspec.NODEFAULT:
        return code(repr(field.default))
    return "empty" if field.default_factory is not msgspec.NODEFAULT else "required"


def _method(kind: type, name: str) -> str:
    member = inspect.getattr_static(kind, name)
    if isinstance(member, property):
        return f"`{name}`: {_first(member.fget)}"
    function = member.__func__ if isinstance(member, classmethod) else member
    return f"`{_signature(function)}`: {_first(function)}" if inspect.isfunction(function) else ""


def _first(documented: object) -> str:
    """Return a docstring as one paragraph."""
    return " ".join(_markup(inspect.getdoc(documented) or "").split())


# -- errors ------------------------------------------------------------------------------------------------------------


def failures() -> str:
    """Exit codes, problem documents, and the tree of expected failures."""
    tree = list(_tree(errors.RMAError))
    exits: dict[int, list[str]] = {0: ["done"], 1: ["failed"], 130: ["stopped with Ctrl-C"]}
    for kind in tree:
        if kind.exit_code > 1:
            exits.setdefault(kind.exit_code, []).append(_first(kind).rstrip("."))
    parts = [
        "# Errors",
        "## Exit codes of `rma`",
        table(("exit code", "means"), [(number, "; ".join(words)) for number, words in sorted(exits.items())]),
        "## Expected failures",
        "With `--json` the code stands in `error.code`. Plugins import what they raise from `rma_core`.",
        table(
            ("exception", "code", "exit", "HTTP", "means"),
            [(code(k.__name__), code(k.code), k.exit_code, _status(k), _first(k)) for k in tree],
        ),
        "## Problem documents of the coordinator",
        (
            "`application/problem+json` (RFC 9457): `type` (`urn:rma:problem:` and the code), `title`, `status`, "
            "`detail` (the sentence), `code`, and where there is something to say `hints` (what to do) and `errors` "
            "(where and what, for data that does not fit). `Retry-After` stands beside 429 and 503 where a time is "
            "known. Each status has its own codes, besides those above:"
        ),
        table(
            ("status", "title", "code"),
            [(status, STATUS_WORDS[status][0], ", ".join(map(code, codes))) for status, codes in _codes().items()],
        ),
    ]
    return "\n\n".join(parts)


def _tree(kind: type[errors.RMAError]) -> Iterator[type[errors.RMAError]]:
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from _tree(below)


def _status(kind: type[errors.RMAError]) -> str:
    return next((str(status) for known, status in STATUSES if issubclass(kind, known)), "")


def _codes() -> dict[int, list[str]]:
    """Return the codes that each HTTP status has: its usual one, and those named where a problem is raised."""
    codes = {status: [usual] for status, (_, usual) in STATUS_WORDS.items()}
    for path in sorted(Path(rma_coordinator.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in PROBLEMS:
                status = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
                for word in (
                    k.value.value for k in node.keywords if k.arg == "code" and isinstance(k.value, ast.Constant)
                ):
                    if isinstance(status, int) and word not in codes[status]:
                        codes[status].append(str(word))
    return codes


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=re.sub(r"\s+", " ", __doc__ or ""))
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    check = parser.parse_args().check
    HERE.mkdir(exist_ok=True)
    stale = [name for name, text in pages().items() if not _same(HERE / name, text)]
    for name in stale:
        if not check:
            (HERE / name).write_text(pages()[name], encoding="utf-8")
        print(f"docs/reference/{name}: {'is not what the code says: run `make docs`' if check else 'written'}")
    return 1 if check and stale else 0


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
