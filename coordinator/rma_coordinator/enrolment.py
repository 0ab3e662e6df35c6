"""Enrolment: machines become workers, prove who they are, and get the short tokens they work with."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec

from rma_coordinator import tokens
from rma_coordinator.domain.credentials import fingerprint
from rma_coordinator.domain.worker_records import WorkerRecord, differs
from rma_coordinator.store import Put
from rma_core.errors import NotAuthenticated, NotFound, Refused
from rma_core.interfaces import PolicyInput
from rma_core.models.hardware import HardwareReport
from rma_core.models.worker import RegisterResponse, TokenResponse

if TYPE_CHECKING:
    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.pool import Pool
    from rma_core.models.worker import RegisterRequest

logger = logging.getLogger(__name__)

#: Seconds after it joined in which another registration of a worker belongs to its joining.
JOINING_S = 10.0
#: A machine that joins waits so long for its tier, and gets it later where that is not enough.
DECIDED_S = 5.0
#: What a preview calls the machine; no worker has this id, for no key has this thumbprint.
NOBODY = "worker-00000000"


async def preview(pool: Pool, request: RegisterRequest) -> RegisterResponse:
    """Say what a registration would answer; nothing is kept and no token is spent."""
    report = request.report or HardwareReport(capabilities=request.capabilities)
    await _prepare(pool, request, "")
    decision = pool.decide(report, labels=request.labels, worker_id="")
    ruling = pool.ruling("", request.labels, decision.prefers, pool.fleet.census)
    chosen = pool.placement(request, report, decision.tier, worker_id="", ruling=ruling)
    return RegisterResponse(
        worker_id=NOBODY,
        tier=decision.tier,
        tier_reason=decision.reason,
        containers=chosen.assignments,
        placement=chosen.reasons,
        generation=0,
        heartbeat_interval_s=pool.fleet.interval_s,
    )


async def register(
    pool: Pool, request: RegisterRequest, *, join_secret: str, ip_address: str
) -> tuple[RegisterResponse, bool]:
    """Take a machine in with a join token; return the answer and whether the worker is new. Idempotent by key.

    Raises NotAuthenticated, Forbidden for a used token, Refused for a machine that an admin has disabled.
    """
    if request.public_key is None or request.proof is None:
        raise NotAuthenticated(
            "a registration carries the machine's public key and a proof that it holds the private one"
        )
    thumbprint = tokens.thumbprint(request.public_key)
    pool.keyring.join_token(join_secret, thumbprint)
    claims = tokens.verify_proof(
        request.proof, public_key=request.public_key, kind="rma-proof+jwt", issuer=pool.record.issuer
    )
    if claims["iss"] != thumbprint or claims.get("tkn") != fingerprint(join_secret):
        raise NotAuthenticated("the proof is for another key or another join token")
    _spend_nonce(pool, claims)
    known = pool.fleet.by_thumbprint(thumbprint)
    await _prepare(pool, request, known.id if known else pool.fleet.new_id(thumbprint))
    # Nothing waits between this look at the token and the commit's snapshot: two machines never spend one use.
    token = pool.keyring.join_token(join_secret, thumbprint)
    known = pool.fleet.by_thumbprint(thumbprint)
    if known is not None and known.record.disabled:
        raise Refused("an admin has disabled this machine", hints=("ask the pool's admin",))
    spent = pool.keyring.spend(token, thumbprint)
    # What an admin says of a machine later is not undone by its joining with the same token again.
    owner = token.owner if spent is not token else ""
    worker = _enlist(pool, request, thumbprint, known, ip_address=ip_address, token_id=token.token_id, owner=owner)
    await pool.store.commit([Put(worker.id, worker.record), Put(spent.hash, spent)])
    return _welcome(pool, worker), known is None


async def reregister(pool: Pool, worker: Worker, request: RegisterRequest, *, ip_address: str) -> RegisterResponse:
    """Take a known worker's new facts in; its worker token stands for its key."""
    await _prepare(pool, request, worker.id)
    _enlist(pool, request, worker.record.thumbprint, worker, ip_address=ip_address)
    await pool.store.commit([Put(worker.id, worker.record)])
    return _welcome(pool, worker)


async def _prepare(pool: Pool, request: RegisterRequest, worker_id: str) -> None:
    """Have the policy answer for a machine before it is decided; one that takes too long is waited for later."""
    report = request.report or HardwareReport(capabilities=request.capabilities)
    asked = PolicyInput(report=report, labels=request.labels, worker_id=worker_id)
    await pool.tiers.prepare([asked], within_s=DECIDED_S)


