"""A heartbeat read the quick way is the one that a plain decoding gives, whatever came before it."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.api.beats import read_beat
from rma_coordinator.domain.fleet import Worker
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


def worker() -> Worker:
    record = WorkerRecord(
        worker_id="worker-00000001",
        thumbprint="0" * 64,
        public_key="k",
        registered_at=1.0,
        report=HardwareReport(capabilities=Capabilities(cpu_cores=8, ram="8.0GB")),
    )
    return Worker(record, now=0.0)


def outcome(data: bytes, of: Worker | None) -> object:
    try:
        found = decode(data, Heartbeat, subject="heartbeat") if of is None else read_beat(data, of)
        return msgspec.structs.asdict(found)
    except ValidationProblem as error:
        return error.message, error.problems


@given(bodies=st.lists(BODIES, min_size=1, max_size=4))
def test_a_heartbeat_is_read_as_by_a_plain_decoding_also_when_it_comes_again(bodies: list[bytes]) -> None:
    one = worker()
    for body in [*bodies, *bodies, *(body for body in bodies for _ in range(2))]:
        assert outcome(body, one) == outcome(body, None)


def test_containers_written_as_before_are_the_same_object() -> None:
    one = worker()
    container = b'{"name":"rma-ocr","service":"ocr","state":"healthy"}'
    bodies = [b'{"worker_id":"worker-00000001","generation":%d,"containers":[%b]}' % (n, container) for n in range(3)]
    beats = [read_beat(body, one) for body in bodies]
    assert [beat.generation for beat in beats] == [0, 1, 2]
    assert beats[1].containers is beats[2].containers is one.written[1]
    assert read_beat(b'{"worker_id":"worker-00000001"}', one).containers == ()
