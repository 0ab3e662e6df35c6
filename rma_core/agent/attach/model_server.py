"""What a model server says of itself: which one it is, its models and its slots, read from its own small answers.

KoboldCpp is told by `/api/extra/version`, llama.cpp by `/props`, Ollama by `/api/version` or `/api/tags`, LM Studio by
`/api/v0/models`; anything else must have OpenAI's `/v1/models`. Whatever it answers is taken as hostile: limited in
size and time, decoded strictly. Nothing that is asked here makes a server load a model, or keep one loaded.
"""

from __future__ import annotations

import asyncio
import re
import typing
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rma_core.agent.attach import ollama_look
from rma_core.agent.attach.asking import OK, UNAVAILABLE, capabilities, get, read, tokens
from rma_core.agent.incoming import EndpointError
from rma_core.models.weights import ModelName
from rma_core.models.worker import ModelStatus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from rma_core.agent.attach.ollama_look import Known, Shown
    from rma_core.agent.endpoint import Client

#: Seconds for everything that is asked of a server in one look.
LOOK_TIMEOUT_S = 10.0
#: Models that one server can share; a heartbeat lists no more.
MAX_MODELS = 64
#: Names of models that a sentence of the log quotes, and the characters of each.
QUOTED, QUOTED_CHARS = 5, 60

LLAMA_CPP, OLLAMA, LM_STUDIO, PLAIN = "llama.cpp", "Ollama", "LM Studio", "OpenAI-compatible server"
KOBOLD_CPP = "KoboldCpp"
#: Who says so in ``owned_by`` of its models.
OWNERS = {"vllm": "vLLM", "sglang": "SGLang", "llamacpp": LLAMA_CPP}
#: Why a model is left out.
NAMELESS, ELSEWHERE, TOO_MANY = (
    "with a name that cannot be passed on",
    "run elsewhere",
    f"beyond the first {MAX_MODELS}",
)

_NAME = re.compile(typing.get_args(ModelName)[1].pattern)


class StillLoading(EndpointError):
    """The server is there, and loads its model."""

    code = "still_loading"


class Found(NamedTuple):
    """One look at a server: ``server`` for people, ``way`` how it was asked; ``left_out`` are names by reason.

    ``ollama`` is what an Ollama says beyond that, and changes from look to look.
    """

    way: str
    server: str
    models: tuple[ModelStatus, ...]
    slots: int = 1
    left_out: tuple[tuple[str, tuple[str, ...]], ...] = ()
    ollama: Known | None = None

    @property
    def missing(self) -> str:
        """How many of its models are left out and why, without their names; an empty string when none are."""
        return ", ".join(f"{len(names)} {reason}" for reason, names in self.left_out)


class _Props(msgspec.Struct):
    total_slots: int
    n_ctx: Any = None
    default_generation_settings: Any = None
    is_sleeping: Any = False
    modalities: Any = None
    chat_template_caps: Any = None


class _Listed(msgspec.Struct):
    id: str
    owned_by: Any = None
    max_model_len: Any = None


class _Models(msgspec.Struct):
    data: list[_Listed]
    # llama.cpp lists them a second time, as Ollama does.
    models: Any = None


class _Slot(msgspec.Struct):
    is_processing: bool


class _Kobold(msgspec.Struct):
    result: str


class _StudioModel(msgspec.Struct):
    id: str
    state: str
    loaded_context_length: Any = None
    type: Any = None
    capabilities: Any = None


class _StudioModels(msgspec.Struct):
    data: list[_StudioModel]


async def look(
    endpoint: Client, way: str = "", shown: dict[str, Shown] | None = None, *, within_s: float | None = None
) -> Found:
    """Ask a server what it is and has; ``way`` is how it was asked the last time, and is tried first.

    ``shown`` remembers what models' files say, from one look to the next; without it nobody is asked for that. Raises
    EndpointError with the reason, StillLoading, TimeoutError after ``within_s`` (LOOK_TIMEOUT_S).
    """
    order = sorted(WAYS, key=lambda one: one != way)
    async with asyncio.timeout(LOOK_TIMEOUT_S if within_s is None else within_s):
        for one in order:
            if (found := await WAYS[one](endpoint, shown)) is not None:
                return found
    raise EndpointError("it is no model server that is known: GET /v1/models gave no list of models")


async def at_work(endpoint: Client) -> int | None:
    """Return how many slots of a llama.cpp are at work, nothing where it does not say.

    To it this is work: it wakes a server that sleeps, and keeps one awake that would go to sleep.
    """
    try:
        status, body = await get(endpoint, "/slots")
        return sum(slot.is_processing for slot in _slots(body)) if status == OK else None
    except (EndpointError, msgspec.MsgspecError, UnicodeError, RecursionError):
        # Old ones repeat every prompt here, which can be too much. One that is away says so to what is asked next.
        return None


_slots = msgspec.json.Decoder(list[_Slot]).decode