def exchange(pool: Pool, assertion: str) -> TokenResponse:
    """Give a worker token for a signed assertion. Raises NotAuthenticated, NotFound for an unknown worker."""
    worker = pool.fleet.workers.get(tokens.claimed_subject(assertion))
    if worker is None:
        raise NotFound("this pool does not know that worker", hints=("enrol the machine again: rma join URL TOKEN",))
    claims = tokens.verify_proof(
        assertion, public_key=worker.record.public_key, kind="rma-assertion+jwt", issuer=pool.record.issuer
    )
    if claims["iss"] != worker.id:
        raise NotAuthenticated("the assertion is another worker's")
    _spend_nonce(pool, claims)
    if worker.record.disabled:
        raise Refused("an admin has disabled this machine", hints=("ask the pool's admin",))
    return TokenResponse(
        access_token=pool.worker_tokens.make(worker.id, worker.record.epoch), expires_in=tokens.WORKER_TOKEN_S
    )


def worker_of(pool: Pool, token: str) -> Worker:
    """Return the worker that holds a worker token. Raises NotAuthenticated."""
    return holder(pool, pool.worker_tokens.check(token))


def holder(pool: Pool, claims: tokens.WorkerClaims) -> Worker:
    """Return the worker of whom a token speaks. Raises NotAuthenticated."""
    worker = pool.fleet.workers.get(claims.worker_id)
    if worker is None or claims.epoch != worker.brief.epoch or worker.brief.disabled:
        raise NotAuthenticated(
            "this worker token was revoked, or the pool has forgotten the worker", hints=("enrol the machine again",)
        )
    return worker


def _enlist(
    pool: Pool,
    request: RegisterRequest,
    thumbprint: str,
    known: Worker | None,
    *,
    ip_address: str,
    token_id: str = "",
    owner: str = "",
) -> Worker:
    report = request.report or HardwareReport(capabilities=request.capabilities)
    base = known.record if known else _first_record(pool, request, thumbprint, report)
    decision = pool.decide(
        report, labels=request.labels, worker_id=base.worker_id, known=known.record if known else None
    )
    record = msgspec.structs.replace(
        base,
        report=report,
        agent_version=request.agent_version,
        services=request.services,
        agreed_models=request.agreed_models,
        own_models=request.own_models,
        labels=request.labels,
        runtimes=request.runtimes,
        plugins=request.plugins,
        tier=decision.tier,
        tier_reason=decision.reason,
        prefers=decision.prefers,
        owner=owner or base.owner,
        last_seen_at=pool.wall(),
    )
    _tell(pool, record, known, ip_address=ip_address, token_id=token_id)
    worker = pool.fleet.add(record, ip_address=ip_address)
    pool.place(worker, anew=differs(base, record))
    return worker


def _tell(pool: Pool, record: WorkerRecord, known: Worker | None, *, ip_address: str, token_id: str) -> None:
    """Log that a machine is a worker now; before the fleet says how that worker is."""
    # An agent that has joined registers once more when it starts, which is nothing new.
    again = known is not None and pool.wall() - record.registered_at < JOINING_S
    about = {"action": "worker_registered" if known else "worker_joined", "worker": record.worker_id}
    about |= {"token": token_id} if token_id else {}
    logger.log(
        logging.DEBUG if again else logging.INFO,
        "%s %s from %s%s; %s",
        record.worker_id,
        "has registered again" if known else "has joined",
        ip_address,
        f" with join token {token_id}" if token_id else "",
        record.tier_reason,
        extra=about,
    )


def _first_record(pool: Pool, request: RegisterRequest, thumbprint: str, report: HardwareReport) -> WorkerRecord:
    return WorkerRecord(
        worker_id=pool.fleet.new_id(thumbprint),
        thumbprint=thumbprint,
        public_key=request.public_key or "",
        registered_at=pool.wall(),
        report=report,
    )


def _welcome(pool: Pool, worker: Worker) -> RegisterResponse:
    record = worker.record
    return RegisterResponse(
        worker_id=worker.id,
        tier=record.tier,
        tier_reason=record.tier_reason,
        containers=record.assignment,
        placement=record.placement,
        generation=record.generation,
        heartbeat_interval_s=pool.fleet.interval_s,
        access_token=pool.worker_tokens.make(worker.id, record.epoch),
        expires_in=tokens.WORKER_TOKEN_S,
    )


def _spend_nonce(pool: Pool, claims: dict[str, Any]) -> None:
    if not pool.nonces.spend(str(claims.get("nonce", ""))):
        raise NotAuthenticated(
            "the nonce is used, too old or not ours", hints=("take a new one from /api/worker/nonce",)
        )
