"""What the service `notes` makes of documents, their text, outline, tables, phrases; and that none breaks it."""

from __future__ import annotations

import io
import shutil
import subprocess
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rma_notes import child
from rma_notes.cleaning import clean_line, join_lines
from rma_notes.language import detect
from rma_notes.readers.pdf import pdf_date
from rma_notes.summary import sentences_of
from rma_service.child import Job, answer
from tests import notes_documents as documents
from tests.notes_server import Server, running

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

PDF, DOCX = "application/pdf", "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as started:
        yield started


def notes(server: Server, body: bytes, content_type: str, query: str = "") -> Any:
    reply = server.notes(body, content_type, query)
    assert reply.status == 200, reply.json
    return reply.json


# -- PDF ---------------------------------------------------------------------------------------------------------


def test_a_pdf_becomes_clean_text_without_running_heads_and_page_numbers(server: Server) -> None:
    text = notes(server, documents.report_pdf(), PDF)["text"]
    for paragraph in documents.PARAGRAPHS:
        assert paragraph in text
    assert "Annual report of the harbour board" not in text
    assert "of 3" not in text


def test_a_pdfs_outline_is_its_own_with_levels_and_pages(server: Server) -> None:
    outline = notes(server, documents.report_pdf(), PDF)["outline"]
    assert [(entry["level"], entry["title"], entry["page"]) for entry in outline] == [
        (1, "1. Tides", 1), (1, "2. Trade", 2), (2, "2.1. Cargo by kind", 2), (1, "3. Storms", 3),
    ]  # fmt: skip


def test_without_an_outline_headings_are_found_by_their_size(server: Server) -> None:
    import pypdfium2  # type: ignore[import-untyped]  # it ships no annotations

    source = pypdfium2.PdfDocument(documents.report_pdf())
    bare = pypdfium2.PdfDocument.new()
    bare.import_pages(source)
    out = io.BytesIO()
    bare.save(out)
    answer = notes(server, out.getvalue(), PDF)
    assert [(entry["level"], entry["title"], entry["page"]) for entry in answer["outline"]] == [
        (1, "1. Tides", 1), (1, "2. Trade", 2), (2, "2.1. Cargo by kind", 2), (1, "3. Storms", 3),
    ]  # fmt: skip
    assert answer["metadata"]["title"] == documents.TITLE


@pytest.mark.parametrize("style", ["grid", "rules"])
def test_a_pdfs_tables_are_rows_of_cells_with_all_lines_or_with_rules_only(server: Server, style: str) -> None:
    answer = notes(server, documents.report_pdf(table_style=style), PDF)
    assert answer["tables"] == [{"page": 2, "rows": documents.CARGO}]
    assert "Timber | 120 | 48,000\nGrain | 85 | 61,500" in answer["text"]


def test_a_pdfs_metadata_is_told(server: Server) -> None:
    metadata = notes(server, documents.report_pdf(), PDF, "filename=report.pdf")["metadata"]
    told = {key: metadata[key] for key in ("title", "author", "subject", "keywords", "pages", "language", "filename")}
    assert told == {
        "title": documents.TITLE, "author": "Ada Mason", "subject": "Tides", "keywords": ["tides", "trade"],
        "pages": 3, "language": "en", "filename": "report.pdf",
    }  # fmt: skip
    assert metadata["created"][:4] > "2000"
    assert metadata["bytes"] == len(documents.report_pdf())


def test_page_spans_say_where_each_pages_text_is(server: Server) -> None:
    answer = notes(server, documents.report_pdf(), PDF)
    for span, paragraph in zip(answer["pages"], documents.PARAGRAPHS, strict=True):
        assert paragraph in answer["text"][span["start"] : span["end"]]
    assert answer["metadata"]["characters"] == len(answer["text"])


def test_columns_are_read_one_after_the_other(server: Server) -> None:
    text = notes(server, documents.columns_pdf(), PDF)["text"]
    places = [text.index(f"Paragraph {n} {word}s here.") for n in range(1, 25) for word in ("begin", "end")]
    assert places == sorted(places)
    assert text.startswith("A Title Across Both Columns")
    assert all(f"word{n}x{i} alongside others" in text for n in range(1, 25) for i in range(12))


def test_words_cut_at_the_end_of_a_line_are_joined_and_compounds_keep_their_hyphen(server: Server) -> None:
    lines = ["The har-", "bour is open. A well-known pilot works there; he is well-", "known for his pa-", "tience."]
    text = notes(server, documents.lines_pdf([lines]), PDF)["text"]
    assert text == "The harbour is open. A well-known pilot works there; he is well-known for his patience."


