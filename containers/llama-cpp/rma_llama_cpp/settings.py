"""What the service is told by its environment, and everything wrong with it at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_T = TypeVar("_T")
#: Tokens of one slot where nothing else is said; a model trained on less gets what it was trained on.
CONTEXT = 4096
#: Requests answered at once where nothing else is said.
SLOTS = 2
#: More tokens than any model takes.
MOST_CONTEXT = 16_777_216
MOST_SLOTS = 64
_YES, _NO = frozenset({"1", "true", "yes", "on"}), frozenset({"", "0", "false", "no", "off"})


class Unusable(Exception):
    """The service cannot run; the sentence says why, and what would help."""


class Settings(NamedTuple):
    """``context`` are tokens of one slot; ``embeddings``: vectors instead of text; ``sha256`` may be empty.

    Without ``load`` the model stays in its file until somebody asks for it.
    """

    model: str
    file: Path
    sha256: str = ""
    context: int = CONTEXT
    slots: int = SLOTS
    embeddings: bool = False
    #: Of the key/value cache, as llama.cpp names them.
    kv_type: str = "f16"
    load: bool = True


#: Types of the cache that every build of llama.cpp can compute with.
KV_TYPES = ("f32", "f16", "q8_0", "q4_0")


def read(environment: Mapping[str, str]) -> Settings:
    """Return the settings in ``environment``. Raises Unusable, which names everything that is wrong."""
    wrong: list[str] = []

    def taken(name: str, default: _T, reader: Callable[[str], _T]) -> _T:
        text = environment.get(name, "").strip()
        try:
            return reader(text) if text else default
        except ValueError as error:
            wrong.append(f"{name}: {error}")
            return default

    file = environment.get("MODEL_FILE", "").strip()
    if not file:
        wrong.append("MODEL_FILE: the path of a GGUF file is needed")
    settings = Settings(
        model=environment.get("MODEL", "").strip() or Path(file).stem,
        file=Path(file).expanduser().absolute(),
        sha256=taken("MODEL_SHA256", "", _digest),
        context=taken("CONTEXT", CONTEXT, _number(16, MOST_CONTEXT)),
        slots=taken("SLOTS", SLOTS, _number(1, MOST_SLOTS)),
        embeddings=taken("EMBEDDINGS", False, _flag),  # noqa: FBT003 - a value of a setting
        kv_type=taken("KV_TYPE", "f16", _kv_type),
        load=taken("LOAD", True, _flag),  # noqa: FBT003 - a value of a setting
    )
    if len(settings.model) > 200 or not settings.model.isprintable():  # noqa: PLR2004 - a name, not a text
        wrong.append("MODEL: a name of at most 200 printable characters is needed")
    if wrong:
        raise Unusable("; ".join(wrong))
    return settings


def _number(least: int, most: int) -> Callable[[str], int]:
    def reader(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text[:12]) <= most):
            raise ValueError(f"{text[:40]!r} is not a number from {least} to {most}")
        return int(text)

    return reader


def _digest(text: str) -> str:
    digest = text.lower().removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError("64 hexadecimal digits are needed")
    return digest


def _flag(text: str) -> bool:
    if text.lower() not in _YES | _NO:
        raise ValueError(f"{text[:40]!r} is neither yes nor no")
    return text.lower() in _YES


def _kv_type(text: str) -> str:
    if text.lower() not in KV_TYPES:
        raise ValueError(f"one of {', '.join(KV_TYPES)} is expected")
    return text.lower()
