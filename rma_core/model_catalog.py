"""The models a pool offers: what each is, where its files lie, on which terms, and what it takes of a machine.

One TOML file a model, read by `load_models`; ``rma models describe FILE.gguf`` writes one. Which engine serves it is
said by the catalog's entries (`CatalogEntry.model_format`).
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from rma_core import gguf
from rma_core.catalog import Limits, Needs, ServiceName
from rma_core.errors import Problem, ValidationProblem
from rma_core.models.sizes import GIB, exact, human
from rma_core.models.strict import convert
from rma_core.models.weights import (
    AssignedModel,
    FileName,
    Geometry,
    HttpsUrl,
    ModelFile,
    ModelFormat,
    ModelName,
    Sha256,
)
from rma_core.models.worker import Assignment

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from rma_core.catalog import CatalogEntry, Room
    from rma_core.models.hardware import Device, DeviceApi

#: Models of one pool, and bytes of one file that describes one.
MAX_MODELS, MAX_FILE_BYTES = 2000, 256 * 1024
#: A model whose geometry nobody told takes this much more than its files, and so many bytes besides: the smaller
#: number for models below the bound.
UNKNOWN_SHARE = 0.2
UNKNOWN_BYTES, UNKNOWN_SMALL_BYTES, SMALL_BYTES = 2 * GIB, GIB // 2, 2 * GIB
#: The limit of a container's memory stands so much above what its model was reckoned to take.
LIMIT_SHARE = 1 / 4


class ServedModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A model as an engine serves it, under the ``name`` that clients ask for.

    ``context`` are tokens of one slot, ``slots`` the requests that one copy takes at once; ``needs`` stand beside what
    is reckoned from ``geometry`` or, without that, from the size of the files.
    """

    name: ModelName
    context: Annotated[int, Meta(ge=16, le=16_777_216)] = 4096
    slots: Annotated[int, Meta(ge=1, le=64)] = 2
    kv_type: Literal["f16", "f32", "q8_0", "q4_0"] = "f16"
    needs: Needs = msgspec.field(default_factory=lambda: Needs(cpu_cores=0))
    geometry: Geometry | None = None

    def parts(self) -> tuple[ModelFile, ...]:
        """Return its files, each with all that is known of it."""
        raise NotImplementedError

    def assigned(self) -> AssignedModel:
        """Return it as it is sent to a worker."""
        return AssignedModel(name=self.name, files=self.parts())

    @property
    def all_bytes(self) -> int:
        """The bytes of all its files."""
        return sum(file.size_bytes for file in self.parts())

    @property
    def environment(self) -> dict[str, str]:
        """What an engine is told of it; where its files are, only the machine knows."""
        embeds = {"EMBEDDINGS": "1"} if self.geometry and self.geometry.embeds else {}
        cache = {"KV_TYPE": self.kv_type} if self.kv_type != "f16" else {}
        return {"MODEL": self.name, "CONTEXT": str(self.context), "SLOTS": str(self.slots), **embeds, **cache}

    def memory(self) -> Estimate:
        """Return what it takes in use."""
        if self.geometry is not None:
            found = gguf.memory(self.geometry, context=self.context, slots=self.slots, kv_type=self.kv_type)
            return Estimate(found.total_bytes, str(found).partition(": ")[2])
        size = self.all_bytes
        besides = UNKNOWN_SMALL_BYTES if size < SMALL_BYTES else UNKNOWN_BYTES
        words = f"{human(size)} of files, and a fifth of that and {human(besides)} as its geometry is not told"
        return Estimate(int(size * (1 + UNKNOWN_SHARE)) + besides, words)


