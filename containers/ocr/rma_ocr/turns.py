"""Quarter turns of a picture, clockwise."""

from __future__ import annotations

from typing import Literal

from PIL import Image

Turn = Literal[0, 90, 180, 270]
TURNS: dict[str, Turn] = {"0": 0, "90": 90, "180": 180, "270": 270}
#: Pillow counts the other way round.
_WAYS = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}


def turned(image: Image.Image, turn: Turn) -> Image.Image:
    """Return the picture turned by so many degrees clockwise."""
    return image.transpose(_WAYS[turn]) if turn else image
