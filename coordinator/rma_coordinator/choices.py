"""What a swap of tier policies is told in: what was put in force, what one would change, what a start has found."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_coordinator.domain.rollout import Steps
from rma_coordinator.policy_versions import ChildPolicy

if TYPE_CHECKING:
    from rma_core.interfaces import TierPolicy


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A policy that was put in force: its name, its text where it is a file's, when (Unix seconds) and by whom.

    Of a plugin's also its ``version``, and ``files``, a word for what its code and its settings were.
    """

    name: str
    text: str = ""
    version: str = ""
    files: str = ""
    at: float = 0.0
    by: str = ""

    @property
    def digest(self) -> str:
        """A word for this policy, whatever version of it, and no other."""
        return hashlib.sha256(f"{self.name}\0{self.text}".encode()).hexdigest()[:16]

    def same(self, other: Choice) -> bool:
        """Whether both are the same policy, whoever chose it."""
        mine = (self.name, self.text, self.version, self.files)
        return mine == (other.name, other.text, other.version, other.files)

    @property
    def word(self) -> str:
        """A word for exactly this version of it."""
        return hashlib.sha256(msgspec.json.encode([self.name, self.text, self.version, self.files])).hexdigest()[:16]

    @property
    def words(self) -> str:
        """What it is called where people read it."""
        return f"{self.name!r} {self.version}".rstrip()


def choice_of(policy: TierPolicy, text: str = "", *, at: float = 0.0, by: str = "") -> Choice:
    """Return a policy as what is chosen."""
    if isinstance(policy, ChildPolicy):
        return Choice(name=policy.name, version=policy.version, files=policy.files, at=at, by=by)
    return Choice(name=policy.name, text=text, at=at, by=by)


class PolicyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What was put in force, oldest first, and a word for what the settings said then (``wanted``).

    While workers move: ``steps``, how many change in all, and why they move no further.
    """

    wanted: str
    choices: tuple[Choice, ...]
    steps: Steps | None = None
    total: int = 0
    stopped: str = ""
    shadow: Choice | None = None


class Change(NamedTuple):
    """What a policy says of one worker, beside what is."""

    worker_id: str
    tier: int | None
    new_tier: int | None
    reason: str
    failed: bool
    pending: bool = False
    #: What it should run before other services, where that would be something else.
    prefers: tuple[str, ...] | None = None

    @property
    def changes(self) -> bool:
        """Whether it would have another tier, or other services; one for which the policy fails stays where it is."""
        return not self.failed and (self.tier != self.new_tier or self.prefers is not None)


class Plan(NamedTuple):
    """What a policy says of the whole fleet, by worker; ``policy`` is a word for which one that is."""

    rows: list[Change]
    policy: str = ""

    @property
    def moves(self) -> list[Change]:
        """Those that would change."""
        return [row for row in self.rows if row.changes]

    @property
    def failed(self) -> list[Change]:
        """Those for which the policy fails."""
        return [row for row in self.rows if row.failed and not row.pending]

    @property
    def pending(self) -> list[Change]:
        """Those for which it has no answer yet."""
        return [row for row in self.rows if row.pending]

    @property
    def digest(self) -> str:
        """A word for this policy and exactly these moves: who saw a preview can say that nothing else is meant."""
        moves = [(row.worker_id, row.tier, row.new_tier, row.prefers) for row in self.moves]
        return hashlib.sha256(msgspec.json.encode([self.policy, moves])).hexdigest()[:16]


class Start(NamedTuple):
    """What a start has found, for the first round: what is in force, how workers get there, and what is said of it."""

    choices: tuple[Choice, ...]
    steps: Steps
    action: str
    words: str
    #: How many change in all, where it goes on; and why it was stopped.
    total: int = 0
    stopped: str = ""
    #: Nobody did anything: it is told only where workers move.
    quiet: bool = False
