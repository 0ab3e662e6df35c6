"""Detection: every detector in a child of its own, all at once, each under its own deadline, a probe report each.

Whatever a detector does (raise, hang, crash, print, lie), it costs its own devices only, and its probe report says what
happened in words its owner can act on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sys
from fnmatch import fnmatchcase
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rma_core import isolation
from rma_core.detector_files import PATH
from rma_core.errors import PluginError, ValidationProblem
from rma_core.host import BUILT_IN, MAX_REASON, State
from rma_core.models.hardware import MAX_DEVICES, Detection, HardwareReport, Name, ProbeReport, summarize
from rma_core.models.strict import decode, encode
from rma_core.platforms import exit_words
from rma_core.privacy import hide_identity

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rma_core.host import DetectorPlugin, Plugins, PluginTables
    from rma_core.isolation import Ended
    from rma_core.models.hardware import Device
    from rma_core.quarantine import Quarantine

logger = logging.getLogger(__name__)

#: A detector answers within this, unless ``deadline_s`` in its own configuration table says otherwise.
DEADLINE_S = 10.0
#: No configuration gives a detector more: detection holds up the start of the agent.
MAX_DEADLINE_S = 300.0
#: Children that run at one time.
AT_ONCE = 16
#: Detectors that are run at all; a hardware report has room for no more.
MAX_DETECTORS = 64
#: One detector's answer, and all devices together, are at most this large: a report travels in one frame of 1 MiB.
MAX_REPORT_BYTES = 512 * 1024
#: So much of what a failed detector printed is quoted in its reason.
QUOTE_CHARACTERS = 400

#: In a detector's table: ``false`` lets it see all that its owner may.
CONFINED = "confined"
#: Variables with folders of drivers' libraries.
PATHS = ("LD_LIBRARY_PATH", "ROCM_PATH", "CUDA_HOME", "CUDA_PATH")

PluginState = Literal["active", "failed", "invalid", "quarantined"]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
#: What a plugin uses that is deprecated, by the words of `rma_core.deprecations`.
Words = Annotated[tuple[Name, ...], Meta(max_length=8)]

#: The program that plugins run in.
CHILD = str(Path(__file__).with_name("child.py"))
_PLACE = re.compile(r'^(?:Current thread|Thread) .*\n  File "(.+)", line (\d+) in (\S+)', re.MULTILINE)


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What one detector saw, or how it failed, in one round; what `rma_core.record` writes down.

    ``crashed`` says that it hung or died, which counts towards quarantine; ``failed`` that it did so, or did anything
    else but answer what a detector may.
    """

    detector: Name
    distribution: Annotated[str, Meta(max_length=200)] = ""
    version: Annotated[str, Meta(max_length=100)] = ""
    detection: Detection
    seconds: Seconds = 0.0
    import_seconds: Seconds | None = None
    plugin_state: PluginState = "active"
    crashed: bool = False
    failed: bool = False
    deprecated: Words = ()


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What `rma_core.child` says; believed no more than the detector in it."""

    outcome: Literal["answered", "failed", "invalid", "declined", "raised", "unusable"]
    reason: Annotated[str, Meta(max_length=2000)] = ""
    import_seconds: Seconds = 0.0
    detection: Detection | None = None
    deprecated: Words = ()


async def detect(
    plugins: Plugins,
    *,
    config: PluginTables | None = None,
    deadline_s: float = DEADLINE_S,
    at_once: int = AT_ONCE,
    quarantine: Quarantine | None = None,
    excluded: Sequence[str] = (),
) -> HardwareReport:
    """Run every detector and return what this machine has, without ``excluded`` devices; see `observe` for the rest."""
    seen = await observe(plugins, config=config, deadline_s=deadline_s, at_once=at_once, quarantine=quarantine)
    return assemble(without(seen, excluded))


async def observe(
    plugins: Plugins,
    *,
    config: PluginTables | None = None,
    deadline_s: float = DEADLINE_S,
    at_once: int = AT_ONCE,
    quarantine: Quarantine | None = None,
) -> tuple[Observation, ...]:
    """Run every detector in a child of its own and return what each saw: built-in ones first, then by name.

    ``config`` is the ``[plugins]`` table; ``deadline_s`` there overrides the argument for that detector. ``quarantine``
    leaves out those that keep failing. The states in ``plugins.reports()`` follow. Raises PluginError only where
    ``plugins.strict`` is set and a detector cannot be imported or does not fit its hook.
    """
    detectors = plugins.detectors()
    if len(detectors) > MAX_DETECTORS:
        names = ", ".join(d.name for d in detectors[MAX_DETECTORS:])
        logger.warning("only the first %d detectors run; left out: %s", MAX_DETECTORS, names)
    places = asyncio.Semaphore(at_once)

    async def one(detector: DetectorPlugin) -> Observation:
        table = (config or {}).get(detector.name, {})
        async with places:
            return hide_identity(await _observe(detector, table, deadline_s, quarantine, plugins.hidden))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(detector)) for detector in detectors[:MAX_DETECTORS]]
    seen = tuple(task.result() for task in tasks)
    for detector, found, claim in zip(detectors, seen, _claims(seen), strict=False):
        _tell(plugins, found, claim, (config or {}).get(detector.name, {}))
    bad = next((o for o in seen if o.plugin_state in ("failed", "invalid")), None)
    if bad and plugins.strict:
        raise PluginError(f"detector {bad.detector} of {bad.distribution}: {bad.detection.reason}")
    return seen


def without(observations: Iterable[Observation], patterns: Sequence[str]) -> tuple[Observation, ...]:
    """Return observations without the devices that their owner keeps back, by id; each detector's reason says which."""
    return tuple(_without(seen, patterns) for seen in observations) if patterns else tuple(observations)


