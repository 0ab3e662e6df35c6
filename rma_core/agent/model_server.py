"""What a model server says of itself: which one it is, its models and its slots, read from its own small answers.

llama.cpp is told by `/props`, Ollama by `/api/version` or `/api/tags`, LM Studio by `/api/v0/models`; anything else
must have OpenAI's `/v1/models`. Whatever it answers is taken as hostile: limited in size and time, decoded strictly.
"""

from __future__ import annotations

import asyncio
import re
import typing
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rma_core.agent.incoming import EndpointError
from rma_core.errors import ValidationProblem
from rma_core.models.strict import decode
from rma_core.models.worker import ModelName, ModelStatus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from rma_core.agent.endpoint import Endpoint

#: Seconds for everything that is asked of a server in one look, and bytes of one answer.
LOOK_TIMEOUT_S, MAX_ANSWER_BYTES = 10.0, 1024 * 1024
#: Models that one server can share; a heartbeat lists no more.
MAX_MODELS = 64
#: Tokens of a context at most; more is nonsense.
MAX_CONTEXT = 2**31
#: What models can do, in Ollama's words, and what others call that.
CAPABILITIES = ("completion", "embedding", "vision", "audio", "tools", "thinking")
ALSO_CALLED = {
    "embeddings": "embedding", "llm": "completion", "supports_tools": "tools", "tool_use": "tools", "vlm": "vision",
}  # fmt: skip
#: Names of models that a sentence of the log quotes, and the characters of each.
QUOTED, QUOTED_CHARS = 5, 60
OK, NOT_AUTHENTICATED, FORBIDDEN, UNAVAILABLE = 200, 401, 403, 503

LLAMA_CPP, OLLAMA, LM_STUDIO, PLAIN = "llama.cpp", "Ollama", "LM Studio", "OpenAI-compatible server"
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
    """One look at a server: ``server`` for people, ``way`` how it was asked; ``left_out`` are names by reason."""

    way: str
    server: str
    models: tuple[ModelStatus, ...]
    slots: int = 1
    left_out: tuple[tuple[str, tuple[str, ...]], ...] = ()

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


class _Version(msgspec.Struct):
    version: str


class _Tag(msgspec.Struct):
    name: str
    remote_host: Any = None
    context_length: Any = None
    capabilities: Any = None


class _Tags(msgspec.Struct):
    # An Ollama without models has been seen to say null.
    models: list[_Tag] | None


class _StudioModel(msgspec.Struct):
    id: str
    state: str
    loaded_context_length: Any = None
    type: Any = None
    capabilities: Any = None


class _StudioModels(msgspec.Struct):
    data: list[_StudioModel]


T = typing.TypeVar("T", bound=msgspec.Struct)


async def look(endpoint: Endpoint, way: str = "") -> Found:
    """Ask a server what it is and has; ``way`` is how it was asked the last time, and is tried first.

    Raises EndpointError with the reason, StillLoading, TimeoutError after LOOK_TIMEOUT_S.
    """
    order = sorted(WAYS, key=lambda one: one != way)
    async with asyncio.timeout(LOOK_TIMEOUT_S):
        for one in order:
            if (found := await WAYS[one](endpoint)) is not None:
                return found
    raise EndpointError("it is no model server that is known: GET /v1/models gave no list of models")


async def _llama_cpp(endpoint: Endpoint) -> Found | None:
    status, body = await _get(endpoint, "/props")
    if status == UNAVAILABLE and b"Loading model" in body:
        raise StillLoading("it loads its model")
    props = _read(body, _Props) if status == OK else None
    if props is None:
        return None
    defaults = props.default_generation_settings
    context = props.n_ctx if props.n_ctx is not None else defaults.get("n_ctx") if isinstance(defaults, dict) else None
    listed = _read((await _get(endpoint, "/v1/models"))[1], _Models)
    if listed is None:
        raise EndpointError("it is llama.cpp, but GET /v1/models gave no list of models")
    state: typing.Literal["cold", "loaded"] = "cold" if props.is_sleeping is True else "loaded"
    # It serves one model under any name, and often gives a path of this machine as its own.
    told = listed.models[0] if isinstance(listed.models, list) and listed.models else None
    said = told.get("capabilities") if isinstance(told, dict) else None
    can = _capabilities(said, props.modalities, props.chat_template_caps)
    found = [
        ModelStatus(name=_file_name(one.id), state=state, context=_tokens(context), capabilities=can)
        for one in listed.data
    ]
    return _found(LLAMA_CPP, LLAMA_CPP, found, slots=max(1, props.total_slots))


