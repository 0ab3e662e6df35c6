"""What a client may ask for, beside the picture itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from rma_service import options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PROMPT = "Describe this picture."
MAX_PROMPT, MAX_TOKENS, DEFAULT_TOKENS = 4000, 4096, 512


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a request; ``max_tokens`` of the answer."""

    prompt: str = PROMPT
    max_tokens: int = DEFAULT_TOKENS
    filename: str | None = None


def parse(given: Mapping[str, object]) -> Options:
    """Return options from words (a query, a form) or JSON values; raises BadOptions, which names each that is wrong."""
    return options.parse(given, Options, _READERS)


def _prompt(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_PROMPT:
        raise ValueError(f"a text of up to {MAX_PROMPT} characters is expected")
    return value


_READERS: dict[str, Callable[[object], object]] = {
    "prompt": _prompt,
    "max_tokens": options.number(1, MAX_TOKENS),
    "filename": options.filename,
}
