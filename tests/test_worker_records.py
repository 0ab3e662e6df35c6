"""Records pressed small come back whole, whatever they hold and in whatever order they came."""

from __future__ import annotations

import base64
import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.domain.worker_records import (
    WINDOW_BYTES,
    Press,
    WorkerRecord,
    brief,
    ids_of,
    same,
    thumbprint_of,
)
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.models.worker import Assignment

TEXT = st.text(max_size=200)
REPORTS = st.builds(
    lambda cores, gpu: HardwareReport(capabilities=Capabilities(cpu_cores=cores, ram="8.0GB", gpu_type=gpu)),
    st.integers(1, 512),
    st.none() | st.sampled_from(("NVIDIA H200", "Apple M4")),
)
ASSIGNMENTS = st.builds(
    lambda service, port: Assignment(name=f"rma-{service}", service=service, image="x/y:1", port=port, routes=()),
    st.sampled_from(("ocr", "notes", "llm")),
    st.integers(1, 65_535),
)
RECORDS = st.builds(
    WorkerRecord,
    worker_id=TEXT,
    thumbprint=TEXT,
    public_key=TEXT,
    registered_at=st.floats(allow_nan=False),
    report=REPORTS,
    labels=st.dictionaries(TEXT, TEXT, max_size=4),
    tier=st.none() | st.integers(1, 3),
    tier_reason=TEXT,
    assignment=st.lists(ASSIGNMENTS, max_size=4).map(tuple),
    placement=st.dictionaries(TEXT, TEXT, max_size=4),
    generation=st.integers(0, 2**40),
    epoch=st.integers(0, 2**31),
    disabled=st.booleans(),
    last_seen_at=st.floats(allow_nan=False),
    away=TEXT,
)


def named(one: WorkerRecord, key: bytes, number: int = 0) -> WorkerRecord:
    """Return a record with the names that a machine gets by its key: the usual id, or another where that is taken."""
    thumbprint, text = thumbprint_of(key), base64.urlsafe_b64encode(key).rstrip(b"=").decode()
    names = {"worker_id": list(ids_of(thumbprint))[number], "thumbprint": thumbprint, "public_key": text}
    return msgspec.structs.replace(one, **names)


KEYED = st.builds(named, RECORDS, st.binary(min_size=31, max_size=33), st.sampled_from((0, 0, 0, 1)))


def record(number: int, **more: object) -> WorkerRecord:
    made = WorkerRecord(
        worker_id=f"worker-{number:08x}",
        thumbprint=f"{number:064x}",
        public_key="k",
        registered_at=1.0,
        report=HardwareReport(capabilities=Capabilities(cpu_cores=8, ram="8.0GB")),
    )
    return msgspec.structs.replace(made, **more)


def noise(size: int, seed: int) -> str:
    return base64.b64encode(random.Random(seed).randbytes(size)).decode()


@given(records=st.lists(RECORDS | KEYED, min_size=1, max_size=12))
def test_what_was_pressed_comes_back_whole_after_all_that_was_pressed_since(records: list[WorkerRecord]) -> None:
    press = Press()
    pressed = [press.press(one) for one in records]
    assert [press.open(data) for data in pressed] == records


def test_records_larger_than_the_window_and_a_thousand_unlike_ones_come_back() -> None:
    press = Press()
    records = [record(0, away=noise(3 * WINDOW_BYTES, 0)), record(1, away="x" * WINDOW_BYTES)]
    records += [record(number, away=noise(300, number)) for number in range(2, 1000)]
    pressed = [press.press(one) for one in records]
    assert [press.open(data) for data in pressed] == records
    # Each dictionary is twice the one before, so that however many machines come, all of them stay small.
    assert len({data[0] for data in pressed}) <= WINDOW_BYTES.bit_length()


def test_records_like_earlier_ones_become_small() -> None:
    press, words = Press(), [noise(3000, seed) for seed in range(4)]
    for number, reason in enumerate(words):
        press.press(record(number, tier_reason=reason))
    sizes = [len(press.press(record(9, tier_reason=reason))) for reason in words]
    assert max(sizes) < len(words[0]) / 10


def test_what_follows_from_a_machines_key_is_not_kept_beside_it() -> None:
    press, chance = Press(), random.Random(1)
    # What else there is of them is the same, and so hardly takes any room.
    sizes = [len(press.press(named(record(9, away="x" * 500), chance.randbytes(32)))) for _ in range(50)]
    assert max(sizes[10:]) < 32 + 30


@given(one=RECORDS)
def test_a_brief_says_what_its_record_says(one: WorkerRecord) -> None:
    short = brief(one)
    assert all(getattr(short, name) == getattr(one, name) for name in short.__struct_fields__)


def test_workers_that_have_the_same_share_their_brief() -> None:
    def pool_of(text: str) -> WorkerRecord:
        return record(len(text), tier=2, tier_reason="".join(text), assignment=())

    assert brief(pool_of("a reason")) is brief(msgspec.structs.replace(pool_of("a reason"), worker_id="another"))
    assert brief(pool_of("a reason")) is not brief(pool_of("another"))


def test_equal_values_are_kept_once() -> None:
    first, second = ("healthy", "x" * 3), ("healthy", "".join(["x"] * 3))
    assert same(first) is same(second)
