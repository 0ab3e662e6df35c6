"""One attempt against a real HTTP service: streaming, back-pressure, deadlines, cancellation, blame."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.agent import attempts as attempts_module
from rma_core.agent.attempts import Attempts, Stop
from rma_core.agent.endpoint import Endpoint
from rma_core.agent.execute import MAX_HEADER_BYTES, passed_on
from rma_core.agent.flow import Window
from rma_core.errors import UsageProblem
from tests.agent_service import PATIENCE_S, LocalService, eventually, local_service
from tests.agent_stand_in import offer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence


class MemoryUplink:
    """Keeps what comes; takes no more than its window allows."""

    def __init__(self, window_bytes: int = 2**30) -> None:
        self.window = Window(window_bytes)
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.received = bytearray()
        self.frames = 0
        self.more: list[bool] = []
        self.failure: tuple[str, str] | None = None
        self.heard = True
        self.signs = 0
        self.came_late = False
        self.over = asyncio.Event()
        self.news = asyncio.Event()

    async def accept(self) -> None:
        pass

    async def head(
        self, status: int, headers: Sequence[tuple[str, str]], length: int | None, *, more: bool = False
    ) -> None:
        self.status, self.headers = status, dict(headers)

    async def data(self, chunk: bytes, *, more: bool = False) -> None:
        while chunk:
            count = await self.window.take(len(chunk))
            self.received += chunk[:count]
            chunk = chunk[count:]
        self.frames += 1
        self.more.append(more)
        self.news.set()

    async def progress(self) -> bool:
        self.signs += 1
        return self.heard

    def late(self) -> None:
        self.came_late = True

    async def end(self, usage: Mapping[str, float], timings: Mapping[str, float]) -> None:
        assert 0 <= timings["first_byte"] <= timings["total"]
        self.over.set()

    async def error(self, fault: str, reason: str) -> None:
        self.failure = (fault, reason)
        self.over.set()

    async def abandon(self) -> None:
        self.failure = ("", "abandoned")
        self.over.set()


class OnePlace:
    """A container that is the local service."""

    def __init__(self, client: Endpoint) -> None:
        self.client, self.owner, self.released = client, self, 0

    def release(self) -> None:
        self.released += 1


class Bench:
    """The attempts of one machine that runs one service."""

    def __init__(self, service: LocalService, client: Endpoint) -> None:
        self.service, self.place = service, OnePlace(client)
        self.attempts = Attempts(lambda _: self.place)

    def begin(self, task: Any, uplink: MemoryUplink, body: AsyncGenerator[bytes, None] | None = None) -> None:
        self.attempts.begin(task, lambda: body, uplink)

    async def run(self, task: Any, uplink: MemoryUplink | None = None, body: Any = None) -> MemoryUplink:
        uplink = uplink or MemoryUplink()
        self.begin(task, uplink, body)
        await eventually(lambda: uplink.over.is_set() and not len(self.attempts))
        assert self.place.released == 1
        return uplink


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with local_service() as service:
        client = Endpoint(service.url)
        yield Bench(service, client)
        await client.aclose()


async def pieces(*chunks: bytes) -> AsyncGenerator[bytes, None]:
    for chunk in chunks:
        yield chunk


async def test_request_and_answer_pass_through_without_the_headers_of_one_connection(bench: Bench) -> None:
    headers = (
        ("Content-Type", "a/b"),
        ("X-Own", "1"),
        ("Host", "evil"),
        ("Connection", "x-gone"),
        ("X-Gone", "1"),
        ("Authorization", "Bearer secret"),
        ("Accept-Encoding", "gzip"),
        ("Transfer-Encoding", "chunked"),
    )
    up = await bench.run(offer("/echo", method="POST", body_bytes=10, headers=headers), body=pieces(b"01234", b"56789"))
    assert (up.status, bytes(up.received), up.failure) == (200, b"0123456789", None)
    assert up.headers == {"content-type": "x/y", "content-length": "10"}
    seen = bench.service.requests[0][1]
    assert (seen["content-type"], seen["x-own"], seen["content-length"]) == ("a/b", "1", "10")
    assert seen["accept-encoding"] == "identity"
    assert seen["host"].startswith("127.0.0.1:")
    assert not {"x-gone", "authorization", "transfer-encoding", "user-agent", "connection"} & set(seen)


async def test_an_answer_goes_up_while_the_service_still_works(bench: Bench) -> None:
    up = MemoryUplink()
    bench.begin(offer("/stream"), up)
    async with asyncio.timeout(PATIENCE_S):
        while bytes(up.received) != b"0\n1\n":
            up.news.clear()
            await up.news.wait()
        bench.service.go_on.set()
        await up.over.wait()
    assert bytes(up.received) == b"0\n1\n2\n3\n4\n"


async def test_a_large_body_streams_both_ways(bench: Bench) -> None:
    async def source() -> AsyncGenerator[bytes, None]:
        for number in range(160):
            yield bytes([number]) * 65536

    up = await bench.run(offer("/echo", method="POST", body_bytes=160 * 65536), body=source())
    assert bytes(up.received) == b"".join(bytes([n]) * 65536 for n in range(160))


async def test_a_slow_reader_holds_the_service_back(bench: Bench) -> None:
    up = MemoryUplink(window_bytes=256 * 1024)
    bench.begin(offer("/flood"), up)

    async def stands_still() -> int:
        before = -1
        while before != bench.service.sent_bytes or not before:
            before = bench.service.sent_bytes
            await asyncio.sleep(0.3)
        return before

    async with asyncio.timeout(PATIENCE_S):
        stuck_at = await stands_still()
        assert len(up.received) == 256 * 1024
        up.window.give(128 * 1024)
        await eventually(lambda: len(up.received) >= 384 * 1024)
        assert await stands_still() >= stuck_at
    # The rest lies in the kernel's buffers, not in the agent: what was sent beyond the window is bounded.
    assert stuck_at < 16 * 2**20
    bench.attempts.stop(offer().lease_id, Stop("request", "enough", tell=True))
    async with asyncio.timeout(PATIENCE_S):
        await up.over.wait()


async def test_a_cancelled_attempt_lets_its_service_go_at_once(bench: Bench) -> None:
    up = MemoryUplink()
    bench.begin(offer("/wait"), up)
    await eventually(lambda: bench.service.requests)
    bench.attempts.stop(offer().lease_id, Stop("request", "the client left", tell=False))
    async with asyncio.timeout(PATIENCE_S):
        await bench.service.left.wait()
        await up.over.wait()
    assert (up.failure, len(bench.attempts)) == (("", "abandoned"), 0)


@pytest.mark.parametrize(
    ("path", "more", "fault", "reason"),
    [
        ("/wait", {"first_byte_s": 0.1}, "service", "notes did not answer within 0.1 s"),
        ("/stream", {"gap_s": 0.1}, "service", "the answer stalled for 0.1 s"),
        ("/wait", {"total_s": 0.1}, "service", "notes was not done within 0.1 s"),
        ("/breaks", {}, "service", "broke off in the middle of its answer"),
        ("@evil.example/", {}, "request", "a task's path begins with /"),
    ],
)
async def test_what_ends_an_attempt_is_blamed_exactly(
    bench: Bench, path: str, more: dict[str, Any], fault: str, reason: str
) -> None:
    up = await bench.run(offer(path, **more))
    assert up.failure is not None
    assert up.failure[0] == fault
    assert reason in up.failure[1]
    assert bench.attempts.failed == (fault == "service")


async def test_a_service_that_is_gone_is_the_services_fault() -> None:
    async with local_service() as service:
        client = Endpoint(service.url)
    up = await Bench(service, client).run(offer())
    assert up.failure is not None
    assert up.failure[0] == "service"
    assert "broke off before it answered" in up.failure[1]
    await client.aclose()


async def test_a_request_body_that_stalls_is_the_coordinators_fault(bench: Bench) -> None:
    async def stalls() -> AsyncGenerator[bytes, None]:
        yield b"x"
        await asyncio.sleep(PATIENCE_S)

    up = await bench.run(offer("/echo", method="POST", body_bytes=2, gap_s=0.1), body=stalls())
    assert up.failure == ("coordinator", "the request's body stalled for 0.1 s")


@pytest.mark.parametrize("size", [3, 5, 200_000])
async def test_a_request_body_of_another_size_than_announced_is_the_coordinators_fault(bench: Bench, size: int) -> None:
    body = pieces(b"ab", b"cd")
    up = await bench.run(offer("/echo", method="POST", body_bytes=size), body=body)
    assert up.failure == ("coordinator", f"the request's body has not the {size} bytes it should have")


async def test_it_is_announced_what_follows_at_once(bench: Bench) -> None:
    up = MemoryUplink()
    bench.begin(offer("/halves"), up)
    await eventually(lambda: bytes(up.received) == b"first")
    bench.service.go_on.set()
    await eventually(up.over.is_set)
    assert (bytes(up.received), up.more) == (b"first+half", [False, True])


async def test_a_service_that_does_not_read_its_request_is_found_out(bench: Bench) -> None:
    async def source() -> AsyncGenerator[bytes, None]:
        for _ in range(512):
            yield b"x" * 65536

    up = await bench.run(offer("/deaf", method="POST", body_bytes=512 * 65536, gap_s=0.3), body=source())
    assert up.failure is not None
    assert up.failure[0] == "service"


async def test_an_attempt_that_nobody_hears_of_ends_before_its_lease(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts_module, "LEAST_SIGN_S", 0.1)
    up = MemoryUplink()
    up.heard = False
    await bench.run(offer("/wait", lease_s=0.3), up)
    assert up.failure == ("", "abandoned")
    async with asyncio.timeout(PATIENCE_S):
        await bench.service.left.wait()


class Frozen:
    """A clock that stands still, and jumps when the machine wakes up."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_an_agent_that_was_frozen_past_its_lease_sends_nothing_more_of_an_answer(bench: Bench) -> None:
    clock, up = Frozen(), MemoryUplink()
    bench.attempts = Attempts(lambda _: bench.place, clock=clock)
    bench.begin(offer("/stream"), up)
    await eventually(lambda: bytes(up.received) == b"0\n1\n")
    clock.now += 50.0
    bench.service.go_on.set()
    await eventually(up.over.is_set)
    assert (up.failure, bytes(up.received)) == (("", "abandoned"), b"0\n1\n")


