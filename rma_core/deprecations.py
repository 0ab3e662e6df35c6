"""What of a plugin still works, and will not for ever: from which day a release may be without it, and what to do.

No clock ends anything: only a release does, that day at the earliest.
"""

from __future__ import annotations

import functools
import logging
from datetime import date, timedelta
from typing import TYPE_CHECKING, NamedTuple

from rma_core.hookspecs import HOOK_VERSION, VERSION_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable

logger = logging.getLogger(__name__)

#: What is deprecated works for so long at least, and in two minor releases.
LASTS = timedelta(days=365)
#: Plugins that are remembered to have been warned of.
MOST = 1024


class PluginDeprecation(DeprecationWarning):
    """The warning that `rma_core.testing` gives of a plugin that uses what is deprecated."""


class Deprecation(NamedTuple):
    """``what`` goes on from a plugin's name; it works until ``gone`` at least, and ``instead`` says what to do."""

    what: str
    since: date
    gone: date
    instead: str

    @property
    def words(self) -> str:
        """All of it, as a person should read it."""
        return f"{self.what}, which is deprecated: a release from {self.gone} on may refuse it; {self.instead}"


#: By a word of its own, which is what a plugin's child tells.
DEPRECATED = {
    "no_hook_version": Deprecation(
        f"states no {VERSION_NAME}",
        since=date(2026, 12, 1),
        gone=date(2028, 1, 1),
        instead=f"its author writes `{VERSION_NAME} = {HOOK_VERSION}` into the module",
    )
}


def used_by(plugin: object) -> tuple[str, ...]:
    """Return the words for what a plugin, its module or object, uses of that."""
    return () if hasattr(plugin, VERSION_NAME) else ("no_hook_version",)


def words_of(used: Iterable[str]) -> tuple[str, ...]:
    """Return what a person should read of that; a word that is none says nothing."""
    return tuple(DEPRECATED[word].words for word in dict.fromkeys(used) if word in DEPRECATED)


@functools.lru_cache(MOST)
def warn(kind: str, name: str, shipped_by: str, words: str) -> None:
    """Log it, once in this process for each plugin."""
    about = {"action": "deprecated", "plugin": name}
    logger.warning("the %s %s of %s %s", kind, name, shipped_by, words, extra=about)
