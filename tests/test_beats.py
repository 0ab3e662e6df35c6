"""A heartbeat read the quick way is the one that a plain decoding gives, whatever came before it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.api import asgi
from rma_coordinator.api.beats import read_beat
from rma_coordinator.domain.fleet import Fleet, Worker
from rma_coordinator.domain.worker_records import WorkerRecord
from rma_coordinator.pool import Pool
from rma_core.errors import ValidationProblem
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.models.strict import decode, encode
from rma_core.models.worker import Heartbeat
from tests.coordinator_fixtures import PATIENCE_S, running, until

if TYPE_CHECKING:
    from pathlib import Path

OTHER = Capabilities(cpu_cores=3, ram="8.0GB")
CONTAINERS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(("rma-ocr", "rma-notes")), "service": st.sampled_from(("ocr", "notes"))},
        optional={
            "state": st.sampled_from(("healthy", "pulling", "wrong")),
            "slots": st.integers(0, 3),
            "reason": st.text(max_size=5),
            "image_bytes": st.sampled_from((-1, 0, 5, 2**53, 2**53 + 1)),
            "what a later agent says": st.integers(),
        },
    ),
    max_size=2,
)
BEATS = st.fixed_dictionaries(
    {"worker_id": st.sampled_from(("worker-00000001", "worker-00000002", "nobody"))},
    optional={
        "containers": CONTAINERS | st.sampled_from((None, {}, 0, [[]])),
        "current_load": st.sampled_from((0.0, 0.5, 7.0, "x")),
        "status": st.sampled_from(("healthy", "degraded", "gone")),
        "generation": st.integers(-1, 2),
        "draining": st.booleans(),
    },
).map(msgspec.json.encode)
#: Bodies, some of them cut off, some no JSON at all.
BODIES = BEATS | st.tuples(BEATS, st.integers(0, 200)).map(lambda cut: cut[0][: cut[1]]) | st.binary(max_size=20)


def joined() -> tuple[Fleet, Worker]:
    record = WorkerRecord(
        worker_id="worker-00000001",
        thumbprint="0" * 64,
        public_key="k",
        registered_at=1.0,
        report=HardwareReport(capabilities=Capabilities(cpu_cores=8, ram="8.0GB")),
    )
    fleet = Fleet(clock=lambda: 0.0, wall=lambda: 0.0, interval_s=30, beats_per_s=500)
    return fleet, fleet.add(record, ip_address="")


def outcome(data: bytes, of: Worker | None) -> object:
    try:
        found = decode(data, Heartbeat, subject="heartbeat") if of is None else read_beat(data, of)
        return msgspec.structs.asdict(found)
    except ValidationProblem as error:
        return error.message, error.problems


@given(bodies=st.lists(st.tuples(BODIES, st.booleans()), min_size=1, max_size=4))
def test_a_heartbeat_is_read_as_by_a_plain_decoding_also_when_it_comes_again(bodies: list[tuple[bytes, bool]]) -> None:
    fleet, one = joined()
    for body, taken in [*bodies, *bodies, *(body for body in bodies for _ in range(3))]:
        assert outcome(body, one) == outcome(body, None)
        # One that was read may yet be refused, or come by the channel, or the worker may leave.
        if taken and isinstance(outcome(body, None), dict):
            fleet.beat(one, decode(body, Heartbeat, subject="heartbeat"), ip_address="")


@pytest.mark.parametrize(
    ("said", "size"), [({}, 0), ({"image_bytes": 2**53}, 2**53), ({"a later agent's": 1}, 0)]
)  # fmt: skip
def test_an_agent_of_another_version_is_understood(said: dict[str, int], size: int) -> None:
    box = {"name": "rma-ocr", "service": "ocr", "state": "healthy", **said}
    beat = decode(encode({"worker_id": "worker-00000001", "containers": [box]}), Heartbeat, subject="heartbeat")
    assert [one.image_bytes for one in beat.containers] == [size]


@pytest.mark.parametrize("size", [-1, 2**53 + 1])
def test_an_image_of_no_possible_size_is_refused(size: int) -> None:
    box = {"name": "rma-ocr", "service": "ocr", "state": "healthy", "image_bytes": size}
    with pytest.raises(ValidationProblem, match=r"containers\[0\].image_bytes"):
        decode(encode({"worker_id": "worker-00000001", "containers": [box]}), Heartbeat, subject="heartbeat")


def test_what_a_worker_said_before_it_left_is_not_taken_for_what_it_says_now() -> None:
    fleet, one = joined()
    body = b'{"worker_id":"worker-00000001","containers":[{"name":"rma-ocr","service":"ocr","state":"healthy"}]}'
    for _ in range(3):
        fleet.beat(one, read_beat(body, one), ip_address="")
    fleet.leave(one)
    assert len(read_beat(body, one).containers) == 1


def test_containers_written_as_before_are_the_same_object() -> None:
    fleet, one = joined()
    container = b'{"name":"rma-ocr","service":"ocr","state":"healthy"}'
    bodies = [b'{"worker_id":"worker-00000001","generation":%d,"containers":[%b]}' % (n, container) for n in range(4)]
    beats = []
    for body in bodies:
        beats.append(read_beat(body, one))
        fleet.beat(one, beats[-1], ip_address="")
    assert [beat.generation for beat in beats] == [0, 1, 2, 3]
    assert beats[2].containers is beats[3].containers is one.containers
    assert read_beat(b'{"worker_id":"worker-00000001"}', one).containers == ()


async def test_the_answer_when_nothing_is_new_is_the_one_that_the_pool_gives(tmp_path: Path) -> None:
    async with running(tmp_path) as coordinator:
        machine = await coordinator.enrol()
        pool, worker = coordinator.pool, coordinator.pool.fleet.get(machine.id)
        await machine.beat()
        for draining in (False, True, False):
            known = worker.brief.generation
            answer = await machine.beat(generation=known, draining=draining)
            assert answer.content == encode(pool.answer(worker, known, nonce=False))
            assert answer.headers["content-type"] == "application/json"
            assert worker.draining == draining
        outdated = (await machine.beat(generation=known + 1)).json()
        assert {box["service"] for box in outdated["containers"]} == {"notes", "ner"}
        await pool.set_disabled(worker, disabled=True)
        assert (await machine.beat(generation=known)).status_code == 401


async def test_what_a_worker_tells_once_more_is_neither_decided_nor_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[str] = []
    monkeypatch.setattr(Pool, "decide_again", lambda _, worker: decided.append(worker.id))
    async with running(tmp_path) as coordinator:
        machine = await coordinator.enrol()
        pool, worker = coordinator.pool, coordinator.pool.fleet.get(machine.id)
        known = worker.record
        told = {"report": known.report, "runtimes": known.runtimes, "plugins": known.plugins}
        plain = msgspec.to_builtins(told)
        pool.fleet.changed.clear()
        await machine.beat(**plain)
        assert (decided, pool.fleet.changed) == ([], set())
        plugins = [{"name": "host", "kind": "detector", "state": "active"}]
        await machine.beat(**plain | {"plugins": plugins})
        assert (decided, pool.fleet.changed) == ([], {machine.id})
        assert worker.record.plugins[0].name == "host"
        report = msgspec.to_builtins(msgspec.structs.replace(known.report, capabilities=OTHER))
        await machine.beat(report=report)
        assert decided == [machine.id]


async def test_a_heartbeat_whose_body_does_not_come_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as coordinator:
        machine = await coordinator.enrol()
        lanes = coordinator.app.extensions["rma_lanes"]
        monkeypatch.setattr(asgi, "PATIENCE_S", 0.3)
        head = f"POST /api/worker/heartbeat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {machine.token}\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", int(coordinator.url.rpartition(":")[2]))
        writer.write(f"{head}Content-Length: 90\r\n\r\n{{".encode())
        async with asyncio.timeout(PATIENCE_S):
            said = await reader.readuntil(b"\r\n\r\n")
            assert said.startswith(b"HTTP/1.1 408 ")
            assert b"the body was not whole within" in await reader.readuntil(b"}")
        writer.close()
        await until(lambda: not lanes._open)


async def test_a_heartbeat_that_waits_ends_with_its_connection(tmp_path: Path) -> None:
    async with running(tmp_path) as coordinator:
        machine = await coordinator.enrol()
        lanes = coordinator.app.extensions["rma_lanes"]
        head = f"POST /api/worker/heartbeat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {machine.token}\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", int(coordinator.url.rpartition(":")[2]))
        writer.write(f"{head}Content-Length: 90\r\n\r\n{{".encode())
        await until(lambda: len(lanes._open) == 1)
        writer.transport.abort()
        await until(lambda: not lanes._open)
