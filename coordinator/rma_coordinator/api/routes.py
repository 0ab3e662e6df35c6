"""The route table: every call the coordinator answers. It feeds the router, the OpenAPI document and the reference."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rma_coordinator.api import bodies
from rma_coordinator.domain.tasks import PRIORITIES
from rma_core.models import worker as wire

if TYPE_CHECKING:
    from collections.abc import Mapping

    import msgspec

Access = Literal["open", "admin:read", "admin:write", "admin:keys", "tasks:read", "infer", "join", "worker"]


class Parameter(NamedTuple):
    """A value that a call takes beside its body: what it means, and its JSON schema."""

    words: str
    form: Mapping[str, Any]
    required: bool = False


class Route(NamedTuple):
    """One call: how it is reached, who may, what goes in and out.

    ``lane`` is ``quart``, or ``raw`` for those that stream or are hot and stand below Quart; ``handler`` is the name
    of the function that serves it. ``also`` are further good statuses (without a body for 204), ``fails`` those of
    failures that follow neither from who may call it nor from what it takes.
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
    query: Mapping[str, Parameter] = {}
    headers: Mapping[str, Parameter] = {}
    also: tuple[int, ...] = ()
    fails: tuple[int, ...] = ()


TEXT = {"type": "string"}


def _number(least: int, most: int, *, whole: bool = False) -> dict[str, Any]:
    return {"type": "integer" if whole else "number", "minimum": least, "maximum": most}


