"""Every call of the coordinator's HTTP API: who may, what it answers, and what it says to input that is wrong."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import pytest

from rma_coordinator.api.asgi import CONTROL_BYTES, client_address, header_value
from rma_coordinator.api.openapi import document
from rma_coordinator.api.routes import ROUTES, Route
from rma_coordinator.domain.credentials import SCOPES, make_secret
from rma_coordinator.domain.fleet import WorkerRecord
from rma_coordinator.pool import FLUSHED_AT_ONCE
from rma_coordinator.store import StoreFailed
from rma_coordinator.tokens import NONCE_AFTER, WORKER_TOKEN_S
from rma_core.agent.keys import DeviceKey
from rma_core.models.worker import RegisterRequest
from tests.coordinator_fixtures import MACHINE, Running, running, soon, until
from tests.needs import need

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from httpx2 import Response

    from rma_coordinator.store import Change

TASK = "task-" + "0" * 20
LEASE = "0" * 32


class Case(NamedTuple):
    """How one route is called: a path with names that nobody has, and a body that would be right."""

    path: str
    body: Any = None
    #: What a caller who may gets; 404 where the path names somebody who is not there.
    status: int = 200


#: One for each route of the table; a route without one fails a test.
CASES: dict[tuple[str, str], Case] = {
    ("GET", "/health"): Case("/health"),
    ("GET", "/openapi.json"): Case("/openapi.json"),
    ("GET", "/docs"): Case("/docs"),
    ("GET", "/"): Case("/"),
    ("GET", "/static/{name}"): Case("/static/nothing.js", status=404),
    ("GET", "/api/worker/nonce"): Case("/api/worker/nonce"),
    ("POST", "/api/worker/register"): Case(
        "/api/worker/register", {"capabilities": {"cpu_cores": 4, "ram": "8GB"}}, 401
    ),
    ("POST", "/api/worker/token"): Case("/api/worker/token", {"assertion": "a.b.c"}, 401),
    ("GET", "/api/worker/channel"): Case("/api/worker/channel", status=426),
    ("POST", "/api/worker/heartbeat"): Case("/api/worker/heartbeat", {"worker_id": "worker-00000000"}, 403),
    ("DELETE", "/api/worker/unregister/{worker_id}"): Case("/api/worker/unregister/worker-00000000", status=403),
    ("GET", "/api/worker/tasks"): Case("/api/worker/tasks?wait=0", status=204),
    ("GET", "/api/worker/tasks/{task_id}/body"): Case(f"/api/worker/tasks/{TASK}/body?attempt=1", status=404),
    ("POST", "/api/worker/tasks/{task_id}/result"): Case(f"/api/worker/tasks/{TASK}/result?attempt=1", status=404),
    ("POST", "/api/worker/task-complete"): Case(
        "/api/worker/task-complete", {"task_id": TASK, "attempt": 1, "lease_id": LEASE, "status": "failed"}, 404
    ),
    ("GET", "/api/admin/workers"): Case("/api/admin/workers"),
    ("GET", "/api/admin/workers/{worker_id}"): Case("/api/admin/workers/worker-00000000", status=404),
    ("POST", "/api/admin/workers/{worker_id}/disable"): Case("/api/admin/workers/worker-00000000/disable", status=404),
    ("POST", "/api/admin/workers/{worker_id}/enable"): Case("/api/admin/workers/worker-00000000/enable", status=404),
    ("POST", "/api/admin/workers/{worker_id}/owner"): Case(
        "/api/admin/workers/worker-00000000/owner", {"owner": "alice"}, 404
    ),
    ("GET", "/api/admin/stats"): Case("/api/admin/stats"),
    ("GET", "/api/admin/health"): Case("/api/admin/health"),
    ("POST", "/api/admin/backup"): Case("/api/admin/backup", status=201),
    ("GET", "/api/admin/tasks"): Case("/api/admin/tasks"),
    ("GET", "/api/admin/tasks/{task_id}"): Case(f"/api/admin/tasks/{TASK}", status=404),
    ("GET", "/api/admin/plugins"): Case("/api/admin/plugins"),
    ("GET", "/api/admin/services"): Case("/api/admin/services"),
    ("GET", "/api/admin/services/{service}"): Case("/api/admin/services/nothing-like-it", status=404),
    ("GET", "/api/admin/placement"): Case("/api/admin/placement"),
    ("POST", "/api/admin/placement/preview"): Case("/api/admin/placement/preview", {"file": "strategy = 'pack'"}),
    ("PUT", "/api/admin/placement"): Case("/api/admin/placement", {"file": ""}),
    ("GET", "/api/admin/models"): Case("/api/admin/models"),
    ("GET", "/api/admin/policies"): Case("/api/admin/policies"),
    ("POST", "/api/admin/policies/preview"): Case("/api/admin/policies/preview", {}),
    ("PUT", "/api/admin/policies/active"): Case("/api/admin/policies/active", {"policy": "nobody-has-this"}, 404),
    ("POST", "/api/admin/policies/rollback"): Case("/api/admin/policies/rollback", {}, 409),
    ("POST", "/api/admin/policies/rescan"): Case("/api/admin/policies/rescan"),
    ("GET", "/api/admin/policies/{name}"): Case("/api/admin/policies/nobody-has-this", status=404),
    ("GET", "/api/admin/policies/shadow"): Case("/api/admin/policies/shadow", status=404),
    ("PUT", "/api/admin/policies/shadow"): Case("/api/admin/policies/shadow", {"policy": "nobody-has-this"}, 404),
    ("DELETE", "/api/admin/policies/shadow"): Case("/api/admin/policies/shadow", status=404),
    ("GET", "/api/admin/audit"): Case("/api/admin/audit"),
    ("GET", "/api/admin/keys"): Case("/api/admin/keys"),
    ("POST", "/api/admin/keys"): Case("/api/admin/keys", {"label": "laptop"}, 201),
    ("POST", "/api/admin/keys/{key_id}/webhook-secret"): Case("/api/admin/keys/00000000/webhook-secret", status=404),
    ("DELETE", "/api/admin/keys/{key_id}"): Case("/api/admin/keys/00000000", status=404),
    ("GET", "/api/admin/tokens"): Case("/api/admin/tokens"),
    ("POST", "/api/admin/tokens"): Case("/api/admin/tokens", {}, 201),
    ("DELETE", "/api/admin/tokens/{key_id}"): Case("/api/admin/tokens/00000000", status=404),
    ("GET", "/api/inference/tasks/{task_id}"): Case(f"/api/inference/tasks/{TASK}", status=404),
    ("GET", "/api/inference/tasks/{task_id}/result"): Case(f"/api/inference/tasks/{TASK}/result", status=404),
    ("DELETE", "/api/inference/tasks/{task_id}"): Case(f"/api/inference/tasks/{TASK}", status=404),
    ("POST", "/api/inference/{service}"): Case("/api/inference/nothing", status=404),
    ("POST", "/api/inference/{service}/{rest}"): Case("/api/inference/nothing/at/all", status=404),
    ("POST", "/v1/chat/completions"): Case("/v1/chat/completions", {"model": "none", "messages": [{}]}, 404),
    ("POST", "/v1/completions"): Case("/v1/completions", {"model": "none", "prompt": "x"}, 404),
    ("POST", "/v1/embeddings"): Case("/v1/embeddings", {"model": "none", "input": "x"}, 404),
    ("GET", "/v1/models"): Case("/v1/models"),
    ("GET", "/v1/models/{model}"): Case("/v1/models/none", status=404),
}
#: What OpenAI's error object calls what our problems name otherwise.
OPENAI_CODES = {
    "invalid": None,
    "not_authenticated": "invalid_api_key",
    "forbidden": "permission_denied",
    "method": "method_not_allowed",
    "encoding": "unsupported_encoding",
    "too_large": "request_too_large",
}


def name_of(route: Route) -> tuple[str, str]:
    return route.method, route.path


def takes_json(route: Route) -> bool:
    return isinstance(route.takes, type)


async def call(
    pool: Running, route: Route, secret: str | None, *, content: bytes | None = None, method: str = "", **headers: str
) -> Response:
    case = CASES[name_of(route)]
    if content is None and case.body is not None:
        content = json.dumps(case.body).encode()
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    sent["authorization"] = f"Bearer {secret}" if secret is not None else ""
    return await pool.client.request(method or route.method, case.path, content=content, headers=sent)


def check_problem(answer: Response, status: int, code: str | None = None) -> dict[str, Any]:
    """Assert that an answer is a problem as RFC 9457 and our contract write it, and return it.

    Under /v1 it is OpenAI's error object.
    """
    assert answer.status_code == status, answer.text
    if answer.request.url.path.startswith("/v1/"):
        return check_openai_error(answer, code)
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert body["type"] == f"urn:rma:problem:{body['code']}"
    assert body["title"]
    assert body["detail"]
    assert code is None or body["code"] == code
    return body


def check_openai_error(answer: Response, code: str | None) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert code is None or error["code"] == OPENAI_CODES[code]
    return error


def test_every_route_of_the_table_has_a_case() -> None:
    assert {name_of(route) for route in ROUTES} == set(CASES)


async def test_without_a_credential_only_the_open_calls_answer(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        for route in ROUTES:
            answer = await call(pool, route, None)
            if route.access == "open":
                assert answer.status_code == CASES[name_of(route)].status, (route, answer.text)
            else:
                check_problem(answer, 401, "not_authenticated")
                assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_a_credential_that_does_not_open_the_call_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        client = await pool.make_key("infer:notes")
        for route in ROUTES:
            if route.access == "open":
                continue
            answer = await call(pool, route, client)
            if route.access == "infer":
                check_problem(answer, 403 if route.path.startswith("/v1/") else 404)
            elif route.access == "worker":
                check_problem(answer, 401)
            else:
                assert "notes" not in answer.text or "holds" in answer.text
                check_problem(answer, 403, "forbidden")
        assert (await pool.client.post("/api/inference/ner", headers=pool.bearer(client))).status_code == 403


async def test_each_scope_opens_its_own_calls_and_no_others(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        for scope in SCOPES:
            secret = await pool.make_key(scope, kind="admin")
            for route in ROUTES:
                if ":" in route.access:
                    refused = f"does not open {route.access}" in (await call(pool, route, secret)).text
                    assert refused == (route.access != scope), (scope, route)


async def test_who_may_gets_an_answer_from_every_call(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        for route in ROUTES:
            secret = machine.token if route.access == "worker" else pool.key
            secret = make_secret("rmaj_") if route.access == "join" else secret
            answer = await call(pool, route, secret)
            assert answer.status_code == CASES[name_of(route)].status, (route, answer.text)
            if answer.status_code >= 400:
                check_problem(answer, answer.status_code)


async def test_bad_json_is_refused_and_every_problem_in_it_is_named(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        for route in [route for route in ROUTES if takes_json(route)]:
            secret = machine.token if route.access in ("worker", "join") else pool.key
            for content in (b"", b"{", b"[1]", b"NaN", b"\xff", b'"\\ud800"', b"[" * 10_000, b"1e400"):
                body = check_problem(await call(pool, route, secret, content=content), 400, "invalid")
                assert body["errors"] if "errors" in body else body["message"].startswith("request: $")
        wrong = b'{"kind": "root", "label": 5, "scopes": "all", "ttl_s": 1}'
        answer = await pool.client.post("/api/admin/keys", content=wrong)
        assert {error["where"] for error in check_problem(answer, 400)["errors"]} == {
            "$.kind",
            "$.label",
            "$.scopes",
            "$.ttl_s",
        }


async def test_a_method_that_the_address_does_not_take_is_refused_with_those_it_takes(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        for route in ROUTES:
            answer = await call(pool, route, machine.token, method="PATCH")
            check_problem(answer, 405, "method")
            assert route.method in answer.headers["allow"]


async def test_a_body_that_is_too_large_or_encoded_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, max_body_bytes=2000) as pool, pool.worker() as line:
        machine = line.machine
        for route in [route for route in ROUTES if route.takes]:
            secret = machine.token if route.access in ("worker", "join") else pool.key
            answer = await call(pool, route, secret, content_encoding="gzip")
            if answer.status_code != 404:
                check_problem(answer, 415, "encoding")
            if takes_json(route):
                limit = 2000 if route.path.startswith("/v1/") else CONTROL_BYTES
                answer = await call(pool, route, secret, content=b" " * (limit + 1))
                check_problem(answer, 413, "too_large")
        check_problem(await pool.infer(b"x" * 2001), 413, "too_large")
        check_problem(await pool.infer(b"x", headers={"Content-Encoding": "br"}), 415, "encoding")

        async def endless() -> Any:
            for _ in range(50):
                yield b"x" * 100

        check_problem(await pool.client.post("/api/inference/notes", content=endless()), 413, "too_large")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/inference/", 404),
        ("/api/inference//notes", 404),
        ("/api/inference/notes/", 404),
        ("/api/inference/notes//", 404),
        ("/api/inference/notes/..", 404),
        ("/api/inference/notes/%2e%2e/ner", 404),
        ("/api/inference/%6eotes", 503),
        ("/api/inference/notes%00", 404),
        ("/api/inference/notes%ff", 404),
        ("/api/inference/notes%", 404),
        ("/api/inference/notes%zz", 404),
        ("/api/inference/notes%0d%0aX-Y:%20z", 404),
        ("/api/inference/notes?" + "q" * 5000, 414),
        ("/api/inference/" + "n" * 3000, 404),
        ("//api/inference/notes", 404),
        ("/health/", 404),
        ("/health/../health", 404),
        ("/static/..%2f..%2fpool.py", 404),
        ("/static/%2e%2e", 404),
        ("/%", 404),
        ("*", 404),
    ],
)
async def test_odd_addresses_are_answered_and_never_with_a_500(tmp_path: Path, path: str, status: int) -> None:
    async with running(tmp_path) as pool:
        method = "POST" if "inference" in path else "GET"
        head, body = await raw(pool, f"{method} {path} HTTP/1.1\r\nAuthorization: Bearer {pool.key}\r\n")
        assert int(head.split()[1]) == status, head
        assert json.loads(body)["code"] in ("not_found", "try_later", "too_long")


async def raw(pool: Running, request: str) -> tuple[str, bytes]:
    """Send a request exactly as it is written, with no library to mend it; return head and body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(pool.url.rpartition(":")[2]))
    writer.write(f"{request}Host: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode("latin-1"))
    try:
        answer = await soon(reader.read(-1))
    finally:
        writer.close()
        await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.decode("latin-1"), body


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("User-Agent: " + "u" * 9000, 400),
        ("Accept: caf\xe9", 400),
        ("X-Other: " + "o" * 20_000, 503),
        ("X-Huge: " + "o" * 500_000, 431),
        ("Authorization: Basic eDp5", 401),
        ("Authorization: Bearer \xe4\xf6\xfc", 401),
        ("X-Forwarded-For: <script>, ::1", 503),
    ],
)
async def test_odd_headers_are_answered_and_never_with_a_500(tmp_path: Path, header: str, status: int) -> None:
    async with running(tmp_path) as pool:
        own = "" if header.startswith("Authorization") else f"Authorization: Bearer {pool.key}\r\n"
        head, _ = await raw(pool, f"POST /api/inference/notes HTTP/1.1\r\n{own}{header}\r\n")
        # The last one is refused by the server before any of ours is asked; 400 says it as well.
        assert int(head.split()[1]) in ((status, 400) if status == 431 else (status,)), head


