"""A worker with several models: how many tasks of each it is given at once, whatever the service has in all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.domain.fleet import Worker
from rma_coordinator.domain.tasks import NO_SHARES
from rma_coordinator.domain.worker_records import WorkerRecord
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.models.worker import ContainerStatus, ModelStatus
from tests.dispatch_bench import Bench

if TYPE_CHECKING:
    from rma_coordinator.domain.tasks import Seat, Task
    from rma_core.models.worker import ContainerState

MODELS = {"llm": frozenset({"small", "large"})}
SHARES = {"llm small": 4, "llm large": 1}


def both(bench: Bench, name: str) -> Seat:
    """Let a worker offer four slots of a small model and one of a large one."""
    bench.dispatcher.arrived(name)
    bench.dispatcher.offers(name, {"llm": 5}, usable=True, models=MODELS, shares=SHARES)
    return bench.dispatcher.seat(name)


def given_to(task: Task) -> str:
    return task.attempts[-1].worker_id if task.attempts else ""


def test_a_full_model_waits_while_others_of_the_same_worker_are_given_theirs() -> None:
    bench = Bench()
    both(bench, "w1")
    large = [bench.task("llm", model="large") for _ in range(2)]
    small = [bench.task("llm", model="small") for _ in range(2)]
    assert [one.state for one in large] == ["running", "queued"]
    assert [one.state for one in small] == ["running", "running"]
    bench.turn(4)
    assert len(large[1].attempts) == 0, "it was offered where it had no room"


def test_what_waits_for_a_full_model_is_given_to_whoever_has_room_for_it() -> None:
    bench = Bench()
    both(bench, "w1")
    bench.task("llm", model="large")
    waiting = bench.task("llm", model="large")
    both(bench, "w2")
    assert given_to(waiting) == "w2"


def test_the_next_of_a_model_is_given_when_its_slot_is_free_again() -> None:
    bench = Bench()
    both(bench, "w1")
    first, second = (bench.task("llm", model="large") for _ in range(2))
    attempt = bench.attempt(first)
    bench.dispatcher.accept(attempt)
    assert second.state == "queued"
    bench.dispatcher.succeed(attempt)
    assert given_to(second) == "w1"


@given(asked=st.lists(st.sampled_from(["small", "large"]), max_size=20))
def test_nobody_is_given_more_of_a_model_than_it_takes_and_nothing_waits_beside_room(asked: list[str]) -> None:
    bench = Bench()
    both(bench, "w1")
    tasks = [bench.task("llm", model=model) for model in asked]
    for model, most in (("small", 4), ("large", 1)):
        running = [one for one in tasks if one.model == model and one.state == "running"]
        assert len(running) == min(most, asked.count(model))


def container(*models: str, slots: int, state: ContainerState = "healthy") -> ContainerStatus:
    having = tuple(ModelStatus(name=model) for model in models)
    return ContainerStatus(name=f"llm-{models[0]}", service="llm", state=state, slots=slots, models=having)


SMALL, LARGE = container("small", slots=4), container("large", slots=1)


def worker_with(*parts: ContainerStatus) -> Worker:
    record = WorkerRecord(
        worker_id="worker-00000001",
        thumbprint="1" * 64,
        public_key="k",
        registered_at=1.0,
        report=HardwareReport(capabilities=Capabilities(cpu_cores=8, ram="8.0GB")),
    )
    worker = Worker(record, now=0)
    worker.containers = parts
    return worker


def test_a_service_that_several_containers_share_is_counted_for_each_model() -> None:
    worker = worker_with(SMALL, LARGE)
    assert dict(worker.shares) == SHARES
    assert worker.shares is worker.shares, "a heartbeat that changes nothing would look like a change"


def test_a_model_that_has_its_service_to_itself_has_all_of_its_slots() -> None:
    assert worker_with(SMALL).shares is NO_SHARES
    assert worker_with(SMALL, container("large", slots=1, state="starting")).shares is NO_SHARES
    assert worker_with().shares is NO_SHARES


def test_models_that_one_server_has_together_share_its_slots() -> None:
    server = container("a", "small", slots=2)
    assert dict(worker_with(SMALL, LARGE, server).shares) == {"llm small": 6, "llm large": 1, "llm a": 2}
