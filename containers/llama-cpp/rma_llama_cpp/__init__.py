"""One language model over HTTP: llama.cpp's OpenAI API, as a process that gives nothing else away."""

from __future__ import annotations

__version__ = "0.1.0"
