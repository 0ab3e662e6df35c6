"""Detectors that do their worst in a real pool: each costs its own devices only, and everyone is told which and why."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.plugin_files import distribute
from tests.pools import NO_ENGINE, pool

if TYPE_CHECKING:
    from tests.pools import Pool

BAD = Path(__file__).with_name("data") / "bad_detectors"
#: Detector, the state its probe must have, and words its reason must contain.
WORST = {
    "raises": ("unhealthy", "ZeroDivisionError: no such luck"),
    "hangs": ("unhealthy", "did not answer within"),
    "segfaults": ("unhealthy", "SIGSEGV"),
    "exits_three": ("unhealthy", "exit code 3"),
    "forks": ("undetected", "forked"),
    "leaks": ("unhealthy", "MemoryError"),
    "prints_megabytes": ("healthy", ""),
    "writes": ("unhealthy", "PermissionError"),
    "connects": ("unhealthy", "PermissionError"),
    "patches": ("healthy", ""),
    "returns_a_million": ("unhealthy", "returned 1,000,000 devices"),
    "lies": ("healthy", "device 'memory' was already found by host"),
    "returns_objects": ("unhealthy", ""),
    "returns_nothing": ("unhealthy", "returned nothing"),
    "breaks_on_import": ("unhealthy", ""),
}
#: Those that do anything else but answer what a detector may: each time is counted.
FAIL = {name for name, (state, _) in WORST.items() if state == "unhealthy"} | {"lies"}


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment in which a distribution full of bad detectors is installed, and no service is offered."""
    site = distribute(tmp_path / "site", "rma-detect-worst", {"rma.detectors": {name: name for name in WORST}})
    catalog = tmp_path / "catalog"
    catalog.mkdir()
    path = os.pathsep.join([str(site), str(BAD)])
    settings = tmp_path / "rma.toml"
    # All but one end by themselves, however slow this machine is just now.
    settings.write_text("detect_deadline_s = 120\n[plugins.hangs]\ndeadline_s = 2\n")
    return {**NO_ENGINE, "PYTHONPATH": path, "RMA_CATALOG": str(catalog), "RMA_CONFIG": str(settings)}


def test_the_pool_starts_with_what_works_and_everyone_learns_what_does_not(
    tmp_path_factory: pytest.TempPathFactory, env: dict[str, str]
) -> None:
    with pool(tmp_path_factory.mktemp("worst"), "--port", "0", env=env) as made:
        check_the_admin_sees_it(made)
        check_the_owner_sees_it(made)
        assert not (Path.home() / "was-here").exists()


def check_the_admin_sees_it(made: Pool) -> None:
    [listed] = made.workers()
    assert listed["tier"] is not None or "tier" in listed["tier_reason"]
    shown = made.json("workers", listed["worker_id"])
    probes = {probe["detector"]: probe for probe in shown["hardware"]["probes"]}
    assert probes["host"]["state"] == "healthy"
    for name, (state, words) in WORST.items():
        assert (name, probes[name]["state"]) == (name, state)
        assert words in probes[name]["reason"]
        assert state == "healthy" or probes[name]["reason"]
    # What everybody may learn at once, without asking for each worker: who is not well, and why.
    [unwell] = made.get("/api/admin/plugins")["workers"]
    named = {probe["detector"] for probe in unwell["probes"]}
    assert named == {name for name, (state, _) in WORST.items() if state == "unhealthy"}
    counted = {plugin["name"]: plugin for plugin in unwell["plugins"]}
    assert set(counted) == FAIL
    assert all(counted[name]["failures"] >= 1 and counted[name]["failed_at"] for name in FAIL)
    said = " ".join(made.ask("workers", listed["worker_id"]).stdout.split())
    assert re.search(r"hangs detector active (once|\d+ times), ", said)


def check_the_owner_sees_it(made: Pool) -> None:
    plugins = {plugin["name"]: plugin for plugin in made.json("plugins")["plugins"]}
    # The agent has looked at least once since it started, and this command has just now.
    assert {name for name, plugin in plugins.items() if plugin["failures"] >= 2} == FAIL
    assert {name for name, plugin in plugins.items() if not plugin["failures"]} == set(plugins) - FAIL
    assert plugins["host"]["state"] == "active"
    assert (plugins["breaks_on_import"]["state"], plugins["breaks_on_import"]["distribution"]) == (
        "failed",
        "rma-detect-worst",
    )
    assert plugins["breaks_on_import"]["reason"]
    for name, (state, words) in WORST.items():
        assert state != "unhealthy" or words in plugins[name]["reason"]
        assert bool(plugins[name]["reason"]) == (name in FAIL)
    done = made.ask("doctor", "--json", check=False)
    assert done.returncode == 1
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    for name, (state, words) in WORST.items():
        [about] = [f for f in findings if f["subject"] == f"detector {name}"]
        assert (about["level"] == "problem") == (state == "unhealthy")
        assert words in about["message"]
    assert "Traceback" not in done.stdout + done.stderr
