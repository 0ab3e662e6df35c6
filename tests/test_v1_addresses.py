"""OpenAI's API under /v1: addresses, keys, and what is refused before anything runs."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from rma_coordinator.api.asgi import Call
from rma_coordinator.api.v1 import calls as openai
from rma_coordinator.api.v1 import errors as openai_errors
from rma_coordinator.api.v1 import models as openai_models
from rma_coordinator.api.v1.access import principal_of
from rma_coordinator.domain.speeds import Speeds
from rma_coordinator.store import StoreFailed
from rma_core.errors import Refused
from rma_core.models import channel as frames
from tests.coordinator_fixtures import until
from tests.openai_kit import CHAT, END, HELLO, JSON, REPLY, SSE, ask, check_error, delta, pool_with, states, stream

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from rma_coordinator.domain.credentials import Principal
    from rma_coordinator.pool import Pool


async def test_every_address_answers_with_and_without_a_slash_and_others_are_an_error_object(tmp_path: Path) -> None:
    async with pool_with(tmp_path, "tiny", "org/name:7b") as (pool, line):
        for path in ("/v1/models", "/v1/models/"):
            found = (await pool.client.get(path)).json()
            assert [model["id"] for model in found["data"]] == ["org/name:7b", "tiny"]
        for name in ("org/name:7b", "org%2Fname%3A7b", "org/name:7b/"):
            assert (await pool.client.get(f"/v1/models/{name}")).json()["id"] == "org/name:7b"
        for path in (CHAT, CHAT + "/"):
            asked = ask(pool, path=path)
            task = await line.serve(json.dumps(REPLY).encode(), headers=JSON)
            assert (task.offer.path, task.offer.model) == (CHAT, "tiny")
            assert (await asked).status_code == 200
        for path in ("/v1", "/v1/", "/v1/files", "/v1/chat", "/v1//models", "/v1/%ff", "/v1/chat/completions/x"):
            check_error(await pool.client.get(path), 404, "not_found")
        answer = await pool.client.get(CHAT)
        check_error(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == "OPTIONS, POST"


async def test_a_key_comes_in_any_of_three_headers_and_a_wrong_one_is_401(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, _):
        key = await pool.make_key("infer:llm")
        for named in (pool.bearer(key), {"api-key": key}, {"x-api-key": key}):
            answer = await pool.client.get("/v1/models", headers={"authorization": "", **named})
            assert answer.status_code == 200
        for secret in ("", "Bearer", "Basic x", "Bearer sk-123", f"Bearer {key}x", "Bearer \xe4"):
            headers = [(b"authorization", secret.encode("latin-1"))]
            answer = await pool.client.get("/v1/models", headers=headers)
            check_error(answer, 401, "invalid_api_key")
            assert answer.headers["www-authenticate"].startswith("Bearer")
            check_error(await pool.client.post(CHAT, headers=headers), 401, "invalid_api_key")
        other = await pool.make_key("infer:notes")
        for answer in (
            await pool.client.get("/v1/models", headers=pool.bearer(other)),
            await pool.client.post(CHAT, headers=pool.bearer(other), content=b"{}"),
        ):
            assert "infer:llm" in check_error(answer, 403, "permission_denied")


async def test_a_model_never_seen_is_404_and_one_that_left_is_503_but_still_listed(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        for answer in (await ask(pool, model="gone", messages=HELLO), await pool.client.get("/v1/models/gone")):
            assert "tiny" in check_error(answer, 404, "model_not_found", param="model")
            assert answer.headers["x-should-retry"] == "false"
        pool.pool.unregister(pool.pool.fleet.get(line.id))
        answer = await ask(pool)
        check_error(answer, 503, "no_worker_available", param="model")
        assert "x-should-retry" not in answer.headers
        listed = (await pool.client.get("/v1/models")).json()["data"]
        away = ("tiny", "away", {"workers": 0, "loaded": 0})
        assert [(model["id"], model["status"], model["x_rma"]) for model in listed] == [away]
        assert (await pool.client.get("/v1/models/tiny")).status_code == 200


async def test_models_are_listed_as_the_sdk_reads_them(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, _):
        answer = await pool.client.get("/v1/models")
        assert answer.headers["x-request-id"]
        found = answer.json()
        (one,) = found["data"]
        assert (found["object"], one["id"], one["object"], one["owned_by"]) == ("list", "tiny", "model", "rma")
        assert isinstance(one["created"], int)
        assert (one["context_length"], one["max_model_len"], one["status"]) == (2048, 2048, "loaded")
        assert one["x_rma"] == {"workers": 1, "loaded": 1}
        assert one["capabilities"] == ["completion", "tools"]


async def test_a_full_queue_is_429_with_a_time_to_come_back(tmp_path: Path) -> None:
    async with pool_with(tmp_path, slots=1, max_queued_tasks=1) as (pool, line):
        first = ask(pool)
        task = await line.task()
        second = ask(pool)
        await until(lambda: len(pool.pool.dispatcher.tasks) == 2)
        answer = await ask(pool)
        check_error(answer, 429, "rate_limit_exceeded")
        assert "x-should-retry" not in answer.headers
        await line.answer(task.stream, json.dumps(REPLY).encode(), headers=JSON)
        await line.serve(json.dumps(REPLY).encode(), headers=JSON)
        assert {(await one).status_code for one in (first, second)} == {200}


async def test_the_time_to_come_back_is_that_until_a_place_is_free_as_far_as_anyone_knows(tmp_path: Path) -> None:
    async with pool_with(tmp_path, slots=2, max_queued_tasks=1) as (pool, _):
        waiting = [ask(pool), ask(pool), ask(pool)]
        await until(lambda: len(pool.pool.dispatcher.tasks) == 3)
        assert (await ask(pool)).headers["retry-after"] == "5", "nothing is known yet"
        for seconds, told in ((24.0, "12"), (1000.0, "60"), (0.001, "1")):
            pool.pool.dispatcher.speeds = Speeds(pool.clock)
            pool.pool.dispatcher.speeds.learn("worker", "llm tiny", seconds, beside=0)
            answer = await ask(pool)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, told)
        for one in waiting:
            one.cancel()


def test_no_failure_looks_like_a_lock_which_sdks_would_try_again() -> None:
    call = Call({"method": "POST", "path": "/v1/embeddings", "headers": []}, never, never)
    status, headers, body = openai_errors.problem(Refused("it has ended already"), call)
    assert (status, headers["x-should-retry"]) == (400, "false")
    assert b"it has ended already" in body


async def never(*_: object) -> Any:
    raise AssertionError("nothing is read or sent")


async def test_every_answer_has_an_id_of_ours_and_gives_the_client_its_own_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with pool_with(tmp_path) as (pool, line):
        for headers in ({"x-request-id": "mine-7"}, {"x-client-request-id": "mine-7", "x-request-id": "proxy"}):
            asked = [ask(pool, headers=headers), ask(pool, headers=headers, model="gone")]
            await line.serve(json.dumps(REPLY).encode(), headers=JSON)
            ids = set()
            for answer in [await one for one in asked]:
                assert answer.headers["x-client-request-id"] == "mine-7"
                assert re.fullmatch("task-[0-9a-z]{20}", answer.headers["x-request-id"])
                ids.add(answer.headers["x-request-id"])
            assert len(ids) == 2
            said = [record.message for record in caplog.records if "mine-7" in record.message]
            assert {message.split()[0] for message in said[-2:]} == ids
        for name in ("x" * 129, "a b", "\x07"):
            answer = await pool.client.get("/v1/models", headers=[(b"x-request-id", name.encode())])
            assert "x-client-request-id" not in answer.headers


async def test_what_is_noted_for_a_request_stands_on_its_answer_whatever_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the limits of a key do."""

    def limited(pool: Pool, call: Call) -> Principal:
        openai_errors.note(call, {"x-ratelimit-remaining-requests": "7"})
        return principal_of(pool, call)

    for module in (openai, openai_models):
        monkeypatch.setattr(module, "principal_of", limited)
    async with pool_with(tmp_path) as (pool, line):
        asked = [ask(pool), stream(pool)]
        await line.serve(json.dumps(REPLY).encode(), headers=JSON)
        await line.serve(delta("a"), delta(finish="stop"), END, headers=SSE)
        for answer in (
            await asked[0],
            await asked[1],
            await ask(pool, model="gone"),
            await pool.client.get("/v1/models"),
            await pool.client.get("/v1/models", headers={"authorization": "Bearer x"}),
        ):
            assert answer.headers["x-ratelimit-remaining-requests"] == "7"


