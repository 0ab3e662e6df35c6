"""The program that an installed agent starts as: `rma`, before which no installed package could run code of its own.

Python runs lines of the ``.pth`` files beside packages, and ``sitecustomize``, before any program: also those of a
package that nobody approved. It does not where it is told ``-I -S``; it then finds no packages, and this program, which
is started by path, finds them in its place. Of ``.pth`` files it takes the folders that they name, and no code.
"""

from __future__ import annotations

import contextlib
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

    prefixes = [sys.base_prefix, sys.base_exec_prefix]
    if (environment := _virtual_environment()) is not None:
        # From 3.14 on Python does this itself, and before that `site`.
        sys.prefix = sys.exec_prefix = str(environment.folder)
        prefixes = [sys.prefix, *(prefixes if environment.open else ())]
    found = [folder for folder in map(Path, site.getsitepackages(prefixes)) if folder.is_dir()]
    for folder in found:
        yield folder
        yield from _named_in(folder)
    # What is installed for one user alone, or not installed at all.
    ours = Path(__file__).absolute().parent.parent
    if ours not in found:
        yield ours
        yield from _named_in(ours) if ours.name == "site-packages" else ()


class _Environment(NamedTuple):
    """A virtual environment, and whether it is open to the packages of the Python that it was made from."""

    folder: Path
    open: bool


def _virtual_environment() -> _Environment | None:
    """Return the virtual environment whose Python this is."""
    beside = Path(sys.executable).absolute().parent
    for folder in (beside.parent, beside):
        with contextlib.suppress(OSError, UnicodeError):
            lines = (folder / "pyvenv.cfg").read_text(encoding="utf-8").lower().splitlines()
            told = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}
            return _Environment(folder, told.get("include-system-site-packages") == "true")
    return None


def _named_in(folder: Path) -> Iterator[Path]:
    """Give the folders that the `.pth` files of a folder name."""
    for file in sorted(folder.glob("[!.]*.pth")):
        try:
            with file.open(encoding="utf-8-sig") as opened:
                lines = opened.read(PTH_CHARACTERS).splitlines()
        except (OSError, UnicodeError):
            continue
        for line in filter(None, map(str.strip, lines)):
            named = folder / line
            if not line.startswith(("#", "import ", "import\t")) and named.is_dir():
                yield named


if __name__ == "__main__":
    main(sys.argv[1:])
