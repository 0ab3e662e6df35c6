"""Tier policies written as TOML files: tiers with their bars, and exceptions for labels and single machines.

    summary = "the lab's machines first"

    [[tiers]]
    tier = 1
    name = "GPU"
    gpu_memory = "8GB"

    [[exceptions]]
    labels = { site = "lab" }
    tier = 1
    reason = "bought for this pool"

Everything wrong with a file is said at once, each with the line that it stands on.
"""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from rma_core.builtin.threshold import ThresholdPolicy, read_table
from rma_core.errors import Problem, SettingProblem, ValidationProblem

if TYPE_CHECKING:
    from pathlib import Path

SUFFIX = ".toml"
#: What a policy may be called: it stands in settings and in addresses.
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
#: No table that a person wrote is longer.
MAX_CHARACTERS = 200_000
Text = Annotated[str, Meta(max_length=MAX_CHARACTERS)]
HEADER = re.compile(r"\s*\[(\[?)([^\[\]]+)\]")
KEY = re.compile(r"\s*(?:([A-Za-z0-9_-]+)|\"([^\"]*)\")\s*[=.]")
#: How `tomllib` says where it stopped.
STOPPED = re.compile(r"(.*) \((?:at line (\d+), column \d+|at end of document)\)", re.DOTALL)
PART = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")


def read_policy(text: str, *, name: str, subject: str) -> ThresholdPolicy:
    """Return the policy that a file holds. Raises ValidationProblem, naming every problem with its line."""
    if len(text) > MAX_CHARACTERS:
        raise _too_long(subject)
    try:
        found = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValidationProblem(subject, [_stopped(str(error), text)]) from None
    summary = found.pop("summary", "")
    problems = [] if isinstance(summary, str) else [Problem("$.summary", "is a sentence")]
    if "tiers" not in found:
        problems.append(Problem("$", "has no tiers: each is a table [[tiers]] with a number and a name"))
    try:
        table = read_table(found, subject=subject)
    except ValidationProblem as error:
        raise _placed(subject, [*problems, *error.problems], text) from None
    if problems:
        raise _placed(subject, problems, text)
    made = ThresholdPolicy(name=name, tiers=table.tiers, exceptions=table.exceptions)
    return msgspec.structs.replace(made, summary=summary or f"the tiers of {subject}")


def read_file(path: Path) -> ThresholdPolicy:
    """Return the policy in a file; its name is the file's. Raises SettingProblem, ValidationProblem."""
    name, text = load(path)
    return read_policy(text, name=name, subject=path.name)


def load(path: Path) -> tuple[str, str]:
    """Return the name and the text of a policy's file. Raises SettingProblem, ValidationProblem."""
    name = path.name.removesuffix(SUFFIX)
    if not NAME.fullmatch(name):
        hint = f"a policy is called after its file: a-z, 0-9, - and _, and {SUFFIX}"
        raise SettingProblem(f"{path.name} is no name of a tier policy", hints=(hint,))
    try:
        with path.open("rb") as file:
            content = file.read(4 * MAX_CHARACTERS + 1)
        if len(content) > 4 * MAX_CHARACTERS:  # what is cut off may be half a character
            raise _too_long(path.name)
        text = content.decode("utf-8")
    except OSError as error:
        raise SettingProblem(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValidationProblem(str(path), [Problem("$", "is not text in UTF-8")]) from None
    return name, text


def _too_long(subject: str) -> ValidationProblem:
    return ValidationProblem(subject, [Problem("$", f"has more than {MAX_CHARACTERS} characters")])


def _stopped(said: str, text: str) -> Problem:
    """Return what the parser said with its line first, as all problems have it."""
    found = STOPPED.fullmatch(said)
    if found is None:
        return Problem("$", said)
    line = int(found[2]) if found[2] else len(text.splitlines())
    return Problem(f"line {line}", found[1][:1].lower() + found[1][1:])


def _placed(subject: str, problems: list[Problem], text: str) -> ValidationProblem:
    """Put the line before each problem's path."""
    lines = [(line_of(text, problem.where), problem) for problem in problems]
    placed = [
        (line, Problem(f"line {line}" + (f", {problem.where[2:]}" if len(problem.where) > 1 else ""), problem.what))
        for line, problem in lines
    ]
    return ValidationProblem(subject, [problem for _, problem in sorted(placed, key=lambda one: one[0])])


def line_of(text: str, path: str) -> int:
    """Return the line on which what a path such as ``$.tiers[1].ram`` names begins, or what it stands in."""
    parts = [name or int(index) for name, index in PART.findall(path)]
    best, depth = 1, 0
    counts: dict[str, int] = {}
    here: list[str | int] = []
    for number, line in enumerate(text.splitlines(), 1):
        if header := HEADER.match(line):
            here = [*(part.strip().strip('"') for part in header[2].split("."))]
            if header[1]:
                table = header[2].strip()
                counts[table] = counts.get(table, -1) + 1
                here.append(counts[table])
            names = [here[:-1], here] if header[1] else [here]
        elif key := KEY.match(line):
            names = [[*here, key[1] or key[2]]]
        else:
            continue
        for name in names:
            if len(name) > depth and parts[: len(name)] == name:
                best, depth = number, len(name)
    return best
