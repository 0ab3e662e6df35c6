"""A machine's files from one small text: what Linux shows below /sys and /dev, laid out below a folder.

``path = text`` is a file, ``path -> target`` a link, ``path/`` an empty folder; ``[folder]`` stands before the paths
that follow, and the indented lines behind ``path:`` are a file of several. ``!own_memory path bytes`` is no file: it is
what a driver answers when it is asked through that device node. ``#`` begins a comment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

OWN_MEMORY = "!own_memory "


def lay_out(text: str, root: Path) -> None:
    """Write all that a text says below ``root``."""
    base, lines = root, iter([*text.splitlines(), ""])
    block: Path | None = None
    for line in lines:
        if block is not None and line.startswith("  "):
            with block.open("a", encoding="utf-8") as file:
                file.write(f"{line[2:]}\n")
            continue
        block = None
        if line.startswith("["):
            base = root / line.strip("[]")
        elif line and not line.startswith(("#", OWN_MEMORY)):
            block = _make(base, line)


def own_memory(text: str) -> dict[str, int]:
    """Return the bytes of own memory that drivers tell, by device node."""
    told = (line.split()[1:] for line in text.splitlines() if line.startswith(OWN_MEMORY))
    return {node: int(size) for node, size in told}


def _make(base: Path, line: str) -> Path | None:
    """Make what one line says; return the file if its text is still to come."""
    name, is_link, target = line.partition(" -> ")
    name, is_file, content = (name, "", "") if is_link else line.partition(" =")
    path = base / name.rstrip(":/")
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_link:
        path.symlink_to(target)
    elif is_file:
        path.write_text(f"{content.strip()}\n", encoding="utf-8")
    elif name.endswith("/"):
        path.mkdir(parents=True, exist_ok=True)
    elif name.endswith(":"):
        path.touch()
        return path
    else:
        message = f"what is {line!r}?"
        raise ValueError(message)
    return None
