"""How workers move to a new tier policy: who moves when, and what stops it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.domain.rollout import Pulse, Rollout, Steps

CALM = Pulse(succeeded=0, failed=0, free=8, slots=8)
NAMES = [f"worker-{number:08x}" for number in range(10)]


def moved_at(rollout: Rollout, *moments: float) -> list[int]:
    """How many have moved after each moment, when everyone moves whose turn it is."""
    found = []
    for now in moments:
        for worker_id in rollout.due(now):
            rollout.done(worker_id)
        found.append(rollout.moved)
    return found


def test_without_steps_all_move_at_once() -> None:
    assert moved_at(Rollout(Steps(), NAMES, now=0, pulse=CALM), 0) == [10]


def test_a_canary_goes_first_and_the_others_after_the_hold() -> None:
    rollout = Rollout(Steps(canary=0.25, hold_s=60), NAMES, now=100, pulse=CALM)
    assert moved_at(rollout, 100, 130, 159.9, 160) == [3, 3, 3, 10]


def test_so_many_move_a_minute() -> None:
    rollout = Rollout(Steps(per_minute=2), NAMES, now=0, pulse=CALM)
    assert moved_at(rollout, 0, 29, 30, 60, 61, 10_000) == [1, 1, 2, 3, 3, 10]


def test_after_the_canary_so_many_move_a_minute() -> None:
    rollout = Rollout(Steps(canary=0.1, hold_s=60, per_minute=60), NAMES, now=0, pulse=CALM)
    assert moved_at(rollout, 0, 59, 60, 61, 64) == [1, 1, 2, 3, 6]


def test_one_that_was_stopped_gives_no_more_turns() -> None:
    rollout = Rollout(Steps(per_minute=60), NAMES, now=0, pulse=CALM)
    assert moved_at(rollout, 0) == [1]
    rollout.stopped = "for a test"
    assert moved_at(rollout, 1000) == [1]


@pytest.mark.parametrize(
    ("steps", "pulse", "words"),
    [
        (Steps(), Pulse(100, 20, 8, 8), ""),
        (Steps(), Pulse(79, 20, 8, 8), "20 of 99 requests have failed since it began, and 20% may"),
        (Steps(), Pulse(0, 19, 8, 8), ""),
        (Steps(most_failures=0), Pulse(19, 1, 8, 8), "1 of 20 requests"),
        (Steps(most_failures=1), Pulse(0, 500, 8, 8), ""),
        (Steps(), Pulse(0, 0, 0, 8), ""),
        (Steps(least_free=0.25), Pulse(0, 0, 1, 8), "1 of 8 slots are free, and 25% must be"),
        (Steps(least_free=0.25), Pulse(0, 0, 2, 8), ""),
        (Steps(least_free=0.25), Pulse(0, 0, 0, 0), ""),
    ],
)
def test_what_it_stops_for_is_said(steps: Steps, pulse: Pulse, words: str) -> None:
    rollout = Rollout(msgspec.structs.replace(steps, per_minute=1), NAMES, now=0, pulse=CALM)
    assert moved_at(rollout, 0) == [1]
    said = rollout.trouble(pulse)
    assert said.startswith(words)
    assert bool(said) == bool(words)


def test_only_what_failed_since_it_began_counts() -> None:
    rollout = Rollout(Steps(per_minute=1), NAMES, now=0, pulse=Pulse(0, 1000, 8, 8))
    moved_at(rollout, 0)
    assert rollout.trouble(Pulse(50, 1000, 8, 8)) == ""


def test_a_pool_that_was_full_before_is_not_full_because_of_it() -> None:
    rollout = Rollout(Steps(least_free=0.5, per_minute=1), NAMES, now=0, pulse=Pulse(0, 0, 0, 8))
    moved_at(rollout, 0)
    assert rollout.trouble(Pulse(0, 0, 0, 8)) == ""


def test_before_anyone_has_moved_nothing_is_its_fault() -> None:
    # After a restart nobody is there yet, and then the pool is as full as it was.
    rollout = Rollout(Steps(least_free=0.5, canary=0.1, hold_s=60), NAMES, now=0, pulse=Pulse(0, 0, 0, 0), moved=1)
    assert rollout.trouble(Pulse(0, 30, 0, 8)) == ""
    assert moved_at(rollout, 59, 60) == [2, 11]
    assert rollout.trouble(Pulse(0, 30, 0, 8)) == ""


def test_one_that_goes_on_after_a_restart_sends_no_second_canary() -> None:
    steps = Steps(canary=0.3, hold_s=60, per_minute=60)
    assert moved_at(Rollout(steps, NAMES[1:], now=0, pulse=CALM, moved=1), 0, 59, 60, 61) == [3, 3, 4, 5]
    assert moved_at(Rollout(steps, NAMES[5:], now=0, pulse=CALM, moved=5), 0, 59, 60, 61) == [5, 5, 6, 7]


@given(
    steps=st.builds(
        Steps,
        canary=st.floats(0, 1),
        hold_s=st.floats(0, 1000),
        per_minute=st.none() | st.floats(0.1, 1000),
    ),
    waiting=st.integers(0, 60),
    moments=st.lists(st.floats(0, 5000), max_size=12),
)
def test_everyone_has_one_turn_in_order_and_all_have_it_in_the_end(
    steps: Steps, waiting: int, moments: list[float]
) -> None:
    names = [f"w{number}" for number in range(waiting)]
    rollout, turns = Rollout(steps, names, now=0, pulse=CALM), list[str]()
    last = steps.hold_s + 60 * waiting / (steps.per_minute or 1) + 1
    for now in [*sorted(moments), max([*moments, last])]:
        due = rollout.due(now)
        assert due == list(rollout.waiting)[: len(due)]
        turns += due
        for worker_id in due:
            rollout.done(worker_id)
        assert rollout.total == waiting
        if steps.per_minute is not None:
            first = waiting * steps.canary + 1
            assert rollout.moved <= first + now * steps.per_minute / 60 + 1
    assert turns == names
