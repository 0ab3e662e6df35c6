"""What waits on its way: request bodies and answers, small in memory, large on disk, and within bounds together."""

from __future__ import annotations

import asyncio
import errno
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.spool import PIECE_BYTES, Body, Spools
from rma_core.errors import NotFound, OutOfSpace


def make_spools(folder: Path, *, memory_bytes: int, total: int = 10**9, disk: int = 10**9) -> Spools:
    return Spools(folder, memory_bytes=memory_bytes, total_memory_bytes=total, disk_bytes=disk)


def make_body(folder: Path, *, memory_bytes: int) -> Body:
    return make_spools(folder, memory_bytes=memory_bytes).make()


async def read(body: Body) -> bytes:
    return b"".join([piece async for piece in body.pieces()])


@pytest.mark.parametrize("limit", [0, 10, PIECE_BYTES * 3])
async def test_a_body_is_read_as_it_was_written_by_several_readers_at_once(tmp_path: Path, limit: int) -> None:
    body, data = make_body(tmp_path / "spool", memory_bytes=limit), bytes(range(256)) * 700
    for start in range(0, len(data), 1000):
        await body.write(data[start : start + 1000])
    assert body.size == len(data)
    assert (body.small() is None) == (limit < len(data))
    for got in await asyncio.gather(*(read(body) for _ in range(5))):
        assert got == data
    await body.close()


@given(st.lists(st.binary(max_size=50)), st.integers(0, 100))
def test_small_pieces_and_any_limit_keep_every_byte(parts: list[bytes], limit: int) -> None:
    async def go() -> None:
        with tempfile.TemporaryDirectory() as folder:
            body = make_body(Path(folder), memory_bytes=limit)
            for part in parts:
                await body.write(part)
            whole = b"".join(parts)
            assert await read(body) == whole
            assert body.small() == (whole if len(whole) <= limit else None)
            await body.close()

    asyncio.run(go())


async def test_a_large_body_leaves_no_file_behind(tmp_path: Path) -> None:
    body = make_body(tmp_path / "spool", memory_bytes=10)
    await body.write(b"x" * 100_000)
    assert list((tmp_path / "spool").iterdir()) == [], "it has no name even while it is used"
    await body.close()


@pytest.mark.parametrize("limit", [0, PIECE_BYTES * 9])
async def test_a_body_closed_while_it_is_read_ends_the_reading(tmp_path: Path, limit: int) -> None:
    body = make_body(tmp_path, memory_bytes=limit)
    await body.write(b"x" * PIECE_BYTES * 3)
    pieces = body.pieces()
    await anext(pieces)
    await body.close()
    with pytest.raises(NotFound, match="its body is gone"):
        await anext(pieces)
    await body.close()


async def test_a_full_disk_refuses_the_body_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rma_coordinator.spool.tempfile.TemporaryFile", full)
    body = make_body(tmp_path, memory_bytes=0)
    with pytest.raises(OutOfSpace, match="the disk for request bodies is full"):
        await body.write(b"x")


async def test_all_bodies_together_keep_no_more_in_memory_than_they_may(tmp_path: Path) -> None:
    spools = make_spools(tmp_path, memory_bytes=100, total=250)
    bodies = [spools.make() for _ in range(4)]
    for body in bodies:
        await body.write(b"x" * 100)
    assert [body.on_disk for body in bodies] == [False, False, True, True]
    assert (spools.memory_used, spools.disk_used) == (200, 200)
    for body in bodies:
        assert await read(body) == b"x" * 100
        await body.close()
    assert (spools.memory_used, spools.disk_used) == (0, 0)


async def test_what_waits_on_disk_is_bounded_and_room_comes_back(tmp_path: Path) -> None:
    spools = make_spools(tmp_path, memory_bytes=0, disk=150)
    first, second = spools.make(), spools.make()
    await first.write(b"x" * 100)
    with pytest.raises(OutOfSpace, match="150 bytes"):
        await second.write(b"x" * 100)
    await first.close()
    await second.write(b"x" * 100)
    await second.close()
    assert spools.disk_used == 0


async def test_a_named_body_is_read_again_by_the_next_process_and_nobody_elses(tmp_path: Path) -> None:
    spools = make_spools(tmp_path, memory_bytes=10)
    body = spools.make("task-1")
    await body.write(b"y" * 1000)
    await body.sync()
    await body.close(keep=True)
    assert (tmp_path / "task-1").stat().st_mode & 0o777 == 0o600
    later = make_spools(tmp_path, memory_bytes=10)
    (tmp_path / "task-2").write_bytes(b"nobody's")
    assert later.sweep({"task-1"}) == 1
    again = later.open("task-1")
    assert (again.size, await read(again)) == (1000, b"y" * 1000)
    await again.close()
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240 - a folder of the test's own
    with pytest.raises(NotFound):
        later.open("task-1")