@pytest.mark.parametrize(
    "query", ["wait=-1", "wait=51", "wait=x", "wait=nan", "wait=inf", "max=0", "max=65", "max=%ff"]
)
async def test_odd_numbers_in_a_query_are_bad_input(tmp_path: Path, query: str) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        answer = await pool.client.get(f"/api/worker/tasks?{query}", headers=machine.headers)
        check_problem(answer, 400, "query")
        answer = await pool.client.get(
            f"/api/worker/tasks/{TASK}/body?attempt=1&lease_id=%C3%A4%ff", headers=machine.headers
        )
        check_problem(answer, 404, "not_found")


async def test_a_client_that_leaves_in_the_middle_of_its_request_leaves_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, memory_body_bytes=0) as pool, pool.worker():
        _, writer = await asyncio.open_connection("127.0.0.1", int(pool.url.rpartition(":")[2]))
        head = f"POST /api/inference/notes HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {pool.key}\r\n"
        writer.write(f"{head}Content-Length: 1000\r\n\r\n".encode() + b"x" * 100)
        await writer.drain()
        lanes = pool.app.extensions["rma_lanes"]
        await until(lambda: len(lanes._open) == 2)
        writer.transport.abort()
        await until(lambda: len(lanes._open) == 1)
        assert pool.pool.dispatcher.tasks == {}


