"""RapidOCR: neural networks that come inside its package, run on the CPU by onnxruntime."""

from __future__ import annotations

import functools
import math
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from rma_ocr import cpus, languages
from rma_ocr.records import Box, Line
from rma_ocr.turns import Turn, turned

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np


NAME: Literal["rapidocr"] = "rapidocr"
LANGUAGES = tuple(sorted(set(languages.RAPIDOCR.values())))
#: Where text stands is looked for in a picture of at most so many pixels; it is read at full size.
FIND_PIXELS = 1_250_000
#: The same, to tell which way up a page is.
TURN_PIXELS = 800_000
#: Lines that are read both ways up, the longest ones; of each only so many times its height.
TURN_LINES, TURN_LENGTH = 6, 12
#: A line is at least so many times as long as it is high.
_LINE_SHAPE = 1.5


def engine_version() -> str:
    """Return the package's version."""
    return version("rapidocr")


@functools.cache
def engine() -> Any:  # noqa: ANN401 - what a call returns depends on its arguments, which its types do not say
    """Return the engine with its networks loaded."""
    # A volunteer's machine reports to nobody: the versions we ask for have no telemetry, this is for any other.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    from rapidocr import RapidOCR

    found = find_spec("rapidocr")
    models = Path(found.origin).parent / "models" if found and found.origin else Path()
    # Named files are never fetched from anywhere. One line at a time takes half the memory of six, and no longer.
    loaded = RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.use_cls": False,
            "Global.max_side_len": 1 << 16,
            "Det.model_path": str(next(models.glob("*_det_*.onnx"))),
            "Det.limit_type": "max",
            "Rec.model_path": str(next(models.glob("*_rec_*.onnx"))),
            "Rec.rec_batch_num": 1,
            "EngineConfig.onnxruntime.intra_op_num_threads": cpus.mine(),
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
    # Networks are loaded when they are first used: now, while nobody waits.
    loaded(_array(_blank()), use_det=True, use_cls=False, use_rec=False)
    loaded(_array(_blank()), use_det=False, use_cls=False, use_rec=True)
    return loaded


def read(image: Image.Image) -> list[Line]:
    """Return the lines of an upright page, in pixels of ``image``."""
    pixels = _array(image)
    _find_within(FIND_PIXELS, image)
    found = engine()(pixels, use_det=True, use_cls=False, use_rec=True)
    if found.boxes is None or found.txts is None:
        return []
    return [
        Line(text=text.strip(), confidence=round(float(score), 4), box=_box(corners))
        for corners, text, score in zip(found.boxes, found.txts, found.scores, strict=True)
        if text.strip()
    ]


def turn_of(image: Image.Image) -> Turn:
    """Return by how many degrees the page must be turned clockwise to stand upright."""
    _find_within(TURN_PIXELS, image)
    found = engine()(_array(image), use_det=True, use_cls=False, use_rec=False)
    boxes = sorted(_bounds(corners) for corners in found.boxes) if getattr(found, "boxes", None) is not None else []
    lying = [box for box in boxes if box[2] - box[0] > _LINE_SHAPE * (box[3] - box[1])]
    standing = [box for box in boxes if box[3] - box[1] > _LINE_SHAPE * (box[2] - box[0])]
    upended = _length(standing) > _length(lying)
    sample = sorted(standing if upended else lying, key=lambda box: max(box[2] - box[0], box[3] - box[1]))[-TURN_LINES:]
    if not sample:
        return 0
    pieces = [image.crop(_clipped(box)) for box in sample]
    turns: tuple[Turn, Turn] = (90, 270) if upended else (0, 180)
    first, second = (sum(_legible(piece, turn) for piece in pieces) for turn in turns)
    return turns[0] if first >= second else turns[1]


def _legible(piece: Image.Image, turn: Turn) -> float:
    """Return how sure the network is of a line that is turned so."""
    found = engine()(_array(turned(piece, turn)), use_det=False, use_cls=False, use_rec=True)
    texts, scores = found.txts or (), found.scores or ()
    return float(sum(score for text, score in zip(texts, scores, strict=True) if text.strip()))


def _find_within(pixels: int, image: Image.Image) -> None:
    """Set the longest side that the detector works with, so that its picture has at most so many pixels."""
    factor = min(1.0, math.sqrt(pixels / (image.width * image.height)))
    engine().text_det.limit_side_len = math.ceil(max(image.size) * factor)


def _clipped(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return the beginning of a long line: all of it would take longer and tell no more."""
    left, upper, right, lower = box
    thickness = min(right - left, lower - upper)
    return left, upper, min(right, left + TURN_LENGTH * thickness), min(lower, upper + TURN_LENGTH * thickness)


def _length(boxes: list[tuple[int, int, int, int]]) -> int:
    return sum(max(right - left, lower - upper) for left, upper, right, lower in boxes)


def _bounds(corners: Sequence[tuple[float, float]]) -> tuple[int, int, int, int]:
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    return math.floor(min(xs)), math.floor(min(ys)), math.ceil(max(xs)), math.ceil(max(ys))


def _box(corners: Sequence[tuple[float, float]]) -> Box:
    first, second, third, fourth = ((round(float(x)), round(float(y))) for x, y in corners)
    return first, second, third, fourth


def _array(image: Image.Image) -> np.ndarray[Any, Any]:
    """Return the picture as OpenCV has it: blue, green, red."""
    import numpy as np

    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def _blank() -> Image.Image:
    return Image.new("RGB", (320, 64), "white")
