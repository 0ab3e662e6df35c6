"""A tier policy in the shadow of the one in force: asked whenever that is, and kept where it says something else."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rma_core.interfaces import TierDecision, TierPolicy

#: Workers whose disagreement is kept; the one that was longest without any goes first.
KEPT = 1000


class Disagreement(NamedTuple):
    """What both last said of a worker when they differed, when (Unix seconds), and how often they have."""

    worker_id: str
    tier: int | None
    shadow_tier: int | None
    reason: str
    at: float
    times: int


class Shadow:
    """One candidate, and where it differed."""

    def __init__(self, policy: TierPolicy, *, since: float, wall: Callable[[], float]) -> None:
        self.policy, self.since = policy, since
        self._wall = wall
        #: How often it was asked, and how often it failed.
        self.asked = self.failed = 0
        self._differs: dict[str, Disagreement] = {}

    def compare(
        self, worker_id: str, tier: int | None, shadow: TierDecision, *, failed: bool, prefers: Sequence[str] = ()
    ) -> None:
        """Take in what it says of a worker beside what this has. One that fails differs from whatever."""
        self.asked += 1
        self.failed += failed
        if (tier, tuple(prefers)) == (shadow.tier, shadow.prefers) and not failed:
            return
        reason = shadow.reason
        if tier == shadow.tier and not failed:
            reason = f"{reason}; it prefers {', '.join(shadow.prefers) or 'nothing'}"
        before = self._differs.pop(worker_id, None)
        self._differs[worker_id] = Disagreement(
            worker_id, tier, shadow.tier, reason, self._wall(), before.times + 1 if before else 1
        )
        if len(self._differs) > KEPT:
            del self._differs[next(iter(self._differs))]

    def disagreements(self) -> Iterable[Disagreement]:
        """Return where it differs, the latest first."""
        return reversed(self._differs.values())