def _without(seen: Observation, patterns: Sequence[str]) -> Observation:
    found = seen.detection
    back = [device.id for device in found.devices if any(fnmatchcase(device.id, pattern) for pattern in patterns)]
    if not back:
        return seen
    words = f"kept back by the owner (exclude_devices): {', '.join(back)}"
    left = tuple(device for device in found.devices if device.id not in back)
    reason = _short("; ".join(filter(None, (found.reason, words))))
    return msgspec.structs.replace(seen, detection=Detection(state=found.state, reason=reason, devices=left))


def assemble(observations: Iterable[Observation]) -> HardwareReport:
    """Return the hardware report of what detectors saw; the same observations always give the same report.

    The first of two devices with one id is kept, and what does not fit into a report is left out; the probe of the
    detector that came second says so.
    """
    kept: dict[str, tuple[str, Device]] = {}
    probes, room = [], MAX_REPORT_BYTES
    for seen in observations:
        own, notes = [], []
        for device in seen.detection.devices:
            size = len(encode(device))
            if device.id in kept:
                notes.append(f"device {device.id!r} was already found by {kept[device.id][0]}, which is kept")
            elif size > room or len(kept) >= MAX_DEVICES:
                notes.append(f"device {device.id!r} left out: the report is full")
            else:
                kept[device.id] = (seen.detector, device)
                own.append(device.id)
                room -= size
        probes.append(_probe(seen, own, notes))
    devices = tuple(device for _, device in kept.values())
    return HardwareReport(capabilities=summarize(devices), devices=devices, probes=tuple(probes))


def _probe(seen: Observation, own: Sequence[str], notes: Sequence[str]) -> ProbeReport:
    return ProbeReport(
        detector=seen.detector,
        distribution=seen.distribution,
        version=seen.version,
        state=seen.detection.state,
        reason=_short("; ".join(filter(None, (seen.detection.reason, *notes)))),
        seconds=seen.seconds,
        import_seconds=seen.import_seconds or 0.0,
        devices=tuple(own),
    )


def _claims(observations: Iterable[Observation]) -> Iterator[str]:
    """Say of each which device it gives that another has found before it; an empty string for none."""
    found_by: dict[str, str] = {}
    for seen in observations:
        ids = [device.id for device in seen.detection.devices]
        taken = next((one for one in ids if found_by.get(one, seen.detector) != seen.detector), "")
        found_by.update((one, seen.detector) for one in ids if one not in found_by)
        yield f"device {taken!r} was already found by {found_by[taken]}, which is kept" if taken else ""


