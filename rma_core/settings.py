"""Settings: one flat table per program, each setting with a type, a default and a sentence.

Precedence: flag, environment (``RMA_`` + the name in capitals), TOML file, default. The file is ``rma.toml`` in the
state folder unless ``RMA_CONFIG`` names another; a plugin's own table stands there under ``[plugins.NAME]``. The
reference in docs/ is generated from the records that use this module.
"""

from __future__ import annotations

import difflib
import os
import tomllib
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar

import msgspec
from msgspec import Meta

from rma_core.errors import Problem, SettingProblem, ValidationProblem
from rma_core.models.strict import convert
from rma_core.plugin_folders import PluginFolders

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

S = TypeVar("S", bound="Settings")

#: Environment names that other tools made usual, honoured after our own.
ALIASES = {"coordinator_url": "COORDINATOR_URL"}
#: The settings file inside the state folder.
FILE_NAME = "rma.toml"
#: Names another settings file.
FILE_VARIABLE = "RMA_CONFIG"


def default_home() -> str:
    """Return the state folder used when nobody names one: ``~/.rma``."""
    return str(Path.home() / ".rma")


class PluginRules(TypedDict):
    """What the owner's settings say of plugins."""

    blocked: frozenset[str]
    only: frozenset[str] | None
    approved: frozenset[str]
    approval_required: bool
    strict: bool
    trace: bool
    files: str
    own: PluginFolders
    hidden: tuple[str, ...]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What every RMA program can be told."""

    home: Annotated[str, Meta(description="State folder; only its owner can read it.")] = msgspec.field(
        default_factory=default_home
    )
    log_level: Annotated[
        str, Meta(pattern="^(debug|info|warning|error)$", description="Least urgent log line that is shown.")
    ] = "info"
    log_json: Annotated[bool, Meta(description="Log one JSON object a line, for programs.")] = False
    block_plugins: Annotated[list[str], Meta(description="Plugins (by name) that are never imported.")] = []
    only_plugins: Annotated[list[str], Meta(description="When given, the only plugins that are imported.")] = []
    approve_plugins: Annotated[list[str], Meta(description="Plugins that may run; `*` means all (development).")] = (
        msgspec.field(default_factory=lambda: ["*"])
    )
    plugin_folder: Annotated[
        str, Meta(description="Where `rma plugins install` puts plugins; empty means `plugins` in the state folder.")
    ] = ""
    trace_hooks: Annotated[bool, Meta(description="Log each hook call with its plugin, result and time.")] = False
    strict_plugins: Annotated[bool, Meta(description="A broken plugin ends the program instead of being skipped.")] = (
        False
    )
    plugins: Annotated[dict[str, dict[str, Any]], Meta(description="One table per plugin, `[plugins.NAME]`.")] = {}

    def plugin_rules(self) -> PluginRules:
        """Return which plugins may run and how, as `Plugins.discover` takes it."""
        # The agent of `rma up` has a folder inside the coordinator's, which has keys of its own.
        state = self.home_path.parent if self.home_path.name == "agent" else self.home_path
        return {
            "blocked": frozenset(self.block_plugins),
            "only": frozenset(self.only_plugins) or None,
            "approved": frozenset(self.approve_plugins),
            "approval_required": True,
            "strict": self.strict_plugins,
            "trace": self.trace_hooks,
            "files": "",
            "own": self.plugin_folders,
            "hidden": (str(state), str(self.plugin_folders.path)),
        }

    @property
    def plugin_folders(self) -> PluginFolders:
        """The plugins that `rma plugins install` has put here."""
        return PluginFolders(
            Path(self.plugin_folder).expanduser() if self.plugin_folder else self.home_path / "plugins"
        )

    @property
    def home_path(self) -> Path:
        """The state folder, with ``~`` resolved."""
        return Path(self.home).expanduser()


class SettingInfo(NamedTuple):
    """One setting as the reference and ``--help`` show it."""

    name: str
    kind: str
    default: object
    sentence: str
    environment: str


def describe(kind: type[Settings]) -> tuple[SettingInfo, ...]:
    """Return every setting of a record, in the order it is written."""
    hints = typing.get_type_hints(kind, include_extras=True)
    infos = []
    for field in msgspec.structs.fields(kind):
        bare, meta = typing.get_args(hints[field.name])[:2]
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        name = getattr(bare, "__name__", str(bare)) if not typing.get_args(bare) else str(bare)
        infos.append(SettingInfo(field.name, name, default, meta.description, f"RMA_{field.name.upper()}"))
    return tuple(infos)


def load_settings(
    kind: type[S],
    *,
    flags: Mapping[str, object],
    environment: Mapping[str, str] | None = None,
    file: Path | None = None,
    known: Iterable[type[Settings]] = (),
) -> S:
    """Return the settings of ``kind`` from flags (``None`` means not given), environment, file and defaults.

    ``known`` are other records that share the file, so that their settings are not called unknown.
    Raises SettingProblem, which names the source of every wrong value.
    """
    environment = os.environ if environment is None else environment
    names = [info.name for info in describe(kind)]
    given: dict[str, object] = {}
    sources: dict[str, str] = {}
    home = str(flags.get("home") or environment.get("RMA_HOME") or default_home())
    path = file or Path(environment.get(FILE_VARIABLE) or Path(home) / FILE_NAME).expanduser()
    for name, value in _read(path, {*names, *(i.name for k in known for i in describe(k))}).items():
        if name in names:
            given[name], sources[name] = value, f"{name} in {path}"
    for name in names:
        variable = f"RMA_{name.upper()}"
        for key in (ALIASES.get(name, ""), variable):
            if environment.get(key):
                given[name], sources[name] = environment[key], key
    for name, value in flags.items():
        if value is not None and name in names:
            given[name], sources[name] = value, f"--{name.replace('_', '-')}"
    try:
        return convert(_plain(given, kind), kind, subject="settings")
    except ValidationProblem as error:
        words = [f"{sources.get(_name(p), _name(p))}: {p.what}" for p in error.problems]
        raise SettingProblem("; ".join(words), hints=("`rma --help` lists every option",)) from None


def _name(problem: Problem) -> str:
    return problem.where.removeprefix("$.").partition("[")[0].partition(".")[0]


def _read(path: Path, known: set[str]) -> dict[str, object]:
    """Return the file's table; an absent file is an empty one."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        message = f"{path}: {error}"
        raise SettingProblem(message) from None
    for name in table:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            message = f"{path}: there is no setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            raise SettingProblem(message)
    return table