# -- enrolment -----------------------------------------------------------------------------------------------------


async def test_a_machine_is_new_once_and_known_after_that(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        key, token = DeviceKey.generate(), await pool.join_token()
        first = await pool.register(key, token)
        assert first.status_code == 201
        answer = first.json()
        assert re.fullmatch(r"worker-[0-9a-f]{8}", answer["worker_id"])
        assert answer["tier"] == 2
        assert {box["service"] for box in answer["containers"]} == {"notes", "ner"}
        assert answer["expires_in"] == 900
        again = await pool.register(key, token)
        assert (again.status_code, again.json()["worker_id"]) == (200, answer["worker_id"])
        assert again.json()["generation"] == answer["generation"]
        check_problem(await pool.register(DeviceKey.generate(), token), 403, "forbidden")


async def test_two_machines_at_once_do_not_share_one_use(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        token = await pool.join_token()
        answers = await asyncio.gather(*(pool.register(DeviceKey.generate(), token) for _ in range(5)))
        assert sorted(answer.status_code for answer in answers) == [201, 403, 403, 403, 403]
        assert len(pool.pool.fleet.workers) == 1


async def test_a_registration_needs_its_own_fresh_proof(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        key, other, token = DeviceKey.generate(), DeviceKey.generate(), await pool.join_token(uses=5)
        good = await pool.registration(key, token)
        stolen = await pool.registration(other, token)
        wrong = [
            msgspec.structs.replace(good, proof=None),
            msgspec.structs.replace(good, public_key=None),
            msgspec.structs.replace(good, proof=stolen.proof),
            msgspec.structs.replace(good, proof="x.y.z"),
            await pool.registration(key, await pool.join_token()),
        ]
        for request in wrong:
            answer = await pool.client.post(
                "/api/worker/register", content=msgspec.json.encode(request), headers=pool.bearer(token)
            )
            check_problem(answer, 401, "not_authenticated")
        content, headers = msgspec.json.encode(good), pool.bearer(token)
        answers = [await pool.client.post("/api/worker/register", content=content, headers=headers) for _ in range(2)]
        assert answers[0].status_code == 201
        assert "nonce" in check_problem(answers[1], 401)["detail"]


async def test_a_preview_answers_the_same_and_keeps_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        token = await pool.join_token()
        content = msgspec.json.encode(RegisterRequest(capabilities=MACHINE))
        for secret in (token, token, pool.key):
            answer = await pool.client.post(
                "/api/worker/register?preview=1", content=content, headers=pool.bearer(secret)
            )
            assert answer.status_code == 200
            assert (answer.json()["tier"], answer.json()["access_token"]) == (2, "")
        assert pool.pool.fleet.workers == {}
        registered = await pool.register(DeviceKey.generate(), token)
        assert registered.status_code == 201, "the token was not spent"
        worker_token = registered.json()["access_token"]
        answer = await pool.client.post(
            "/api/worker/register?preview=1", content=content, headers=pool.bearer(worker_token)
        )
        assert answer.status_code == 200
        client = await pool.make_key("infer:*")
        answer = await pool.client.post("/api/worker/register?preview=1", content=content, headers=pool.bearer(client))
        check_problem(answer, 403)


async def test_a_known_worker_brings_new_facts_with_its_token_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        request = RegisterRequest(capabilities=MACHINE, services=("ner",), agent_version="2")
        answer = await pool.client.post(
            "/api/worker/register", content=msgspec.json.encode(request), headers=machine.headers
        )
        assert answer.status_code == 200
        assert [box["service"] for box in answer.json()["containers"]] == ["ner"]
        assert answer.json()["generation"] > machine.answer["generation"]


async def test_a_change_of_tier_places_the_machine_anew(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        small = msgspec.json.encode(RegisterRequest(capabilities=msgspec.structs.replace(MACHINE, cpu_cores=1)))
        answer = (await pool.client.post("/api/worker/register", content=small, headers=machine.headers)).json()
        assert (answer["tier"], answer["containers"]) == (None, [])
        assert "core" in answer["tier_reason"]


async def exchange(pool: Running, key: DeviceKey, worker_id: str, *, nonce: str = "") -> Response:
    found = (await pool.client.get("/api/worker/nonce")).json()
    assertion = key.assertion(issuer=found["issuer"], nonce=nonce or found["nonce"], worker_id=worker_id)
    return await pool.client.post("/api/worker/token", json={"assertion": assertion}, headers={"Authorization": ""})


async def test_a_signed_assertion_is_exchanged_for_a_token_once(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine, other = await pool.enrol(), await pool.enrol()
        answer = await exchange(pool, machine.key, machine.id)
        assert answer.status_code == 200
        machine.token = answer.json()["access_token"]
        beat = await machine.beat()
        assert beat.status_code == 200
        assert "nonce" not in beat.json()
        pool.pool.wall = lambda: time.time() + WORKER_TOKEN_S * NONCE_AFTER
        nonce = (await machine.beat()).json()["nonce"]
        assert (await exchange(pool, machine.key, machine.id, nonce=nonce)).status_code == 200
        check_problem(await exchange(pool, machine.key, machine.id, nonce=nonce), 401)
        check_problem(await exchange(pool, other.key, machine.id), 401)
        check_problem(await exchange(pool, machine.key, "worker-00000000"), 404, "not_found")
        check_problem(await exchange(pool, machine.key, machine.id, nonce="1.2.ä"), 401)


async def test_a_forgotten_worker_is_told_so_and_may_join_again(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        del pool.pool.fleet.workers[machine.id]
        check_problem(await machine.beat(), 401)
        check_problem(await exchange(pool, machine.key, machine.id), 404)
        answer = await pool.register(machine.key, await pool.join_token())
        assert (answer.status_code, answer.json()["worker_id"]) == (201, machine.id)


async def test_disabling_ends_a_workers_tokens_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        assert (await machine.beat()).status_code == 200
        await pool.client.post(f"/api/admin/workers/{machine.id}/disable")
        check_problem(await machine.beat(), 401)
        check_problem(await exchange(pool, machine.key, machine.id), 409, "refused")
        check_problem(await pool.register(machine.key, await pool.join_token()), 409, "refused")
        await pool.client.post(f"/api/admin/workers/{machine.id}/enable")
        machine.token = (await exchange(pool, machine.key, machine.id)).json()["access_token"]
        assert (await machine.beat()).status_code == 200


async def test_what_was_acknowledged_is_known_after_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        left = await pool.enrol()
        await pool.client.delete(f"/api/worker/unregister/{left.id}", headers=left.headers)
        nonce = (await pool.client.get("/api/worker/nonce")).json()["nonce"]
        key = pool.key
    async with running(tmp_path) as pool:
        workers = (await pool.client.get("/api/admin/workers", headers=pool.bearer(key))).json()["workers"]
        assert {row["worker_id"]: row["status"] for row in workers} == {machine.id: "degraded", left.id: "offline"}
        machine.running = pool
        assert (await machine.beat()).status_code == 200, "a worker token outlives the coordinator"
        check_problem(await exchange(pool, machine.key, machine.id, nonce=nonce), 401)


# -- what admins see -----------------------------------------------------------------------------------------------


async def test_the_records_of_many_workers_are_written_a_few_at_a_time_and_what_failed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as pool:
        await pool.enrol()
        fleet, store, sizes = pool.pool.fleet, pool.pool.store, list[int]()
        known = next(iter(fleet.workers.values())).record
        ids = {f"worker-{n:08}" for n in range(3 * FLUSHED_AT_ONCE - 1)}
        for one in ids:
            fleet.add(msgspec.structs.replace(known, worker_id=one), ip_address="")
        fleet.changed = set(ids)
        commit = store.commit

        async def failing(changes: Collection[Change], *, urgent: bool = False) -> None:
            sizes.append(len(changes))
            if len(sizes) == 2:
                raise StoreFailed("not now")
            await commit(changes, urgent=urgent)

        monkeypatch.setattr(store, "commit", failing)
        await pool.pool.flush()
        assert (sizes, len(fleet.changed)) == ([FLUSHED_AT_ONCE] * 2, 2 * FLUSHED_AT_ONCE - 1)
        await pool.pool.flush()
        assert (sizes[2:], fleet.changed) == ([FLUSHED_AT_ONCE, FLUSHED_AT_ONCE - 1], set())
        assert ids < {record.worker_id for record in await store.load(WorkerRecord)}


async def test_lists_come_in_pages(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        ids = sorted([(await pool.enrol()).id for _ in range(5)])
        seen, after = [], ""
        for _ in range(3):
            page = (await pool.client.get(f"/api/admin/workers?limit=2{after}")).json()
            seen += [row["worker_id"] for row in page["workers"]]
            assert page["total"] == 5
            after = f"&after={page['next']}"
        assert (seen, page["next"]) == (ids, None)
        for query in ("limit=0", "limit=1001", "limit=x", "limit=²", "limit=" + "9" * 5000, "after=worker-00000000"):
            check_problem(await pool.client.get(f"/api/admin/workers?{query}"), 400, "query")


async def test_stats_have_the_contracts_shape(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        healthy, _ = await pool.enrol(), await pool.enrol()
        await healthy.beat(current_load=0.5)
        stats = (await pool.client.get("/api/admin/stats")).json()
        assert (stats["total_workers"], stats["healthy_workers"], stats["degraded_workers"]) == (2, 2, 0)
        assert stats["by_tier"] == {"2": {"workers": 2, "healthy": 2, "average_load": 0.25}}
        assert stats["tasks"] == {"queued": 0, "running": 0, "succeeded": 0, "failed": 0}
        assert stats["uptime_s"] >= 0
        assert stats["services"]["notes"] == {"wanted": 8, "assigned": 2, "healthy": 1}


async def test_keys_can_be_made_used_and_revoked_but_never_wider_than_their_maker(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        made = (await pool.client.post("/api/admin/keys", json={"kind": "admin", "scopes": ["admin:keys"]})).json()
        headers = pool.bearer(made["key"])
        listed = (await pool.client.get("/api/admin/keys", headers=headers)).json()["keys"]
        assert made["key"] not in json.dumps(listed)
        wide = await pool.client.post("/api/admin/keys", json={"scopes": ["admin:write"]}, headers=headers)
        check_problem(wide, 403, "forbidden")
        check_problem(await pool.client.post("/api/admin/keys", json={"scopes": ["no:such"]}), 400, "invalid")
        assert (await pool.client.delete(f"/api/admin/keys/{made['key_id']}")).status_code == 200
        check_problem(await pool.client.get("/api/admin/keys", headers=headers), 401)


async def test_a_policy_is_previewed_for_machines_and_for_the_fleet(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        bare = {"cpu_cores": 1, "ram": "1GB"}
        full = {"capabilities": {"cpu_cores": 16, "ram": "64GB", "storage": "1TB"}}
        answer = (await pool.client.post("/api/admin/policies/preview", json={"reports": [bare, full]})).json()
        assert [row["tier"] for row in answer["machines"]] == [None, 2]
        answer = (await pool.client.post("/api/admin/policies/preview", json={"policy": "threshold"})).json()
        assert (answer["changes"], answer["workers"][0]["worker_id"]) == (0, machine.id)
        bad = await pool.client.post("/api/admin/policies/preview", json={"reports": [bare, {"cpu_cores": -1}]})
        assert "reports[1]" in check_problem(bad, 400)["detail"]
        check_problem(await pool.client.post("/api/admin/policies/preview", json={"policy": "none"}), 404)


@pytest.mark.parametrize(
    "answer", [ValueError("broken"), None, {"tier": "gold", "reason": ""}, {"tier": 1.5, "reason": 3}]
)
async def test_a_policy_that_fails_or_lies_costs_a_tier_and_nothing_else(tmp_path: Path, answer: object) -> None:
    class Broken:
        name, summary = "threshold", "fails"

        def decide(self, _: object) -> object:
            if isinstance(answer, Exception):
                raise answer
            return answer

    async with running(tmp_path) as pool:
        pool.pool.tiers.use(Broken())  # type: ignore[arg-type]
        machine = await pool.enrol()
        assert machine.answer["tier"] is None
        assert "the tier policy 'threshold' failed" in machine.answer["tier_reason"]
    async with running(tmp_path) as pool:
        assert machine.id in pool.pool.fleet.workers, "what was kept can be read again"


async def test_a_full_queue_is_said_with_a_time_to_try_again(tmp_path: Path) -> None:
    async with running(tmp_path, max_queued_tasks=1) as pool, pool.worker(slots=1) as line:
        asking = [asyncio.create_task(pool.infer()) for _ in range(2)]
        await until(lambda: pool.pool.dispatcher.queued == 1)
        refused = await pool.infer()
        check_problem(refused, 429, "queue_full")
        assert refused.headers["retry-after"] == "5"
        for _ in range(2):
            await line.serve(b"done")
        assert [(await soon(one)).text for one in asking] == ["done", "done"]


async def test_a_service_that_nobody_serves_is_said_with_the_reason(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        body = check_problem(await pool.infer(), 503, "try_later")
        assert "no worker offers it" in body["detail"]
        assert check_problem(await pool.infer(path="llm"), 404)["hints"] == ["it has: ner, notes"]
        assert check_problem(await pool.infer(path="notes/nowhere"), 404)["hints"]


# -- the document, and small parts ---------------------------------------------------------------------------------


def openapi() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(document("0.1.0", "rma-test")))
    return found


def test_the_openapi_document_is_valid() -> None:
    need("openapi")
    importlib.import_module("openapi_spec_validator").validate(openapi())


def test_the_openapi_document_lists_every_route_under_a_name_of_its_own() -> None:
    paths = openapi()["paths"]
    listed = {(method.upper(), path): operation for path, item in paths.items() for method, operation in item.items()}
    assert set(listed) == {name_of(route) for route in ROUTES}
    assert len({operation["operationId"] for operation in listed.values()}) == len(ROUTES)
    for (_, path), operation in listed.items():
        declared = {found["name"] for found in operation.get("parameters", []) if found["in"] == "path"}
        assert declared == set(re.findall(r"{(\w+)}", path))


def test_every_reference_in_the_openapi_document_leads_somewhere() -> None:
    found = openapi()
    for name in set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(found))):
        assert name in found["components"]["schemas"]


def test_forwarding_headers_are_believed_from_configured_proxies_only() -> None:
    proxies = ["10.0.0.0/8"]
    assert client_address(("1.2.3.4", 1), "5.6.7.8", proxies) == "1.2.3.4"
    assert client_address(("10.0.0.1", 1), "6.6.6.6, 5.6.7.8", proxies) == "5.6.7.8"
    assert client_address(("10.0.0.1", 1), "5.6.7.8, 10.0.0.2", proxies) == "5.6.7.8"
    assert client_address(("10.0.0.1", 1), "<script>", proxies) == "10.0.0.1"
    assert client_address(None, "", []) == ""


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("a", b"a"),
        (" é ", "é".encode("latin-1")),
        ("日", "日".encode()),
        ("a\tb", b"a\tb"),
        ("a\rb", None),
        ("\0", None),
    ],
)
def test_header_values_are_bytes_that_http_can_carry_or_nothing(text: str, data: bytes | None) -> None:
    assert header_value(text) == data