def _tell(plugins: Plugins, seen: Observation, claim: str, table: Mapping[str, object]) -> None:
    """Let the host know how it went: it keeps the plugin's state, and logs the call when asked to."""
    reason = seen.detection.reason
    if seen.plugin_state == "active":
        # The plugin itself works; that it found something broken, or broke, is still what its owner looks for here.
        reason = f"unhealthy: {reason}" if seen.detection.state == "unhealthy" else ""
    reason = "; ".join(filter(None, (reason, claim)))
    state: State = seen.plugin_state
    plugins.note(
        "detector",
        seen.detector,
        state=state,
        reason=reason,
        import_seconds=seen.import_seconds,
        failed=seen.failed or bool(claim),
        deprecated=seen.deprecated,
    )
    result = f"{seen.detection.state}, {len(seen.detection.devices)} devices"
    plugins.log_call(seen.detector, "detector", table, result=result, seconds=seen.seconds)


async def _observe(
    detector: DetectorPlugin,
    table: Mapping[str, object],
    deadline_s: float,
    quarantine: Quarantine | None,
    hidden: Sequence[str],
) -> Observation:
    held = quarantine.reason(detector.name) if quarantine else ""
    if held:
        return _failure(detector, f"left alone: it {held}", plugin_state="quarantined")
    given, words = deadline_of(detector.name, table, deadline_s)
    if not isinstance(table.get(CONFINED, True), bool):
        words = f"{CONFINED} in [plugins.{detector.name}] is {table[CONFINED]!r}: give true or false"
    if words:
        return _failure(detector, words)
    seen = await run_one(detector, table, given, hidden)
    if quarantine and seen.crashed:
        quarantine.failed(detector.name, seen.detection.reason)
    elif quarantine:
        quarantine.passed(detector.name)
    return seen


def deadline_of(
    name: str, table: Mapping[str, object], deadline_s: float, *, most_s: float = MAX_DEADLINE_S
) -> tuple[float, str]:
    """Return how long a plugin may take: as its own table says, else ``deadline_s``; and what is wrong with that."""
    given = table.get("deadline_s", deadline_s)
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given <= most_s:
        return deadline_s, f"deadline_s in [plugins.{name}] is {given!r}: give seconds, up to {most_s:.0f}"
    return float(given), ""


async def run_one(
    detector: DetectorPlugin, table: Mapping[str, object], deadline_s: float, hidden: Sequence[str] = ()
) -> Observation:
    """Run a detector once, confined; ``hidden`` folders are kept from it whatever holds them."""
    given = {**table, PATH: detector.path} if detector.path else table
    # What is built in is RMA itself; it reads in engines' settings where they keep their data.
    built_in = detector.distribution == BUILT_IN
    beside = str(Path(detector.path).parent) if detector.path else ""
    try:
        async with isolation.Scratch.made() as scratch:
            where = (detector.folder, beside, *mapped(detector.value))
            more = {} if built_in else bounds(given, *where, writes=scratch.path, hidden=hidden)
            running = asyncio.ensure_future(
                isolation.run(
                    child_of(detector.folder),
                    request=request_for(detector.value, given, deadline_s, own=detector.folder, more=more),
                    deadline_s=deadline_s,
                    max_answer_bytes=MAX_REPORT_BYTES,
                    environment=dict.fromkeys(("TMPDIR", "TEMP", "TMP"), scratch.path),
                )
            )
            ended = await _unless_full(running, scratch)
    except OSError as error:
        return _failure(detector, f"no child process can be started for it: {error}")
    if ended is None:
        most = f"{isolation.MOST_SCRATCH_BYTES // 2**20} MiB or {isolation.MOST_SCRATCH_FILES} files"
        words = f"put more than {most} into its temporary folder and was stopped"
        return _failure(detector, words, crashed=True, failed=True)
    if ended.output:
        logger.debug("detector %s printed, at the end: %s", detector.name, ended.output)
    if ended.answer is None:
        return _failure(detector, died(ended, deadline_s), seconds=ended.seconds, crashed=True, failed=True)
    try:
        answer = decode(ended.answer, Answer, subject="its answer does not fit")
    except ValidationProblem as error:
        return _failure(detector, f"{error} (a bug in the plugin)", seconds=ended.seconds, failed=True)
    return _answered(detector, answer, ended.seconds)


