"""The worker API's calls that are neither hot nor streamed: nonce, registration, token, leaving."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rma_coordinator import enrolment
from rma_coordinator.api.bodies import NonceAnswer
from rma_coordinator.domain.credentials import check_shape
from rma_core.errors import Forbidden
from rma_core.models.strict import decode
from rma_core.models.worker import RegisterRequest, TokenRequest

if TYPE_CHECKING:
    from rma_coordinator.api.web import Web
    from rma_coordinator.pool import Pool

#: A signed assertion is a few hundred bytes; whoever sends more has no credential yet.
TOKEN_BYTES = 16 * 1024


async def nonce(pool: Pool, web: Web) -> object:  # noqa: ARG001 - every handler has the same form
    """A nonce to sign, and the issuer to name."""
    return NonceAnswer(nonce=pool.nonces.make(), issuer=pool.record.issuer)


async def register(pool: Pool, web: Web) -> object:
    """A machine becomes a worker, or brings its facts up to date."""
    secret = web.bearer
    if web.query.get("preview") == "1":
        _may_preview(pool, secret)
        web.status = 200
        return await enrolment.preview(pool, await _registration(web))
    if secret.startswith("rma"):
        # Before the body is parsed: its shape anyone can make up.
        check_shape(secret, "rmaj_")
        pool.keyring.known_token(secret)
        answer, new = await enrolment.register(
            pool, await _registration(web), join_secret=secret, ip_address=web.ip_address
        )
        web.status = 201 if new else 200
        return answer
    found = enrolment.worker_of(pool, secret)
    web.status = 200
    return await enrolment.reregister(pool, found, await _registration(web), ip_address=web.ip_address)


async def _registration(web: Web) -> RegisterRequest:
    return decode(await web.body(), RegisterRequest, subject="registration")


def _may_preview(pool: Pool, secret: str) -> None:
    """Let those ask what a registration would answer who could register, and admins."""
    if secret.startswith("rmaj_"):
        pool.keyring.join_token(secret, None)
    elif secret.startswith("rma"):
        pool.keyring.principal(secret).need("admin:read")
    else:
        enrolment.worker_of(pool, secret)


async def token(pool: Pool, web: Web) -> object:
    """A worker token for a signed assertion."""
    return enrolment.exchange(
        pool, decode(await web.body(TOKEN_BYTES), TokenRequest, subject="token request").assertion
    )


async def unregister(pool: Pool, web: Web) -> object:
    """Leave: the worker's tasks go to others at once."""
    worker = enrolment.worker_of(pool, web.bearer)
    if worker.id != web.parts["worker_id"]:
        raise Forbidden(f"this token is {worker.id}'s, not {web.parts['worker_id']}'s")
    pool.unregister(worker)
    await pool.flush()
    return {"worker_id": worker.id, "status": "offline"}
