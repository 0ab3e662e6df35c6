"""Requests under /v1 that are sent again: SDKs ask again by themselves, and what they asked for must not run twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from rma_coordinator.api.v1 import runs as openai_runs
from rma_core.models import channel as frames
from tests.coordinator_fixtures import Line, Running, soon, until
from tests.openai_kit import (
    CHAT,
    END,
    HELLO,
    JSON,
    REPLY,
    ROLE,
    SSE,
    USAGE,
    ask,
    attach,
    check_error,
    delta,
    event,
    events,
    pool_with,
    sdk,
    stream,
    taken,
    text_of,
)

if TYPE_CHECKING:
    from pathlib import Path

WHOLE = json.dumps(REPLY).encode()
#: What is asked for in these tests when it is a stream, byte for byte as `ask` writes it.
STREAMED = json.dumps({"model": "tiny", "messages": HELLO, "stream": True})


def tasks(pool: Running) -> list[Any]:
    """Return all tasks that there are, or were."""
    return list(pool.pool.dispatcher.all())


async def leaves(pool: Running, asked: asyncio.Task[Any]) -> None:
    """A client closes its connection, and the coordinator knows it."""
    (run,) = pool.pool.repeats
    asked.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asked
    await until(lambda: not run.clients)


class Reader:
    """A client that reads a stream piece by piece, until it is told to leave."""

    def __init__(self, pool: Running, headers: dict[str, str], content: str = STREAMED) -> None:
        self.text = ""
        self.headers: dict[str, str] = {}
        self._reading = asyncio.create_task(self._read(pool, headers, content))

    async def _read(self, pool: Running, headers: dict[str, str], content: str) -> None:
        async with pool.client.stream("POST", CHAT, content=content, headers=headers) as answer:
            self.headers = dict(answer.headers)
            async for piece in answer.aiter_text():
                self.text += piece

    async def until(self, what: str) -> str:
        """Wait until something has come, and return all that has."""
        await until(lambda: what in self.text or self._reading.done())
        assert what in self.text
        return self.text

    async def ended(self) -> str:
        """Wait for the end, and return all that came."""
        await soon(self._reading)
        return self.text

    async def leave(self, pool: Running, *, waited_s: float = 0.0) -> Any:
        """Leave when nothing has come for so long; return the run that was left."""
        (run,) = pool.pool.repeats
        pool.turn(waited_s)
        self._reading.cancel()
        await until(lambda: not run.clients)
        return run


# -- whole answers -------------------------------------------------------------------------------------------------


async def test_a_client_that_lost_its_patience_and_asks_again_gets_the_first_runs_answer(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        first = ask(pool, headers=sdk())
        given = await taken(pool, line)
        pool.turn(20)
        await leaves(pool, first)
        again = ask(pool, headers=sdk(1))
        (run,) = pool.pool.repeats
        await until(lambda: run.clients)
        await line.answer(given.stream, WHOLE, headers=JSON)
        answer = await soon(again)
        assert (answer.status_code, answer.json()["choices"]) == (200, REPLY["choices"])
        assert (answer.headers["x-rma-joined"], answer.headers["x-request-id"]) == ("1", given.offer.task_id)
        assert [task.state for task in tasks(pool)] == ["succeeded"], "it ran once, and is counted once"
        assert not list(pool.pool.repeats)


async def test_an_answer_that_came_meanwhile_waits_for_who_asks_again(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        first = ask(pool, headers=sdk())
        given = await taken(pool, line)
        pool.turn(20)
        await leaves(pool, first)
        await line.answer(given.stream, WHOLE, headers=JSON)
        await until(lambda: tasks(pool)[0].state == "succeeded")
        answer = await soon(ask(pool, headers=sdk(1)))
        assert answer.json()["choices"] == REPLY["choices"]
        assert len(tasks(pool)) == 1


async def test_who_does_not_come_back_in_time_is_waited_for_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_runs, "REPEATED_WITHIN_S", 0.05)
    async with pool_with(tmp_path) as (pool, line):
        first = ask(pool, headers=sdk())
        given = await taken(pool, line)
        pool.turn(20)
        await leaves(pool, first)
        assert (await line.frame(frames.Cancel)).stream == given.stream
        await until(lambda: not list(pool.pool.repeats) and not pool.pool.repeats.waiting)
        assert tasks(pool)[0].state == "cancelled"


@pytest.mark.parametrize(
    ("headers", "waited_s"),
    [
        (sdk(), 5.0),
        (sdk(2), 20.0),
        (sdk(patience_s=None), 20.0),
        ({"x-stainless-read-timeout": "20"}, 20.0),
        ({}, 20.0),
    ],
    ids=["early", "for the last time", "without patience", "not an SDK", "nobody known"],
)
async def test_whoever_else_leaves_ends_the_run_at_once(
    tmp_path: Path, headers: dict[str, str], waited_s: float
) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = ask(pool, headers=headers)
        given = await taken(pool, line)
        pool.turn(waited_s)
        asked.cancel()
        assert (await line.frame(frames.Cancel)).stream == given.stream
        assert not pool.pool.repeats.waiting


async def test_no_more_runs_than_a_few_go_on_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_runs, "MOST_DESERTED", 0)
    async with pool_with(tmp_path) as (pool, line):
        asked = ask(pool, headers=sdk())
        given = await taken(pool, line)
        pool.turn(20)
        asked.cancel()
        assert (await line.frame(frames.Cancel)).stream == given.stream


async def test_two_that_ask_for_the_same_get_an_answer_each_and_so_does_who_tries_again_beside_a_patient_one(
    tmp_path: Path,
) -> None:
    """Who samples one prompt many times has its failures repeated by its SDK: they are no other sample's repetition."""
    async with pool_with(tmp_path, slots=4) as (pool, line):
        asked = [ask(pool, headers=sdk()), ask(pool, headers=sdk()), ask(pool, headers=sdk(1))]
        for _ in asked:
            await line.serve(WHOLE, headers=JSON)
        answers = [await soon(one) for one in asked]
        assert len({answer.json()["id"] for answer in answers}) == 3
        assert not any("x-rma-joined" in answer.headers for answer in answers)


