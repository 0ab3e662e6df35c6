"""Which tier each machine gets: the policies that there are, the one that is active, and what any of them decides."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from rma_core.errors import NotFound, RMAError, SettingProblem
from rma_core.interfaces import TierDecision
from rma_core.policy_file import SUFFIX, read_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rma_core.interfaces import PolicyInput, TierPolicy

logger = logging.getLogger(__name__)

#: The folder for policies without Python, beside the settings.
FOLDER = "policies"


class NoDecision(TierDecision, frozen=True, kw_only=True):
    """What stands in for the answer of a policy that failed."""


class Tiers:
    """The policies of a pool."""

    def __init__(self, policies: Mapping[str, TierPolicy], *, active: str) -> None:
        self.policies, self.active = dict(policies), active

    def check(self) -> None:
        """Raise SettingProblem where the policy that is to be active is not there."""
        if self.active not in self.policies:
            raise SettingProblem(
                f"there is no tier policy {self.active!r}",
                hints=(f"installed: {', '.join(sorted(self.policies)) or 'none'}",),
            )

    def find(self, name: str = "") -> TierPolicy:
        """Return a policy, the active one unless named. Raises NotFound."""
        found = self.policies.get(name or self.active)
        if found is None:
            raise NotFound(
                f"there is no tier policy {name!r}", hints=(f"installed: {', '.join(sorted(self.policies))}",)
            )
        return found

    def decide(self, asked: PolicyInput, policy: TierPolicy | None = None) -> TierDecision:
        """Ask a policy (the active one unless given) for a tier. One that fails gives none, and says so."""
        chosen = policy or self.find()
        try:
            decision: object = chosen.decide(asked)
            # What does not have the declared types would be kept, and could not be read again at the next start.
            return msgspec.convert(msgspec.to_builtins(decision), TierDecision)
        except Exception as error:
            logger.debug("policy %s failed", chosen.name, exc_info=True)
            return NoDecision(
                tier=None, reason=f"the tier policy {chosen.name!r} failed: {type(error).__name__}: {error}"
            )


def with_files(installed: Mapping[str, TierPolicy], folder: Path, *, active: str) -> dict[str, TierPolicy]:
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
            found[name] = read_file(path)
        except RMAError as error:
            if name == active:
                raise
            logger.warning("the tier policy in %s cannot be used: %s", path, error, extra={"action": "policy"})
    return found
