"""Runs a plugin for its conformance: in a child, watched, under a deadline, on the real machine or a broken one."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from rma_core import isolation
from rma_core.deprecations import PluginDeprecation, words_of
from rma_core.detection import CHILD, DEADLINE_S, MAX_REPORT_BYTES, died, request_for
from rma_core.models.hardware import Detection

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from rma_core.host import Kind
    from rma_core.isolation import Ended

Machine = Literal["real", "bare", "hung", "deadly"]

#: A line of a traceback: file, number and, but for a SyntaxError, function.
_PLACE = re.compile(r'^ *File "(.+)", line (\d+)(, in \S+)?', re.MULTILINE)
_USE = "rma_core.testing.watched:watched"
#: What every plugin may load when it is imported: rma_core, and what that cannot be without.
ALWAYS_THERE = frozenset({"rma_core", "msgspec", "pluggy", "psutil"})
#: An answer with all that was seen is at most this large.
MAX_ANSWER_BYTES = 4 * MAX_REPORT_BYTES


class NotReached(Exception):
    """A check that could not be made, with the reason: it is neither kept nor broken."""


class Event(msgspec.Struct, frozen=True, array_like=True):
    """One thing that the plugin did: at which stage (``hook``, ``use``), of what kind, about what."""

    stage: str
    kind: str
    what: str


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What one run showed; ``outcome`` is ``died`` where the child gave no answer, ``late`` where it was too slow."""

    outcome: Literal["answered", "failed", "invalid", "declined", "raised", "unusable", "died", "late"] = "died"
    reason: str = ""
    import_seconds: float = 0.0
    seconds: float = 0.0
    printed: str = ""
    modules: tuple[str, ...] = ()
    events: tuple[Event, ...] = ()
    left: tuple[str, ...] = ()
    detection: Detection | None = None
    #: What policies decided and runtimes answered, as `rma_core.testing.watched` puts it.
    given: tuple[dict[str, Any], ...] = ()
    #: By the words of `rma_core.deprecations`.
    deprecated: tuple[str, ...] = ()

    def did(self, kind: str, *, stage: str = "") -> list[str]:
        """Return what it did of one kind."""
        return [event.what for event in self.events if event.kind == kind and stage in ("", event.stage)]


class PluginCase:
    """One plugin to check.

    ``value`` is what its entry point names (``module`` or ``module:attribute``), looked for in ``folder`` first;
    ``config`` is its table, ``deadline_s`` how long one run may take; ``own`` are other packages of its distribution;
    ``hidden`` are folders that one which is confined may not look into.
    """

    kind: Kind

    def __init__(
        self,
        value: str,
        *,
        folder: str = "",
        config: dict[str, object] | None = None,
        deadline_s: float = DEADLINE_S,
        own: Collection[str] = (),
        hidden: Sequence[str] = (),
    ) -> None:
        self.value, self.folder, self.config, self.deadline_s = value, folder, config or {}, deadline_s
        self.own, self.hidden = own, hidden
        self._first: Seen | None = None

    async def seen(self) -> Seen:
        """Return the first run on the real machine; it is made once."""
        if self._first is None:
            self._first = await self.run()
        return self._first

    async def used(self) -> Seen:
        """Return the first run. Raises NotReached when it did not come as far as to be used."""
        seen = await self.seen()
        if seen.outcome not in ANSWERS:
            raise NotReached("it gave no answer")
        return seen

    async def run(self, machine: Machine = "real", *, deadline_s: float | None = None) -> Seen:
        """Use the plugin once. Raises OSError when no child can be started."""
        deadline_s = deadline_s or self.deadline_s
        request = request_for(
            self.value,
            self.config,
            deadline_s,
            folder=self.folder,
            more={
                "use": _USE, "kind": self.kind, "machine": machine, "machines": self.machines(),
                "own_folder": self.folder, **self.bounds(),
            },
        )  # fmt: skip
        ended = await isolation.run(
            [sys.executable, "-I", "-X", "utf8", CHILD],
            request=request,
            deadline_s=deadline_s,
            max_answer_bytes=MAX_ANSWER_BYTES,
        )
        seen = _without_answer(ended, deadline_s) if ended.answer is None else _read(ended.answer)
        return msgspec.structs.replace(seen, seconds=ended.seconds, printed=ended.output.strip())

    def bounds(self) -> dict[str, object]:
        """Return what keeps its child from the rest of this machine, where something does."""
        return {}

    def machines(self) -> Sequence[Any]:
        """Return the machines that a policy is asked about."""
        return ()