class ModelEntry(ServedModel, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One model of the pool.

    It has one file (``url``, ``sha256``, ``size_bytes``) or those of a ``repository`` at a ``revision`` (``files``); a
    file without ``url`` is never downloaded, only found on machines that have it. ``wanted`` are the copies that the
    pool would like.
    """

    service: ServiceName = "llm"
    format: ModelFormat = "gguf"
    url: HttpsUrl = ""
    sha256: Sha256 = ""
    size_bytes: Annotated[int, Meta(ge=0, le=2**44)] = 0
    repository: HttpsUrl = ""
    revision: Annotated[str, Meta(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,99})?$")] = ""
    files: Annotated[tuple[ModelFile, ...], Meta(max_length=256)] = ()
    licence: Annotated[str, Meta(min_length=1, max_length=100)]
    licence_url: HttpsUrl = ""
    wanted: Annotated[int, Meta(ge=0, le=100_000)] = 1

    def __post_init__(self) -> None:
        """Refuse a model whose files are not all told, with their hashes."""
        if bool(self.repository) == bool(self.sha256 or self.url):
            raise ValueError("either a file (`sha256`, `size_bytes`, `url`) or a `repository` is needed")
        if self.repository and not (self.revision and self.files):
            raise ValueError("a repository needs a `revision`, and `files` with their hashes")
        if not self.repository and not (self.sha256 and self.size_bytes):
            raise ValueError("a file needs `sha256` and `size_bytes`")
        if any(not file.sha256 for file in self.files):
            raise ValueError("every one of `files` needs its `sha256`")
        if len({file.name for file in self.files}) < len(self.files):
            raise ValueError("two of `files` have the same name")
        if self.format == "gguf" and len(self.files) > 1:
            raise ValueError("a GGUF model is one file: `llama-gguf-split --merge` makes one of several")

    def assigned(self) -> AssignedModel:
        """Return it as it is sent to a worker."""
        return AssignedModel(
            name=self.name, files=self.parts(), licence=self.licence, licence_url=self.licence_url
        )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """What an engine is told of it; where its files are, only the machine knows."""
        return super().environment | ({"MODEL_SHA256": self.sha256} if self.sha256 else {})

    def parts(self) -> tuple[ModelFile, ...]:
        """Return its files, each with its hash and where it can be had."""
        if not self.repository:
            name = file_name(urlsplit(self.url).path.rpartition("/")[2] or f"{self.name}.{self.format}")
            return (ModelFile(name=name, size_bytes=self.size_bytes, sha256=self.sha256, url=self.url),)
        base = f"{self.repository.rstrip('/')}/resolve/{self.revision}/"
        return tuple(msgspec.structs.replace(file, url=file.url or base + file.name) for file in self.files)


class Estimate(NamedTuple):
    """Bytes that a model takes in use, and the parts they are made of, in words."""

    total_bytes: int
    words: str


class Fitting(NamedTuple):
    """How a model is served on a machine: with which needs, in a container or not, by which image, on which GPU."""

    needs: Needs
    limits: Limits
    contained: bool
    image: str
    gpu: Device | None


def file_name(text: str) -> FileName:
    """Return a text as the name of a file."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._+-") else "-" for c in text)[-200:]
    return kept.lstrip("._+-") or "model"


# -- reading -------------------------------------------------------------------------------------------------------


