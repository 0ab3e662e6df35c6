"""Plugins' tier policies for a command: each plugin in a confined child, as in a coordinator, ended with the command.

Whatever a stranger's policy does when it is imported or asked, it does not do as the person at the shell.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import msgspec

from rma_core.errors import PluginError
from rma_core.interfaces import TierDecision
from rma_core.policy_process import Hello, PolicyProcess, Question, decision_deadline, unusable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence

    from rma_core.host import Plugins, PluginTables, PolicyPlugin, State
    from rma_core.interfaces import PolicyInput
    from rma_core.policy_process import Answer

#: Children that are started at one time.
AT_ONCE = 8
#: Machines that a child is asked about at a time; a plugin whose child has died so often is asked no more.
ASKED_AT_ONCE, MOST_DEATHS = 100, 3


class PluginPolicy:
    """One policy of a plugin, in the plugin's child."""

    def __init__(self, child: _Child, name: str, summary: str) -> None:
        self.name, self.summary = name, summary
        self._child = child

    async def decide(self, machines: Sequence[PolicyInput]) -> list[TierDecision | str]:
        """Return what it says of each machine, in order; where it fails, the words why."""
        return [one async for one in self._child.decisions(self.name, machines)]


@contextlib.asynccontextmanager
async def started(plugins: Plugins, tables: PluginTables) -> AsyncIterator[dict[str, PluginPolicy]]:
    """Start a child for each plugin with policies that may be used, and give their policies by name.

    ``tables`` is the ``[plugins]`` table. How each plugin stands is in ``plugins.reports()`` then. Raises PluginError
    only where ``plugins.strict`` is set and one cannot be used.
    """
    children = [_Child(plugins, one, tables.get(one.name, {})) for one in plugins.policy_plugins()]
    places = asyncio.Semaphore(AT_ONCE)

    async def start(child: _Child) -> None:
        async with places:
            await child.start()

    try:
        async with asyncio.TaskGroup() as group:
            for child in children:
                group.create_task(start(child))
        usable = {child.plugin.name: child for child in children if not child.verdict}
        given = {name: child.policies for name, child in usable.items()}
        shipped_by = {name: f"{child.plugin.distribution} {child.plugin.version}" for name, child in usable.items()}
        for name, words in clashes(given, shipped_by=shipped_by, taken=plugins.policies(tables)).items():
            usable.pop(name).verdict = "invalid", words
        for child in children:
            child.tell()
        yield {name: policy for child in usable.values() for name, policy in child.policies.items()}
    finally:
        await asyncio.gather(*(child.close() for child in children))


def clashes(
    given: Mapping[str, Collection[str]], *, shipped_by: Mapping[str, str], taken: Collection[str]
) -> dict[str, str]:
    """Return why plugins cannot be used whose policies are called like others.

    ``given`` and ``shipped_by`` go by plugin; ``taken`` are the names of built-in policies.
    """
    givers: dict[str, list[str]] = {}
    for plugin, names in given.items():
        for name in names:
            givers.setdefault(name, []).append(plugin)
    found: dict[str, str] = {}
    for name, plugins in givers.items():
        if name in taken:
            words = f"it gives a policy {name!r}, and {name!r} is built in: another name is needed"
        elif len(plugins) > 1:
            who = " and ".join(shipped_by[plugin] for plugin in plugins)
            words = f"policy {name!r} is given {len(plugins)} times, by {who}; uninstall all but one"
        else:
            continue
        found |= dict.fromkeys(plugins, words)
    return found


class _Child:
    """One plugin and its child, which is started again when it has died."""

    def __init__(self, plugins: Plugins, plugin: PolicyPlugin, table: Mapping[str, object]) -> None:
        self.plugin, self._plugins, self._table = plugin, plugins, table
        self.policies: dict[str, PluginPolicy] = {}
        #: Its state and why, where it cannot be used.
        self.verdict: tuple[State, str] | None = None
        self._deadline_s, self._wrong = decision_deadline(plugin.name, table)
        self._process: PolicyProcess | None = None
        self._hello = Hello(outcome="failed")

    async def start(self) -> None:
        """Start it and take in which policies it has."""
        if self._wrong:
            self.verdict = "failed", self._wrong
            return
        try:
            process = await self._living()
        except OSError as error:
            self.verdict = "failed", f"no child process can be started for it: {error}"
            return
        self._hello = process.hello
        if process.ended:
            self._count()
            self.verdict = unusable(process.hello, process.ended)
        else:
            self.policies = {one.name: PluginPolicy(self, one.name, one.summary) for one in process.hello.given}

    def tell(self) -> None:
        """Let the host know how it stands. Raises PluginError where that is strict and it cannot be used."""
        state, reason = self.verdict or ("active", "")
        if self.verdict and self._plugins.strict:
            raise PluginError(f"the policy plugin {self.plugin.name}: {reason}")
        self._plugins.note(
            "policy",
            self.plugin.name,
            state=state,
            reason=reason,
            import_seconds=self._hello.import_seconds,
            deprecated=self._hello.deprecated,
        )

    async def decisions(self, policy: str, machines: Sequence[PolicyInput]) -> AsyncIterator[TierDecision | str]:
        """Give a decision for each machine, or why there is none. Raises PluginError for no child to be had again."""
        questions = (Question(policy=policy, deadline_s=self._deadline_s, asked=asked) for asked in machines)
        lines = [msgspec.json.encode(question) + b"\n" for question in questions]
        at, deaths = 0, 0
        while at < len(lines):
            if deaths == MOST_DEATHS:
                yield f"is asked no more: its child has ended {deaths} times"
                at += 1
                continue
            try:
                process, some = await self._living(), lines[at : at + ASKED_AT_ONCE]
            except OSError as error:
                words = f"no child process can be started for the policy plugin {self.plugin.name}: {error}"
                raise PluginError(words) from None
            found = await process.ask(some, self._deadline_s)
            for answer in found:
                yield self._taken(answer)
            at += len(found)
            if process.ended:
                deaths += 1
                self._count()
            if len(found) < len(some):
                yield process.ended
                at += 1

    def _taken(self, answer: Answer) -> TierDecision | str:
        if answer.error:
            self._count()
            return f"failed: {answer.error}"
        return TierDecision(tier=answer.tier, reason=answer.reason)

    async def _living(self) -> PolicyProcess:
        """Return its child, started anew where that has ended; one that cannot be used has ended at once."""
        if self._process is None or not self._process.lives():
            await self.close()
            self._process = await PolicyProcess.start(
                self.plugin.value, self._table, folder=self.plugin.folder, hidden=self._plugins.hidden
            )
        return self._process

    def _count(self) -> None:
        self._plugins.failures.add("policy", self.plugin.name, self.plugin.version)

    async def close(self) -> None:
        """End its child."""
        if self._process is not None:
            await self._process.close()
