"""What the service `ocr` reads from pictures and scans: real engines on pages that look scanned."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rma_ocr import layout, media, sheets, tesseract
from rma_ocr.languages import read as read_languages
from rma_ocr.options import Options
from rma_ocr.records import Line
from rma_service import machine
from rma_service.problems import ServiceProblem
from tests import notes_documents as documents
from tests import ocr_pages as pages
from tests.needs import need
from tests.notes_server import Server, running

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Measured on the whole page of 510 words: 1.0 (RapidOCR 3.10) and 0.998 (Tesseract 5.3).
MIN_ACCURACY = 0.97
#: Of the page so many lines are read here: a third takes a third of the time.
LINES = 15
ENGINES = ("rapidocr", "tesseract")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running("--slots", "1", module="rma_ocr") as started:
        yield started


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "tesseract":
        need("tesseract")
    return name


def read(server: Server, image: Image.Image | bytes, query: str = "") -> Any:
    reply = server.ocr(image if isinstance(image, bytes) else pages.encoded(image), query=query)
    assert reply.status == 200, reply.json
    return reply.json


# -- text, position, orientation ---------------------------------------------------------------------------------


def test_a_scanned_page_gives_its_text_in_lines_with_confidence(server: Server, engine: str) -> None:
    answer = read(server, pages.page(pages.licence(LINES), height=5), f"engine={engine}&languages=eng&orientation=0")
    assert (answer["engine"], answer["document_pages"], answer["warnings"]) == (engine, 1, [])
    assert answer["engine_version"][0].isdigit()
    assert pages.word_accuracy(answer["text"], " ".join(pages.licence(LINES))) >= MIN_ACCURACY
    [page] = answer["pages"]
    assert (page["width"], page["height"], page["orientation"]) == (1654, 1000, 0)
    assert (page["languages"], page["source"]) == (["eng"], "ocr")
    assert page["confidence"] > 0.9
    assert len(page["lines"]) == LINES
    assert all(0 <= line["confidence"] <= 1 for line in page["lines"])
    assert answer["timings"]["total_s"] >= answer["timings"]["recognition_s"] > 0


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_page_that_lies_on_its_side_or_head_is_found_and_turned(server: Server, engine: str, turn: int) -> None:
    upright = pages.page(pages.licence(6), height=2)
    answer = read(server, upright.rotate(turn, expand=True), f"engine={engine}")
    [page] = answer["pages"]
    assert page["orientation"] == turn
    assert (page["width"], page["height"]) == upright.size
    assert pages.word_accuracy(answer["text"], " ".join(pages.licence(6))) >= MIN_ACCURACY
    first = page["lines"][0]["box"][0]
    assert abs(first[0] - 100) < 30
    assert abs(first[1] - 100) < 30


def test_a_caller_who_knows_the_orientation_is_believed(server: Server) -> None:
    answer = read(server, pages.sign().rotate(90, expand=True), "orientation=90")
    assert answer["pages"][0]["orientation"] == 90
    assert pages.letters(answer["text"]) == "HARBOUR1871"
    assert answer["timings"]["orientation_s"] < answer["timings"]["total_s"] / 2


def test_boxes_are_where_the_text_was_drawn(server: Server, engine: str) -> None:
    answer = read(server, pages.page(["Harbour"], points=40, skew=0, height=1.5), f"engine={engine}&orientation=0")
    [line] = answer["pages"][0]["lines"]
    (left, top), (right, _), (_, bottom), _ = line["box"]
    assert abs(left - 106) < 30
    assert abs(top - 122) < 30
    assert abs(bottom - 208) < 30
    assert abs(right - 600) < 60


def test_rapidocr_reads_other_languages_in_latin_letters_as_well(server: Server) -> None:
    answer = read(server, pages.page(pages.GERMAN, points=20, height=2), "engine=rapidocr&languages=de&orientation=0")
    assert pages.word_accuracy(answer["text"], " ".join(pages.GERMAN)) >= 0.9


def test_a_page_without_text_is_an_answer_with_a_warning(server: Server, engine: str) -> None:
    answer = read(server, pages.page([], height=1, noise=3), f"engine={engine}")
    assert (answer["text"], answer["pages"][0]["lines"], answer["pages"][0]["confidence"]) == ("", [], None)
    assert "no text was found on page 1" in answer["warnings"]


# -- files -------------------------------------------------------------------------------------------------------


def variants() -> Iterator[tuple[str, bytes]]:
    sign = pages.sign()
    yield "jpeg", pages.encoded(sign, "JPEG", quality=60)
    yield "cmyk jpeg", pages.encoded(sign.convert("CMYK"), "JPEG")
    yield "webp", pages.encoded(sign, "WEBP")
    yield "bmp", pages.encoded(sign, "BMP")
    yield "gif", pages.encoded(sign, "GIF")
    yield "tiff of one bit", pages.encoded(sign.convert("1"), "TIFF", compression="group4")
    yield "16 bits", pages.encoded(pages.sixteen_bits(sign))
    yield "palette", pages.encoded(sign.quantize(8))
    alpha = Image.new("RGBA", sign.size, (0, 0, 0, 0))
    alpha.putalpha(sign.convert("L").point(lambda value: 255 - value))
    yield "black on nothing", pages.encoded(alpha)
    white = Image.merge("RGBA", [Image.new("L", sign.size, 255)] * 3 + [alpha.getchannel("A")])
    yield "white on nothing", pages.encoded(white)
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "turned by exif", pages.encoded(sign.rotate(90, expand=True), "JPEG", exif=exif)


@pytest.mark.parametrize(("name", "body"), list(variants()), ids=lambda value: value if isinstance(value, str) else "")
def test_pictures_of_every_kind_are_read(server: Server, name: str, body: bytes) -> None:
    answer = read(server, body, "orientation=0")
    assert pages.letters(answer["text"]) == "HARBOUR1871"
    assert (answer["pages"][0]["width"], answer["pages"][0]["height"]) == (520, 120)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PDF"])
def test_each_frame_or_page_is_a_page_and_may_be_chosen(server: Server, kind: str) -> None:
    signs = [pages.sign(f"QUAY {number}{number}") for number in (1, 2, 3)]
    body = pages.encoded(signs[0], kind, save_all=True, append_images=signs[1:])
    answer = read(server, body, "pages=2-3&orientation=0")
    assert answer["document_pages"] == 3
    assert [page["page"] for page in answer["pages"]] == [2, 3]
    assert [pages.letters(page["text"]) for page in answer["pages"]] == ["QUAY22", "QUAY33"]
    assert answer["text"] == "\n\n".join(page["text"] for page in answer["pages"])


def test_a_text_layer_is_taken_only_when_preferred(server: Server) -> None:
    pdf = documents.lines_pdf([["Harbour tides decide"]])
    drawn = read(server, pdf, "dpi=150&orientation=0")["pages"][0]
    taken = read(server, pdf, "dpi=150&text_layer=prefer")["pages"][0]
    assert (drawn["source"], taken["source"]) == ("ocr", "text_layer")
    assert pages.letters(drawn["text"]) == pages.letters(taken["text"]) == "HARBOURTIDESDECIDE"
    assert taken["lines"][0]["confidence"] is None
    for here, there in zip(drawn["lines"][0]["box"], taken["lines"][0]["box"], strict=True):
        assert abs(here[0] - there[0]) < 20
        assert abs(here[1] - there[1]) < 20


def test_a_large_picture_is_read_smaller_and_told_in_its_own_pixels() -> None:
    body = pages.encoded(Image.new("L", (8000, 6000), "white"))
    sheet = sheets.opened(body, "image/png", Options()).sheet(1)
    assert sheet.size == (8000, 6000)
    assert sheet.image.width * sheet.image.height <= sheets.WORK_PIXELS * 1.01
    assert sheet.scale == pytest.approx(2, rel=0.01)


@pytest.mark.filterwarnings("ignore")
@given(st.data())
def test_damaged_files_are_refused_and_break_nothing(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PDF")))
    body = bytearray(pages.encoded(pages.sign(), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=8))
        if not body:
            return
    try:
        media_type, _ = media.kind_of(bytes(body), content_type="")
        document = sheets.opened(bytes(body), media_type, Options())
        for number in document.chosen(None)[:3]:
            document.sheet(number)
    except (ServiceProblem, MemoryError, OverflowError):
        pass


# -- parts -------------------------------------------------------------------------------------------------------


def line(text: str, left: int, top: int, width: int, height: int = 20) -> Line:
    right, bottom = left + width, top + height
    return Line(text=text, confidence=1.0, box=((left, top), (right, top), (right, bottom), (left, bottom)))


def in_order(lines: Sequence[Line]) -> list[str]:
    return [" ".join(piece.text for piece in row) for row in layout.ordered(lines)]


def test_columns_are_read_one_after_the_other_between_what_spans_them() -> None:
    title, foot = line("title", 0, 0, 1000), line("foot", 0, 300, 900)
    left = [line(f"l{number}", 0, 50 + 30 * number, 460) for number in range(6)]
    right = [line(f"r{number}", 540, 52 + 30 * number, 450) for number in range(6)]
    found = in_order([foot, *right, *left, title])
    assert found == ["title", *(f"l{n}" for n in range(6)), *(f"r{n}" for n in range(6)), "foot"]


def test_a_table_is_read_row_by_row() -> None:
    cells = [line(f"{row}{column}", 300 * column, 40 * row, 80) for row in range(4) for column in range(3)]
    assert in_order(cells[::-1]) == [" ".join(f"{row}{column}" for column in range(3)) for row in range(4)]


@given(st.lists(st.tuples(*[st.integers(0, 2000)] * 2, st.integers(1, 1500), st.integers(1, 60)), max_size=40))
def test_every_line_is_in_the_order_once(boxes: list[tuple[int, int, int, int]]) -> None:
    lines = [line(str(number), *box) for number, box in enumerate(boxes)]
    found = [piece.text for row in layout.ordered(lines) for piece in row]
    assert sorted(found) == sorted(piece.text for piece in lines)


TSV = """level\tpage_num\tblock_num\tpar_num\tline_num\tword_num\tleft\ttop\twidth\theight\tconf\ttext
1\t1\t0\t0\t0\t0\t0\t0\t800\t300\t-1\t
2\t1\t1\t0\t0\t0\t50\t40\t600\t90\t-1\t
3\t1\t1\t1\t0\t0\t50\t40\t600\t90\t-1\t
4\t1\t1\t1\t1\t0\t50\t40\t600\t30\t-1\t
5\t1\t1\t1\t1\t1\t50\t40\t100\t30\t96.5\tHarbour
5\t1\t1\t1\t1\t2\t170\t40\t90\t30\t40.0\t"tides
4\t1\t1\t1\t2\t0\t50\t90\t500\t32\t-1\t
5\t1\t1\t1\t2\t1\t50\t90\t100\t32\t90.0\tdecide.
3\t1\t1\t2\t0\t0\t50\t200\t300\t30\t-1\t
4\t1\t1\t2\t1\t0\t50\t200\t300\t30\t-1\t
5\t1\t1\t2\t1\t1\t50\t200\t300\t30\t95.0\t \n"""


def test_tesseracts_table_becomes_paragraphs_of_lines() -> None:
    [[first, second]] = tesseract.paragraphs(TSV)
    assert (first.text, second.text) == ('Harbour "tides', "decide.")
    assert first.box == ((50, 40), (650, 40), (650, 70), (50, 70))
    assert first.confidence == pytest.approx((7 * 0.965 + 6 * 0.4) / 13, abs=1e-4)


@given(st.text(st.characters(codec="utf-8"), max_size=400))
def test_no_output_of_tesseract_breaks_the_reading(tail: str) -> None:
    for paragraph in tesseract.paragraphs(TSV.rpartition("\n")[0] + tail):
        assert paragraph


def test_languages_are_told_by_tesseracts_names_or_iso_639() -> None:
    assert read_languages("eng+deu") == read_languages("en deu") == read_languages("en,de") == ("eng", "deu")
    assert read_languages("zh-Hant") == ("chi_tra",)
    for wrong in ("", "+", "../etc", "a;b", 7, "x" * 500, "+".join("abcdefghij")):
        with pytest.raises(ValueError, match="expected"):
            read_languages(wrong)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_processors_are_those_that_the_container_was_granted(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert machine.cpus(tmp_path) == expected
    assert machine.cpus(tmp_path / "nothing") >= 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no alarm")
def test_a_page_that_takes_too_long_ends_its_process_even_in_native_code() -> None:
    script = "from rma_ocr import reading; reading._alarm(0.2); sum(range(10**12))"
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == -signal.SIGALRM


def installed_folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def test_the_models_are_in_the_package_so_that_nothing_is_fetched() -> None:
    models = {path.name.split("_")[1] for path in (installed_folder("rapidocr") / "models").glob("PP-OCR*.onnx")}
    assert {"det", "rec"} <= models


def test_what_runs_the_networks_has_no_telemetry() -> None:
    [library] = (installed_folder("onnxruntime") / "capi").glob("onnxruntime_pybind11_state*")
    assert b"events.data.microsoft" not in library.read_bytes()


def test_a_picture_is_not_decoded_before_its_size_is_known() -> None:
    with pytest.raises(ServiceProblem, match="pixels"):
        sheets.opened(pages.png_header(60_000, 60_000), "image/png", Options())
    grown = BytesIO(pages.encoded(pages.sign()))
    assert sheets.opened(grown.getvalue(), "image/png", Options()).count == 1
