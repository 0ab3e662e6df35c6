"""Document processing over HTTP: PDF, DOCX, HTML, Markdown and text become text, outline, tables and a summary."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
