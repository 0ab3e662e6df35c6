"""Credentials: their shape, what a typo costs, what a scope opens, and nonces that are good once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.domain import credentials
from rma_coordinator.domain.credentials import ALPHABET, NONCE_S, PREFIXES, SCOPES, Nonces, Principal
from rma_core.errors import Forbidden, NotAuthenticated, ValidationProblem

KINDS = st.sampled_from(sorted(PREFIXES))
ALL = Principal(id="key:1", kind="admin", scopes=SCOPES)


@given(KINDS)
def test_a_fresh_credential_has_its_shape(prefix: str) -> None:
    secret = credentials.make_secret(prefix)
    assert len(secret) == len(prefix) + 36
    assert set(secret[len(prefix) :]) <= set(ALPHABET)
    credentials.check_shape(secret, prefix)
    assert secret != credentials.make_secret(prefix)


def test_the_checksum_stays_what_it_is() -> None:
    assert credentials.well_formed("rmac_" + "0" * 30 + credentials._checksum("rmac_" + "0" * 30), "rmac_")
    assert credentials._checksum("") == "000000"
    assert credentials._checksum("rmac_" + "0" * 30) == "0pX35Y"


@given(KINDS, st.data())
def test_every_single_typo_is_found_without_a_look_up(prefix: str, data: st.DataObject) -> None:
    secret = credentials.make_secret(prefix)
    place = data.draw(st.integers(len(prefix), len(secret) - 1))
    wrong = data.draw(st.sampled_from(ALPHABET.replace(secret[place], "")))
    with pytest.raises(NotAuthenticated, match="mistyped or cut off"):
        credentials.check_shape(secret[:place] + wrong + secret[place + 1 :], prefix)


@given(KINDS, st.integers(0, 40))
def test_a_credential_that_is_cut_off_or_too_long_is_found(prefix: str, length: int) -> None:
    secret = credentials.make_secret(prefix)
    for wrong in (secret[:length], secret + "0"):
        with pytest.raises(NotAuthenticated):
            credentials.check_shape(wrong, prefix)


@given(KINDS, st.text())
def test_any_other_text_is_refused_and_never_a_crash(prefix: str, text: str) -> None:
    with pytest.raises(NotAuthenticated):
        credentials.check_shape("?" + text, prefix)
    with pytest.raises(NotAuthenticated):
        credentials.check_shape(prefix + "ä" + text, prefix)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_credential_of_another_kind_is_named(prefix: str) -> None:
    for other, words in PREFIXES.items():
        if other != prefix:
            with pytest.raises(Forbidden) as refused:
                credentials.check_shape(credentials.make_secret(other), prefix)
            assert str(refused.value) == f"this is {words}, here {PREFIXES[prefix]} is needed"


def test_a_service_scope_opens_one_service_and_the_wide_one_every_service() -> None:
    narrow = Principal(id="key:1", kind="client", scopes=("infer:notes",))
    wide = Principal(id="key:2", kind="client", scopes=("infer:*",))
    assert narrow.may("infer:notes")
    assert not narrow.may("infer:llm")
    assert wide.may("infer:llm")
    assert not wide.may("admin:read")
    with pytest.raises(Forbidden, match="does not open admin:read; it holds: infer:\\*"):
        wide.need("admin:read")
    with pytest.raises(Forbidden, match="it holds: nothing"):
        Principal(id="x", kind="client").need("metrics")


@given(st.sets(st.sampled_from([*SCOPES, "infer:notes", "infer:llm"])), st.sets(st.sampled_from(SCOPES)))
def test_a_key_gives_away_a_part_of_its_own_scopes_and_nothing_else(wanted: set[str], held: set[str]) -> None:
    creator = Principal(id="key:1", kind="admin", scopes=tuple(held))
    if all(creator.may(scope) for scope in wanted):
        assert credentials.check_scopes(wanted, creator) == tuple(sorted(wanted))
    else:
        with pytest.raises(Forbidden, match="cannot give it away"):
            credentials.check_scopes(wanted, creator)


@pytest.mark.parametrize(
    "scope", ["", "admin", "admin:*", "infer:", "infer:No Such", "infer:a\nb", "infer:" + "x" * 40]
)
def test_an_unknown_scope_is_bad_input(scope: str) -> None:
    with pytest.raises(ValidationProblem, match="there is no scope"):
        credentials.check_scopes([scope], ALL)


def test_a_nonce_is_good_once_and_for_a_minute() -> None:
    now = [1000.0]
    nonces = Nonces(lambda: now[0])
    first, late = nonces.make(), nonces.make()
    assert nonces.spend(first)
    assert not nonces.spend(first)
    now[0] += NONCE_S + 1
    assert not nonces.spend(late)
    assert nonces.spend(nonces.make())


def test_another_coordinators_nonce_and_any_other_text_are_refused() -> None:
    nonces = Nonces(lambda: 1000.0)
    good = nonces.make()
    for wrong in (
        Nonces(lambda: 1000.0).make(),
        "",
        ".",
        "..",
        good[:-1],
        "9" + good,
        good + "ä",
        "\udcff.\udcff.\udcff",
    ):
        assert not nonces.spend(wrong)
    assert nonces.spend(good)


def test_used_nonces_are_forgotten_when_they_are_too_old_anyway_and_never_more_than_the_limit() -> None:
    now = [1000.0]
    nonces = Nonces(lambda: now[0], limit=3)
    assert [nonces.spend(nonces.make()) for _ in range(4)] == [True, True, True, False]
    for _ in range(2):
        now[0] += NONCE_S + 2
        assert nonces.spend(nonces.make())
    assert len(nonces._used | nonces._used_before) == 2


@given(st.lists(st.tuples(st.sampled_from(("make", "spend")), st.floats(0, 40)), max_size=60))
def test_no_nonce_is_ever_good_twice_and_each_is_good_once_while_it_is_young(steps: list[tuple[str, float]]) -> None:
    now = [1000.0]
    nonces, made, spent = Nonces(lambda: now[0]), list[tuple[float, str]](), set[str]()
    for what, seconds in steps:
        now[0] += seconds
        if what == "make":
            made.append((now[0], nonces.make()))
            continue
        for at, nonce in made[-5:]:
            age = now[0] - at
            good = nonces.spend(nonce)
            assert not (good and nonce in spent)
            assert good == (nonce not in spent and age <= NONCE_S) or abs(age - NONCE_S) < 0.01
            if good:
                spent.add(nonce)


def test_nonces_of_one_moment_are_unlike_and_none_can_be_made_from_another() -> None:
    nonces = Nonces(lambda: 1000.0)
    made = [nonces.make() for _ in range(100)]
    assert len(set(made)) == len({nonce.rpartition(".")[2] for nonce in made}) == 100
    body, _, mac = made[0].rpartition(".")
    when, _, number = body.partition(".")
    for wrong in (f"{when}.{int(number, 16) + 1:x}.{mac}", f"{when}.0{number}.{mac}", f"{when}0.{number}.{mac}"):
        assert not nonces.spend(wrong)
    assert nonces.spend(made[1])
    assert nonces.spend(made[0])
    assert not nonces.spend(made[1])
