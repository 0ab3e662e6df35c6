"""OCR over HTTP: the text of pictures and scanned PDFs, with positions, confidence and orientation."""

from __future__ import annotations

__version__ = "0.1.0"
