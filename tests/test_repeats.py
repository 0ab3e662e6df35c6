"""Requests that are sent again: which runs they find, and what is kept for who named his request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rma_coordinator.domain import repeats
from rma_coordinator.domain.repeats import Kept, OtherRequest, Repeats, key_of

if TYPE_CHECKING:
    from rma_coordinator.domain.repeats import Key

#: Few enough that they meet.
NAMES, KEY_IDS, BODIES = st.sampled_from("abc"), st.sampled_from(["one", "two"]), st.sampled_from([b"x", b"y", b"z"])
#: Answers of a few sizes, among them one that is too large, and some of which not all fit.
SIZES = st.sampled_from([0, 10, 1000, repeats.MOST_KEPT_BYTES, repeats.MOST_KEPT_BYTES + 1])


class Machine(RuleBasedStateMachine):
    """What is asked again and kept, beside the plainest account of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.repeats: Repeats[int] = Repeats(lambda: self.now)
        self.runs: dict[Key, list[int]] = {}
        self.named: dict[tuple[str, str], tuple[bytes, float]] = {}
        self.answers: dict[tuple[str, str], Kept] = {}
        self.count = 0

    @rule(key_id=KEY_IDS, body=BODIES)
    def begins(self, key_id: str, body: bytes) -> None:
        key = key_of(key_id, "/v1/chat/completions", body)
        self.count += 1
        self.repeats.begin(key, self.count)
        self.runs.setdefault(key, []).append(self.count)

    @rule(key_id=KEY_IDS, body=BODIES, data=st.data())
    def ends(self, key_id: str, body: bytes, data: st.DataObject) -> None:
        key = key_of(key_id, "/v1/chat/completions", body)
        run = data.draw(st.sampled_from([*self.runs.get(key, []), -1]))
        self.repeats.end(key, run)
        self.runs[key] = [one for one in self.runs.get(key, []) if one != run]

    @rule(name=NAMES, key_id=KEY_IDS, body=BODIES)
    def is_claimed(self, name: str, key_id: str, body: bytes) -> None:
        key, place = key_of(key_id, "/v1/chat/completions", body), (key_id, name)
        known = self.named.get(place)
        if known is not None and self.now - known[1] >= repeats.NAMED_S:
            del self.named[place]
            self.answers.pop(place, None)
            known = None
        if known is None:
            self.named[place] = key.digest, self.now
        elif known[0] != key.digest:
            with pytest.raises(OtherRequest):
                self.repeats.claim(name, key)
            return
        assert self.repeats.claim(name, key) == self.answers.get(place)

    @rule(name=NAMES, key_id=KEY_IDS, body=BODIES, size=SIZES)
    def is_kept(self, name: str, key_id: str, body: bytes, size: int) -> None:
        key, place = key_of(key_id, "/v1/chat/completions", body), (key_id, name)
        answer = Kept({"x-request-id": str(self.count)}, b"a" * size)
        self.repeats.keep(name, key, answer)
        ours = self.named.get(place, (b"", 0.0))[0] == key.digest
        if ours and place not in self.answers and size <= repeats.MOST_KEPT_BYTES:
            self.answers[place] = answer

    @rule(seconds=st.sampled_from([1.0, repeats.NAMED_S / 2, repeats.NAMED_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def runs_are_found_newest_first(self) -> None:
        for key, runs in self.runs.items():
            assert self.repeats.runs(key) == tuple(reversed(runs))
        assert sorted(self.repeats) == sorted(run for runs in self.runs.values() for run in runs)

    @invariant()
    def what_is_kept_is_bounded(self) -> None:
        assert 0 <= self.repeats.kept_bytes <= repeats.MOST_KEPT_BYTES_TOGETHER


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestRepeats = Machine.TestCase


def test_the_same_body_of_another_key_or_for_another_address_is_another_request() -> None:
    keys = {key_of(key_id, path, b"x") for key_id in ("one", "two") for path in ("/v1/embeddings", "/v1/completions")}
    assert len(keys) == 4
    assert key_of("one", "/v1/a", b"b") != key_of("one", "/v1/", b"ab")


def test_answers_that_were_asked_for_longest_ago_make_room_and_names_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(repeats, "MOST_NAMES", 5)
    monkeypatch.setattr(repeats, "MOST_KEPT_BYTES_TOGETHER", 25)
    known: Repeats[int] = Repeats(lambda: 0.0)
    key = key_of("one", "/", b"x")
    for name in "abc":
        known.claim(name, key)
    for name in "ab":
        known.keep(name, key, Kept({}, b"a" * 10))
    assert known.claim("a", key) is not None
    known.keep("c", key, Kept({}, b"a" * 10))
    assert [known.claim(name, key) is not None for name in "abc"] == [True, False, True]
    assert known.kept_bytes == 20
    for name in "defg":
        known.claim(name, key)
    other = key_of("one", "/", b"y")
    # The two oldest names are forgotten, and with one of them its answer.
    assert known.kept_bytes == 10
    assert known.claim("a", other) is None
