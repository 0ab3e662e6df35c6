"""`rma policies` against a real coordinator: what is shown, asked and refused before anything changes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import subprocess
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from bench import _load
from rma_core.commands import effects
from tests.coordinator_process import coordinating
from tests.pools import environment, rma

if TYPE_CHECKING:
    from pathlib import Path

POLICY = '[[tiers]]\ntier = 4\nname = "everyone"\n'
RULES = "[services.notes]\nwanted = 0\nmost = 0\n"


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
        assert shown["images"] == shown["images_unknown"] == sum(row["images"] for row in shown["workers"])
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
    ("command", "text", "done"),
    [
        ("policies activate", POLICY, "file is in force; threshold was."),
        ("services apply", RULES, "The rules are in force; workers that change: 2."),
    ],
)
async def test_who_reads_while_machines_come_is_shown_what_it_comes_to_then_and_asked_anew(
    tmp_path: Path, command: str, text: str, done: str
) -> None:
    file = tmp_path / "file.toml"
    file.write_text(text)
    async with coordinating(tmp_path / "home") as (coordinator, client), asyncio.timeout(60):
        token = (await client.post("/api/admin/tokens", json={"uses": 2})).json()["token"]

        async def join(number: int) -> None:
            machine = _load.Machine(coordinator.url, _load.machines()[number], by_channel=False)
            await machine.register(token)
            await machine.close()

        await join(0)
        ours, theirs = pty.openpty()
        asked = await asyncio.create_subprocess_exec(
            *rma(*command.split(), str(file)), env=environment(tmp_path / "home"), stdin=theirs,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        os.close(theirs)
        try:
            first = await asked.stderr.readuntil(b"[y/N]: ")  # type: ignore[union-attr]  # it is a pipe
            await join(1)
            os.write(ours, b"y\n")
            second = await asked.stderr.readuntil(b"[y/N]: ")  # type: ignore[union-attr]  # it is a pipe
            os.write(ours, b"y\n")
            out, _ = await asked.communicate()
        finally:
            os.close(ours)
        assert b"Workers that change: 1" in first
        assert b"changed since that preview. Nothing was changed; now it comes to this:" in second
        assert b"Workers that change: 2" in second
        assert out.decode() == f"{done}\n"
        assert asked.returncode == 0


@pytest.mark.parametrize(
    ("images", "image_bytes", "unknown", "model_bytes", "words"),
    [
        (0, 0, 0, 0, ""),
        (1, 3 * 2**30, 0, 0, "1 image (3 GiB unpacked)."),
        (5, 3 * 2**30, 1, 2**40, "5 images (3 GiB unpacked, and 1 of unknown size), 1 TiB of models."),
        (2, 0, 2, 0, "2 images (of unknown size)."),
        (0, 0, 0, 2**20, "0 images, 1 MiB of models."),
    ],
)
def test_what_is_to_be_fetched_is_said_with_what_is_known_of_its_size(
    images: int, image_bytes: int, unknown: int, model_bytes: int, words: str
) -> None:
    out = Console(file=(written := io.StringIO()), width=250)
    sizes = {"image_bytes": image_bytes, "images_unknown": unknown, "model_bytes": model_bytes}
    effects.show(out, {"services": [], "images": images, **sizes})
    said = f"To be fetched by these machines, where they lack it: {words}\n" if words else ""
    assert written.getvalue() == said


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
