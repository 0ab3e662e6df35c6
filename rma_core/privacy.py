"""Who a machine belongs to does not leave it: home folder, user name and host name are hidden in what detectors say."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)

#: Names that say nothing about anyone, and shorter ones, are left alone: replacing them would only garble sentences.
COMMON = frozenset({"root", "user", "admin", "localhost", "ubuntu", "debian", "runner", "nobody"})
SHORTEST = 3
#: Every field has room for this many characters.
ALWAYS_FITS = 200
#: Fields that name things, not people; a device's id must stay what it is.
KEPT = frozenset({"id", "access", "kind", "api", "state", "health", "detector", "distribution", "version"})


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
