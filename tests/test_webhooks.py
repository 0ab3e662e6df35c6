"""Webhooks: told at least once with one id, signed so that others can read it, tried for hours, given up in the end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import signal
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from rma_coordinator import webhooks
from rma_coordinator.domain.records import TaskRecord
from rma_coordinator.domain.webhooks import (
    JITTER,
    MOST_ASKED_S,
    OVERLAP_S,
    WAITS_S,
    WebhookRecord,
    WebhookSecrets,
    left_s,
    signed,
    wait_s,
)
from rma_coordinator.store import StoreFailed
from rma_core.commands.tasks import life
from rma_core.models import channel as frames
from tests.coordinator_fixtures import PATIENCE_S, running, until
from tests.coordinator_process import starting
from tests.receivers import HANG, Arrival, Authority, Receiver, receiving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.coordinator_fixtures import Running

HERE = "127.7.0.1"
ASYNC = {"Prefer": "respond-async"}
JSON_HEAD = (("content-type", "application/json"),)
DAY_S = 86_400.0


# -- by themselves -----------------------------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=200), st.lists(st.binary(min_size=24, max_size=64), min_size=1, max_size=2))
def test_a_signature_is_what_standard_webhooks_says(body: bytes, keys: list[bytes]) -> None:
    body = json.dumps({"x": base64.b64encode(body).decode()}).encode()
    headers = signed("msg_1", body, now=time.time(), keys=keys)
    for key in keys:
        assert Webhook(key).verify(body, headers) == json.loads(body)
    with pytest.raises(WebhookVerificationError):
        Webhook(b"another key").verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(keys[0]).verify(body + b" ", headers)


def test_the_published_example_comes_out_as_published() -> None:
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed("msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}', now=1614265330, keys=[secret])
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_waits_grow_differ_and_end() -> None:
    for tries, usual_s in enumerate(WAITS_S, 1):
        assert wait_s(tries, part=0.0) == pytest.approx(usual_s * (1 - JITTER))
        assert wait_s(tries, part=1.0) == pytest.approx(usual_s * (1 + JITTER))
    assert wait_s(len(WAITS_S) + 1, part=0.5) is None
    assert 17 * 3600 < sum(WAITS_S) < 18 * 3600
    assert wait_s(1, part=0.5, asked_s=100) == 100
    assert wait_s(1, part=0.5, asked_s=10**9) == MOST_ASKED_S
    assert (wait_s(7, part=0.5, asked_s=1) or 0) > 30_000, "who asks for less does not get it"


@pytest.mark.parametrize(
    ("tries", "at", "least", "most"),
    [
        (0, 0.0, 0, 0), (0, 10 * DAY_S, 0, 0), (1, 103.0, 3, 3), (1, 100.0 + DAY_S, 6, 6), (2, 0.0, 0, 0),
        (7, 100.0 + 30_000, 30_000, 30_000), (7, 100.0 + 365 * DAY_S, 43_200, 43_200), (90, 1e12, 43_200, 43_200),
    ],
)  # fmt: skip
def test_a_clock_that_was_set_back_delays_nothing(tries: int, at: float, least: float, most: float) -> None:
    record = WebhookRecord(task_id="task-1", key_id="key:1", url="", body=b"", tries=tries, at=at)
    assert least - 1e-6 <= left_s(record, 100.0) <= most + 1e-6


def test_the_former_secret_signs_for_a_day_and_one_before_it_no_longer() -> None:
    first = WebhookSecrets(key_id="abcdefgh", secrets=()).renewed(0.0)
    second = first.renewed(10.0)
    assert second.good(11.0) == [second.secrets[0].secret, first.secrets[0].secret]
    assert second.good(10.0 + OVERLAP_S) == [second.secrets[0].secret]
    third = second.renewed(12.0)
    assert third.good(12.0) == [third.secrets[0].secret, second.secrets[0].secret]
    assert third.shown.startswith("whsec_")
    assert base64.b64decode(third.shown[6:]) == third.secrets[0].secret
    assert len(third.secrets[0].secret) == 32


# -- in a coordinator --------------------------------------------------------------------------------------------------


class Hooked(NamedTuple):
    """A coordinator, a receiver that it may call, and what opens a signature."""

    pool: Running
    receiver: Receiver
    secret: str
    key: dict[str, str]

    @property
    def url(self) -> str:
        return f"https://{HERE}:{self.receiver.port}/in?x=1"

    async def submit(self, **headers: str) -> str:
        answer = await self.pool.infer(b"text", headers={**self.key, **ASYNC, "RMA-Webhook": self.url, **headers})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["task_id"])

    async def view(self, task_id: str) -> dict[str, Any]:
        found = (await self.pool.client.get(f"/api/inference/tasks/{task_id}", headers=self.key)).json()
        shown: dict[str, Any] = found["webhook"]
        return shown

    async def cancelled(self) -> str:
        """Make a task and end it at once; return its id."""
        task_id = await self.submit()
        await self.pool.client.delete(f"/api/inference/tasks/{task_id}", headers=self.key)
        return task_id

    def later(self, seconds: float) -> None:
        self.pool.clock.ahead_s += seconds
        self.pool.pool.webhooks.tick()


async def new_secret(pool: Running, key_id: str) -> dict[str, Any]:
    made = await pool.client.post(f"/api/admin/keys/{key_id}/webhook-secret")
    assert made.status_code == 201, made.text
    found: dict[str, Any] = made.json()
    return found


async def new_key(pool: Running) -> tuple[str, dict[str, str]]:
    made = (await pool.client.post("/api/admin/keys", json={"kind": "client", "scopes": ["infer:*"]})).json()
    return made["key_id"], pool.bearer(made["key"])


@contextlib.asynccontextmanager
async def hooked(tmp_path: Path, authority: Authority, *script: int | str, **more: Any) -> AsyncIterator[Hooked]:
    async with (
        receiving(*script, host=HERE, tls=authority.context(HERE)) as receiver,
        running(tmp_path, webhook_networks=["127.7.0.0/16"], **more) as pool,
    ):
        key_id, key = await new_key(pool)
        yield Hooked(pool, receiver, (await new_secret(pool, key_id))["secret"], key)


@pytest.fixture
def authority(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Authority:
    made = Authority(tmp_path_factory.mktemp("authority"))
    made.trust(monkeypatch)
    return made


def opened(secret: str, arrival: Arrival) -> dict[str, Any]:
    """Return what a webhook says, as the field's own library reads it."""
    found: dict[str, Any] = Webhook(secret).verify(arrival.body, arrival.headers)
    return found


