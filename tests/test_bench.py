"""Every measurement runs, with parameters so small that its numbers mean nothing; none is judged by its speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
#: Seconds in which the slowest of them must have ended, on a machine that is busy.
WITHIN_S = 90

SCRIPTS = {
    "agent": {"pss_mib", "cpu_percent", "runtime", "targets"},
    "attached": {"cpu_percent", "us_a_line", "targets"},
    "detection": {"wall_s", "slowest_s", "wall_over_slowest", "over_slowest_ms", "detectors"},
    "durable": {"store", "celery", "procrastinate", "fsync_us"},
    "fleet": {"workers", "memory_at_rest", "phases", "memory_per_100_workers", "limit", "targets"},
    "heartbeats": {"floor", "http", "channel", "of_floor"},
    "memory": {"workers", "rss_mib", "mb_per_100"},
    "overhead": {"direct", "pool", "added_p50_ms"},
    "simulation": {"workers", "simulated_s", "ways", "targets"},
    "startup": {"interpreter_s", "first_s", "later_s", "rest_rss_mib"},
}


def run(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"bench.{name}", "--workers", "5", "--seconds", "1", "--json"]
    # Neither peers from a package index nor an engine that happens to run here.
    env = {**os.environ, "RMA_BENCH_PEERS": "none", "DOCKER_HOST": "unix:///nonexistent/docker.sock"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_script_that_make_bench_runs_is_tried_here() -> None:
    assert {path.stem for path in ROOT.glob("bench/[!_]*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - {"fleet"}))
def test_a_measurement_prints_its_keys(name: str) -> None:
    assert run(name).keys() >= SCRIPTS[name]


def test_the_fleet_is_measured_in_every_phase_and_no_call_fails() -> None:
    found = run("fleet")
    assert found.keys() >= SCRIPTS["fleet"]
    assert {name: phase["first_failures"] for name, phase in found["phases"].items()} == {
        "register": [],
        "connect": [],
        "steady": [],
        "joining": [],
    }
    measured = found["phases"]["steady"]["latency"]
    assert {"heartbeat_http", "heartbeat_channel", "admin_workers", "admin_stats"} <= measured.keys()
    assert found["phases"]["register"]["latency"]["register"]["count"] == 5
    assert {"floor", "http", "channel"} <= found["limit"].keys()
