"""The server: it starts at once, listens with and without TLS, and ends in time whatever is still open."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import ssl
import sys
import time
import warnings
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from rma_coordinator import server
from rma_coordinator.app import pool_of
from rma_coordinator.certificate import own_pair, pin_of
from rma_coordinator.server import GRACE_S, HARD_STOP_S, LAST_STOP_S, Listener, listen, run_server
from rma_coordinator.store import MemoryStore
from rma_core.errors import SettingProblem
from rma_core.http import open_client
from rma_core.models import channel as frames
from rma_core.tls import certificate_pin, fetch_pinned, pinned_context
from tests import ports
from tests.coordinator_fixtures import (
    PATIENCE_S,
    Line,
    Running,
    TurnedClock,
    make_app,
    make_config,
    running,
    soon,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from quart import Quart

ROOT = Path(__file__).parent.parent
#: Everything ends within this, with a margin for a busy machine.
ENDS_WITHIN_S = GRACE_S + HARD_STOP_S + LAST_STOP_S + 5


async def for_ever() -> None:
    await asyncio.Event().wait()


async def answers(url: str, **more: object) -> bool:
    async with open_client(url, **more) as client:  # type: ignore[arg-type]
        with contextlib.suppress(OSError):
            return bool((await client.get("/health")).json()["status"] == "ok")
    return False


async def test_each_of_these_tests_runs_on_the_server_that_it_names(tmp_path: Path, served_by: str) -> None:
    async with running(tmp_path) as pool:
        assert type(pool.server).__module__ == f"rma_coordinator.{served_by}_server"


async def test_a_coordinator_answers_soon_after_its_start(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        found = (await pool.client.get("/health", headers={"Authorization": ""})).json()
        assert found["status"] == "ok"
        assert found["issuer"] == pool.pool.record.issuer


async def test_ready_is_told_before_anything_else_and_what_it_raises_ends_the_server(tmp_path: Path) -> None:
    app, seen = make_app(tmp_path), []

    async def ready() -> None:
        seen.append(pool_of(app).record.issuer)
        raise SettingProblem("not ready after all", hints=("a hint",))

    config = make_config(Listener("127.0.0.1", ports.free_port()), None)
    with pytest.raises(SettingProblem, match="not ready after all") as failed:
        await soon(run_server(app, config, until=for_ever, ready=ready))
    assert (failed.value.hints, len(seen)) == (("a hint",), 1)
    # The store was closed: another coordinator can have it.
    again = make_app(tmp_path)
    await pool_of(again).start()
    await pool_of(again).stop()


async def test_once_it_says_that_it_answers_it_takes_connections(tmp_path: Path) -> None:
    port = ports.free_port()
    app = make_app(tmp_path, clock=TurnedClock())
    taken: list[bool] = []

    async def ready() -> None:
        _, writer = await soon(asyncio.open_connection("127.0.0.1", port))
        taken.append(True)
        writer.close()

    async def told() -> None:
        await until(lambda: taken)

    await run_server(app, make_config(Listener("127.0.0.1", port), None), until=told, ready=ready)
    assert taken == [True]


async def test_what_ends_the_waiting_is_raised(tmp_path: Path) -> None:
    async def broken() -> None:
        raise RuntimeError("the local part failed")

    config = make_config(Listener("127.0.0.1", ports.free_port()), None)
    with pytest.raises(RuntimeError, match="the local part failed"):
        await soon(run_server(make_app(tmp_path), config, until=broken))


async def test_a_setting_that_cannot_work_is_raised_as_it_is(tmp_path: Path) -> None:
    app = make_app(tmp_path, tier_policy="nobody-has-this")
    config = make_config(Listener("127.0.0.1", ports.free_port()), None)
    with pytest.raises(SettingProblem, match="no tier policy 'nobody-has-this'"):
        await soon(run_server(app, config, until=for_ever))


async def test_a_second_coordinator_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path):
        config = make_config(Listener("127.0.0.1", ports.free_port()), None)
        with pytest.raises(SettingProblem, match="another coordinator is using"):
            await soon(run_server(make_app(tmp_path), config, until=for_ever))


async def test_a_port_that_is_taken_is_said_with_advice(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingProblem, match="cannot listen") as refused:
            listen("127.0.0.1", port)
        assert "--port" in refused.value.hints[0]
        # And when somebody takes it between the look and the bind.
        config = make_config(Listener("127.0.0.1", port), None)
        with warnings.catch_warnings():
            # Hypercorn forgets to close the socket that it could not bind.
            warnings.simplefilter("ignore", ResourceWarning)
            with pytest.raises(SettingProblem, match="cannot listen"):
                await soon(run_server(make_app(tmp_path), config, until=for_ever))
            gc.collect()


def test_an_address_that_is_not_ours_is_said() -> None:
    with pytest.raises(SettingProblem, match=r"cannot listen on 192\.0\.2\.1"):
        listen("192.0.2.1", 0)
    with pytest.raises(SettingProblem, match=r"cannot listen on no\.such\.host\.invalid"):
        listen("no.such.host.invalid", 0)


def test_listeners_are_written_as_urls() -> None:
    assert Listener("127.0.0.1", 80).url == "http://127.0.0.1:80"
    assert Listener("::1", 80, Path("c"), Path("k")).url == "https://[::1]:80"


# -- TLS -----------------------------------------------------------------------------------------------------------


async def test_a_pool_answers_with_tls_and_without_at_once(tmp_path: Path) -> None:
    pair = own_pair(tmp_path / "tls", names=["localhost", "127.0.0.1"])
    plain = Listener("127.0.0.1", ports.free_port())
    secure = Listener("127.0.0.1", ports.free_port(), pair.cert, pair.key)
    stop = asyncio.Event()

    async def told() -> None:
        await stop.wait()

    app = make_app(tmp_path)
    serving = asyncio.create_task(run_server(app, make_config(plain, secure), until=told))
    try:
        pin = pin_of(pair.cert)
        assert pin == "." + certificate_pin(pair.cert.read_text(encoding="ascii"))
        certificate = await until_answer(lambda: fetch_pinned(secure.url, pin.removeprefix(".")))
        assert await answers(plain.url)
        assert await answers(secure.url, context=pinned_context(str(certificate)))
        with pytest.raises(ssl.SSLError):
            # Who does not trust exactly this certificate gets nowhere.
            await asyncio.open_connection("127.0.0.1", secure.port, ssl=ssl.create_default_context())
    finally:
        stop.set()
        await soon(serving)


async def until_answer(ask: Callable[[], object]) -> object:
    """Ask until the server is there."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await ask()  # type: ignore[misc]
            except Exception as error:
                if "certificate" in str(error) and "not the one" in str(error):
                    raise
            await asyncio.sleep(0.05)


