"""Who a machine belongs to does not leave it: home folder, user name and host name are hidden in what detectors say.

From recordings, which are made to be passed on, goes also what tells this piece of hardware from all others.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T", bound=msgspec.Struct)

#: Names that say nothing about anyone, and shorter ones, are left alone: replacing them would only garble sentences.
COMMON = frozenset({"root", "user", "admin", "localhost", "ubuntu", "debian", "runner", "nobody"})
SHORTEST = 3
#: Every field has room for this many characters.
ALWAYS_FITS = 200
#: Fields that name things, not people; a device's id must stay what it is.
KEPT = frozenset({"id", "access", "kind", "api", "state", "health", "detector", "distribution", "version"})

#: UUIDs (GPUs, disks, boards) and machine ids; addresses of network cards, which are not those of the PCI bus.
_UNIQUE = re.compile(
    r"(?<![0-9a-z])([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32})(?![0-9a-z])"
    r"|(?<![0-9a-z:-])([0-9a-f]{2}(?:(?::[0-9a-f]{2}){5}|(?:-[0-9a-f]{2}){5}))(?![0-9a-z:-])",
    re.IGNORECASE,
)
#: RMA's own credentials, and passwords in addresses.
_SECRET = re.compile(r"\brma[acj]_[\w.]+|(?<=://)[^\s/@]+(?=@)")
#: Attributes with such names are for nobody else.
_PRIVATE = re.compile(r"(.*_)?(serial|serial_number|mac|mac_address|password|token|secret)")


class Identity(NamedTuple):
    """What would tell whose machine this is; empty strings where it is not known or says nothing."""

    home: str
    user: str
    host: str


@functools.cache
def own_identity() -> Identity:
    """Return this machine's and this user's."""
    import getpass
    import platform

    try:
        home, user = str(Path.home()), getpass.getuser()
    except (KeyError, OSError, RuntimeError):
        home, user = "", ""
    return Identity(home if len(home) > SHORTEST else "", _telling(user), _telling(platform.node()))


def hide_identity(record: T, identity: Identity | None = None) -> T:
    """Return ``record`` with the home folder as ``~``, the user's name as ``<user>`` and the host's as ``<host>``.

    In sentences (``reason``) names are replaced as whole words, elsewhere where they are the whole text.
    """
    hidden = _hide(msgspec.to_builtins(record), identity or own_identity(), "")
    return msgspec.convert(hidden, type(record))


def hide_hardware(records: Sequence[T]) -> tuple[T, ...]:
    """Return ``records`` without serial numbers, network cards' addresses and secrets, and with UUIDs made up.

    The same UUID is the same made-up one in all of them, so that what refers to a device still does.
    """
    made_up: dict[str, str] = {}

    def instead(found: re.Match[str]) -> str:
        return made_up.setdefault(found[0].lower(), _numbered(found[0], len(made_up) + 1))

    return tuple(msgspec.convert(_generic(msgspec.to_builtins(record), instead), type(record)) for record in records)


def _generic(value: Any, instead: Callable[[re.Match[str]], str]) -> Any:  # noqa: ANN401 - plain JSON data
    if isinstance(value, dict):
        return {key: _generic(item, instead) for key, item in value.items() if not _PRIVATE.fullmatch(key)}
    if isinstance(value, (list, tuple)):
        return [_generic(item, instead) for item in value]
    if not isinstance(value, str):
        return value
    return _UNIQUE.sub(instead, _SECRET.sub("<secret>", value))[: max(len(value), ALWAYS_FITS)]


def _numbered(shape: str, number: int) -> str:
    """Return a number in the shape of a UUID or address: 00000000-0000-0000-0000-000000000001."""
    digits = iter(str(number).zfill(sum(map(str.isalnum, shape))))
    return "".join(next(digits) if character.isalnum() else character for character in shape)


def _telling(name: str) -> str:
    return "" if len(name) < SHORTEST or name.lower() in COMMON else name


def _hide(value: Any, identity: Identity, field: str) -> Any:  # noqa: ANN401 - plain JSON data
    if field in KEPT:
        return value
    if isinstance(value, dict):
        return {key: _hide(item, identity, key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hide(item, identity, field) for item in value]
    return _hide_text(value, identity, whole=field != "reason") if isinstance(value, str) else value


def _hide_text(text: str, identity: Identity, *, whole: bool) -> str:
    shown = text.replace(identity.home, "~") if identity.home else text
    for name, instead in ((identity.user, "<user>"), (identity.host, "<host>")):
        if name and whole and shown.lower() == name.lower():
            return instead
        if name and not whole:
            shown = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", instead, shown, flags=re.IGNORECASE)
    # A text that was as long as its field allows must not become longer.
    return shown[: max(len(text), ALWAYS_FITS)]
