"""The fleet: who is healthy, degraded or offline, and when the coordinator suspects itself instead."""

from __future__ import annotations

import logging

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.domain.fleet import AMNESTY_S, SWEEP_S, Fleet, Worker, WorkerRecord
from rma_coordinator.effects import Moved, image_sizes, moved
from rma_core.errors import NotFound
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.models.weights import AssignedModel, ModelFile
from rma_core.models.worker import MOST_IMAGE_BYTES, Assignment, ContainerStatus, Heartbeat, ModelStatus, RuntimeReport

REPORT = HardwareReport(capabilities=Capabilities(cpu_cores=4, ram="16GB"))
INTERVAL_S = 30.0


def record(number: int, **more: object) -> WorkerRecord:
    found = WorkerRecord(
        worker_id=f"worker-{number:08x}",
        thumbprint=f"{number:064x}",
        public_key="k",
        registered_at=1_700_000_000.0,
        last_seen_at=1_700_000_000.0,
        report=REPORT,
    )
    return msgspec.structs.replace(found, **more)


class Pool:
    """A fleet with a clock that the test turns; it is swept all the while."""

    def __init__(self, *records: WorkerRecord, beats_per_s: float = 500.0) -> None:
        self.now = 0.0
        self.fleet = Fleet(
            clock=lambda: self.now,
            wall=lambda: 1_800_000_000.0 + self.now,
            interval_s=INTERVAL_S,
            beats_per_s=beats_per_s,
        )
        self.fleet.restore(records)

    def turn(self, seconds: float, *beating: Worker) -> list[Worker]:
        gone = []
        for _ in range(int(seconds / SWEEP_S)):
            self.now += SWEEP_S
            for worker in beating:
                self.beat(worker)
            gone += self.fleet.sweep()
        return gone

    def beat(self, worker: Worker, **more: object) -> None:
        beat = msgspec.structs.replace(Heartbeat(worker_id=worker.id), **more)
        self.fleet.beat(worker, beat, ip_address="10.0.0.1")

    def join(self, count: int) -> list[Worker]:
        return [self.fleet.add(record(number), ip_address="10.0.0.1") for number in range(count)]

    def past_amnesty(self, *workers: Worker) -> None:
        self.turn(AMNESTY_S + SWEEP_S, *workers)


@pytest.fixture
def pool() -> Pool:
    return Pool()


def test_a_worker_that_misses_a_heartbeat_is_degraded_and_after_three_offline(pool: Pool) -> None:
    (worker,) = pool.join(1)
    pool.past_amnesty(worker)
    assert pool.turn(46) == []
    assert (worker.status, worker.usable) == ("degraded", False)
    assert pool.turn(46) == [worker]
    assert (worker.status, worker.reason) == ("offline", "no heartbeat for 92 s")
    assert pool.turn(100) == [], "it goes offline once"
    pool.beat(worker)
    assert (worker.status, worker.usable, worker.reason) == ("healthy", True, "")


