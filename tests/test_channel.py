"""The channel: tasks down, answers up, with real WebSockets, real clients and a real server between them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from httpx2 import RemoteProtocolError
from websockets.exceptions import InvalidStatus

from rma_coordinator.api.channel import Session
from rma_coordinator.domain.tasks import LEASE_S
from rma_coordinator.hub import MAX_OUTBOUND
from rma_core.models import channel as frames
from rma_core.models.strict import convert
from rma_core.models.worker import AttemptRef, Heartbeat, TaskOffer
from tests.coordinator_fixtures import Line, Running, running, soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from httpx2 import Response

WINDOW, FRAME = frames.WINDOW_BYTES, frames.MAX_DATA_BYTES
TEXT = (("content-type", "text/plain"),)


class SlowClient:
    """A client that sends a request and reads its answer only as far as it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    @contextlib.asynccontextmanager
    async def asking(cls, pool: Running, path: str = "/api/inference/notes") -> AsyncIterator[SlowClient]:
        port = int(pool.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {pool.key}\r\nContent-Length: 0\r\n\r\n"
        writer.write(head.encode())
        await writer.drain()
        try:
            yield cls(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def read_to_end(self) -> bytes:
        return await soon(self.reader.read(-1))

    async def read(self, text: bytes) -> bytes:
        return await soon(self.reader.readuntil(text))


async def test_an_answer_is_relayed_from_worker_to_client(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        asking = asyncio.create_task(pool.infer(b"what is this?", headers={"Content-Type": "text/plain"}))
        task = await line.task()
        assert line.bodies[task.stream] == b"what is this?"
        assert (task.offer.method, task.offer.path) == ("POST", "/notes")
        assert dict(task.offer.headers)["content-type"] == "text/plain"
        await line.answer(task.stream, b"a ", b"test", headers=TEXT)
        answer = await soon(asking)
        assert (answer.status_code, answer.text) == (200, "a test")
        assert answer.headers["rma-worker"] == line.id
        assert answer.headers["rma-task-id"] == task.offer.task_id
        assert answer.headers["x-content-type-options"] == "nosniff"
        record = (await pool.client.get("/api/admin/tasks")).json()["tasks"][0]
        assert (record["status"], record["usage"]) == ("succeeded", {"tokens": 2.0})
        await until(lambda: pool.pool.fleet.get(line.id).completed == 1)


async def test_the_first_byte_reaches_the_client_before_the_last_is_sent(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line, SlowClient.asking(pool) as client:
        task = await line.task()
        await line.say(frames.Head(stream=task.stream, status=200, headers=TEXT))
        await line.data(task.stream, b"first")
        assert b"200" in await client.read(b"first")
        await line.data(task.stream, b"last")
        await line.say(frames.End(stream=task.stream))
        await client.read(b"last\r\n0\r\n\r\n")


async def test_the_query_goes_to_the_service_as_it_was_written(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        asking = asyncio.create_task(pool.infer(path="notes/outline?a=%C3%A4%20b&a=2&&c"))
        task = await line.serve(b"{}")
        assert task.offer.path == "/notes/outline?a=%C3%A4%20b&a=2&&c"
        assert (await soon(asking)).status_code == 200


# -- who may speak, and how ----------------------------------------------------------------------------------------


async def test_a_channel_needs_a_worker_token(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        for token in ("", "nonsense", pool.key):
            machine.token = token
            with pytest.raises(InvalidStatus) as refused:
                async with machine.channel({}):
                    pass
            assert refused.value.response.status_code == 401
            assert b"not_authenticated" in (refused.value.response.body or b"")


@pytest.mark.parametrize(
    "first",
    [
        frames.pack(frames.Accept(stream=1)),
        frames.pack(frames.Hello(worker_id="worker-00000000")),
        b"\x00\x00\x00\x01\x00\x00data",
        "not json",
        '{"type": "HELLO", "worker_id": "' + "x" * 5000 + '"}',
        "[" * 5000,
    ],
    ids=["another frame", "another worker", "data", "not json", "bad id", "deep"],
)
async def test_the_first_frame_is_hello_with_the_workers_own_id(tmp_path: Path, first: str | bytes) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        async with machine.channel({}, hello=False) as line:
            await line.ws.send(first)
            assert await line.closed() == 4400
        assert pool.pool.hub.sinks == {}


@pytest.mark.parametrize("bad", ["{}", '{"type": "HEAD", "stream": 0}', b"short", '{"type": "NEWS"}', "\x00"])
async def test_a_bad_frame_closes_only_its_own_channel(tmp_path: Path, bad: str | bytes) -> None:
    async with running(tmp_path) as pool, pool.worker() as well, pool.worker(slots=0) as ill:
        await ill.ws.send(bad)
        assert await ill.closed() == 4400
        asking = asyncio.create_task(pool.infer())
        await well.serve(b"fine")
        assert (await soon(asking)).text == "fine"


async def test_a_bug_met_with_a_frame_is_logged_and_ends_only_that_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    async with running(tmp_path) as pool, pool.worker() as well, pool.worker(slots=0) as ill:
        with monkeypatch.context() as broken:
            broken.setattr(pool.pool, "heartbeat", fails)
            await ill.say(frames.Beat(beat=Heartbeat(worker_id=ill.id)))
            assert await ill.closed() == 1000
        assert f"channel of {ill.id} reads failed" in caplog.text
        assert "KeyError: 'a bug'" in caplog.text
        asking = asyncio.create_task(pool.infer())
        await well.serve(b"fine")
        assert (await soon(asking)).text == "fine"


async def test_what_comes_behind_the_end_of_a_channel_is_not_its_workers_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        hello = frames.pack(frames.Hello(worker_id=machine.id))
        comes, takes = asyncio.Queue[dict[str, Any]](), list[Callable[[Sequence[str | bytes]], None]]()
        comes.put_nowait({"type": "websocket.receive", "bytes": None, "text": hello})
        session = Session(pool.pool, pool.pool.fleet.get(machine.id), "")
        reading = asyncio.create_task(session.read(comes.get, takes.append))
        await until(lambda: takes)
        session.end()
        takes[0](["no frame"])
        comes.put_nowait({"type": "websocket.receive", "bytes": b"none", "text": None})
        await soon(reading)
        assert session.close_code == 1000
        assert "protocol" not in caplog.text


async def test_a_second_channel_takes_the_place_of_the_first(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        async with machine.channel({"notes": 1}) as old, machine.channel({"notes": 1}) as new:
            await old.closed()
            # The end of the old connection must not take the new one with it.
            assert pool.pool.dispatcher.seats[machine.id].reachable
            asking = asyncio.create_task(pool.infer())
            await new.serve(b"from the new one")
            assert (await soon(asking)).text == "from the new one"


async def test_a_worker_that_was_disabled_is_cut_at_once_and_its_task_goes_elsewhere(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as first:
        asking = asyncio.create_task(pool.infer())
        await first.task()
        async with pool.worker() as second:
            answer = await pool.client.post(f"/api/admin/workers/{first.id}/disable")
            assert answer.json()["disabled"] is True
            await first.closed()
            await second.serve(b"by the other")
            assert (await soon(asking)).text == "by the other"
            assert (await first.machine.beat()).status_code == 401
            await pool.client.post(f"/api/admin/workers/{first.id}/enable")
            assert (await first.machine.beat()).status_code == 401, "the old token stays ended"


async def test_a_worker_that_left_can_come_back_and_is_given_work_again(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        async with machine.channel({"notes": 1}) as line:
            gone = await pool.client.delete(f"/api/worker/unregister/{machine.id}", headers=machine.headers)
            assert gone.json()["status"] == "offline"
            await line.closed()
        async with machine.channel({"notes": 1}) as line:
            asking = asyncio.create_task(pool.infer())
            await line.serve(b"back")
            assert (await soon(asking)).text == "back"


async def test_services_that_the_worker_was_not_assigned_draw_no_requests_to_it(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(services=("ner",)):
        assert (await pool.infer()).status_code == 503
        (seat,) = pool.pool.dispatcher.seats.values()
        assert seat.slots == {}


# -- flow control --------------------------------------------------------------------------------------------------


async def test_a_client_that_does_not_read_stops_the_worker_after_one_window(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line, SlowClient.asking(pool) as client:
        task = await line.task()
        await line.say(frames.Head(stream=task.stream, status=200))
        granted, sent = WINDOW, 0
        with contextlib.suppress(TimeoutError):
            # Kernel buffers take some megabytes before the client's not reading is felt.
            while sent < 64 * WINDOW:
                while sent + FRAME <= granted:
                    await line.data(task.stream, b"x" * FRAME)
                    sent += FRAME
                granted += (await line.frame(frames.Credit, within_s=1.0)).bytes
        relay = pool.pool.hub.relays[task.offer.task_id]
        assert sent < 64 * WINDOW, "nothing ever held the worker back"
        assert relay._buffered <= WINDOW
        # Another stream on the same channel goes on.
        asking = asyncio.create_task(pool.infer())
        await line.serve(b"in the meantime")
        assert (await soon(asking)).text == "in the meantime"
        # And once the client reads, the first goes on too.
        reading = asyncio.create_task(client.read_to_end())
        assert (await line.frame(frames.Credit)).bytes >= WINDOW // 4
        reading.cancel()


async def test_a_worker_that_sends_more_than_its_window_is_cut_and_blamed(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as bad:
        async with SlowClient.asking(pool):
            task = await bad.task()
            await bad.say(frames.Head(stream=task.stream, status=200))
            record = pool.pool.dispatcher.find(task.offer.task_id)
            await until(lambda: record.committed)
            for _ in range(100 * WINDOW // FRAME):
                await bad.data(task.stream, b"x" * FRAME)
            assert "without credit" in (await bad.frame(frames.Cancel)).reason
            await until(lambda: record.final)
        assert record.attempts[0].state == "failed"
        asking = asyncio.create_task(pool.infer())
        await bad.serve(b"the channel itself lives")
        assert (await soon(asking)).text == "the channel itself lives"


@pytest.mark.parametrize(
    ("frames_", "words"),
    [
        ([frames.End(stream=1)], "begins with its head"),
        ([frames.Head(stream=1, status=101)], "status is not 101"),
        ([frames.Head(stream=1, status=200), frames.Head(stream=1, status=200)], "one head"),
        ([frames.Head(stream=1, status=200, headers=(("Content-Length", "5"),)), frames.End(stream=1)], "announced 5"),
    ],
    ids=["end first", "informational", "two heads", "too short"],
)
async def test_what_cannot_be_an_answer_fails_its_attempt_alone(
    tmp_path: Path, frames_: list[frames.Head | frames.End], words: str
) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        asking = asyncio.create_task(pool.infer())
        task = await line.task()
        for frame in frames_:
            text = frames.pack(frame).replace('"stream":1', f'"stream":{task.stream}')
            await line.ws.send(text)
        with contextlib.suppress(RemoteProtocolError):
            answer = await soon(asking)
            assert answer.status_code in (200, 502)
        assert words in (await line.frame(frames.Cancel)).reason
        assert pool.pool.dispatcher.find(task.offer.task_id).attempts[0].state == "failed"


async def test_data_after_the_end_is_late_and_harms_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        asking = asyncio.create_task(pool.infer())
        task = await line.serve(b"whole")
        await line.data(task.stream, b"more")
        await line.say(frames.End(stream=task.stream))
        assert (await soon(asking)).text == "whole"
        channel = pool.pool.hub.sinks[line.id]
        assert channel.streams == {}  # type: ignore[attr-defined]


async def test_no_stream_is_left_behind_when_attempts_end(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        channel = pool.pool.hub.sinks[line.id]
        async with SlowClient.asking(pool):
            await line.task()
        await line.frame(frames.Cancel)
        asking = asyncio.create_task(pool.infer())
        task = await line.task()
        # An answer by an HTTP request of its own, whose END on the channel never comes.
        assert (await line.machine.result(task.offer, b"large")).status_code == 200
        assert (await soon(asking)).text == "large"
        asking = asyncio.create_task(pool.infer())
        task = await line.task()
        await line.say(frames.Error(stream=task.stream, fault="service", reason="broken"))
        assert (await soon(asking)).status_code == 502
        assert channel.streams == {}  # type: ignore[attr-defined]
        assert pool.pool.hub.relays == {}


async def test_a_worker_that_reads_nothing_is_cut(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        channel = pool.pool.hub.sinks[line.id]
        for _ in range(MAX_OUTBOUND + 2):
            channel.assign(pool.pool.answer(pool.pool.fleet.get(line.id), -1))  # type: ignore[attr-defined]
        assert not channel.ready
        await line.closed()


# -- when something breaks -------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_is_told_to_the_worker(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        async with SlowClient.asking(pool):
            task = await line.task()
        cancel = await line.frame(frames.Cancel)
        assert (cancel.stream, cancel.reason) == (task.stream, "the client left")
        record = pool.pool.dispatcher.find(task.offer.task_id)
        assert (record.state, record.attempts[0].state) == ("cancelled", "cancelled")


async def test_a_channel_that_breaks_before_the_answer_and_comes_back_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        async with machine.channel({"notes": 1}) as line:
            asking = asyncio.create_task(pool.infer())
            task = await line.task()
            ref = line.ref(task)
            line.ws.transport.abort()
        async with machine.channel({"notes": 1}, attempts=(ref,)) as line:
            await line.say(frames.Accept(stream=task.stream))
            await line.answer(task.stream, b"after the break")
            answer = await soon(asking)
        assert (answer.text, answer.headers["rma-attempt"]) == ("after the break", "1")


async def _half_answered(pool: Running, line: Line) -> tuple[asyncio.Task[Response], frames.Task]:
    """A task of whose answer half has come; it is small, so that nothing of it has gone to the client yet."""
    asking = asyncio.create_task(pool.infer())
    task = await line.task()
    await line.say(frames.Head(stream=task.stream, status=200, headers=(("content-length", "10"),)))
    await line.data(task.stream, b"half")
    await until(lambda: pool.pool.hub.relays[task.offer.task_id].head)
    return asking, task


async def test_a_channel_that_breaks_in_the_answer_and_forgets_it_leaves_the_task_to_another_worker(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        async with machine.channel({"notes": 1}) as line:
            asking, task = await _half_answered(pool, line)
            line.ws.transport.abort()
        async with pool.worker() as other, machine.channel({"notes": 1}):
            await other.serve(b"all of it ")
            answer = await soon(asking)
        assert (answer.text, answer.headers["rma-attempt"]) == ("all of it ", "2")
        states = [a.state for a in pool.pool.dispatcher.find(task.offer.task_id).attempts]
        assert states == ["lost", "succeeded"]


@pytest.mark.parametrize("by_request", [True, False])
async def test_a_channel_that_breaks_in_the_answer_may_bring_it_once_more_whole(
    tmp_path: Path, *, by_request: bool
) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        async with machine.channel({"notes": 1}) as line:
            asking, task = await _half_answered(pool, line)
            line.ws.transport.abort()
        async with machine.channel({"notes": 1}, attempts=(line.ref(task),)) as line:
            if by_request:
                done = await machine.result(task.offer, b"all of it")
                assert done.json() == {"status": "succeeded"}
            else:
                await line.answer(task.stream, b"all of it")
            answer = await soon(asking)
        assert (answer.text, answer.headers["rma-attempt"]) == ("all of it", "1")


async def test_a_request_that_brings_the_answer_is_not_disturbed_when_the_channel_breaks(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"a" * 100_000
        await gate.wait()
        yield b"b"

    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        async with machine.channel({"notes": 1}) as line:
            asking = asyncio.create_task(pool.infer())
            task = await line.task()
            upload = asyncio.create_task(machine.result(task.offer, slowly()))
            await until(lambda: pool.pool.hub.relays[task.offer.task_id].head)
            line.ws.transport.abort()
        async with machine.channel({"notes": 1}, attempts=(line.ref(task),)) as line:
            await line.say(frames.Progress(stream=task.stream))
            gate.set()
            assert (await soon(upload)).json() == {"status": "succeeded"}
            assert (await soon(asking)).content == b"a" * 100_000 + b"b"


async def test_a_channel_that_stays_away_loses_its_attempts_after_ten_seconds(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as other:
        machine = await pool.enrol()
        async with machine.channel({"notes": 64}) as line:
            asking = asyncio.create_task(pool.infer())
            task = await line.task()
            line.ws.transport.abort()
        await until(lambda: machine.id not in pool.pool.hub.sinks)
        pool.turn(9)
        attempt = pool.pool.dispatcher.find(task.offer.task_id).attempts[0]
        states = [attempt.state]
        pool.turn(3)
        states.append(attempt.state)
        assert states == ["running", "failed"], "it was running when its worker died"
        await other.serve(b"by the other")
        assert (await soon(asking)).text == "by the other"


async def test_the_first_worker_fails_the_second_answers_and_the_client_sees_one_answer(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as one, pool.worker() as two:
        asking = asyncio.create_task(pool.infer())
        (first, task), second = await _who(one, two)
        await first.say(frames.Head(stream=task.stream, status=200, headers=(("content-length", "3"),)))
        await first.data(task.stream, b"b")
        await first.say(frames.Error(stream=task.stream, fault="service", reason="the model crashed"))
        await second.serve(b"good")
        answer = await soon(asking)
        assert (answer.text, answer.headers["rma-worker"]) == ("good", second.id)
        record = pool.pool.dispatcher.find(task.offer.task_id)
        assert record.reasons == [f"{first.id}: the model crashed"]


async def _who(one: Line, two: Line) -> tuple[tuple[Line, frames.Task], Line]:
    """Return which of two workers was given the task, with it, and the other."""
    tasks = {asyncio.create_task(line.task()): (line, other) for line, other in ((one, two), (two, one))}
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=15)
    for task in waiting:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    (got,) = done
    line, other = tasks[got]
    return (line, got.result()), other


async def test_every_reason_is_told_when_nobody_is_left(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as one, pool.worker() as two:
        asking = asyncio.create_task(pool.infer())
        (first, task), second = await _who(one, two)
        await first.say(frames.Error(stream=task.stream, fault="service", reason="out of memory"))
        again = await second.task()
        await second.say(frames.Error(stream=again.stream, fault="owner", reason="the owner came back"))
        await until(lambda: pool.pool.dispatcher.find(task.offer.task_id).state == "queued")
        pool.pool.unregister(pool.pool.fleet.get(second.id))
        answer = await soon(asking)
        assert answer.status_code == 502
        assert answer.json()["code"] == "task_failed"
        for words in ("out of memory", "the owner came back", "no other worker offers notes"):
            assert answer.json()["detail"].count(words) == 1
        states = [a.state for a in pool.pool.dispatcher.find(task.offer.task_id).attempts]
        assert states == ["failed", "returned"], "an owner who takes the machine back is not blamed"


async def test_a_request_that_is_wrong_is_tried_once_and_said_to_be_wrong(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as one, pool.worker() as two:
        asking = asyncio.create_task(pool.infer())
        (line, task), _ = await _who(one, two)
        await line.say(frames.Error(stream=task.stream, fault="request", reason="the path has spaces"))
        answer = await soon(asking)
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


async def test_an_answer_cut_after_its_beginning_ends_in_a_broken_connection(tmp_path: Path) -> None:
    async with (
        running(tmp_path) as pool,
        pool.worker(slots=8) as line,
        pool.worker(slots=1),
        SlowClient.asking(pool) as client,
    ):
        task = await line.task()
        await line.say(frames.Head(stream=task.stream, status=200))
        await line.data(task.stream, b"a beginning")
        await client.read(b"a beginning")
        await line.say(frames.Error(stream=task.stream, fault="service", reason="crashed"))
        rest = await client.read_to_end()
        assert not rest.endswith(b"0\r\n\r\n"), "the client would take this for the whole answer"


async def test_http_libraries_see_that_an_answer_was_cut(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        asking = asyncio.create_task(pool.infer())
        task = await line.task()
        await line.say(frames.Head(stream=task.stream, status=200, headers=(("content-length", "100000"),)))
        await line.data(task.stream, b"a beginning")
        await until(lambda: pool.pool.dispatcher.find(task.offer.task_id).committed)
        await line.say(frames.Error(stream=task.stream, fault="service", reason="crashed"))
        with pytest.raises(RemoteProtocolError):
            await soon(asking)


async def test_a_task_that_is_not_accepted_goes_to_the_other_worker(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=8) as lazy, pool.worker(slots=2) as other:
        asking = asyncio.create_task(pool.infer())
        task = await lazy.task(accept=False)
        pool.turn(6)
        assert "not accepted within 5 s" in (await lazy.frame(frames.Cancel)).reason
        await other.serve(b"at once")
        assert (await soon(asking)).text == "at once"
        assert pool.pool.dispatcher.find(task.offer.task_id).attempts[0].state == "lost"
        assert pool.pool.dispatcher.seats[lazy.id].quota == {"notes": 4}


async def test_a_worker_that_stops_making_progress_loses_its_attempt(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=8) as stuck, pool.worker(slots=2) as other:
        asking = asyncio.create_task(pool.infer())
        task = await stuck.task()
        attempt = pool.pool.dispatcher.find(task.offer.task_id).attempts[0]
        await until(lambda: attempt.state == "running")
        pool.turn(LEASE_S - 5)
        until_then = attempt.lease_until
        await stuck.say(frames.Progress(stream=task.stream))
        await until(lambda: attempt.lease_until > until_then)
        pool.turn(LEASE_S - 5)
        while attempt.lease_until > pool.clock():
            assert attempt.state == "running", "progress renews the lease"
            pool.turn(1)
        pool.turn(1)
        assert attempt.reason == "no progress for 60 s"
        await other.serve(b"alive")
        assert (await soon(asking)).text == "alive"


# -- large bodies, large answers, the plain way -----------------------------------------------------------------------


async def test_a_large_body_is_read_by_http(tmp_path: Path) -> None:
    body = bytes(range(256)) * 4096
    async with running(tmp_path) as pool, pool.worker() as line:
        asking = asyncio.create_task(pool.infer(body))
        task = await line.task()
        assert task.offer.body_bytes == len(body)
        url = f"{task.offer.body_url}?attempt={task.offer.attempt}&lease_id={task.offer.lease_id}"
        both = [pool.client.get(url, headers=line.machine.headers) for _ in range(2)]
        assert [found.content == body for found in await asyncio.gather(*both)] == [True, True]
        stranger = await pool.enrol()
        assert (await pool.client.get(url, headers=stranger.headers)).status_code == 404
        await line.answer(task.stream, b"read")
        assert (await soon(asking)).text == "read"
        assert (await pool.client.get(url, headers=line.machine.headers)).status_code == 404


async def test_a_large_answer_takes_a_request_of_its_own(tmp_path: Path) -> None:
    parts = [bytes([n]) * 100_000 for n in range(30)]

    async def upload() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    async with running(tmp_path) as pool, pool.worker() as line:
        asking = asyncio.create_task(pool.infer())
        task = await line.task()
        done = await soon(line.machine.result(task.offer, upload()))
        assert (done.status_code, done.json()) == (200, {"status": "succeeded"})
        answer = await soon(asking)
        assert answer.content == b"".join(parts)
        assert answer.headers["content-type"] == "text/plain"


async def test_an_upload_that_breaks_may_still_be_explained_by_its_worker(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=8) as line, SlowClient.asking(pool):
        task = await line.task()
        record = pool.pool.dispatcher.find(task.offer.task_id)

        async def breaking() -> AsyncIterator[bytes]:
            yield b"half"
            await until(lambda: record.committed)
            raise RuntimeError("broken off")

        with pytest.raises(RuntimeError, match="broken off"):
            await line.machine.result(task.offer, breaking())
        await until(lambda: record.attempts[0].broken_at is not None)
        await line.say(frames.Error(stream=task.stream, fault="owner", reason="the owner came back"))
        await until(lambda: record.final)
        assert (record.attempts[0].state, record.attempts[0].reason) == ("returned", "the owner came back")


async def test_poll_and_post_from_end_to_end(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        assert (await machine.beat()).status_code == 200
        assert (await machine.poll(wait=0)).status_code == 204
        asking = asyncio.create_task(pool.infer(b"small"))
        offer = await machine.work()
        assert (offer.body, offer.body_bytes, offer.body_url) == (b"small", 5, None)
        assert (await machine.result(offer, b"streamed")).json() == {"status": "succeeded"}
        assert (await soon(asking)).text == "streamed"
        asking = asyncio.create_task(pool.infer(b"again"))
        offer = await machine.work()
        done = await machine.complete(offer, http_status=201, body=b"whole", usage={"pages": 2})
        assert done.json() == {"status": "succeeded"}
        answer = await soon(asking)
        assert (answer.status_code, answer.text) == (201, "whole")
        again = await machine.complete(offer, http_status=201, body=b"twice")
        assert again.json() == {"status": "succeeded"}, "the answer to the first may have been lost on its way"


async def test_a_heartbeat_that_lists_a_polled_task_accepts_it_and_keeps_its_lease(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        await machine.beat()
        asking = asyncio.create_task(pool.infer())
        offer = await machine.work()
        ref = AttemptRef(task_id=offer.task_id, attempt=offer.attempt, lease_id=offer.lease_id)
        attempt = pool.pool.dispatcher.find(offer.task_id).attempts[0]
        for _ in range(4):
            assert (await machine.beat(ref)).json().get("cancel", []) == []
            assert attempt.state == "running"
            pool.turn(30)
        await machine.complete(offer, http_status=200, body=b"slow")
        assert (await soon(asking)).text == "slow"
        assert (await machine.beat(ref)).json()["cancel"][0]["task_id"] == offer.task_id, "it has ended: drop it"


async def test_a_poll_takes_as_many_tasks_as_it_asked_for_and_the_rest_wait(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        await machine.beat(slots=8)
        asking = [asyncio.create_task(pool.infer()) for _ in range(3)]
        await until(lambda: pool.pool.dispatcher.queued == 3)
        offers = (await machine.poll(most=2)).json()["tasks"]
        assert len(offers) == 2
        (third,) = (await machine.poll(most=2)).json()["tasks"]
        assert third["attempt"] == 1, "a poll that is full costs a task nothing"
        for offer in (*offers, third):
            await machine.complete(_offer(offer), http_status=200, body=b"done")
        assert [(await soon(one)).text for one in asking] == ["done"] * 3


def _offer(data: dict[str, object]) -> TaskOffer:
    return convert(data, TaskOffer, subject="offer")


async def test_a_poll_whose_worker_vanished_gives_nothing_away(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        await machine.beat()
        polling = asyncio.create_task(machine.poll())
        await until(lambda: machine.id in pool.pool.hub.sinks)
        polling.cancel()
        await until(lambda: machine.id not in pool.pool.hub.sinks)
        asking = asyncio.create_task(pool.infer())
        offer = await machine.work()
        assert offer.attempt == 1
        await machine.complete(offer, http_status=200, body=b"here")
        assert (await soon(asking)).text == "here"


async def test_a_polled_task_that_is_not_accepted_goes_to_another_worker(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        await machine.beat(slots=8)
        asking = asyncio.create_task(pool.infer())
        offer = await machine.work()
        async with pool.worker() as other:
            pool.turn(6)
            await other.serve(b"by the other")
            assert (await soon(asking)).text == "by the other"
        late = await machine.result(offer, b"late")
        assert (late.status_code, late.json()["code"]) == (404, "not_found")


# -- what a service answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [204, 304])
async def test_answers_without_a_body_have_neither_body_nor_length(tmp_path: Path, status: int) -> None:
    async with running(tmp_path) as pool, pool.worker() as line, SlowClient.asking(pool) as client:
        task = await line.task()
        await line.answer(task.stream, status=status, headers=(("content-length", "12"), *TEXT))
        head = await client.read(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status}".encode())
        assert b"content-length" not in head.lower()
        assert b"chunked" not in head.lower()
        assert pool.pool.dispatcher.succeeded == 1


async def test_headers_of_a_service_cannot_break_the_answer_or_set_cookies(tmp_path: Path) -> None:
    headers = (
        ("Content-Type", "text/plain\r\nSet-Cookie: a=b"),
        ("Content-Disposition", 'attachment; filename="日本.pdf"'),
        ("Cache-Control", " no-store "),
        ("Retry-After", "\x00"),
        ("Set-Cookie", "a=b"),
        ("Content-Encoding", "gzip"),
    )
    async with running(tmp_path) as pool, pool.worker() as line, SlowClient.asking(pool) as client:
        task = await line.task()
        await line.answer(task.stream, b"body", headers=headers)
        answer = await client.read(b"body")
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"set-cookie" not in answer.lower()
        assert b"content-type" not in answer.lower().replace(b"x-content-type", b"")
        assert 'filename="日本.pdf"'.encode() in answer
        assert b"cache-control: no-store\r\n" in answer.lower()
        assert b"content-encoding: gzip\r\n" in answer.lower()
