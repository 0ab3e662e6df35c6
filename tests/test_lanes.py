"""Who offers what and who has room, beside a list of everyone that is looked through each time."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rma_coordinator.domain.lanes import Lanes
from rma_coordinator.domain.tasks import Attempt, Seat, Task

NAMES = st.sampled_from([f"w{number}" for number in range(8)])
SLOTS = st.dictionaries(st.sampled_from(["llm", "ocr"]), st.integers(0, 3))
MODELS = st.dictionaries(st.sampled_from(["llm"]), st.frozensets(st.sampled_from(["a", "b"])))
LANES = ("llm", "llm a", "llm b", "ocr")


def a_task(service: str) -> Task:
    return Task(
        service=service, method="POST", path="/", headers=(), body_bytes=0, key_id="key", now=0.0, timeout_s=60.0
    )


class Index(RuleBasedStateMachine):
    """Workers come and go, say what they offer, are given tasks and end them."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes = Lanes()
        self.seats: dict[str, Seat] = {}
        self.chance = random.Random(3)

    def seat(self, name: str) -> Seat:
        return self.seats.setdefault(name, Seat(name))

    @rule(name=NAMES, slots=SLOTS, models=MODELS)
    def offer(self, name: str, slots: dict[str, int], models: dict[str, frozenset[str]]) -> None:
        self.lanes.offer(self.seat(name), slots, models)

    @rule(name=NAMES, usable=st.booleans(), reachable=st.booleans())
    def change(self, name: str, *, usable: bool, reachable: bool) -> None:
        seat = self.seat(name)
        seat.usable, seat.reachable = usable, reachable
        self.lanes.open(seat)

    @rule(name=NAMES, service=st.sampled_from(["llm", "ocr"]))
    def give(self, name: str, service: str) -> None:
        seat = self.seat(name)
        if seat.room(service) > 0:
            task = a_task(service)
            seat.begin(Attempt(task, 1, name, 0.0))

    @rule(name=NAMES, owner=st.sampled_from(["", "alice", "bob"]))
    def belong(self, name: str, owner: str) -> None:
        self.lanes.belong(self.seat(name), owner)

    @rule(name=NAMES)
    def end(self, name: str) -> None:
        seat = self.seat(name)
        if seat.running:
            seat.end(next(iter(seat.running.values())))
            self.lanes.open(seat)

    @rule(name=NAMES)
    def gone(self, name: str) -> None:
        seat = self.seats.pop(name, Seat(name))
        self.lanes.offer(seat, {}, {})
        self.lanes.belong(seat, "")

    @invariant()
    def everyone_with_room_is_found_and_nobody_else(self) -> None:
        for lane in LANES:
            service, _, model = lane.partition(" ")
            offering = {seat.worker_id for seat in self.seats.values() if seat.offers(service, model)}
            assert {seat.worker_id for seat in self.lanes.offering(lane)} == offering
            room = {
                seat.worker_id
                for seat in self.seats.values()
                if seat.worker_id in offering and seat.usable and seat.reachable and seat.room(service) > 0
            }
            some = {seat.worker_id for seat in self.lanes.some_free(lane, service, 2, self.chance)}
            assert some <= room
            assert bool(some) == bool(room)
            assert {seat.worker_id for seat in self.lanes.free(lane, service)} == room
            assert not room or self.lanes.has_free(lane)

    @invariant()
    def everyones_machines_are_known(self) -> None:
        for owner in ("alice", "bob"):
            own = {seat.worker_id for seat in self.seats.values() if seat.owner == owner}
            assert {seat.worker_id for seat in self.lanes.owned(owner, 8, self.chance)} == own
            some = {seat.worker_id for seat in self.lanes.owned(owner, 2, self.chance)}
            assert (some <= own, len(some)) == (True, min(2, len(own)))
        assert all(self.lanes._owned.values())

    @invariant()
    def nobody_stands_twice_in_a_list(self) -> None:
        for listed in (*self.lanes._free.values(), *self.lanes._offering.values(), *self.lanes._owned.values()):
            assert len({id(seat) for seat in listed}) == len(listed)


Index.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
test_the_index_agrees_with_a_look_at_everyone = Index.TestCase


def test_of_many_some_are_drawn_and_all_of_them_sooner_or_later() -> None:
    lanes, chance = Lanes(), random.Random(1)
    for number in range(500):
        seat = Seat(f"w{number}")
        seat.usable = seat.reachable = True
        lanes.offer(seat, {"ocr": 1}, {})
    seen: set[str] = set()
    for _ in range(200):
        some = lanes.some_free("ocr", "ocr", 32, chance)
        assert 16 <= len(some) <= 32
        seen |= {seat.worker_id for seat in some}
    assert len(seen) == 500