async def _unless_full(running: asyncio.Future[Ended], scratch: isolation.Scratch) -> Ended | None:
    """Wait for a child; ``None`` when it was ended because its temporary folder was full."""
    full = asyncio.ensure_future(scratch.full())
    either: set[asyncio.Future[Any]] = {running, full}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return await running if running.done() else None
    finally:
        full.cancel()
        running.cancel()
        await asyncio.gather(full, running, return_exceptions=True)


def bounds(table: Mapping[str, object], *folders: str, writes: str, hidden: Sequence[str] = ()) -> dict[str, object]:
    """Return what a detector's child may read (Python, ``folders``, what its owner names in its table) and write."""
    if not table.get(CONFINED, True):
        return {}
    python = [*_path(), sys.prefix, sys.base_prefix, sys.exec_prefix, str(Path(__file__).parent)]
    libraries = [part for name in PATHS for part in os.environ.get(name, "").split(os.pathsep)]
    reads = dict.fromkeys((*python, *libraries, *folders, *_paths_in(table)))
    kept = [str(Path(folder).absolute()) for folder in [*hidden, os.path.expanduser("~")]]  # noqa: PTH111 - who has no home is no error
    paths = {"reads": reads, "writes": [writes], "hidden": kept}
    # A path may be no text; `child` takes this back.
    return {"bounds": {name: [os.fsencode(path).decode("latin-1") for path in found] for name, found in paths.items()}}


def mapped(value: str) -> list[str]:
    """Return where what an entry point names lies beside the path, as `pip install -e` may leave it (PEP 660).

    What the path does not lead to, finders know that were set up when Python started. Nothing is imported.
    """
    name, found = value.partition(":")[0].partition(".")[0].strip(), list[str]()
    for finder in sys.meta_path:
        if finder in (BuiltinImporter, FrozenImporter, PathFinder):
            continue
        with contextlib.suppress(Exception):
            spec = finder.find_spec(name, None, None)
            if spec is not None:
                found += spec.submodule_search_locations or []
                found += [spec.origin] if spec.has_location and spec.origin else []
    return found


