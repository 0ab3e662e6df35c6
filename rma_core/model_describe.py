"""An entry for the pool's models, written from a file: hash and size, geometry, and what only a person can add."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import msgspec

from rma_core.errors import Problem, UsageProblem, ValidationProblem
from rma_core.model_catalog import ModelEntry
from rma_core.models.strict import convert
from rma_core.models.weights import Geometry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from rma_core.gguf import Model

#: Bytes that are read at once for the hash.
PIECE_BYTES = 4 * 2**20
#: More tokens than this no pool needs in a first entry: the cache for them takes gigabytes.
MOST_CONTEXT = 8192


def digest(path: Path, told: Callable[[float], None] = lambda _: None) -> str:
    """Return a file's SHA-256; ``told`` gets the share that was read. Raises ValidationProblem."""
    found, done = hashlib.sha256(), 0
    try:
        size = path.stat().st_size or 1
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                found.update(piece)
                done += len(piece)
                told(min(1.0, done / size))
    except OSError as error:
        raise ValidationProblem(str(path), [Problem("file", f"cannot be read: {error.strerror}")]) from None
    return found.hexdigest()


def described(model: Model, *, sha256: str, name: str, url: str, licence: str) -> ModelEntry:
    """Return the entry of a model with one file. Raises UsageProblem for what was given and does not fit."""
    # What stands at its default needs no line.
    told = {field.name: field.default for field in msgspec.structs.fields(Geometry)}
    geometry = {name: value for name, none in told.items() if (value := getattr(model, name)) != none}
    if len(set(model.kv_heads)) == 1 and len(model.kv_heads) == model.layers:
        geometry["kv_heads"] = model.kv_heads[0]
    context = min(MOST_CONTEXT, max(16, model.training_context or 4096))
    facts = {
        "name": name, "url": url, "sha256": sha256, "size_bytes": model.file_bytes, "licence": licence,
        "context": context, "geometry": geometry,
    }  # fmt: skip
    try:
        return convert(msgspec.to_builtins(facts), ModelEntry, subject="model entry")
    except ValidationProblem as error:
        raise UsageProblem(str(error)) from None


def toml(entry: ModelEntry, *, remarks: Mapping[str, str]) -> str:
    """Return an entry as a file of the folder of models; ``remarks`` stand above fields, by name."""
    data = msgspec.to_builtins(entry)
    tables = {"geometry": data["geometry"]} if "geometry" in data else {}
    shown = ("name", "url", "sha256", "size_bytes", "licence", "context", "slots", "wanted")
    plain = {name: getattr(entry, name) for name in shown}
    # A table swallows what follows it.
    lines = [*_lines(plain, remarks), *(line for name, value in tables.items() for line in _table(name, value))]
    return "\n".join(lines) + "\n"


def _table(name: str, values: Mapping[str, object]) -> Iterator[str]:
    yield ""
    yield f"[{name}]"
    yield from _lines(values, {})


def _lines(values: Mapping[str, object], remarks: Mapping[str, str]) -> Iterator[str]:
    for name, value in values.items():
        if name in remarks:
            yield f"# {remarks[name]}"
        # JSON writes texts, whole numbers, yes and no, and lists of them as TOML does.
        yield f"{name} = {json.dumps(value)}"
