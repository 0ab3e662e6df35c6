"""An AI model as it is named, known by its hashes, and measured: what can be said of it without its files."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

#: What a model goes by: `llama3.1:8b`, `org/name`, a file's name; no spaces, nothing that would confuse a log.
ModelName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}$")]
#: The name of one file, without folders.
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,199}$")]
#: Either may be empty, where it is not known.
Sha256 = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?$")]
HttpsUrl = Annotated[str, Meta(pattern=r"^(https://[^\s\\@#]{1,2000})?$")]
#: What its files are: one GGUF file, or a repository of Hugging Face's form with `safetensors` in it.
ModelFormat = Literal["gguf", "safetensors"]

#: No file of a model is larger; more is a lie.
MAX_FILE_BYTES = 2**44
_Count = Annotated[int, Meta(ge=0, le=2**50)]
_Heads = Annotated[int, Meta(ge=0, le=2**24)]


class ModelFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One file; without a ``url`` it can only be found on a machine that has it, without a hash only by its owner."""

    name: FileName
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_FILE_BYTES)]
    sha256: Sha256 = ""
    url: HttpsUrl = ""


class AssignedModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model that a worker is to serve: its name, all of its files, and on which terms they may be used."""

    name: ModelName
    files: Annotated[tuple[ModelFile, ...], Meta(min_length=1, max_length=256)]
    licence: Annotated[str, Meta(max_length=100)] = ""
    licence_url: HttpsUrl = ""

    @property
    def size_bytes(self) -> int:
        """The bytes of all its files."""
        return sum(file.size_bytes for file in self.files)


class Geometry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What decides how much memory a model takes.

    ``kv_heads`` is one number for all layers or one for each, 0 where a layer keeps no keys and values; ``key_length``
    and ``value_length`` are values of one head; ``training_context`` and ``vocabulary`` are tokens. A number that
    nobody told is 0.
    """

    weights_bytes: Annotated[int, Meta(ge=1, le=MAX_FILE_BYTES)]
    layers: Annotated[int, Meta(ge=0, le=1024)] = 0
    kv_heads: _Heads | Annotated[tuple[_Heads, ...], Meta(max_length=1024)] = 0
    key_length: _Count = 0
    value_length: _Count = 0
    embedding_length: _Count = 0
    feed_forward_length: _Count = 0
    vocabulary: _Count = 0
    training_context: _Count = 0
    embeds: bool = False

    @property
    def kv_heads_of_all_layers(self) -> int:
        """The heads that keep keys and values, of all layers together."""
        return sum(self.kv_heads) if isinstance(self.kv_heads, tuple) else self.kv_heads * self.layers