def _paths_in(value: object) -> Iterator[str]:
    """Give all texts of a plugin's table that are absolute paths."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _paths_in(inner)


def child_of(own: str) -> list[str]:
    """Return a child's program; no package's start-up code runs in it beside a plugin in a folder of its own.

    Nor does any where none ran in this process.
    """
    bare = ["-S"] if own or sys.flags.no_site else []
    return [sys.executable, "-I", *bare, *(["-B"] if own else []), "-X", "utf8", CHILD]


def request_for(
    value: str,
    table: Mapping[str, object],
    deadline_s: float,
    *,
    folder: str = "",
    own: str = "",
    more: Mapping[str, object] | None = None,
) -> bytes:
    """Return what a child is asked; it looks for modules where this process does, but never in its own folder.

    A ``folder`` comes where an installed plugin would be: after Python's own modules. What a plugin has of its ``own``
    comes after all, so that nothing there takes the place of anything of ours.
    """
    path = [os.fsencode(os.path.abspath(entry)) for entry in _path()]  # noqa: PTH100 - strings, not files
    if folder:
        site = (index for index, entry in enumerate(path) if entry.endswith((b"site-packages", b"dist-packages")))
        path.insert(next(site, len(path)), os.fsencode(folder))
    path += [os.fsencode(own)] if own and os.fsencode(own) not in path else []
    request = {"value": value, "config": dict(table), "deadline_s": deadline_s, **(more or {})}
    asked = msgspec.json.encode(request, enc_hook=str)
    return b"\0".join(path) + b"\n" + asked


def _path() -> list[str]:
    """Return where this process looks for modules, but for the folder in which it was started (`python -m`)."""
    try:
        # With `-P` that folder was not put there: where it is first all the same, somebody named it (PYTHONPATH).
        here = "" if sys.flags.safe_path else os.getcwd()  # noqa: PTH109 - a string
    except OSError:
        here = ""
    return [entry for entry in sys.path[sys.path[:1] == [here] :] if entry]


def _answered(detector: DetectorPlugin, answer: Answer, seconds: float) -> Observation:
    """Turn what the child says into an observation."""
    words = {
        "failed": f"cannot be imported: {answer.reason}",
        "raised": f"raised {answer.reason} (a bug in the plugin)",
        "unusable": f"its answer cannot be used: {answer.reason}",
    }
    if answer.outcome == "answered" and answer.detection is not None:
        detection = plausible(answer.detection)
        seen = _failure(detector, "", seconds=seconds, import_seconds=answer.import_seconds)
        failed = detection != answer.detection
        return msgspec.structs.replace(seen, detection=detection, failed=failed, deprecated=answer.deprecated)
    seen = _failure(
        detector,
        words.get(answer.outcome, answer.reason),
        seconds=seconds,
        import_seconds=answer.import_seconds,
        plugin_state=answer.outcome if answer.outcome in ("failed", "invalid") else "active",
        # To decline is an answer too.
        failed=answer.outcome != "declined",
    )
    return msgspec.structs.replace(seen, deprecated=answer.deprecated)


def _failure(
    detector: DetectorPlugin,
    reason: str,
    *,
    seconds: float = 0.0,
    import_seconds: float | None = None,
    plugin_state: PluginState = "active",
    crashed: bool = False,
    failed: bool = False,
) -> Observation:
    return Observation(
        detector=detector.name[:200],
        distribution=detector.distribution[:200],
        version=detector.version[:100],
        detection=Detection.unhealthy(_short(reason)),
        seconds=seconds,
        import_seconds=import_seconds,
        plugin_state=plugin_state,
        crashed=crashed,
        failed=failed,
    )


def plausible(detection: Detection) -> Detection:
    """Return a detection without contradictions: each id once, a reason beside every state but healthy."""
    state, reason, devices = detection.state, detection.reason, detection.devices
    if state == "undetected" and devices:
        return Detection.unhealthy(f"says that nothing is there and names {len(devices)} devices: a bug in the plugin")
    unique = {device.id: device for device in reversed(devices)}
    if len(unique) < len(devices):
        twice = sorted({d.id for d in devices if d is not unique[d.id]})
        words = f"gives the device id {twice[0]!r} more than once and only the first counts: a bug in the plugin"
        state, reason = "unhealthy", "; ".join(filter(None, (reason, words)))
        devices = tuple(d for d in devices if d is unique[d.id])
    if state != "healthy" and not reason:
        reason = "the detector gives no reason"
    return Detection(state=state, reason=reason, devices=devices)


def died(ended: Ended, deadline_s: float, *, most_bytes: int = MAX_REPORT_BYTES) -> str:
    """Say what became of a child that gave no answer, and quote its last words."""
    printed, _, dump = ended.output.partition("Timeout (0:")
    if ended.too_long:
        return f"gave an answer of more than {most_bytes // 1024} KiB: a bug in the plugin"
    if ended.too_late:
        places = _PLACE.findall(dump)
        where = f"; it was in {places[-1][2]} ({Path(places[-1][0]).name}:{places[-1][1]})" if places else ""
        words = f"did not answer within {deadline_s:g} s and was stopped{where}"
    elif ended.code is None:
        words = "closed the pipe for its answer and went on: a bug in the plugin"
    else:
        words = f"{exit_words(ended.code)} before it answered"
        words += ", most likely because memory ran out" if words.startswith("was killed by SIGKILL") else ""
    quote = " ".join(printed.split())[-QUOTE_CHARACTERS:]
    return f"{words}; it printed: {quote}" if quote else words


def _short(reason: str) -> str:
    return reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}…"
