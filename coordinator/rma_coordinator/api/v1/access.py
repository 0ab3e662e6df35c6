"""Who may call /v1, and for which models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rma_coordinator.api import limits
from rma_coordinator.api.asgi import bearer
from rma_coordinator.api.v1.errors import APIProblem
from rma_coordinator.domain.fleet import ATTACHABLE
from rma_core.errors import NotAuthenticated, NotFound, TryLater

if TYPE_CHECKING:
    from rma_coordinator.api.asgi import Call
    from rma_coordinator.domain.credentials import Principal
    from rma_coordinator.pool import Pool

#: The scope that opens all of it.
SCOPE = f"infer:{ATTACHABLE}"
#: Where else than in Authorization clients put their key.
KEY_HEADERS = (b"api-key", b"x-api-key")


def covers(path: str) -> bool:
    """Say whether an address belongs to OpenAI's API, whose errors have a form of their own."""
    return path.startswith("/v1/") or path == "/v1"


def principal_of(pool: Pool, call: Call) -> Principal:
    """Return who pays for it. Raises NotAuthenticated, Forbidden."""
    secret = next((call.raw[name] for name in KEY_HEADERS if name in call.raw), b"").decode("latin-1").strip()
    if not secret or call.raw.get(b"authorization"):
        secret = _bearer(call)
    principal = limits.know(pool, call, pool.keyring.principal(secret))
    principal.need(SCOPE)
    return principal


def _bearer(call: Call) -> str:
    try:
        return bearer(call.raw.get(b"authorization", b"").decode("latin-1"))
    except NotAuthenticated:
        message = "an API key of this pool is needed: Authorization: Bearer rmac_…"
        raise NotAuthenticated(message, hints=("the pool's admin makes one: rma keys create --client",)) from None


def check_model(pool: Pool, model: str) -> None:
    """Raise APIProblem for a model that nobody ever had (404), or that nobody offers now (503)."""
    try:
        pool.check_model(model)
    except NotFound as error:
        raise APIProblem(404, error.message, param="model", api_code="model_not_found", hints=error.hints) from None
    except TryLater as error:
        raise APIProblem(
            503, error.message, param="model", api_code="no_worker_available", retry_after_s=error.retry_after_s,
            hints=error.hints,
        ) from None  # fmt: skip