async def _kobold_cpp(endpoint: Client, _: dict[str, Shown] | None) -> Found | None:
    # It answers to the names of all the others, too.
    told = read((await get(endpoint, "/api/extra/version"))[1], _Kobold)
    if told is None or told.result != KOBOLD_CPP:
        return None
    listed = read((await get(endpoint, "/v1/models"))[1], _Models)
    if listed is None:
        raise EndpointError(f"it is {KOBOLD_CPP}, but GET /v1/models gave no list of models")
    return _found(KOBOLD_CPP, KOBOLD_CPP, [ModelStatus(name=one.id) for one in listed.data])


async def _llama_cpp(endpoint: Client, _: dict[str, Shown] | None) -> Found | None:
    status, body = await get(endpoint, "/props")
    if status == UNAVAILABLE and b"Loading model" in body:
        raise StillLoading("it loads its model")
    props = read(body, _Props) if status == OK else None
    if props is None:
        return None
    defaults = props.default_generation_settings
    context = props.n_ctx if props.n_ctx is not None else defaults.get("n_ctx") if isinstance(defaults, dict) else None
    listed = read((await get(endpoint, "/v1/models"))[1], _Models)
    if listed is None:
        raise EndpointError("it is llama.cpp, but GET /v1/models gave no list of models")
    state: typing.Literal["cold", "loaded"] = "cold" if props.is_sleeping is True else "loaded"
    # It serves one model under any name, and often gives a path of this machine as its own.
    told = listed.models[0] if isinstance(listed.models, list) and listed.models else None
    said = told.get("capabilities") if isinstance(told, dict) else None
    can = capabilities(said, props.modalities, props.chat_template_caps)
    found = [
        ModelStatus(name=_file_name(one.id), state=state, context=tokens(context), capabilities=can)
        for one in listed.data
    ]
    return _found(LLAMA_CPP, LLAMA_CPP, found, slots=max(1, props.total_slots))


async def _ollama(endpoint: Client, shown: dict[str, Shown] | None) -> Found | None:
    listing = await ollama_look.listing(endpoint, shown)
    if listing is None:
        return None
    known = listing.known
    found = [
        ModelStatus(
            name=name,
            state="loaded" if name in known.loaded else "cold",
            context=(known.loaded[name].context if name in known.loaded else 0) or known.of(name).context,
            capabilities=known.of(name).can or can,
        )
        for name, can in listing.local.items()
    ]
    return _found(OLLAMA, OLLAMA, found, left_out={ELSEWHERE: list(listing.elsewhere)})._replace(ollama=known)


async def _lm_studio(endpoint: Client, _: dict[str, Shown] | None) -> Found | None:
    listed = read((await get(endpoint, "/api/v0/models"))[1], _StudioModels)
    if listed is None:
        return None
    found = [
        ModelStatus(
            name=one.id,
            state="loaded" if one.state == "loaded" else "cold",
            context=tokens(one.loaded_context_length),
            capabilities=capabilities([one.type], one.capabilities),
        )
        for one in listed.data
    ]
    return _found(LM_STUDIO, LM_STUDIO, found)


async def _plain(endpoint: Client, _: dict[str, Shown] | None) -> Found | None:
    status, body = await get(endpoint, "/v1/models")
    if status != OK:
        raise EndpointError(f"GET /v1/models answered {status}")
    listed = read(body, _Models)
    if listed is None:
        return None
    owners = {one.owned_by for one in listed.data if isinstance(one.owned_by, str)}
    server = next((name for owner, name in OWNERS.items() if owner in owners), PLAIN)
    found = [ModelStatus(name=one.id, context=tokens(one.max_model_len)) for one in listed.data]
    return _found(PLAIN, server, found)


#: How each is asked, in the order in which they are tried.
WAYS: dict[str, Callable[[Client, dict[str, Shown] | None], Awaitable[Found | None]]] = {
    KOBOLD_CPP: _kobold_cpp,
    LLAMA_CPP: _llama_cpp,
    OLLAMA: _ollama,
    LM_STUDIO: _lm_studio,
    PLAIN: _plain,
}


def _found(
    way: str,
    server: str,
    models: Sequence[ModelStatus],
    *,
    slots: int = 1,
    left_out: dict[str, list[str]] | None = None,
) -> Found:
    """Return what was found, with each model once, and those left out that the pool cannot be told of."""
    # msgspec checks a record that is decoded, not one that is made: what a server says is looked at here.
    good = {one.name: one for one in models if _NAME.fullmatch(one.name)}
    # The loaded ones first: they are the last to be left out.
    ordered = sorted(good.values(), key=lambda one: one.state != "loaded")
    missing = {
        **(left_out or {}),
        NAMELESS: [one.name for one in models if one.name not in good],
        TOO_MANY: [one.name for one in ordered[MAX_MODELS:]],
    }
    gone = tuple((reason, tuple(names)) for reason, names in missing.items() if names)
    return Found(way, server, tuple(ordered[:MAX_MODELS]), slots, gone)


def quoted(names: tuple[str, ...]) -> str:
    """Return a few names as a log may show them, whatever is in them."""
    shown = [repr(name[:QUOTED_CHARS]) for name in names[:QUOTED]]
    return ", ".join(shown) + (", …" if len(names) > QUOTED else "")


def _file_name(name: str) -> str:
    """Return what a path ends in: the folders of this machine are nobody's business."""
    return re.split(r"[/\\]", name)[-1] if re.match(r"[/\\.~]|[A-Za-z]:\\", name) else name
