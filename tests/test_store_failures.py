"""What the store does when its disk is full, fails, is read-only, hangs or lies: a clear state, and nothing lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import resource
from typing import TYPE_CHECKING

import apsw
import pytest

from rma_coordinator.store import Put, SqliteStore, StoreFailed, disk, layout, writer
from rma_core.errors import OutOfSpace, RMAError, SettingProblem
from tests.faulty_disk import FaultyDisk
from tests.store_kit import KIB, MIB, Pear, disk_of, opened, read_only, small_store, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_numbers = itertools.count()


@pytest.fixture
def faulty() -> Iterator[FaultyDisk]:
    made = FaultyDisk(f"faulty-{next(_numbers)}")
    yield made
    made.hold.set()
    made.unregister()


@pytest.fixture
def short_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the log be moved into the file after every few commits."""
    monkeypatch.setattr(writer, "CHECKPOINT_PAGES", 8)


def pear(name: str, size: int = 0) -> Put:
    return Put(name, Pear(name=name + "x" * size))


async def names(store: SqliteStore) -> list[str]:
    return [found.name.rstrip("x") for found in await store.load(Pear)]


def transitions(caplog: pytest.LogCaptureFixture) -> list[str]:
    actions = [getattr(record, "action", "") for record in caplog.records]
    return [action for action in actions if action in {"store_ill", "store_well"}]


# -- a full disk ---------------------------------------------------------------------------------------------------


def fill(folder: Path) -> Path:
    """Take all the space there is."""
    filling = folder / "filling"
    with contextlib.suppress(OSError), filling.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4 * KIB))
    return filling


async def test_a_full_disk_refuses_new_work_lets_ends_through_and_is_recovered_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with disk_of(tmp_path / "disk", "8m") as folder:
        async with opened(folder / "pool.db", reserve_bytes=MIB) as store:
            await store.commit([pear("kept")])
            filling = fill(folder)
            with pytest.raises(OutOfSpace, match="is full") as refused:
                await store.commit([pear("large", 100 * KIB)])
            assert "free some space" in refused.value.hints[0]
            assert (store.state.ok, store.state.code) == (False, "full")
            with pytest.raises(OutOfSpace, match="is full"):
                await store.commit([pear("new work")])
            assert (folder / "pool.db.reserve").exists()
            # The ends of what runs are written, and what was written can be read.
            await asyncio.gather(*(store.commit([pear(f"end {n}")], urgent=True) for n in range(9)))
            assert not (folder / "pool.db.reserve").exists()
            assert await store.get(Pear, "end 3") is not None
            filling.unlink()
            await until(lambda: store.state.ok)
            assert (folder / "pool.db.reserve").stat().st_size == MIB
            await store.commit([pear("more")])
        assert transitions(caplog) == ["store_ill", "store_well"]
        async with opened(folder / "pool.db") as again:
            assert await names(again) == [*(f"end {n}" for n in range(9)), "kept", "more"]


async def test_a_disk_that_stays_full_refuses_even_ends_in_the_end_and_keeps_all_it_acknowledged(
    tmp_path: Path,
) -> None:
    with disk_of(tmp_path / "disk", "8m") as folder:
        async with opened(folder / "pool.db", reserve_bytes=512 * KIB) as store:
            filling, kept = fill(folder), 0
            with contextlib.suppress(OutOfSpace):
                while kept < 1000:
                    await store.commit([pear(f"{kept:04}", 8 * KIB)], urgent=True)
                    kept += 1
            assert 20 < kept < 1000
            # A little is free, but not enough to begin new work.
            with filling.open("r+b") as file:
                file.truncate(filling.stat().st_size - 300 * KIB)
            await store.commit([pear("small end")], urgent=True)
            with pytest.raises(OutOfSpace):
                await store.commit([pear("new work")])
        filling.unlink()
        async with opened(folder / "pool.db", reserve_bytes=0) as again:
            assert await names(again) == [*(f"{n:04}" for n in range(kept)), "small end"]


@pytest.mark.usefixtures("short_log")
async def test_a_log_that_cannot_be_moved_into_the_file_is_a_full_disk(tmp_path: Path, faulty: FaultyDisk) -> None:
    async with opened(tmp_path / "pool.db", vfs=faulty.name, check_every_s=3600) as store:
        faulty.failing["write file"] = apsw.SQLITE_FULL
        for number in range(30):
            with contextlib.suppress(OutOfSpace):
                await store.commit([pear(f"{number:02}")], urgent=True)
        assert store.state.code == "full"
        faulty.failing.clear()
        assert await names(store) == [f"{n:02}" for n in range(30)]
    async with opened(tmp_path / "pool.db") as again:
        assert await names(again) == [f"{n:02}" for n in range(30)]


