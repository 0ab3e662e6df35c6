"""TOML files that people write: what is wrong with one, each problem with the line that it stands on."""

from __future__ import annotations

import re
import tomllib
from itertools import islice
from typing import TYPE_CHECKING, Any

from rma_core.errors import Problem, SettingProblem, ValidationProblem

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: No table that a person wrote is longer.
MAX_CHARACTERS = 200_000
#: Dots of one line, and problems of one file that are told with their lines.
MAX_DOTS, MAX_PROBLEMS = 200, 20
#: A name as TOML has it: bare, or in quotes.
_NAME = r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'"""
NAME = re.compile(_NAME)
HEADER = re.compile(rf"\s*\[(\[?)\s*((?:{_NAME})(?:\s*\.\s*(?:{_NAME}))*)\s*\]")
KEY = re.compile(rf"\s*({_NAME})\s*[=.]")
#: How `tomllib` says where it stopped.
STOPPED = re.compile(r"(.*) \((?:at line (\d+), column \d+|at end of document)\)", re.DOTALL)
PART = re.compile(r"""\.([^.\[\]]+)|\["([^"]*)"\]|\[(\d+)\]""")


def load(path: Path) -> str:
    """Return a file's text. Raises SettingProblem, ValidationProblem."""
    try:
        with path.open("rb") as file:
            content = file.read(4 * MAX_CHARACTERS + 1)
        if len(content) > 4 * MAX_CHARACTERS:  # what is cut off may be half a character
            raise _too_long(path.name)
        return content.decode("utf-8")
    except OSError as error:
        raise SettingProblem(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValidationProblem(str(path), [Problem("$", "is not text in UTF-8")]) from None


def read(text: str, *, subject: str) -> dict[str, Any]:
    """Return what a file says. Raises ValidationProblem, which names the line."""
    if len(text) > MAX_CHARACTERS:
        raise _too_long(subject)
    for number, line in enumerate(text.splitlines(), 1):
        # The parser's time grows with the square of a name's parts.
        if line.count(".") > MAX_DOTS:
            raise ValidationProblem(subject, [Problem(f"line {number}", f"has more than {MAX_DOTS} dots")])
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValidationProblem(subject, [Problem("$", "is nested too deeply")]) from None
    except ValueError as error:
        # Besides what is no TOML, a number of thousands of digits.
        raise ValidationProblem(subject, [_stopped(str(error), text)]) from None


def placed(subject: str, problems: Iterable[Problem], text: str) -> ValidationProblem:
    """Return problems by line, each with its line before its path: ``line 6, tiers[0].ram``."""
    index = _index(text)
    lines = [(_line(index, problem.where), problem) for problem in islice(problems, MAX_PROBLEMS)]
    found = [
        (line, Problem(f"line {line}" + (f", {problem.where[2:]}" if len(problem.where) > 1 else ""), problem.what))
        for line, problem in lines
    ]
    return ValidationProblem(subject, [problem for _, problem in sorted(found, key=lambda one: one[0])])


def line_of(text: str, path: str) -> int:
    """Return the line on which what a path such as ``$.tiers[1].ram`` names begins, or what it stands in.

    A name that is no bare one is written ``$.models["a:b"]``.
    """
    return _line(_index(text), path)


def _line(index: Iterable[tuple[int, list[str | int]]], path: str) -> int:
    parts: list[str | int] = [int(index) if index else name or quoted for name, quoted, index in PART.findall(path)]
    best, depth = 1, 0
    for number, name in index:
        # A header stands for the tables around it too, where those have none.
        same = min(len(name), len(parts))
        if same > depth and parts[:same] == name[:same]:
            best, depth = number, same
    return best


def _index(text: str) -> list[tuple[int, list[str | int]]]:
    """Return what is named in a file, with the line on which each begins."""
    found: list[tuple[int, list[str | int]]] = []
    counts: dict[tuple[str, ...], int] = {}
    here: list[str | int] = []
    for number, line in enumerate(text.splitlines(), 1):
        if header := HEADER.match(line):
            table = [_bare(name) for name in NAME.findall(header[2])]
            here = [*table]
            if header[1]:
                counts[tuple(table)] = counts.get(tuple(table), -1) + 1
                here.append(counts[tuple(table)])
            found += [(number, name) for name in ((here[:-1], here) if header[1] else (here,))]
        elif key := KEY.match(line):
            found.append((number, [*here, _bare(key[1])]))
    return found


def _too_long(subject: str) -> ValidationProblem:
    return ValidationProblem(subject, [Problem("$", f"has more than {MAX_CHARACTERS} characters")])


def _bare(name: str) -> str:
    return name[1:-1] if name[0] in "\"'" else name


def _stopped(said: str, text: str) -> Problem:
    """Return what the parser said with its line first, as all problems have it."""
    found = STOPPED.fullmatch(said)
    if found is None:
        return Problem("$", said)
    line = int(found[2]) if found[2] else len(text.splitlines())
    return Problem(f"line {line}", found[1][:1].lower() + found[1][1:])
