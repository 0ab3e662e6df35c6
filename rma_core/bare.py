"""The program that an installed agent starts as: `rma`, before which no installed package could run code of its own.

Python runs lines of the ``.pth`` files beside packages, and ``sitecustomize``, before any program: also those of a
package that nobody approved. It does not where it is told ``-I -S``; it then finds no packages, and this program, which
is started by path, finds them in its place. Of ``.pth`` files it takes the folders that they name, and no code.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: How Python is started so: no environment, no site, and text is UTF-8 whatever a service manager says of languages.
OPTIONS = ("-I", "-S", "-X", "utf8")
#: Characters that are read of a `.pth` file: a list of folders is short.
PTH_CHARACTERS = 65_536


def command(*arguments: str) -> list[str]:
    """Return the command line of `rma` with these arguments, started so."""
    return [sys.executable, *OPTIONS, str(Path(__file__).absolute()), *arguments]


def module(name: str, *arguments: str) -> list[str]:
    """Return the command line of a module's program, which is started so where this process was."""
    how = command("-m") if sys.flags.no_site else [sys.executable, "-P", "-m"]
    return [*how, name, *arguments]


def main(arguments: Sequence[str]) -> None:
    """Find the packages, then run `rma`, or with ``-m NAME`` a module's program."""
    if not (sys.flags.no_site and sys.flags.isolated):
        sys.exit(f"start it as: {' '.join(command())}")
    sys.path += [path for path in map(str, dict.fromkeys(_packages())) if path not in sys.path]
    named = arguments[:1] == ["-m"] and len(arguments) > 1
    sys.argv = list(arguments[1:]) if named else ["rma_core", *arguments]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _packages() -> Iterator[Path]:
    """Give the folders with packages, where `site` would find them, each with those that its `.pth` files name."""
    import site

    # Systems have more places of their own for the Python that they bring; by the prefix they know which it is.
    folders, environment = [site.getusersitepackages(), *site.getsitepackages()], _virtual_environment()
    if environment is not None:
        # From 3.14 on Python does this itself, and before that `site`.
        sys.prefix = sys.exec_prefix = str(environment.folder)
        folders = [*site.getsitepackages([sys.prefix]), *(folders if environment.open else ())]
    for folder in filter(Path.is_dir, map(Path, folders)):
        yield folder
        yield from _named_in(folder)
    # Of what is not installed but only named to Python (PYTHONPATH), at least this is found.
    yield Path(__file__).absolute().parent.parent


class _Environment(NamedTuple):
    """A virtual environment, and whether it is open to the packages of the Python that it was made from."""

    folder: Path
    open: bool


def _virtual_environment() -> _Environment | None:
    """Return the virtual environment whose Python this is."""
    beside = Path(sys.executable).absolute().parent
    for folder in (beside, beside.parent):
        with contextlib.suppress(OSError, UnicodeError):
            lines = (folder / "pyvenv.cfg").read_text(encoding="utf-8").lower().splitlines()
            told = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}
            return _Environment(beside.parent, told.get("include-system-site-packages", "true") == "true")
    return None


def _named_in(folder: Path) -> Iterator[Path]:
    """Give the folders, or archives, that the `.pth` files of a folder name."""
    for file in sorted(folder.glob("[!.]*.pth")):
        try:
            with file.open(encoding="utf-8-sig") as opened:
                lines = opened.read(PTH_CHARACTERS).splitlines()
        except (OSError, UnicodeError):
            continue
        for line in filter(None, map(str.strip, lines)):
            # Code and comments are no files that exist.
            if os.path.exists(folder / line):  # noqa: PTH110 - Path's own fails for code that is too long for a name
                yield folder / line


if __name__ == "__main__":
    main(sys.argv[1:])
