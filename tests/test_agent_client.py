"""The agent's calls to its coordinator: enrolment, tokens, pinned TLS, errors; over real HTTP and real TLS."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from rma_core import http, tls
from rma_core.agent.client import CoordinatorClient
from rma_core.agent.consent import Consent
from rma_core.agent.join import enrol, invited, preview, registration
from rma_core.agent.keys import DeviceKey
from rma_core.agent.state import StateFolder
from rma_core.errors import (
    CoordinatorError,
    CoordinatorUnreachable,
    Forbidden,
    NotAuthenticated,
    NotFound,
    Refused,
    TryLater,
    UsageProblem,
)
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.models.worker import Heartbeat
from tests.agent_service import PATIENCE_S, LocalService, local_service
from tests.agent_stand_in import StandIn, offer, stand_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

REPORT = HardwareReport(capabilities=Capabilities(cpu_cores=4, ram="8.0GB"))


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for an address that is not ours: only its key counts."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("10.1.2.3"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths


@pytest.fixture
async def pool() -> AsyncIterator[StandIn]:
    async with stand_in() as found:
        yield found


@pytest.fixture
async def client(pool: StandIn) -> AsyncIterator[CoordinatorClient]:
    made = CoordinatorClient(pool.url, DeviceKey.generate())
    yield made
    await made.aclose()


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    made = StateFolder(tmp_path / "home")
    made.prepare()
    return made


async def test_joining_shows_first_asks_then_and_keeps_key_record_and_consent(
    pool: StandIn, folder: StateFolder
) -> None:
    invitation = await invited(pool.url + "/", pool.token)
    shown = await preview(invitation, registration(REPORT))
    assert (shown.tier, shown.access_token, pool.workers) == (2, "", {})
    assert list(folder.path.iterdir()) == []
    await enrol(invitation, registration(REPORT), folder, consent=Consent.to(shown.containers))
    record, key = folder.load_record(), folder.load_key()
    assert record is not None
    assert key is not None
    assert record.worker_id == f"worker-{key.thumbprint[:8]}"
    assert pool.workers == {record.worker_id: key.public_key}
    assert pool.registrations[-1].capabilities == REPORT.capabilities


async def test_a_refused_enrolment_leaves_nothing_behind(pool: StandIn, folder: StateFolder) -> None:
    invitation = await invited(pool.url, "rmaj_" + "b" * 36)
    with pytest.raises(NotAuthenticated, match="not known") as found:
        await enrol(invitation, registration(REPORT), folder, consent=Consent())
    assert found.value.hints == ("try this",)
    assert list(folder.path.iterdir()) == []


async def test_a_known_key_registers_again_without_a_join_token(pool: StandIn, client: CoordinatorClient) -> None:
    await client.register(registration(REPORT), join_token=pool.token)
    pool.join_tokens.clear()
    again = CoordinatorClient(pool.url, client.key, worker_id=client.worker_id)
    answer = await again.register(registration(REPORT))
    assert answer.worker_id == client.worker_id
    await again.aclose()


async def test_a_token_is_renewed_at_two_thirds_of_its_life_and_only_once(pool: StandIn) -> None:
    now = [0.0]
    client = CoordinatorClient(pool.url, DeviceKey.generate(), clock=lambda: now[0])
    await client.register(registration(REPORT), join_token=pool.token)
    first = await client.token()
    now[0] = 900 * 0.66
    assert await client.token() == first
    now[0] = 900 * 0.68
    pool.calls.clear()
    tokens = await asyncio.gather(*(client.token() for _ in range(10)))
    assert len(set(tokens)) == 1
    assert tokens[0] != first
    assert pool.calls.count("POST /api/worker/token") == 1
    await client.aclose()


async def test_a_refused_token_is_replaced_and_the_call_made_again(pool: StandIn, client: CoordinatorClient) -> None:
    await client.register(registration(REPORT), join_token=pool.token)
    pool.tokens.clear()
    answer = await client.heartbeat(Heartbeat(worker_id=client.worker_id))
    assert answer.heartbeat_interval_s == 30.0


async def test_the_nonce_of_a_heartbeat_saves_a_round_trip_and_a_stale_one_costs_one(
    pool: StandIn, client: CoordinatorClient
) -> None:
    await client.register(registration(REPORT), join_token=pool.token)
    client.keep_nonce(pool.make_nonce())
    pool.calls.clear()
    await client.token(stale=await client.token())
    assert pool.calls == ["POST /api/worker/token"]
    client.keep_nonce("stale")
    await client.token(stale=await client.token())
    assert pool.calls == ["POST /api/worker/token"] * 3


async def test_a_coordinator_that_has_forgotten_the_worker_is_told_apart(
    pool: StandIn, client: CoordinatorClient
) -> None:
    await client.register(registration(REPORT), join_token=pool.token)
    pool.forget()
    with pytest.raises(NotFound, match="does not know that worker"):
        await client.heartbeat(Heartbeat(worker_id=client.worker_id))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, Refused),
        (401, NotAuthenticated),
        (403, Forbidden),
        (404, NotFound),
        (409, Refused),
        (500, TryLater),
        (503, TryLater),
    ],
)
async def test_problem_documents_become_the_errors_they_mean(
    pool: StandIn, client: CoordinatorClient, status: int, kind: type[CoordinatorError]
) -> None:
    body = b'{"title": "No", "detail": "because\\u001b[31m", "hints": ["do this"]}'
    pool.fail["/api/worker/nonce"] = (status, {"Retry-After": "7"}, body)
    with pytest.raises(kind) as found:
        await client.nonce()
    assert (found.value.message, found.value.hints) == ("because [31m", ("do this",))
    if isinstance(found.value, TryLater):
        assert found.value.retry_after_s == 7


@pytest.mark.parametrize("body", [b"", b"<html>Bad Gateway</html>", b"[1]", b'{"detail": 3, "hints": 4}', b"\xff"])
async def test_an_answer_that_is_no_problem_document_is_a_sentence_too(
    pool: StandIn, client: CoordinatorClient, body: bytes
) -> None:
    pool.fail["/api/worker/nonce"] = (502, {}, body)
    with pytest.raises(TryLater):
        await client.nonce()


async def test_an_answer_of_another_program_is_an_error_with_a_hint(pool: StandIn, client: CoordinatorClient) -> None:
    pool.fail["/api/worker/nonce"] = (200, {}, b"hello")
    with pytest.raises(CoordinatorError, match="not JSON") as found:
        await client.nonce()
    assert "really an RMA coordinator" in found.value.hints[0]


async def test_an_answer_without_an_end_is_not_read_to_its_end(
    pool: StandIn, client: CoordinatorClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rma_core.agent.client.MAX_ANSWER_BYTES", 1000)
    pool.fail["/api/worker/nonce"] = (200, {}, b"x" * 2000)
    with pytest.raises(CoordinatorError, match="larger than"):
        await client.nonce()


class EndlessErrors(LocalService):
    """Says that something went wrong, and never stops saying it; or falls silent in the middle."""

    async def do_api_worker_nonce(
        self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\nRetry-After: 7\r\n\r\n")
        while True:
            writer.write(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
            await writer.drain()
            self.sent_bytes += 0x8000

    async def do_silent(self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        problem = b'{"detail": "not here"}'
        writer.write(b"HTTP/1.1 404 No\r\nTransfer-Encoding: chunked\r\n\r\n16\r\n" + problem + b"\r\n")
        await writer.drain()
        await self.go_on.wait()


@pytest.fixture
async def endless() -> AsyncIterator[LocalService]:
    async with local_service(EndlessErrors()) as service:
        yield service


async def test_an_error_without_an_end_is_read_no_further_than_a_problem_document(endless: LocalService) -> None:
    client = CoordinatorClient(endless.url, DeviceKey.generate())
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(TryLater) as found:
            await client.nonce()
    assert found.value.retry_after_s == 7
    await client.aclose()


async def test_a_streamed_answer_that_is_an_endless_error_is_closed_and_raised(endless: LocalService) -> None:
    client = http.open_client(endless.url)
    response = await client.send(client.build_request("GET", "/api/worker/nonce"), stream=True)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(TryLater):
            await http.raise_for(response)
    assert response.is_closed
    await client.aclose()


async def test_an_error_that_falls_silent_in_the_middle_is_raised_with_what_came(
    endless: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "PROBLEM_TIMEOUT_S", 0.2)
    client = http.open_client(endless.url)
    response = await client.send(client.build_request("GET", "/silent"), stream=True)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(NotFound, match="not here"):
            await http.raise_for(response)
    await client.aclose()


async def test_an_error_that_has_been_read_already_is_raised_in_its_own_words(pool: StandIn) -> None:
    pool.fail["/api/worker/nonce"] = (404, {}, b'{"detail": "not here"}')
    client = http.open_client(pool.url)
    with pytest.raises(NotFound, match="not here"):
        await http.raise_for(await client.get("/api/worker/nonce"))
    await client.aclose()


async def test_a_blocking_call_reads_an_endless_error_no_further_either(endless: LocalService) -> None:
    def call() -> bytes:
        with (
            http.open_sync_client(endless.url) as client,
            client.stream("GET", "/api/worker/nonce", timeout=PATIENCE_S) as answer,
        ):
            return http.read_problem_sync(answer)

    async with asyncio.timeout(PATIENCE_S):
        assert len(await asyncio.to_thread(call)) == http.MAX_PROBLEM_BYTES


@given(st.one_of(st.text(), st.floats().map(str), st.integers().map(str)))
def test_a_time_to_wait_is_always_one_that_can_be_waited(text: str) -> None:
    found = http.retry_after_s(text)
    assert found is None or 0 <= found <= http.MAX_RETRY_AFTER_S


async def test_nobody_there_is_unreachable() -> None:
    client = CoordinatorClient("http://127.0.0.1:9", DeviceKey.generate())
    with pytest.raises(CoordinatorUnreachable, match=r"127\.0\.0\.1:9"):
        await client.nonce()
    await client.aclose()


@pytest.mark.parametrize(
    "url",
    [
        "http://pool.example",
        "ftp://pool.example",
        "pool.example:8080",
        "https://u:p@pool.example",
        "https://",
        "http://10.0.0.1",
    ],
)
def test_an_address_that_is_none_or_would_leak_credentials_is_refused(url: str) -> None:
    with pytest.raises(UsageProblem):
        http.check_url(url)


def test_plain_http_is_for_this_machine_or_for_who_types_it() -> None:
    assert http.check_url("http://127.0.0.1:8080/") == "http://127.0.0.1:8080"
    assert http.check_url("http://localhost:8080") == "http://localhost:8080"
    assert http.check_url("http://10.0.0.1", insecure_http=True) == "http://10.0.0.1"


@pytest.mark.parametrize("text", ["", "rmac_abc", "rmaj_abc.short", "rmaj_a b", "rmaj_" + "a" * 36 + "." + "!" * 43])
def test_a_join_token_that_is_none_is_refused_before_anything_is_sent(text: str) -> None:
    with pytest.raises(UsageProblem):
        tls.split_token(text)


async def test_a_pinned_certificate_is_trusted_for_calls_whatever_name_it_has(
    tmp_path: Path, folder: StateFolder
) -> None:
    certificate = make_certificate(tmp_path, "pool")
    async with stand_in(certificate=certificate) as pool:
        pin = tls.certificate_pin(certificate[0].read_text())
        assert len(pin) == 43
        invitation = await invited(pool.url, f"{pool.token}.{pin}")
        await enrol(invitation, registration(REPORT), folder, consent=Consent())
        record = folder.load_record()
        assert record is not None
        assert record.certificate.strip() == certificate[0].read_text().strip()


async def test_a_foreign_certificate_is_refused_before_the_token_is_sent(tmp_path: Path) -> None:
    other = tls.certificate_pin(make_certificate(tmp_path, "other")[0].read_text())
    async with stand_in(certificate=make_certificate(tmp_path, "pool")) as pool:
        with pytest.raises(CoordinatorUnreachable, match="is not the one that the join token names"):
            await invited(pool.url, f"{pool.token}.{other}")
        assert pool.calls == []


async def test_a_certificate_swapped_after_the_enrolment_is_refused(tmp_path: Path) -> None:
    pinned = make_certificate(tmp_path, "pool")[0].read_text()
    async with stand_in(certificate=make_certificate(tmp_path, "other")) as pool:
        client = CoordinatorClient(pool.url, DeviceKey.generate(), context=tls.pinned_context(pinned))
        with pytest.raises(CoordinatorUnreachable, match=r"(?i)certificate"):
            await client.nonce()
        await client.aclose()
        assert pool.calls == []


async def test_an_unpinned_self_signed_certificate_is_refused(tmp_path: Path) -> None:
    async with stand_in(certificate=make_certificate(tmp_path, "pool")) as pool:
        client = CoordinatorClient(pool.url, DeviceKey.generate())
        with pytest.raises(CoordinatorUnreachable, match=r"(?i)certificate"):
            await client.nonce()
        await client.aclose()


async def test_a_tasks_body_is_fetched_from_its_coordinator_and_from_nowhere_else(
    pool: StandIn, client: CoordinatorClient
) -> None:
    await client.register(registration(REPORT), join_token=pool.token)
    task = offer(body_url="/api/worker/tasks/task-00000000000000000001/body", body_bytes=3)
    pool.bodies[task.task_id] = b"abc"
    assert b"".join([chunk async for chunk in client.body(task)]) == b"abc"
    for url in ("http://169.254.169.254/latest", "//evil.example/x", "https://evil.example/"):
        with pytest.raises(Refused, match="not the coordinator"):
            _ = [chunk async for chunk in client.body(offer(body_url=url))]
