"""`rma result` and `rma cancel`: what became of a request that was sent with `rma infer --detach`."""

from __future__ import annotations

import sys
from typing import Any

import click

from rma_core.commands import common
from rma_core.commands.infer import stream
from rma_core.errors import CoordinatorError, Refused, TryLater

#: Seconds one call waits for a task's end; the next one follows at once.
ASK_S = 30
#: Seconds between two calls when the coordinator answered at once all the same.
LEAST_PAUSE_S = 1.0


@click.command()
@click.argument("task_id")
@click.option("--wait/--no-wait", default=True, help="Wait until it has ended (default), or say how it stands.")
@common.pool_options
@common.json_option
def result(task_id: str, wait: bool, as_json: bool, **options: Any) -> None:
    """Print the answer to a request that was sent with `rma infer --detach`.

    With --json: the task, with every attempt, and its result when that is small.
    """
    found = _wait(options, task_id) if wait else _ask(options, task_id, 0)
    if as_json:
        common.show(found, as_json, lambda _: None)
        return
    if found["status"] in ("queued", "running"):
        raise TryLater(f"{task_id} is {found['status']}", hints=("rma result TASK_ID waits for its end",))
    if "result_url" in found:
        url = str(found["result_url"])
        if not url.startswith("/api/"):
            # Whoever is named there would be sent the key.
            raise CoordinatorError(f"the coordinator names an address that is not its own: {url}")
        stream(options, "GET", url)
        return
    error = found.get("error") or {}
    raise Refused(f"{task_id} has {found['status']}: {error.get('message', 'no reason known')}")


@click.command()
@click.argument("task_id")
@common.pool_options
@common.json_option
def cancel(task_id: str, as_json: bool, **options: Any) -> None:
    """Cancel a request that was sent with `rma infer --detach`."""
    found = common.call(options, "DELETE", f"/api/inference/tasks/{common.part(task_id)}")
    common.show(found, as_json, lambda out: out.print(common.safe(f"{task_id} is {found['status']}")))


def _ask(options: dict[str, Any], task_id: str, wait_s: int) -> dict[str, Any]:
    path = f"/api/inference/tasks/{common.part(task_id)}"
    found: dict[str, Any] = common.call(options, "GET", path, query={"wait": str(wait_s)})
    return found


def _wait(options: dict[str, Any], task_id: str) -> dict[str, Any]:
    """Ask until the task has ended, and say how it stands whenever that changes."""
    import time

    said = ""
    while True:
        asked = time.monotonic()
        found = _ask(options, task_id, ASK_S)
        if found["status"] not in ("queued", "running"):
            return found
        if found["status"] != said and sys.stderr.isatty():
            said = found["status"]
            common.say(f"{task_id} is {said}")
        time.sleep(max(0.0, LEAST_PAUSE_S - (time.monotonic() - asked)))
