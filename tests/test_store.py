"""One suite for every store, and what only a file on a disk can do wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import apsw
import msgspec
import pytest

from rma_coordinator import store as stores
from rma_coordinator.store import Delete, MemoryStore, Put, SqliteStore, Store, StoreFailed, make_store
from rma_core.errors import OutOfSpace, RMAError, SettingProblem
from tests.needs import need

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


ROOT = Path(__file__).parent.parent


class Pear(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    weight: float = 1.0


class Apple(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class Unkeepable(msgspec.Struct, frozen=True, kw_only=True):
    what: object


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    made: Store = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "pool.db")
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def file(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    made = SqliteStore(tmp_path / "pool.db")
    await made.open()
    yield made
    await made.close()


# -- every store ---------------------------------------------------------------------------------------------------


async def test_what_is_put_is_loaded_by_type_and_in_the_order_of_keys(store: Store) -> None:
    await store.commit([Put("b", Pear(name="b")), Put("a", Pear(name="a")), Put("a", Apple(name="an apple"))])
    assert await store.load(Pear) == [Pear(name="a"), Pear(name="b")]
    assert await store.load(Apple) == [Apple(name="an apple")]


async def test_a_later_record_takes_the_place_of_an_earlier_one(store: Store) -> None:
    await store.commit([Put("a", Pear(name="a")), Put("a", Pear(name="a", weight=2))])
    await store.commit([Put("a", Pear(name="a", weight=3))])
    assert await store.load(Pear) == [Pear(name="a", weight=3)]


async def test_deleting_forgets_one_record_and_what_is_not_there_is_no_error(store: Store) -> None:
    await store.commit([Put("a", Pear(name="a")), Put("a", Apple(name="a"))])
    await store.commit([Delete(Pear, "a"), Delete(Pear, "never there")])
    assert await store.load(Pear) == []
    assert await store.load(Apple) == [Apple(name="a")]


async def test_a_commit_is_kept_whole_or_not_at_all(store: Store) -> None:
    with pytest.raises((TypeError, RMAError)):
        await store.commit([Put("a", Pear(name="a")), Put("b", Unkeepable(what=object()))])
    assert await store.load(Pear) == []
    await store.commit([])


async def test_a_thousand_commits_at_once_are_all_kept(store: Store) -> None:
    await asyncio.gather(*(store.commit([Put(f"{n:04}", Pear(name=str(n)))]) for n in range(1000)))
    assert len(await store.load(Pear)) == 1000


# -- files ---------------------------------------------------------------------------------------------------------


async def test_many_commits_share_few_transactions(file: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    write = file._transaction

    def counting(group: list[stores._Waiting]) -> RMAError | None:
        groups.append(len(group))
        return write(group)

    monkeypatch.setattr(file, "_transaction", counting)
    await asyncio.gather(*(file.commit([Put(f"{n:04}", Pear(name=str(n)))]) for n in range(1000)))
    assert sum(groups) == 1000
    assert len(groups) < 100


async def test_what_was_acknowledged_is_there_after_the_process_was_killed(tmp_path: Path) -> None:
    program = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from tests.test_store import Pear\n"
        "from rma_coordinator.store import Put, SqliteStore\n"
        "async def main():\n"
        "    store = SqliteStore(Path(sys.argv[1]))\n"
        "    await store.open()\n"
        "    for n in range(50):\n"
        "        await store.commit([Put(f'{n:02}', Pear(name=str(n)))])\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "pool.db")]
    ended = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    again = SqliteStore(tmp_path / "pool.db")
    await again.open()
    assert len(await again.load(Pear)) == 50
    await again.close()


async def test_closing_writes_what_waits_and_nothing_after_that_waits_for_ever(tmp_path: Path) -> None:
    made = SqliteStore(tmp_path / "pool.db")
    await made.open()
    waiting = [asyncio.create_task(made.commit([Put(f"{n:03}", Pear(name="x"))])) for n in range(200)]
    await asyncio.sleep(0)
    await made.close()
    assert await asyncio.wait_for(asyncio.gather(*waiting), 10) == [None] * 200
    with pytest.raises(StoreFailed, match="not open"):
        await asyncio.wait_for(made.commit([Put("late", Pear(name="x"))]), 5)
    await made.close()
    again = SqliteStore(tmp_path / "pool.db")
    await again.open()
    assert len(await again.load(Pear)) == 200
    await again.close()


async def test_a_commit_that_cannot_be_written_costs_the_others_in_its_group_nothing(
    file: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = file._transaction

    def failing(group: list[stores._Waiting]) -> RMAError | None:
        if any(key == "bad" for waiting in group for _, key, _ in waiting.rows):
            return StoreFailed("this one cannot be written")
        return write(group)

    monkeypatch.setattr(file, "_transaction", failing)
    changes = [Put("a", Pear(name="a")), Put("bad", Pear(name="b")), Put("c", Pear(name="c"))]
    outcomes = await asyncio.gather(*(file.commit([one]) for one in changes), return_exceptions=True)
    assert [type(one) for one in outcomes] == [type(None), StoreFailed, type(None)]
    assert [pear.name for pear in await file.load(Pear)] == ["a", "c"]


async def test_the_writer_outlives_a_bug(file: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> apsw.Connection:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(file, "_db", broken)
        with pytest.raises(StoreFailed, match="a bug"):
            await file.commit([Put("a", Pear(name="a"))])
    await file.commit([Put("a", Pear(name="a"))])


async def test_a_disk_that_does_not_keep_up_is_said_at_once(file: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_queue", queue.Queue(maxsize=1))
    file._queue.put_nowait(None)
    with pytest.raises(StoreFailed, match="does not keep up"):
        await file.commit([Put("a", Pear(name="a"))])
    monkeypatch.undo()


async def test_a_second_coordinator_on_the_same_file_is_refused_with_advice(file: SqliteStore, tmp_path: Path) -> None:
    second = SqliteStore(tmp_path / "pool.db")
    with pytest.raises(SettingProblem, match="another coordinator is using") as refused:
        await second.open()
    assert "RMA_HOME" in refused.value.hints[0]
    await file.commit([Put("a", Pear(name="still well"))])
    await file.close()
    await second.open()
    assert await second.load(Pear) == [Pear(name="still well")]
    await second.close()


async def test_a_file_of_a_newer_layout_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "pool.db"
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        connection.pragma("user_version", stores.SCHEMA_VERSION + 1)
    for _ in range(2):
        with pytest.raises(SettingProblem, match="written by a newer RMA"):
            await SqliteStore(path).open()


def whole_garbage(path: Path) -> None:
    path.write_bytes(b"this is no database at all, but it is long enough to be looked at" * 100)


def a_folder(path: Path) -> None:
    path.mkdir()


def cut_in_half(path: Path) -> None:
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        connection.execute(
            "CREATE TABLE records (kind TEXT, key TEXT, data BLOB, PRIMARY KEY (kind, key)) WITHOUT ROWID"
        )
        connection.execute("BEGIN")
        for number in range(500):
            connection.execute("INSERT INTO records VALUES ('Pear', ?, ?)", (str(number), os.urandom(500)))
        connection.execute("COMMIT")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


async def open_and_load(made: SqliteStore) -> None:
    await made.open()
    await made.load(Pear)


@pytest.mark.parametrize("damage", [whole_garbage, a_folder, cut_in_half])
async def test_a_damaged_file_is_said_to_be_one(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(tmp_path / "pool.db")
    made = SqliteStore(tmp_path / "pool.db")
    with pytest.raises(StoreFailed, match=r"pool\.db") as refused:
        await open_and_load(made)
    assert refused.value.hints
    await made.close()


@pytest.mark.parametrize("data", [b"{}", b"not json", b'{"name": 5}'])
async def test_a_record_that_cannot_be_read_is_named(file: SqliteStore, data: bytes) -> None:
    file._db().execute("INSERT INTO records VALUES ('Pear', 'the-key', ?)", (data,))
    with pytest.raises(StoreFailed, match=r"Pear \(the-key\) that cannot be read"):
        await file.load(Pear)


async def test_only_the_owner_can_read_the_file(file: SqliteStore, tmp_path: Path) -> None:
    await file.commit([Put("a", Pear(name="secret"))])
    assert {entry.stat().st_mode & 0o077 for entry in os.scandir(tmp_path)} == {0}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    need("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True, timeout=20)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=20)


async def test_a_full_disk_is_said_costs_nothing_kept_and_is_recovered_from(tiny_disk: Path) -> None:
    made = SqliteStore(tiny_disk / "pool.db")
    await made.open()
    await made.commit([Put("kept", Pear(name="kept"))])
    ballast = tiny_disk / "ballast"
    with contextlib.suppress(OSError):
        ballast.write_bytes(b"x" * 10_000_000)
    with pytest.raises(OutOfSpace, match="is full"):
        await made.commit([Put("large", Pear(name="x" * 500_000))])
    assert [pear.name for pear in await made.load(Pear)] == ["kept"]
    ballast.unlink()
    await made.commit([Put("more", Pear(name="more"))])
    await made.close()
    again = SqliteStore(tiny_disk / "pool.db")
    await again.open()
    assert [pear.name for pear in await again.load(Pear)] == ["kept", "more"]
    await again.close()


async def test_sqlite_saying_that_the_disk_is_full_is_out_of_space(
    file: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

        def execute(self, *_: object) -> None:
            raise apsw.FullError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(file, "_db", Full)
        with pytest.raises(OutOfSpace, match="is full"):
            await file.commit([Put("a", Pear(name="a"))])
    await file.commit([Put("a", Pear(name="a"))])


def test_a_store_is_named_in_the_settings(tmp_path: Path) -> None:
    assert isinstance(make_store("memory", tmp_path), MemoryStore)
    for address, path in (
        ("sqlite", tmp_path / "coordinator.db"),
        ("sqlite:/a/b.db", Path("/a/b.db")),
        ("sqlite:///a/b.db", Path("/a/b.db")),
    ):
        made = make_store(address, tmp_path)
        assert isinstance(made, SqliteStore)
        assert made._path == path
    with pytest.raises(SettingProblem, match="is no store"):
        make_store("redis://localhost", tmp_path)