def test_a_certificate_is_made_once_and_only_its_owner_reads_the_key(tmp_path: Path) -> None:
    first = own_pair(tmp_path / "tls", names=["localhost", "10.0.0.1", "::1"])
    before = first.cert.read_bytes()
    again = own_pair(tmp_path / "tls", names=["elsewhere"])
    assert (again, again.cert.read_bytes()) == (first, before)
    assert first.key.stat().st_mode & 0o077 == 0


def test_what_is_no_certificate_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingProblem, match="cannot be used"):
        pin_of(tmp_path / "absent.pem")
    (tmp_path / "bad.pem").write_text("no certificate")
    with pytest.raises(SettingProblem, match="cannot be used"):
        pin_of(tmp_path / "bad.pem")


# -- the end -------------------------------------------------------------------------------------------------------


async def test_with_nothing_open_the_end_comes_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        pass
    assert not pool.pool._started, "the store was flushed and closed"


async def test_open_channels_and_polls_do_not_hold_up_the_end(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(running(tmp_path))
        line = await stack.enter_async_context(pool.worker())
        machine = await pool.enrol()
        polling = asyncio.create_task(machine.poll(wait=50))
        await until(lambda: machine.id in pool.pool.hub.sinks)
        began = time.monotonic()
        pool.stop.set()
        await line.closed()
        assert (await soon(polling)).status_code == 204
        await until(lambda: not pool.pool._started)
        assert time.monotonic() - began < GRACE_S, "nothing had to be cut"


async def test_a_connection_that_waits_for_a_request_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(running(tmp_path))
        held = stack.enter_context(contextlib.closing(await served(int(pool.url.rpartition(":")[2]))))
        began = time.monotonic()
        pool.stop.set()
        assert await asyncio.to_thread(held.sock.recv, 1) == b""
        await until(lambda: not pool.pool._started)
        assert time.monotonic() - began < GRACE_S, "nothing had to be cut"


@contextlib.asynccontextmanager
async def stuck_client(pool: Running) -> AsyncIterator[None]:
    """Ask for an answer and never read it."""
    connection = socket.create_connection(("127.0.0.1", int(pool.url.rpartition(":")[2])))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    try:
        await ask_for_notes(pool, writer)
        yield
    finally:
        # Whatever the test found: a connection that is left open fails another test.
        writer.transport.abort()


async def ask_for_notes(pool: Running, writer: asyncio.StreamWriter, *, content_length: int = 0) -> None:
    head = f"POST /api/inference/notes HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {pool.key}\r\n"
    writer.write(f"{head}Content-Length: {content_length}\r\n\r\n".encode())
    await writer.drain()


async def fill(line: Line) -> frames.Task:
    """Take a task and answer it until nothing more is taken."""
    task = await line.task()
    await line.say(frames.Head(stream=task.stream, status=200))
    granted, sent = frames.WINDOW_BYTES, 0
    with contextlib.suppress(TimeoutError):
        while sent < 2**26:
            while sent + frames.MAX_DATA_BYTES <= granted:
                await line.data(task.stream, b"x" * frames.MAX_DATA_BYTES)
                sent += frames.MAX_DATA_BYTES
            granted += (await line.frame(frames.Credit, within_s=1.0)).bytes
    assert sent < 2**26, "the client is not stuck at all"
    return task


async def test_a_client_that_stopped_reading_cannot_hold_up_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "GRACE_S", 1.0)
    monkeypatch.setattr(server, "HARD_STOP_S", 1.0)
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(running(tmp_path))
        line = await stack.enter_async_context(pool.worker())
        await stack.enter_async_context(stuck_client(pool))
        task = await fill(line)
        began = time.monotonic()
        pool.stop.set()
        await until(lambda: not pool.pool._started, within_s=ENDS_WITHIN_S)
        assert time.monotonic() - began < ENDS_WITHIN_S
        assert pool.pool.dispatcher.find(task.offer.task_id).final
        assert "Traceback" not in caplog.text
    # The store was closed in order, so the next start finds everything.
    async with running(tmp_path) as again:
        assert line.id in again.pool.fleet.workers