async def arrived(receiver: Receiver, count: int = 1) -> Arrival:
    await until(lambda: len(receiver.arrivals) >= count)
    return receiver.arrivals[count - 1]


async def test_a_tasks_end_is_told_signed_once_and_without_its_answer(tmp_path: Path, authority: Authority) -> None:
    async with hooked(tmp_path, authority, public_url="https://pool.example/") as one, one.pool.worker() as line:
        task_id = await one.submit()
        assert await one.view(task_id) == {"url": one.url, "status": "waiting", "tries": 0}
        await line.serve(b'{"secret": "the answer"}', headers=JSON_HEAD)
        arrival = await arrived(one.receiver)
        told = opened(one.secret, arrival)
        assert told["type"] == "task.succeeded"
        assert {name: told["data"][name] for name in ("task_id", "service", "status", "http_status", "attempts")} == {
            "task_id": task_id, "service": "notes", "status": "succeeded", "http_status": 200, "attempts": 1,
        }  # fmt: skip
        assert told["data"]["task_url"] == f"https://pool.example/api/inference/tasks/{task_id}"
        assert told["data"]["result_url"] == f"{told['data']['task_url']}/result"
        assert told["timestamp"] == told["data"]["ended_at"]
        assert b"the answer" not in arrival.body
        assert arrival.head == "POST /in?x=1 HTTP/1.1"
        assert arrival.headers["content-type"] == "application/json"
        await until(lambda: not one.pool.pool.webhooks.waiting)
        shown = await one.view(task_id)
        assert (shown["status"], shown["tries"], shown["id"]) == ("delivered", 1, arrival.headers["webhook-id"])
        assert shown["delivered_at"]
        one.later(DAY_S / 2)
        await asyncio.sleep(0.1)
        assert len(one.receiver.arrivals) == 1


