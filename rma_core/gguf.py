"""What a model file in GGUF says of itself, and the memory the model takes with a context: from its header alone.

The file may come from anywhere, so nothing in it is believed before it was compared with a bound or with the file's
own length. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from rma_core.errors import Problem, ValidationProblem
from rma_core.models.sizes import human
from rma_core.models.weights import Geometry

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

#: The largest vocabularies make headers of about 20 MB.
MAX_HEADER_BYTES = 128 * 2**20
#: Pairs and tensors; models with hundreds of experts have some thousand.
MAX_PAIRS, MAX_TENSORS = 4096, 65_536
MAX_KEY_BYTES, MAX_TENSOR_NAME_BYTES = 256, 256
#: A chat template is the longest text that is there for a reason.
MAX_TEXT_BYTES = 2**20
#: Values of one list; a vocabulary and its merges have some hundred thousand.
MAX_VALUES = 4 * 2**20
#: Values of a list that are kept: one for each layer.
MAX_LAYERS = 1024
MAX_DIMENSIONS = 4
#: No number in a model that means a size is larger.
MAX_SIZE = 2**50

#: Each slot's context is rounded up to so many tokens.
CONTEXT_STEP = 256
#: Tokens of a prompt that are computed at once, which is what most of the work space is for.
MICRO_BATCH = 512
#: The service's processes and llama.cpp itself, before any model: measured, with some room.
BASE_BYTES = 128 * 2**20
#: Bytes of a value in the key/value cache, by type: a block's bytes divided by its values.
KV_TYPES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32,
            "q4_0": 18 / 32}  # fmt: skip

#: Types of tensors, by number: name, values in a block, bytes of a block.
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}  # fmt: skip
#: What a file says its weights are, by number.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
#: Values of fixed size, by number: how struct writes them.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}

Value = int | float | bool | str | tuple[int, ...]


class Model(Geometry, frozen=True, kw_only=True):
    """What a GGUF file holds; ``kv_heads`` has one number for each layer."""

    architecture: str
    name: str
    parameters: int
    quantisation: str
    file_bytes: int
    heads: int
    kv_heads: tuple[int, ...]
    chat_template: bool


class Memory(NamedTuple):
    """Bytes that a model takes; ``context`` is what all slots have together, as it is rounded."""

    weights_bytes: int
    kv_bytes: int
    overhead_bytes: int
    context: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.overhead_bytes

    def __str__(self) -> str:
        """``needs 5.1 GiB: 4.4 GiB of weights, …``."""
        return (
            f"needs {human(self.total_bytes)}: {human(self.weights_bytes)} of weights, {human(self.kv_bytes)} of"
            f" KV cache for {self.context} tokens, {human(self.overhead_bytes)} overhead"
        )


class Fit(NamedTuple):
    """Whether a model fits, and the sentence that says why, or why not."""

    fits: bool
    reason: str


def read(path: Path) -> Model:
    """Read a file's header, at most MAX_HEADER_BYTES of it. Raises ValidationProblem with what is wrong with it."""
    try:
        with path.open("rb") as file:
            return _model(_Reader(file, file.seek(0, 2)))
    except OSError as error:
        raise ValidationProblem(str(path), [Problem("file", f"cannot be read: {error.strerror}")]) from None
    except _Bad as bad:
        raise ValidationProblem(str(path), [Problem("GGUF", str(bad))]) from None


def memory(
    model: Geometry, *, context: int, slots: int, kv_type: str = "f16", micro_batch: int = MICRO_BATCH
) -> Memory:  # fmt: skip
    """Return what the model takes with ``context`` tokens in each of ``slots``.

    It is an upper bound where a model forgets: sliding windows count as whole contexts. Raises ValidationProblem for
    a type of the cache that is not in KV_TYPES.
    """
    if kv_type not in KV_TYPES:
        known = ", ".join(KV_TYPES)
        raise ValidationProblem("KV cache", [Problem("type", f"{kv_type!r} is unknown; there are {known}")])
    each = min(context, model.training_context or context)
    whole = max(1, slots) * math.ceil(max(1, each) / CONTEXT_STEP) * CONTEXT_STEP
    values = model.kv_heads_of_all_layers * (model.key_length + model.value_length)
    kv = 0 if model.embeds else math.ceil(whole * values * KV_TYPES[kv_type])
    return Memory(model.weights_bytes, kv, BASE_BYTES + _work_space(model, whole, micro_batch), whole)


def _work_space(model: Geometry, context: int, micro_batch: int) -> int:
    """Return the bytes of llama.cpp's compute buffer: logits, what a layer holds at once, and who may look at whom."""
    batch = min(micro_batch, context)
    layer = 6 * model.embedding_length + 3 * model.feed_forward_length
    return 4 * batch * (model.vocabulary + layer) + 4 * batch * context


