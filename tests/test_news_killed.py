"""A coordinator that is killed before it has written what it was told: the pool learns it once more."""

from __future__ import annotations

import asyncio
import json
import subprocess
from typing import TYPE_CHECKING

from rma_coordinator.domain.worker_records import WorkerRecord
from rma_coordinator.store import SqliteStore
from tests import crash_kit
from tests.pools import environment, rma

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from tests.crash_kit import Town

#: So often it may happen that all is written just before the end; once in thirty times it is.
TRIES = 4


def write_machine(path: Path, cores: int) -> None:
    path.write_text(json.dumps({"cpu_cores": cores, "ram": "16GB", "storage": "100GB"}))


async def knows(made: Town, cores: int) -> None:
    """Wait until the pool knows that the machine has so many cores."""
    loop = asyncio.get_running_loop()
    end = loop.time() + crash_kit.PATIENCE_S
    async with made.client() as client:
        while True:
            [worker] = (await client.get("/api/admin/workers")).json()["workers"]
            if worker["capabilities"]["cpu_cores"] == cores:
                return
            assert loop.time() < end, made.words()
            await asyncio.sleep(0.05)


async def written_cores(made: Town) -> int:
    """Return what the store of a coordinator that has ended says of the machine."""
    store = SqliteStore(made.home / "coordinator.db")
    await store.open()
    try:
        [record] = await store.load(WorkerRecord)
    finally:
        await store.close()
    return record.report.capabilities.cpu_cores


async def test_a_report_that_was_read_and_not_written_is_told_to_the_next_process(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("n")
    machine = folder / "machine.json"
    write_machine(machine, 8)
    async with crash_kit.town(folder, [None], [{"RMA_FAKE_DEVICES": str(machine)}]) as made:
        env = environment(made.agents_home / "m0")
        for cores in range(9, 9 + TRIES):
            write_machine(machine, cores)
            look = rma("detect", "--rescan", "--json")
            await asyncio.to_thread(subprocess.run, look, env=env, check=True, capture_output=True, timeout=60)
            await knows(made, cores)
            made.stop()
            lost = await written_cores(made) != cores
            made.start()
            await made.ready()
            await knows(made, cores)
            if lost:
                return
        raise AssertionError(f"{TRIES} times it was written in time: nothing was lost that could be told again")
