"""`rma tasks`: what the pool works on, and the whole life of one task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import click

from rma_core.commands import common

if TYPE_CHECKING:
    from collections.abc import Iterator


@click.group(invoke_without_command=True)
@common.pool_options
@common.json_option
@click.pass_context
def tasks(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """List tasks that run, wait, or ended lately; `show` tells the whole life of one."""
    ctx.obj = options
    if ctx.invoked_subcommand is not None:
        return
    found = common.pages(options, "/api/admin/tasks", "tasks")
    rows = [
        (
            t["task_id"],
            t["service"],
            t["status"],
            t["attempts"][-1]["worker_id"] if t["attempts"] else "-",
            len(t["attempts"]),
            f"{t['seconds']:.2f} s",
            common.ago(t["created_at"]),
            "; ".join(t["reasons"]),
        )
        for t in found
    ]
    columns = ("task", "service", "status", "worker", "attempts", "took", "ago", "why")
    common.show({"tasks": found}, as_json, common.table(columns, rows, empty="No tasks yet. Try: rma infer notes FILE"))


@tasks.command("show")
@click.argument("task_id")
@common.json_option
@common.pool_options
def tasks_show(task_id: str, as_json: bool, **options: Any) -> None:
    """Show the whole life of a task: who had it when, and what became of that."""
    one = common.call(common.outer(options), "GET", f"/api/admin/tasks/{common.part(task_id)}")
    common.show(one, as_json, lambda out: _print(out, one))


def _print(out: Any, task: dict[str, Any]) -> None:
    for line in life(task):
        out.print(common.safe(line))


class Event(NamedTuple):
    """Something that happened to a task, so many seconds after it came."""

    at: float
    words: str


def life(task: dict[str, Any]) -> Iterator[str]:
    """Yield a task's life in lines, the oldest first."""
    what = f"{task['service']} {task['model']}" if task["model"] else task["service"]
    yield f"{task['task_id']}  {what}, {task['priority']} priority, of {task['key']}: {task['status']}"
    limit = f", to be done within {task['deadline_s']:g} s"
    events = [Event(0.0, f"came at {task['created_at']}, {task['body_bytes']} bytes{limit}"), *_attempts(task)]
    if task.get("waits_for"):
        events.append(Event(0.0, f"waits for {task['waits_for']}, which is busy and will have it done soonest"))
    if task["ended_s"] is not None:
        events.append(Event(task["ended_s"], _end(task)))
    # An end that comes with the last attempt's stands behind it.
    for event in sorted(events, key=lambda event: event.at):
        yield f"  {event.at:+9.3f} s  {event.words}"
    if webhook := task.get("webhook"):
        yield f"  {_webhook(webhook)}"


def _webhook(webhook: dict[str, Any]) -> str:
    tries = f"{webhook['tries']} tries" if webhook["tries"] != 1 else "1 try"
    moment = next((webhook[name] for name in ("delivered_at", "given_up_at", "next_at") if webhook.get(name)), None)
    why = f": {webhook['reason']}" if webhook.get("reason") else ""
    status = {"given_up": "given up", "waiting": "waiting, next"}.get(webhook["status"], webhook["status"])
    return f"its webhook to {webhook['url']}: {status}{f' {moment}' if moment else ''} after {tries}{why}"


def _attempts(task: dict[str, Any]) -> Iterator[Event]:
    for one in task["attempts"]:
        name = f"attempt {one['attempt']}"
        yield Event(one["offered_s"], f"{name} was offered to {one['worker_id']}{_expected(one.get('expected'))}")
        if one["started_s"] is not None:
            model = f", its model {one['model_state']}" if one.get("model_state") else ""
            yield Event(one["started_s"], f"{name} began{model}")
        if one.get("first_byte_s") is not None:
            yield Event(one["first_byte_s"], f"{name}: its answer began")
        if one["ended_s"] is not None:
            yield Event(one["ended_s"], f"{name} {one['status']}" + (f": {one['reason']}" if one["reason"] else ""))


def _expected(parts: dict[str, Any] | None) -> str:
    """Return why a worker was chosen: what the task was expected to take there, and of what that is the sum."""
    if parts is None or not parts["known"]:
        return ""
    shown = {name.removesuffix("_s"): value for name, value in parts.items() if name.endswith("_s") and value}
    total = sum(shown.values()) - 2 * shown.get("saved", 0.0)
    return f" (expected {total:.3g} s: {', '.join(f'{name} {value:.3g}' for name, value in shown.items())})"


def _end(task: dict[str, Any]) -> str:
    status = f", status {task['http_status']}" if task["http_status"] else ""
    why = "" if task["status"] == "succeeded" or not task["reasons"] else f": {task['reasons'][-1]}"
    return f"{task['status']}{status}, {task['answer_bytes']} bytes{why}"
