"""The service `notes` over HTTP: its forms of requests, its refusals, and what one bad document costs the others."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from rma_core.catalog import load
from tests import notes_documents as documents
from tests.fixtures import NOTES
from tests.notes_server import PATIENCE_S, Reply, Server, answers, running, until
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PDF, DOCX = "application/pdf", "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
#: Takes a parser some seconds: enough to be caught at it.
SLOW = b"".join(
    b"Sentence number %d tells of harbour %d and quay %d. " % (n, n % 977, n % 1013) for n in range(600_000)
)
BOUNDARY = "a-boundary"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as started:
        yield started


def form(*parts: tuple[str, str, bytes]) -> bytes:
    """Return a multipart form of (name, further header text, content)."""
    pieces = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"
        for name, more, content in parts
    ]
    return b"".join(pieces) + f"--{BOUNDARY}--\r\n".encode()


def refused(reply: Reply, status: int, code: str) -> str:
    """Check that the reply is a problem document of this kind; returns its sentence."""
    assert (reply.status, reply.headers["content-type"]) == (status, "application/problem+json"), reply.json
    assert reply.json["type"] == f"urn:rma:problem:{code}"
    assert reply.json["status"] == status
    assert reply.json["title"]
    return str(reply.json["detail"])


# -- requests ----------------------------------------------------------------------------------------------------


def test_health_answers_with_what_the_service_is(server: Server) -> None:
    health = server.health()
    assert (health["status"], health["service"], health["slots"]) == ("ok", "notes", 2)
    assert PDF in health["media_types"]


def test_the_file_itself_a_form_and_json_get_the_same_answer(server: Server) -> None:
    pdf = documents.report_pdf()
    plain = server.notes(pdf, PDF, "filename=report.pdf&summary_sentences=2")
    body = form(
        ("file", '; filename="report.pdf"\r\nContent-Type: application/pdf', pdf), ("summary_sentences", "", b"2")
    )
    by_form = server.notes(body, f"multipart/form-data; boundary={BOUNDARY}")
    url = f"data:{PDF};base64,{base64.b64encode(pdf).decode()}"
    by_json = server.notes(
        json.dumps({"file": url, "filename": "report.pdf", "summary_sentences": 2}).encode(), "application/json"
    )
    assert plain.status == 200
    assert plain.json == by_form.json == by_json.json
    assert plain.json["metadata"]["filename"] == "report.pdf"


def test_a_text_as_json_is_read_as_plain_text(server: Server) -> None:
    reply = server.notes(json.dumps({"text": "The tide comes in.\n\nThe tide goes out."}).encode(), "application/json")
    assert reply.json["text"] == "The tide comes in.\n\nThe tide goes out."
    assert reply.json["metadata"]["media_type"] == "text/plain"


def test_answers_hold_every_part_unless_fewer_are_asked_for(server: Server) -> None:
    parts = {"text", "pages", "outline", "tables", "metadata", "key_phrases", "summary", "warnings"}
    assert set(server.notes(documents.report_pdf(), PDF).json) == parts
    assert set(server.notes(documents.report_pdf(), PDF, "include=outline,tables").json) == {
        "outline", "tables", "warnings",
    }  # fmt: skip


def test_the_type_comes_from_the_header_else_the_name_else_the_bytes(server: Server) -> None:
    markdown = documents.REPORT_MARKDOWN.encode()

    def told(body: bytes, content_type: str, query: str = "") -> str:
        return str(server.notes(body, content_type, query).json["metadata"]["media_type"])

    assert told(markdown, "text/markdown") == "text/markdown"
    assert told(markdown, "application/octet-stream", "filename=a.md") == "text/markdown"
    assert told(markdown, "application/x-www-form-urlencoded", "filename=a.md") == "text/markdown"
    assert told(markdown, "") == "text/plain"
    assert told(documents.report_pdf(), "") == PDF
    assert told(documents.report_docx(), "application/octet-stream") == DOCX
    assert told(documents.REPORT_HTML.encode(), "") == "text/html"


def test_a_document_sent_under_a_wrong_type_is_read_as_what_it_is_with_a_warning(server: Server) -> None:
    reply = server.notes(documents.report_pdf(), "text/html")
    assert reply.json["metadata"]["media_type"] == PDF
    assert reply.json["warnings"] == [f"sent as text/html, but it is {PDF}; it was read as that"]


def test_pages_choose_what_of_a_pdf_is_read(server: Server) -> None:
    reply = server.notes(documents.report_pdf(), PDF, "pages=2-3")
    assert [span["page"] for span in reply.json["pages"]] == [2, 3]
    assert "Trade through the port" in reply.json["text"]
    assert "Harbour tides decide" not in reply.json["text"]
    assert reply.json["metadata"]["pages"] == 3


# -- refusals ----------------------------------------------------------------------------------------------------


def test_options_that_do_not_fit_are_refused_together_each_by_its_name(server: Server) -> None:
    reply = server.notes(b"x", "text/plain", "summary_sentences=51&key_phrases=-1&pages=3-1&include=soul&colour=red")
    refused(reply, 422, "bad_options")
    assert [error["name"] for error in reply.json["errors"]] == [
        "summary_sentences", "key_phrases", "pages", "include", "colour",
    ]  # fmt: skip
    refused(server.notes(b"x", "text/plain", "pages=1&pages=2"), 422, "bad_options")
    refused(server.notes(b'{"text": "x", "key_phrases": true}', "application/json"), 422, "bad_options")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"{}", b'{"text": 1}', b'{"text": "a", "file": "b"}', b'{"file": "x.pdf"}', b"[" * 100_000,
     b'{"file": "data:application/pdf;base64,%%"}', b'{"text": "\\ud800"}', b"\xff"],
)  # fmt: skip
def test_json_that_cannot_be_read_is_refused_with_what_to_send(server: Server, body: bytes) -> None:
    refused(server.notes(body, "application/json"), 400, "bad_request")


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"x", "multipart/form-data"),
        (b"x", f"multipart/form-data; boundary={BOUNDARY}"),
        (form(("other", "", b"x")), f"multipart/form-data; boundary={BOUNDARY}"),
        (form(("file", "", b"x"), ("file", "", b"x")), f"multipart/form-data; boundary={BOUNDARY}"),
        (form(("file", "", b"x"))[:-8], f"multipart/form-data; boundary={BOUNDARY}"),
    ],
)
def test_forms_that_cannot_be_read_are_refused(server: Server, body: bytes, content_type: str) -> None:
    refused(server.notes(body, content_type), 400, "bad_request")


def test_kinds_that_are_not_read_are_refused_with_those_that_are(server: Server) -> None:
    detail = refused(reply := server.notes(b"\x89PNG\r\n\x1a\n....", "image/png"), 415, "unsupported_media_type")
    assert "ocr service" in detail
    assert PDF in reply.json["supported"]
    for body, content_type in (
        (b"\x00\x01\x02\x03" * 99, ""),
        (b"PK\x03\x04 no archive", "application/zip"),
        (b"text", "application/vnd.ms-excel"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "application/msword"),
    ):
        refused(server.notes(body, content_type), 415, "unsupported_media_type")
    packed = server.request("POST", "/notes", b"x", content_encoding="gzip")
    assert "gzip" in refused(packed, 415, "unsupported_media_type")


@pytest.mark.parametrize("content_type", [PDF, DOCX, "text/plain", "text/html", ""])
def test_an_empty_file_is_refused(server: Server, content_type: str) -> None:
    refused(server.notes(b"", content_type), 422, "empty_document")
    refused(server.notes(b" \n", content_type), 422, "empty_document")


def test_locked_documents_are_refused_with_what_to_do(server: Server) -> None:
    locked = documents.lines_pdf([["Secret"]], password="open sesame")
    assert "password" in refused(server.notes(locked, PDF), 422, "encrypted_document")
    package = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512) + "EncryptedPackage".encode("utf-16-le")
    assert "password" in refused(server.notes(package, DOCX), 422, "encrypted_document")


def test_what_only_claims_to_be_a_document_is_refused(server: Server) -> None:
    for body, content_type in (
        (b"%PDF-1.7 and nothing more", PDF),
        (b"plain words", PDF),
        (b"plain words", DOCX),
        (documents.report_pdf()[:700], PDF),
        (documents.report_docx()[:9000], DOCX),
    ):
        refused(server.notes(body, content_type), 422, "corrupt_document")


def test_a_docx_that_unpacks_to_hundreds_of_megabytes_is_not_unpacked(server: Server) -> None:
    bomb = documents.docx_bomb()
    assert len(bomb) < 1_000_000
    assert "unpacks to" in refused(server.notes(bomb, DOCX), 422, "too_complex")


def test_a_scan_is_answered_with_a_pointer_to_the_ocr_service(server: Server) -> None:
    reply = server.notes(documents.scanned_pdf(), PDF)
    assert (reply.status, reply.json["text"], reply.json["metadata"]["pages"]) == (200, "", 2)
    [warning] = reply.json["warnings"]
    assert "ocr service" in warning


def test_wrong_paths_and_methods_are_told_the_right_ones(server: Server) -> None:
    assert "/notes" in refused(server.request("GET", "/"), 404, "not_found")
    reply = server.request("GET", "/notes")
    refused(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"


def test_a_body_over_the_limit_is_refused_announced_or_not() -> None:
    with running("--max-body-bytes", "1000") as small:
        refused(small.notes(b"x" * 1001, "text/plain"), 413, "too_large")
        reply = small.request("POST", "/notes", iter([b"x" * 600] * 2), content_type="text/plain")
        refused(reply, 413, "too_large")
        assert reply.json["limit_bytes"] == 1000
        assert small.notes(b"word " * 200, "text/plain").status == 200


# -- isolation ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def asked(server: Server, body: bytes) -> Iterator[list[Reply]]:
    """Send a document that takes long, and go on while a parser is at it; the reply comes into the list."""
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(server.notes(body, "text/plain")))
    thread.start()
    until(lambda: server.health()["busy"], what="a parser reads the document")
    yield replies
    thread.join(PATIENCE_S)
    assert replies


@pytest.mark.parametrize(("number", "code"), [(signal.SIGSEGV, "corrupt_document"), (signal.SIGKILL, "too_complex")])
def test_a_parser_that_dies_costs_its_own_document_only(number: signal.Signals, code: str) -> None:
    with running("--slots", "1") as one:
        [spare] = one.parsers()
        with asked(one, SLOW) as replies:
            spare.send_signal(number)
        refused(replies[0], 422, code)
        assert one.notes(b"And then it went on.", "text/plain").json["text"] == "And then it went on."
        until(lambda: one.health()["busy"] == 0, what="no parser is left behind")


def test_a_document_that_takes_too_long_is_given_up_and_others_are_read_meanwhile() -> None:
    with running("--deadline-s", "3", "--memory-bytes", str(4_000_000_000)) as two:
        # A parser that has just been started is not counted in: the first document of each is a quick one.
        with ThreadPoolExecutor(2) as both:
            list(both.map(lambda _: two.notes(b"First.", "text/plain"), range(2)))
        with asked(two, (SLOW * 2)[:49_000_000]) as replies:
            assert two.notes(b"Meanwhile.", "text/plain").json["text"] == "Meanwhile."
            until(lambda: replies, what="the deadline ends it")
            assert "within 3 s" in refused(replies[0], 422, "too_complex")
            until(lambda: two.health()["busy"] == 0, what="its parser is gone")


def test_a_document_that_takes_too_much_memory_is_given_up() -> None:
    with running("--memory-bytes", str(300_000_000)) as small:
        refused(small.notes(SLOW, "text/plain"), 422, "too_complex")
        assert small.notes(documents.report_pdf(), PDF).status == 200


def test_requests_beyond_the_slots_wait_their_turn(server: Server) -> None:
    pdf = documents.report_pdf()
    with ThreadPoolExecutor(12) as crowd:
        replies = list(crowd.map(lambda _: server.notes(pdf, PDF), range(24)))
    assert {reply.status for reply in replies} == {200}
    assert all(reply.json == replies[0].json for reply in replies)


def test_a_client_that_leaves_frees_its_slot() -> None:
    with running("--slots", "1") as one:
        with socket.create_connection(("127.0.0.1", one.port)) as client:
            head = f"POST /notes HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: {len(SLOW)}\r\n\r\n"
            client.sendall(head.encode() + SLOW)
            until(lambda: one.health()["busy"], what="a parser reads the document")
        until(lambda: one.health()["busy"] == 0, what="it stops when the client is gone")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is dead")
def test_parsers_die_with_the_server() -> None:
    with running() as doomed, contextlib.suppress(OSError):
        parsers = doomed.parsers()
        assert len(parsers) == 2
        doomed.process.kill()
        doomed.process.wait(PATIENCE_S)
        until(lambda: not any(parser.is_running() for parser in parsers), what="no parser outlives the server")


# -- as a service ------------------------------------------------------------------------------------------------


def test_it_serves_on_a_unix_socket_and_ends_on_sigterm(tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = subprocess.Popen([sys.executable, "-m", "rma_notes", "--uds", str(path)], stderr=subprocess.DEVNULL)
    try:
        until(path.exists, what="the socket is there")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b'"status":"ok"' in b"".join(iter(lambda: client.recv(4096), b""))
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()


def test_the_port_comes_from_the_environment_too() -> None:
    port = free_port()
    command = [sys.executable, "-m", "rma_notes"]
    process = subprocess.Popen(command, env={**os.environ, "PORT": str(port)}, stderr=subprocess.DEVNULL)
    try:
        until(lambda: answers(Server(process, port)), what="it listens")
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def test_the_catalog_entry_fits_the_service() -> None:
    entry = load(NOTES / "catalog.toml")
    assert (entry.service, entry.routes, entry.slots, entry.health_path) == ("notes", ("POST /notes",), 2, "/health")
    assert entry.process is not None
    assert (entry.process.distribution, entry.process.module) == ("rma-notes", "rma_notes")
