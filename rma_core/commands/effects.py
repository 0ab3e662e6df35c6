"""What a change to a live pool would come to, as people read it and agree to it: for policies and for rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rma_core.commands import common
from rma_core.errors import PlanChanged
from rma_core.models.sizes import human

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    Answer = dict[str, Any]


def agreed(look: Callable[[], Answer], ask: Callable[[Answer], None], put: Callable[[Answer], Answer]) -> Answer:
    """Show what a change comes to, ask, and put exactly that in force; return what came of it.

    Machines come and go while somebody reads: what it then comes to is shown, and asked about, anew. ``ask`` raises
    for a no, ``put`` PlanChanged.
    """
    while True:
        seen = look()
        ask(seen)
        try:
            return put({"plan": seen["plan"]})
        except PlanChanged as changed:
            common.say(f"{changed.message}. Nothing was changed; now it comes to this:")


def show(out: Console, answer: dict[str, Any]) -> None:
    """Print the services of which there would be more or fewer, and what machines would have to fetch."""
    rows = [
        (s["service"], s["wanted"], s["now"], s["then"], "too few" if s["short"] else "")
        for s in answer["services"]
        if s["now"] != s["then"]
    ]
    if rows:
        common.table(("service", "wanted", "now", "then", ""), rows, empty="")(out)
    if answer["images"] or answer["model_bytes"]:
        models = f", {human(answer['model_bytes'])} of models" if answer["model_bytes"] else ""
        out.print(common.safe(f"To be fetched by these machines, where they lack it: {_images(answer)}{models}."))


def _images(answer: dict[str, Any]) -> str:
    """Return how many images that is, and what is known of their sizes."""
    count, unknown = answer["images"], answer["images_unknown"]
    words = f"{count} image{'' if count == 1 else 's'}"
    if unknown == count:
        return f"{words} (of unknown size)" if count else words
    more = f", and {unknown} of unknown size" if unknown else ""
    return f"{words} ({human(answer['image_bytes'])} unpacked{more})"
