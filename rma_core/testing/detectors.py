"""What every detector must do, as async functions that take a `DetectorCase` and assert.

`rma plugins check` runs them, and so does the pytest plugin `rma_core.testing.pytest_plugin`.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from rma_core import changes
from rma_core.detection import MAX_REPORT_BYTES, plausible, run_one
from rma_core.detector_files import PATH
from rma_core.host import DetectorPlugin
from rma_core.models.hardware import Detection
from rma_core.testing import watching
from rma_core.testing.watching import WORDS, PluginCase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rma_core.models.hardware import Device
    from rma_core.testing.watching import Seen

#: Every detector may use this share of the report all share, and of its deadline.
SHARE_OF_REPORT, SHARE_OF_DEADLINE = 0.25, 0.5
#: How long a hung driver is waited for before the detector is stopped.
HUNG_S = 2.0
#: No device has less memory than this; smaller numbers are megabytes that were meant to be bytes.
LEAST_MEMORY_BYTES = 2**20
#: A reason has at least so many words, and at most so many characters: it is a sentence, not a number or a log.
LEAST_WORDS, MOST_CHARACTERS = 2, 500

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_UNIT = re.compile(r".*_(kb|mb|gb|tb|kib|mib|gib|tib)")
_SECRET = re.compile(r"(.*_)?(serial|serial_number|mac|mac_address|hostname|host_name|user|user_name)")


class DetectorCase(PluginCase):
    """One detector to check."""

    kind = "detector"

    async def detection(self) -> Detection:
        """Return what the first run detected. Raises NotReached where it gave no answer."""
        return detection_of(await self.used())


#: One check: it returns when the detector does right, raises AssertionError with a sentence when not, and NotReached
#: when that cannot be told here.
Check = Callable[[DetectorCase], Awaitable[None]]


def detection_of(seen: Seen) -> Detection:
    """Return what a run detected; a detector that declined has found something unhealthy."""
    return seen.detection or Detection.unhealthy(seen.reason)


async def its_answer_is_consistent(case: DetectorCase) -> None:
    """No device comes twice, none beside `undetected`, and `healthy` has at least one."""
    found = await case.detection()
    assert found.state != "healthy" or found.devices, (
        "it is healthy and names no device: return Detection.undetected(reason) when there is nothing to find"
    )
    meant = plausible(found)
    assert (meant.state, meant.devices) == (found.state, found.devices), meant.reason


async def its_reasons_are_for_people(case: DetectorCase) -> None:
    """Whatever is not healthy has a reason, a sentence that its owner can act on."""
    found = await case.detection()
    _check_reason("its answer", found.state, found.reason)
    for device in found.devices:
        _check_reason(device.id, device.health, device.reason)


def _check_reason(what: str, state: str, reason: str) -> None:
    assert state == "healthy" or reason, f"{what} is {state} without a reason"
    # Some languages need no spaces.
    assert not reason or len(reason.split()) >= LEAST_WORDS or not reason.isascii(), (
        f"the reason of {what} is {reason!r}: write a sentence that its owner can act on"
    )
    assert len(reason) <= MOST_CHARACTERS, (
        f"the reason of {what} has {len(reason)} characters: at most {MOST_CHARACTERS}"
    )


async def its_devices_have_names_and_units(case: DetectorCase) -> None:
    """Ids begin with the kind, sizes are bytes, attributes are lower-case names, and nothing is secret."""
    found = await case.detection()
    problems = [problem for device in found.devices for problem in _flaws(device)]
    assert not problems, "; ".join(problems[:3])


def _flaws(device: Device) -> Iterator[str]:
    if device.id != device.kind and not device.id.startswith(f"{device.kind}:"):
        yield f"the id {device.id!r} must be {device.kind!r}, or begin with '{device.kind}:'"
    if any(not character.isprintable() for character in device.id + device.name + device.vendor):
        yield f"{device.id!r} has characters that cannot be shown"
    if device.memory_bytes is not None and 0 < device.memory_bytes < LEAST_MEMORY_BYTES:
        yield f"{device.id} has {device.memory_bytes} bytes of memory: is that in another unit?"
    for name in device.attributes:
        if not _NAME.fullmatch(name):
            yield f"{device.id}: name the attribute {name!r} in lower case, with digits and _"
        elif _UNIT.fullmatch(name):
            yield f"{device.id}: {name} must be in bytes, and be called {name.rpartition('_')[0]}_bytes"
        elif _SECRET.fullmatch(name):
            yield f"{device.id}: {name} tells who the owner is: leave it out"


async def it_says_the_same_twice(case: DetectorCase) -> None:
    """A second run gives the same answer, but for free room and attributes called available_… or free_…."""
    first, second = await case.detection(), detection_of(await case.run())
    difference = _difference(steady(first), steady(second))
    assert not difference, (
        f"{difference}: report what the machine is, not what it does just now, or call the attribute available_…"
    )


def steady(found: Detection) -> dict[str, Any]:
    """Return a detection without what may change by itself."""
    return {**msgspec.to_builtins(found), "devices": tuple(map(changes.steady, found.devices))}


def _difference(first: Any, second: Any, where: str = "the answer") -> str:  # noqa: ANN401 - JSON
    """Say where two answers first differ, or nothing."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        pairs = [(first[key], second[key], f"{first.get('id') or where}, {key}") for key in first]
    elif isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second):
        pairs = [(one, other, where) for one, other in zip(first, second, strict=True)]
    elif first == second:
        return ""
    else:
        return f"{where} is {_brief(first)}, and then {_brief(second)}"
    return next(filter(None, (_difference(*pair) for pair in pairs)), "")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"  # noqa: PLR2004 - what a line of a table shows