PAGE = {
    "limit": Parameter("entries at most (1 to 1000, default 100)", _number(1, 1000, whole=True)),
    "after": Parameter("the `next` of the page before", TEXT),
}
ATTEMPT = {
    "attempt": Parameter("number of the attempt", _number(1, 1_000_000, whole=True), required=True),
    "lease_id": Parameter("its lease", TEXT, required=True),
}
ANSWER = {
    "status": Parameter("HTTP status of the answer (default 200)", _number(200, 599, whole=True)),
}
ANSWER_HEADERS = {
    "RMA-Answer-Headers": Parameter("the answer's headers: a JSON list of [name, value]", TEXT),
}
ASYNC = {
    "Prefer": Parameter("`respond-async`: 202 and a task to ask after, instead of the answer", TEXT),
    "Idempotency-Key": Parameter(
        "repeated with the same request, it is done once (1 to 255 visible ASCII characters)",
        {"type": "string", "pattern": "^[!-~]{1,255}$"},
    ),
}
WEBHOOK = {
    "RMA-Webhook": Parameter(
        "with `respond-async`: an https address that is told of the task's end, signed as Standard Webhooks has it",
        {"type": "string", "pattern": "^https://", "maxLength": 2048},
    ),
}
ASKED = {
    "RMA-Timeout": Parameter(
        "seconds that the request may take in all, at most as many as the service gives it",
        {"type": "number", "exclusiveMinimum": 0},
    ),
    "RMA-Priority": Parameter(
        "how urgent it is; `high` needs the scope `priority:high`, without it is `normal`",
        {"type": "string", "enum": list(PRIORITIES), "default": "normal"},
    ),
}
OPENAI_HEADERS = {
    **ASKED,
    "Idempotency-Key": ASYNC["Idempotency-Key"],
    "X-RMA-Keepalive": Parameter("`1`: an answer that takes long is kept alive by blank lines", TEXT),
}
#: What may become of a request that runs on a worker.
RUN_FAILS = (400, 404, 405, 409, 414, 429, 501, 502, 503, 504)
#: What an answer under /v1 is: an object, or events when `stream` is asked for.
OPENAI = "application/json, text/event-stream"
OPENAI_FAILS = (404, 422, 429, 502, 503, 504)
#: Parts of a path that take slashes.
WITH_SLASHES = frozenset({"rest", "model"})

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
        query={"preview": Parameter("1: the same answer, nothing kept, no token spent", TEXT)},
        also=(200,),
        fails=(409, 503),
    ),
    Route(
        "POST",
        "/api/worker/token",
        "token",
        "open",
        "A worker token for a signed assertion.",
        takes=wire.TokenRequest,
        gives=wire.TokenResponse,
        fails=(401, 404, 409),
    ),
    Route(
        "GET",
        "/api/worker/channel",
        "channel",
        "worker",
        "WebSocket: tasks down, answers and heartbeats up.",
        lane="channel",
        status=101,
        fails=(426,),
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
        fails=(403,),
    ),
    Route(
        "DELETE",
        "/api/worker/unregister/{worker_id}",
        "unregister",
        "worker",
        "Leave: the worker's tasks go to others at once.",
        gives="object",
        fails=(403, 503),
    ),
    Route(
        "GET",
        "/api/worker/tasks",
        "poll",
        "worker",
        "Long poll for tasks: 200 with leases, or 204.",
        lane="raw",
        gives=wire.TaskOffers,
        query={
            "wait": Parameter("seconds to wait (0 to 50, default 25)", _number(0, 50)),
            "max": Parameter("tasks at most (1 to 64, default 1)", _number(1, 64, whole=True)),
        },
        also=(204,),
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
        query={**ATTEMPT, **ANSWER},
        headers=ANSWER_HEADERS,
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
        fails=(404,),
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
        fails=(503,),
    ),
    Route(
        "POST",
        "/api/admin/workers/{worker_id}/enable",
        "enable",
        "admin:write",
        "Let a worker in again.",
        gives="object",
        fails=(503,),
    ),
    Route(
        "POST",
        "/api/admin/workers/{worker_id}/owner",
        "worker_owner",
        "admin:write",
        "Say whose machine a worker is: whose requests come first there.",
        takes=bodies.WorkerOwner,
        gives="object",
        fails=(503,),
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
        "POST",
        "/api/admin/backup",
        "backup",
        "admin:write",
        "Copy the state to a file in the coordinator's folder, while it runs.",
        gives="object",
        status=201,
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
        "/api/admin/tasks/{task_id}",
        "task",
        "tasks:read",
        "The whole life of one task.",
        gives="object",
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
        "GET",
        "/api/admin/services",
        "services",
        "admin:read",
        "Services: wanted, assigned, healthy, and why there are fewer than wanted.",
        gives="object",
    ),
    Route(
        "GET",
        "/api/admin/services/{service}",
        "service",
        "admin:read",
        "One service: where it runs, by which rule, and why not elsewhere.",
        gives="object",
        fails=(404,),
    ),
    Route(
        "GET",
        "/api/admin/placement",
        "placement_rules",
        "admin:read",
        "The rules of placement that are in force.",
        gives="object",
    ),
    Route(
        "POST",
        "/api/admin/placement/preview",
        "preview_rules",
        "admin:read",
        "What rules of placement would change in the live fleet.",
        takes=bodies.RulesPreview,
        gives="object",
    ),
    Route(
        "PUT",
        "/api/admin/placement",
        "apply_rules",
        "admin:write",
        "Put rules of placement in force; no text is no rules.",
        takes=bodies.RulesApplied,
        gives="object",
        fails=(409, 503),
    ),
    Route(
        "GET",
        "/api/admin/models",
        "pool_models",
        "admin:read",
        "Models: how they stand, what they take, who has them, and why nobody does.",
        gives="object",
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
        fails=(404, 409),
    ),
    Route(
        "PUT",
        "/api/admin/policies/active",
        "activate_policy",
        "admin:write",
        "Put a tier policy in force, at once or in steps.",
        takes=bodies.PolicyActivation,
        gives="object",
        fails=(404, 409, 503),
    ),
    Route(
        "POST",
        "/api/admin/policies/rollback",
        "rollback_policy",
        "admin:write",
        "Put the policy in force again that was before this one.",
        takes=bodies.PolicyRollback,
        gives="object",
        fails=(409, 503),
    ),
    Route(
        "POST",
        "/api/admin/policies/rescan",
        "rescan_policies",
        "admin:write",
        "Look for plugins' policies that were installed, replaced or uninstalled; what is in force stays so.",
        gives="object",
        fails=(409,),
    ),
    Route(
        "GET",
        "/api/admin/policies/{name}",
        "show_policy",
        "admin:read",
        "One tier policy: its text, where it is a file's, and what was done with policies lately.",
        gives="object",
        fails=(404,),
    ),
    Route(
        "GET",
        "/api/admin/policies/shadow",
        "show_shadow",
        "admin:read",
        "Where the policy in the shadow differs from the one in force.",
        gives="object",
        fails=(404,),
    ),
    Route(
        "PUT",
        "/api/admin/policies/shadow",
        "shadow_policy",
        "admin:write",
        "Ask a policy beside the one in force, and keep where it differs.",
        takes=bodies.PolicyShadow,
        gives="object",
        fails=(404, 409, 503),
    ),
    Route(
        "DELETE",
        "/api/admin/policies/shadow",
        "end_shadow",
        "admin:write",
        "Ask the policy in the shadow no more.",
        gives="object",
        fails=(404, 409, 503),
    ),
    Route(
        "GET",
        "/api/admin/audit",
        "audit",
        "admin:read",
        "What was done to the pool, newest first.",
        gives="object",
        query={"limit": PAGE["limit"]},
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
        fails=(503,),
    ),
    Route(
        "POST",
        "/api/admin/keys/{key_id}/webhook-secret",
        "webhook_secret",
        "admin:keys",
        "Make a new secret that signs a key's webhooks; shown this once.",
        gives=bodies.WebhookSecretAnswer,
        status=201,
        fails=(409, 503),
    ),
    Route(
        "DELETE",
        "/api/admin/keys/{key_id}",
        "revoke_key",
        "admin:keys",
        "End a key at once.",
        gives="object",
        fails=(503,),
    ),
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
        fails=(503,),
    ),
    Route(
        "DELETE",
        "/api/admin/tokens/{key_id}",
        "revoke_key",
        "admin:keys",
        "End a join token at once.",
        gives="object",
        fails=(503,),
    ),
    # Clients
    Route(
        "GET",
        "/api/inference/tasks/{task_id}",
        "task",
        "infer",
        "What became of an asynchronous task; its result when it is small JSON.",
        lane="raw",
        gives="object",
        query={"wait": Parameter("seconds to wait for its end (0 to 50, default 0)", _number(0, 50))},
        fails=(503,),
    ),
    Route(
        "GET",
        "/api/inference/tasks/{task_id}/result",
        "task_result",
        "infer",
        "The answer of an asynchronous task, as the service gave it.",
        lane="raw",
        gives="*/*",
        fails=(400, 409, 502, 503, 504),
    ),
    Route(
        "DELETE",
        "/api/inference/tasks/{task_id}",
        "cancel_task",
        "infer",
        "Cancel an asynchronous task.",
        lane="raw",
        gives="object",
        fails=(409, 503),
    ),
    Route(
        "POST",
        "/api/inference/{service}",
        "infer",
        "infer",
        "Run a request on a worker; the answer is relayed as it comes.",
        lane="raw",
        takes="*/*",
        gives="*/*",
        headers=ASKED | ASYNC | WEBHOOK,
        also=(202,),
        fails=RUN_FAILS,
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
        headers=ASKED | ASYNC | WEBHOOK,
        also=(202,),
        fails=RUN_FAILS,
    ),
    # OpenAI's API
    Route(
        "POST",
        "/v1/chat/completions",
        "chat_completions",
        "infer",
        "A chat with a model, whole or as server-sent events.",
        lane="raw",
        takes=bodies.ChatCompletionRequest,
        gives=OPENAI,
        headers=OPENAI_HEADERS,
        fails=OPENAI_FAILS,
    ),
    Route(
        "POST",
        "/v1/completions",
        "completions",
        "infer",
        "A text that a model goes on with, whole or as server-sent events.",
        lane="raw",
        takes=bodies.CompletionRequest,
        gives=OPENAI,
        headers=OPENAI_HEADERS,
        fails=OPENAI_FAILS,
    ),
    Route(
        "POST",
        "/v1/embeddings",
        "embeddings",
        "infer",
        "Texts as vectors.",
        lane="raw",
        takes=bodies.EmbeddingRequest,
        gives="object",
        headers=OPENAI_HEADERS,
        fails=OPENAI_FAILS,
    ),
    Route("GET", "/v1/models", "models", "infer", "The models of the pool.", lane="raw", gives="object"),
    Route(
        "GET",
        "/v1/models/{model}",
        "model",
        "infer",
        "One model; its name may have slashes in it.",
        lane="raw",
        gives="object",
        fails=(503,),
    ),
)