async def test_every_way_a_task_can_end_has_its_type(tmp_path: Path, authority: Authority) -> None:
    async with hooked(tmp_path, authority) as one, one.pool.worker() as line:
        await one.submit()
        await line.serve(b'{"detail": "no"}', status=422, headers=JSON_HEAD)
        refused = opened(one.secret, await arrived(one.receiver, 1))
        await one.submit()
        task = await line.task()
        await line.say(frames.Error(stream=task.stream, fault="request", reason="it makes no sense"))
        failed = opened(one.secret, await arrived(one.receiver, 2))
        await one.cancelled()
        cancelled = opened(one.secret, await arrived(one.receiver, 3))
    assert [told["type"] for told in (refused, failed, cancelled)] == ["task.failed", "task.failed", "task.cancelled"]
    assert [told["data"]["http_status"] for told in (refused, failed, cancelled)] == [422, None, None]
    assert [bool(told["data"]["result_url"]) for told in (refused, failed, cancelled)] == [True, False, False]


async def test_a_receiver_that_fails_is_asked_again_with_the_same_id_and_words(
    tmp_path: Path, authority: Authority
) -> None:
    async with hooked(tmp_path, authority, 500, 503, 200) as one:
        task_id = await one.cancelled()
        first = await arrived(one.receiver)
        await until(lambda: one.pool.pool.webhooks._heap)
        shown = await one.view(task_id)
        assert (shown["status"], shown["tries"], shown["reason"]) == ("waiting", 1, "it answered 500")
        assert shown["next_at"]
        one.later(WAITS_S[0] * (1 - JITTER) - 1)
        await asyncio.sleep(0.05)
        assert len(one.receiver.arrivals) == 1, "not before its time"
        for count in (2, 3):
            await until(lambda: one.pool.pool.webhooks._heap)
            one.later(WAITS_S[1] * 2)
            again = await arrived(one.receiver, count)
            assert (again.headers["webhook-id"], again.body) == (first.headers["webhook-id"], first.body)
            opened(one.secret, again)
        await until(lambda: not one.pool.pool.webhooks.waiting)
        shown = await one.view(task_id)
        assert (shown["status"], shown["tries"], "reason" in shown) == ("delivered", 3, False)


