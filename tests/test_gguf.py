"""The header of a model's file: what it says, what a hostile one can do (nothing), and the memory it foretells."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rma_core import gguf
from rma_core.errors import ValidationProblem
from tests import tiny_model
from tests.needs import need

if TYPE_CHECKING:
    from pathlib import Path

#: Bytes that reading a hostile header of a megabyte may take in memory at most.
MOST_MEMORY = 8 * 2**20
QUIET = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def chat(folder: Path) -> Path:
    return tiny_model.write_chat_model(folder / "chat.gguf", layers=3, width=64, heads=4, kv_heads=2, context=2048)


def read_bytes(folder: Path, data: bytes) -> gguf.Model:
    file = folder / "read.gguf"
    file.write_bytes(data)
    return gguf.read(file)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def header(*pairs: bytes, tensors: int = 0, count: int | None = None, version: int = 3) -> bytes:
    number = len(pairs) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", version, tensors, number) + b"".join(pairs)


LLAMA = pair(b"general.architecture", 8, text(b"llama"))


def test_a_model_says_what_it_is(chat: Path) -> None:
    model = gguf.read(chat)
    assert (model.architecture, model.name, model.quantisation) == ("llama", "tiny-chat-1", "F32")
    assert (model.layers, model.heads, model.kv_heads, model.key_length, model.value_length) == (3, 4, (2,) * 3, 16, 16)
    assert (model.embedding_length, model.training_context, model.vocabulary) == (64, 2048, tiny_model.WORDS)
    assert (model.chat_template, model.embeds) == (True, False)
    assert model.weights_bytes == 4 * model.parameters
    assert 0 < model.file_bytes - model.weights_bytes < 20_000


def test_a_model_for_embeddings_is_known_as_one(folder: Path) -> None:
    model = gguf.read(tiny_model.write_embedding_model(folder / "embedding.gguf"))
    assert (model.architecture, model.embeds, model.chat_template) == ("bert", True, False)
    assert gguf.memory(model, context=512, slots=2).kv_bytes == 0


def test_types_of_tensors_are_those_of_the_format() -> None:
    need("llama")
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    theirs = {kind.value: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    assert {number: theirs[number] for number in gguf.TENSOR_TYPES} == gguf.TENSOR_TYPES
    assert len(GGMLQuantizationType) - len(gguf.TENSOR_TYPES) <= 2


#: Headers, and a word of the sentence about each.
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no GGUF"),
    "another kind of file": (b"PK\x03\x04" + bytes(100), "no GGUF"),
    "only the magic": (b"GGUF", "cut off"),
    "the first version": (header(version=1), "version 1"),
    "big-endian": (b"GGUF\0\0\0\x03" + bytes(16), "big-endian"),
    "too many tensors": (header(tensors=2**40), "more than any model"),
    "too many pairs": (header(count=2**63), "more than any model"),
    "a key without end": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "a key has"),
    "a text without end": (header(pair(b"general.name", 8, struct.pack("<Q", 2**62))), "general.name has"),
    "a list without end": (header(pair(b"x", 9, struct.pack("<IQ", 4, 2**62))), "list x has"),
    "a list of lists": (header(pair(b"x", 9, struct.pack("<IQ", 9, 2))), "unknown type 9"),
    "a long list that is not there": (header(pair(b"x", 9, struct.pack("<IQ", 8, 4_000_000))), "cut off"),
    "an unknown type": (header(pair(b"x", 99, b"")), "unknown type 99"),
    "no architecture": (header(), "which architecture"),
    "no weights": (header(LLAMA), "no weights"),
    "a part": (header(LLAMA, pair(b"split.count", 2, struct.pack("<H", 3))), "one of 3 parts"),
    "an impossible tensor": (
        header(LLAMA, tensors=1) + text(b"t") + struct.pack("<IQQIQ", 2, 2**60, 2**60, 0, 0), "impossible size",
    ),
    "too many dimensions": (header(LLAMA, tensors=1) + text(b"t") + struct.pack("<I", 9), "9 dimensions"),
    "half a block": (header(LLAMA, tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 33, 2, 0), "whole blocks"),
    "weights that are not there": (
        header(LLAMA, tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 2**30, 0, 0), "4.0 GiB of its weights",
    ),
    "layers beyond number": (
        header(LLAMA, pair(b"llama.block_count", 4, struct.pack("<I", 2**31)), tensors=1)
        + text(b"t") + struct.pack("<IQIQ", 1, 1, 0, 0) + bytes(64), "layers",
    ),
    "a number that is a text": (
        header(LLAMA, pair(b"llama.block_count", 8, text(b"many")), tensors=1)
        + text(b"t") + struct.pack("<IQIQ", 1, 1, 0, 0) + bytes(64), "not a whole number",
    ),
    "a context below nothing": (
        header(LLAMA, pair(b"llama.context_length", 5, struct.pack("<i", -1)), tensors=1)
        + text(b"t") + struct.pack("<IQIQ", 1, 1, 0, 0) + bytes(64), "cannot be -1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_gets_a_sentence(folder: Path, name: str) -> None:
    data, sentence = BAD[name]
    with pytest.raises(ValidationProblem, match=re.escape(sentence)):
        read_bytes(folder, data)


def test_a_file_that_cannot_be_read_gets_a_sentence(folder: Path) -> None:
    for path in (folder / "nowhere.gguf", folder):
        with pytest.raises(ValidationProblem, match="cannot be read"):
            gguf.read(path)


def test_a_file_cut_anywhere_is_refused(folder: Path, chat: Path) -> None:
    data = chat.read_bytes()
    for cut in [*range(0, 6000, 37), len(data) // 2, len(data) - 1]:
        with pytest.raises(ValidationProblem):
            read_bytes(folder, data[:cut])


@QUIET
@given(data=st.binary(max_size=400), begin=st.sampled_from([b"", b"GGUF", b"GGUF\3\0\0\0", header(LLAMA, tensors=3)]))
def test_no_bytes_do_anything_but_be_refused(folder: Path, data: bytes, begin: bytes) -> None:
    with pytest.raises(ValidationProblem):
        read_bytes(folder, begin + data)


@QUIET
@given(changes=st.lists(st.tuples(st.integers(0, 8000), st.binary(min_size=1, max_size=9)), min_size=1, max_size=5))
def test_a_changed_header_is_read_or_refused_within_bounds(
    folder: Path, chat: Path, changes: list[tuple[int, bytes]]
) -> None:
    data = bytearray(chat.read_bytes())
    for at, new in changes:
        data[at : at + len(new)] = new
    tracemalloc.start()
    try:
        model = read_bytes(folder, bytes(data))
        memory = gguf.memory(model, context=4096, slots=2)
        assert 0 <= memory.total_bytes < 2**80
        assert gguf.fits(model, free_bytes=0, context=4096, slots=2).reason
    except ValidationProblem:
        pass
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < MOST_MEMORY


@QUIET
@given(context=st.integers(1, 10**7), slots=st.integers(1, 64), more=st.integers(0, 10**6))
def test_more_context_never_takes_less_memory(chat: Path, context: int, slots: int, more: int) -> None:
    model = gguf.read(chat)
    less = gguf.memory(model, context=context, slots=slots)
    assert less.total_bytes <= gguf.memory(model, context=context + more, slots=slots).total_bytes
    assert less.total_bytes <= gguf.memory(model, context=context, slots=slots + 1).total_bytes
    assert gguf.memory(model, context=context, slots=slots, kv_type="q8_0").kv_bytes <= less.kv_bytes


def test_whether_a_model_fits_is_said_with_all_its_parts(chat: Path) -> None:
    model = gguf.read(chat)
    fit = gguf.fits(model, free_bytes=10**6, context=2048, slots=2)
    assert not fit.fits
    assert fit.reason == (
        "needs 140 MiB: 564 KiB of weights, 1.5 MiB of KV cache for 4096 tokens, 138 MiB overhead; "
        "this machine has 977 KiB free"
    )
    assert gguf.fits(model, free_bytes=2**30, context=2048, slots=2).fits
    with pytest.raises(ValidationProblem, match="'q1' is unknown"):
        gguf.memory(model, context=1, slots=1, kv_type="q1")


#: Loads a model with llama.cpp's own words about its buffers: file, tokens of all slots, slots, type of the cache.
LOAD = """
import os, sys, xllamacpp
wanted = xllamacpp.CommonParams()
wanted.model.path, wanted.n_parallel, wanted.n_ctx = sys.argv[1], int(sys.argv[3]), int(sys.argv[2])
wanted.fit_params, wanted.ui, wanted.cache_ram_mib, wanted.verbosity, wanted.port = False, False, 0, 5, 0
wanted.cache_type_k = wanted.cache_type_v = getattr(xllamacpp.ggml_type, "GGML_TYPE_" + sys.argv[4].upper())
server = xllamacpp.Server(wanted)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("context", "slots", "kv_type"), [(2048, 2, "f16"), (1000, 2, "f16"), (300, 3, "f32"), (512, 1, "q8_0")]
)
def test_the_memory_foretold_is_what_llama_cpp_takes(
    folder: Path, context: int, slots: int, kv_type: str
) -> None:  # fmt: skip
    need("llama")
    file = tiny_model.write_chat_model(folder / "wide.gguf", layers=6, width=256, heads=8, kv_heads=4)
    foretold = gguf.memory(gguf.read(file), context=context, slots=slots, kv_type=kv_type)
    command = [sys.executable, "-c", LOAD, str(file), str(context * slots), str(slots), kv_type]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    taken = {
        what: sum(float(found) for found in re.findall(rf"{what} buffer size = +([\d.]+) MiB", done.stderr))
        for what in ("model", "KV", "compute")
    }
    assert foretold.kv_bytes / 2**20 == pytest.approx(taken["KV"], abs=0.01)
    assert foretold.weights_bytes / 2**20 == pytest.approx(taken["model"], abs=0.02)
    assert 0 < taken["compute"] * 2**20 <= foretold.overhead_bytes - gguf.BASE_BYTES
