"""Nothing acknowledged is lost when the power goes or the process is killed; and these tests can tell."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import apsw
import pytest

from rma_coordinator.store import Delete, Put, layout, writer
from rma_core.errors import RMAError
from tests.faulty_disk import FaultyDisk
from tests.store_kit import Apple, Pear, opened, small_store, until

if TYPE_CHECKING:
    from rma_coordinator.store import Change, SqliteStore

ROOT = Path(__file__).parent.parent
WRITERS = 4
#: Seconds under `make soak` (RMA_SOAK_S sets another).
LONG_S = 600


class History(NamedTuple):
    """For each writer what its record may be: the last acknowledged number, and one that was tried after it."""

    acknowledged: dict[int, int]
    tried: dict[int, int]


def changes(writer_number: int, number: int, size: int) -> list[Change]:
    """Return a commit over several pages; both its records, and one that comes and goes, tell the same number."""
    key = f"writer-{writer_number}"
    also: Change = Put(key + "-odd", Pear(name=str(number))) if number % 2 else Delete(Pear, key + "-odd")
    return [Put(key, Pear(name=str(number), weight=1)), Put(key, Apple(name=f"{number}:{'x' * size}")), also]


async def work(store: SqliteStore, history: History, seed: int) -> None:
    """Commit until the store fails, or a while."""

    async def one(writer_number: int) -> None:
        rng = random.Random(seed * WRITERS + writer_number)
        start = history.tried[writer_number] + 1
        for number in range(start, start + 40):
            history.tried[writer_number] = number
            await store.commit(changes(writer_number, number, rng.randrange(6000)))
            history.acknowledged[writer_number] = number

    await asyncio.gather(*(one(number) for number in range(WRITERS)), return_exceptions=True)


async def found_wrong(path: Path, history: History) -> str:
    """Return what a history does not allow in a file, empty if it is well."""
    try:
        async with opened(path) as store:
            await store._ask(layout.look_through)
            for number in range(WRITERS):
                key, last = f"writer-{number}", history.acknowledged[number]
                first, second = await store.get(Pear, key), await store.get(Apple, key)
                odd = await store.get(Pear, key + "-odd")
                value = int(first.name) if first else -1
                whole = -1 if second is None else int(second.name.partition(":")[0])
                if value not in {last, *range(last + 1, history.tried[number] + 1)}:
                    return f"lost: {key} is {value}, {last} was acknowledged"
                if whole != value or (odd and int(odd.name)) != (value if value % 2 and value >= 0 else None):
                    return f"half a commit: {key} is {value}, {whole} and {odd}"
    except RMAError as error:
        return f"damaged: {error}"
    return ""


async def after_power_loss(folder: Path, seed: int, *, fail_a_sync: bool = False) -> str:
    """Work, cut the power at a seeded moment, and return what is wrong then."""
    folder.mkdir()  # noqa: ASYNC240 - a test may wait for its disk
    path, rng, disk = folder / "pool.db", random.Random(seed), FaultyDisk(f"power-{folder}")
    history = History(dict.fromkeys(range(WRITERS), -1), dict.fromkeys(range(WRITERS), -1))
    store = small_store(path, vfs=disk.name, check_every_s=0.001)
    try:
        await store.open()
        if fail_a_sync:
            await work(store, history, seed)
            disk.fail[rng.choice(["sync log", "sync log", "sync file"])] = apsw.SQLITE_IOERR_FSYNC
            disk.operations = rng.randrange(2, 30) if rng.random() < 0.7 else rng.randrange(400)
            await work(store, history, seed + 1)
            await until(lambda: store.state.ok or disk.dead)
        else:
            disk.operations = rng.randrange(300)
        await work(store, history, seed + 2)
        disk.dead = True
        await store.close()
        disk.cut_power(rng)
    finally:
        disk.unregister()
    return await found_wrong(path, history)


@pytest.fixture(autouse=True)
def short_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the log be moved into the file, and begin anew, after every few commits."""
    monkeypatch.setattr(writer, "CHECKPOINT_PAGES", 12)


async def test_after_a_power_loss_every_acknowledged_commit_is_there_and_none_by_half(tmp_path: Path) -> None:
    for seed in range(40):
        assert not await after_power_loss(tmp_path / str(seed), seed), f"seed {seed}"