def _read(answer: bytes) -> Seen:
    try:
        return msgspec.json.decode(answer, type=Seen)
    except msgspec.MsgspecError as error:
        return Seen(outcome="unusable", reason=str(error))


def _without_answer(ended: Ended, deadline_s: float) -> Seen:
    words = died(ended, deadline_s, most_bytes=MAX_ANSWER_BYTES)
    return Seen(outcome="late" if ended.too_late else "died", reason=words)


#: How each outcome that is no answer is told.
WORDS = {
    "failed": "it cannot be imported:",
    "invalid": "it does not fit:",
    "raised": "it raised",
    "unusable": "its answer cannot be used:",
    "died": "it",
    "late": "it",
}
#: Outcomes with an answer: `declined` is a detector that raised DetectionError.
ANSWERS = ("answered", "declined")


def check_names(names: Sequence[str], case: PluginCase, *, taken: str) -> None:
    """Assert that the host would take objects of these names: each once, and none that RMA's own plugin gives."""
    twice = [name for name in names if names.count(name) > 1]
    assert not twice, f"it gives two called {twice[0]!r}: neither would be used"
    ours = case.value.startswith("rma_core.")
    assert ours or taken not in names, f"{taken!r} is RMA's own: neither would be used, so give yours another name"


def place_of(printed: str) -> str:
    """Return where the traceback in what was printed ends, in brackets, or nothing."""
    places = _PLACE.findall(printed)
    return f" ({Path(places[-1][0]).name}:{places[-1][1]}{places[-1][2]})" if places else ""


# What every plugin must do


async def its_hook_fits(case: PluginCase) -> None:
    """It can be imported, and has the hook of its kind with the right arguments."""
    seen = await case.seen()
    if seen.outcome in ("died", "late"):
        raise NotReached("it gave no answer")
    assert seen.outcome != "failed", f"it cannot be imported: {seen.reason}{place_of(seen.printed)}"
    assert seen.outcome != "invalid", seen.reason


async def its_import_is_light(case: PluginCase) -> None:
    """Importing it loads nothing but the standard library, rma_core and itself."""
    seen = await case.used()
    own = {case.value.partition(":")[0].partition(".")[0], *case.own}
    strange = sorted(set(seen.modules) - own - ALWAYS_THERE - sys.stdlib_module_names)
    assert not strange, (
        f"importing it loads {', '.join(strange)}: import that inside the function which needs it, so that where it is "
        "missing or broken the plugin can say so"
    )


async def it_answers(case: PluginCase) -> None:
    """It answers in time with what its hook is to return, whatever is in this machine."""
    seen = await case.seen()
    if seen.outcome in ("failed", "invalid"):
        raise NotReached("its hook does not fit")
    where = place_of(seen.printed) if seen.outcome == "raised" else ""
    assert seen.outcome in ANSWERS, f"{WORDS[seen.outcome]} {seen.reason}{where}"


async def it_prints_nothing(case: PluginCase) -> None:
    """Nothing is printed: what there is to say belongs in the answer."""
    seen = await case.used()
    assert not seen.printed, f"it printed: {' '.join(seen.printed.split())[-200:]}"


async def it_writes_nothing(case: PluginCase) -> None:
    """It changes no file and makes none."""
    seen = await case.used()
    assert not seen.did("write"), f"it changes {', '.join(seen.did('write')[:3])}"


async def it_uses_no_network(case: PluginCase) -> None:
    """It connects to nothing and resolves no name."""
    seen = await case.used()
    assert not seen.did("network"), f"it uses the network: {', '.join(seen.did('network')[:3])}"


async def it_uses_nothing_deprecated(case: PluginCase) -> None:
    """It uses nothing that a later release may refuse; what it does use is a warning, and no broken rule."""
    seen = await case.seen()
    if seen.outcome in ("failed", "died", "late"):
        raise NotReached("it gave no answer")
    for words in words_of(seen.deprecated):
        warnings.warn(f"it {words}", PluginDeprecation, stacklevel=2)


async def it_leaves_nothing_running(case: PluginCase) -> None:
    """Every program that it starts has ended when it answers."""
    seen = await case.used()
    assert not seen.left, f"it leaves running: {', '.join(seen.left)}"