async def test_an_agent_that_wakes_up_past_its_lease_lets_the_service_go(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts_module, "LOOK_S", 0.02)
    clock, up = Frozen(), MemoryUplink()
    bench.attempts = Attempts(lambda _: bench.place, clock=clock)
    bench.begin(offer("/wait"), up)
    await eventually(lambda: bench.service.requests)
    clock.now += 3600.0
    await eventually(up.over.is_set)
    assert up.failure == ("", "abandoned")
    async with asyncio.timeout(PATIENCE_S):
        await bench.service.left.wait()


async def test_an_answer_that_is_whole_when_the_agent_wakes_up_comes_late_but_comes(bench: Bench) -> None:
    clock = Frozen()

    class Sleepy(MemoryUplink):
        async def data(self, chunk: bytes, *, more: bool = False) -> None:
            await super().data(chunk)
            clock.now += 60.0

    up = Sleepy()
    bench.attempts = Attempts(lambda _: bench.place, clock=clock)
    bench.begin(offer("/echo", method="POST", body_bytes=2), up, pieces(b"ok"))
    await eventually(lambda: up.over.is_set() and not len(bench.attempts))
    assert (up.failure, bytes(up.received), up.came_late) == (None, b"ok", True)


async def test_a_sign_counts_from_when_it_was_sent_not_from_when_it_was_answered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts_module, "LOOK_S", 0.02)
    clock = Frozen()

    class Slow(MemoryUplink):
        async def progress(self) -> bool:
            self.signs += 1
            clock.now += 45.0 * (self.signs == 1)
            return self.signs == 1

    up = Slow()
    bench.attempts = Attempts(lambda _: bench.place, clock=clock)
    bench.begin(offer("/wait"), up)
    await eventually(lambda: bench.service.requests)
    # The sign leaves after 20 s and is answered after 65 s: the attempt's end is 70 s after it began, not 115 s.
    clock.now += 20.0
    await eventually(lambda: up.signs)
    assert clock.now == 165.0
    clock.now += 5.0
    await eventually(up.over.is_set)
    assert up.failure == ("", "abandoned")