async def test_a_store_that_takes_nothing_is_503_and_a_bug_is_500(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pool_with(tmp_path) as (pool, _):

        def broken(model: str) -> None:
            raise ValueError("a bug in here")

        monkeypatch.setattr(pool.pool, "check_model", broken)
        assert "bug in here" not in check_error(await ask(pool), 500, "internal_error")
        monkeypatch.undo()

        def full() -> None:
            raise StoreFailed("no new work is taken now: the coordinator's disk is full", hints=("try again later",))

        monkeypatch.setattr(pool.pool, "check_store", full)
        assert "try again later" in check_error(await ask(pool), 503, "service_unavailable")


async def test_a_task_that_every_worker_fails_is_502_with_every_reason_and_one_too_late_504(tmp_path: Path) -> None:
    async with pool_with(tmp_path, task_timeout_s=30.0) as (pool, line):
        asked = ask(pool)
        task = await line.task()
        await line.say(frames.Error(stream=task.stream, fault="worker", reason="the model server crashed"))
        answer = await asked
        assert "the model server crashed" in check_error(answer, 502, "worker_failed")
        assert answer.headers["x-request-id"] in answer.text
        asked = ask(pool)
        await line.task()
        await until(lambda: states(pool) == ["running"])
        pool.turn(31)
        answer = await asked
        check_error(answer, 504, "deadline_exceeded")
        assert answer.headers["x-should-retry"] == "false", "the same deadline would pass again"
