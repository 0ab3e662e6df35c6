"""Tesseract, through its command: what its TSV output has, and its orientation detection."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from io import BytesIO
from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

from rma_ocr.records import Box, Line
from rma_ocr.turns import TURNS, Turn
from rma_service.problems import TooComplex

if TYPE_CHECKING:
    from PIL import Image

NAME: Literal["tesseract"] = "tesseract"
#: Seconds for a question that has nothing to do with a page.
ASK_S = 10.0
#: Data for scripts and orientation, and for mathematics: no languages.
_NO_LANGUAGE = frozenset({"osd", "equ"})
#: Below this confidence its word on orientation counts for nothing; a page of text has 5 and more.
SURE = 2.0
DEFAULT_DPI = 300
_LINE_LEVEL, _WORD_LEVEL = 4, 5
_TSV_FIELDS = 12
_VERSION = re.compile(r"tesseract v?(\d[\w.-]*)")
_ROTATE = re.compile(r"^Rotate: (0|90|180|270)$", re.MULTILINE)
_SURENESS = re.compile(r"^Orientation confidence: ([\d.]+)$", re.MULTILINE)
#: Ends a program with the process that started it, which on Linux would otherwise go on with a page nobody waits for.
_TIED = "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,9,0,0,0);os.execv(sys.argv[1],sys.argv[1:])"


class Installed(NamedTuple):
    """The Tesseract of this machine."""

    command: str
    version: str
    languages: tuple[str, ...]
    has_osd: bool


@functools.cache
def installed() -> Installed | None:
    """Look for the command and its data; None where there is no Tesseract that can read anything."""
    command = shutil.which("tesseract")
    if command is None:
        return None
    try:
        told = _VERSION.search(_ask(command, "--version"))
        data = {line.strip() for line in _ask(command, "--list-langs").splitlines()[1:]} - {""}
    except (OSError, subprocess.SubprocessError):
        return None
    names = tuple(sorted(data - _NO_LANGUAGE))
    return Installed(command, told[1] if told else "unknown", names, "osd" in data) if names else None


def _ask(command: str, question: str) -> str:
    done = subprocess.run(
        [command, question],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=ASK_S,
        check=True,
        env=_environment(1),
    )
    return (done.stdout + done.stderr).decode(errors="replace")


def read(
    image: Image.Image, *, found: Installed, languages: tuple[str, ...], dpi: int | None, threads: int
) -> list[list[Line]]:
    """Return the paragraphs of an upright page, each with its lines, in Tesseract's reading order.

    Raises TooComplex where Tesseract gives up.
    """
    words = ("-l", "+".join(languages), "--psm", "3", "--dpi", str(dpi or DEFAULT_DPI), "tsv")
    return paragraphs(_run(found, image, *words, threads=threads))


def turn_of(image: Image.Image, *, found: Installed, threads: int) -> Turn | None:
    """Return by how many degrees the page must be turned clockwise; None where Tesseract cannot tell."""
    if not found.has_osd:
        return None
    try:
        told = _run(found, image, "--psm", "0", "--dpi", str(DEFAULT_DPI), threads=threads)
    except TooComplex:
        # That is how it says that there are too few characters.
        return None
    rotate, sure = _ROTATE.search(told), _SURENESS.search(told)
    if rotate is None or sure is None or float(sure[1]) < SURE:
        return None
    return TURNS[rotate[1]]


def paragraphs(tsv: str) -> list[list[Line]]:
    """Return what a TSV output holds; a line's confidence is that of its words, by their length."""
    rows = [row for line in tsv.splitlines() if len(row := line.split("\t", _TSV_FIELDS - 1)) == _TSV_FIELDS]
    texts = [row for row in rows if row[0] in (str(_LINE_LEVEL), str(_WORD_LEVEL))]
    found = []
    for _, paragraph in groupby(texts, key=lambda row: row[1:4]):
        lines = [line for _, group in groupby(paragraph, key=lambda row: row[4]) if (line := _line(list(group)))]
        if lines:
            found.append(lines)
    return found


def _line(rows: list[list[str]]) -> Line | None:
    words = [(row[11].strip(), float(row[10])) for row in rows if row[0] == str(_WORD_LEVEL) and row[11].strip()]
    if not words:
        return None
    letters = sum(len(word) for word, _ in words)
    sure = sum(len(word) * max(0.0, min(100.0, confidence)) for word, confidence in words) / letters / 100
    left, top, width, height = (int(number) for number in rows[0][6:10])
    box: Box = ((left, top), (left + width, top), (left + width, top + height), (left, top + height))
    return Line(text=" ".join(word for word, _ in words), confidence=round(sure, 4), box=box)


def _run(found: Installed, image: Image.Image, *words: str, threads: int) -> str:
    picture = BytesIO()
    # A format without compression: it is read a moment later.
    image.save(picture, "PPM")
    command = [found.command, "stdin", "stdout", *words]
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", _TIED, *command]
    done = subprocess.run(
        command, input=picture.getvalue(), capture_output=True, check=False, env=_environment(threads)
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise TooComplex(f"Tesseract could not read the page ({' '.join(said)[:200] or done.returncode})")
    return done.stdout.decode(errors="replace")


def _environment(threads: int) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "TESSDATA_PREFIX", "LD_LIBRARY_PATH", "SYSTEMROOT")
    }
    return {**kept, "LC_ALL": "C.UTF-8", "OMP_THREAD_LIMIT": str(threads)}
