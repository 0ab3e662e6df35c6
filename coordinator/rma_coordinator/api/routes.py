"""The route table: every call the coordinator answers. It feeds the router, the OpenAPI document and the reference."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from rma_coordinator.api import bodies
from rma_core.models import worker as wire

if TYPE_CHECKING:
    from collections.abc import Mapping

Access = Literal["open", "admin:read", "admin:write", "admin:keys", "tasks:read", "infer", "join", "worker"]


class Route(NamedTuple):
    """One call: how it is reached, who may, what goes in and out.

    ``lane`` is ``quart``, or ``raw`` for those that stream or are hot and stand below Quart; ``handler`` is the name
    of the function that serves it.
    """

    method: str
    path: str
    handler: str
    access: Access
    summary: str
    lane: Literal["quart", "raw", "channel"] = "quart"
    takes: type[msgspec.Struct] | str | None = None
    gives: type[msgspec.Struct] | str | None = None
    status: int = 200
    query: Mapping[str, str] = {}


PAGE = {"limit": "entries at most (1 to 1000, default 100)", "after": "the `next` of the page before"}
ATTEMPT = {"attempt": "number of the attempt", "lease_id": "its lease"}

ROUTES: tuple[Route, ...] = (
    Route("GET", "/health", "health", "open", "Whether the coordinator works, and what it is.", gives="object"),
    Route("GET", "/openapi.json", "openapi", "open", "This document.", gives="object"),
    Route("GET", "/docs", "docs", "open", "The API as a page.", gives="text/html"),
    Route("GET", "/", "page", "open", "The status page.", gives="text/html"),
    Route("GET", "/static/{name}", "static", "open", "A file of the pages.", gives="text/html"),
    # Workers
    Route(
        "GET",
        "/api/worker/nonce",
        "nonce",
        "open",
        "A nonce to sign, and the issuer to name.",
        gives=bodies.NonceAnswer,
    ),
    Route(
        "POST",
        "/api/worker/register",
        "register",
        "join",
        "A machine becomes a worker: 201, or 200 when its key is known already.",
        takes=wire.RegisterRequest,
        gives=wire.RegisterResponse,
        status=201,
        query={"preview": "1: the same answer, nothing kept, no token spent"},
    ),
    Route(
        "POST",
        "/api/worker/token",
        "token",
        "open",
        "A worker token for a signed assertion.",
        takes=wire.TokenRequest,
        gives=wire.TokenResponse,
    ),
    Route(
        "GET",
        "/api/worker/channel",
        "channel",
        "worker",
        "WebSocket: tasks down, answers and heartbeats up.",
        lane="channel",
        status=101,
    ),
    Route(
        "POST",
        "/api/worker/heartbeat",
        "heartbeat",
        "worker",
        "A sign of life; answers what to do next.",
        lane="raw",
        takes=wire.Heartbeat,
        gives=wire.HeartbeatAnswer,
    ),
    Route(
        "DELETE",
        "/api/worker/unregister/{worker_id}",
        "unregister",
        "worker",
        "Leave: the worker's tasks go to others at once.",
        gives="object",
    ),
    Route(
        "GET",
        "/api/worker/tasks",
        "poll",
        "worker",
        "Long poll for tasks: 200 with leases, or 204.",
        lane="raw",
        gives=wire.TaskOffers,
        query={"wait": "seconds to wait (0 to 50, default 25)", "max": "tasks at most (1 to 64, default 1)"},
    ),
    Route(
        "GET",
        "/api/worker/tasks/{task_id}/body",
        "task_body",
        "worker",
        "A task's request body, streamed.",
        lane="raw",
        gives="application/octet-stream",
        query=ATTEMPT,
    ),
    Route(
        "POST",
        "/api/worker/tasks/{task_id}/result",
        "result",
        "worker",
        "An answer, streamed; opening it accepts the task.",
        lane="raw",
        takes="application/octet-stream",
        gives="object",
        query={**ATTEMPT, "status": "HTTP status of the answer (default 200)"},
    ),
    Route(
        "POST",
        "/api/worker/task-complete",
        "complete",
        "worker",
        "Closes an attempt; a small answer may ride along.",
        lane="raw",
        takes=wire.TaskComplete,
        gives="object",
    ),
    # Admins
    Route("GET", "/api/admin/workers", "workers", "admin:read", "All workers.", gives="object", query=PAGE),
    Route(
        "GET",
        "/api/admin/workers/{worker_id}",
        "worker",
        "admin:read",
        "One worker with its devices, probes, plugins and placement.",
        gives="object",
    ),
    Route(
        "POST",
        "/api/admin/workers/{worker_id}/disable",
        "disable",
        "admin:write",
        "Shut a worker out at once.",
        gives="object",
    ),
    Route(
        "POST",
        "/api/admin/workers/{worker_id}/enable",
        "enable",
        "admin:write",
        "Let a worker in again.",
        gives="object",
    ),
    Route("GET", "/api/admin/stats", "stats", "admin:read", "The pool in numbers.", gives="object"),
    Route(
        "GET",
        "/api/admin/health",
        "admin_health",
        "admin:read",
        "The coordinator's own state, with reasons.",
        gives="object",
    ),
    Route(
        "GET",
        "/api/admin/tasks",
        "tasks",
        "tasks:read",
        "Tasks that run, wait, or ended lately.",
        gives="object",
        query=PAGE,
    ),
    Route(
        "GET",
        "/api/admin/plugins",
        "plugins",
        "admin:read",
        "The coordinator's plugins, and each worker's that are not well.",
        gives="object",
    ),
    Route(
        "GET", "/api/admin/services", "services", "admin:read", "Services: wanted, assigned, healthy.", gives="object"
    ),
    Route(
        "GET", "/api/admin/policies", "policies", "admin:read", "Tier policies; which one is active.", gives="object"
    ),
    Route(
        "POST",
        "/api/admin/policies/preview",
        "preview_policy",
        "admin:read",
        "Which tiers a policy would give, and why.",
        takes=bodies.PolicyPreview,
        gives="object",
    ),
    Route("GET", "/api/admin/keys", "keys", "admin:keys", "All keys, without their secrets.", gives="object"),
    Route(
        "POST",
        "/api/admin/keys",
        "create_key",
        "admin:keys",
        "Make a key; its secret is shown this once.",
        takes=bodies.KeyRequest,
        gives="object",
        status=201,
    ),
    Route("DELETE", "/api/admin/keys/{key_id}", "revoke_key", "admin:keys", "End a key at once.", gives="object"),
    Route(
        "GET",
        "/api/admin/tokens",
        "join_tokens",
        "admin:keys",
        "All join tokens, without their secrets.",
        gives="object",
    ),
    Route(
        "POST",
        "/api/admin/tokens",
        "create_token",
        "admin:keys",
        "Make a join token; its secret is shown this once.",
        takes=bodies.TokenMake,
        gives="object",
        status=201,
    ),
    Route(
        "DELETE", "/api/admin/tokens/{key_id}", "revoke_key", "admin:keys", "End a join token at once.", gives="object"
    ),
    # Clients
    Route(
        "POST",
        "/api/inference/{service}",
        "infer",
        "infer",
        "Run a request on a worker; the answer is relayed as it comes.",
        lane="raw",
        takes="*/*",
        gives="*/*",
    ),
    Route(
        "POST",
        "/api/inference/{service}/{rest}",
        "infer",
        "infer",
        "The same, for services with several calls.",
        lane="raw",
        takes="*/*",
        gives="*/*",
    ),
)


def pattern(path: str) -> re.Pattern[str]:
    """Return what matches a route's path; ``{rest}`` takes slashes, every other part does not."""
    names = re.sub(r"\{(\w+)\}", lambda found: f"(?P<{found[1]}>{'.+' if found[1] == 'rest' else '[^/]+'})", path)
    return re.compile(names)