def fits(
    model: Geometry, *, free_bytes: int, context: int, slots: int, kv_type: str = "f16", where: str = "this machine"
) -> Fit:  # fmt: skip
    """Say whether the model fits into ``free_bytes``. Raises ValidationProblem, see `memory`."""
    wanted = memory(model, context=context, slots=slots, kv_type=kv_type)
    return Fit(wanted.total_bytes <= free_bytes, f"{wanted}; {where} has {human(max(0, free_bytes))} free")


class _Bad(Exception):
    """The header cannot be what it should be; the sentence goes on after "GGUF: "."""


class _Reader:
    """Takes a file's values one by one, never past its end or the longest header."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size
        self.at = 0
        file.seek(0)

    def bytes(self, count: int) -> bytes:
        self._advance(count)
        data = self._file.read(count)
        if len(data) != count:
            raise _Bad("the file got shorter while it was read")
        return data

    def skip(self, count: int) -> None:
        self._advance(count)
        self._file.seek(count, 1)

    def _advance(self, count: int) -> None:
        self.at += count
        if self.at > self.size:
            raise _Bad("the file is cut off within its header")
        if self.at > MAX_HEADER_BYTES:
            raise _Bad(f"its header is longer than {human(MAX_HEADER_BYTES)}")

    def number(self, form: str) -> int:
        [value] = struct.unpack(form, self.bytes(struct.calcsize(form)))
        return int(value)

    def text(self, limit: int, what: str) -> str:
        length = self.number("<Q")
        if length > limit:
            raise _Bad(f"{what} has {length} bytes, more than {limit}")
        return self.bytes(length).decode(errors="replace")


def _model(reader: _Reader) -> Model:
    if reader.size < len(_MAGIC) or reader.bytes(len(_MAGIC)) != _MAGIC:
        raise _Bad("this is no GGUF file")
    version = reader.number("<I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        raise _Bad("it is written for big-endian machines" if swapped else f"version {version} is unknown")
    tensors, pairs = reader.number("<Q"), reader.number("<Q")
    if tensors > MAX_TENSORS or pairs > MAX_PAIRS:
        raise _Bad(f"{tensors} tensors and {pairs} pairs are more than any model has")
    facts: dict[str, Value] = {}
    for _ in range(pairs):
        key = reader.text(MAX_KEY_BYTES, "a key")
        facts[key] = _value(reader, key)
    return _described(facts, _weights(reader, tensors, facts), reader.size)


def _value(reader: _Reader, key: str) -> Value:
    kind = reader.number("<I")
    if kind == _STRING:
        return reader.text(MAX_TEXT_BYTES, f"the text {key[:60]}")
    if kind == _ARRAY:
        return _array(reader, key)
    return _scalar(reader, kind, key)


def _scalar(reader: _Reader, kind: int, key: str) -> Value:
    if kind not in _SCALARS:
        raise _Bad(f"the value {key[:60]} has the unknown type {kind}")
    [value] = struct.unpack(_SCALARS[kind], reader.bytes(struct.calcsize(_SCALARS[kind])))
    found: int | float | bool = value
    return found


def _array(reader: _Reader, key: str) -> Value:
    """Return a short list of whole numbers; of any other list, how long it is."""
    kind, count = reader.number("<I"), reader.number("<Q")
    if count > MAX_VALUES:
        raise _Bad(f"the list {key[:60]} has {count} values, more than {MAX_VALUES}")
    if kind == _STRING:
        for _ in range(count):
            length = reader.number("<Q")
            if length > MAX_TEXT_BYTES:
                raise _Bad(f"a text in {key[:60]} has {length} bytes, more than {MAX_TEXT_BYTES}")
            reader.skip(length)
        return count
    if kind not in _SCALARS:
        raise _Bad(f"the list {key[:60]} has values of the unknown type {kind}")
    if count <= MAX_LAYERS and kind in {4, 5, 10, 11}:
        return tuple(int(_scalar(reader, kind, key)) for _ in range(count))  # type: ignore[arg-type]  # these are whole
    reader.skip(count * struct.calcsize(_SCALARS[kind]))
    return count


class _Weights(NamedTuple):
    """All tensors together; ``by_type`` are bytes."""

    parameters: int
    by_type: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.by_type.values())


def _weights(reader: _Reader, tensors: int, facts: Mapping[str, Value]) -> _Weights:
    """Add up the tensors, each of which has to lie within the file."""
    parameters, end, by_type = 0, 0, dict[str, int]()
    for _ in range(tensors):
        name = reader.text(MAX_TENSOR_NAME_BYTES, "a tensor's name")
        dimensions = reader.number("<I")
        if dimensions > MAX_DIMENSIONS:
            raise _Bad(f"the tensor {name[:60]} has {dimensions} dimensions")
        shape = [reader.number("<Q") for _ in range(dimensions)]
        kind, offset = reader.number("<I"), reader.number("<Q")
        count = math.prod(shape)
        if kind not in TENSOR_TYPES or count > MAX_SIZE or offset > MAX_SIZE:
            raise _Bad(f"the tensor {name[:60]} has an unknown type or an impossible size")
        label, block, block_bytes = TENSOR_TYPES[kind]
        if shape and shape[0] % block:
            raise _Bad(f"the tensor {name[:60]} does not consist of whole blocks")
        size = count // block * block_bytes
        parameters += count
        by_type[label] = by_type.get(label, 0) + size
        end = max(end, offset + size)
    if parameters > MAX_SIZE:
        raise _Bad("it says that it has more parameters than any model")
    missing = _data_start(reader, facts) + end - reader.size
    if tensors and missing > 0:
        raise _Bad(f"the file is cut off: {human(missing)} of its weights are missing")
    return _Weights(parameters, by_type)


def _data_start(reader: _Reader, facts: Mapping[str, Value]) -> int:
    alignment = _count(facts, "general.alignment", 32)
    if not 1 <= alignment <= 2**20:
        raise _Bad(f"an alignment of {alignment} is impossible")
    return -(-reader.at // alignment) * alignment


def _described(facts: Mapping[str, Value], weights: _Weights, file_bytes: int) -> Model:
    architecture = facts.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise _Bad("it does not say which architecture it is for")
    parts = _count(facts, "split.count", 1)
    if parts > 1:
        raise _Bad(f"it is one of {parts} parts of a model: join them with `llama-gguf-split --merge`")
    if not weights.parameters:
        raise _Bad("it holds no weights")
    return _with_numbers(facts, weights, file_bytes, architecture)


def _with_numbers(facts: Mapping[str, Value], weights: _Weights, file_bytes: int, architecture: str) -> Model:
    def number(name: str, default: int = 0) -> int:
        return _count(facts, f"{architecture}.{name}", default)

    layers, width = number("block_count"), number("embedding_length")
    if layers > MAX_LAYERS:
        raise _Bad(f"it says that it has {layers} layers")
    heads = max(_each(facts, f"{architecture}.attention.head_count", layers, 0), default=0)
    head = width // heads if heads else 0
    template = facts.get("tokenizer.chat_template")
    name = facts.get("general.name")
    return Model(
        architecture=architecture[:60], name=name[:200] if isinstance(name, str) else "",
        parameters=weights.parameters, quantisation=_quantisation(facts, weights),
        weights_bytes=weights.total_bytes, file_bytes=file_bytes, training_context=number("context_length"),
        layers=layers, heads=heads, kv_heads=_each(facts, f"{architecture}.attention.head_count_kv", layers, heads),
        key_length=number("attention.key_length", head), value_length=number("attention.value_length", head),
        embedding_length=width,
        feed_forward_length=max(_each(facts, f"{architecture}.feed_forward_length", layers, 0), default=0),
        vocabulary=_count(facts, "tokenizer.ggml.tokens", number("vocab_size")),
        chat_template=isinstance(template, str) and bool(template),
        embeds=facts.get(f"{architecture}.attention.causal") is False or number("pooling_type") > 0,
    )  # fmt: skip


def _quantisation(facts: Mapping[str, Value], weights: _Weights) -> str:
    told = FILE_TYPES.get(_count(facts, "general.file_type", -1))
    return told or max(weights.by_type, key=lambda label: weights.by_type[label])


def _count(facts: Mapping[str, Value], key: str, default: int) -> int:
    """Return a whole number that means a size; lists that were only counted are such numbers too."""
    value = facts.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Bad(f"{key[:60]} is not a whole number")
    if value != default and not 0 <= value <= MAX_SIZE:
        raise _Bad(f"{key[:60]} cannot be {value}")
    return value


def _each(facts: Mapping[str, Value], key: str, layers: int, default: int) -> tuple[int, ...]:
    """Return one number for each layer, from a list or a single one."""
    value = facts.get(key, default)
    if isinstance(value, tuple):
        if len(value) < layers or not all(0 <= number <= 2**20 for number in value):
            raise _Bad(f"{key[:60]} does not fit to {layers} layers")
        return value[:layers]
    number = _count(facts, key, default)
    if number > 2**24:
        raise _Bad(f"{key[:60]} cannot be {number}")
    return (number,) * layers