def load_model(path: Path) -> ModelEntry:
    """Read one model's file. Raises ValidationProblem, which names the file and every problem."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
        if len(text) > MAX_FILE_BYTES:
            raise ValidationProblem(str(path), [Problem("file", f"is longer than {MAX_FILE_BYTES} bytes")])
        data = tomllib.loads(text.decode())
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise ValidationProblem(str(path), [Problem("file", str(error))]) from None
    return convert(data, ModelEntry, subject=str(path))


def load_models(folder: Path) -> tuple[ModelEntry, ...]:
    """Read every ``*.toml`` in ``folder``, by name; none where there is no such folder.

    Raises ValidationProblem, also when one name stands twice for one format.
    """
    entries: dict[tuple[str, str], ModelEntry] = {}
    paths = sorted(folder.glob("*.toml"))
    if len(paths) > MAX_MODELS:
        raise ValidationProblem(str(folder), [Problem("folder", f"has more than {MAX_MODELS} models")])
    for path in paths:
        entry = load_model(path)
        if (entry.name, entry.format) in entries:
            raise ValidationProblem(str(path), [Problem("$.name", f"{entry.name!r} is described twice")])
        entries[entry.name, entry.format] = entry
    return tuple(entries[key] for key in sorted(entries))


# -- fitting -------------------------------------------------------------------------------------------------------


def fitting(
    engine: CatalogEntry, model: ServedModel, room: Room, forms: Collection[bool], *, there: bool = False
) -> Fitting | str:  # fmt: skip
    """Return how an engine can serve a model in what is left of a machine, or the sentence that says why it cannot.

    ``forms`` is how the engine can run there: ``True`` as a container, ``False`` as a process. GPUs come before main
    memory. ``there``: its files are on the machine already and take no more of its disk.
    """
    estimate = model.memory()
    reasons = []
    for contained, api in _ways(engine, forms):
        needs = _needs(engine, model, estimate, api)
        asked = msgspec.structs.replace(needs, storage="0B") if there else needs
        reason = room.lacks(asked, contained=contained)
        if not reason:
            return _fitted(engine, room, needs, contained=contained)
        reasons.append(reason)
    why = reasons[-1] if reasons else "no engine for it works here"
    return f"{why} ({estimate.words})"


def _ways(engine: CatalogEntry, forms: Collection[bool]) -> list[tuple[bool, tuple[DeviceApi, ...]]]:
    """Return container or process with the APIs of the GPUs it can use there, then both without, where that will do."""
    images = tuple(engine.gpu_images) or engine.needs.gpu_api
    process = engine.process.gpu_api if engine.process else ()
    with_gpu = [(contained, images if contained else process) for contained in forms]
    without = [] if engine.needs.gpu else [(contained, ()) for contained in forms]
    return [way for way in with_gpu if way[1]] + without


def _needs(engine: CatalogEntry, model: ServedModel, estimate: Estimate, api: tuple[DeviceApi, ...]) -> Needs:
    own, base = model.needs, engine.needs
    gpu_bytes = max(estimate.total_bytes, own.gpu_memory_bytes, base.gpu_memory_bytes) if api else 0
    # On a GPU the weights pass through main memory, which keeps what the engine itself takes.
    main_bytes = base.memory_bytes if api else base.memory_bytes + estimate.total_bytes
    allowed = tuple(one for one in api if not own.gpu_api or one in own.gpu_api)
    return Needs(
        cpu_cores=max(base.cpu_cores, own.cpu_cores),
        memory=exact(max(main_bytes, own.memory_bytes)),
        storage=exact(base.storage_bytes + max(model.all_bytes, own.storage_bytes)),
        gpu_memory=exact(gpu_bytes),
        gpu_api=allowed,
        os=_both(base.os, own.os),
        architecture=_both(base.architecture, own.architecture),
    )


def _both(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    """Return what two lists of allowed names allow together, where an empty one allows all."""
    if not one or not other:
        return one or other
    return tuple(name for name in one if name in other) or ("none",)


def _fitted(engine: CatalogEntry, room: Room, needs: Needs, *, contained: bool) -> Fitting:
    gpu = room.gpu_for(needs, contained=contained)
    if gpu is not None and engine.whole_gpu and gpu.memory_bytes:
        needs = msgspec.structs.replace(needs, gpu_memory=exact(gpu.memory_bytes))
    image = engine.gpu_images.get(gpu.api, engine.image) if gpu is not None and gpu.api else engine.image
    most = needs.memory_bytes if gpu is None else max(engine.limits.memory_bytes, needs.memory_bytes)
    limits = msgspec.structs.replace(engine.limits, memory=exact(int(most * (1 + LIMIT_SHARE))))
    return Fitting(needs, limits, contained, image, gpu)


def model_assignment(engine: CatalogEntry, model: ServedModel, fit: Fitting, *, env: Mapping[str, str]) -> Assignment:
    """Return a model as it is sent to a worker with its engine; ``env`` is the pool's and wins over all else."""
    return Assignment(
        name=container_name(engine.name, model.name),
        service=engine.service,
        image=fit.image,
        # It names one image; the builds for GPUs are others.
        image_digest=engine.image_digest if fit.image == engine.image else None,
        port=engine.port,
        requires_gpu=fit.gpu is not None,
        env={**engine.env, **model.environment, **env},
        health_path=engine.health_path,
        start_timeout_s=engine.start_timeout_s,
        routes=engine.routes,
        slots=model.slots,
        needs=fit.needs,
        limits=fit.limits,
        process=engine.process,
        trusted=engine.trusted,
        model=model.assigned(),
    )


def container_name(engine: str, model: str) -> str:
    """Return the name of the container in which an engine serves a model: the same for the same, and for no others."""
    words = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    mark = hashlib.sha256(model.encode()).hexdigest()[:6]
    return f"{engine[:24]}-{words[:30].rstrip('-')}-{mark}"