# -- a disk that fails ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_log")
@pytest.mark.parametrize(
    ("operation", "code"),
    [
        ("sync log", apsw.SQLITE_IOERR_FSYNC),
        ("write log", apsw.SQLITE_IOERR_WRITE),
        ("sync file", apsw.SQLITE_IOERR_FSYNC),
        ("write file", apsw.SQLITE_IOERR_WRITE),
    ],
)
async def test_after_a_failure_the_file_is_opened_anew_with_all_that_was_acknowledged_and_nothing_else(
    tmp_path: Path, faulty: FaultyDisk, caplog: pytest.LogCaptureFixture, operation: str, code: int
) -> None:
    caplog.set_level(logging.INFO)
    kept: list[str] = []
    async with opened(tmp_path / "pool.db", vfs=faulty.name) as store:
        connection = store._writer._connection
        for number in range(20):
            if number == 10:
                faulty.fail[operation] = code
            try:
                await store.commit([pear(f"{number:02}")])
            except StoreFailed as error:
                assert error.hints  # noqa: PT017 - that it fails at all depends on when the log is moved
            else:
                kept.append(f"{number:02}")
            await until(lambda: store.state.ok)
        await until(lambda: not faulty.fail)
        await until(lambda: store._writer._connection not in {None, connection})
        assert await names(store) == kept
        assert len(kept) >= 19
        assert transitions(caplog) == ["store_ill", "store_well"]
    async with opened(tmp_path / "pool.db") as again:
        assert await names(again) == kept


@pytest.mark.parametrize("operations", [("write", "sync"), ("write log",), ("sync log",), ("open",)])
async def test_while_a_disk_fails_everything_is_refused_and_when_it_is_well_work_goes_on(
    tmp_path: Path, faulty: FaultyDisk, caplog: pytest.LogCaptureFixture, operations: tuple[str, ...]
) -> None:
    caplog.set_level(logging.INFO)
    looks: list[float] = []
    opens = layout.connect

    def connect(path: Path, *, create: bool, vfs: str | None = None) -> apsw.Connection:
        looks.append(0)
        return opens(path, create=create, vfs=vfs)

    async with opened(tmp_path / "pool.db", vfs=faulty.name, check_every_s=0.02) as store:
        await store.commit([pear("kept")])
        faulty.fail = {"sync log": apsw.SQLITE_IOERR_FSYNC}
        faulty.failing = dict.fromkeys(operations, apsw.SQLITE_IOERR)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "connect", connect)
            with pytest.raises(StoreFailed, match=r"pool\.db cannot be read or written") as refused:
                await store.commit([pear("lost")])
            assert "opened again every 0.02 s" in refused.value.hints[0]
            await until(lambda: len(looks) > 3)
        for call in (store.commit([pear("lost")]), store.commit([pear("lost")], urgent=True), store.get(Pear, "kept")):
            with pytest.raises(StoreFailed, match="cannot be read or written"):
                await call
        with pytest.raises(StoreFailed, match="cannot be read or written"):
            await store.backup(tmp_path / "copy.db")
        # The folder stays this coordinator's all the while.
        with pytest.raises(SettingProblem, match="another coordinator"):
            await small_store(tmp_path / "pool.db").open()
        faulty.failing.clear()
        await until(lambda: store.state.ok)
        assert await names(store) == ["kept"]
        await store.commit([pear("more")])
    assert transitions(caplog) == ["store_ill", "store_well"]


async def test_a_failed_read_is_a_failed_disk(tmp_path: Path, faulty: FaultyDisk) -> None:
    async with opened(tmp_path / "pool.db", vfs=faulty.name) as store:
        for number in range(40):
            await store.commit([pear(f"{number:02}", 200 * KIB)])
        faulty.fail["read"] = apsw.SQLITE_IOERR_READ
        with pytest.raises(StoreFailed, match="cannot be read or written"):
            await store.load(Pear)
        await until(lambda: store.state.ok)
        assert len(await store.load(Pear)) == 40


