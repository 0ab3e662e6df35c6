"""Which tier each machine gets: the policies that there are, the one that is active, and what any of them decides."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, NamedTuple

from rma_coordinator.policy_versions import PREPARED_S, ChildPolicy, NotAskedYet, PolicyFailed
from rma_core import offers
from rma_core.errors import NotFound, Refused, RMAError, SettingProblem
from rma_core.failures import Failures
from rma_core.interfaces import TierDecision
from rma_core.policy_file import SUFFIX, load, read_policy

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping
    from pathlib import Path

    from rma_coordinator.shadow import Shadow
    from rma_core.failures import Failed
    from rma_core.interfaces import PolicyInput, TierPolicy

logger = logging.getLogger(__name__)

#: The folder for policies without Python, beside the settings.
FOLDER = "policies"
#: When a policy has failed for so many workers, and for this share of all, another must take over.
MANY, MANY_SHARE = 3, 0.1


class NoDecision(TierDecision, frozen=True, kw_only=True):
    """What stands in for the answer of a policy that failed."""


class Pending(NoDecision, frozen=True, kw_only=True):
    """What stands in for an answer that is still to come: the policy has not failed."""


class Known(NamedTuple):
    """A policy that can be chosen, and its text where it is a file's."""

    policy: TierPolicy
    text: str = ""


class Tiers:
    """The policies of a pool: those that are installed, and those in the files of a folder."""

    def __init__(
        self,
        installed: Mapping[str, TierPolicy],
        *,
        wanted: str,
        folder: Path | None = None,
        failures: Failures | None = None,
    ) -> None:
        """Keep what there is; ``wanted`` is the policy that the settings name. Raises what is wrong with its file.

        ``failures`` counts those of policies in this process, and those of plugins as whoever runs their children says.
        """
        self._failures = failures or Failures()
        self._installed = self._ours = {name: Known(policy) for name, policy in installed.items()}
        #: Why a policy cannot be used that a plugin should have.
        self.refused: dict[str, str] = {}
        self._folder = folder
        self._read: dict[Path, tuple[tuple[int, int], Known | None]] = {}
        self.wanted = wanted
        self.known = self._found(active=wanted)
        #: The settings' own policy as it was at the start, whatever becomes of its file.
        self.own = self.known.get(wanted)
        #: The policy in force, and workers that wait for their turn to have it.
        self.current: TierPolicy | None = self.own.policy if self.own else None
        self.waiting: Container[str] = ()
        self.shadow: Shadow | None = None
        #: Workers for which the policy in force failed when it was last asked.
        self.failing: set[str] = set()
        #: For each plan that is being made: workers for which the policy in force was asked meanwhile.
        self.noting: list[set[str]] = []
        #: Workers that are decided once there is an answer for them.
        self.pending: set[str] = set()
        self.pended = asyncio.Event()

    @property
    def active(self) -> str:
        """The name of the policy in force."""
        return self.current.name if self.current else self.wanted

    def take(self, plugins: Mapping[str, ChildPolicy], refused: Mapping[str, str]) -> None:
        """Take in which policies plugins have now, and why others are refused. Raises what is wrong with a file."""
        self._installed = {**{name: Known(policy) for name, policy in plugins.items()}, **self._ours}
        self.refused = dict(refused)
        self._read.clear()
        self.known = self._found(active="" if self.own else self.wanted)
        if self.own is None:
            self.own = self.known.get(self.wanted)
            self.current = self.own.policy if self.own else None

    def check(self) -> None:
        """Raise SettingProblem where the policy that the settings name is not there."""
        if self.own is None:
            why = self.refused.get(self.wanted, "")
            raise SettingProblem(
                f"there is no tier policy {self.wanted!r}{why and f': {why}'}",
                hints=(f"installed: {', '.join(sorted(self.known)) or 'none'}",),
            )

    def look(self) -> dict[str, Known]:
        """Return the policies that can be chosen, with the files that there are now."""
        self.known = self._found()
        return self.known

    def _found(self, *, active: str = "") -> dict[str, Known]:
        if self._folder is None:
            return dict(self._installed)
        return with_files(self._installed, self._folder, active=active, read=self._read)

    def find(self, name: str = "") -> Known:
        """Return a policy, the active one unless named. Raises NotFound, and Refused for one that cannot be used."""
        if not name and self.current:
            return Known(self.current)
        found = self.look().get(name or self.wanted)
        if found is None and name in self.refused:
            raise Refused(f"{name!r} cannot be used: {self.refused[name]}", hints=("mend it: `rma policies rescan`",))
        if found is None:
            known = f"there are: {', '.join(sorted(self.known))}"
            hints = (known, "one that was installed just now: `rma policies rescan` first")
            raise NotFound(f"there is no tier policy {name!r}", hints=hints)
        return found

    def use(self, policy: TierPolicy, *, waiting: Container[str] = ()) -> None:
        """Put a policy in force for all but those who wait, who keep what they have."""
        self.current, self.waiting = policy, waiting
        self.failing.clear()

    def decide(self, asked: PolicyInput, policy: TierPolicy | None = None) -> TierDecision:
        """Ask a policy (the one in force unless given) for a tier. One that fails gives none, and says so."""
        if policy is not None:
            return self._decided(policy, asked)
        decision = self._decided(self.current or self.find().policy, asked)
        if asked.worker_id:
            self._note(asked, decision)
        return decision

    def undecided(self, asked: PolicyInput) -> bool:
        """Whether the policy in force has no answer yet for a worker that does not wait for its turn."""
        if asked.worker_id in self.waiting or not isinstance(self.current, ChildPolicy):
            return False
        return isinstance(self._decided(self.current, asked), Pending)

    async def prepare(
        self, asked: Iterable[PolicyInput], policy: TierPolicy | None = None, *, within_s: float = PREPARED_S
    ) -> None:
        """Have a policy in a child (the one in force unless given) answer for these machines, but wait no longer.

        `decide` then need not wait for anyone's code. ``asked`` is looked at only where that may take time.
        """
        if policy is None:
            asked = (one for one in asked if one.worker_id not in self.waiting)
        policy = policy or self.current
        if isinstance(policy, ChildPolicy):
            await policy.prepare(asked, within_s=within_s)

    async def ask_shadow(self, asked: Iterable[PolicyInput]) -> None:
        """Have the one in the shadow answer some time; nobody waits for that."""
        if self.shadow is not None:
            await self.prepare(asked, self.shadow.policy, within_s=0)

    def waits(self, worker_id: str) -> bool:
        """Whether a known worker waits for its turn, and keeps what it has until then."""
        waiting = worker_id in self.waiting
        if waiting:
            self._asked(worker_id)
        return waiting

    def _asked(self, worker_id: str) -> None:
        for some in self.noting:
            some.add(worker_id)

    def _note(self, asked: PolicyInput, decision: TierDecision) -> None:
        """Keep what else a decision for a worker tells."""
        if isinstance(decision, Pending):
            self._pend(asked.worker_id)
        elif isinstance(decision, NoDecision):
            self.failing.add(asked.worker_id)
        else:
            self.failing.discard(asked.worker_id)
        self._asked(asked.worker_id)
        if self.shadow is not None and not isinstance(decision, Pending):
            other = self._decided(self.shadow.policy, asked)
            if isinstance(other, Pending):
                self._pend(asked.worker_id)
            else:
                failed, prefers = isinstance(other, NoDecision), decision.prefers
                self.shadow.compare(asked.worker_id, decision.tier, other, failed=failed, prefers=prefers)

    def _pend(self, worker_id: str) -> None:
        self.pending.add(worker_id)
        self.pended.set()

    def failed(self, policy: TierPolicy) -> Failed:
        """Return how often a policy has failed; of a plugin's that version."""
        if isinstance(policy, ChildPolicy):
            return self._failures.of("policy", policy.of.plugin.name, policy.version)
        return self._failures.of("policy", policy.name)

    def _decided(self, policy: TierPolicy, asked: PolicyInput) -> TierDecision:
        name = f"the tier policy {policy.name!r}"
        try:
            return offers.decision(policy.decide(asked))
        except NotAskedYet:
            return Pending(tier=None, reason=f"{name} is being asked, and the tier follows")
        except PolicyFailed as error:
            return NoDecision(tier=None, reason=f"{name} {error}")
        except Exception as error:
            logger.debug("policy %s failed", policy.name, exc_info=True)
            self._failures.add("policy", policy.name)
            return NoDecision(tier=None, reason=f"{name} failed: {type(error).__name__}: {error}")


