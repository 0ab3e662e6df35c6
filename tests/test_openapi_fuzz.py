"""Schemathesis over the OpenAPI document, with every kind of credential, against a coordinator with a worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest

from rma_coordinator.api import admin, plain
from rma_coordinator.domain.credentials import SCOPES
from rma_core.models import channel as frames
from rma_core.models.worker import Heartbeat
from tests.coordinator_fixtures import Line, Running, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from rma_coordinator.api.web import Web
    from rma_coordinator.pool import Pool

#: Seconds for each credential: in the suite, and under `make soak` (RMA_SOAK_S sets another).
QUICK_S, LONG_S = 8, 600
#: Seconds that a poll really waits here; what it may ask for is as always.
POLL_S = 0.05
#: Seconds between two signs of life of the worker that answers.
BEAT_S = 10.0
#: What is looked for in every answer. That good data is taken is for other tests: a document cannot say that a
#: proof must hold or that a worker must exist.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "ignored_auth",
)


class Caller(NamedTuple):
    """A kind of credential, and the paths it is tried on."""

    name: str
    paths: str


CALLERS = (
    Caller("nobody", r"^/"),
    Caller("admin", r"^/(api/admin|api/inference|v1|health|docs|openapi|static)"),
    Caller("client", r"^/(v1|api/(inference|admin))"),
    Caller("join", r"^/api/worker/(register|nonce|token)"),
    Caller("worker", r"^/api/worker/"),
)


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = plain._wait
    monkeypatch.setattr(plain, "_wait", lambda call, waiting, wait_s: wait(call, waiting, min(wait_s, POLL_S)))


@contextlib.asynccontextmanager
async def serving(line: Line) -> AsyncIterator[None]:
    """Answer every request of the pool with JSON, and beat, until told to end."""

    async def serve() -> None:
        while True:
            task = await line.frame(frames.Task, within_s=3600)
            await line.say(frames.Accept(stream=task.stream))
            await line.answer(task.stream, b'{"text": "x"}', headers=(("content-type", "application/json"),))

    async def beat() -> None:
        while True:
            # A channel that says nothing for long is closed, as a dead one.
            await line.say(frames.Beat(beat=Heartbeat(worker_id=line.id), slots={"notes": 64}))
            await asyncio.sleep(BEAT_S)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(serve()), group.create_task(beat())]
        yield
        for task in tasks:
            task.cancel()


async def secret_of(pool: Running, caller: Caller) -> str:
    """Return a credential of a kind."""
    if caller.name == "worker":
        return (await pool.enrol()).token
    if caller.name == "join":
        return await pool.join_token(uses=1000)
    if caller.name == "client":
        return await pool.make_key("infer:notes")
    return await pool.make_key(*SCOPES, kind="admin") if caller.name == "admin" else ""


#: What schemathesis is told beside its options: with which statuses bad data may be refused.
SETTINGS = """
[checks.negative_data_rejection]
expected-statuses = ["400", "401", "403", "404", "405", "408", "409", "411", "413", "414", "415", "426", "429", "503"]
"""


async def schemathesis(pool: Running, caller: Caller, folder: Path, *, seconds: int, seed: int) -> tuple[int, str]:
    """Run it in a process of its own; return its exit code and what it said."""
    secret = await secret_of(pool, caller)
    settings = folder / "schemathesis.toml"
    settings.write_text(SETTINGS)
    arguments = [
        "--config-file", str(settings), "run", f"{pool.url}/openapi.json",
        "--phases", "coverage,fuzzing", "--checks", ",".join(CHECKS),
        "--max-time", str(seconds), "--seed", str(seed), "--request-timeout", "20", "--mode", "all",
        "--include-path-regex", caller.paths, "--generation-database", "none", "--no-color",
        "--suppress-health-check", "all", "--warnings", "off", "--continue-on-failure",
        *(["--header", f"Authorization: Bearer {secret}"] if secret else []),
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "schemathesis.cli", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env={**os.environ, "NO_COLOR": "1"},
        cwd=folder,
    )  # fmt: skip
    try:
        said, _ = await asyncio.wait_for(process.communicate(), seconds * 4 + 60)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, said.decode(errors="replace")


def brief(said: str) -> str:
    """Return what it said, without what nobody reads: bodies may be long."""
    return "\n".join(line[:300] for line in said.splitlines())


async def try_hard(folder: Path, caller: Caller, *, seconds: int, log: pytest.LogCaptureFixture) -> None:
    """Assert that schemathesis finds nothing, and that the coordinator is as well as before."""
    seed = int(os.environ.get("RMA_SEED") or secrets.randbelow(2**31))
    print(f"seed {seed} (RMA_SEED)")  # noqa: T201 - pytest shows it with a failure
    async with running(folder) as pool, pool.worker(slots=64) as line, serving(line):
        code, said = await schemathesis(pool, caller, folder, seconds=seconds, seed=seed)
        assert code == 0, brief(said)
        assert (await pool.client.get("/health")).json()["status"] == "ok"
        assert (await pool.infer(b"x")).status_code == 200
    assert "Traceback" not in log.text


@pytest.mark.parametrize("caller", CALLERS, ids=[caller.name for caller in CALLERS])
async def test_no_input_makes_the_coordinator_break_its_own_document(
    tmp_path: Path, caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    await try_hard(tmp_path, caller, seconds=QUICK_S, log=caplog)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("caller", CALLERS, ids=[caller.name for caller in CALLERS])
async def test_no_input_makes_the_coordinator_break_its_own_document_for_long(
    tmp_path: Path, caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    await try_hard(tmp_path, caller, seconds=int(os.environ.get("RMA_SOAK_S") or LONG_S), log=caplog)


async def test_schemathesis_would_find_a_handler_that_breaks_and_one_that_takes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(pool: Pool, web: Web) -> object:
        raise ValueError("a bug")

    async def credulous(pool: Pool, web: Web) -> object:
        return {"token": "rmaj_x"}

    monkeypatch.setattr(admin, "stats", broken)
    monkeypatch.setattr(admin, "create_token", credulous)
    async with running(tmp_path) as pool:
        for path, failure in (("stats", "Server error"), ("tokens", "Schema-violating request accepted")):
            caller = Caller("admin", rf"^/api/admin/{path}$")
            code, said = await schemathesis(pool, caller, tmp_path, seconds=5, seed=1)
            assert code == 1, brief(said)
            assert failure in said, brief(said)