async def test_a_file_that_is_gone_or_exchanged_while_it_was_closed_is_not_taken_for_the_old_one(
    tmp_path: Path, faulty: FaultyDisk
) -> None:
    async with opened(tmp_path / "other.db") as other:
        await other.commit([pear("another pool's")])
    path, away = tmp_path / "pool.db", tmp_path / "away.db"
    async with opened(path, vfs=faulty.name, check_every_s=0.02) as store:
        await store.commit([pear("kept")])
        faulty.failing["sync"] = apsw.SQLITE_IOERR_FSYNC
        with pytest.raises(StoreFailed):
            await store.commit([pear("lost")])
        await until(lambda: store._writer._connection is None)
        reasons = [store.state.reason]
        path.rename(away)
        (tmp_path / "pool.db-wal").rename(tmp_path / "away.db-wal")
        faulty.failing.clear()
        await until(lambda: store.state.reason != reasons[0])
        assert not path.exists()
        (tmp_path / "other.db").rename(path)
        await until(lambda: "no longer the file it was" in store.state.reason)
        path.rename(tmp_path / "other.db")
        (tmp_path / "away.db-wal").rename(tmp_path / "pool.db-wal")
        away.rename(path)
        await until(lambda: store.state.ok)
        assert await names(store) == ["kept"]


async def test_a_log_without_its_file_is_not_thrown_away(tmp_path: Path, faulty: FaultyDisk) -> None:
    store = small_store(tmp_path / "pool.db", vfs=faulty.name)
    await store.open()
    await store.commit([pear("kept")])
    faulty.dead = True
    with pytest.raises(StoreFailed):
        await store.commit([pear("lost")])
    await store.close()
    (tmp_path / "pool.db").rename(tmp_path / "away.db")
    with pytest.raises(StoreFailed, match=r"pool\.db-wal is there, but .*pool\.db, which it belongs to, is not"):
        await small_store(tmp_path / "pool.db").open()
    (tmp_path / "away.db").rename(tmp_path / "pool.db")
    async with opened(tmp_path / "pool.db") as again:
        assert (await names(again))[0] == "kept"


async def test_a_disk_that_hangs_is_said_and_nobody_waits_for_ever(
    tmp_path: Path, faulty: FaultyDisk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with opened(tmp_path / "pool.db", vfs=faulty.name, watch_s=0.02) as store:
        faulty.hold.clear()
        waiting = asyncio.create_task(store.commit([pear("late")]))
        await until(lambda: not store.state.ok)
        assert store.state.code == "stalled"
        with pytest.raises(StoreFailed, match="has not answered"):
            await store.commit([pear("new work")])
        end, asked = asyncio.create_task(store.commit([pear("end")], urgent=True)), store.get(Pear, "late")
        with pytest.raises(StoreFailed, match="not known what it has kept"):
            await asyncio.wait_for(waiting, 20)
        with pytest.raises(StoreFailed, match="not known"):
            await asyncio.wait_for(asked, 20)
        faulty.hold.set()
        await until(lambda: store.state.ok)
        with contextlib.suppress(StoreFailed):
            await end
        assert await names(store) == ["end", "late"]
    assert transitions(caplog) == ["store_ill", "store_well"]


async def test_without_file_descriptors_commits_go_on_and_a_backup_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path / "pool.db") as store:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        await store.commit([pear("before")])
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            for number in range(10):
                await store.commit([pear(str(number))])
            with pytest.raises(StoreFailed, match="no backup was made") as refused:
                await store.backup(tmp_path / "copy.db")
            assert "open files" in str(refused.value)
            assert len(await names(store)) == 11
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await store.backup(tmp_path / "copy.db")
        assert store.state.ok


# -- a disk that cannot be written ---------------------------------------------------------------------------------


async def test_a_read_only_folder_or_file_is_said_at_the_start(tmp_path: Path) -> None:
    async with opened(tmp_path / "pool.db") as store:
        await store.commit([pear("kept")])
    for place in (tmp_path, tmp_path / "pool.db"):
        with read_only(place):
            made = small_store(tmp_path / "pool.db")
            with pytest.raises(StoreFailed, match=r"pool\.db cannot be written: .* read-only") as refused:
                await made.open()
            assert refused.value.hints
            assert (made.state.ok, made.state.code) == (False, "read_only")
    async with opened(tmp_path / "pool.db") as store:
        assert await names(store) == ["kept"]


