"""Questions about pictures over HTTP: `POST /vision`, answered by a model that Ollama serves beside it."""

from __future__ import annotations

__version__ = "0.1.0"