def failed_for_many(failed: int, workers: int) -> bool:
    """Whether a policy fails for more than single machines."""
    return failed >= max(1, workers * MANY_SHARE) and (failed >= MANY or failed == workers)


def with_files(
    installed: Mapping[str, Known],
    folder: Path,
    *,
    active: str = "",
    read: dict[Path, tuple[tuple[int, int], Known | None]] | None = None,
) -> dict[str, Known]:
    """Return the installed policies and those in the files of a folder.

    A file that cannot be used is left out, with a warning. Raises what is wrong with it when it is the ``active`` one:
    SettingProblem or ValidationProblem, naming every line. ``read`` keeps what was read: a file is read once.
    """
    found, read = dict(installed), {} if read is None else read
    files = sorted(folder.glob(f"*{SUFFIX}"))
    for gone in read.keys() - set(files):
        del read[gone]
    for path in files:
        name = path.name.removesuffix(SUFFIX)
        stamp = _stamp(path)
        if path not in read or read[path][0] != stamp:
            read[path] = stamp, _read(path, name, taken=name in installed, active=name == active)
        known = read[path][1]
        if known is not None:
            found[name] = known
    return found


def _stamp(path: Path) -> tuple[int, int]:
    try:
        about = path.stat()
    except OSError:
        return 0, 0
    return about.st_mtime_ns, about.st_size


def _read(path: Path, name: str, *, taken: bool, active: bool) -> Known | None:
    try:
        if taken:
            hints = ("give the file another name",)
            raise SettingProblem(f"{path} is called like the installed policy {name!r}", hints=hints)
        name, text = load(path)
        return Known(read_policy(text, name=name, subject=path.name), text)
    except RMAError as error:
        if active:
            raise
        logger.warning("the tier policy in %s cannot be used: %s", path, error, extra={"action": "policy"})
        return None