def pattern(path: str) -> re.Pattern[str]:
    """Return what matches a route's path; the parts in WITH_SLASHES take slashes, every other part does not."""
    return re.compile(re.sub(r"\{(\w+)\}", _part, path))


def _part(found: re.Match[str]) -> str:
    return f"(?P<{found[1]}>{'.+' if found[1] in WITH_SLASHES else '[^/]+'})"


class Router:
    """Finds the raw route for a request."""

    def __init__(self, routes: tuple[Route, ...] = ROUTES) -> None:
        raw = [route for route in routes if route.lane != "quart"]
        self._routes = [(pattern(route.path), route) for route in raw]
        #: Paths without parts, among them the hot ones, need no search.
        self._plain = {(route.method, route.path): route for route in raw if "{" not in route.path}

    def find(self, method: str, path: str) -> tuple[Route | None, dict[str, str], tuple[str, ...]]:
        """Return (route, its path's parts, the methods the path takes); no methods when the path is not a raw one."""
        plain = self._plain.get((method, path))
        if plain is not None:
            return plain, {}, (method,)
        openai = path.startswith("/v1/")
        if openai:
            # Clients of OpenAI's API write its addresses with and without a slash at their end.
            path = path.rstrip("/")
            # A server sends no body with an answer to HEAD.
            method = "GET" if method == "HEAD" else method
        allowed: list[str] = []
        for shape, route in self._routes:
            if found := shape.fullmatch(path):
                if route.method == method:
                    return route, found.groupdict(), (method,)
                allowed.append(route.method)
        if openai and allowed:
            allowed += ["OPTIONS", *(["HEAD"] if "GET" in allowed else [])]
        return None, {}, tuple(allowed)