def test_paragraphs_go_on_over_a_page_break(server: Server) -> None:
    pages = [["A sentence that begins on one page and goes"], ["on upon the next one is one sentence."]]
    text = notes(server, documents.lines_pdf(pages), PDF)["text"]
    assert text == "A sentence that begins on one page and goes on upon the next one is one sentence."


@pytest.mark.skipif(not shutil.which("pdftotext"), reason="pdftotext is not installed (Debian: poppler-utils)")
def test_no_word_is_lost_compared_with_another_reader(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "columns.pdf"
    path.write_bytes(documents.columns_pdf())
    other = subprocess.run(["pdftotext", str(path), "-"], capture_output=True, text=True, timeout=60, check=True)
    assert sorted(notes(server, path.read_bytes(), PDF)["text"].split()) == sorted(other.stdout.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("D:20240131120000+01'00'", "2024-01-31T12:00:00+01:00"),
        ("D:20240131120000Z", "2024-01-31T12:00:00Z"),
        ("D:202401", "2024-01"),
        ("yesterday", None),
    ],
)
def test_pdf_dates_become_rfc_3339(text: str, expected: str | None) -> None:
    assert pdf_date(text) == expected


# -- DOCX, HTML, Markdown, text ----------------------------------------------------------------------------------


def test_a_docx_keeps_its_order_headings_lists_and_tables(server: Server) -> None:
    answer = notes(server, documents.report_docx(), DOCX)
    assert [(entry["level"], entry["title"]) for entry in answer["outline"]] == [
        (1, documents.TITLE), (1, "Tides"), (1, "Trade"), (1, "Storms"), (2, "Cargo by kind"),
    ]  # fmt: skip
    assert answer["tables"] == [{"page": None, "rows": [*documents.CARGO, ["All but coal", "", "109,500"]]}]
    text = answer["text"]
    places = [text.index(piece) for piece in (*documents.PARAGRAPHS, "• Timber first\n• Grain second", "Coal | 12")]
    assert places == sorted(places)
    assert (answer["metadata"]["title"], answer["metadata"]["author"]) == (documents.TITLE, "Ada Mason")


def test_html_gives_its_main_text_without_what_stands_around_it(server: Server) -> None:
    answer = notes(server, documents.REPORT_HTML.encode(), "text/html")
    text = answer["text"]
    for paragraph in documents.PARAGRAPHS:
        assert paragraph in text
    for noise in ("script text", "color", "Home", "cookies", "Imprint", "Related", "Nobody", "¶"):
        assert noise not in text
    assert "3. Timber\n4. Grain\n• Wheat" in text
    assert "if tide > 4:\n    enter()" in text
    assert [(e["level"], e["title"]) for e in answer["outline"]] == [
        (1, documents.TITLE), (2, "Trade"), (2, "Storms"),
    ]  # fmt: skip
    assert answer["tables"][0]["rows"] == [
        ["Cargo and ships", "", "Tonnes"], ["Dry", "120", "48,000"], ["", "85", "61,500"],
    ]  # fmt: skip
    assert (answer["metadata"]["author"], answer["metadata"]["created"]) == ("Ada Mason", "2024-05-06T07:08:09Z")


def test_markdown_is_read_with_its_front_matter_lists_and_tables(server: Server) -> None:
    answer = notes(server, documents.REPORT_MARKDOWN.encode(), "text/markdown")
    assert [(e["level"], e["title"]) for e in answer["outline"]] == [
        (1, "Tides"), (2, "Trade and quays"), (1, "Storms"),
    ]  # fmt: skip
    assert answer["tables"] == [{"page": None, "rows": [["Cargo", "Ships"], ["Grain", "85"]]}]
    assert "• Timber\n• Grain\n1. Wheat\n2. Rye" in answer["text"]
    assert "def enter(): ..." in answer["text"]
    assert "Markup inside" in answer["text"]
    facts = answer["metadata"]
    assert (facts["title"], facts["author"], facts["created"]) == (documents.TITLE, "Ada Mason", "2024-05-06")


