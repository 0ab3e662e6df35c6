"""Models that the owner has as files anyway and offers: found, read, and offered where they fit this machine.

Nobody assigns them and nothing is downloaded; the pool learns their names. They are served by llama.cpp, as what the
pool assigns is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl

import msgspec

from rma_core import gguf
from rma_core.agent.keeper import ENGINE_WAIT_S
from rma_core.catalog import CatalogEntry, Limits, Needs, ProcessForm, Room
from rma_core.errors import UsageProblem, ValidationProblem
from rma_core.model_catalog import ServedModel, container_name, file_name, fitting, model_assignment
from rma_core.models.weights import Geometry, ModelFile

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from rma_core.agent.engines import Engine
    from rma_core.agent.reconcile import Reconciler
    from rma_core.gguf import Model
    from rma_core.models.hardware import HardwareReport
    from rma_core.models.worker import Assignment, RuntimeReport

logger = logging.getLogger(__name__)

#: Files that are offered at most: each costs a process or container that waits for requests.
MAX_OWN = 16
#: Folders that are looked into below one that the owner names, and files that are looked at.
MAX_FOLDERS, MAX_FILES = 256, 1000
#: Tokens of one slot, and requests at once, where the owner says nothing.
CONTEXT, SLOTS = 4096, 2
#: Architectures that are no language model but a part of one.
PARTS = frozenset({"clip", "mmproj", "adapter"})
#: How llama.cpp is run; the same as its entry in the catalog says.
LLAMA_CPP = CatalogEntry(
    service="llm",
    name="rma-llama-cpp-worker",
    image="ghcr.io/rma/llama-cpp-worker:0.1.0",
    routes=("POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings"),
    slots=2,
    tiers=(2, 1),
    start_timeout_s=120,
    timeout_s=3600,
    first_byte_s=600,
    model_format="gguf",
    gpu_images={
        "cuda": "ghcr.io/rma/llama-cpp-cuda-worker:0.1.0",
        "rocm": "ghcr.io/rma/llama-cpp-rocm-worker:0.1.0",
        "vulkan": "ghcr.io/rma/llama-cpp-vulkan-worker:0.1.0",
    },
    needs=Needs(cpu_cores=1, storage="500MB", os=("linux", "darwin", "windows"), architecture=("x86_64", "arm64")),
    limits=Limits(memory="2GB", cpus=8.0, pids=128, tmp="64MB"),
    process=ProcessForm(distribution="rma-llama-cpp", module="rma_llama_cpp", gpu_api=("metal",)),
)

_HINT = 'models = ["FOLDER", "NAME=FILE.gguf"], with #context=8192&slots=1 behind it where you like'


class OwnFile(NamedTuple):
    """One file as the owner gave it; ``name`` is empty where it is the file's own."""

    path: Path
    name: str = ""
    context: int = CONTEXT
    slots: int = SLOTS

    @property
    def text(self) -> str:
        """What an owner writes who means this, wherever it is read."""
        name = f"{self.name}=" if self.name else ""
        return f"{name}{self.path}#context={self.context}&slots={self.slots}"


class OwnModel(ServedModel, frozen=True, kw_only=True):
    """A model in a file of the owner's; what its hash is does not matter to anybody."""

    file: ModelFile

    def parts(self) -> tuple[ModelFile, ...]:
        """Return its one file."""
        return (self.file,)


class Offered(NamedTuple):
    """What the owner offers: assignments of this machine's own, their models' files, and why others are left out."""

    assignments: tuple[Assignment, ...]
    paths: dict[str, Path]
    left_out: tuple[str, ...]


# -- what the owner says -------------------------------------------------------------------------------------------


def own_files(texts: Iterable[str]) -> tuple[OwnFile, ...]:
    """Return the files and folders that the owner names. Raises UsageProblem for what cannot be one."""
    return tuple(_own_file(text) for text in texts)


def _own_file(text: str) -> OwnFile:
    place, _, options = text.strip().partition("#")
    name, named, path = place.partition("=")
    # A path may have a "=" in it, and a name a "/".
    if not named or name.startswith(("/", ".", "~")) or "\\" in name or _path(text, place).exists():
        name, path = "", place
    if not path:
        raise UsageProblem(f"{text!r} names no file or folder of models", hints=(_HINT,))
    given = dict(parse_qsl(options, keep_blank_values=True))
    unknown = sorted(given.keys() - {"context", "slots"})
    if unknown or (options and not given):
        raise UsageProblem(f"{text!r}: only `context` and `slots` may stand behind the #", hints=(_HINT,))
    made = OwnFile(
        _path(text, path).absolute(), name,
        _number(text, "context", given.get("context", str(CONTEXT)), range(16, 16_777_217)),
        _number(text, "slots", given.get("slots", str(SLOTS)), range(1, 65)),
    )  # fmt: skip
    try:
        if name:
            msgspec.convert({"name": name, "file": {"name": "x", "size_bytes": 1}}, OwnModel)
    except msgspec.ValidationError:
        raise UsageProblem(f"{name!r} is no name that a client could ask for", hints=(_HINT,)) from None
    return made