async def test_a_connection_that_is_cut_at_the_end_leaves_no_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "GRACE_S", 0.1)
    async with running(tmp_path) as pool, pool.worker():
        # So the server's own patience ends before we cut the requests.
        monkeypatch.setattr(server, "GRACE_S", 2.0)
        _, writer = await asyncio.open_connection("127.0.0.1", int(pool.url.rpartition(":")[2]))
        try:
            await ask_for_notes(pool, writer, content_length=1000)
            lanes = pool.app.extensions["rma_lanes"]
            await until(lambda: len(lanes._open) == 2)
            pool.stop.set()
            await until(lambda: not pool.pool._started, within_s=ENDS_WITHIN_S)
        finally:
            writer.transport.abort()
    assert "Traceback" not in caplog.text


async def served(port: int) -> HTTPConnection:
    """Return an open connection on which a request was answered. Raises OSError where it was closed instead."""
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        await asyncio.to_thread(answered, connection)
    except OSError:
        connection.close()
        raise
    # It must stay the same connection.
    connection.auto_open = 0
    return connection


def answered(connection: HTTPConnection) -> None:
    connection.request("GET", "/health")
    assert connection.getresponse().read().startswith(b"{")


async def test_one_connection_too_many_is_closed_and_the_others_are_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rma_coordinator.server")
    async with running(tmp_path, max_connections=3) as pool:
        port = int(pool.url.rpartition(":")[2])
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(contextlib.closing(await served(port))) for _ in range(3)]
            for _ in range(4):
                with pytest.raises(OSError, match=r"reset|closed|[Bb]roken pipe"):
                    await served(port)
            for connection in held:
                await asyncio.to_thread(answered, connection)
            assert caplog.text.count("3 connections are open, as many as there may be") == 1
            held[0].close()
            stack.enter_context(contextlib.closing(await until_served(port)))
            await until(lambda: "there is room for connections again" in caplog.text)


