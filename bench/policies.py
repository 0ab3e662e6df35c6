"""Another tier policy for 1,000 live workers: how long a preview takes, and what the swap costs those who use the pool.

Real machines' reports join a real coordinator with SQLite, on its own core. While requests for every service come all
the time, a policy is previewed, put in force in steps (a canary, a hold, so many a minute), and rolled back: no request
fails, and nobody changes tier but whom the preview named. Then the same with rules of placement, put in force and taken
back. The same policy as a plugin is previewed too: from a child,
once when that must be started and asked about everyone, then when it has been. Then, without a pool, how long a policy
takes for fleets of up to a hundred times as many. ``--seconds`` is about how long the steps take.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import _common, _load
from bench._common import Target
from bench._idle import Idler, idling, kinds, request
from bench._wire import Connection
from rma_coordinator.server import run
from rma_core.builtin.threshold import rma_tier_policies
from rma_core.interfaces import PolicyInput
from rma_core.policy_file import read_policy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from bench._common import Options, Server

#: Requests a second, for one service after the other.
PER_S = 40.0
#: Share of those that change which go first, and seconds until the others follow, as a share of ``--seconds``.
CANARY, HOLD = 0.1, 0.1
#: Previews that are timed.
PREVIEWS = 5
#: Seconds until a step must have been taken, and between looks.
PATIENCE_S, LOOK_S = 300.0, 0.2
#: Fleets without a pool, as multiples of the live one.
FLEETS = (1, 10, 100)
#: Rules of placement under which half of the fleet may have a service that all have.
RULES = """
strategy = "spread"

[services.{service}]
most = {most}
over = "site"
"""
#: The bar: seconds for a preview of the live fleet.
PREVIEW_S = 2.0
#: Fewer cores are needed than by default, and large machines are in a tier of their own.
POLICY = """
summary = "for a measurement"

[[tiers]]
tier = 1
name = "many cores"
cpu_cores = 12

[[tiers]]
tier = 2
name = "some"
cpu_cores = 2
ram = "3GB"

[[tiers]]
tier = 3
name = "the rest"
"""
#: The same as an installed plugin.
PLUGIN = f"""
from rma_core import hookimpl
from rma_core.policy_file import read_policy

@hookimpl
def rma_tier_policies(config):
    return [read_policy({POLICY!r}, name="bench", subject="the plugin")]
