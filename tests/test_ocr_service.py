"""The service `ocr` over HTTP: its forms of requests, its refusals, and what one bad file costs the others."""

from __future__ import annotations

import base64
import json
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

from rma_core.catalog import load
from tests import notes_documents as documents
from tests import ocr_pages as pages
from tests.fixtures import NOTES
from tests.needs import need
from tests.notes_server import READ_S, Reply, Server, running, until
from tests.pools import runs

if TYPE_CHECKING:
    from collections.abc import Iterator

OCR = NOTES.parent / "ocr"
BOUNDARY = "a-boundary"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running("--slots", "1", module="rma_ocr") as started:
        yield started


def refused(reply: Reply, status: int, code: str) -> str:
    """Check that the reply is a problem document of this kind; returns its sentence."""
    assert (reply.status, reply.headers["content-type"]) == (status, "application/problem+json"), reply.json
    assert (reply.json["type"], reply.json["status"]) == (f"urn:rma:problem:{code}", status)
    return str(reply.json["detail"])


def told(reply: Reply) -> dict[str, Any]:
    """Return the answer without how long it took."""
    assert reply.status == 200, reply.json
    answer = {name: value for name, value in reply.json.items() if name != "timings"}
    for page in answer["pages"]:
        page.pop("seconds")
    return answer


def test_health_answers_with_what_the_service_can_read(server: Server) -> None:
    health = server.health()
    assert (health["status"], health["service"], health["slots"]) == ("ok", "ocr", 1)
    assert "image/png" in health["media_types"]
    assert {"eng", "deu", "jpn"} <= set(health["engines"]["rapidocr"]["languages"])


def test_the_file_itself_a_form_and_json_get_the_same_answer(server: Server) -> None:
    png = pages.encoded(pages.sign())
    plain = server.ocr(png, "image/png", "filename=sign.png&orientation=0&engine=rapidocr")
    fields = {"orientation": "0", "engine": "rapidocr"}
    form = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="sign.png"\r\n\r\n'.encode()
    form += png + b"\r\n"
    for name, value in fields.items():
        form += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
    by_form = server.ocr(form + f"--{BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={BOUNDARY}")
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    body = json.dumps({"file": url, "filename": "sign.png", "orientation": 0, "engine": "rapidocr"})
    by_json = server.ocr(body.encode(), "application/json")
    assert told(plain) == told(by_form) == told(by_json)
    assert pages.letters(plain.json["text"]) == "HARBOUR1871"
    assert plain.json["filename"] == "sign.png"


def test_a_file_under_a_wrong_type_is_read_as_what_it_is_with_a_warning(server: Server) -> None:
    reply = server.ocr(pages.encoded(pages.sign()), "application/pdf", "orientation=0")
    assert reply.json["media_type"] == "image/png"
    assert reply.json["warnings"] == ["sent as application/pdf, but it is image/png; it was read as that"]


def test_without_tesseract_it_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with running("--slots", "1", module="rma_ocr") as bare:
        assert set(bare.health()["engines"]) == {"rapidocr"}
        reply = bare.ocr(pages.encoded(pages.sign()), query="engine=tesseract")
        assert "rapidocr is" in refused(reply, 422, "bad_options")


def test_auto_takes_the_engine_that_knows_the_language(server: Server) -> None:
    need("tesseract")
    sign = pages.encoded(pages.sign())
    assert server.ocr(sign, query="languages=eng&orientation=0").json["engine"] == "rapidocr"
    detail = refused(server.ocr(sign, query="languages=eng+tlh"), 422, "bad_options")
    assert "rapidocr cannot read tlh; it reads" in detail
    assert "tesseract cannot read tlh; it reads" in detail