def test_each_transition_is_logged_once(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    (worker,) = pool.join(1)
    pool.past_amnesty(worker)
    # What came before is written where a command of an earlier test has set the level.
    caplog.clear()
    with caplog.at_level(logging.INFO):
        pool.turn(200)
        for _ in range(5):
            pool.beat(worker)
    said = [entry.getMessage().partition(" is ")[2].partition(":")[0] for entry in caplog.records]
    assert said == ["degraded", "offline", "healthy"]


def test_a_worker_may_say_itself_that_it_is_degraded(pool: Pool) -> None:
    (worker,) = pool.join(1)
    pool.beat(worker, status="degraded", reason="the disk is nearly full")
    assert (worker.status, worker.reason, worker.usable) == ("degraded", "the disk is nearly full", False)
    pool.beat(worker, draining=True)
    assert (worker.status, worker.usable) == ("healthy", False)


def test_nobody_is_offline_for_five_minutes_after_a_start(pool: Pool) -> None:
    (worker,) = pool.join(1)
    assert pool.turn(AMNESTY_S - SWEEP_S) == []
    assert worker.status == "degraded"
    assert pool.turn(2 * SWEEP_S) == [worker]


def test_a_coordinator_that_stood_still_suspects_itself(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    (worker,) = pool.join(1)
    pool.past_amnesty(worker)
    pool.now += 120
    assert pool.fleet.sweep() == []
    assert worker.status != "offline"
    assert "stood still for 120 s" in caplog.text
    assert pool.turn(AMNESTY_S - 4) == []
    assert pool.turn(8) == [worker]


def test_a_third_of_the_fleet_falling_silent_at_once_is_taken_for_our_own_fault(pool: Pool) -> None:
    workers = pool.join(12)
    pool.past_amnesty(*workers)
    assert pool.turn(120, *workers[4:]) == []
    assert "4 of 12 workers fell silent within a minute" in pool.fleet.amnesty_reason
    assert len(pool.turn(AMNESTY_S, *workers[4:])) == 4


def test_a_small_fleet_or_a_small_part_of_it_is_simply_offline(pool: Pool) -> None:
    workers = pool.join(12)
    pool.past_amnesty(*workers)
    assert len(pool.turn(120, *workers[3:])) == 3
    few = Pool()
    nine = few.join(9)
    few.past_amnesty(*nine)
    assert len(few.turn(120)) == 9


def test_the_interval_grows_with_the_fleet() -> None:
    pool = Pool(beats_per_s=10)
    assert pool.fleet.interval_s == INTERVAL_S
    pool.join(450)
    assert pool.fleet.interval_s == 45.0


def test_a_worker_that_left_is_offline_and_said_so_until_it_speaks_again(pool: Pool) -> None:
    (worker,) = pool.join(1)
    pool.fleet.leave(worker)
    assert (worker.status, worker.reason) == ("offline", "it left by itself")
    pool.fleet.touch(worker)
    assert (worker.status, worker.usable) == ("healthy", True)


def test_after_a_restart_workers_count_until_they_are_known_to_be_away() -> None:
    known = Pool()
    here, left = known.join(2)
    known.fleet.leave(left)
    assert known.fleet.changed == {left.id}
    again = Pool(here.record, left.record)
    assert [worker.status for worker in again.fleet.workers.values()] == ["degraded", "offline"]
    shown = again.fleet.show(again.fleet.get(here.id))
    assert shown["last_heartbeat"] == "2023-11-14T22:13:20Z", "when it was last heard of, not when we started"
    again.beat(again.fleet.get(left.id))
    assert again.fleet.get(left.id).record.away == ""


def test_what_a_disabled_or_absent_worker_runs_does_not_count(pool: Pool) -> None:
    worker, disabled, gone = pool.join(3)
    box = ContainerStatus(name="notes-worker", service="notes", state="healthy")
    for one in (worker, disabled, gone):
        pool.beat(one, containers=(box,))
    disabled.record = msgspec.structs.replace(disabled.record, disabled=True)
    pool.fleet.leave(gone)
    assert pool.fleet.running() == {"notes": 1}


def test_an_images_size_is_the_median_of_what_workers_that_are_present_tell(pool: Pool) -> None:
    one, two, liar, paused, gone = workers = pool.join(5)
    given = Assignment(name="notes-worker", service="notes", image="x/notes:1", port=8000)

    def tell(worker: Worker, *sizes: int, name: str = "notes-worker", **more: object) -> dict[str, int]:
        box = ContainerStatus(name=name, service="notes", state="healthy")
        boxes = tuple(msgspec.structs.replace(box, image_bytes=size) for size in sizes)
        pool.beat(worker, containers=boxes, **more)
        return image_sizes(workers)

    for worker in workers:
        worker.record = msgspec.structs.replace(worker.record, assignment=(given,))
    assert tell(one, 0) == {}, "it does not know"
    assert tell(one, 700, name="its-owners") == {}, "of which image is that?"
    assert tell(one, 700) == {"x/notes:1": 700}
    assert tell(liar, MOST_IMAGE_BYTES) == {"x/notes:1": 700}, "of two the lower one"
    assert tell(two, 720) == {"x/notes:1": 720}
    assert tell(liar, *(MOST_IMAGE_BYTES - number for number in range(100))) == {"x/notes:1": 720}, "one say each"
    assert tell(paused, 1, paused=True) == {"x/notes:1": 720}
    assert tell(paused, 1) == {"x/notes:1": 700}
    pool.fleet.leave(gone)
    assert image_sizes(workers) == {"x/notes:1": 700}


def test_an_image_that_a_machine_runs_for_another_model_is_not_fetched_for_one_more() -> None:
    def given(model: str) -> Assignment:
        files = (ModelFile(name=f"{model}.gguf", size_bytes=5),)
        named = AssignedModel(name=model, files=files)
        return Assignment(name=f"llama-{model}", service="llm", image="x/llama:1", port=8000, model=named)

    sizes = {"x/llama:1": 700}
    found = moved(record(1, assignment=(given("a"),)), (given("a"), given("b"), given("c")), sizes)
    assert found == Moved((), ("llm b", "llm c"), images=0, image_bytes=0, images_unknown=0, model_bytes=10)
    found = moved(record(1), (given("a"), given("b")), sizes)
    assert found == Moved((), ("llm a", "llm b"), images=1, image_bytes=700, images_unknown=0, model_bytes=10)


def test_a_machine_that_runs_plain_processes_fetches_no_image() -> None:
    given = (Assignment(name="rma-notes", service="notes", image="x/notes:1", port=8000),)
    process = RuntimeReport(name="process", state="healthy", isolated=False)
    engine = RuntimeReport(name="docker", state="unhealthy", isolated=True)
    for runtimes, images in (
        ((process, engine), 0),
        ((process, msgspec.structs.replace(engine, state="healthy")), 1),
        ((), 1),
    ):
        found = moved(msgspec.structs.replace(record(1), runtimes=runtimes), given, {})
        assert (found.starts, found.images, found.images_unknown) == (("notes",), images, images)


def test_a_worker_is_shown_as_the_contract_writes_it(pool: Pool) -> None:
    (worker,) = pool.join(1)
    pool.beat(worker, current_load=0.25)
    shown = pool.fleet.show(worker)
    names = {"worker_id", "tier", "status", "ip_address", "registered_at", "last_heartbeat", "current_load"}
    names |= {"tasks_completed", "capabilities", "assigned_containers"}
    assert names <= set(shown)
    assert shown["last_heartbeat"] == "2027-01-15T08:00:00Z"
    assert shown["capabilities"]["ram"] == "16GB"
    assert "hardware" in pool.fleet.show(worker, full=True)


def test_ids_come_from_the_key_and_never_clash(pool: Pool) -> None:
    thumbprint = "aa" * 32
    first = pool.fleet.new_id(thumbprint)
    assert first == "worker-aaaaaaaa"
    pool.fleet.add(record(1, worker_id=first, thumbprint=thumbprint), ip_address="")
    with pytest.raises(NotFound, match="no worker id is free"):
        pool.fleet.new_id(thumbprint)
    assert pool.fleet.new_id("aa" * 4 + "bb" * 28) == "worker-aaaaaaab"
    assert pool.fleet.by_thumbprint(thumbprint) is not None
    with pytest.raises(NotFound):
        pool.fleet.get("worker-ffffffff")


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "beat", "leave", "turn", "disable", "enable", "assign"]),
        st.integers(0, 3),
        st.lists(st.sampled_from(["notes", "ocr"]), max_size=2, unique=True),
    ),
    max_size=40,
)