"""


def main() -> int:
    asked = _common.options(__doc__)
    served, loading = _common.split_cores()
    result: dict[str, Any] = {"workers": asked.workers}
    with tempfile.TemporaryDirectory(prefix="rma-bench-") as name:
        catalog = _load.write_catalog(Path(name) / "catalog")
        env = {"RMA_MAX_CHANNELS": str(2 * asked.workers), "PYTHONPATH": str(_plugin(Path(name) / "plugin"))}
        arguments = ("--catalog", str(catalog), "--log-level", "warning")
        with (
            _common.coordinator(Path(name) / "home", cores=served, arguments=arguments, env=env) as server,
            _common.pinned(loading),
        ):

            async def measure() -> int:
                workers = [Idler(server.url, report) for report in kinds(asked.workers)]
                async with idling(workers, partial(_load.join_token, server)):
                    result.update(await _swapped(asked, server, workers))
                return 0

            run(measure())
    result["fleets"] = {str(times * asked.workers): _decided(times * asked.workers) for times in FLEETS}
    return _common.show(result, _lines(result), _targets(result), asked)


def _plugin(folder: Path) -> Path:
    """Leave what pip would of the plugin."""
    information = folder / "rma_policy_bench-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: rma-policy-bench\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[rma.policies]\nbench = rma_policy_bench\n")
    (folder / "rma_policy_bench.py").write_text(PLUGIN)
    return folder


async def _swapped(asked: Options, server: Server, workers: Sequence[Idler]) -> dict[str, Any]:
    async def open_all() -> bool:
        return all(worker.open for worker in workers)

    await _until(open_all)
    services = sorted({service for worker in workers for service in worker.slots})
    admin = Connection(server.url, server.key)
    tiers = await _tiers(admin)
    measured, stop = _load.Measured(), asyncio.Event()
    load = asyncio.create_task(_requests(server, services, measured, stop))
    try:
        body = {"policy": "many", "file": POLICY}
        previews = [await _timed(admin, "POST", "/api/admin/policies/preview", body) for _ in range(PREVIEWS)]
        plan = previews[-1][1]
        from_child = [
            await _timed(admin, "POST", "/api/admin/policies/preview", {"policy": "bench"}) for _ in range(PREVIEWS)
        ]
        child_mib = sum(_common.memory(child)["pss_mib"] for child in server.process.children())
        named = {row["worker_id"]: row["to"] for row in plan["workers"] if row["changes"]}
        steps = {
            "canary": CANARY,
            "hold_s": HOLD * asked.seconds,
            "per_minute": max(1.0, len(named) / asked.seconds * 60),
        }
        took, _ = await _timed(
            admin, "PUT", "/api/admin/policies/active", {**body, "plan": plan["plan"], "steps": steps}
        )
        began = time.perf_counter()
        await _settled(admin)
        moved_s, moved = time.perf_counter() - began, await _tiers(admin)
        began = time.perf_counter()
        await admin.json("POST", "/api/admin/policies/rollback", {})
        await _settled(admin)
        back_s, back = time.perf_counter() - began, await _tiers(admin)
        ruled = await _ruled(admin)
    finally:
        stop.set()
        await load
        admin.close()
    changed = {name: tier for name, tier in moved.items() if tiers[name] != tier}
    return {
        "preview_s": [round(seconds, 3) for seconds, _ in previews],
        "plugin_preview_s": [round(seconds, 3) for seconds, _ in from_child],
        "plugin_differs": len({*_said(plan)} ^ {*_said(from_child[-1][1])}),
        "child_pss_mib": round(child_mib, 1),
        "activation_s": round(took, 3),
        "changes": len(named),
        "steps_s": round(moved_s, 1),
        "rollback_s": round(back_s, 1),
        "surprises": len(changed.items() ^ named.items()),
        **ruled,
        "not_back": sum(tier != tiers[name] for name, tier in back.items()),
        "latency": measured.table(),
        "failures": len(measured.failures),
        "first_failures": measured.failures[:3],
    }


async def _ruled(admin: Connection) -> dict[str, Any]:
    """Put rules in force under which half as many have the commonest service, and take them back."""
    listed = (await admin.json("GET", "/api/admin/services"))["services"]
    most, service = max((one["assigned"] // 2, one["service"]) for one in listed)
    body = {"file": RULES.format(service=service, most=most)}
    previews = [await _timed(admin, "POST", "/api/admin/placement/preview", body) for _ in range(PREVIEWS)]
    plan = previews[-1][1]
    apply_s, applied = await _timed(admin, "PUT", "/api/admin/placement", {**body, "plan": plan["plan"]})
    found = await admin.json("GET", f"/api/admin/services/{service}")
    await admin.json("PUT", "/api/admin/placement", {"file": ""})
    return {
        "rules_preview_s": [round(seconds, 3) for seconds, _ in previews],
        "rules_apply_s": round(apply_s, 3),
        "rules_change": applied["changes"],
        "rules_surprises": len(applied["workers"]) - len(plan["workers"]) + abs(found["assigned"] - most),
    }


def _said(plan: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    """Yield what a preview says of each worker."""
    yield from ((row["worker_id"], row["to"], row["reason"]) for row in plan["workers"])


async def _requests(server: Server, services: Sequence[str], measured: _load.Measured, stop: asyncio.Event) -> None:
    """Ask for every service in turn until told to stop, each on a connection of its own."""

    async def ask(service: str) -> None:
        client = Connection(server.url, server.key)
        try:
            await client.call("POST", *request(service))
        finally:
            client.close()

    async def ask_next(number: int) -> None:
        await ask(services[number % len(services)])

    while not stop.is_set():
        # A round of all services at a time.
        seconds = len(services) / PER_S
        await _load.run_schedule(_load.every(PER_S, seconds, "request", ask_next), measured)


async def _timed(admin: Connection, method: str, path: str, body: Mapping[str, object]) -> tuple[float, Any]:
    began = time.perf_counter()
    answer = await admin.json(method, path, body)
    return time.perf_counter() - began, answer


async def _tiers(admin: Connection) -> dict[str, int | None]:
    """Return every worker's tier."""
    found, after = dict[str, int | None](), ""
    while True:
        page = await admin.json("GET", f"/api/admin/workers?limit=1000{after}")
        found |= {worker["worker_id"]: worker["tier"] for worker in page["workers"]}
        if not page["next"]:
            return found
        after = f"&after={page['next']}"