async def until_served(port: int) -> HTTPConnection:
    """Connect until there is a place."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(OSError):
                return await served(port)
            await asyncio.sleep(0.01)


async def test_a_connection_without_a_whole_head_is_closed_in_time_and_one_with_a_request_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 1.0)
    async with running(tmp_path) as pool, pool.worker() as line:
        port = int(pool.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await ask_for_notes(pool, writer)
        task = await line.task()
        whole = b"GET /health HTTP/1.1\r\nhost: pool\r\n\r\n"

        async def closed_after(begun: bytes) -> int:
            idle, of_idle = await asyncio.open_connection("127.0.0.1", port)
            of_idle.write(begun)
            answers = await soon(idle.read())
            of_idle.close()
            return answers.count(b"HTTP/1.1 200")

        beginnings = (b"", whole[:20], whole, whole + whole[:20])
        assert await asyncio.gather(*map(closed_after, beginnings)) == [0, 0, 1, 1]
        await line.answer(task.stream, b"four closed meanwhile")
        assert (await soon(reader.readuntil(b"meanwhile"))).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux can be told how long to wait")
async def test_a_client_that_takes_nothing_any_more_does_not_keep_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "UNREAD_S", 1.0)
    async with running(tmp_path) as pool, pool.worker() as line:
        before = pool.server.places.taken
        async with stuck_client(pool):
            await fill(line)
            await until(lambda: pool.server.places.taken == before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
async def test_a_connection_whose_client_has_left_is_gone_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        port = int(pool.url.rpartition(":")[2])
        for _ in range(20):
            with contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)) as connection:
                request = b"GET /health HTTP/1.1\r\nhost: pool\r\n\r\n"
                await asyncio.to_thread(connection.sendall, request)
                assert (await asyncio.to_thread(connection.recv, 4096)).startswith(b"HTTP/1.1 200")

        def left() -> int:
            found = psutil.Process().net_connections("tcp")
            return sum(c.laddr.port == port and c.status == psutil.CONN_CLOSE_WAIT for c in found)

        await until(lambda: left() == 0)


async def test_sigterm_ends_the_command_with_a_channel_open(tmp_path: Path) -> None:
    port = ports.free_port()
    environment = {**os.environ, "RMA_HOME": str(tmp_path), "RMA_CATALOG": ""}
    command = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "rma_core", "coordinator", "--port", str(port),
        cwd=ROOT, env=environment, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        async with asyncio.timeout(60):
            while not await _listens(port):
                assert command.returncode is None
                await asyncio.sleep(0.05)
        assert await answers(url)
        began = time.monotonic()
        command.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(command.wait(), ENDS_WITHIN_S) == 0
        assert time.monotonic() - began < ENDS_WITHIN_S
        assert command.stderr is not None
        said = (await command.stderr.read()).decode()
        assert "Traceback" not in said
        assert "The coordinator answers at" in said
    finally:
        if command.returncode is None:
            command.kill()
            await command.wait()
        command._transport.close()  # type: ignore[attr-defined]


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def test_test_app_runs_the_whole_life_too(tmp_path: Path) -> None:
    app: Quart = make_app(tmp_path, store=MemoryStore(), clock=TurnedClock())
    async with app.test_app() as serving:
        answer = await serving.test_client().get("/health")
        assert (await answer.get_json())["status"] == "ok"
    assert not pool_of(app)._started


async def _exit_code() -> int:
    return 3


def test_run_returns_the_exit_code() -> None:
    assert server.run(_exit_code()) == 3