@given(STEPS)
def test_the_kept_count_of_assigned_services_is_the_counted_one(steps: list[tuple[str, int, list[str]]]) -> None:
    pool = Pool()
    for step, number, services in steps:
        worker = pool.fleet.workers.get(f"worker-{number:08x}")
        if step == "turn":
            pool.turn(INTERVAL_S * 4)
        elif step == "add" or worker is None:
            pool.fleet.add(record(number) if worker is None else worker.record, ip_address="10.0.0.1")
        elif step == "beat":
            pool.beat(worker)
        elif step == "leave":
            pool.fleet.leave(worker)
        else:
            assignment = tuple(
                Assignment(name=f"rma-{name}", service=name, image="an/image", port=8000) for name in services
            )
            more = {"assignment": assignment} if step == "assign" else {"disabled": step == "disable"}
            worker.record = msgspec.structs.replace(worker.record, **more)
            pool.fleet.recount(worker)
        for besides in ("", f"worker-{number:08x}"):
            assert pool.fleet.assigned(besides=besides) == counted(pool.fleet, besides) | zeroes(pool.fleet, besides)


def counted(fleet: Fleet, besides: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for worker in fleet.workers.values():
        if worker.id != besides and worker.present:
            for assignment in worker.record.assignment:
                counts[assignment.service] = counts.get(assignment.service, 0) + 1
    return counts


def zeroes(fleet: Fleet, besides: str) -> dict[str, int]:
    """Services that nobody runs any more stay in the count with 0, which says the same."""
    return {name: 0 for name, count in fleet.assigned(besides=besides).items() if count == 0}


def serving(model: str, *, by_owner: bool = False) -> ContainerStatus:
    found = (ModelStatus(name=model),)
    return ContainerStatus(name=f"llama-{model}", service="llm", state="healthy", models=found, by_owner=by_owner)


def test_a_model_counts_where_it_is_assigned_and_where_its_owner_offers_it(pool: Pool) -> None:
    [one, two] = pool.join(2)
    given = Assignment(
        name="llama-a", service="llm", image="x/y:1", port=8000,
        model=AssignedModel(name="a", files=(ModelFile(name="a.gguf", size_bytes=1),)),
    )  # fmt: skip
    one.record = msgspec.structs.replace(one.record, assignment=(given,))
    pool.fleet.recount(one)
    pool.beat(one, containers=(serving("a"), serving("b", by_owner=True)))
    pool.beat(two, containers=(serving("a", by_owner=True), serving("c")))
    counted = {name: count for name, count in pool.fleet.assigned().items() if count}
    # What somebody runs that nobody assigned, and that is not offered by its owner, is no copy of the pool's.
    assert counted == {"llm": 1, "llm a": 2, "llm b": 1}


def test_a_paused_worker_counts_for_nothing_and_is_given_nothing_until_it_goes_on(pool: Pool) -> None:
    [one] = pool.join(1)
    box = serving("a", by_owner=True)
    pool.beat(one, containers=(box,), paused=True)
    assert (one.usable, sum(pool.fleet.assigned().values()), pool.fleet.running()) == (False, 0, {})
    assert pool.fleet.show(one)["paused"] is True
    pool.beat(one, containers=(box,))
    assert (one.usable, pool.fleet.assigned(), pool.fleet.running()) == (True, {"llm a": 1}, {"llm": 1})


def test_an_owner_offers_no_more_slots_than_one_machine_may_bring(pool: Pool) -> None:
    [one] = pool.join(1)
    pool.beat(one, containers=(msgspec.structs.replace(serving("a", by_owner=True), slots=1000),))
    assert one.offered() == {"llm": 64}
    pool.beat(one, containers=(msgspec.structs.replace(serving("a", by_owner=True), service="ner"),))
    assert one.offered() == {}, "only what an owner may offer"