def test_plain_text_is_unwrapped_and_its_headings_are_found(server: Server) -> None:
    lines = "\n\n".join(documents.PARAGRAPHS).replace(" the ", "\nthe ")
    body = f"Harbour\n=======\n\n1. Tides of it\n\n{lines}\n\nLAST WORDS\n\n- one\n- two\n  more"
    answer = notes(server, body.encode(), "text/plain")
    assert [(e["level"], e["title"]) for e in answer["outline"]] == [
        (1, "Harbour"), (1, "1. Tides of it"), (1, "LAST WORDS"),
    ]  # fmt: skip
    assert answer["text"].endswith("- one\n- two more")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_text_in_any_usual_encoding_is_read(server: Server, encoding: str) -> None:
    german = "Die Flöße fahren über die Brücke am Fluß, und die Schüler grüßen höflich dafür. " * 4
    answer = notes(server, german.encode(encoding), "text/plain")
    assert "Flöße fahren über die Brücke" in answer["text"]
    assert answer["metadata"]["language"] == "de"


def test_the_charset_that_is_sent_is_believed(server: Server) -> None:
    assert notes(server, "Привет, мир".encode("koi8-r"), "text/plain; charset=koi8-r")["text"] == "Привет, мир"


# -- phrases and summaries ---------------------------------------------------------------------------------------


def test_key_phrases_name_the_topic_in_words_of_the_document(server: Server) -> None:
    phrases = notes(server, documents.report_pdf(), PDF)["key_phrases"]
    best = [phrase["phrase"].lower() for phrase in phrases[:6]]
    assert {"tide tables", "harbour board"} <= set(best)
    scores = [phrase["score"] for phrase in phrases]
    assert scores[0] == 1.0
    assert scores == sorted(scores, reverse=True)


def test_a_summary_is_sentences_of_the_document_in_its_order(server: Server) -> None:
    answer = notes(server, documents.report_docx(), DOCX, "summary_sentences=3")
    sentences = answer["summary"]["sentences"]
    assert len(sentences) == 3
    places = [answer["text"].index(sentence) for sentence in sentences]
    assert places == sorted(places)
    assert answer["summary"]["text"] == " ".join(sentences)


def test_none_is_wanted_none_is_given(server: Server) -> None:
    answer = notes(server, documents.report_docx(), DOCX, "summary_sentences=0&key_phrases=0")
    assert (answer["summary"], answer["key_phrases"]) == ({"text": "", "sentences": []}, [])


def test_sentences_do_not_end_at_abbreviations_numbers_or_initials() -> None:
    text = "See e.g. Fig. 3 by J. Smith et al. for 3.5 tonnes. It was built in 1999. Was it? Yes."
    assert sentences_of(text) == [
        "See e.g. Fig. 3 by J. Smith et al. for 3.5 tonnes.", "It was built in 1999.", "Was it?", "Yes.",
    ]  # fmt: skip
    assert sentences_of("今天天气很好。我们去公园。") == ["今天天气很好。", "我们去公园。"]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The pilots read the tables before they take a ship across the bar of the harbour.", "en"),
        ("Les pilotes lisent les tables avant de prendre un bateau dans le port de la ville.", "fr"),
        ("Los pilotos leen las tablas antes de llevar un barco por el puerto de la ciudad.", "es"),
        ("De loodsen lezen de tabellen voordat zij een schip over de haven van de stad nemen.", "nl"),
        ("Лоцманы читают таблицы, прежде чем они проводят корабль через отмель в гавани.", "ru"),
        ("水先案内人は船を港に入れる前に潮汐表を読みます。", "ja"),
        ("引航员在把船带过港口之前阅读潮汐表。", "zh"),
        ("x = 12; y = 13", None),
    ],
)
def test_languages_are_told_apart(text: str, language: str | None) -> None:
    assert detect(text) == language


def test_lines_are_cleaned_of_what_fonts_and_editors_leave_behind() -> None:
    assert clean_line("e\ufb03cient\u00a0 o\u00adf\u200b\tall\x07\n\ud83d\ude00 \ud800") == "efficient of all 😀 \ufffd"
    assert join_lines(["東京都の", "港"]) == "東京都の港"
    assert join_lines(["GPL-", "3"]) == "GPL-3"


# -- no document breaks it ---------------------------------------------------------------------------------------

SEEDS = {
    PDF: documents.report_pdf(),
    DOCX: documents.report_docx(),
    "text/html": documents.REPORT_HTML.encode(),
    "text/markdown": documents.REPORT_MARKDOWN.encode(),
    "text/plain": "\n\n".join(documents.PARAGRAPHS).encode(),
}