async def test_a_receiver_that_never_takes_it_is_given_up_and_that_is_shown(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with hooked(tmp_path, authority, 500) as one:
        task_id = await one.cancelled()
        for tries in range(1, len(WAITS_S) + 1):
            await arrived(one.receiver, tries)
            await until(lambda: one.pool.pool.webhooks._heap)
            one.later(WAITS_S[tries - 1] * (1 + JITTER) + 1)
        await arrived(one.receiver, len(WAITS_S) + 1)
        await until(lambda: not one.pool.pool.webhooks.waiting)
        shown = await one.view(task_id)
        assert (shown["status"], shown["tries"]) == ("given_up", len(WAITS_S) + 1)
        assert shown["reason"] == "it answered 500"
        assert len({arrival.headers["webhook-id"] for arrival in one.receiver.arrivals}) == 1
        told = list(life((await one.pool.client.get(f"/api/admin/tasks/{task_id}")).json()))
        assert f"its webhook to {one.url}: given up" in told[-1]
        assert "after 8 tries: it answered 500" in told[-1]
    assert any(f"the webhook of {task_id} was given up after 8 tries" in text for text in caplog.messages)


async def test_a_receiver_that_says_it_is_gone_is_not_asked_again(tmp_path: Path, authority: Authority) -> None:
    async with hooked(tmp_path, authority, 410) as one:
        task_id = await one.cancelled()
        await arrived(one.receiver)
        await until(lambda: not one.pool.pool.webhooks.waiting)
        assert (await one.view(task_id))["status"] == "given_up"


async def test_what_was_not_told_is_told_after_a_restart_with_the_same_id(tmp_path: Path, authority: Authority) -> None:
    tls = authority.context(HERE)
    async with receiving(500, 200, host=HERE, tls=tls) as receiver:
        async with running(tmp_path, webhook_networks=["127.7.0.0/16"]) as pool:
            key_id, key = await new_key(pool)
            one = Hooked(pool, receiver, (await new_secret(pool, key_id))["secret"], key)
            task_id = await one.cancelled()
            await arrived(receiver)
            await until(lambda: pool.pool.webhooks._heap)
        async with running(tmp_path, webhook_networks=["127.7.0.0/16"]) as pool:
            one = one._replace(pool=pool)
            assert pool.pool.webhooks.waiting == 1
            one.later(WAITS_S[0] * 2 + webhooks.SPREAD_S)
            again = await arrived(receiver, 2)
            opened(one.secret, again)
            await until(lambda: not pool.pool.webhooks.waiting)
            assert (await one.view(task_id))["tries"] == 2
            shown = (await pool.client.get(f"/api/admin/tasks/{task_id}")).json()
            assert (shown["status"], shown["webhook"]["status"]) == ("cancelled", "delivered"), "as long as it is kept"
        async with running(tmp_path, webhook_networks=["127.7.0.0/16"]) as pool:
            assert pool.pool.webhooks.waiting == 0
    assert len({arrival.headers["webhook-id"] for arrival in receiver.arrivals}) == 1


async def test_a_coordinator_that_is_killed_while_it_tells_tells_it_again(tmp_path: Path, authority: Authority) -> None:
    told = {"webhook_networks": "127.7.0.0/16"}
    async with receiving(HANG, 200, host=HERE, tls=authority.context(HERE)) as receiver:
        with starting(tmp_path / "home", **told) as made:
            made.ready()
            async with made.client() as client:
                key_id = (await client.get("/api/admin/keys")).json()["keys"][0]["key_id"]
                secret = (await client.post(f"/api/admin/keys/{key_id}/webhook-secret")).json()["secret"]
                url = f"https://{HERE}:{receiver.port}/"
                answer = await client.post("/api/inference/notes", content=b"x", headers={**ASYNC, "RMA-Webhook": url})
                assert answer.status_code == 202, answer.text
                assert (await client.delete(answer.headers["location"])).json()["status"] == "cancelled"
            first = await arrived(receiver)
            made.said.process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(made.said.process.wait)
        with starting(tmp_path / "home", **told) as made:
            made.ready()
            second = await arrived(receiver, 2)
            async with made.client() as client, asyncio.timeout(PATIENCE_S):
                shown = {"status": "waiting"}
                while shown["status"] == "waiting":
                    shown = (await client.get(answer.headers["location"])).json()["webhook"]
    assert (first.headers["webhook-id"], first.body) == (second.headers["webhook-id"], second.body)
    assert opened(secret, second)["data"]["task_id"] == answer.json()["task_id"]
    assert shown["status"] == "delivered"


async def test_the_end_and_what_is_to_be_told_of_it_are_one_commit(tmp_path: Path, authority: Authority) -> None:
    async with hooked(tmp_path, authority, HANG) as one:
        commits: list[set[str]] = []
        real = one.pool.pool.store.commit

        async def commit(changes: Any, *, urgent: bool = False) -> None:
            kept = list(changes)
            commits.append({type(change.record).__name__ for change in kept if hasattr(change, "record")})
            await real(kept, urgent=urgent)

        one.pool.pool.store.commit = commit  # type: ignore[method-assign]
        await one.cancelled()
        await arrived(one.receiver)
    assert {"TaskRecord", "WebhookRecord"} in commits


async def test_a_new_secret_and_the_former_one_both_open_what_comes_for_a_day(
    tmp_path: Path, authority: Authority
) -> None:
    async with hooked(tmp_path, authority) as one:
        (key_id,) = [key.key_id for key in one.pool.pool.keyring.all_keys() if key.kind == "client"]
        made = await new_secret(one.pool, key_id)
        assert made["former_until"]
        assert made["secret"] != one.secret
        await one.cancelled()
        arrival = await arrived(one.receiver)
        assert arrival.headers["webhook-signature"].count("v1,") == 2
        assert opened(one.secret, arrival) == opened(made["secret"], arrival)
        last = await new_secret(one.pool, key_id)
        await one.cancelled()
        arrival = await arrived(one.receiver, 2)
        opened(last["secret"], arrival)
        opened(made["secret"], arrival)
        with pytest.raises(WebhookVerificationError):
            opened(one.secret, arrival)
        keys = (await one.pool.client.get("/api/admin/keys")).json()["keys"]
        assert {key["key_id"]: key["webhook_secret"] for key in keys}[key_id] is True
        assert made["secret"] not in json.dumps(keys)


async def test_secrets_are_made_for_keys_that_are_there_and_by_who_may(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        key_id, key = await new_key(pool)
        path = f"/api/admin/keys/{key_id}/webhook-secret"
        assert (await pool.client.post(path, headers=key)).status_code == 403
        reader = pool.bearer(await pool.make_key("admin:read", kind="admin"))
        assert (await pool.client.post(path, headers=reader)).status_code == 403
        await pool.client.delete(f"/api/admin/keys/{key_id}")
        gone = await pool.client.post(path)
        assert (gone.status_code, gone.json()["code"]) == (409, "refused")
        made = await asyncio.gather(*[_secret_of_first(pool) for _ in range(3)])
        first = next(one for one in pool.pool.keyring.all_keys() if one.kind == "admin")
        now = {base64.b64encode(one).decode() for one in pool.pool.keyring.webhook_secrets(first.key_id)}
        assert len(now & {one["secret"].removeprefix("whsec_") for one in made}) == 2


async def _secret_of_first(pool: Running) -> dict[str, Any]:
    first = next(one for one in pool.pool.keyring.all_keys() if one.kind == "admin")
    return await new_secret(pool, first.key_id)


# -- at the door -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://hooks.example/", "begins with https"),
        ("https://user:word@hooks.example/", "no credentials"),
        ("https://hooks.example/" + "x" * 2100, "2048"),
        ("", "host"),
        ("https://", "host"),
        ("https://h\xe4.example/", "ASCII"),
    ],
)
async def test_an_address_that_cannot_be_one_is_refused_at_once(tmp_path: Path, url: str, words: str) -> None:
    async with running(tmp_path) as pool:
        headers = [
            *((name.encode(), value.encode()) for name, value in ASYNC.items()),
            (b"RMA-Webhook", url.encode("latin-1")),
        ]
        answer = await pool.infer(b"x", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (400, "header")
        assert words in answer.json()["detail"]


async def test_a_webhook_needs_a_secret_and_a_client_that_does_not_wait(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        key_id, key = await new_key(pool)
        hook = {"RMA-Webhook": "https://hooks.example/"}
        answer = await pool.infer(b"x", headers={**key, **ASYNC, **hook})
        assert (answer.status_code, answer.json()["code"]) == (400, "header")
        assert f"rma keys webhook-secret {key_id}" in answer.json()["hints"][0]
        await new_secret(pool, key_id)
        for more in ({}, {"Idempotency-Key": "k"}):
            answer = await pool.infer(b"x", headers={**key, **hook, **more})
            assert "respond-async" in answer.json()["detail"]
        assert pool.pool.dispatcher.queued == 0


async def test_an_address_inside_is_taken_for_what_it_is_only_when_it_is_called_and_the_client_learns_nothing(
    tmp_path: Path, authority: Authority
) -> None:
    async with receiving(host="127.8.0.1") as inside, hooked(tmp_path, authority) as one:
        url = f"https://127.8.0.1:{inside.port}/"
        for name in (url, "https://no-such-name.invalid/"):
            answer = await one.pool.infer(b"x", headers={**one.key, **ASYNC, "RMA-Webhook": name})
            task_id = answer.json()["task_id"]
            await one.pool.client.delete(answer.headers["location"])
            await until(lambda: one.pool.pool.webhooks._heap)
            shown = await one.view(task_id)
            assert shown["reason"] == "its name leads to no public address"
            one.pool.pool.webhooks._heap.clear()
        assert inside.connections == 0


async def test_the_same_request_under_its_key_has_one_webhook_and_another_address_is_another_request(
    tmp_path: Path, authority: Authority
) -> None:
    async with hooked(tmp_path, authority) as one:
        first, again = [await one.submit(**{"Idempotency-Key": "k"}) for _ in range(2)]
        assert first == again
        other = {**one.key, **ASYNC, "RMA-Webhook": one.url + "2", "Idempotency-Key": "k"}
        assert (await one.pool.infer(b"text", headers=other)).status_code == 409
        await one.pool.client.delete(f"/api/inference/tasks/{first}", headers=one.key)
        await until(lambda: not one.pool.pool.webhooks.waiting)
        assert len(one.receiver.arrivals) == 1


# -- many of them ------------------------------------------------------------------------------------------------------


async def test_a_receiver_that_hangs_holds_up_nobody_elses(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "AT_ONCE", 6)
    async with hooked(tmp_path, authority, HANG) as one, receiving(host=HERE, tls=authority.context(HERE)) as well:
        key_id, key = await new_key(one.pool)
        two = Hooked(one.pool, well, (await new_secret(one.pool, key_id))["secret"], key)
        for _ in range(12):
            await one.cancelled()
        await until(lambda: len(one.receiver.arrivals) == webhooks.AT_ONCE_PER_KEY)
        for count in range(1, 6):
            await two.cancelled()
            opened(two.secret, await arrived(well, count))
        assert len(one.receiver.arrivals) == webhooks.AT_ONCE_PER_KEY
        await one.receiver.close()
        one.receiver.script = (200,)
        await until(lambda: len(one.receiver.arrivals) >= 12)


async def test_a_call_that_fails_in_a_way_nobody_foresaw_is_made_again(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async with hooked(tmp_path, authority) as one:
        pool = one.pool.pool
        real = pool.webhooks.send

        async def broken(url: str, headers: dict[str, str], body: bytes) -> Any:
            raise ZeroDivisionError

        pool.webhooks.send = broken
        task_id = await one.cancelled()
        await until(lambda: pool.webhooks._heap)
        assert (await one.view(task_id))["reason"] == "the coordinator could not make the call"
        pool.webhooks.send = real
        one.later(WAITS_S[0] * 2)
        await arrived(one.receiver)
    assert "could not be sent" in caplog.text


async def test_only_so_many_webhooks_may_wait(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "MOST_WAITING", 1)
    async with hooked(tmp_path, authority, HANG) as one:
        await one.cancelled()
        answer = await one.pool.infer(b"x", headers={**one.key, **ASYNC, "RMA-Webhook": one.url})
        assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
        assert answer.headers["retry-after"]
        assert (await one.pool.client.get("/api/admin/stats")).json()["webhooks"] == {"waiting": 1}


async def test_a_webhook_outlives_its_task_and_leaves_nothing_behind(tmp_path: Path, authority: Authority) -> None:
    async with hooked(tmp_path, authority, 500, 200, kept_tasks=1) as one:
        pool = one.pool.pool
        first = await one.cancelled()
        await arrived(one.receiver)
        await until(lambda: pool.webhooks._heap)
        second = await one.cancelled()
        await arrived(one.receiver, 2)
        await until(lambda: first not in pool.books._kept)
        kept = {record.task_id for record in await pool.store.load(WebhookRecord)}
        assert kept == {first, second}
        one.later(WAITS_S[0] * 2)
        assert (await arrived(one.receiver, 3)).headers["webhook-id"] == f"msg_{first.removeprefix('task-')}"
        await until(lambda: not pool.webhooks.waiting)
        assert {record.task_id for record in await pool.store.load(WebhookRecord)} == {second}
        await one.cancelled()
        await until(lambda: second not in pool.books._kept)
        assert second not in {record.task_id for record in await pool.store.load(WebhookRecord)}
        assert second not in {record.task_id for record in await pool.store.load(TaskRecord)}


async def test_a_disk_that_does_not_take_what_became_of_it_costs_one_more_at_most_and_no_endless_tries(
    tmp_path: Path, authority: Authority
) -> None:
    async with hooked(tmp_path, authority, 500, 500, 200) as one:
        pool = one.pool.pool
        real, failing = pool.store.commit, True

        async def commit(changes: Any, *, urgent: bool = False) -> None:
            kept = list(changes)
            records = [change.record for change in kept if hasattr(change, "record")]
            if failing and len(records) == 1 and isinstance(records[0], WebhookRecord):
                raise StoreFailed("the disk does not answer")
            await real(kept, urgent=urgent)

        pool.store.commit = commit  # type: ignore[method-assign]
        await one.cancelled()
        for count in (2, 3):
            await until(lambda: pool.webhooks._heap)
            assert pool.webhooks._heap[0].tries == count - 1
            one.later(WAITS_S[1] * 2)
            await arrived(one.receiver, count)
        assert pool.webhooks.waiting == 1, "it was taken, and that is not written"
        failing = False
        await until(lambda: not pool.webhooks.waiting)
        assert len(one.receiver.arrivals) == 3
