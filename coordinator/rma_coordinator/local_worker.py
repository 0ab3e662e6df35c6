"""The process of the worker that `rma up` runs on this machine: how it is stopped, and how its log stays short."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from typing import TYPE_CHECKING

from rma_coordinator.serving import stopped
from rma_core.commands import common

if TYPE_CHECKING:
    from pathlib import Path

#: Seconds the worker gets on top of those for finishing its tasks (its own setting ``drain_s``), before it is hurried.
LEAVING_S = 10.0
#: Seconds it gets after that to give back what it has and to stop its services, before it is killed.
HURRY_S = 45.0
#: A log of the worker longer than this becomes the old one; looked at so often.
LOG_BYTES, LOG_LOOK_S = 4 * 1024 * 1024, 30.0


async def stop(agent: asyncio.subprocess.Process, *, drain_s: float) -> None:
    """Let the worker finish within its time, then hurry it, then kill it; Ctrl-C goes on to the next of these."""
    patience_s = drain_s + LEAVING_S
    common.say(
        f"Stopping: the worker finishes what it has, {patience_s:.0f} s at most "
        "(Ctrl-C again: it gives that back to the pool) …"
    )
    if await _told_to_stop(agent, patience_s):
        return
    common.say(
        f"The worker gives back what it has and stops its services, {HURRY_S:.0f} s at most "
        "(Ctrl-C again: it is killed) …"
    )
    if await _told_to_stop(agent, HURRY_S):
        return
    common.say("The worker did not stop and is killed.")
    with contextlib.suppress(ProcessLookupError):
        agent.kill()
    await agent.wait()


async def _told_to_stop(agent: asyncio.subprocess.Process, within_s: float) -> bool:
    """Send SIGTERM (the second hurries the agent); say whether it ended in time and before the next Ctrl-C."""
    with contextlib.suppress(ProcessLookupError):
        agent.terminate()
    waiting = {asyncio.create_task(agent.wait()), asyncio.create_task(stopped())}
    try:
        await asyncio.wait(waiting, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
    return agent.returncode is not None


async def ended(agent: asyncio.subprocess.Process, log: Path) -> int:
    """Return the worker's exit code once it has ended; keep its log short until then."""
    while True:
        try:
            return await asyncio.wait_for(agent.wait(), LOG_LOOK_S)
        except TimeoutError:
            await asyncio.to_thread(shorten, log)


def shorten(log: Path) -> None:
    """Make a long log the old one; whoever writes to it goes on at its beginning."""
    if log.exists() and log.stat().st_size > LOG_BYTES:
        shutil.copyfile(log, log.with_name(f"{log.name}.1"))
        # Not renamed: the worker has it open, for appending.
        os.truncate(log, 0)