def _plain(given: Mapping[str, object], kind: type[Settings]) -> dict[str, object]:
    """Return values as the record's types want them: environment text becomes lists, numbers and yes or no."""
    hints = typing.get_type_hints(kind)
    return {name: _typed(value, hints[name]) for name, value in given.items()}


def _typed(value: object, kind: Any) -> object:  # noqa: ANN401 - any annotation
    if isinstance(value, tuple):
        value = list(value)
    if not isinstance(value, str) or kind is str:
        return value
    if typing.get_origin(kind) is list:
        return [part.strip() for part in value.split(",") if part.strip()]
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError:
        return value


class AgentSettings(Settings, frozen=True, kw_only=True):
    """What the agent can be told."""

    coordinator_url: Annotated[str, Meta(description="Address of the coordinator.")] = ""
    join_token: Annotated[str, Meta(description="Join token for an unattended first start.")] = ""
    insecure_http: Annotated[bool, Meta(description="Speak plain http to a coordinator that is not this machine.")] = (
        False
    )
    runtimes: Annotated[
        list[str], Meta(description="Runtimes in the order they are tried; `process` only where you accept it.")
    ] = msgspec.field(default_factory=lambda: ["docker", "podman"])
    services: Annotated[
        list[str], Meta(description="Services this machine may run; empty means what was agreed to.")
    ] = []
    service_sources: Annotated[
        list[str], Meta(description="Folders with the services' distributions, for the process runtime.")
    ] = []
    labels: Annotated[dict[str, str], Meta(description="Words about this machine for the pool's policies.")] = {}
    detectors: Annotated[
        str, Meta(description="Folder of executables that print, and JSON files that say, what hardware there is.")
    ] = ""
    fake_devices: Annotated[str, Meta(description="A recording that takes the place of detection.")] = ""
    detect_deadline_s: Annotated[float, Meta(gt=0, le=600, description="Seconds each detector may take.")] = 10.0
    detect_interval_s: Annotated[
        float, Meta(ge=0, le=86_400, description="Seconds between two looks at the hardware; 0: only when asked.")
    ] = 900.0
    exclude_devices: Annotated[
        list[str], Meta(description="Devices that are not the pool's, by id; `*` stands for any characters (`gpu:*`).")
    ] = []
    drain_s: Annotated[float, Meta(ge=0, le=3600, description="Seconds to finish running tasks when stopped.")] = 30.0
    attach: Annotated[
        list[str], Meta(description="Model servers that already run on this machine and are shared, by URL.")
    ] = []
    find_model_servers: Annotated[
        bool, Meta(description="Look at the usual ports of this machine for model servers that could be attached.")
    ] = True
    models: Annotated[
        list[str], Meta(description="Models on this machine that are shared: folders, or `NAME=FILE.gguf`.")
    ] = []
    model_hosts: Annotated[
        list[str], Meta(description="Hosts that models are downloaded from; empty means any public one.")
    ] = []
    model_idle_s: Annotated[
        float, Meta(ge=0, description="Seconds without a request after which a model leaves memory; 0: never.")
    ] = 900.0

    def plugin_rules(self) -> PluginRules:
        """Return which plugins may run and how; an agent has detectors that are files, too."""
        rules = super().plugin_rules()
        rules["files"] = str(Path(self.detectors).expanduser()) if self.detectors else ""
        return rules