@pytest.mark.parametrize("synchronous", ["OFF", "NORMAL"])
async def test_a_store_that_does_not_sync_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synchronous: str
) -> None:
    lax = tuple(pragma.replace("synchronous = FULL", f"synchronous = {synchronous}") for pragma in layout.PRAGMAS)
    monkeypatch.setattr(layout, "PRAGMAS", lax)
    # Moving the log into the file syncs it too, except with OFF.
    monkeypatch.setattr(writer, "CHECKPOINT_PAGES", 200)
    for seed in range(40):
        if await after_power_loss(tmp_path / str(seed), seed):
            return
    raise AssertionError("this test cannot find a loss")


async def test_after_a_failed_sync_and_a_power_loss_every_acknowledged_commit_is_there(tmp_path: Path) -> None:
    for seed in range(15):
        assert not await after_power_loss(tmp_path / str(seed), seed, fail_a_sync=True), f"seed {seed}"


async def after_a_failed_sync(folder: Path, operations: int) -> str:
    """Fail the sync of one large commit, cut the power so many writes and syncs later, return what is wrong then."""
    folder.mkdir()  # noqa: ASYNC240 - a test may wait for its disk
    path, rng, disk = folder / "pool.db", random.Random(operations), FaultyDisk(f"sync-{folder}")
    history = History(dict.fromkeys(range(WRITERS), -1), dict.fromkeys(range(WRITERS), -1))
    store = small_store(path, vfs=disk.name, check_every_s=0.001)
    try:
        await store.open()
        for number in range(30):
            if number == 3:
                disk.fail["sync log"], disk.operations = apsw.SQLITE_IOERR_FSYNC, operations
            history.tried[0] = number
            try:
                await store.commit(changes(0, number, 20_000 if number == 3 else 50))
            except RMAError:
                await until(lambda: store.state.ok or disk.dead)
            else:
                history.acknowledged[0] = number
        disk.dead = True
        await store.close()
        disk.cut_power(rng)
    finally:
        disk.unregister()
    return await found_wrong(path, history)


async def test_whenever_the_power_goes_after_a_failed_sync_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    for operations in range(8, 48):
        assert not await after_a_failed_sync(tmp_path / str(operations), operations), f"{operations} operations"


async def test_a_store_that_believes_what_it_reads_after_a_failed_sync_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("renew_log", "empty_log"):
        monkeypatch.setattr(layout, name, lambda *_: None)
    for operations in range(18, 60):
        if await after_a_failed_sync(tmp_path / str(operations), operations):
            return
    raise AssertionError("this test cannot find a loss")


@pytest.mark.soak
async def test_power_is_lost_again_and_again(tmp_path: Path) -> None:
    seed = int(os.environ.get("RMA_SEED") or random.randrange(1_000_000))
    logging.disable(logging.ERROR)
    end = time.monotonic() + int(os.environ.get("RMA_SOAK_S") or LONG_S)
    try:
        while time.monotonic() < end:
            folder = tmp_path / str(seed)
            wrong = await after_power_loss(folder, seed, fail_a_sync=bool(seed % 2))
            assert not wrong, f"RMA_SEED={seed}: {wrong}"
            await asyncio.to_thread(shutil.rmtree, folder)
            seed += 1
    finally:
        logging.disable(logging.NOTSET)


# -- kill -9 -------------------------------------------------------------------------------------------------------

#: Commits pairs from several tasks, and says every number once it is acknowledged.
WRITER = """
import asyncio, sys
from pathlib import Path
from rma_coordinator.store import Put
from tests.store_kit import Apple, Pear, opened

async def main(path, name):
    async with opened(Path(path)) as store:
        async def one(task):
            for number in range(100_000):
                key = f"{name}-{task}-{number:06}"
                await store.commit([Put(key, Pear(name=key)), Put(key, Apple(name="x" * (number * 37 % 3000)))])
                print(key, flush=True)
        await asyncio.gather(*(one(task) for task in range(8)))

asyncio.run(main(*sys.argv[1:]))
"""


def killed_after(path: Path, name: str, lines: int) -> list[str]:
    """Run a writer, kill it when it has said so much, and return all that it said."""
    command = [sys.executable, "-c", WRITER, str(path), name]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        said += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL
    # The last line may have been cut by the kill; what is cut was not said.
    return [line.strip() for line in said if line.endswith("\n")]


async def test_what_was_acknowledged_is_there_after_the_process_was_killed_twenty_times(tmp_path: Path) -> None:
    rng, path = random.Random(9), tmp_path / "pool.db"
    said: Counter[str] = Counter()
    for number in range(20):
        said.update(await asyncio.to_thread(killed_after, path, f"round-{number:02}", rng.randrange(1, 400)))
        async with opened(path) as store:
            kept = {pear.name for pear in await store.load(Pear)}
            assert said.keys() <= kept
            assert len(await store.load(Apple)) == len(kept)
    assert max(said.values()) == 1
