"""Which tier each machine gets: the policies that there are, the one that is active, and what any of them decides."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_core.errors import NotFound, RMAError, SettingProblem
from rma_core.interfaces import TierDecision
from rma_core.policy_file import SUFFIX, load, read_policy

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from rma_core.interfaces import PolicyInput, TierPolicy

logger = logging.getLogger(__name__)

#: The folder for policies without Python, beside the settings.
FOLDER = "policies"
#: When a policy has failed for so many workers, and for this share of all, another must take over.
MANY, MANY_SHARE = 3, 0.1


class NoDecision(TierDecision, frozen=True, kw_only=True):
    """What stands in for the answer of a policy that failed."""


class Known(NamedTuple):
    """A policy that can be chosen, and its text where it is a file's."""

    policy: TierPolicy
    text: str = ""


class Tiers:
    """The policies of a pool: those that are installed, and those in the files of a folder."""

    def __init__(self, installed: Mapping[str, TierPolicy], *, wanted: str, folder: Path | None = None) -> None:
        """Keep what there is; ``wanted`` is the policy that the settings name. Raises what is wrong with its file."""
        self._installed, self._folder = dict(installed), folder
        self.wanted = wanted
        self.known = self._found(active=wanted)
        #: The policy in force, and the one that still holds for workers which wait for their turn.
        self.current: TierPolicy | None = self.known[wanted].policy if wanted in self.known else None
        self.before: TierPolicy | None = None
        self.waiting: Collection[str] = ()
        #: Workers for which the policy in force failed when it was last asked.
        self.failing: set[str] = set()

    @property
    def active(self) -> str:
        """The name of the policy in force."""
        return self.current.name if self.current else self.wanted

    def check(self) -> None:
        """Raise SettingProblem where the policy that the settings name is not there."""
        if self.wanted not in self.known:
            raise SettingProblem(
                f"there is no tier policy {self.wanted!r}",
                hints=(f"installed: {', '.join(sorted(self.known)) or 'none'}",),
            )

    def look(self) -> dict[str, Known]:
        """Return the policies that can be chosen, with the files that there are now."""
        self.known = self._found()
        return self.known

    def _found(self, *, active: str = "") -> dict[str, Known]:
        installed = {name: Known(policy) for name, policy in self._installed.items()}
        return with_files(installed, self._folder, active=active) if self._folder else installed

    def find(self, name: str = "") -> Known:
        """Return a policy, the active one unless named. Raises NotFound."""
        if not name and self.current:
            return Known(self.current)
        found = self.look().get(name or self.wanted)
        if found is None:
            raise NotFound(f"there is no tier policy {name!r}", hints=(f"installed: {', '.join(sorted(self.known))}",))
        return found

    def use(self, policy: TierPolicy, *, before: TierPolicy | None = None, waiting: Collection[str] = ()) -> None:
        """Put a policy in force for all but those who wait, for whom the one before still holds."""
        self.current, self.before, self.waiting = policy, before, waiting
        self.failing.clear()

    def decide(self, asked: PolicyInput, policy: TierPolicy | None = None) -> TierDecision:
        """Ask a policy (the one in force unless given) for a tier. One that fails gives none, and says so."""
        if policy is not None:
            return _decided(policy, asked)
        waits = self.before is not None and asked.worker_id in self.waiting
        chosen = (self.before if waits else self.current) or self.find().policy
        decision = _decided(chosen, asked)
        if isinstance(decision, NoDecision) and asked.worker_id:
            self.failing.add(asked.worker_id)
        else:
            self.failing.discard(asked.worker_id)
        return decision


def failed_for_many(failed: int, workers: int) -> bool:
    """Whether a policy fails for more than single machines."""
    return failed >= max(1, workers * MANY_SHARE) and (failed >= MANY or failed == workers)


def _decided(policy: TierPolicy, asked: PolicyInput) -> TierDecision:
    try:
        decision: object = policy.decide(asked)
        # What does not have the declared types would be kept, and could not be read again at the next start.
        return msgspec.convert(msgspec.to_builtins(decision), TierDecision)
    except Exception as error:
        logger.debug("policy %s failed", policy.name, exc_info=True)
        return NoDecision(tier=None, reason=f"the tier policy {policy.name!r} failed: {type(error).__name__}: {error}")


def with_files(installed: Mapping[str, Known], folder: Path, *, active: str = "") -> dict[str, Known]:
    """Return the installed policies and those in the files of a folder.

    A file that cannot be used is left out, with a warning. Raises what is wrong with it when it is the ``active`` one:
    SettingProblem or ValidationProblem, naming every line.
    """
    found = dict(installed)
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        name = path.name.removesuffix(SUFFIX)
        try:
            if name in installed:
                hints = ("give the file another name",)
                raise SettingProblem(f"{path} is called like the installed policy {name!r}", hints=hints)
            name, text = load(path)
            found[name] = Known(read_policy(text, name=name, subject=path.name), text)
        except RMAError as error:
            if name == active:
                raise
            logger.warning("the tier policy in %s cannot be used: %s", path, error, extra={"action": "policy"})
    return found