async def test_where_an_attempt_has_no_way_of_its_own_a_heartbeat_keeps_its_lease(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts_module, "LEAST_SIGN_S", 0.1)
    monkeypatch.setattr(attempts_module, "SIGNS_PER_LEASE", 30)
    monkeypatch.setattr(attempts_module, "LOOK_S", 0.05)
    up, beats = MemoryUplink(), 0
    up.heard = False

    async def beat() -> bool:
        nonlocal beats
        beats += 1
        return True

    bench.attempts = Attempts(lambda _: bench.place, beat=beat)
    bench.begin(offer("/wait", lease_s=0.3), up)
    await eventually(lambda: beats > 16)
    assert up.failure is None
    bench.service.go_on.set()
    await eventually(up.over.is_set)
    assert bytes(up.received) == b"ready"


async def test_a_sign_that_fails_unexpectedly_is_logged_and_the_lease_says_the_rest(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attempts_module, "LEAST_SIGN_S", 0.1)
    monkeypatch.setattr(attempts_module, "SIGNS_PER_LEASE", 30)
    monkeypatch.setattr(attempts_module, "LOOK_S", 0.05)

    class Broken(MemoryUplink):
        async def progress(self) -> bool:
            raise LookupError("a bug")

    up = Broken()
    await bench.run(offer("/wait", lease_s=0.3), up)
    assert up.failure == ("", "abandoned")
    assert "no sign of life could be sent" in caplog.text


async def test_a_lease_of_no_time_does_not_make_the_agent_send_signs_without_pause(bench: Bench) -> None:
    up = MemoryUplink()
    bench.begin(offer("/wait", lease_s=0), up)
    await eventually(lambda: bench.service.requests)
    for number in range(2, 12):
        other = MemoryUplink()
        bench.begin(offer("/echo", number=number), other)
        await eventually(other.over.is_set)
    assert up.signs < 10
    bench.service.go_on.set()
    await eventually(up.over.is_set)
    assert bytes(up.received) == b"ready"


