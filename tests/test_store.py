"""One suite for every store, and what every start of the SQLite one looks at."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import apsw
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from rma_coordinator.store import Change, Delete, MemoryStore, Put, SqliteStore, Store, StoreFailed, layout, make_store
from rma_coordinator.store import disk as disks
from rma_coordinator.store import sqlite as sqlite_store
from rma_core.errors import OutOfSpace, RMAError, SettingProblem
from tests.store_kit import MIB, Apple, Pear, Unkeepable, disk_of, opened, small_store, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from rma_coordinator.store.writer import Commit


#: Every store passes the suite; one more needs a line here.
STORES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda _: MemoryStore(),
    "sqlite": lambda folder: small_store(folder / "pool.db"),
}


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    made = STORES[request.param](tmp_path)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def file(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    async with opened(tmp_path / "pool.db") as made:
        yield made


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


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 25])
async def test_pages_give_every_record_once_in_the_order_of_keys(store: Store, count: int) -> None:
    names = ["", *(f"{n}é" for n in range(1, count))][:count]
    await store.commit([Put(name, Pear(name=name)) for name in names] + [Put("z", Apple(name="no pear"))])
    pages = [page async for page in store.pages(Pear, 10)]
    assert [pear.name for page in pages for pear in page] == sorted(names)
    assert all(0 < len(page) <= 10 for page in pages)


async def test_one_record_is_got_by_type_and_key(store: Store) -> None:
    assert await store.get(Pear, "a") is None
    await store.commit([Put("a", Pear(name="a", weight=2)), Put("a", Apple(name="an apple"))])
    assert await store.get(Pear, "a") == Pear(name="a", weight=2)
    assert await store.get(Apple, "a") == Apple(name="an apple")
    await store.commit([Delete(Pear, "a")])
    assert await store.get(Pear, "a") is None


async def test_what_was_acknowledged_is_seen_while_others_commit(store: Store) -> None:
    async def writer(number: int) -> None:
        for weight in range(20):
            await store.commit([Put(str(number), Pear(name="x", weight=weight))])
            found = await store.get(Pear, str(number))
            assert found is not None
            assert found.weight == weight

    await asyncio.gather(*(writer(number) for number in range(20)))


async def test_a_large_answer_and_a_strange_key_are_kept_as_they_are(store: Store) -> None:
    key, large = "a'b\"c\\d/é\u2028 \x00 end", Apple(name="x" * 65536)
    await store.commit([Put(key, large), Put("", Apple(name=""))])
    assert await store.get(Apple, key) == large
    assert await store.load(Apple) == [Apple(name=""), large]


async def test_the_state_says_whether_a_store_takes_anything(tmp_path: Path, store: Store) -> None:
    assert (store.state.ok, store.state.reason, store.state.code) == (True, "", "ok")
    await store.commit([Put("a", Pear(name="a"))], urgent=True)
    await store.close()
    assert (store.state.ok, store.state.code) == (False, "closed")
    for refused in (store.commit([Put("b", Pear(name="b"))]), store.get(Pear, "a"), store.load(Pear)):
        with pytest.raises(StoreFailed, match="not open"):
            await asyncio.wait_for(refused, 5)


async def test_a_closed_store_opens_again_with_all_it_had(store: Store) -> None:
    for number in range(3):
        await store.commit([Put(str(number), Pear(name=str(number)))])
        await store.close()
        await store.open()
        assert len(await store.load(Pear)) == number + 1


async def test_a_cancelled_commit_is_kept_whole_or_not_at_all(store: Store) -> None:
    async def both(number: int) -> None:
        await store.commit([Put(f"{number}", Pear(name="x")), Put(f"{number}", Apple(name="x"))])

    commits = [asyncio.create_task(both(number)) for number in range(50)]
    await asyncio.sleep(0)
    for commit in commits[::2]:
        commit.cancel()
    await asyncio.gather(*commits, return_exceptions=True)
    await both(99)
    assert len(await store.load(Pear)) == len(await store.load(Apple)) >= 26


async def test_a_copy_of_everything_is_made_or_refused_with_advice(store: Store, tmp_path: Path) -> None:
    await store.commit([Put("a", Pear(name="a"))])
    if isinstance(store, MemoryStore):
        with pytest.raises(SettingProblem, match="keeps everything in memory"):
            await store.backup(tmp_path / "copy.db")
        return
    size = await store.backup(tmp_path / "copy.db")
    assert size == (tmp_path / "copy.db").stat().st_size
    async with opened(tmp_path / "copy.db") as copy:
        assert await copy.load(Pear) == [Pear(name="a")]


#: What the state machine keeps: both kinds can be made from a name. ``Wanted`` without a name is a deletion.
Fruit = Pear | Apple
Wanted = tuple[type[Fruit], str, str | None]
KEYS = st.sampled_from("abcdef")
KINDS = st.sampled_from([Pear, Apple])
CHANGES = st.lists(st.tuples(KINDS, KEYS, st.one_of(st.none(), st.text(max_size=5))), max_size=6)


class StoreMachine(RuleBasedStateMachine):
    """Compares a store with a dictionary, through crashes and restarts; a subclass says which store, and where."""

    kind: ClassVar[str]
    folders: ClassVar[Iterator[Path]]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = next(self.folders)
        self.store = STORES[self.kind](self.folder)
        self.model: dict[tuple[type[Fruit], str], str] = {}
        self.runner.run(self.store.open())

    def apply(self, changes: list[Wanted]) -> list[Change]:
        for of, key, name in changes:
            if name is None:
                self.model.pop((of, key), None)
            else:
                self.model[of, key] = name
        return [Delete(of, key) if name is None else Put(key, of(name=name)) for of, key, name in changes]

    @rule(changes=CHANGES, urgent=st.booleans())
    def commit(self, changes: list[Wanted], urgent: bool) -> None:
        self.runner.run(self.store.commit(self.apply(changes), urgent=urgent))

    @rule(batches=st.lists(CHANGES, max_size=5))
    def commit_many_at_once(self, batches: list[list[Wanted]]) -> None:
        async def all_of_them() -> None:
            # Tasks start in order, so that the last change to a record is known.
            await asyncio.gather(*(self.store.commit(self.apply(changes)) for changes in batches))

        self.runner.run(all_of_them())

    @rule(changes=CHANGES)
    def commit_what_cannot_be_kept(self, changes: list[Wanted]) -> None:
        puts = [Put(key, of(name="lost")) for of, key, _ in changes]
        with pytest.raises(TypeError):
            self.runner.run(self.store.commit([*puts, Put("z", Unkeepable(what=object()))]))

    @rule(of=KINDS, key=KEYS)
    def get(self, of: type[Fruit], key: str) -> None:
        found = self.runner.run(self.store.get(of, key))
        assert (found and found.name) == self.model.get((of, key))

    @rule()
    def reopen(self) -> None:
        self.runner.run(self.store.close())
        self.runner.run(self.store.open())

    @precondition(lambda self: self.kind != "memory")
    @rule()
    def crash(self) -> None:
        # What a killed process leaves behind are its files as they are at that moment.
        left = next(self.folders)
        for one in self.folder.iterdir():
            (left / one.name).write_bytes(one.read_bytes())
        self.runner.run(self.store.close())
        self.folder, self.store = left, STORES[self.kind](left)
        self.runner.run(self.store.open())

    @invariant()
    def everything_is_there(self) -> None:
        kinds: list[type[Fruit]] = [Pear, Apple]
        for of in kinds:
            names = [self.model[kept] for kept in sorted(self.model, key=lambda at: at[1]) if kept[0] is of]
            assert [found.name for found in self.runner.run(self.store.load(of))] == names

    def teardown(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()


def new_folders(inside: Path) -> Iterator[Path]:
    for number in itertools.count():
        folder = inside / str(number)
        folder.mkdir()
        yield folder


@pytest.mark.parametrize("kind", STORES)
def test_a_store_does_what_a_dictionary_does_through_crashes_and_restarts(kind: str, tmp_path: Path) -> None:
    machine = type("Machine", (StoreMachine,), {"kind": kind, "folders": new_folders(tmp_path)})
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=20))


# -- files ---------------------------------------------------------------------------------------------------------


async def test_many_commits_share_few_transactions(file: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    write = file._writer._transaction

    def counting(group: list[Commit]) -> BaseException | None:
        groups.append(len(group))
        return write(group)

    monkeypatch.setattr(file._writer, "_transaction", counting)
    await asyncio.gather(*(file.commit([Put(f"{n:04}", Pear(name=str(n)))]) for n in range(1000)))
    assert sum(groups) == 1000
    assert len(groups) < 100


async def test_closing_writes_what_waits_and_nothing_after_that_waits_for_ever(tmp_path: Path) -> None:
    made = small_store(tmp_path / "pool.db")
    await made.open()
    waiting = [asyncio.create_task(made.commit([Put(f"{n:03}", Pear(name="x"))])) for n in range(200)]
    await asyncio.sleep(0)
    await made.close()
    assert await asyncio.wait_for(asyncio.gather(*waiting), 10) == [None] * 200
    with pytest.raises(StoreFailed, match="not open"):
        await asyncio.wait_for(made.commit([Put("late", Pear(name="x"))]), 5)
    await made.close()
    async with opened(tmp_path / "pool.db") as again:
        assert len(await again.load(Pear)) == 200


async def test_a_commit_that_cannot_be_written_costs_the_others_in_its_group_nothing(file: SqliteStore) -> None:
    await file._ask(
        lambda connection: connection.execute(
            "CREATE TRIGGER bad BEFORE INSERT ON records WHEN new.key = 'bad' BEGIN SELECT RAISE(ABORT, 'bad'); END"
        )
    )
    changes = [Put("a", Pear(name="a")), Put("bad", Pear(name="b")), Put("c", Pear(name="c"))]
    outcomes = await asyncio.gather(*(file.commit([one]) for one in changes), return_exceptions=True)
    assert [type(one) for one in outcomes] == [type(None), StoreFailed, type(None)]
    assert [pear.name for pear in await file.load(Pear)] == ["a", "c"]
    assert file.state.ok


async def test_the_writer_outlives_a_bug(file: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_connection: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(layout, "transaction", broken)
        with pytest.raises(StoreFailed, match="a bug"):
            await file.commit([Put("a", Pear(name="a"))])
    await file.commit([Put("a", Pear(name="a"))])


async def test_a_writer_that_died_is_said_and_nobody_waits_for_it(
    file: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise SystemError("the machine is on fire")

    monkeypatch.setattr(file._writer, "_upkeep", broken)
    await file.commit([Put("a", Pear(name="a"))])
    await until(lambda: not file.state.ok)
    assert file.state.code == "dead"
    assert "on fire" in file.state.reason
    for refused in (file.commit([Put("a", Pear(name="a"))], urgent=True), file.get(Pear, "a")):
        with pytest.raises(StoreFailed, match="stopped") as error:
            await asyncio.wait_for(refused, 5)
        assert "restart" in error.value.hints[0]
    monkeypatch.undo()
    await file.close()
    await file.open()
    assert await file.load(Pear) == [Pear(name="a")]


async def test_what_waits_is_bounded_in_number_and_in_bytes(file: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = threading.Event()
    asked = asyncio.create_task(file._ask(lambda _: hold.wait(20)))
    await asyncio.sleep(0)
    monkeypatch.setattr(sqlite_store, "MAX_WAITING", 3)
    monkeypatch.setattr(sqlite_store, "MAX_WAITING_BYTES", 1000)
    first = asyncio.create_task(file.commit([Put("a", Pear(name="x" * 900))]))
    await asyncio.sleep(0)
    with pytest.raises(StoreFailed, match="does not keep up"):
        await file.commit([Put("b", Pear(name="x" * 900))])
    second = asyncio.create_task(file.commit([Put("c", Pear(name="x"))]))
    await asyncio.sleep(0)
    with pytest.raises(StoreFailed, match="does not keep up"):
        await file.commit([Put("d", Pear(name="x"))])
    hold.set()
    await asyncio.gather(asked, first, second)
    await file.commit([Put("e", Pear(name="x" * 5000))])
    assert [pear.name[0] for pear in await file.load(Pear)] == ["x"] * 3


async def test_a_second_coordinator_on_the_same_file_is_refused_with_advice(file: SqliteStore, tmp_path: Path) -> None:
    second = small_store(tmp_path / "pool.db")
    with pytest.raises(SettingProblem, match=r"another coordinator is using .*pool\.db$") as refused:
        await second.open()
    assert "RMA_HOME" in refused.value.hints[0]
    await file.commit([Put("a", Pear(name="still well"))])
    await file.close()
    await second.open()
    assert await second.load(Pear) == [Pear(name="still well")]
    await second.close()


async def test_a_program_that_has_the_file_open_is_another_coordinator(tmp_path: Path) -> None:
    with contextlib.closing(apsw.Connection(str(tmp_path / "pool.db"))) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; CREATE TABLE records (kind)").fetchall()
        with pytest.raises(SettingProblem, match="another coordinator is using"):
            await small_store(tmp_path / "pool.db").open()


@pytest.mark.parametrize("data", [b"{}", b"not json", b'{"name": 5}', b"\xff"])
async def test_a_record_that_cannot_be_read_is_named(file: SqliteStore, data: bytes) -> None:
    await file._ask(lambda db: db.execute("INSERT INTO records VALUES ('Pear', 'the-key', ?)", (data,)))
    for reading in (file.load(Pear), file.get(Pear, "the-key")):
        with pytest.raises(StoreFailed, match=r"Pear \(the-key\) that cannot be read"):
            await reading


async def test_only_the_owner_can_read_any_of_the_files(file: SqliteStore, tmp_path: Path) -> None:
    await file.commit([Put("a", Pear(name="secret"))])
    await file.backup(tmp_path / "copy.db")
    names = {entry.name: entry.stat().st_mode & 0o077 for entry in os.scandir(tmp_path)}
    assert set(names.values()) == {0}
    assert {"pool.db", "pool.db-wal", "pool.db.lock", "pool.db.reserve", "copy.db"} <= set(names)


async def test_a_start_with_too_little_space_is_refused_with_numbers(tmp_path: Path) -> None:
    with disk_of(tmp_path / "disk", "8m") as folder:
        with pytest.raises(
            OutOfSpace, match=r"has \d+ MiB free; the coordinator starts with at least 100 MiB"
        ) as refused:
            await SqliteStore(folder / "pool.db").open()
        assert refused.value.hints
        made = small_store(folder / "pool.db", reserve_bytes=2 * MIB, start_free_bytes=7 * MIB)
        await made.open()
        await made.close()
        (folder / "else").write_bytes(bytes(4 * MIB))
        # The reserve of the last time is space of our own.
        with pytest.raises(OutOfSpace, match="has 3 MiB free"):
            await made.open()
        assert made.state.code == "full"


RECORDED = [
    ("/", "ext4"), ("/srv", "nfs4"), ("/srv/local", "xfs"), ("/mnt/c", "9p"), ("/home", "ext4"), ("/home", "cifs"),
    ("/Volumes/share", "smbfs"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/var/lib/rma", "ext4"), ("/srv/rma", "nfs4"), ("/srv/local/rma", "xfs"), ("/srvother", "ext4"),
        ("/mnt/c/Users", "9p"), ("/home/me/.rma", "cifs"), ("/Volumes/share", "smbfs"), ("/", "ext4"),
    ],
)  # fmt: skip
def test_the_file_system_of_a_folder_is_that_of_the_nearest_mount(folder: str, kind: str) -> None:
    assert disks.file_system(Path(folder), RECORDED) == kind
    assert disks.file_system(Path(folder), []) == ""


async def test_a_network_file_system_is_refused_and_a_shared_one_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disks, "mounts", lambda: [("/", "nfs4")])
    with pytest.raises(SettingProblem, match=r"network file system \(nfs4\)") as refused:
        await small_store(tmp_path / "pool.db").open()
    assert refused.value.hints
    assert not (tmp_path / "pool.db").exists()
    monkeypatch.setattr(disks, "mounts", lambda: [("/", "virtiofs")])
    async with opened(tmp_path / "pool.db"):
        assert "shared into this machine (virtiofs)" in caplog.text


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
