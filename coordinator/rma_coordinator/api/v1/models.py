"""The models of the pool, as OpenAI's SDKs list them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rma_coordinator.api.v1.access import check_model, principal_of
from rma_coordinator.api.v1.errors import APIProblem, noted, request_id

if TYPE_CHECKING:
    from rma_coordinator.api.asgi import Call
    from rma_coordinator.domain.models import ModelView
    from rma_coordinator.pool import Pool


async def models(pool: Pool, call: Call) -> None:
    """GET /v1/models: what can be asked for, and what could be lately."""
    principal_of(pool, call)
    listed = [_model(pool, view) for view in pool.models().values()]
    await _give(call, {"object": "list", "data": listed})


async def model(pool: Pool, call: Call) -> None:
    """GET /v1/models/{model}; a name may have slashes in it."""
    principal_of(pool, call)
    name = call.parts["model"].rstrip("/")
    view = pool.models().get(name)
    if view is None:
        check_model(pool, name)
        raise APIProblem(404, f"this pool has no model {name!r}", param="model", api_code="model_not_found")
    await _give(call, _model(pool, view))


async def _give(call: Call, value: dict[str, Any]) -> None:
    await call.json(value, headers={"x-request-id": request_id(call), **noted(call)})


def _model(pool: Pool, view: ModelView) -> dict[str, Any]:
    return {
        "id": view.name,
        "object": "model",
        # Which never changes: nobody knows when a volunteer's model was made.
        "created": int(pool.record.created_at),
        "owned_by": "rma",
        # As vLLM calls it, and as llama.cpp's and OpenRouter's clients look for it.
        "max_model_len": view.context or None,
        "context_length": view.context or None,
        "capabilities": list(view.capabilities),
        "status": view.state,
        "x_rma": {"workers": view.workers, "loaded": view.loaded},
    }