async def _settled(admin: Connection) -> None:
    async def done() -> bool:
        return (await admin.json("GET", "/api/admin/policies"))["moving"] is None

    await _until(done)


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():  # noqa: ASYNC110 - looking is all that is done
            await asyncio.sleep(LOOK_S)


def _decided(size: int) -> dict[str, float]:
    """Return how long two policies take for so many reports, in seconds."""
    fleet = [
        PolicyInput(report=report, worker_id=f"worker-{n:08x}")
        for n, report in enumerate(islice(cycle(_load.machines()), size))
    ]
    policies = {"threshold": next(iter(rma_tier_policies({}))), "a file": read_policy(POLICY, name="many", subject="")}
    found = {}
    for name, policy in policies.items():
        began = time.perf_counter()
        for asked in fleet:
            policy.decide(asked)
        found[name] = round(time.perf_counter() - began, 3)
    return found


def _targets(result: dict[str, Any]) -> list[Target]:
    return [
        Target("a preview of the live fleet, s", max(result["preview_s"]), PREVIEW_S),
        Target("a preview of a plugin's policy, s", max(result["plugin_preview_s"]), PREVIEW_S),
        Target("workers of which the plugin says something else", result["plugin_differs"], 1),
        Target("a preview of rules, s", max(result["rules_preview_s"]), PREVIEW_S),
        Target("workers that rules moved unnamed, or copies beside the most", abs(result["rules_surprises"]), 1),
        Target("failed requests", result["failures"], 1),
        Target("workers that moved unnamed, or did not move", result["surprises"], 1),
        Target("workers that were not moved back", result["not_back"], 1),
    ]


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{result['workers']} workers, {result['changes']} of which change: a preview takes "
        f"{min(result['preview_s'])} to {max(result['preview_s'])} s, putting it in force {result['activation_s']} s, "
        f"its steps {result['steps_s']} s, a rollback {result['rollback_s']} s"
    )
    first, *later = result["plugin_preview_s"]
    yield (
        f"the same policy as a plugin: {first} s for the first preview, {min(later)} to {max(later)} s for others; "
        f"its child has {result['child_pss_mib']} MiB (PSS)"
    )
    yield (
        f"rules that change {result['rules_change']}: a preview takes {min(result['rules_preview_s'])} to "
        f"{max(result['rules_preview_s'])} s, putting them in force {result['rules_apply_s']} s"
    )
    for row in result["latency"].values():
        points = "  ".join(f"{point} {row[f'{point}_ms']:.2f}" for point in ("p50", "p95", "p99", "max"))
        yield f"meanwhile {row['count']} requests: {points} ms; {result['failures']} failed"
    yield from (f"    {failure}" for failure in result["first_failures"])
    for size, found in result["fleets"].items():
        yield f"{size} reports: " + ", ".join(f"{name} {seconds} s" for name, seconds in found.items())


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        raise SystemExit(main())