async def test_a_disk_that_turns_read_only_is_said_and_used_again_once_it_can_be_written(
    tmp_path: Path, faulty: FaultyDisk
) -> None:
    async with opened(tmp_path / "pool.db", vfs=faulty.name, check_every_s=0.02) as store:
        await store.commit([pear("kept")])
        # As with `errors=remount-ro`: first a write fails, then the whole disk is read-only.
        faulty.failing["write"] = apsw.SQLITE_IOERR_WRITE
        with pytest.raises(StoreFailed):
            await store.commit([pear("lost")])
        with read_only(tmp_path):
            faulty.failing.clear()
            await until(lambda: store.state.code == "read_only")
            with pytest.raises(StoreFailed, match="read-only"):
                await store.commit([pear("lost")], urgent=True)
        await until(lambda: store.state.ok)
        await store.commit([pear("more")])
        assert await names(store) == ["kept", "more"]


# -- a damaged file ------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def whole_garbage(path: Path) -> None:
    path.write_bytes(b"this is no database at all, but it is long enough to be looked at" * 100)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cut_in_half(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def a_flipped_page_head(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(2 * 4096)
        file.write(os.urandom(64))


def a_wrong_head(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"SQLite format 9")


@pytest.mark.parametrize("damage", [whole_garbage, a_folder, cut_in_half, a_flipped_page_head, a_wrong_head])
async def test_a_damaged_file_is_named_at_the_start_and_left_as_it_is(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "pool.db"
    async with opened(path) as store:
        await store.commit([pear(str(n), 700) for n in range(300)])
        await store.backup(tmp_path / "yesterday.db")
    damage(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StoreFailed, match=r"pool\.db") as refused:
        await small_store(path).open()
    assert refused.value.hints
    if before:
        assert path.read_bytes() == before
        assert f"the newest known is {tmp_path / 'yesterday.db'}" in refused.value.hints[0]
        assert "pool.db-wal" in refused.value.hints[0]
        # What the hint says helps.
        path.rename(tmp_path / "damaged.db")
        (tmp_path / "yesterday.db").rename(path)
        async with opened(path) as again:
            assert len(await names(again)) == 300


async def test_bytes_flipped_anywhere_are_an_error_that_is_expected_or_harmless(tmp_path: Path) -> None:
    rng = random.Random(4)
    async with opened(tmp_path / "whole.db") as store:
        await store.commit([pear(str(n), 300) for n in range(200)])
    whole, told = (tmp_path / "whole.db").read_bytes(), 0
    for number in range(40):
        path = tmp_path / f"{number}.db"
        content = bytearray(whole)
        for _ in range(20):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        made = small_store(path)
        try:
            await made.open()
            await made.load(Pear)
            await made.commit([pear("more")])
        except RMAError as error:
            told += 1
            assert str(path) in error.message  # noqa: PT017 - a flip in a name is nobody's to see
        await made.close()
    assert told > 20


async def test_a_file_damaged_while_it_is_used_is_touched_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pool.db"
    async with opened(path) as store:
        for number in range(60):
            await store.commit([pear(f"{number:02} {part:03}", 900) for part in range(150)])
    async with opened(path) as store:
        with path.open("r+b") as file:
            for page in range(3, path.stat().st_size // 4096):
                file.seek(page * 4096)
                file.write(os.urandom(100))
        with pytest.raises(StoreFailed, match=r"pool\.db is damaged") as refused:
            await store.load(Pear)
        assert "put a backup back" in refused.value.hints[0]
        assert store.state.code == "damaged"
        before = contents(tmp_path)
        for call in (store.commit([pear("a")], urgent=True), store.get(Pear, "a"), store.load(Pear)):
            with pytest.raises(StoreFailed, match="is damaged"):
                await call
        with pytest.raises(StoreFailed, match="is damaged"):
            await store.backup(tmp_path / "copy.db")
        await asyncio.sleep(0.2)
        assert store.state.code == "damaged"
    assert contents(tmp_path) == before
    assert transitions(caplog) == ["store_ill"]
    with pytest.raises(StoreFailed, match="is damaged"):
        async with opened(path) as again:
            await again.load(Pear)


def test_a_reserve_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with disk_of(tmp_path / "disk", "2m") as folder:
        for without in (False, True):
            if without:
                # As on macOS, which cannot give a file its space.
                monkeypatch.delattr(os, "posix_fallocate")
            with pytest.raises(OSError, match="No space left"):
                disk.make_reserve(folder / "reserve", 4 * MIB)
            assert not list(folder.iterdir())
            disk.make_reserve(folder / "reserve", MIB + 1)
            assert disk.has_reserve(folder / "reserve", MIB + 1)
            assert (folder / "reserve").stat().st_blocks * 512 > MIB
            assert disk.drop_reserve(folder / "reserve")
            assert not disk.drop_reserve(folder / "reserve")
