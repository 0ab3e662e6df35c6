"""Whether a plugin's functions fit the hook of its kind; every complaint says what to change."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from rma_core.errors import PluginInvalid
from rma_core.hookspecs import GROUPS, HOOK_VERSION, OLDEST_VERSION, PROJECT, VERSION_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_HOOKS = {hook: group for group, hook in GROUPS.items()}


def check(
    plugin: object,
    group: str,
    implementations: Mapping[str, Callable[..., object]],
    specification: Callable[..., object],
) -> None:
    """Check the marked functions of a plugin, by the hook they implement, against the one hook of its group.

    Raises PluginInvalid with the first complaint.
    """
    hook = GROUPS[group]
    complaint = _wrong_version(plugin)
    complaint = complaint or next(filter(None, (_wrong_name(name, group) for name in implementations)), "")
    if not complaint and hook not in implementations:
        complaint = _nothing_marked(plugin, hook)
    if not complaint:
        complaint = _wrong_function(implementations[hook], hook, specification)
    if complaint:
        raise PluginInvalid(complaint)


def _wrong_version(plugin: object) -> str:
    """Say whether it was written for hooks that this rma-core does not have yet, or has no more."""
    version = getattr(plugin, VERSION_NAME, HOOK_VERSION)
    if type(version) is not int:
        return f"{VERSION_NAME} is {version!r}: write a whole number, {HOOK_VERSION} now (rma_core.HOOK_VERSION)"
    words = f"was written for version {version} of RMA's hooks"
    if version > HOOK_VERSION:
        return f"{words}, and this rma-core has version {HOOK_VERSION}: update rma-core"
    if version < OLDEST_VERSION:
        return f"{words}, and this rma-core takes {OLDEST_VERSION} to {HOOK_VERSION}: update the plugin"
    return ""


def _wrong_name(name: str, group: str) -> str:
    if name == GROUPS[group]:
        return ""
    if name in _HOOKS:
        return (
            f"implements {name}, but its entry point is in {group}, where {GROUPS[group]} belongs: "
            f"move that function to a module with an entry point in {_HOOKS[name]}"
        )
    return f"implements {name}, and there is no such hook{_meant(name)}"


def _meant(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, _HOOKS, n=1)
    return f"; did you mean {close[0]}?" if close else f"; the hooks are {', '.join(_HOOKS)}"


def _nothing_marked(plugin: object, hook: str) -> str:
    """Say why a plugin without the hook has none: the marker forgotten, the name misspelt, or nothing there at all."""
    functions = [name for name in dir(plugin) if name.startswith(f"{PROJECT}_") and callable(getattr(plugin, name))]
    if hook in functions:
        return f"{hook} is not marked: put @hookimpl (from rma_core import hookimpl) above it"
    unmarked = next((name for name in functions if _meant(name).startswith("; did")), "")
    if unmarked:
        return f"has a function {unmarked}, but no such hook exists{_meant(unmarked)} It also needs @hookimpl above it"
    return f"has no function {hook} marked with @hookimpl: write it, or point the entry point at the module that has it"


def _wrong_function(function: Callable[..., object], hook: str, specification: Callable[..., object]) -> str:
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return f"{hook} is `async def`; hooks are plain functions: write `def {hook}(…)`"
    expected = tuple(inspect.signature(specification).parameters)
    parameters = inspect.signature(function).parameters.values()
    return next(filter(None, (_wrong_parameter(parameter, hook, expected) for parameter in parameters)), "")


def _wrong_parameter(parameter: inspect.Parameter, hook: str, expected: tuple[str, ...]) -> str:
    listed = f"{hook}({', '.join(expected)})"
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return f"{hook} takes {parameter}; name the arguments it wants, of those in {listed}"
    if parameter.kind is parameter.KEYWORD_ONLY:
        return f"{hook}: {parameter.name!r} is keyword-only and would never be filled; remove the `*` before it"
    known, defaulted = parameter.name in expected, parameter.default is not parameter.empty
    if known and defaulted:
        return f"{hook}: {parameter.name!r} has a default, which would never be used; write it without one"
    if not known and not defaulted:
        return (
            f"{hook} asks for {parameter.name!r}, which this rma-core does not give: it is {listed}. "
            "Drop the argument, give it a default, or install the rma-core it was written for"
        )
    return ""