async def test_a_lease_that_is_offered_twice_is_served_once_and_the_second_offer_is_answered(bench: Bench) -> None:
    first, second = MemoryUplink(), MemoryUplink()
    bench.begin(offer("/wait"), first)
    bench.begin(offer("/wait"), second)
    await eventually(second.over.is_set)
    assert second.failure == ("coordinator", "an attempt with this lease runs already")
    bench.service.go_on.set()
    await eventually(first.over.is_set)
    assert (bytes(first.received), first.failure) == (b"ready", None)


async def test_beyond_the_most_attempts_a_machine_runs_a_task_goes_back_with_the_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts_module, "MAX_ATTEMPTS", 2)
    uplinks = [MemoryUplink() for _ in range(3)]
    for number, up in enumerate(uplinks, start=1):
        bench.begin(offer("/wait", number=number), up)
    await eventually(uplinks[2].over.is_set)
    assert uplinks[2].failure == ("owner", "this machine works on 2 tasks already")
    assert len(bench.attempts) == 2
    bench.service.go_on.set()
    await eventually(lambda: not len(bench.attempts))


async def test_without_room_a_task_goes_back_and_blames_nobody(bench: Bench) -> None:
    attempts = Attempts(lambda _: "notes is busy")
    up = MemoryUplink()
    attempts.begin(offer(), lambda: None, up)
    async with asyncio.timeout(PATIENCE_S):
        await up.over.wait()
    assert up.failure == ("owner", "notes is busy")


async def test_a_later_attempt_of_the_same_task_ends_the_earlier_one(bench: Bench) -> None:
    first, second = MemoryUplink(), MemoryUplink()
    bench.begin(offer("/wait"), first)
    later = offer("/wait", number=2, task_id=offer().task_id)
    bench.begin(later, second)
    async with asyncio.timeout(PATIENCE_S):
        await first.over.wait()
        bench.service.go_on.set()
        await second.over.wait()
    assert bytes(second.received) == b"ready"


async def test_draining_finishes_what_it_can_and_gives_the_rest_back(bench: Bench) -> None:
    quick, stuck = MemoryUplink(), MemoryUplink()
    bench.begin(offer("/stream"), quick)
    bench.begin(offer("/flood", number=2), stuck)
    async with asyncio.timeout(PATIENCE_S):
        await quick.news.wait()
        bench.service.go_on.set()
        await bench.attempts.drain(1.0, Stop("owner", "the machine is wanted back", tell=True))
    assert (quick.failure, bytes(quick.received)) == (None, b"0\n1\n2\n3\n4\n")
    assert stuck.failure == ("owner", "the machine is wanted back")


async def test_a_service_behind_a_unix_socket_is_reached_too(tmp_path: Any) -> None:
    service = LocalService()
    path = tmp_path / "s"
    server = await asyncio.start_unix_server(service.serve, path)
    client = Endpoint(f"unix:{path}")
    up = await Bench(service, client).run(offer("/echo?x=1", method="POST", body_bytes=2), body=pieces(b"ok"))
    assert bytes(up.received) == b"ok"
    assert service.requests[0][0] == "/echo?x=1"
    await client.aclose()
    server.close()
    await service.close()


@pytest.mark.parametrize(
    "endpoint", ["http://10.0.0.1:80", "https://127.0.0.1", "http://evil.example", "unix:relative"]
)
def test_an_endpoint_that_is_not_on_this_machine_is_refused(endpoint: str) -> None:
    with pytest.raises(UsageProblem):
        Endpoint(endpoint)


@given(st.lists(st.tuples(st.text(st.characters(codec="ascii"), max_size=300), st.text(max_size=9000)), max_size=100))
def test_headers_that_go_on_always_fit_the_contract(headers: list[tuple[str, str]]) -> None:
    kept = passed_on(headers, frozenset({"connection"}))
    assert len(kept) <= 64
    assert sum(len(name) + len(value.encode()) for name, value in kept) <= MAX_HEADER_BYTES
    assert all(name == name.lower() for name, _ in kept)


async def test_many_small_pieces_are_gathered_when_many_attempts_run(bench: Bench) -> None:
    others = [MemoryUplink() for _ in range(4)]
    for number, other in enumerate(others, start=2):
        bench.begin(offer("/wait", number=number), other)
    up = MemoryUplink()
    bench.begin(offer("/stream"), up)
    bench.service.go_on.set()
    async with asyncio.timeout(PATIENCE_S):
        await up.over.wait()
    assert bytes(up.received) == b"0\n1\n2\n3\n4\n"
    with contextlib.suppress(TimeoutError):
        await bench.attempts.drain(0, Stop("owner", "over", tell=False))
