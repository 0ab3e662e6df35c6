"""The keyring: who holds which key, and join tokens that are used up, run out or are revoked."""

from __future__ import annotations

import pytest

from rma_coordinator.domain import credentials
from rma_coordinator.domain.keyring import Keyring
from rma_core.errors import Forbidden, NotAuthenticated, NotFound


class Ring:
    def __init__(self) -> None:
        self.now = 1000.0
        self.keyring = Keyring((), (), clock=lambda: self.now)


@pytest.fixture
def ring() -> Ring:
    return Ring()


def test_a_key_names_its_holder_and_its_scopes(ring: Ring) -> None:
    secret, record = ring.keyring.create_key(kind="client", label="laptop", scopes=("infer:*",))
    assert secret.startswith("rmac_")
    assert secret not in str(record), "only the hash is kept"
    principal = ring.keyring.principal(secret)
    assert (principal.id, principal.kind, principal.scopes) == (f"key:{record.key_id}", "client", ("infer:*",))
    assert ring.keyring.valid(secret)
    again = Keyring(ring.keyring.all_keys(), (), clock=lambda: ring.now)
    assert again.principal(secret) == principal


@pytest.mark.parametrize(
    ("secret", "kind"),
    [
        ("", NotAuthenticated),
        ("rmaa_x", NotAuthenticated),
        pytest.param(credentials.make_secret("rmaa_"), NotAuthenticated, id="another pool's"),
        pytest.param(credentials.make_secret("rmaj_"), Forbidden, id="a join token"),
        ("eyJ.worker.token", NotAuthenticated),
        ("ä" * 41, NotAuthenticated),
    ],
)
def test_what_is_no_key_of_this_pool_is_refused(ring: Ring, secret: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        ring.keyring.principal(secret)
    assert not ring.keyring.valid(secret)


def test_keys_end_when_they_run_out_or_are_revoked(ring: Ring) -> None:
    short, _ = ring.keyring.create_key(kind="admin", label="", scopes=(), ttl_s=60)
    lasting, record = ring.keyring.create_key(kind="admin", label="", scopes=())
    ring.now += 60
    with pytest.raises(NotAuthenticated, match="has expired"):
        ring.keyring.principal(short)
    ring.keyring.revoke(record.key_id)
    with pytest.raises(NotAuthenticated, match="was revoked"):
        ring.keyring.principal(lasting)
    with pytest.raises(NotFound):
        ring.keyring.revoke("00000000")


def test_a_join_token_is_used_once_but_the_same_machine_may_ask_again(ring: Ring) -> None:
    secret, _ = ring.keyring.create_token(label="", uses=1, ttl_s=60)
    token = ring.keyring.join_token(secret, "machine 1")
    spent = ring.keyring.spend(token, "machine 1")
    assert ring.keyring.spend(spent, "machine 1") is spent
    assert ring.keyring.join_token(secret, "machine 1").used_by == ("machine 1",)
    for other in ("machine 2", None):
        with pytest.raises(Forbidden, match="used up"):
            ring.keyring.join_token(secret, other)


def test_a_join_token_for_several_machines_counts_each_once(ring: Ring) -> None:
    secret, _ = ring.keyring.create_token(label="", uses=2, ttl_s=60)
    for machine in ("1", "2", "1", "2"):
        ring.keyring.spend(ring.keyring.join_token(secret, machine), machine)
    with pytest.raises(Forbidden):
        ring.keyring.join_token(secret, "3")


def test_a_join_token_runs_out_and_can_be_revoked(ring: Ring) -> None:
    first, _ = ring.keyring.create_token(label="", uses=1, ttl_s=60)
    second, record = ring.keyring.create_token(label="", uses=1, ttl_s=6000)
    ring.now += 60
    with pytest.raises(NotAuthenticated, match="has expired"):
        ring.keyring.join_token(first, "1")
    ring.keyring.revoke(record.token_id)
    with pytest.raises(NotAuthenticated, match="was revoked"):
        ring.keyring.join_token(second, "1")
    with pytest.raises(NotAuthenticated, match="does not know"):
        ring.keyring.join_token(credentials.make_secret("rmaj_"), "1")
    with pytest.raises(Forbidden, match="this is an admin key"):
        ring.keyring.join_token(credentials.make_secret("rmaa_"), "1")
