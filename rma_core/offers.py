"""Whether what a plugin gives fits the interface of its kind (runtimes, policies); every complaint says what to do."""

from __future__ import annotations

import inspect
import itertools
import re
from typing import Any

import msgspec

from rma_core.errors import PluginInvalid
from rma_core.interfaces import ContainerRuntime, TierDecision, TierPolicy

#: One plugin offers at most this many runtimes or policies; a generator that never ends is cut here.
MAX_OBJECTS = 64
#: The tiers that a policy may give; of a longer reason the beginning is kept.
TIERS, REASON_CHARACTERS = range(1, 100), 1500

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")


def offers(result: Any, hook: str) -> list[Any]:  # noqa: ANN401 - a plugin may return anything
    """Return what ``hook`` gave as a list of objects that fit; ``None`` is nothing. Raises PluginInvalid."""
    things = [] if result is None else _listed(result, hook)
    for thing in things:
        complaint = _complaint(thing, hook)
        if complaint:
            raise PluginInvalid(f"{hook}: {complaint}")
    return things


def decision(given: object) -> TierDecision:
    """Return what a policy gave as a decision that can be kept and read again. Raises what is wrong with it."""
    # What does not have the declared types would be kept, and could not be read at the next start.
    found = msgspec.json.decode(msgspec.json.encode(given), type=TierDecision)
    if found.tier is not None and found.tier not in TIERS:
        last = TIERS.stop - 1
        raise ValueError(f"the tier is {found.tier}: give a whole number from {TIERS.start} to {last}, or None")
    if len(found.reason) > REASON_CHARACTERS:
        return msgspec.structs.replace(found, reason=f"{found.reason[: REASON_CHARACTERS - 1]}…")
    return found


def _listed(result: Any, hook: str) -> list[Any]:  # noqa: ANN401 - a plugin may return anything
    if isinstance(result, (str, bytes, dict)) or not hasattr(result, "__iter__"):
        raise PluginInvalid(f"{hook} returned a {type(result).__name__}: return a list")
    things = list(itertools.islice(result, MAX_OBJECTS + 1))
    if len(things) > MAX_OBJECTS:
        raise PluginInvalid(f"{hook} gave more than {MAX_OBJECTS} objects")
    return things


def _complaint(thing: object, hook: str) -> str:
    if isinstance(thing, type):
        return f"{thing.__name__} is a class: return an object made from it"
    words = _runtime(thing) if hook == "rma_container_runtimes" else _policy(thing)
    name = getattr(thing, "name", None)
    if not words and not (isinstance(name, str) and _NAME.fullmatch(name)):
        words = f"is named {name!r}: use lower-case letters, digits, `-` and `_`"
    return f"{type(thing).__name__} {words}" if words else ""


def _runtime(thing: object) -> str:
    if not isinstance(thing, ContainerRuntime):
        return "is no ContainerRuntime: derive its class from rma_core.ContainerRuntime"
    return "" if isinstance(getattr(thing, "isolated", None), bool) else "needs `isolated`, True or False"


def _policy(thing: object) -> str:
    if not isinstance(thing, TierPolicy):
        return "is no TierPolicy: it needs `name`, `summary` and `decide(asked)`"
    if inspect.iscoroutinefunction(thing.decide):
        return "has an `async def decide`; policies are plain functions: write `def decide`"
    return "" if isinstance(getattr(thing, "summary", None), str) else "needs `summary`, one sentence"