def answered(tmp_path: Path, body: bytes, content_type: str) -> int:
    """Return the status of the answer, made in this process: thousands of documents a minute."""
    path = tmp_path / "body"
    path.write_bytes(body)
    job = Job(body=str(path), content_type=content_type, query="", cpu_s=60, memory_bytes=1 << 40)
    return answer(job, child.read)[0]


@st.composite
def damaged(draw: st.DrawFn, kinds: Sequence[str] = tuple(SEEDS)) -> tuple[bytes, str]:
    """A document with bytes changed, cut out, doubled, or missing at its end."""
    content_type = draw(st.sampled_from(kinds))
    body = bytearray(SEEDS[content_type])
    for _ in range(draw(st.integers(1, 12))):
        start = draw(st.integers(0, max(0, len(body) - 1)))
        match draw(st.sampled_from(["change", "cut", "double", "truncate", "insert"])):
            case "change":
                body[start : start + 1] = draw(st.binary(min_size=1, max_size=4))
            case "cut":
                del body[start : start + draw(st.integers(1, 400))]
            case "double":
                body[start:start] = body[start : start + draw(st.integers(1, 400))]
            case "insert":
                body[start:start] = draw(st.sampled_from([b"<table>", b"<ul><li>", b"| a |\n|-|\n", b"\x00", b"-----"]))
            case _:
                del body[start:]
    return bytes(body), content_type


FUZZ = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


# Not PDF: PDFium may crash on what it is given, which costs the service a child, and here would cost the test run.
@FUZZ
@given(document=damaged([kind for kind in SEEDS if kind != PDF]))
def test_a_damaged_document_is_read_or_refused_and_never_breaks_anything(
    tmp_path: Path, document: tuple[bytes, str]
) -> None:
    assert answered(tmp_path, *document) in (200, 400, 413, 415, 422)


@FUZZ
@given(body=st.binary(max_size=3000) | st.text(max_size=3000).map(lambda t: t.encode("utf-8", "replace")))
@pytest.mark.parametrize(
    "content_type", [*sorted(set(SEEDS) - {PDF}), "", "application/json", "multipart/form-data; boundary=x"]
)
def test_any_bytes_are_read_or_refused(tmp_path: Path, body: bytes, content_type: str) -> None:
    assert answered(tmp_path, body, content_type) in (200, 400, 413, 415, 422)


@FUZZ
@given(
    part=st.sampled_from(["word/document.xml", "word/styles.xml", "[Content_Types].xml", "docProps/core.xml",
                          "word/_rels/document.xml.rels", "word/numbering.xml"]),
    start=st.integers(0, 5000), length=st.integers(0, 3000), new=st.binary(max_size=40),
)  # fmt: skip
def test_a_docx_with_a_damaged_part_is_read_or_refused(
    tmp_path: Path, part: str, start: int, length: int, new: bytes
) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(SEEDS[DOCX])) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content[:start] + new + content[start + length :] if name == part else content)
    assert answered(tmp_path, out.getvalue(), DOCX) in (200, 422)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(document=damaged())
def test_over_http_damaged_documents_never_give_a_5xx(server: Server, document: tuple[bytes, str]) -> None:
    assert server.notes(*document).status < 500


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"<div>" * 100_000 + b"deep", "text/html"),
        (b"<table><tr><td colspan=99999999 rowspan=99999999>x</td></tr>" * 200, "text/html"),
        (b"<ul><li>" * 5_000 + b"deep", "text/html"),
        (b"> " * 20_000 + b"deep", "text/markdown"),
        (b"[" * 20_000 + b"](" * 20_000, "text/markdown"),
        (b"*a _b " * 20_000, "text/markdown"),
        (b"- " * 5_000 + b"deep", "text/markdown"),
        (b"&" * 200_000, "text/html"),
        (b"<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;'>]><html>&b;", "application/xhtml+xml"),
        (b"a" * 2_000_000, "text/plain"),
        (b". " * 500_000, "text/plain"),
        (b"A.b-" * 300_000, "text/plain"),
        ("\u4e00".encode() * 500_000, "text/plain"),
        (b"%PDF-1.4\n" + b"1 0 obj<</Type/Catalog/Pages 1 0 R/Kids[1 0 R]/Count 999999999>>endobj\n" * 50, PDF),
    ],
)  # fmt: skip
def test_documents_made_to_take_long_are_answered_before_the_deadline(
    server: Server, body: bytes, content_type: str
) -> None:
    reply = server.notes(body, content_type)
    assert reply.status in (200, 422)
    assert "within 60 s" not in str(reply.json.get("detail"))
