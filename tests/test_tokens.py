"""Proofs of machines and worker tokens: nothing but the right thing, signed by the right key, is taken."""

from __future__ import annotations

import base64
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator import tokens
from rma_coordinator.tokens import CACHE_SIZE, WORKER_TOKEN_S, WorkerTokens
from rma_core.agent.keys import DeviceKey
from rma_core.errors import NotAuthenticated

ISSUER = "rma-pool"
PRIVATE = Ed25519PrivateKey.generate()
KEY = DeviceKey(PRIVATE)


def claims(**more: Any) -> dict[str, Any]:
    now = int(time.time())
    return {
        "iss": KEY.thumbprint,
        "sub": "x",
        "aud": ISSUER,
        "exp": now + 60,
        "iat": now,
        "jti": "1",
        "nonce": "n",
        **more,
    }


def sign(body: dict[str, Any], *, key: Any = PRIVATE, kind: str = "rma-proof+jwt", algorithm: str = "EdDSA") -> str:
    return jwt.encode(body, key, algorithm=algorithm, headers={"typ": kind})


def verify(token: str, **more: Any) -> dict[str, Any]:
    asked = {"public_key": KEY.public_key, "kind": "rma-proof+jwt", "issuer": ISSUER, **more}
    return tokens.verify_proof(token, **asked)


def test_the_agents_own_proof_holds() -> None:
    found = verify(KEY.proof(issuer=ISSUER, nonce="n", join_token="rmaj_x"))
    assert (found["iss"], found["nonce"]) == (KEY.thumbprint, "n")
    assert tokens.thumbprint(KEY.public_key) == KEY.thumbprint
    found = verify(KEY.assertion(issuer=ISSUER, nonce="n", worker_id="w"), kind="rma-assertion+jwt")
    assert found["sub"] == "w"


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in claims().items() if key != name}


@pytest.mark.parametrize(
    "token",
    [
        sign(claims(), kind="rma-assertion+jwt"),
        sign(claims(), kind="JWT"),
        sign(claims(aud="another-pool")),
        sign(claims(aud=[])),
        sign(claims(), key=Ed25519PrivateKey.generate()),
        sign(claims(), key="a" * 32, algorithm="HS256"),
        sign(claims(), key=KEY.public_key, algorithm="HS256"),
        sign(claims(), key=None, algorithm="none"),
        sign(claims(exp=int(time.time()) - 2 * 86_400)),
        sign(claims(iat=int(time.time()) + 2 * 86_400)),
        *(sign(without(name)) for name in ("iss", "sub", "aud", "exp", "iat", "jti")),
        sign(claims())[:-4],
        "",
        "a.b.c",
    ],
)
def test_no_other_proof_holds(token: str) -> None:
    with pytest.raises(NotAuthenticated):
        verify(token)


@pytest.mark.parametrize("off", [{"exp": int(time.time()) - 2 * 86_400}, {"iat": int(time.time()) + 2 * 86_400}])
def test_a_machine_whose_clock_is_far_off_is_told_that(off: dict[str, int]) -> None:
    with pytest.raises(NotAuthenticated, match="clock and the coordinator's are more than 36 hours apart"):
        verify(sign(claims(**off)))


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def hostile() -> list[str]:
    head = b64(b'{"typ":"rma-at+jwt","alg":"HS256"}')
    deep = b64(b"[" * 20_000)
    return [
        f"{deep}.{b64(b'{}')}.x",
        f"{head}.{deep}.{b64(b'x')}",
        ".".join([b64(b'{"typ":{},"alg":[]}'), b64(b"{}"), ""]),
        ".".join([b64(bytes([255])), b64(b"1"), b64(b"x")]),
        ".".join([head, b64(b'{"sub":' + b"1" * 9000 + b"}"), b64(b"x")]),
        "ä.ö.ü",
    ]


@pytest.mark.parametrize("token", hostile())
def test_hostile_tokens_are_refused_and_never_a_crash(token: str) -> None:
    with pytest.raises(NotAuthenticated):
        verify(token)
    with pytest.raises(NotAuthenticated):
        WorkerTokens(b"s" * 32, issuer=ISSUER, clock=lambda: 0.0).check(token)


@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(NotAuthenticated):
        WorkerTokens(b"s" * 32, issuer=ISSUER, clock=lambda: 0.0).check(text)


def test_a_worker_token_lasts_a_quarter_of_an_hour() -> None:
    now = [1_000_000.0]
    made = WorkerTokens(b"s" * 32, issuer=ISSUER, clock=lambda: now[0])
    token = made.make("worker-1", 3)
    for _ in range(2):
        claims = made.check(token)
        assert (claims.worker_id, claims.epoch) == ("worker-1", 3)
    now[0] += WORKER_TOKEN_S
    with pytest.raises(NotAuthenticated, match="expired"):
        made.check(token)
    assert not made._seen


@pytest.mark.parametrize(
    ("secret", "issuer", "kind"),
    [(b"t" * 32, ISSUER, "rma-at+jwt"), (b"s" * 32, "another", "rma-at+jwt"), (b"s" * 32, ISSUER, "JWT")],
)
def test_a_worker_token_of_another_pool_or_kind_is_refused(secret: bytes, issuer: str, kind: str) -> None:
    body = {"iss": issuer, "aud": issuer, "sub": "worker-1", "iat": 1, "exp": 2e9, "epoch": 0}
    token = jwt.encode(body, secret, algorithm="HS256", headers={"typ": kind})
    with pytest.raises(NotAuthenticated):
        WorkerTokens(b"s" * 32, issuer=ISSUER, clock=lambda: 0.0).check(token)


def test_verified_tokens_are_remembered_up_to_a_bound() -> None:
    made = WorkerTokens(b"s" * 32, issuer=ISSUER, clock=lambda: 1e6)
    for number in range(CACHE_SIZE + 10):
        made.check(made.make(f"worker-{number}", 0))
    assert len(made._seen) == CACHE_SIZE


def test_what_ends_like_a_token_that_was_checked_is_no_token() -> None:
    made = WorkerTokens(b"x" * 32, issuer=ISSUER, clock=lambda: 1000.0)
    token = made.make("worker-1", 3)
    found = made.check(token)
    head, _, signature = token.split(".")
    other = made.make("worker-2", 3).split(".")[1]
    for forged in (f"{head}.{other}.{signature}", f"x{token}", signature, signature[-22:], f"{head}..{signature}"):
        assert made.seen(b"Bearer " + forged.encode()) is None
        with pytest.raises(NotAuthenticated):
            made.check(forged)
    assert made.check(token) == found
    assert made.seen(b"Bearer " + token.encode()) == found


def test_a_token_that_was_checked_is_known_by_its_bytes_until_it_expires() -> None:
    now = [1000.0]
    made = WorkerTokens(b"x" * 32, issuer=ISSUER, clock=lambda: now[0])
    token = made.make("worker-1", 3)
    assert made.seen(b"Bearer " + token.encode()) is None
    found = made.check(token)
    assert made.seen(b"Bearer " + token.encode()) == found
    assert made.seen(b"") is None
    assert made.seen(b"Bearer " + token.encode() + b"x") is None
    assert [found.ends_soon(now[0] + share * WORKER_TOKEN_S) for share in (0.0, 0.4, 0.6)] == [False, False, True]
    now[0] += WORKER_TOKEN_S
    assert made.seen(b"Bearer " + token.encode()) is None
    with pytest.raises(NotAuthenticated, match="expired"):
        made.check(token)
