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
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from rma_core import toml_lines
from rma_core.builtin.threshold import ThresholdPolicy, read_table
from rma_core.errors import Problem, SettingProblem, ValidationProblem
from rma_core.toml_lines import MAX_CHARACTERS

if TYPE_CHECKING:
    from pathlib import Path

SUFFIX = ".toml"
#: What a policy may be called: it stands in settings and in addresses.
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
Text = Annotated[str, Meta(max_length=MAX_CHARACTERS)]


def read_policy(text: str, *, name: str, subject: str) -> ThresholdPolicy:
    """Return the policy that a file holds. Raises ValidationProblem, naming every problem with its line."""
    found = toml_lines.read(text, subject=subject)
    summary = found.pop("summary", "")
    problems = [] if isinstance(summary, str) else [Problem("$.summary", "is a sentence")]
    if "tiers" not in found:
        problems.append(Problem("$", "has no tiers: each is a table [[tiers]] with a number and a name"))
    try:
        table = read_table(found, subject=subject)
    except ValidationProblem as error:
        raise toml_lines.placed(subject, [*problems, *error.problems], text) from None
    if problems:
        raise toml_lines.placed(subject, problems, text)
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
    return name, toml_lines.load(path)