class Router:
    """Finds the raw route for a request."""

    def __init__(self, routes: tuple[Route, ...] = ROUTES) -> None:
        self._routes = [(pattern(route.path), route) for route in routes if route.lane != "quart"]

    def find(self, method: str, path: str) -> tuple[Route | None, dict[str, str], tuple[str, ...]]:
        """Return (route, its path's parts, the methods the path takes); no methods when the path is not a raw one."""
        allowed: list[str] = []
        for shape, route in self._routes:
            if found := shape.fullmatch(path):
                if route.method == method:
                    return route, found.groupdict(), (method,)
                allowed.append(route.method)
        return None, {}, tuple(allowed)


def document(version: str, issuer: str) -> dict[str, Any]:
    """Return the OpenAPI document."""
    structs = {kind for route in ROUTES for kind in (route.takes, route.gives) if isinstance(kind, type)}
    _, components = msgspec.json.schema_components(
        sorted(structs, key=lambda kind: kind.__name__), ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "RMA coordinator",
            "version": version,
            "description": f"A pool of volunteers' machines ({issuer}).",
        },
        "paths": paths,
        "components": {
            "schemas": {**components, "Problem": PROBLEM},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


PROBLEM = {
    "type": "object",
    "description": "RFC 9457",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "hints": {"type": "array", "items": {"type": "string"}},
    },
}


def _operation(route: Route) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ] + [
        {"name": name, "in": "query", "description": words, "schema": {"type": "string"}}
        for name, words in route.query.items()
    ]
    operation: dict[str, Any] = {
        "operationId": _operation_id(route),
        "summary": route.summary,
        "responses": {
            str(route.status): {"description": "done", **_content(route.gives)},
            "default": {
                "description": "a problem",
                "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
            },
        },
    }
    if parameters:
        operation["parameters"] = parameters
    if route.access != "open":
        operation["security"] = [{"bearer": []}]
        operation["description"] = f"Needs: {route.access}."
    if route.takes is not None:
        operation["requestBody"] = {"required": True, **_content(route.takes)}
    return operation


def _operation_id(route: Route) -> str:
    """Return a name that no other call has: the method and the path, in words."""
    return "_".join([route.method.lower(), *re.findall(r"\w+", route.path)])


def _content(kind: type[msgspec.Struct] | str | None) -> dict[str, Any]:
    if kind is None:
        return {}
    if isinstance(kind, str):
        return {"content": {"application/json": {"schema": {"type": "object"}}} if kind == "object" else {kind: {}}}
    return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}}
