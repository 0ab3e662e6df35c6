"""Addresses that owners attach: model servers on this machine, as the command line and the settings name them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from rma_core.addresses import is_loopback
from rma_core.errors import UsageProblem

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Addresses that can be attached, and the slots that all of them share.
MAX_ATTACHED, MAX_SLOTS = 16, 64

_HINT = "the address is http://127.0.0.1:PORT, http://localhost:PORT, http://[::1]:PORT or unix:/path"


class Address(NamedTuple):
    """One address as the owner gave it: ``name`` goes to the pool, ``url`` does not; ``slots`` 0 where not told.

    ``keep_alive`` is how long an Ollama keeps a model loaded after a request of the pool's, in its own words; empty
    where that is Ollama's to know.
    """

    url: str
    slots: int
    name: str
    keep_alive: str = ""


class _Told(NamedTuple):
    """What stands behind an address."""

    slots: int = 0
    keep_alive: str = ""


def addresses(texts: Iterable[str]) -> tuple[Address, ...]:
    """Return what the owner attached, each once. Raises UsageProblem for what is not on this machine."""
    found: dict[str, Address] = {}
    for text in texts:
        one = _address(text)
        if one.url not in found:
            taken = sum(other.name.partition("--")[0] == one.name for other in found.values())
            found[one.url] = one._replace(name=f"{one.name}--{taken + 1}") if taken else one
    if len(found) > MAX_ATTACHED:
        raise UsageProblem(f"at most {MAX_ATTACHED} model servers can be attached, not {len(found)}")
    return tuple(found.values())


def _address(text: str) -> Address:
    if "," in text:
        raise UsageProblem(f"{text!r} cannot be attached: an address has no comma; --attach can be repeated")
    url, _, fragment = text.strip().partition("#")
    told = _told(text, fragment)
    if url.startswith("unix:/"):
        name = re.sub(r"[^a-z0-9]+", "-", url.rpartition("/")[2].lower()).strip("-")[:40]
        return Address(url, told.slots, f"attached-{name or 'socket'}", told.keep_alive)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise UsageProblem(f"{text!r} cannot be attached: {error}", hints=(_HINT,)) from None
    if parts.scheme != "http" or "@" in parts.netloc or not (host == "localhost" or _is_own(host)):
        raise UsageProblem(f"{text!r} cannot be attached: it is not an address on this machine", hints=(_HINT,))
    # The address that clients are told often ends in /v1; the paths are known.
    if not port or parts.path not in ("", "/", "/v1", "/v1/") or parts.query:
        raise UsageProblem(f"{text!r} cannot be attached: it needs a port, and nothing behind that", hints=(_HINT,))
    return Address(f"http://{parts.netloc}", told.slots, f"attached-{port}", told.keep_alive)


def _is_own(host: str) -> bool:
    # Not names that end in .localhost: some resolvers ask a name server for those.
    return not host.endswith("localhost") and is_loopback(host)


def _told(text: str, fragment: str) -> _Told:
    """Return what stands behind the ``#``: ``slots=4``, ``keep_alive=30m``, or both with an ``&`` between."""
    told = _Told()
    for part in fragment.split("&") if fragment else ():
        name, _, value = part.partition("=")
        if name == "slots" and re.fullmatch(r"[1-9][0-9]?", value, re.ASCII) and int(value) <= MAX_SLOTS:
            told = told._replace(slots=int(value))
        elif name == "keep_alive" and re.fullmatch(r"[1-9][0-9]{0,4}[smh]", value, re.ASCII):
            told = told._replace(keep_alive=value)
        else:
            raise UsageProblem(
                f"{text!r} cannot be attached: only #slots=1 to #slots={MAX_SLOTS} and #keep_alive=30m may stand "
                "behind it"
            )
    return told