def test_options_that_do_not_fit_are_refused_together_each_by_its_name(server: Server) -> None:
    query = "engine=abbyy&languages=%2F..&orientation=45&pages=0&dpi=9999&text_layer=x&colour=red"
    reply = server.ocr(b"x", "image/png", query)
    refused(reply, 422, "bad_options")
    assert [error["name"] for error in reply.json["errors"]] == [
        "engine", "languages", "orientation", "pages", "dpi", "text_layer", "colour",
    ]  # fmt: skip
    assert "none of these" in refused(server.ocr(documents.scanned_pdf(), query="pages=9"), 422, "bad_options")


PNG = pages.encoded(pages.sign())
#: Body, its Content-Type, status and code of the refusal, and a word of its sentence.
BAD: dict[str, tuple[bytes, str, int, str, str]] = {
    "nothing": (b"", "image/png", 422, "empty_document", "empty"),
    "a text named png": (b"This is no picture.", "image/png", 422, "corrupt_document", "damaged"),
    "a text": (b"This is no picture.", "text/plain", 415, "unsupported_media_type", "PDF and PNG"),
    "an unknown kind": (bytes(range(256)), "", 415, "unsupported_media_type", "PDF and PNG"),
    "a heic": (b"\0\0\0\x18ftypheic" + bytes(64), "image/heic", 415, "unsupported_media_type", "image/heic"),
    "a png cut off": (PNG[: len(PNG) // 2], "image/png", 422, "corrupt_document", "cut off"),
    "the head of a png": (PNG[:20], "image/png", 422, "corrupt_document", "damaged"),
    "a jpeg cut off": (pages.encoded(pages.sign(), "JPEG")[:900], "", 422, "corrupt_document", "cut off"),
    "a bomb": (pages.png_header(60_000, 60_000), "image/png", 422, "too_complex", "pixels"),
    "a line": (pages.encoded(pages.sign(size=(600, 2))), "image/png", 422, "too_complex", "too few"),
    "a pdf cut off": (documents.report_pdf()[:700], "application/pdf", 422, "corrupt_document", "damaged"),
    "a locked pdf": (documents.lines_pdf([["x"]], password="p"), "", 422, "encrypted_document", "password"),
    "10,000 pages": (pages.blank_pdf(10_000), "", 422, "too_complex", "pages=1-50"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_with_what_to_do(server: Server, name: str) -> None:
    body, content_type, status, code, word = BAD[name]
    assert word in refused(server.ocr(body, content_type), status, code)
    assert server.health()["busy"] == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGSEGV, "corrupt_document"), (signal.SIGALRM, "too_complex")])
def test_a_reader_that_dies_costs_its_own_file_only(server: Server, number: signal.Signals, code: str) -> None:
    page = pages.encoded(pages.page(pages.licence()))
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(server.ocr(page)))
    thread.start()
    until(lambda: server.health()["busy"], what="it is being read")
    [reader] = server.parsers()
    reader.send_signal(number)
    thread.join(READ_S)
    refused(replies[0], 422, code)
    assert server.ocr(PNG, query="orientation=0").status == 200


def test_a_tesseract_at_work_ends_with_the_reader_that_started_it(server: Server) -> None:
    need("tesseract")
    page = pages.encoded(pages.page(pages.licence(), dpi=300))
    thread = threading.Thread(target=lambda: server.ocr(page, query="engine=tesseract&orientation=0"))
    thread.start()

    # With "tsv" it reads; without, it was only asked what it is, and ends at once.
    [started] = until(lambda: server.children("tesseract", "tsv"), what="Tesseract reads")
    [reader] = server.parsers()
    reader.kill()
    thread.join(READ_S)
    until(lambda: not runs(started), what="Tesseract is gone")


def test_the_catalog_entry_fits_the_service() -> None:
    entry = load(OCR / "catalog.toml")
    assert (entry.service, entry.routes, entry.slots, entry.health_path) == ("ocr", ("POST /ocr",), 2, "/health")
    assert entry.tiers[0] == 2
    assert entry.process is not None
    assert (entry.process.distribution, entry.process.module) == ("rma-ocr", "rma_ocr")
