"""Strict decoding: JSON from outside becomes a typed record, or one error that names every problem."""

from __future__ import annotations

import functools
import math
import types
import typing
from typing import Annotated, Any, TypeVar, Union, cast

import msgspec

from rma_core.errors import Problem, ValidationProblem

T = TypeVar("T")

#: Nothing RMA speaks is nested deeper; more is an attack on the parser's stack.
MAX_DEPTH = 32
#: Larger data that does not fit is refused without saying where: walking it would hold everyone else up.
MAX_EXPLAINED_BYTES = 256 * 1024
#: More problems than this help nobody, and a hostile body could have millions.
MAX_PROBLEMS = 50

_encoder = msgspec.json.Encoder()


def encode(value: object) -> bytes:
    """Return ``value`` (a record, or plain JSON data) as compact UTF-8 JSON."""
    return _encoder.encode(value)


def parse(data: bytes | str, *, subject: str) -> Any:  # noqa: ANN401 - plain JSON data has no narrower type
    """Return JSON as plain data; refuse what JSON does not allow (NaN, lone surrogates) and deep nesting.

    Raises ValidationProblem.
    """
    hints = ("send a JSON document in UTF-8",)
    try:
        value = msgspec.json.decode(data)
    except RecursionError:
        raise ValidationProblem(subject, [Problem("$", "nested too deeply")], hints=hints) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ValidationProblem(subject, [Problem("$", f"not JSON: {error}")], hints=hints) from None
    reason = _hostile(value)
    if reason:
        raise ValidationProblem(subject, [Problem("$", reason)])
    return value


@functools.cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:  # noqa: ANN401 - a type, or a union of types
    """Return what decodes a type; the types are ours, so there are few."""
    return msgspec.json.Decoder(kind)


def decode(data: bytes | str, kind: type[T], *, subject: str) -> T:
    """Return JSON as a record of type ``kind``; unknown fields are ignored, wrong ones are all named.

    ``subject`` names the data in the error ("registration"). Raises ValidationProblem.
    """
    # What fits is decoded without building what nobody asked for; only what does not fit is walked, to explain it.
    try:
        found: T = _decoder(cast("Any", kind)).decode(data)
        return found
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        if len(data) > MAX_EXPLAINED_BYTES:
            problem = Problem("$", f"does not fit, and is too large ({len(data)} bytes) to say where")
            raise ValidationProblem(subject, [problem]) from None
    return convert(parse(data, subject=subject), kind, subject=subject)


def convert(value: object, kind: type[T], *, subject: str) -> T:
    """Return plain data as a record of type ``kind``. Raises ValidationProblem, naming every problem."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        found: list[Problem] = []
        _collect(value, kind, "$", found)
        raise ValidationProblem(subject, found[:MAX_PROBLEMS] or [_problem("$", error)]) from None


def _hostile(value: object, depth: int = 0) -> str:
    """Say what in plain JSON data may not go further; an empty string when nothing."""
    if depth > MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH} levels"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number is too large"
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((reason for item in items if (reason := _hostile(item, depth + 1))), "")


def _collect(value: object, kind: Any, path: str, found: list[Problem]) -> None:  # noqa: ANN401 - any annotation
    """Walk ``value`` beside its type and add a Problem for each part that does not fit."""
    if len(found) >= MAX_PROBLEMS:
        return
    kind = _choose(value, kind)
    before = len(found)
    for part, part_kind, part_path in _parts(value, kind, path, found):
        _collect(part, part_kind, part_path, found)
    if len(found) > before:
        return
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        found.append(_problem(path, error))


def _choose(value: object, kind: Any) -> Any:  # noqa: ANN401 - any annotation
    """For ``X | None`` with a value, ``X``, so that its parts can be walked."""
    if typing.get_origin(kind) is Annotated and _is_union(typing.get_args(kind)[0]):
        kind = typing.get_args(kind)[0]
    if _is_union(kind) and value is not None:
        rest = [option for option in typing.get_args(kind) if option is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return kind


def _is_union(kind: Any) -> bool:  # noqa: ANN401 - any annotation
    return typing.get_origin(kind) in (Union, types.UnionType)


def _parts(value: Any, kind: Any, path: str, found: list[Problem]) -> list[tuple[Any, Any, str]]:  # noqa: ANN401 - plain JSON beside any annotation
    """Return (part, its type, its path) for a record, a list or a map; name missing fields on the way."""
    bare = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    origin, arguments = typing.get_origin(bare), typing.get_args(bare)
    if isinstance(bare, type) and issubclass(bare, msgspec.Struct) and isinstance(value, dict):
        return _fields(value, bare, path, found)
    if origin in (list, tuple) and isinstance(value, list):
        return [(item, arguments[0], f"{path}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return [(item, arguments[1], f"{path}.{key}") for key, item in value.items()]
    return []


def _fields(value: dict[str, Any], kind: type, path: str, found: list[Problem]) -> list[tuple[Any, Any, str]]:
    hints = typing.get_type_hints(kind, include_extras=True)
    parts = []
    for field in msgspec.structs.fields(kind):
        where = f"{path}.{field.encode_name}"
        if field.encode_name in value:
            parts.append((value[field.encode_name], hints[field.name], where))
        elif field.required:
            found.append(Problem(where, "is required"))
    return parts


def _problem(path: str, error: Exception) -> Problem:
    """Turn msgspec's sentence, which may end in its own path, into a Problem at the full path."""
    text, _, inner = str(error).partition(" - at `")
    return Problem(path + inner.rstrip("`").removeprefix("$"), text or type(error).__name__)
