"""How often plugins have failed since this process started, and when last; what they fail of is told elsewhere."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

#: Plugins that are counted; beyond, the one that has not failed for longest is forgotten.
MOST = 1000


class Failed(NamedTuple):
    """How often, and when last (UTC, to the second); empty for never."""

    times: int = 0
    at: str = ""


NEVER = Failed()


class Failures:
    """Counts by kind, name and version: what is mended begins anew. ``wall`` gives Unix seconds."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._found: dict[tuple[str, str, str], Failed] = {}

    def add(self, kind: str, name: str, version: str = "") -> None:
        """Count one."""
        at = datetime.fromtimestamp(self._wall(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        times = self._found.pop((kind, name, version), NEVER).times + 1
        # What failed last stays longest.
        self._found[kind, name, version] = Failed(times, at)
        if len(self._found) > MOST:
            del self._found[next(iter(self._found))]

    def of(self, kind: str, name: str, version: str = "") -> Failed:
        """Return what was counted."""
        return self._found.get((kind, name, version), NEVER)
