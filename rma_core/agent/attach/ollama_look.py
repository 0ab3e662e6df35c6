"""What an Ollama says of itself and its models, by questions that load none and keep none loaded.

`/api/tags` lists what is on its disk, `/api/ps` what is loaded, `/api/show` what a model can do and how large a context
its author gave it; the latter reads a file, so each model is asked for once.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rma_core.agent.attach.asking import OK, capabilities, get, post, read, tokens
from rma_core.agent.incoming import EndpointError
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from rma_core.agent.endpoint import Client

#: Models that are asked for with `/api/show` in one look, and that are remembered.
SHOWN_A_LOOK, MOST_SHOWN = 4, 256
#: Models of one list that are looked at.
MOST_LISTED = 1024
#: Characters of a version, a digest or a moment.
MOST_WORD = 200


class Loaded(NamedTuple):
    """A model in memory: the tokens of its context (0 where an old Ollama does not say), and when it will leave."""

    context: int
    expires: str


class Shown(NamedTuple):
    """What a model's own file says: the context its author gave it, 0 for none; whether it thinks; what it can do."""

    context: int = 0
    thinks: bool | None = None
    can: tuple[str, ...] = ()


class Known(NamedTuple):
    """One look at an Ollama: digests and what is loaded, by the models' names; what files say, by their digests."""

    version: str
    digests: dict[str, str]
    loaded: dict[str, Loaded]
    shown: dict[str, Shown]

    def of(self, model: str) -> Shown:
        """Return what is known of a model's file."""
        return self.shown.get(self.digests.get(model, ""), Shown())


class Listing(NamedTuple):
    """The models on its disk with what the list says they can do, and those that it only passes on to elsewhere."""

    known: Known
    local: dict[str, tuple[str, ...]]
    elsewhere: tuple[str, ...]


class _Version(msgspec.Struct):
    version: str


class _Tag(msgspec.Struct):
    name: str
    digest: Any = None
    remote_host: Any = None
    context_length: Any = None
    expires_at: Any = None
    capabilities: Any = None


class _Tags(msgspec.Struct):
    # An Ollama without models has been seen to say null.
    models: list[_Tag] | None


class _Show(msgspec.Struct):
    parameters: Any = None
    capabilities: Any = None


async def listing(endpoint: Client, shown: dict[str, Shown] | None) -> Listing | None:
    """Return what an Ollama has, nothing where it is none.

    ``shown`` is what was known of models, and is added to; without it nothing of that is asked. Raises EndpointError.
    """
    told = read((await get(endpoint, "/api/version"))[1], _Version)
    tags = read((await get(endpoint, "/api/tags"))[1], _Tags)
    if tags is None:
        if told is not None:
            raise EndpointError("it is Ollama, but GET /api/tags gave no list of models")
        return None
    found = (tags.models or [])[:MOST_LISTED]
    local = [one for one in found if not one.remote_host]
    known = Known(
        version=told.version[:MOST_WORD] if told else "",
        digests={one.name: _word(one.digest) for one in local},
        loaded=await running(endpoint) or {},
        shown={} if shown is None else shown,
    )
    if shown is not None:
        await _look_into(endpoint, local, known)
    # What Ollama only passes on to a computer elsewhere, on its owner's account, is not this machine's to share.
    elsewhere = tuple(one.name for one in found if one.remote_host)
    return Listing(known, {one.name: capabilities(one.capabilities) for one in local}, elsewhere)


async def running(endpoint: Client) -> dict[str, Loaded] | None:
    """Return what is loaded, by name; nothing where that cannot be had. Raises EndpointError."""
    found = read((await get(endpoint, "/api/ps"))[1], _Tags)
    if found is None:
        return None
    listed = (found.models or [])[:MOST_LISTED]
    return {one.name: Loaded(tokens(one.context_length), _word(one.expires_at)) for one in listed}


async def _look_into(endpoint: Client, local: list[_Tag], known: Known) -> None:
    """Ask for a few of the models that were not asked for yet."""
    new = {digest: one for one in local if (digest := _word(one.digest)) and digest not in known.shown}
    for digest, one in list(new.items())[:SHOWN_A_LOOK]:
        try:
            status, body = await post(endpoint, "/api/show", encode({"model": one.name}))
        except EndpointError:
            # One that is too large says nothing; one that broke off is seen in the next look.
            status, body = 0, b""
        known.shown[digest] = _shown(read(body, _Show) if status == OK else None, one)
        while len(known.shown) > MOST_SHOWN:
            del known.shown[next(iter(known.shown))]


def _shown(told: _Show | None, tag: _Tag) -> Shown:
    said = told.capabilities if told is not None and told.capabilities is not None else tag.capabilities
    thinks = "thinking" in said if isinstance(said, list) else None
    parameters = told.parameters if told is not None and isinstance(told.parameters, str) else ""
    size = re.search(r"^num_ctx\s+(\d{1,10})\s*$", parameters, re.MULTILINE)
    return Shown(tokens(int(size[1])) if size else 0, thinks, capabilities(said))


def _word(value: object) -> str:
    return value[:MOST_WORD] if isinstance(value, str) else ""
