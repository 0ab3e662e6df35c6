"""A heartbeat read the quick way is the one that a plain decoding gives, whatever came before it."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.api.beats import read_beat
from rma_coordinator.domain.fleet import Fleet, Worker
from rma_coordinator.domain.worker_records import WorkerRecord
from rma_core.errors import ValidationProblem
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.models.strict import decode
from rma_core.models.worker import Heartbeat

CONTAINERS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(("rma-ocr", "rma-notes")), "service": st.sampled_from(("ocr", "notes"))},
        optional={
            "state": st.sampled_from(("healthy", "pulling", "wrong")),
            "slots": st.integers(0, 3),
            "reason": st.text(max_size=5),
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