class CoordinatorSettings(Settings, frozen=True, kw_only=True):
    """What the coordinator can be told."""

    host: Annotated[str, Meta(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535, description="Port to listen on; 0 takes a free one.")] = 8080
    tls_cert: Annotated[str, Meta(description="Certificate file (PEM); with it the coordinator speaks https.")] = ""
    tls_key: Annotated[str, Meta(description="Private key file (PEM) of the certificate.")] = ""
    server: Annotated[
        Literal["hypercorn", "uvicorn"],
        Meta(description="What serves HTTP: `uvicorn` for large pools (`pip install 'rma-coordinator[uvicorn]'`)."),
    ] = "hypercorn"
    public_url: Annotated[str, Meta(description="Address by which others reach the coordinator.")] = ""
    store: Annotated[
        str, Meta(description="Where state is kept: `sqlite` (in the state folder), `sqlite:PATH` or `memory`.")
    ] = "sqlite"
    tier_policy: Annotated[str, Meta(description="Name of the active tier policy.")] = "threshold"
    catalog: Annotated[str, Meta(description="Folder of catalog entries; empty means those that came along.")] = ""
    model_catalog: Annotated[
        str, Meta(description="Folder of model entries; empty means `models` in the catalog's folder.")
    ] = ""
    image_registry: Annotated[str, Meta(description="Takes the place of `ghcr.io/rma` in the catalog's images.")] = ""
    heartbeat_interval_s: Annotated[float, Meta(gt=0, le=3600, description="Least seconds between heartbeats.")] = 30.0
    heartbeats_per_s: Annotated[float, Meta(gt=0, description="Heartbeats a second the coordinator will take.")] = 500.0
    trusted_proxies: Annotated[list[str], Meta(description="Networks whose forwarding headers are believed.")] = []
    cors_origins: Annotated[
        list[str], Meta(description="Origins whose pages may call /v1 from a browser, with a key; `*`: any.")
    ] = []
    max_body_bytes: Annotated[int, Meta(ge=1024, description="Largest request body that is taken.")] = 64 * 1024 * 1024
    memory_body_bytes: Annotated[int, Meta(ge=0, description="Request bodies above this wait on disk.")] = 256 * 1024
    memory_bodies_bytes: Annotated[int, Meta(ge=0, description="Bytes that all bodies together keep in memory.")] = (
        32 * 1024 * 1024
    )
    spool_bytes: Annotated[int, Meta(ge=0, description="Bytes that bodies and kept answers take on disk at most.")] = (
        10 * 1024 * 1024 * 1024
    )
    max_queued_tasks: Annotated[int, Meta(ge=1, description="Tasks that may wait; one more is refused with 429.")] = (
        1000
    )
    max_connections: Annotated[int, Meta(ge=16, description="Open connections at most.")] = 12_000
    max_channels: Annotated[
        int, Meta(ge=1, description="Workers that keep a channel open; others heartbeat, and are called back.")
    ] = 2_000
    lease_s: Annotated[
        float,
        Meta(ge=25, le=3600, description="Seconds without a sign of life after which a task goes to another worker."),
    ] = 60.0
    task_timeout_s: Annotated[float, Meta(gt=0, le=86_400, description="Seconds a request may take in all.")] = 600.0
    async_timeout_s: Annotated[
        float, Meta(gt=0, le=604_800, description="Seconds an asynchronous task may take, its wait included.")
    ] = 86_400.0
    result_ttl_s: Annotated[
        float, Meta(gt=0, le=31_536_000, description="Seconds for which the answers of asynchronous tasks are kept.")
    ] = 86_400.0
    max_result_bytes: Annotated[int, Meta(ge=1024, description="Largest answer of an asynchronous task.")] = (
        256 * 1024 * 1024
    )
    bytes_per_month: Annotated[
        int,
        Meta(ge=0, description="Bytes of requests and answers that may leave it a month (UTC); 0 is any number."),
    ] = 0
    worker_bytes_per_month: Annotated[
        int, Meta(ge=0, description="Bytes of requests to and answers of one worker a month; 0 is any number.")
    ] = 0
    webhook_networks: Annotated[
        list[str], Meta(description="Networks that webhooks may go to although they are not public.")
    ] = []
    webhook_http: Annotated[bool, Meta(description="Webhooks may go over plain http.")] = False
    kept_tasks: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Finished asynchronous tasks that are kept; the oldest go first.")
    ] = 10_000
