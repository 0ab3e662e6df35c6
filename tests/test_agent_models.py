"""Models in an agent: loaded, watched, unloaded, one in another's way, and what becomes of one that is stuck."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.agent import keeper
from rma_core.agent.consent import Consent
from rma_core.agent.engines import in_order
from rma_core.agent.execute import AttemptFailed, forward
from rma_core.agent.llm import model_room
from rma_core.agent.llm.model_files import ModelFiles
from rma_core.agent.llm.model_room import LOOK_S, PATIENCE_S, Claim, ModelRoom, NoRoomError
from rma_core.agent.pace import LOAD_BASE_S, STALL_BASE_S, Pace
from rma_core.agent.reconcile import Reconciler
from rma_core.catalog import Needs, Room
from rma_core.errors import DownloadFailed, ModelMissing, OutOfSpace, UsageProblem
from rma_core.interfaces import GivenFile, GivenFiles, PullProgress
from rma_core.models.hardware import Capabilities, Device, HardwareReport
from rma_core.models.sizes import GIB
from rma_core.models.weights import AssignedModel, ModelFile
from rma_core.models.worker import Assignment, TaskOffer
from tests.agent_runtimes import MemoryRuntime
from tests.agent_service import LocalService, eventually, local_service
from tests.test_agent_execute import MemoryUplink

if TYPE_CHECKING:
    from pathlib import Path

    from rma_core.agent.keeper import Slot
    from rma_core.errors import RuntimeFailure

IMAGE = "ghcr.io/rma/notes-worker:latest"
FILE = ModelFile(name="m.gguf", size_bytes=GIB, sha256="1" * 64, url="https://hub.example/m.gguf")


# -- how far, how long, stuck or not ---------------------------------------------------------------------------------


@given(size=st.integers(1, 500), rate=st.floats(1e-5, 1), step=st.floats(0.5, 20))
def test_one_that_gets_further_is_never_cut_off_however_slow(size: int, rate: float, step: float) -> None:
    pace, now, share = Pace(0.0), 0.0, 0.0
    while share < 0.97:
        now, share = now + step, min(0.97, share + max(rate * step, 0.003))
        pace.at(now, share)
        assert pace.overdue(now, size * GIB) == ""


def test_one_that_stands_still_is_cut_off_long_before_its_time_is_up() -> None:
    pace = Pace(0.0)
    pace.at(10.0, 0.4)
    assert pace.overdue(10.0 + STALL_BASE_S, GIB) == ""
    assert pace.overdue(10.0 + STALL_BASE_S + 5, GIB) == "stuck at 40% for 65 s"
    assert pace.overdue(10.0 + STALL_BASE_S + 5, 20 * GIB) == "", "a larger one may pause longer"


def test_one_of_which_nothing_can_be_seen_has_the_time_that_its_size_may_need() -> None:
    pace = Pace(0.0)
    pace.at(1.0, None)
    assert pace.overdue(LOAD_BASE_S, GIB) == ""
    assert pace.overdue(LOAD_BASE_S + 21, GIB).startswith("not loaded within")
    assert pace.overdue(LOAD_BASE_S + 21, 40 * GIB) == ""
    # The last per cent is no reading of a file: it is waited for like what cannot be seen.
    pace.at(2.0, 0.99)
    assert pace.overdue(STALL_BASE_S * 2, GIB) == ""


def test_the_time_that_is_left_is_told_only_once_it_is_known() -> None:
    pace = Pace(0.0)
    assert pace.eta_s(0.0) is None
    pace.at(0.0, 0.5)
    pace.at(1.0, 0.6)
    assert pace.eta_s(1.0) is None, "too early to tell"
    pace.at(10.0, 0.6)
    assert pace.eta_s(10.0) == pytest.approx(40.0), "what an earlier run had done counts for nothing"
    pace.at(11.0, None)
    assert pace.eta_s(11.0) is None


# -- whose memory it is ----------------------------------------------------------------------------------------------


def report(memory_gib: int = 16, *gpus: Device) -> HardwareReport:
    memory = Device(id="memory", kind="memory", name="memory", memory_bytes=memory_gib * GIB)
    return HardwareReport(capabilities=Capabilities(cpu_cores=8, ram=f"{memory_gib}GB"), devices=(memory, *gpus))


class InMemory:
    """A model that is loaded and unloaded by being told so."""

    def __init__(self, name: str, gib: float, *, gpu: str = "", last_used: float = 0.0) -> None:
        self.name, self.last_used = name, last_used
        self.claim = Claim(0, gpu, int(gib * GIB)) if gpu else Claim(int(gib * GIB))
        self.in_memory = self.at_work = self.stubborn = self.loading = self.leaving = False

    def reserve(self) -> None:
        self.in_memory = True

    async def unload(self) -> bool:
        await asyncio.sleep(0)
        self.in_memory = self.in_memory and self.stubborn
        return not self.stubborn


def room_of(*tenants: InMemory, memory_gib: int = 16, gpus: tuple[Device, ...] = ()) -> ModelRoom:
    room = ModelRoom(report(memory_gib, *gpus))
    room.tenants = list(tenants)
    return room


async def moments(count: int = 3) -> None:
    """Let what waits for room look so many times."""
    for _ in range(count):
        await asyncio.sleep(LOOK_S)


async def test_what_is_in_the_way_and_longest_unused_gives_way_and_no_more_than_that() -> None:
    old, older, new = InMemory("old", 5, last_used=2), InMemory("older", 5, last_used=1), InMemory("new", 6)
    room = room_of(old, older, new)
    assert int(Room.of(report()).memory_bytes) == 12 * GIB
    await room.make_room(old)
    await room.make_room(older)
    assert not room.fits(new)
    assert room.why_not(new) == ""
    await room.make_room(new)
    assert [one.in_memory for one in (old, older, new)] == [True, False, True]


async def test_one_at_work_never_gives_way_and_nothing_gives_way_in_vain() -> None:
    busy, idle, new = InMemory("busy", 8), InMemory("idle", 2), InMemory("new", 6)
    room = room_of(busy, idle, new)
    for one in (busy, idle):
        await room.make_room(one)
    busy.at_work = True
    assert room.why_not(new) == "it needs 6 GiB of memory, and 4 GiB are free while busy is at work"
    with pytest.raises(NoRoomError, match="while busy is at work"):
        await room.make_room(new, within_s=2 * LOOK_S)
    assert idle.in_memory, "it would not have helped"


async def test_a_request_waits_until_those_in_the_way_of_its_model_are_done() -> None:
    busy, new = InMemory("busy", 8), InMemory("new", 6)
    room = room_of(busy, new)
    await room.make_room(busy)
    busy.at_work = True
    waiting = asyncio.create_task(room.make_room(new))
    await moments()
    assert (waiting.done(), room.must_wait(busy), room.fits(new)) == (False, False, False)
    busy.at_work = False
    assert await waiting
    assert (busy.in_memory, new.in_memory) == (False, True)


async def test_a_model_that_is_always_asked_gives_way_once_another_has_waited_long_enough() -> None:
    now = 0.0
    popular, other = InMemory("popular", 8), InMemory("other", 8)
    room = ModelRoom(report(), clock=lambda: now)
    room.tenants = [popular, other]
    await room.make_room(popular)
    popular.at_work = True
    waiting = asyncio.create_task(room.make_room(other))
    await moments()
    assert await room.make_room(popular) is False, "it is in memory, and asked as before"
    now += PATIENCE_S + 1
    queued = asyncio.create_task(room.make_room(popular))
    await moments()
    assert not queued.done()
    popular.at_work = False
    assert await waiting
    other.at_work = other.loading = True
    now += PATIENCE_S + 1
    await moments()
    assert await room.make_room(other) is False, "the time that it takes to load is not held against it"
    other.loading = False
    now += PATIENCE_S + 1
    assert room.must_wait(other)
    other.at_work = False
    assert await queued
    assert (popular.in_memory, other.in_memory) == (True, False)


async def test_requests_for_one_model_wait_for_its_turn_together_and_one_that_left_holds_up_nobody() -> None:
    busy, new, third = InMemory("busy", 8), InMemory("new", 6), InMemory("third", 6)
    room = room_of(busy, new, third)
    await room.make_room(busy)
    busy.at_work = True
    gone = asyncio.create_task(room.make_room(third))
    waiting = [asyncio.create_task(room.make_room(new)) for _ in range(3)]
    await moments()
    gone.cancel()
    await asyncio.wait([gone])
    busy.at_work = False
    assert sorted(await asyncio.gather(*waiting)) == [False, False, True]
    assert (new.in_memory, third.in_memory) == (True, False)


async def test_a_model_too_large_for_the_machine_says_so_at_once() -> None:
    huge = InMemory("huge", 40)
    room = room_of(huge)
    assert room.never(huge) == "it needs 40 GiB of memory, and 12 GiB are free"
    with pytest.raises(NoRoomError, match="it needs 40 GiB"):
        await room.make_room(huge)


async def test_main_memory_and_each_gpu_are_kept_apart() -> None:
    gpus = tuple(Device(id=f"gpu:{n}", kind="gpu", name="GPU", api="cuda", memory_bytes=8 * GIB) for n in (1, 2))
    one, two, other, main = (
        InMemory("one", 6, gpu="gpu:1"), InMemory("two", 6, gpu="gpu:2"), InMemory("other", 6, gpu="gpu:1"),
        InMemory("main", 10),
    )  # fmt: skip
    room = room_of(one, two, other, main, gpus=gpus)
    for tenant in (one, two, main):
        assert room.fits(tenant)
        await room.make_room(tenant)
    assert not room.fits(other)
    await room.make_room(other)
    assert [tenant.in_memory for tenant in (one, two, other, main)] == [False, True, True, True]


def test_unified_memory_is_main_memory() -> None:
    gpu = Device(id="gpu:1", kind="gpu", name="M2", api="metal", memory_bytes=11 * GIB)
    own = Device(**{**{f: getattr(gpu, f) for f in gpu.__struct_fields__}, "attributes": {"unified_memory": True}})
    needs = Needs(memory="1GB", gpu_memory="4GB")
    assert Claim.of(needs, None) == (GIB, "", 0)
    assert Claim.of(needs, gpu) == (GIB, "gpu:1", 4 * GIB)
    assert Claim.of(needs, own) == (5 * GIB, "gpu:1", 4 * GIB)


async def test_other_services_that_come_are_made_room_for() -> None:
    old, new = InMemory("old", 5, last_used=1), InMemory("new", 5, last_used=2)
    room = room_of(old, new)
    for one in (old, new):
        await room.make_room(one)
    await room.tidy()
    assert old.in_memory
    room.others([Claim(4 * GIB)])
    await room.tidy()
    assert [old.in_memory, new.in_memory] == [False, True]
    new.at_work = True
    room.others([Claim(12 * GIB)])
    await room.tidy()
    assert new.in_memory, "its requests are finished first"


@given(sizes=st.lists(st.floats(0.5, 11.5), min_size=2, max_size=8), order=st.randoms(use_true_random=False))
async def test_models_that_are_asked_for_at_once_never_take_more_than_there_is(sizes: list[float], order: Any) -> None:
    tenants = [InMemory(str(number), size, last_used=order.random()) for number, size in enumerate(sizes)]
    room = room_of(*tenants)

    async def ask(tenant: InMemory) -> None:
        await room.make_room(tenant)
        tenant.at_work = order.random() < 0.5
        asyncio.get_running_loop().call_later(0.002, setattr, tenant, "at_work", False)
        taken = sum(one.claim.main_bytes for one in tenants if one.in_memory)
        assert taken <= 12 * GIB

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_room, "LOOK_S", 0.001)
        await asyncio.gather(*(ask(tenant) for tenant in order.sample(tenants, len(tenants))))
    assert any(one.in_memory for one in tenants)


async def test_one_that_cannot_be_unloaded_keeps_the_other_out() -> None:
    stubborn, new = InMemory("stubborn", 8), InMemory("new", 8)
    room = room_of(stubborn, new)
    await room.make_room(stubborn)
    stubborn.stubborn = True
    with pytest.raises(NoRoomError, match="stubborn could not be unloaded"):
        await room.make_room(new)


# -- an agent with services that have models -------------------------------------------------------------------------


class Front(LocalService):
    """A service with a model, as RMA's own speak: loaded, on its way or in its file; the test says how far it is."""

    def __init__(self) -> None:
        super().__init__()
        self.status, self.share, self.loads, self.unloads = "cold", 0.0, 0, 0
        self.instantly = True
        self.told = True

    async def do_health(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told = {"status": self.status} | ({"phase": "loading", "progress": self.share} if self.told else {})
        write(writer, told)

    async def do_load(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(length)
        self.loads += 1
        if self.status == "cold":
            self.status = "ok" if self.instantly else "loading"
        write(writer, {})

    async def do_unload(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(length)
        self.unloads += 1
        self.status = "cold"
        write(writer, {})


class Plain(Front):
    """An engine of others: it says that it is well, and nothing of models."""

    async def do_health(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


def write(writer: asyncio.StreamWriter, told: dict[str, Any]) -> None:
    body = json.dumps(told).encode()
    writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


class NoFiles(ModelFiles):
    """Has every file at once, or fails as it is told."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.failure: RuntimeFailure | None = None
        self.steps: list[PullProgress] = []
        self.asked = 0

    async def get(self, model: AssignedModel, told: Any, *, copied: bool = False) -> GivenFiles:
        self.asked += 1
        for step in self.steps:
            told(step)
            await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        files = tuple(GivenFile(name=f.name, path=f"/{f.name}", size_bytes=f.size_bytes) for f in model.files)
        return GivenFiles(variable="MODEL_FILE", key=self.key(model), files=files)


class ModelRuntime(MemoryRuntime):
    """Every container has a front of its own, by its name; what copies of files it was told to keep is noted."""

    def __init__(self, **fronts: Front) -> None:
        super().__init__(images=(IMAGE,))
        self.fronts = fronts
        self.kept: set[str] | None = None

    async def endpoint(self, handle: Any) -> str:
        return self.fronts[handle.name].url

    async def forget_files(self, worker_id: str, keep: Any) -> None:
        self.kept = set(keep)


def wanted(name: str, gib: float = 4, **more: Any) -> Assignment:
    plain: dict[str, Any] = {
        "name": name, "service": "llm", "image": IMAGE, "port": 8000, "slots": 2,
        "env": {"MODEL": name, "CONTEXT": "4096"}, "needs": Needs(memory=f"{gib:g}GB"),
        "model": AssignedModel(name=name, files=(FILE,), licence="MIT"),
    }  # fmt: skip
    return Assignment(**{**plain, **more})


class Machine:
    """A reconciler with fronts, and a clock that only the test moves."""

    def __init__(self, folder: Path, *, idle_s: float = 0.0, **fronts: Front) -> None:
        self.now, self.fronts = 1000.0, fronts
        self.runtime, self.files = ModelRuntime(**fronts), NoFiles(folder)
        self.told = 0
        self.reconciler = Reconciler(
            in_order({"memory": self.runtime}, ["memory"], clock=lambda: self.now), worker_id="worker-0123abcd",
            consent=Consent(everything=True), room=ModelRoom(report(), clock=lambda: self.now), files=self.files,
            model_idle_s=idle_s, changed=self.changed, clock=lambda: self.now, uniform=lambda low, _: low,
        )  # fmt: skip

    def changed(self) -> None:
        self.told += 1

    async def rounds(self, count: int = 4, *, seconds: float = 0.0) -> None:
        for _ in range(count):
            await self.reconciler.round()
            self.now += seconds

    def states(self) -> dict[str, tuple[str, str]]:
        return {one.name: (one.state, one.models[0].state) for one in self.reconciler.statuses()}

    async def ask(self, model: str) -> str | None:
        """Send a request to a model as an attempt does; returns why there is no slot, if so."""
        slot = self.reconciler.place("llm", model)
        if isinstance(slot, str):
            return slot
        try:
            answer = await slot.client.request("POST", "/echo", body=b"hello")
            assert await answer.read(100) == b"hello"
            await answer.aclose()
        finally:
            slot.release()
        return None

    async def close(self) -> None:
        await self.reconciler.close(stop=True)


async def machine_with(folder: Path, stack: Any, *models: Assignment, **options: Any) -> Machine:
    fronts = options.pop("fronts", None) or {one.name: Front() for one in models}
    for front in fronts.values():
        await stack.enter_async_context(local_service(front))
    made = Machine(folder, **options, **fronts)
    stack.push_async_callback(made.close)
    made.reconciler.want(1, models)
    return made


@pytest.fixture
async def stack() -> Any:
    import contextlib

    async with contextlib.AsyncExitStack() as made:
        yield made


async def test_a_model_is_loaded_before_its_container_counts_as_healthy(tmp_path: Path, stack: Any) -> None:
    machine = await machine_with(tmp_path, stack, wanted("a"))
    front = machine.fronts["a"]
    front.instantly = False
    await machine.rounds()
    assert machine.states() == {"a": ("starting", "loading")}
    assert next(iter(machine.runtime.specs.values())).env["LOAD"] == "0"
    front.share = 0.37
    machine.now += 1
    await machine.rounds(1)
    [status] = machine.reconciler.statuses()
    assert (status.models[0].progress, status.reason) == (0.37, "loading its model 37%")
    assert machine.reconciler.slots() == {}
    front.status = "ok"
    await machine.rounds(2)
    assert machine.states() == {"a": ("healthy", "loaded")}
    [status] = machine.reconciler.statuses()
    assert (status.models[0].name, status.models[0].context, status.models[0].progress) == ("a", 4096, None)
    assert machine.reconciler.slots() == {"llm": 2}


async def test_a_slow_one_is_waited_for_and_a_stuck_one_is_started_again(tmp_path: Path, stack: Any) -> None:
    machine = await machine_with(tmp_path, stack, wanted("a", start_timeout_s=1))
    front = machine.fronts["a"]
    front.instantly = False
    await machine.rounds()
    for _ in range(200):
        front.share = min(0.9, front.share + 0.004)
        machine.now += 60
        await machine.rounds(1)
        assert machine.states() == {"a": ("starting", "loading")}, "three hours, but it gets further"
    for _ in range(3):
        machine.now += 60
        await machine.rounds(1)
    [status] = machine.reconciler.statuses()
    assert "the model a is stuck at 80%" in status.reason
    assert status.restarts == 1


async def test_the_next_request_loads_a_model_that_was_idle_too_long(tmp_path: Path, stack: Any) -> None:
    machine = await machine_with(tmp_path, stack, wanted("a"), idle_s=600)
    await machine.rounds()
    front = machine.fronts["a"]
    assert await machine.ask("a") is None
    await machine.rounds(2, seconds=290)
    assert front.unloads == 0
    await machine.rounds(2, seconds=290)
    assert (front.unloads, machine.states()) == (1, {"a": ("healthy", "cold")})
    await machine.rounds(3, seconds=1000)
    assert machine.states() == {"a": ("healthy", "cold")}, "nobody asks, so it stays where it is"
    assert await machine.ask("a") is None
    assert (front.loads, machine.states()) == (2, {"a": ("healthy", "loading")})
    await machine.rounds(1)
    assert machine.states() == {"a": ("healthy", "loaded")}


async def test_of_two_that_do_not_fit_together_the_one_that_is_asked_for_is_in_memory(
    tmp_path: Path, stack: Any
) -> None:
    machine = await machine_with(tmp_path, stack, wanted("a", 7), wanted("b", 7))
    await machine.rounds()
    assert sorted(machine.states().values()) == [("healthy", "cold"), ("healthy", "loaded")]
    for name, other in (("b", "a"), ("a", "b"), ("b", "a")):
        assert await machine.ask(name) is None
        await machine.rounds(1)
        assert machine.states() == {name: ("healthy", "loaded"), other: ("healthy", "cold")}
    holding = machine.reconciler.place("llm", "b")
    assert not isinstance(holding, str)
    waiting = asyncio.create_task(machine.ask("a"))
    await moments()
    assert machine.fronts["b"].status == "ok", "it is at work"
    assert not waiting.done()
    holding.release()
    assert await waiting is None
    await machine.rounds(1)
    assert machine.states() == {"a": ("healthy", "loaded"), "b": ("healthy", "cold")}


async def test_requests_that_wait_for_their_models_turn_keep_nobody_from_theirs(tmp_path: Path, stack: Any) -> None:
    machine = await machine_with(tmp_path, stack, wanted("a", 7), wanted("b", 7))
    await machine.rounds()
    assert await machine.ask("b") is None
    await machine.rounds(1)
    holding = machine.reconciler.place("llm", "b")
    assert not isinstance(holding, str)
    first = asyncio.create_task(machine.ask("a"))
    await moments()
    machine.now += PATIENCE_S + 1
    second = asyncio.create_task(machine.ask("b"))
    await moments()
    assert (first.done(), second.done()) == (False, False)
    holding.release()
    # The one of b that waits is not at work: a has its turn, then b.
    assert await first is None
    await machine.rounds(1)
    assert await second is None
    await machine.rounds(1)
    assert machine.states() == {"a": ("healthy", "cold"), "b": ("healthy", "loaded")}


async def test_a_request_whose_models_turn_does_not_come_goes_back_and_nobody_is_blamed(
    tmp_path: Path, stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_room.ModelRoom.make_room, "__kwdefaults__", {"within_s": 2 * LOOK_S})
    machine = await machine_with(tmp_path, stack, wanted("a", 7), wanted("b", 7))
    await machine.rounds()
    assert await machine.ask("b") is None
    await machine.rounds(1)
    slots = [machine.reconciler.place("llm", name) for name in ("b", "a")]
    assert isinstance(slots[1], keeper.Slot)
    offer = TaskOffer(
        task_id="task-01", attempt=1, lease_id="1" * 32, service="llm", method="POST", path="/echo", model="a"
    )
    with pytest.raises(AttemptFailed, match=r"a cannot be loaded now: .* while b is at work") as failed:
        await forward(offer, slots[1].client, None, MemoryUplink())
    assert failed.value.fault == "owner"


async def test_a_task_reaches_no_control_of_a_model(tmp_path: Path, stack: Any) -> None:
    machine = await machine_with(tmp_path, stack, wanted("a"))
    await machine.rounds()
    slot = machine.reconciler.place("llm", "a")
    assert not isinstance(slot, str)
    for path in ("/unload", "/load", "/unload?x", "/unload/"):
        with pytest.raises(UsageProblem, match="for this machine's agent"):
            await slot.client.request("POST", path)
    assert machine.fronts["a"].unloads == 0


async def test_a_request_goes_to_the_container_that_has_its_model(tmp_path: Path, stack: Any) -> None:
    machine = await machine_with(tmp_path, stack, wanted("a"), wanted("b"))
    await machine.rounds()
    slot = machine.reconciler.place("llm", "b")
    assert owner_of(slot) == "b"
    assert machine.reconciler.place("llm", "c") == "this machine does not run llm c"
    assert owner_of(machine.reconciler.place("llm")) in {"a", "b"}


def owner_of(slot: Slot | str) -> str:
    assert not isinstance(slot, str), slot
    assert isinstance(slot.owner, keeper.Keeper)
    return slot.owner.wanted.name


async def test_an_engine_that_knows_no_loading_is_loaded_when_it_is_well_and_keeps_its_model(
    tmp_path: Path, stack: Any
) -> None:
    front = Plain()
    machine = await machine_with(tmp_path, stack, wanted("a"), fronts={"a": front}, idle_s=10)
    await machine.rounds(6, seconds=100)
    assert machine.states() == {"a": ("healthy", "loaded")}
    assert (front.loads, front.unloads) == (0, 0)


async def test_a_download_is_shown_with_bytes_and_the_time_left_once_it_is_known(tmp_path: Path, stack: Any) -> None:
    machine = await machine_with(tmp_path, stack, wanted("a"))
    seen: list[Any] = []

    def note() -> None:
        machine.now += 30
        seen.extend(machine.reconciler.statuses())

    machine.reconciler.changed = note
    machine.files.steps = [
        PullProgress(done_bytes=share * GIB // 8, total_bytes=GIB, note="downloading m.gguf") for share in range(8)
    ]
    machine.files.failure = DownloadFailed("it broke off")
    await machine.rounds(1)
    pulling = [one for one in seen if one.state == "pulling"]
    assert pulling[1].reason == "downloading m.gguf: 0 bytes of 1 GiB"
    assert (pulling[-1].progress, pulling[-1].models[0].progress) == (0.875, 0.875)
    assert pulling[-1].reason.startswith("downloading m.gguf: 896 MiB of 1 GiB, about ")
    assert (pulling[1].models[0].eta_s, pulling[-1].models[0].eta_s) == (None, pytest.approx(30, abs=10))
    assert (machine.states(), machine.reconciler.statuses()[0].reason) == ({"a": ("backoff", "cold")}, "it broke off")


@pytest.mark.parametrize(
    ("failure", "state"),
    [
        (ModelMissing("it is another file"), "failed"), (DownloadFailed("it broke off"), "backoff"),
        (OutOfSpace("the disk is full"), "backoff"),
    ],
)  # fmt: skip
async def test_a_file_that_cannot_be_had_is_tried_again_where_that_may_help(
    tmp_path: Path, stack: Any, failure: RuntimeFailure, state: str
) -> None:
    machine = await machine_with(tmp_path, stack, wanted("a"))
    machine.files.failure = failure
    await machine.rounds(3)
    asked = machine.files.asked
    [status] = machine.reconciler.statuses()
    assert (status.state, status.reason, status.restarts) == (state, failure.message, 0)
    await machine.rounds(3, seconds=30)
    assert (machine.files.asked > asked) is isinstance(failure, DownloadFailed)
    machine.files.failure = None
    machine.now += 4000
    await machine.rounds(5)
    assert machine.states() == {"a": ("healthy", "loaded")}


async def test_a_model_without_a_hash_and_one_that_the_owner_has_anyway_are_refused(tmp_path: Path, stack: Any) -> None:
    nameless = AssignedModel(name="a", files=(ModelFile(name="m", size_bytes=1),))
    machine = await machine_with(tmp_path, stack, wanted("a", model=nameless))
    await machine.rounds()
    [status] = machine.reconciler.statuses()
    assert (status.state, "by its hash" in status.reason) == ("refused", True)
    own = Front()
    await stack.enter_async_context(local_service(own))
    machine.runtime.fronts["own-a"] = own
    machine.reconciler.offer([wanted("own-a", model=nameless)])
    await machine.rounds()
    states = {one.name: (one.state, one.by_owner) for one in machine.reconciler.statuses()}
    assert states == {"own-a": ("healthy", True), "a": ("refused", False)}
    refused = next(one.reason for one in machine.reconciler.statuses() if one.name == "a")
    assert refused == "the owner of this machine offers a from a file of their own"


async def test_copies_of_files_that_nobody_wants_any_more_are_forgotten(tmp_path: Path, stack: Any) -> None:
    other = AssignedModel(name="b", files=(ModelFile(name="b", size_bytes=9, sha256="2" * 64),), licence="MIT")
    machine = await machine_with(tmp_path, stack, wanted("a"), wanted("b", model=other))
    machine.reconciler.start()
    await eventually(lambda: machine.states() == dict.fromkeys("ab", ("healthy", "loaded")))
    machine.reconciler.want(2, [wanted("a")])
    await eventually(lambda: machine.runtime.kept is not None)
    assert machine.runtime.kept == {machine.files.key(AssignedModel(name="a", files=(FILE,)))}


async def test_a_pause_gives_everything_back_and_what_is_wanted_meanwhile_runs_afterwards(
    tmp_path: Path, stack: Any
) -> None:
    later = AssignedModel(name="b", files=(ModelFile(name="b", size_bytes=9, sha256="2" * 64),), licence="MIT")
    machine = await machine_with(tmp_path, stack, wanted("a"), fronts={"a": Front(), "b": Front()})
    machine.reconciler.start()
    await eventually(lambda: machine.states() == {"a": ("healthy", "loaded")})
    async with asyncio.timeout(10):
        await machine.reconciler.pause()
    assert (machine.runtime.running(), machine.reconciler.statuses()) == (set(), ())
    machine.reconciler.want(2, [wanted("a"), wanted("b", model=later)])
    await asyncio.sleep(0.05)
    assert machine.reconciler.statuses() == ()
    machine.reconciler.resume()
    await eventually(lambda: machine.states() == dict.fromkeys("ab", ("healthy", "loaded")))


def test_consent_is_to_models_by_name_and_licence() -> None:
    agreed = Consent.to([wanted("a")])
    assert agreed.model_names == ("a",)
    assert agreed.refusal(wanted("a")) == ""
    assert "has not agreed to the model b" in agreed.refusal(wanted("b"))
    other = AssignedModel(name="a", files=(FILE,), licence="proprietary")
    assert agreed.refusal(wanted("a", model=other)) == "the owner agreed to a under MIT, not under proprietary"
    assert Consent(everything=True).model_names is None
    assert Consent(services={"llm": []}).refusal(wanted("b")) == ""
    assert agreed.narrowed(["llm"]).model_names == ("a",)
