"""What an engine did, by its own word or by what was seen, and how long it may say nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rma_coordinator.domain import timings
from rma_coordinator.domain.speeds import Expected, Measured
from rma_coordinator.domain.timings import Seen, believed, counted, first_byte_s, silence_s, told

LLAMA = {"cache_n": 5, "prompt_n": 200, "prompt_ms": 400.0, "predicted_n": 50, "predicted_ms": 2500.0}
SEEN = Seen(began_at=100.0, first_at=102.0, last_at=106.9)


def test_an_engines_own_timings_are_its_tokens_and_seconds() -> None:
    assert told(LLAMA) == Measured(200, 0.4, 50, 2.5)
    assert told({**LLAMA, "load_ms": 7000.0}) == Measured(200, 0.4, 50, 2.5, 7.0)
    assert told({**LLAMA, "load_ms": 40.0}) == Measured(200, 0.4, 50, 2.5), "it only looked whether it is loaded"


def test_a_prompt_that_a_cache_spared_says_nothing_of_reading() -> None:
    found = told({**LLAMA, "prompt_n": 1, "prompt_ms": 50.0})
    assert found is not None
    assert (found.prompt_tokens, found.answer_tokens) == (0, 50)


@pytest.mark.parametrize(
    "said",
    [
        None, [], {}, {"predicted_n": 3}, {**LLAMA, "prompt_n": "many"}, {**LLAMA, "predicted_n": -1},
        {**LLAMA, "prompt_ms": "x", "predicted_ms": None}, {**LLAMA, "prompt_ms": 0, "predicted_ms": math.nan},
        {**LLAMA, "prompt_ms": math.inf, "predicted_ms": -4},
    ],
)  # fmt: skip
def test_what_are_no_timings_says_nothing(said: Any) -> None:
    assert told(said) is None


def test_of_an_engine_that_only_counts_it_matters_when_its_pieces_came() -> None:
    usage = {"prompt_tokens": 220, "completion_tokens": 50, "prompt_tokens_details": {"cached_tokens": 20}}
    assert counted(usage, SEEN) == pytest.approx(Measured(200, 2.0, 49, 4.9))
    assert counted({**usage, "completion_tokens": 3}, SEEN) == Measured(answer_tokens=3), "too few to tell anything"
    assert counted(usage) == Measured(answer_tokens=50)
    assert counted({"prompt_tokens": 3}) is None
    assert counted("nonsense") is None


@pytest.mark.parametrize(
    ("claims", "seconds", "prompt_s", "answer_s"),
    [
        (Measured(200, 1.0, 50, 3.0), 5.0, 1.0, 3.0),
        (Measured(200, 2.0, 50, 6.0), 4.0, 1.0, 3.0),
        (Measured(200, 0.001, 50, 0.003), 8.0, 1.0, 3.0),
        (Measured(200, 1.0, 50, 3.0, 6.0), 10.0, 1.0, 3.0),
    ],
    ids=["is true", "more than all its time", "next to nothing", "with the loading of its model"],
)
def test_a_claim_is_kept_within_what_was_seen(
    claims: Measured, seconds: float, prompt_s: float, answer_s: float
) -> None:
    found = believed(claims, seconds, asked=900, said=200)
    assert (found.prompt_s, found.answer_s) == pytest.approx((prompt_s, answer_s))


def test_no_more_tokens_are_believed_than_there_were_bytes_and_nothing_of_a_task_that_took_no_time() -> None:
    lie = Measured(2**53, 1.0, 2**53, 1.0)
    assert believed(lie, 2.0, asked=400, said=30) == Measured(400, 1.0, 30, 1.0)
    assert believed(lie, 0.0, asked=400, said=30) == believed(lie, -1.0, asked=400, said=30) == Measured()


NUMBERS = st.floats(0, 1e6)


@example(prompt_s=0.0, answer_s=5e-324, load_s=0.0, seconds=1.0)
@given(prompt_s=NUMBERS, answer_s=NUMBERS, load_s=NUMBERS, seconds=NUMBERS)
def test_no_claim_makes_a_worker_much_faster_or_slower_than_it_was_seen_to_be(
    prompt_s: float, answer_s: float, load_s: float, seconds: float
) -> None:
    found = believed(Measured(100, prompt_s, 100, answer_s, load_s), seconds, asked=100, said=100)
    took = found.prompt_s + found.answer_s
    assert math.isfinite(took)
    if prompt_s + answer_s > 1e-9 and seconds > 1e-9:
        assert took <= seconds * 1.001
        assert took >= timings.LEAST_OF_SEEN**2 * seconds * 0.999
        assert found.load_s <= seconds


def test_a_slow_engine_may_be_silent_for_longer_than_a_fast_one() -> None:
    assert silence_s(0.0, 0.0, 60) == 60, "of which nothing is known"
    assert silence_s(0.0001, 0.01, 60) == 10
    assert silence_s(0.0001, 1.5, 60) == 30
    assert silence_s(0.02, 0.2, 60) == pytest.approx(3 * 512 * 0.02), "it may read another prompt meanwhile"
    assert silence_s(1.0, 9.0, 60) == 60


def test_a_model_that_may_have_to_be_loaded_has_the_time_for_it() -> None:
    warm = Expected(5.0, 0.0, 0.0, known=True, prefill=1.0)
    assert first_byte_s(warm, 0.0, None) == 15
    assert first_byte_s(warm, 20.0, None) == 3 * 21 + 10
    assert first_byte_s(warm._replace(load=30.0), 20.0, None) == 3 * 31 + 10
    assert first_byte_s(warm, 20.0, 40.0) == 40