def _path(text: str, words: str) -> Path:
    try:
        return Path(words).expanduser()
    except RuntimeError:
        raise UsageProblem(f"{text!r}: there is no such home folder", hints=(_HINT,)) from None


def _number(text: str, name: str, word: str, allowed: range) -> int:
    if not (word.isascii() and word.isdecimal() and int(word[:12]) in allowed):
        message = f"{text!r}: {name} is a number from {allowed.start} to {allowed.stop - 1}"
        raise UsageProblem(message, hints=(_HINT,))
    return int(word)


# -- what there is -------------------------------------------------------------------------------------------------


def found(files: Iterable[OwnFile]) -> Iterator[OwnFile]:
    """Yield every file of a model: those that are named, and those in the folders that are named."""
    for one in files:
        if one.path.is_dir():
            yield from (one._replace(path=path, name="") for path in _in_folder(one.path))
        else:
            yield one


def _in_folder(folder: Path) -> list[Path]:
    """Return the GGUF files below a folder; links to other folders are not followed."""
    paths: list[Path] = []
    for number, (place, _, names) in enumerate(os.walk(folder)):
        paths += [Path(place, name) for name in names if name.lower().endswith(".gguf")]
        if number >= MAX_FOLDERS or len(paths) >= MAX_FILES:
            break
    return sorted(paths)[:MAX_FILES]


def offered(
    files: Iterable[OwnFile], report: HardwareReport, runtimes: Collection[RuntimeReport]
) -> Offered:  # fmt: skip
    """Return what of the owner's files this machine can serve, and a sentence for each that it cannot."""
    assignments: list[Assignment] = []
    paths: dict[str, Path] = {}
    left_out: list[str] = []
    for one in found(files):
        try:
            model = read(one)
        except ValidationProblem as error:
            left_out.append(str(error))
            continue
        if model is None or model.name in paths:
            continue
        if len(paths) >= MAX_OWN:
            left_out.append(f"{one.path}: only the first {MAX_OWN} models are offered")
            break
        made = _assignment(model, report, runtimes)
        if isinstance(made, str):
            left_out.append(f"{one.path}: {made}")
            continue
        assignments.append(made)
        paths[model.name] = one.path
    return Offered(tuple(assignments), paths, tuple(left_out))


def read(one: OwnFile) -> OwnModel | None:
    """Return the model in a file, ``None`` for a file that is only a part of one. Raises ValidationProblem."""
    found = gguf.read(one.path)
    if found.architecture in PARTS:
        return None
    context = min(one.context, found.training_context or one.context)
    file = ModelFile(name=file_name(one.path.name), size_bytes=found.file_bytes)
    return OwnModel(
        name=one.name or file_name(re.sub(r"\.gguf$", "", one.path.name, flags=re.IGNORECASE)),
        context=max(16, context), slots=one.slots, geometry=_geometry(found), file=file,
    )  # fmt: skip


def _geometry(model: Model) -> Geometry:
    return Geometry(**{name: getattr(model, name) for name in Geometry.__struct_fields__})


def _assignment(model: OwnModel, report: HardwareReport, runtimes: Collection[RuntimeReport]) -> Assignment | str:
    """Return how this machine serves a model that has it to itself, or why it cannot."""
    usable = [one for one in runtimes if one.state == "healthy"]
    forms = [form for form in (True, False) if any(one.isolated is form for one in usable)]
    if not forms:
        return "no engine works here: " + (
            "; ".join(f"{one.name}: {one.reason}" for one in runtimes) or "none is named"
        )
    fit = fitting(LLAMA_CPP, model, Room.of(report), forms, there=not any(forms))
    if isinstance(fit, str):
        return fit
    # Under a name that nothing the pool assigns has.
    name = container_name("own", model.name)
    return msgspec.structs.replace(model_assignment(LLAMA_CPP, model, fit, env={}), name=name)


class OwnModels:
    """Keeps offering what the owner shares; false when that is nothing."""

    def __init__(
        self, texts: Iterable[str], report: HardwareReport, engines: Sequence[Engine], containers: Reconciler
    ) -> None:  # fmt: skip
        self._files = own_files(texts)
        self._report, self._engines, self._containers = report, engines, containers
        self.offered = Offered((), {}, ())

    def __bool__(self) -> bool:
        return bool(self._files)

    async def look(self) -> None:
        """Look at the files, and offer those that this machine can serve."""
        reports = [engine.report() for engine in self._engines]
        before, self.offered = self.offered, await asyncio.to_thread(offered, self._files, self._report, reports)
        self._containers.files.own = dict(self.offered.paths)
        self._containers.offer(self.offered.assignments)
        for words in sorted(set(self.offered.left_out) - set(before.left_out)):
            logger.warning("not offered: %s", words, extra={"action": "model_left_out"})

    async def measure(self, report: HardwareReport) -> None:
        """Go by other hardware from now on."""
        self._report = report
        await self.look()

    async def run(self) -> None:
        """Look again when an engine has come or gone, until cancelled."""
        seen = [engine.health.state for engine in self._engines]
        while True:
            await asyncio.sleep(ENGINE_WAIT_S)
            now = [engine.health.state for engine in self._engines]
            if now != seen:
                seen = now
                await self.look()
