"""Reconciliation against runtimes that fail in named ways, under a clock of the test's own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rma_core.agent import engines as engines_module
from rma_core.agent import keeper, placing
from rma_core.agent import reconcile as reconcile_module
from rma_core.agent.consent import Consent
from rma_core.agent.engines import in_order, stopped
from rma_core.agent.placing import spec_hash
from rma_core.agent.reconcile import Reconciler
from rma_core.catalog import Needs, ProcessForm
from rma_core.errors import RuntimeFailure
from rma_core.interfaces import ContainerHandle, ContainerSpec, ContainerState, RuntimeHealth
from rma_core.models.hardware import ContainerAccess, Device
from rma_core.models.strict import decode, encode
from rma_core.models.worker import MOST_IMAGE_BYTES, Assignment, ContainerStatus
from tests.agent_runtimes import (
    CrashLoopRuntime,
    FullDiskRuntime,
    HangsRuntime,
    MemoryRuntime,
    NoEngineRuntime,
    PullBreaksRuntime,
    RaisingRuntime,
)
from tests.agent_service import eventually

if TYPE_CHECKING:
    from rma_core.agent.endpoint import Endpoint

WORKER = "worker-0123abcd"
FORM = ProcessForm(distribution="rma-notes", module="rma_notes")


def wanted(service: str = "notes", **more: object) -> Assignment:
    plain = {
        "name": f"rma-{service}",
        "service": service,
        "image": f"ghcr.io/rma/{service}-worker:latest",
        "port": 8000,
    }
    return Assignment(**{**plain, **more})  # type: ignore[arg-type]


class Machine:
    """A reconciler with a clock that only the test moves, and a health that the test sets."""

    def __init__(self, *runtimes: MemoryRuntime, consent: Consent | None = None, gpus: tuple[Device, ...] = ()) -> None:
        self.now = 1000.0
        self.sick: str = ""
        self.runtimes = {runtime.name: runtime for runtime in runtimes}
        self.reconciler = self.fresh(consent, gpus)

    def fresh(self, consent: Consent | None = None, gpus: tuple[Device, ...] = ()) -> Reconciler:
        return Reconciler(
            in_order(self.runtimes, list(self.runtimes), clock=lambda: self.now),
            worker_id=WORKER,
            consent=consent or Consent(everything=True),
            gpus=gpus,
            check=self.check,
            clock=lambda: self.now,
            uniform=lambda low, _: low,
        )

    async def check(self, client: Endpoint, path: str) -> str:
        return self.sick

    async def rounds(self, count: int = 4, *, seconds: float = 0.0) -> None:
        for _ in range(count):
            await self.reconciler.round()
            self.now += seconds

    def states(self) -> dict[str, str]:
        return {status.name: status.state for status in self.reconciler.statuses()}

    def reason(self) -> str:
        return self.reconciler.statuses()[0].reason


async def test_a_wanted_container_is_pulled_started_and_found_healthy() -> None:
    machine = Machine(runtime := MemoryRuntime())
    machine.reconciler.want(1, [wanted(slots=3)])
    await machine.rounds()
    assert machine.states() == {"rma-notes": "healthy"}
    assert machine.reconciler.slots() == {"notes": 3}
    assert runtime.calls[:4] == ["list_owned", "has_image", "pull", "start"]
    spec = next(iter(runtime.specs.values()))
    assert (spec.worker_id, spec.spec_hash) == (WORKER, spec_hash(wanted(slots=3)))


@pytest.mark.parametrize(
    ("told", "size"), [(0, 0), (700_000_000, 700_000_000), (-1, 0), (2**60, MOST_IMAGE_BYTES)]
)  # fmt: skip
async def test_an_images_size_is_told_once_its_container_runs_and_never_one_that_a_pool_would_refuse(
    told: int, size: int
) -> None:
    machine = Machine(MemoryRuntime(image_bytes=told))
    machine.reconciler.want(1, [wanted()])
    assert [status.image_bytes for status in machine.reconciler.statuses()] == [0]
    await machine.rounds()
    machine.reconciler = machine.fresh()  # as after kill -9
    machine.reconciler.want(5, [wanted()])
    await machine.rounds()
    [status] = machine.reconciler.statuses()
    assert status.image_bytes == size
    assert decode(encode(status), ContainerStatus, subject="container") == status


async def test_what_is_no_longer_wanted_is_removed_and_a_new_version_replaces_the_old_one() -> None:
    machine = Machine(runtime := MemoryRuntime())
    machine.reconciler.want(1, [wanted(), wanted("ner")])
    await machine.rounds()
    machine.reconciler.want(2, [wanted(env={"MODEL": "new"})])
    await machine.rounds()
    assert machine.states() == {"rma-notes": "healthy"}
    assert [handle.spec_hash for handle in runtime.containers.values()] == [spec_hash(wanted(env={"MODEL": "new"}))]


async def test_a_restarted_agent_adopts_its_containers_and_clears_away_the_others() -> None:
    machine = Machine(runtime := MemoryRuntime())
    machine.reconciler.want(1, [wanted(), wanted("ner")])
    await machine.rounds()
    before = {handle.name: handle.id for handle in runtime.containers.values()}
    machine.reconciler = machine.fresh()  # as after kill -9
    machine.reconciler.want(5, [wanted()])
    await machine.rounds()
    assert {handle.name: handle.id for handle in runtime.containers.values()} == {"rma-notes": before["rma-notes"]}
    assert machine.states() == {"rma-notes": "healthy"}


async def test_an_adopted_container_of_an_older_version_is_replaced() -> None:
    machine = Machine(runtime := MemoryRuntime())
    machine.reconciler.want(1, [wanted()])
    await machine.rounds()
    machine.reconciler = machine.fresh()
    machine.reconciler.want(2, [wanted(env={"A": "1"})])
    await machine.rounds()
    assert [handle.spec_hash for handle in runtime.containers.values()] == [spec_hash(wanted(env={"A": "1"}))]


async def test_nothing_is_cleared_away_before_the_coordinator_has_said_what_it_wants() -> None:
    machine = Machine(runtime := MemoryRuntime())
    machine.reconciler.want(1, [wanted()])
    await machine.rounds()
    machine.reconciler = machine.fresh()
    await machine.rounds()
    assert runtime.running() == {"rma-notes"}


async def test_a_crash_loop_waits_longer_each_time_and_is_given_up_with_the_last_words() -> None:
    machine = Machine(runtime := CrashLoopRuntime())
    machine.reconciler.want(1, [wanted()])
    starts: list[float] = []
    for _ in range(400):
        before = runtime.calls.count("start")
        await machine.reconciler.round()
        starts += [machine.now] * (runtime.calls.count("start") - before)
        machine.now += 1
    gaps = [round(b - a) for a, b in itertools.pairwise(starts)]
    assert len(starts) == 5
    assert gaps == sorted(gaps)
    assert [gap >= least for gap, least in zip(gaps, (0, 10, 20, 40), strict=True)] == [True] * 4
    assert machine.states() == {"rma-notes": "failed"}
    assert "failed 5 times in 30 min: ended with exit code 3; its last words: last words" in machine.reason()
    assert runtime.containers == {}


async def test_a_given_up_container_is_tried_again_when_the_desired_state_changes_or_an_hour_later() -> None:
    machine = Machine(runtime := CrashLoopRuntime())
    machine.reconciler.want(1, [wanted()])
    await machine.rounds(200, seconds=5)
    assert machine.states() == {"rma-notes": "failed"}
    tried = runtime.calls.count("start")
    machine.reconciler.want(2, [wanted()])
    await machine.rounds(1)
    assert runtime.calls.count("start") == tried + 1
    await machine.rounds(200, seconds=5)
    tried = runtime.calls.count("start")
    machine.now += 3600
    await machine.rounds(1)
    assert runtime.calls.count("start") == tried + 1


async def test_ten_minutes_of_health_forgive_earlier_failures() -> None:
    machine = Machine(runtime := MemoryRuntime())
    machine.reconciler.want(1, [wanted()])
    for _ in range(12):
        await machine.rounds(70, seconds=10)
        assert machine.states() == {"rma-notes": "healthy"}
        runtime.kill("rma-notes")
    await machine.rounds(70, seconds=10)
    assert machine.states() == {"rma-notes": "healthy"}


async def test_a_container_that_stops_answering_is_restarted_unless_it_is_at_work() -> None:
    machine = Machine(runtime := MemoryRuntime())
    machine.reconciler.want(1, [wanted()])
    await machine.rounds()
    slot = machine.reconciler.place("notes")
    assert not isinstance(slot, str)
    machine.sick = "no answer"
    await machine.rounds(10, seconds=10)
    assert runtime.calls.count("start") == 1
    slot.release()
    await machine.rounds(3, seconds=10)
    assert runtime.calls.count("stop") == 1


async def test_a_container_that_never_gets_healthy_counts_as_failed_with_the_reason() -> None:
    machine = Machine(MemoryRuntime())
    machine.sick = "GET /health answered 503"
    machine.reconciler.want(1, [wanted(start_timeout_s=30)])
    await machine.rounds(20, seconds=2)
    assert "not healthy within 30 s: GET /health answered 503" in machine.reason()


async def test_a_broken_pull_is_tried_again_and_never_replaced_by_a_process() -> None:
    machine = Machine(PullBreaksRuntime("docker"), process := MemoryRuntime("process", isolated=False))
    machine.reconciler.want(1, [wanted(process=FORM)])
    await machine.rounds(300, seconds=10)
    assert machine.states() == {"rma-notes": "backoff"}
    assert "connection to the registry was reset" in machine.reason()
    assert process.calls.count("start") == 0
    pulls = machine.runtimes["docker"].calls.count("pull")
    assert 8 <= pulls <= 20


async def test_a_pull_that_says_nothing_for_long_has_failed_and_one_that_reports_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placing, "PULL_SILENCE_S", 0.4)
    machine = Machine(runtime := HangsRuntime("pull", reports=12))
    machine.reconciler.want(1, [wanted()])
    began = time.monotonic()
    await machine.rounds(1)
    assert machine.states() == {"rma-notes": "backoff"}
    assert "said nothing for 0 s" in machine.reason()
    assert time.monotonic() - began >= 0.4 + 11 * 0.05, "each report gave it more time"
    assert runtime.calls.count("pull") == 1


async def test_a_start_that_never_returns_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "START_WITHIN_S", 0.2)
    machine = Machine(HangsRuntime("start"))
    machine.reconciler.want(1, [wanted()])
    await machine.rounds(1)
    assert machine.states() == {"rma-notes": "backoff"}
    assert "memory: no answer within 0 s" in machine.reason()


async def test_a_full_disk_is_said_and_tried_again_every_five_minutes() -> None:
    machine = Machine(runtime := FullDiskRuntime())
    machine.reconciler.want(1, [wanted()])
    await machine.rounds(120, seconds=10)
    assert (machine.states(), machine.reason()) == ({"rma-notes": "backoff"}, "memory: the disk is full")
    assert runtime.calls.count("pull") == 4


async def test_an_image_missing_in_one_engine_is_looked_for_in_the_next() -> None:
    first, second = MemoryRuntime("docker"), MemoryRuntime("podman", images=("local/notes",))
    machine = Machine(first, second)
    machine.reconciler.want(1, [wanted(image="local/notes")])
    await machine.rounds()
    assert second.running() == {"rma-notes"}
    assert machine.reconciler.statuses()[0].runtime == "podman"


async def test_an_image_that_no_engine_has_runs_as_a_process_only_where_the_owner_lists_that() -> None:
    process = MemoryRuntime("process", isolated=False, images=("local/notes",))
    machine = Machine(MemoryRuntime("docker"), process)
    machine.reconciler.want(1, [wanted(image="local/notes", process=FORM)])
    await machine.rounds()
    assert process.running() == {"rma-notes"}
    assert machine.reconciler.statuses()[0].isolated is False
    alone = Machine(MemoryRuntime("docker"))
    alone.reconciler.want(1, [wanted(image="local/notes", process=FORM)])
    await alone.rounds()
    assert alone.states() == {"rma-notes": "failed"}


async def test_a_missing_image_is_not_pulled_again_but_seen_when_it_is_built_here() -> None:
    machine = Machine(runtime := MemoryRuntime())
    machine.reconciler.want(1, [wanted(image="local/notes")])
    await machine.rounds(50, seconds=60)
    assert machine.states() == {"rma-notes": "failed"}
    assert machine.reason() == "memory: no registry has local/notes"
    assert runtime.calls.count("pull") == 1
    runtime.images.add("local/notes")
    await machine.rounds()
    assert machine.states() == {"rma-notes": "healthy"}


async def test_compute_never_runs_as_a_process_and_a_service_without_a_process_form_neither() -> None:
    process = MemoryRuntime("process", isolated=False)
    machine = Machine(process)
    machine.reconciler.want(1, [wanted("compute", process=FORM), wanted()])
    await machine.rounds()
    assert process.calls.count("start") == 0
    assert machine.states() == {"rma-compute": "failed", "rma-notes": "failed"}


async def test_without_any_engine_the_owners_processes_serve() -> None:
    process = MemoryRuntime("process", isolated=False)
    machine = Machine(NoEngineRuntime("docker"), process)
    machine.reconciler.want(1, [wanted(process=FORM)])
    await machine.rounds()
    assert process.running() == {"rma-notes"}


async def test_an_engine_that_goes_down_is_said_once_and_everything_is_back_when_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    machine = Machine(runtime := MemoryRuntime("docker"), process := MemoryRuntime("process", isolated=False))
    machine.reconciler.want(1, [wanted(process=FORM)])
    await machine.rounds()
    runtime.down = "the Docker daemon is not running"
    machine.sick = "no answer"
    runtime.kill("rma-notes")
    await machine.rounds(20, seconds=20)
    assert machine.states() == {"rma-notes": "unhealthy"}
    assert "not running" in machine.reason()
    assert process.calls.count("start") == 0  # it ran in Docker and waits for it
    runtime.down = machine.sick = ""
    await machine.rounds(6, seconds=20)
    assert machine.states() == {"rma-notes": "healthy"}
    said = [r.message for r in caplog.records if r.name == "rma_core.agent.engines"]
    assert said == [
        "docker 1 can be used",
        "process 1 can be used",
        "docker cannot be used: the Docker daemon is not running",
        "docker 1 can be used again",
    ]
    assert machine.reconciler.statuses()[0].restarts == 0  # it was not the container's failure


async def test_a_container_that_outlives_its_engine_goes_on_serving() -> None:
    machine = Machine(runtime := MemoryRuntime())
    machine.reconciler.want(1, [wanted()])
    await machine.rounds()
    runtime.down = "restarting"
    await machine.rounds(3, seconds=20)
    assert machine.states() == {"rma-notes": "healthy"}
    runtime.down = ""
    await machine.rounds(3, seconds=20)
    assert runtime.calls.count("start") == 1


async def test_what_the_owner_has_not_agreed_to_is_refused_and_never_touched() -> None:
    machine = Machine(runtime := MemoryRuntime(), consent=Consent.to([wanted()]))
    machine.reconciler.want(1, [wanted(), wanted("ner")])
    await machine.rounds()
    assert machine.states() == {"rma-notes": "healthy", "rma-ner": "refused"}
    assert runtime.running() == {"rma-notes"}


async def test_a_runtime_with_a_bug_costs_its_container_and_not_the_agent(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(RaisingRuntime())
    machine.reconciler.want(1, [wanted()])
    await machine.rounds()
    assert "the plugin failed unexpectedly: KeyError" in machine.reason()


class BreaksWhenAskedToStop(MemoryRuntime):
    """Starts what ends at once; its `stop` and `logs` raise what no contract mentions."""

    def __init__(self, error: BaseException, *, exits: bool = False) -> None:
        super().__init__()
        self.error, self.exits, self.broken = error, exits, True

    async def start(self, spec: ContainerSpec) -> ContainerHandle:
        handle = await super().start(spec)
        if self.exits:
            self.states[handle.id] = ContainerState(state="exited", exit_code=3)
        return handle

    async def logs(self, handle: ContainerHandle, *, tail_lines: int = 100) -> str:
        raise self.error

    async def stop(self, handle: ContainerHandle, *, grace_s: float = 10.0) -> None:
        if self.broken:
            self.calls.append("stop")
            raise self.error
        await super().stop(handle, grace_s=grace_s)


UNEXPECTED = [KeyError("oops"), OSError(5, "oops"), SystemExit(3), asyncio.CancelledError(), TimeoutError()]


@pytest.mark.parametrize("error", UNEXPECTED, ids=lambda error: type(error).__name__)
async def test_a_runtime_that_breaks_while_a_failure_is_cleared_away_does_not_end_the_keeper(
    error: BaseException,
) -> None:
    machine = Machine(runtime := BreaksWhenAskedToStop(error, exits=True))
    machine.reconciler.want(1, [wanted()])
    machine.reconciler.start()
    await eventually(lambda: runtime.calls.count("stop") >= 1)
    await eventually(lambda: machine.states() == {"rma-notes": "backoff"})
    assert "ended with exit code 3" in machine.reason()
    runtime.broken = False
    await machine.reconciler.close(stop=True)
    assert runtime.containers == {}


@pytest.mark.parametrize("error", UNEXPECTED, ids=lambda error: type(error).__name__)
async def test_a_container_that_cannot_be_stopped_does_not_hold_its_successor_for_ever(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile_module, "TAKE_DOWN_PAUSE_S", 0.0)
    machine = Machine(runtime := BreaksWhenAskedToStop(error))
    machine.reconciler.want(1, [wanted()])
    machine.reconciler.start()
    await eventually(machine.reconciler.free)
    machine.reconciler.want(2, [wanted(env={"MODEL": "new"})])
    # It is tried in spite of the old one, which is left to whoever finds its engine well again.
    await eventually(lambda: runtime.calls.count("stop") >= 5)
    runtime.broken = False
    machine.reconciler.want(3, [wanted(env={"MODEL": "newer"})])
    await eventually(machine.reconciler.free)
    assert [handle.spec_hash for handle in runtime.containers.values()] == [spec_hash(wanted(env={"MODEL": "newer"}))]
    await machine.reconciler.close(stop=True)


@pytest.mark.parametrize("error", UNEXPECTED, ids=lambda error: type(error).__name__)
async def test_what_an_earlier_run_left_and_cannot_be_stopped_does_not_end_the_watch(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile_module, "ENGINE_WAIT_S", 0.01)
    machine = Machine(runtime := BreaksWhenAskedToStop(error))
    machine.reconciler.want(1, [wanted()])
    await machine.rounds()
    machine.reconciler = machine.fresh()  # as after kill -9
    machine.reconciler.want(2, [])
    machine.reconciler.start()
    await eventually(lambda: runtime.calls.count("stop") >= 3)
    runtime.broken = False
    await eventually(lambda: not runtime.containers)
    await machine.reconciler.close(stop=False)


class HangsWhenAskedToStop(MemoryRuntime):
    """Its `stop` never returns."""

    async def stop(self, handle: ContainerHandle, *, grace_s: float = 10.0) -> None:
        await asyncio.Event().wait()


async def test_a_runtime_that_hangs_is_a_failure_with_its_name_and_a_cancellation_stays_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = HangsWhenAskedToStop()
    handle = ContainerHandle(runtime="memory", id="c1", name="rma-notes", service="notes", spec_hash="")
    stopping = asyncio.create_task(stopped(runtime, handle))
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    monkeypatch.setattr(engines_module, "STOP_GRACE_S", 0.01)
    monkeypatch.setattr(engines_module, "STOP_SLACK_S", 0.01)
    with pytest.raises(RuntimeFailure, match="memory: no answer within"):
        await stopped(runtime, handle)


class FallsSilent(MemoryRuntime):
    """One of its calls never returns once it is told so."""

    silent = ""

    async def _call(self, name: str) -> None:
        if name == self.silent:
            await asyncio.Event().wait()

    async def has_image(self, spec: ContainerSpec) -> bool:
        await self._call("has_image")
        return await super().has_image(spec)

    async def inspect(self, handle: ContainerHandle) -> ContainerState:
        await self._call("inspect")
        return await super().inspect(handle)

    async def endpoint(self, handle: ContainerHandle) -> str:
        await self._call("endpoint")
        return await super().endpoint(handle)


@pytest.mark.parametrize("call", ["has_image", "inspect", "endpoint"])
async def test_a_runtime_that_does_not_say_how_things_stand_counts_as_absent_until_it_does(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(engines_module, "LOOK_TIMEOUT_S", 0.02)
    runtime = FallsSilent()
    machine = Machine(runtime)
    runtime.silent = call
    machine.reconciler.want(1, [wanted()])
    await machine.rounds(2, seconds=20)
    assert "memory: no answer within" in machine.reason()
    assert "stop" not in runtime.calls
    runtime.silent = ""
    await machine.rounds(4, seconds=20)
    assert machine.states() == {"rma-notes": "healthy"}


async def test_a_container_whose_runtime_falls_silent_goes_on_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines_module, "LOOK_TIMEOUT_S", 0.02)
    machine = Machine(runtime := FallsSilent())
    machine.reconciler.want(1, [wanted()])
    await machine.rounds()
    runtime.silent = "inspect"
    await machine.rounds(3, seconds=20)
    assert machine.states() == {"rma-notes": "healthy"}
    assert "stop" not in runtime.calls


class ExitsOnStart(MemoryRuntime):
    """A plugin that takes itself for the program."""

    async def start(self, spec: ContainerSpec) -> ContainerHandle:
        raise SystemExit(3)


async def test_a_runtime_that_exits_when_it_should_start_costs_its_container_and_not_the_agent() -> None:
    machine = Machine(ExitsOnStart())
    machine.reconciler.want(1, [wanted()])
    machine.reconciler.start()
    await eventually(lambda: "the plugin failed unexpectedly: SystemExit" in machine.reason())
    await machine.reconciler.close(stop=False)


class AnswersNonsense(MemoryRuntime):
    """Its health is nothing, and what it owns are no handles."""

    sane_health = False

    async def probe(self) -> RuntimeHealth:
        return await super().probe() if self.sane_health else None  # type: ignore[return-value]

    async def list_owned(self, worker_id: str) -> list[ContainerHandle]:
        return [None]  # type: ignore[list-item]


async def test_a_runtime_that_answers_nonsense_is_unhealthy_with_a_reason() -> None:
    machine = Machine(runtime := AnswersNonsense())
    engine = machine.reconciler.engines[0]
    await machine.rounds(1)
    assert (engine.health.state, engine.health.reason) == ("unhealthy", "memory: its health is a NoneType")
    runtime.sane_health = True
    await machine.rounds(2, seconds=20)
    assert engine.health.state == "unhealthy"
    assert "memory: the plugin failed unexpectedly: AttributeError" in engine.health.reason


async def test_a_container_that_nobody_looks_after_any_more_is_reported_as_failed() -> None:
    machine = Machine(CrashLoopRuntime())

    def breaks(low: float, high: float) -> float:
        raise ZeroDivisionError

    machine.reconciler.uniform = breaks
    machine.reconciler.want(1, [wanted()])
    machine.reconciler.start()
    await eventually(lambda: machine.states() == {"rma-notes": "failed"})
    assert "a bug in the agent, whose log has the details: ZeroDivisionError" in machine.reason()
    await machine.reconciler.close(stop=True)


async def test_a_coordinator_cannot_want_more_containers_than_a_heartbeat_can_list() -> None:
    machine = Machine(MemoryRuntime())
    machine.reconciler.want(1, [wanted(name=f"rma-{n}") for n in range(1000)])
    assert len(machine.states()) == 256


def gpu(name: str, gib: int, *, access: bool = True) -> Device:
    return Device(
        id=f"gpu:{name}",
        kind="gpu",
        name=name,
        api="cuda",
        memory_bytes=gib * 2**30,
        access=ContainerAccess(cdi=(f"nvidia.com/gpu={name}",)) if access else None,
        reason="" if access else "no toolkit",
    )


async def test_each_container_gets_the_smallest_gpu_that_is_enough_for_it_alone() -> None:
    machine = Machine(runtime := MemoryRuntime(), gpus=(gpu("big", 80), gpu("small", 12)))
    needs = Needs(gpu_api=("cuda",))
    one, two, three = (wanted("notes", name=f"rma-{n}", requires_gpu=True, needs=needs) for n in "abc")
    machine.reconciler.want(1, [one, two, three])
    await machine.rounds()
    given = {spec.name: spec.access.cdi[0] for spec in runtime.specs.values() if spec.access}
    assert given == {"rma-a": "nvidia.com/gpu=small", "rma-b": "nvidia.com/gpu=big"}
    assert machine.states()["rma-c"] == "failed"


async def test_containers_share_a_gpu_as_the_coordinator_counted_it_and_not_beyond() -> None:
    machine = Machine(runtime := MemoryRuntime(), gpus=(gpu("a", 24),))
    needs = Needs(gpu_api=("cuda",), gpu_memory="10GB")
    machine.reconciler.want(
        1, [wanted("notes", name=f"rma-{n}", requires_gpu=True, needs=needs) for n in ("one", "two", "three")]
    )
    await machine.rounds()
    given = {spec.name: spec.access.cdi[0] for spec in runtime.specs.values() if spec.access}
    assert given == {"rma-one": "nvidia.com/gpu=a", "rma-two": "nvidia.com/gpu=a"}
    assert machine.states()["rma-three"] == "failed"


@pytest.mark.parametrize(("features", "state"), [(("gpu:nvidia",), "healthy"), ((), "failed")])
async def test_a_gpu_behind_the_toolkit_alone_is_given_by_its_uuid_to_an_engine_that_has_it(
    features: tuple[str, ...], state: str
) -> None:
    device = msgspec.structs.replace(
        gpu("GPU-8c2f", 12, access=False), attributes={"container_access": "nvidia-container-toolkit"}
    )
    machine = Machine(runtime := MemoryRuntime(features=features), gpus=(device,))
    machine.reconciler.want(1, [wanted(requires_gpu=True, needs=Needs(gpu_api=("cuda",)))])
    await machine.rounds()
    assert machine.states() == {"rma-notes": state}
    given = [spec.access.cdi for spec in runtime.specs.values() if spec.access]
    assert given == ([("nvidia.com/gpu=GPU-8c2f",)] if features else [])


async def test_a_gpu_that_containers_cannot_be_given_is_a_reason_not_a_crash() -> None:
    machine = Machine(MemoryRuntime(), gpus=(gpu("a", 12, access=False),))
    machine.reconciler.want(1, [wanted(requires_gpu=True, needs=Needs(gpu_api=("cuda",)))])
    await machine.rounds()
    assert machine.states() == {"rma-notes": "failed"}
    assert "containers cannot be given a: no toolkit" in machine.reason()


async def test_a_withdrawn_container_finishes_what_it_has_first() -> None:
    machine = Machine(runtime := MemoryRuntime())
    machine.reconciler.want(1, [wanted()])
    machine.reconciler.start()
    await eventually(machine.reconciler.free)
    slot = machine.reconciler.place("notes")
    assert not isinstance(slot, str)
    machine.reconciler.want(2, [])
    await asyncio.sleep(0.05)
    assert machine.states() == {"rma-notes": "stopping"}
    assert machine.reconciler.slots() == {}
    assert isinstance(machine.reconciler.place("notes"), str)
    assert runtime.running() == {"rma-notes"}
    slot.release()
    await eventually(lambda: not runtime.containers)
    await machine.reconciler.close(stop=True)


async def test_closing_stops_everything_or_leaves_it_for_the_next_start() -> None:
    for stop, left in ((True, set()), (False, {"rma-notes"})):
        machine = Machine(runtime := MemoryRuntime())
        machine.reconciler.want(1, [wanted()])
        machine.reconciler.start()
        await eventually(machine.reconciler.free)
        await machine.reconciler.close(stop=stop)
        assert runtime.running() == left


class AnyWay(RuleBasedStateMachine):
    """Whatever happens to the engine, the agent and the desired state: once all is well, they agree."""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.runtime = MemoryRuntime()
        self.machine = Machine(self.runtime)
        self.generation = 0
        self.desired: list[Assignment] = []

    def run(self, count: int, seconds: float) -> None:
        self.loop.run_until_complete(self.machine.rounds(count, seconds=seconds))

    @rule(services=st.sets(st.sampled_from(["notes", "ner"])), version=st.integers(0, 2))
    def the_coordinator_wants(self, services: set[str], version: int) -> None:
        self.generation += 1
        self.desired = [wanted(s, env={"V": str(version)}) for s in sorted(services)]
        self.machine.reconciler.want(self.generation, self.desired)

    @rule(name=st.sampled_from(["rma-notes", "rma-ner"]))
    def a_container_dies(self, name: str) -> None:
        self.runtime.kill(name)

    @rule()
    def somebody_removes_a_container(self) -> None:
        if self.runtime.containers:
            handle = next(iter(self.runtime.containers))
            self.runtime.containers.pop(handle)
            self.runtime.states.pop(handle)

    @rule()
    def the_engine_goes_down(self) -> None:
        self.runtime.down = "down"

    @rule()
    def the_engine_comes_back(self) -> None:
        self.runtime.down = ""

    @rule(sick=st.sampled_from(["", "no answer"]))
    def health_changes(self, sick: str) -> None:
        self.machine.sick = sick

    @rule()
    def the_agent_is_killed_and_started(self) -> None:
        self.loop.run_until_complete(self.machine.reconciler.close(stop=False))
        self.machine.reconciler = self.machine.fresh()
        self.machine.reconciler.want(self.generation, self.desired)

    @rule(count=st.integers(1, 5), seconds=st.sampled_from([0.0, 1.0, 20.0, 400.0]))
    def time_passes(self, count: int, seconds: float) -> None:
        self.run(count, seconds)

    @invariant()
    def no_name_runs_twice(self) -> None:
        if hasattr(self, "runtime"):
            names = [handle.name for handle in self.runtime.containers.values()]
            assert len(names) == len(set(names))

    def teardown(self) -> None:
        if hasattr(self, "runtime"):
            try:
                self.agree()
            finally:
                self.loop.close()

    def agree(self) -> None:
        self.runtime.down = self.machine.sick = ""
        self.run(60, 200.0)  # two rescans of what was given up
        found = {(handle.name, handle.spec_hash) for handle in self.runtime.containers.values()}
        assert found == {(one.name, spec_hash(one)) for one in self.desired}
        assert set(self.machine.states().values()) <= {"healthy"}
        self.loop.run_until_complete(self.machine.reconciler.close(stop=True))
        assert self.runtime.containers == {}


TestAnyWay = AnyWay.TestCase
TestAnyWay.settings = settings(max_examples=60, stateful_step_count=25)
