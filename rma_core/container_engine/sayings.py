"""What engines and registries say when something goes wrong, as failures with a sentence for the machine's owner."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, TypeVar

from rma_core.errors import (
    ImageMissing,
    ImagePullFailed,
    NotSupported,
    OutOfSpace,
    PortTaken,
    RuntimeAbsent,
    RuntimeFailure,
    StartFailed,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rma_core.container_engine.connection import Product

Action = Literal["ask", "pull", "start"]
Found = TypeVar("Found")

#: What Podman says, with a 500 in place of a 404, of a container that somebody removes while it looks.
ABSENT = "no such container"

#: Lines and characters of a container's last words.
LAST_LINES = 5
LAST_CHARACTERS = 500

#: What engines and registries say (a pattern, searched in any case), what that is, and what to tell the owner, with
#: ``{said}`` for what was said. The first that fits counts; a product's own come before these.
SAYINGS: tuple[tuple[str, type[RuntimeFailure], str], ...] = (
    (
        r"no space left on device|disk quota exceeded|not enough space",
        OutOfSpace,
        "the disk {title} writes to is full ({said}): free some space, for instance with `{prune}`",
    ),
    (
        r"port is already allocated|address already in use|ports are not available",
        PortTaken,
        "the address for the container is in use by something else: {said}",
    ),
    (
        r"toomanyrequests|rate limit|too many requests",
        ImagePullFailed,
        "the registry takes no more pulls from here for now ({said}): wait, or `{login}`",
    ),
    (
        r"no matching manifest|does not match the specified platform|no match for platform",
        ImageMissing,
        "the image was not made for this kind of machine: {said}",
    ),
    (
        r"manifest unknown|: not found|no such image|name unknown|repository does not exist|invalid reference format",
        ImageMissing,
        "no registry has the image: {said}",
    ),
    (
        r"access denied|(?<!permission )denied: |unauthorized|no basic auth",
        ImageMissing,
        "no registry gives the image to this machine ({said}): is its name right, or is a `{login}` missing?",
    ),
    (
        r"could not select device driver|nvidia-container-cli|CDI device|CDI is|error gathering device information",
        NotSupported,
        "{title} could not give the container its GPU: {said}",
    ),
    (
        r"exec format error",
        StartFailed,
        "the image is for another kind of processor than this one: {said}",
    ),
    (
        r"executable file not found|exec: .*no such file or directory",
        StartFailed,
        "the image's own program is not in it: {said}",
    ),
)


def explain(error: Exception | str, action: Action, product: Product) -> RuntimeFailure:
    """Return the failure that an engine's answer, or the lack of one, means while ``action`` was done."""
    said = words(error)
    if not isinstance(error, str) and getattr(error, "explanation", None) is None:
        return RuntimeAbsent(f"{product.title} does not answer ({said}): {product.start_advice()}")
    for pattern, kind, sentence in (*product.sayings, *SAYINGS):
        if re.search(pattern, said, re.IGNORECASE):
            return kind(sentence.format(said=said, title=product.title, prune=product.prune, login=product.login))
    kinds: dict[Action, type[RuntimeFailure]] = {"ask": RuntimeFailure, "pull": ImagePullFailed, "start": StartFailed}
    return kinds[action](f"{product.title}: {said}")


def unless_absent(call: Callable[[], Found]) -> Found | None:
    """Return what a call to an engine gives, or ``None`` where what it is about does not exist."""
    from docker.errors import APIError, NotFound

    try:
        return call()
    except NotFound:
        return None
    except APIError as error:
        if ABSENT not in words(error):
            raise
        return None


def words(error: Exception | str) -> str:
    """Return what an error says on one line; its kind where it says nothing."""
    said = getattr(error, "explanation", None) or error
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    return last_words(text) or type(error).__name__


def last_words(text: str) -> str:
    """Return the end of a container's output on one line, without control characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()][-LAST_LINES:]
    return "".join(c if c.isprintable() else " " for c in " / ".join(lines))[-LAST_CHARACTERS:].strip()