async def _ollama(endpoint: Endpoint) -> Found | None:
    told = _read((await _get(endpoint, "/api/version"))[1], _Version)
    tags = _read((await _get(endpoint, "/api/tags"))[1], _Tags)
    if tags is None:
        if told is not None:
            raise EndpointError("it is Ollama, but GET /api/tags gave no list of models")
        return None
    running = _read((await _get(endpoint, "/api/ps"))[1], _Tags)
    loaded = {one.name: _tokens(one.context_length) for one in (running.models if running else None) or ()}
    local = [one for one in tags.models or () if not one.remote_host]
    found = [
        ModelStatus(
            name=one.name,
            state="loaded" if one.name in loaded else "cold",
            context=loaded.get(one.name, 0),
            capabilities=_capabilities(one.capabilities),
        )
        for one in local
    ]
    # What Ollama only passes on to a computer elsewhere, on its owner's account, is not this machine's to share.
    remote = [one.name for one in tags.models or () if one.remote_host]
    return _found(OLLAMA, OLLAMA, found, left_out={ELSEWHERE: remote})


async def _lm_studio(endpoint: Endpoint) -> Found | None:
    listed = _read((await _get(endpoint, "/api/v0/models"))[1], _StudioModels)
    if listed is None:
        return None
    found = [
        ModelStatus(
            name=one.id,
            state="loaded" if one.state == "loaded" else "cold",
            context=_tokens(one.loaded_context_length),
            capabilities=_capabilities([one.type], one.capabilities),
        )
        for one in listed.data
    ]
    return _found(LM_STUDIO, LM_STUDIO, found)


async def _plain(endpoint: Endpoint) -> Found | None:
    status, body = await _get(endpoint, "/v1/models")
    if status != OK:
        raise EndpointError(f"GET /v1/models answered {status}")
    listed = _read(body, _Models)
    if listed is None:
        return None
    owners = {one.owned_by for one in listed.data if isinstance(one.owned_by, str)}
    server = next((name for owner, name in OWNERS.items() if owner in owners), PLAIN)
    found = [ModelStatus(name=one.id, context=_tokens(one.max_model_len)) for one in listed.data]
    return _found(PLAIN, server, found)


#: How each is asked, in the order in which they are tried.
WAYS: dict[str, Callable[[Endpoint], Awaitable[Found | None]]] = {
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


async def _get(endpoint: Endpoint, path: str) -> tuple[int, bytes]:
    """Return the status and the body of an answer, no body where that means nothing. Raises EndpointError."""
    answer = await endpoint.request("GET", path, headers=(("accept", "application/json"),))
    try:
        if answer.status in (NOT_AUTHENTICATED, FORBIDDEN):
            raise EndpointError("it wants an API key, and none can be given to it")
        body = bytearray()
        if answer.status in (OK, UNAVAILABLE):
            while data := await answer.read(MAX_ANSWER_BYTES):
                body += data
                if len(body) > MAX_ANSWER_BYTES:
                    raise EndpointError(f"its answer to GET {path} is larger than {MAX_ANSWER_BYTES} bytes")
        return answer.status, bytes(body)
    finally:
        await answer.aclose()


def _read(body: bytes, kind: type[T]) -> T | None:
    """Return the record in an answer, or nothing where it is another one."""
    try:
        return decode(body, kind, subject="answer")
    except ValidationProblem:
        return None


def _tokens(value: object) -> int:
    """Return a context's size, 0 for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_CONTEXT else 0


def _capabilities(*said: object) -> tuple[str, ...]:
    """Return what a model can do, from lists of words and tables of yes and no; what nobody knows is left out."""
    words = set[object]()
    for one in said:
        if isinstance(one, list):
            words |= {word for word in one if isinstance(word, str)}
        elif isinstance(one, dict):
            words |= {name for name, yes in one.items() if yes is True}
    known = {ALSO_CALLED.get(str(word), word) for word in words}
    return tuple(word for word in CAPABILITIES if word in known)


def _file_name(name: str) -> str:
    """Return what a path ends in: the folders of this machine are nobody's business."""
    return re.split(r"[/\\]", name)[-1] if re.match(r"[/\\.~]|[A-Za-z]:\\", name) else name
