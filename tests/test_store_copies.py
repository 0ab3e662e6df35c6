"""Copies of the store: backups while it is used, and one before every change of its layout."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING

import apsw
import pytest

from rma_coordinator.store import Put, SqliteStore, StoreFailed, copying, disk, layout
from rma_core.errors import OutOfSpace, SettingProblem
from tests.faulty_disk import FaultyDisk
from tests.store_kit import KIB, MIB, Apple, Pear, disk_of, opened, small_store, until

if TYPE_CHECKING:
    from pathlib import Path


def file_names(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir()}


# -- backups -------------------------------------------------------------------------------------------------------


class Committing:
    """Commits pairs over old and new pages until told to end; ``number`` is that of the last."""

    def __init__(self) -> None:
        self.number = 0
        self.done = False

    async def go_on(self, store: SqliteStore) -> None:
        while not self.done:
            number = self.number + 1
            pair: list[Put] = [Put("pair", Pear(name=str(number))), Put("pair", Apple(name=str(number)))]
            await store.commit([*pair, Put(f"{number % 50:04}", Pear(name="x" * (number * 7 % 900)))])
            self.number = number


async def test_a_backup_is_whole_and_of_one_moment_while_commits_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, steps = Committing(), [0]
    step = copying.step

    def step_between_commits(underway: copying.Copying) -> bool:
        # However the threads' turns fall: no step without a commit since the one before.
        if one.number == steps[-1]:
            return False
        steps.append(one.number)
        return step(underway)

    monkeypatch.setattr(copying, "BACKUP_PAGES", 8)
    monkeypatch.setattr(copying, "step", step_between_commits)
    async with opened(tmp_path / "pool.db") as store:
        for number in range(20):
            await store.commit([Put(f"{number}-{n}", Apple(name="x" * 1000)) for n in range(100)])
        committing = asyncio.create_task(one.go_on(store))
        await store.get(Pear, "pair")
        before = await store.get(Pear, "pair")
        size = await store.backup(tmp_path / "copy.db")
        after = await store.get(Pear, "pair")
        one.done = True
        await committing
        assert before is not None
        assert after is not None
        assert int(after.name) >= int(before.name) + 20
        assert len(steps) > 20
    assert (tmp_path / "copy.db").stat().st_size == size > 2 * MIB
    assert {name for name in file_names(tmp_path) if "copy" in name} == {"copy.db"}
    async with opened(tmp_path / "copy.db") as copy:
        await copy._ask(layout.look_through)
        pear, apple = await copy.get(Pear, "pair"), await copy.get(Apple, "pair")
        assert pear is not None
        assert apple is not None
        assert pear.name == apple.name
        assert int(before.name) <= int(pear.name) <= int(after.name)
        assert len(await copy.load(Apple)) == 2001


async def test_a_backup_overwrites_nothing_and_says_what_is_wrong_with_its_place(tmp_path: Path) -> None:
    async with opened(tmp_path / "pool.db") as store:
        (tmp_path / "there").write_text("something else")
        for place in (tmp_path / "there", tmp_path / "pool.db"):
            with pytest.raises(SettingProblem, match="is there already"):
                await store.backup(place)
        assert (tmp_path / "there").read_text() == "something else"
        with pytest.raises(SettingProblem, match="is no folder"):
            await store.backup(tmp_path / "no" / "such" / "copy.db")
        assert store.state.ok


async def test_a_backup_never_fills_a_disk_and_leaves_nothing_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with disk_of(tmp_path / "disk", "1m") as folder:
        async with opened(tmp_path / "pool.db") as store:
            await store.commit([Put(f"{n:04}", Pear(name="x" * 1000)) for n in range(2000)])
            with pytest.raises(OutOfSpace, match=r"too little space for a backup: 1 MiB, and \d+ are needed"):
                await store.backup(folder / "copy.db")
            monkeypatch.setattr(disk, "free_bytes", lambda _: 1 << 40)
            with pytest.raises(OutOfSpace, match="no backup was made"):
                await store.backup(folder / "copy.db")
            assert not list(folder.iterdir())
            # That other disk is no concern of the pool's.
            assert store.state.ok
            await store.commit([Put("more", Pear(name="more"))])


async def test_a_backup_on_the_same_disk_leaves_what_the_coordinator_needs(tmp_path: Path) -> None:
    with disk_of(tmp_path / "disk", "4m") as folder:
        async with opened(folder / "pool.db", recover_free_bytes=3 * MIB) as store:
            await store.commit([Put(f"{n:04}", Pear(name="x" * 1000)) for n in range(500)])
            with pytest.raises(OutOfSpace, match="too little space for a backup"):
                await store.backup(folder / "copy.db")


async def test_one_backup_at_a_time_and_one_that_is_given_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, step = threading.Event(), copying.step

    def held(underway: copying.Copying) -> bool:
        """A disk that is slow for as long as the test wants."""
        return (gate.is_set() or underway.copy.done.cancelled()) and step(underway)

    monkeypatch.setattr(copying, "step", held)
    async with opened(tmp_path / "pool.db") as store:
        await store.commit([Put(f"{n}", Apple(name="x" * 1000)) for n in range(100)])
        first = asyncio.create_task(store.backup(tmp_path / "first.db"))
        await until(lambda: store._writer._copying)
        with pytest.raises(StoreFailed, match="another backup is being made"):
            await store.backup(tmp_path / "second.db")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await until(lambda: not store._writer._copying)
        assert not {name for name in file_names(tmp_path) if "first" in name or "second" in name}
        gate.set()
        await store.backup(tmp_path / "third.db")
        gate.clear()
        last = asyncio.create_task(store.backup(tmp_path / "fourth.db"))
        await until(lambda: store._writer._copying)
    with pytest.raises(StoreFailed, match="closed"):
        await last
    assert not (tmp_path / "fourth.db").exists()


async def test_a_copy_that_is_put_back_beside_the_log_of_another_file_is_not_mixed_with_it(tmp_path: Path) -> None:
    path, faulty = tmp_path / "pool.db", FaultyDisk("copies")
    async with opened(path, vfs=faulty.name) as store:
        await store.commit([Put("a", Pear(name="a"))])
        await store.backup(tmp_path / "copy.db")
        await store.commit([Put("b", Pear(name="b"))])
        # As after a crash: the log stays.
        faulty.dead = True
        with pytest.raises(StoreFailed):
            await store.commit([Put("c", Pear(name="c"))])
    faulty.unregister()
    path.rename(tmp_path / "old.db")
    (tmp_path / "copy.db").rename(path)
    for _ in range(2):
        with pytest.raises(StoreFailed, match=r"is a copy that was put back, but .*pool\.db-wal belongs to") as refused:
            await small_store(path).open()
        assert "move pool.db-wal away" in refused.value.hints[0]
    (tmp_path / "pool.db-wal").rename(tmp_path / "old.db-wal")
    async with opened(path) as copy, opened(tmp_path / "old.db") as old:
        assert await copy.load(Pear) == [Pear(name="a")]
        assert (await old.load(Pear))[:2] == [Pear(name="a"), Pear(name="b")]
    # Once it was opened, its log is its own, also after a kill.
    store = small_store(path)
    await store.open()
    await store.commit([Put("d", Pear(name="d"))])
    for name in ("pool.db", "pool.db-wal"):
        (tmp_path / f"killed-{name}").write_bytes((tmp_path / name).read_bytes())
    await store.close()
    (tmp_path / "killed-pool.db-wal").rename(tmp_path / "killed.db-wal")
    (tmp_path / "killed-pool.db").rename(tmp_path / "killed.db")
    async with opened(tmp_path / "killed.db") as killed:
        assert await killed.load(Pear) == [Pear(name="a"), Pear(name="d")]


# -- migrations ----------------------------------------------------------------------------------------------------

#: A made-up second layout, and a third.
SECOND = ("ALTER TABLE records ADD COLUMN made INTEGER NOT NULL DEFAULT 0", "UPDATE records SET made = 1")
BACK = ("CREATE TABLE notes (note TEXT)", "ALTER TABLE records DROP COLUMN made")
BROKEN = ("UPDATE records SET key = key || '!'", "INSERT INTO nowhere VALUES (1)")
NOW = 1_790_000_000.0


async def test_an_older_file_is_copied_before_its_layout_changes(tmp_path: Path) -> None:
    path = tmp_path / "pool.db"
    async with opened(path) as store:
        await store.commit([Put("a", Pear(name="a"))])
    async with opened(path, migrations=(*layout.MIGRATIONS, SECOND, BACK), now=lambda: NOW) as store:
        assert await store.load(Pear) == [Pear(name="a")]
        assert await store._ask(lambda db: db.pragma("user_version")) == 3
        await store.commit([Put("b", Pear(name="b"))])
    copy = tmp_path / "pool.db.v1-20260921T141320Z"
    assert layout.copies(path) == [copy]
    assert copy.stat().st_mode & 0o077 == 0
    # The copy is what the older RMA left, and can be used by it.
    async with opened(copy) as old:
        assert await old.load(Pear) == [Pear(name="a")]
    async with opened(path, migrations=(*layout.MIGRATIONS, SECOND, BACK)) as store:
        assert len(await store.load(Pear)) == 2
    assert layout.copies(path) == [copy], "nothing to change, nothing to copy"


async def test_a_step_that_fails_is_undone_and_names_both_layouts(tmp_path: Path) -> None:
    path = tmp_path / "pool.db"
    async with opened(path) as store:
        await store.commit([Put("a", Pear(name="a"))])
    for now in (NOW, NOW + 1):
        with pytest.raises(StoreFailed, match=r"could not be brought to layout 3: .*; it still has layout 2"):
            await small_store(path, migrations=(*layout.MIGRATIONS, SECOND, BROKEN), now=lambda at=now: at).open()
    assert [copy.name[8:11] for copy in layout.copies(path)] == ["v2-", "v1-"]
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        assert connection.pragma("user_version") == 2
        assert connection.execute("SELECT key FROM records WHERE kind = 'Pear'").fetchall() == [("a",)]


async def test_three_copies_are_kept(tmp_path: Path) -> None:
    path, steps = tmp_path / "pool.db", list(layout.MIGRATIONS)
    (tmp_path / "pool.db.vital").write_text("not ours")
    for number in range(6):
        async with opened(path, migrations=tuple(steps), now=lambda at=NOW + number: at) as store:
            await store.commit([Put(str(number), Pear(name="x"))])
        steps.append((f"CREATE TABLE more{number} (x)",))
    assert [copy.name for copy in layout.copies(path)] == [
        "pool.db.v5-20260921T141325Z",
        "pool.db.v4-20260921T141324Z",
        "pool.db.v3-20260921T141323Z",
    ]
    assert (tmp_path / "pool.db.vital").exists()


async def test_without_space_for_the_copy_nothing_changes(tmp_path: Path) -> None:
    with disk_of(tmp_path / "disk", "8m") as folder:
        async with opened(folder / "pool.db", reserve_bytes=0) as store:
            await store.commit([Put(f"{n:04}", Pear(name="x" * 500)) for n in range(4000)])
        (folder / "filling").write_bytes(bytes(disk.free_bytes(folder) - MIB))
        before = (folder / "pool.db").read_bytes()
        with pytest.raises(OutOfSpace, match="is full"):
            await small_store(folder / "pool.db", migrations=(*layout.MIGRATIONS, SECOND)).open()
        assert (folder / "pool.db").read_bytes() == before
        assert file_names(folder) - {"pool.db-wal"} == {"pool.db", "pool.db.lock", "filling"}


async def test_a_file_of_a_newer_layout_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "pool.db"
    async with opened(path, migrations=(*layout.MIGRATIONS, SECOND)):
        pass
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(SettingProblem, match=r"written by a newer RMA \(layout 2\); this one knows 1"):
            await small_store(path).open()
    assert path.read_bytes() == before


@pytest.mark.parametrize("made", ["PRAGMA application_id = 77; CREATE TABLE records (x)", "CREATE TABLE stamps (x)"])
async def test_a_database_of_another_program_is_left_alone(tmp_path: Path, made: str) -> None:
    path = tmp_path / "pool.db"
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        connection.execute(made).fetchall()
    with pytest.raises(SettingProblem, match="database of another program"):
        await small_store(path).open()
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (1,)


async def test_a_file_from_before_the_mark_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "pool.db"
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute(layout.RECORDS)
        connection.pragma("user_version", 1)
        connection.execute("INSERT INTO records VALUES ('Pear', 'a', ?)", (b'{"name":"a"}',))
    async with opened(path) as store:
        assert await store.load(Pear) == [Pear(name="a")]
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        assert connection.pragma("application_id") == layout.APPLICATION_ID
    assert path.stat().st_size < 64 * KIB
