"""`rma policies` against a real coordinator: what is shown, asked and refused before anything changes."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from bench import _load
from tests.coordinator_process import coordinating
from tests.pools import environment, rma

if TYPE_CHECKING:
    from pathlib import Path

POLICY = '[[tiers]]\ntier = 4\nname = "everyone"\n'


def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    stdin = subprocess.DEVNULL
    return subprocess.run(command, env=env, stdin=stdin, capture_output=True, text=True, timeout=60, check=False)


async def test_a_policy_is_shown_put_in_force_shadowed_and_rolled_back(tmp_path: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "every.toml"
    file.write_text(POLICY)
    async with coordinating(home) as (coordinator, client):
        token = (await client.post("/api/admin/tokens", json={"uses": 1})).json()["token"]
        machine = _load.Machine(coordinator.url, _load.machines()[0], by_channel=False)
        await machine.register(token)
        await machine.close()
        env = environment(home)

        def policies(*arguments: str) -> str:
            done = run(rma("policies", *arguments), env)
            assert done.returncode == 0, done.stderr
            return done.stdout

        shown = json.loads(policies("preview", str(file), "--json"))
        assert (shown["policy"], shown["changes"]) == ("every", 1)
        shadow = policies("shadow", str(file))
        assert machine.worker_id in shadow
        assert "every was asked 1 times" in shadow
        assert "was asked" in policies("shadow", "--off")
        refused = run(rma("policies", "activate", str(file)), env)
        assert refused.returncode == 2
        assert machine.worker_id in refused.stderr
        assert "nobody can be asked here, and nothing was changed" in refused.stderr
        assert policies("activate", str(file), "--yes") == "every is in force; threshold was.\n"
        assert "every is in force since" in policies("list")
        shown_now = policies("show", "every")
        assert 'name = "everyone"' in shown_now
        assert "'every' is in force, 'threshold' was" in shown_now
        assert "GPU memory" in policies("show", "threshold")
        missing = run(rma("policies", "show", "nobody-has-this"), env)
        assert missing.returncode == 6
        done = json.loads(policies("rollback", "--yes", "--json"))
        assert (done["policy"], done["was"]) == ("threshold", "every")
        nothing = run(rma("policies", "rollback", "--yes", "--json"), env)
        assert nothing.returncode == 1
        assert "nothing was before it" in json.loads(nothing.stdout)["error"]["message"]
        stepped = run(rma("policies", "activate", str(file), "--yes", "--canary", "50", "--per-minute", "6"), env)
        assert stepped.returncode == 0
        assert "Workers move in steps" in stepped.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--per-minute", "nan"), "--per-minute is no number"),
        (("--per-minute", "inf"), "--per-minute is no number"),
        (("--canary", "nan"), "--canary is no number"),
        (("--hold", "5"), "--hold is the wait after a canary"),
        (("--canary", "101"), "101"),
        (("--per-minute", "0"), "0"),
    ],
)
def test_steps_that_make_no_sense_are_refused(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = run(rma("policies", "activate", "threshold", *options), environment(tmp_path))
    assert done.returncode == 2
    assert words in done.stderr