async def test_a_client_whose_connection_stands_although_it_gave_up_shares_the_answer_with_its_repetition(
    tmp_path: Path,
) -> None:
    """A proxy between may keep what its client has long closed."""
    async with pool_with(tmp_path) as (pool, line):
        first = ask(pool, headers=sdk())
        given = await taken(pool, line)
        pool.turn(21)
        again = ask(pool, headers=sdk(1))
        (run,) = pool.pool.repeats
        await until(lambda: len(run.clients) == 2)
        await line.answer(given.stream, WHOLE, headers=JSON)
        one, other = await soon(first), await soon(again)
        assert one.content == other.content
        assert len(tasks(pool)) == 1


async def test_the_run_ends_when_the_last_of_its_clients_has_left(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        first = ask(pool)
        given = await line.task()
        again = ask(pool, headers={"x-stainless-retry-count": "1"})
        (run,) = pool.pool.repeats
        await until(lambda: len(run.clients) == 2)
        first.cancel()
        await until(lambda: len(run.clients) == 1)
        assert tasks(pool)[0].state == "running"
        again.cancel()
        assert (await line.frame(frames.Cancel)).stream == given.stream


async def test_a_run_that_failed_is_tried_anew(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        first = ask(pool, headers=sdk())
        given = await taken(pool, line)
        pool.turn(20)
        await leaves(pool, first)
        await line.answer(given.stream, b'{"error": "out of memory"}', status=500, headers=JSON)
        await until(lambda: not list(pool.pool.repeats))
        again = ask(pool, headers=sdk(1))
        await line.serve(WHOLE, headers=JSON)
        assert (await soon(again)).status_code == 200
        assert len(tasks(pool)) == 2


async def test_another_keys_request_is_nobodys_repetition(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        first = ask(pool, headers=sdk())
        await taken(pool, line)
        pool.turn(21)
        other = pool.bearer(await pool.make_key("infer:llm"))
        again = ask(pool, headers={**sdk(1), **other})
        await line.serve(WHOLE, headers=JSON)
        assert "x-rma-joined" not in (await soon(again)).headers
        first.cancel()


# -- streams -------------------------------------------------------------------------------------------------------


async def begun(line: Line, *pieces: bytes) -> frames.Task:
    task = await line.task()
    await line.say(frames.Head(stream=task.stream, status=200, headers=SSE))
    for piece in pieces:
        await line.data(task.stream, piece)
    return task


async def ends(line: Line, task: frames.Task, *pieces: bytes) -> None:
    """Send the rest of an answer, as fast as there is credit for it."""
    owed = 0
    for piece in pieces:
        while owed + len(piece) > frames.WINDOW_BYTES:
            owed -= (await line.frame(frames.Credit)).bytes
        await line.data(task.stream, piece)
        owed += len(piece)
    await line.say(frames.End(stream=task.stream, usage={}))


async def test_a_stream_that_is_asked_for_again_comes_from_its_beginning_and_goes_on(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        first = Reader(pool, sdk())
        task = await begun(line, ROLE, delta("Hel"), delta("lo \u00e9"))
        before = events(await first.until(r"\u00e9"))
        await first.leave(pool, waited_s=20)
        again = Reader(pool, sdk(1))
        found = events(await again.until("Hello"))
        assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert text_of(found) == "Hello \u00e9"
        await ends(line, task, delta(" world"), delta(finish="stop"), END)
        found = events(await again.ended())
        assert found.pop() == "[DONE]"
        assert text_of(found) == "Hello \u00e9 world"
        assert [one["choices"][0]["finish_reason"] for one in found] == [None, None, None, "stop"]
        assert {one["id"] for one in found} == {one["id"] for one in before}
        assert (len(tasks(pool)), again.headers["x-rma-joined"]) == (1, "1")


async def test_a_stream_that_has_ended_meanwhile_is_given_whole(tmp_path: Path) -> None:
    asked = json.dumps({"model": "tiny", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}})
    async with pool_with(tmp_path) as (pool, line):
        first = Reader(pool, sdk(), asked)
        task = await begun(line, ROLE, delta("a"))
        await first.until('"a"')
        run = await first.leave(pool, waited_s=20)
        await ends(line, task, delta("b"), delta(finish="length"), USAGE, END)
        await until(lambda: run.done)
        found = events(await Reader(pool, sdk(1), asked).ended())
        assert found.pop() == "[DONE]"
        assert (text_of(found), found[-2]["choices"][0]["finish_reason"]) == ("ab", "length")
        assert found[-1]["usage"]["total_tokens"] == 5
        assert len(tasks(pool)) == 1


TOOL = delta(tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": {"name": "a", "arguments": "{"}}])


@pytest.mark.parametrize(
    "pieces",
    [[TOOL], [delta("x", reasoning_content="hm")], [delta("x" * 22_000)] * 3],
    ids=["a tool", "thoughts", "a long text"],
)
async def test_what_is_not_all_kept_cannot_be_joined_and_its_deserted_run_ends(
    tmp_path: Path, pieces: list[bytes]
) -> None:
    async with pool_with(tmp_path) as (pool, line):
        first = Reader(pool, sdk())
        task = await begun(line, ROLE, *pieces)
        await until(lambda: any(run.replay() is None for run in pool.pool.repeats))
        await first.leave(pool, waited_s=20)
        again = Reader(pool, sdk(1))
        assert (await line.frame(frames.Cancel)).stream == task.stream
        other = await line.task()
        assert other.offer.task_id != task.offer.task_id
        await line.answer(other.stream, delta("y"), delta(finish="stop"), END, headers=SSE)
        assert text_of(events(await again.ended())[:-1]) == "y"
        assert "x-rma-joined" not in again.headers


async def test_a_continued_answer_can_be_joined_too(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line), pool.worker(slots=0) as other:
        first = Reader(pool, sdk())
        await begun(line, ROLE, delta("Hel"))
        await first.until("Hel")
        await attach(pool, other, "tiny", slots=1)
        pool.pool.unregister(pool.pool.fleet.get(line.id))
        task = await begun(other, ROLE, delta("lo"))
        await first.until('"lo"')
        run = await first.leave(pool, waited_s=20)
        again = Reader(pool, sdk(1))
        await until(lambda: run.clients)
        await ends(other, task, delta(finish="stop"), END)
        found = events(await again.ended())[:-1]
        assert text_of(found) == "Hello"
        facts = found[-1]["x_rma"]
        assert (facts["worker"], facts["attempts"], facts["continued_at_token"]) == (other.id, 2, 1)


class Deaf:
    """A client that sends a request by hand and reads only when it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def asks(cls, pool: Running, headers: dict[str, str]) -> Deaf:
        host, _, port = pool.url.removeprefix("http://").partition(":")
        # With little room on its side, what it does not read waits on the coordinator's.
        ours = socket.socket()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ours.setblocking(False)
        await asyncio.get_running_loop().sock_connect(ours, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=ours, limit=1024)
        lines = [f"POST {CHAT} HTTP/1.1", "host: x", f"authorization: Bearer {pool.key}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += [f"content-length: {len(STREAMED)}", "", STREAMED]
        writer.write("\r\n".join(lines).encode())
        return cls(reader, writer)

    async def rest(self) -> bytes:
        """Read at last, to the end of the connection."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024 * 1024)
        found = await soon(self.reader.read())
        self.writer.close()
        return found


#: More than the connection between takes in, with so little text that all of that is kept.
MUCH = [event({"choices": [{"index": 0, "delta": {"content": "x"}}], "filler": "y" * 28_000})] * 200


@pytest.mark.parametrize("first_reads", [False, True], ids=["the first is slow", "the joiner is slow"])
async def test_one_that_does_not_read_is_cut_and_holds_no_other(tmp_path: Path, first_reads: bool) -> None:
    """All of it goes to the one that reads, whoever came first."""
    name = {"idempotency-key": "n"}
    async with pool_with(tmp_path) as (pool, line):
        slow = None if first_reads else await Deaf.asks(pool, name)
        good = Reader(pool, name) if first_reads else None
        task = await begun(line, ROLE, delta("a"))
        (run,) = await until(lambda: list(pool.pool.repeats))
        await until(lambda: run.stream is not None)
        slow = slow or await Deaf.asks(pool, name)
        good = good or Reader(pool, name)
        await until(lambda: len(run.clients) == 2)
        feeding = asyncio.create_task(ends(line, task, *MUCH, delta("end"), delta(finish="stop"), END))
        text = await good.ended()
        await soon(feeding)
        assert text_of(events(text)[:-1]) == "a" + "x" * len(MUCH) + "end"
        assert b"[DONE]" not in await slow.rest()
        assert len(tasks(pool)) == 1


async def test_who_joins_does_not_wait_for_one_that_does_not_read(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        slow = await Deaf.asks(pool, {})
        task = await begun(line, ROLE)
        feeding = asyncio.create_task(ends(line, task, *MUCH, delta(finish="stop"), END))
        (run,) = await until(lambda: list(pool.pool.repeats))
        await until(lambda: run._pacing)
        text = await Reader(pool, {"x-stainless-retry-count": "1"}).ended()
        await soon(feeding)
        assert text_of(events(text)[:-1]) == "x" * len(MUCH)
        assert b"[DONE]" not in await slow.rest()


async def test_a_stream_that_was_joined_when_it_had_ended_is_forgotten(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        first = Reader(pool, sdk())
        task = await begun(line, ROLE, delta("a"))
        await first.until('"a"')
        run = await first.leave(pool, waited_s=20)
        await ends(line, task, delta(finish="stop"), END)
        await until(lambda: run.done)
        await Reader(pool, sdk(1)).ended()
        await until(lambda: not list(pool.pool.repeats) and not pool.pool.repeats.waiting)


async def test_answers_that_wait_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_runs, "MOST_WAITING_BYTES", 10)
    async with pool_with(tmp_path) as (pool, line):
        first = ask(pool, headers=sdk())
        given = await taken(pool, line)
        pool.turn(20)
        await leaves(pool, first)
        await line.answer(given.stream, WHOLE, headers=JSON)
        await until(lambda: not list(pool.pool.repeats) and not pool.pool.repeats.waiting)


# -- named requests ------------------------------------------------------------------------------------------------


async def test_a_named_request_is_answered_the_same_again_and_its_name_stands_for_it_alone(tmp_path: Path) -> None:
    name = {"idempotency-key": "order-1"}
    async with pool_with(tmp_path) as (pool, line):
        first = ask(pool, headers=name)
        await line.serve(WHOLE, headers=JSON)
        one, other = await soon(first), await soon(ask(pool, headers=name))
        assert one.content == other.content
        assert (other.headers["idempotency-replayed"], "idempotency-replayed" in one.headers) == ("true", False)
        assert other.headers["x-request-id"] == one.headers["x-request-id"]
        refused = await ask(pool, headers=name, max_tokens=5)
        assert "another request" in check_error(refused, 422, "idempotency_key_reused")
        assert refused.headers["x-should-retry"] == "false"
        mine = pool.bearer(await pool.make_key("infer:llm"))
        again = ask(pool, headers={**name, **mine})
        await line.serve(WHOLE, headers=JSON)
        assert (await soon(again)).json()["id"] != one.json()["id"], "a name belongs to one key"
        for bad in ("", "a b", "x" * 256):
            check_error(await ask(pool, headers={"idempotency-key": bad}), 400, None)


async def test_a_named_stream_is_given_again_byte_for_byte_with_its_tools(tmp_path: Path) -> None:
    name = {"idempotency-key": "order-2"}
    async with pool_with(tmp_path) as (pool, line):
        first = stream(pool, headers=name)
        await line.serve(ROLE, TOOL, delta(finish="tool_calls"), END, headers=SSE)
        one = await soon(first)
        await until(lambda: not list(pool.pool.repeats))
        other = await soon(stream(pool, headers=name))
        assert one.content == other.content
        assert (other.headers["idempotency-replayed"], other.headers["content-type"]) == (
            "true",
            "text/event-stream; charset=utf-8",
        )
        assert "content-length" not in other.headers
        assert len(tasks(pool)) == 1


async def test_a_named_request_that_runs_is_joined_and_one_that_failed_runs_again(tmp_path: Path) -> None:
    name = {"idempotency-key": "order-3"}
    async with pool_with(tmp_path) as (pool, line):
        asked = [stream(pool, headers=name)]
        task = await begun(line, ROLE, TOOL)
        (run,) = pool.pool.repeats
        await until(lambda: run.stream is not None)
        asked.append(stream(pool, headers=name))
        await until(lambda: len(run.clients) == 2)
        await ends(line, task, delta(finish="tool_calls"), END)
        one, other = [(await soon(answer)).content for answer in asked]
        assert one == other
        name = {"idempotency-key": "order-4"}
        failed = ask(pool, headers=name)
        await line.serve(b'{"error": "no room"}', status=500, headers=JSON)
        check_error(await soon(failed), 502, "worker_failed")
        again = ask(pool, headers=name)
        await line.serve(WHOLE, headers=JSON)
        assert (await soon(again)).status_code == 200


async def test_a_named_request_waits_a_while_for_its_client_however_it_left(tmp_path: Path) -> None:
    name = {"idempotency-key": "order-5"}
    async with pool_with(tmp_path) as (pool, line):
        first = ask(pool, headers=name)
        given = await line.task()
        await leaves(pool, first)
        again = ask(pool, headers=name)
        (run,) = pool.pool.repeats
        await until(lambda: run.clients)
        await line.answer(given.stream, WHOLE, headers=JSON)
        assert (await soon(again)).status_code == 200
        assert len(tasks(pool)) == 1


async def test_streams_are_kept_for_their_names_while_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_runs, "MOST_RECORDED_BYTES", 600)
    async with pool_with(tmp_path) as (pool, line):
        first = stream(pool, headers={"idempotency-key": "a"})
        task = await begun(line, ROLE, TOOL)
        (run,) = pool.pool.repeats
        await until(lambda: run.stream is not None)
        assert 0 < pool.pool.repeats.recorded_bytes <= 600
        await ends(line, task, *[delta("x")] * 5, delta(finish="stop"), END)
        await soon(first)
        await until(lambda: not list(pool.pool.repeats))
        assert (pool.pool.repeats.recorded_bytes, pool.pool.repeats.kept_bytes) == (0, 0)
        other = stream(pool, headers={"idempotency-key": "a"})
        await line.serve(delta("y"), delta(finish="stop"), END, headers=SSE)
        assert text_of(events((await soon(other)).text)[:-1]) == "y", "what could not be kept is done again"