async def its_answer_is_small_and_quick(case: DetectorCase) -> None:
    """All detectors share one report and start together: each uses a part of the room and of the time."""
    seen = await case.used()
    size, most = len(msgspec.json.encode(seen.detection)), int(MAX_REPORT_BYTES * SHARE_OF_REPORT)
    assert size <= most, f"its answer has {size} bytes, and at most {most} are its share"
    limit = case.deadline_s * SHARE_OF_DEADLINE
    assert seen.seconds <= limit, f"it took {seen.seconds:.1f} s of {case.deadline_s:g}: bound what it waits for"


async def it_needs_no_more_than_it_is_given(case: DetectorCase) -> None:
    """Confined as in an agent, it finds the same: it needs no file of the owner's and no network."""
    before = plausible(await case.detection())
    plugin = DetectorPlugin(case.value, case.value, "", "", str(case.config.get(PATH, "")), case.folder)
    now = (await run_one(plugin, case.config, case.deadline_s)).detection
    same = (before.state, len(before.devices)) == (now.state, len(now.devices))
    assert same, (
        f"it is {before.state} with {len(before.devices)} devices, and where it sees no file of its owner's "
        f"{now.state} with {len(now.devices)} ({now.reason}): read hardware below /sys, /proc and /dev, "
        "and what else is needed from paths in its table"
    )


async def it_answers_where_nothing_is(case: DetectorCase) -> None:
    """Without device files, drivers and tools it still answers with a reason, and does not crash."""
    await case.used()
    seen = await case.run("bare")
    assert seen.outcome in watching.ANSWERS, f"where nothing can be opened, {WORDS[seen.outcome]} {seen.reason}"
    found = detection_of(seen)
    assert found.state != "undetected" or found.reason, "where nothing is, it must say how that is known"


async def it_can_be_stopped_while_its_driver_hangs(case: DetectorCase) -> None:
    """When a look at the hardware never comes back, it bounds that itself or is stopped, and costs nothing after."""
    await case.used()
    seen = await case.run("hung", deadline_s=HUNG_S)
    assert seen.outcome in (*watching.ANSWERS, "late"), f"while a driver hangs, {WORDS[seen.outcome]} {seen.reason}"
    await _as_before(case, "was stopped")


async def it_can_be_killed(case: DetectorCase) -> None:
    """Killed while it looks, it leaves nothing behind that changes its next answer."""
    await case.used()
    await case.run("deadly")
    await _as_before(case, "was killed")


async def _as_before(case: DetectorCase, what: str) -> None:
    before, after = await case.detection(), detection_of(await case.run())
    difference = _difference(steady(before), steady(after))
    assert not difference, f"after it {what}, {difference}"


detector_contract: tuple[Check, ...] = (
    watching.its_hook_fits,
    watching.it_answers,
    watching.its_import_is_light,
    watching.it_uses_nothing_deprecated,
    its_answer_is_consistent,
    its_reasons_are_for_people,
    its_devices_have_names_and_units,
    it_says_the_same_twice,
    its_answer_is_small_and_quick,
    watching.it_prints_nothing,
    watching.it_writes_nothing,
    watching.it_uses_no_network,
    watching.it_leaves_nothing_running,
    it_needs_no_more_than_it_is_given,
    it_answers_where_nothing_is,
    it_can_be_stopped_while_its_driver_hangs,
    it_can_be_killed,
)
