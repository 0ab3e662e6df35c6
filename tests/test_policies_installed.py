"""A policy plugin that pip installs while a real coordinator runs: found, put in force, followed, refused."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench import _load
from tests import coordinator_process
from tests.coordinator_fixtures import until
from tests.coordinator_process import coordinating
from tests.policy_plugins import BROKEN, children, source
from tests.pools import environment, runs

if TYPE_CHECKING:
    from rma_core.http import AsyncClient

PROJECT = """
[project]
name = "rma-policy-night"
version = "{version}"

[project.entry-points."rma.policies"]
night = "rma_policy_night"

[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[tool.setuptools]
py-modules = ["rma_policy_night"]
"""


def run(*command: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Python of an environment of its own, which sees this one's packages; coordinators run with it."""
    venv.create(tmp_path / "env", with_pip=False)
    paths = {"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    here = sysconfig.get_path("purelib")
    (site / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    found = tmp_path / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    monkeypatch.setattr(coordinator_process, "rma", lambda *arguments: [str(found), "-m", "rma_core", *arguments])
    return found


def install(python: Path, folder: Path, version: str, code: str) -> None:
    """Build a version's wheel and have pip install it in place of another."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT.format(version=version))
    (folder / "rma_policy_night.py").write_text(code)
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "-q")
    done = run(*pip, "--no-deps", "--no-index", "--no-build-isolation", folder)
    assert done.returncode == 0, done.stderr


async def tiers(client: AsyncClient) -> set[int | None]:
    workers = (await client.get("/api/admin/workers?limit=1000")).json()["workers"]
    return {worker["tier"] for worker in workers}


async def test_pip_installs_it_while_the_coordinator_runs(tmp_path: Path, python: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "rma.toml").write_text('approve_plugins = ["another"]\n')
    async with coordinating(home) as (coordinator, client):
        token = (await client.post("/api/admin/tokens", json={"uses": 5})).json()["token"]
        for report in _load.machines()[:5]:
            machine = _load.Machine(coordinator.url, report, by_channel=False)
            await machine.register(token)
            await machine.close()
        before, env = await tiers(client), environment(home)

        def rma(*arguments: str, code: int = 0) -> str:
            done = run(python, "-m", "rma_core", "policies", *arguments, env=env)
            assert done.returncode == code, done.stdout + done.stderr
            return done.stdout + done.stderr

        install(python, tmp_path / "1.0", "1.0", source(tier=7, version="1.0"))
        assert "not approved yet: add 'night'" in " ".join(rma("rescan").split())
        # The admin need not restart the coordinator for that either.
        (home / "rma.toml").write_text('approve_plugins = ["night"]\n')
        assert json.loads(rma("rescan", "--json"))["new"] == [{"name": "night", "version": "1.0"}]
        assert json.loads(rma("preview", "night", "--json"))["changes"] == 5
        assert await tiers(client) == before
        assert "night 1.0 is in force; threshold was." in rma("activate", "night", "--yes")
        assert await tiers(client) == {7}

        install(python, tmp_path / "1.1", "1.1", source(tier=8, version="1.1"))
        shown = " ".join(rma("rescan").split())
        assert "night 1.1 changed 1.0 was before" in shown
        assert "night 1.0 stays in force" in shown
        assert await tiers(client) == {7}
        assert "night 1.1 is in force; night 1.0 was." in rma("activate", "night", "--yes")
        assert await tiers(client) == {8}

        install(python, tmp_path / "1.2", "1.2", BROKEN)
        assert "cannot be imported" in " ".join(rma("rescan").split())
        assert "'night' cannot be used: rma-policy-night 1.2 is failed" in rma("activate", "night", "--yes", code=1)
        listed = " ".join(rma("list").split())
        assert "night 1.1 active" in listed
        words = "cannot be imported: module 'a_module_that_nobody_has'"
        assert re.search(rf"night 1\.2 failed once, \d+ s ago {words}", listed)
        assert await tiers(client) == {8}

        (home / "rma.toml").write_text("approve_plugins = 5\n")
        assert "plugins cannot be taken in" in rma("rescan", code=1)
        assert "night 1.0 is in force; night 1.1 was." in rma("rollback", "--yes")
        assert await tiers(client) == {7}
        assert "night 1.0 (in force): for tests" in rma("show", "night")
        pid = coordinator.process.pid
        assert len(children(pid)) == 2
        living = children(pid)
        coordinator.kill()
        await until(lambda: not any(map(runs, living)))


async def test_a_coordinator_that_is_stopped_or_killed_leaves_no_child(tmp_path: Path, python: Path) -> None:
    home, flag = tmp_path / "home", tmp_path / "hangs"
    home.mkdir()
    table = f'approve_plugins = ["night"]\ntier_policy = "night"\n[plugins.night]\nhangs = "{flag}"\ndeadline_s = 1\n'
    (home / "rma.toml").write_text(table)
    install(python, tmp_path / "1.0", "1.0", source())

    async def living(client: AsyncClient, pid: int) -> list[Any]:
        await client.post("/api/admin/policies/preview", json={"reports": [{"cpu_cores": 8, "ram": "16GB"}]})
        found: list[Any] = await until(lambda: children(pid))
        return found

    async with coordinating(home) as (coordinator, client):
        stopped = await living(client, coordinator.process.pid)
    await until(lambda: not any(map(runs, stopped)))
    async with coordinating(home) as (coordinator, client):
        killed = await living(client, coordinator.process.pid)
        flag.touch()
        # One that hangs at that moment sees no end of its input.
        new = {"policy": "night", "reports": [{"cpu_cores": 9, "ram": "16GB"}]}
        asking = asyncio.create_task(client.post("/api/admin/policies/preview", json=new))
        # It sleeps, and has not for as long as the deadline.
        await until(lambda: killed[0].num_threads() > 1)
        coordinator.kill()
        asking.cancel()
        await asyncio.wait({asking})
    await until(lambda: not any(map(runs, killed)))
