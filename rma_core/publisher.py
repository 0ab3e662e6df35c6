"""Who published a distribution's file: what its index says it has checked (PEP 740), never what the file claims."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

import msgspec

from rma_core import bare
from rma_core.errors import ValidationProblem
from rma_core.models.strict import decode

if TYPE_CHECKING:
    import httpx2

#: How an index is asked for what programs read (PEP 691).
SIMPLE = "application/vnd.pypi.simple.v1+json"
#: Seconds for an answer, and its most bytes: large projects have thousands of files.
ANSWER_S, MOST_BYTES = 10.0, 16 * 1024 * 1024
PIP_S = 30.0


class _File(msgspec.Struct, frozen=True):
    filename: str
    hashes: dict[str, str]
    provenance: str | None = None


class _Files(msgspec.Struct, frozen=True):
    files: list[_File]


class _Publisher(msgspec.Struct, frozen=True):
    kind: str
    repository: str = ""
    workflow: str = ""
    workflow_filepath: str = ""
    email: str = ""

    def words(self) -> str:
        where = "/".join(filter(None, (self.kind, self.repository)))
        how = self.workflow or self.workflow_filepath or self.email
        return f"{where} ({how})" if how else where


class _Bundle(msgspec.Struct, frozen=True):
    publisher: _Publisher


class _Provenance(msgspec.Struct, frozen=True):
    attestation_bundles: list[_Bundle]


def index_of_pip() -> str:
    """Return the package index that pip goes by: its owner's, else pip's own; nothing where that cannot be told."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = bare.module("pip", "config", "list")
        told = subprocess.run(
            asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PIP_S, check=False
        )
        lines = (line.partition("=") for line in told.stdout.splitlines())
        named = {name: value.strip("'\"") for name, _, value in lines}
        # As pip has it: the environment counts for more than what is said of one command, and that than all of them.
        for section in (":env:", "install", "global"):
            if value := named.get(f"{section}.index-url"):
                return value
    with contextlib.suppress(ImportError, AttributeError):
        return str(importlib.import_module("pip._internal.models.index").PyPI.simple_url)
    return ""


def publisher_of(source: str, name: str, sha256: str, *, index: str | None = None) -> str:
    """Say who published the file that came from ``source``, as far as its index vouches for it.

    ``name`` is the distribution's normalized one; ``index`` is pip's, unless given.
    """
    parts = urlsplit(source)
    if not parts.hostname:
        return "nobody vouches for it: it is a file"
    index = index_of_pip() if index is None else index
    where = urlsplit(index).hostname
    if urlsplit(index).scheme not in ("https", "http") or not where:
        return "not known: the package index is none that could say"
    import httpx2

    try:
        with httpx2.Client(timeout=ANSWER_S, follow_redirects=True) as client:
            listed = decode(_read(client, f"{index.rstrip('/')}/{name}/", SIMPLE), _Files, subject="index")
            file = next((one for one in listed.files if one.hashes.get("sha256") == sha256), None)
            if file is None:
                return f"not known: {where} has no such file"
            if not file.provenance:
                return f"not known: whoever uploaded it to {where} did not sign it"
            said = _read(client, urljoin(index, file.provenance), "application/json")
            found = decode(said, _Provenance, subject="provenance")
    except (httpx2.HTTPError, httpx2.InvalidURL, ValidationProblem) as error:
        return f"not known: {where} does not say ({type(error).__name__})"
    names = dict.fromkeys(bundle.publisher.words() for bundle in found.attestation_bundles)
    return f"{', '.join(names)}, as {where} has checked" if names else f"not known: nobody signed it at {where}"


def _read(client: httpx2.Client, url: str, form: str) -> bytes:
    """Return an answer of a bounded size. Raises HTTPError, ValidationProblem."""
    content = bytearray()
    with client.stream("GET", url, headers={"Accept": form}) as answer:
        answer.raise_for_status()
        for piece in answer.iter_bytes():
            content += piece
            if len(content) > MOST_BYTES:
                raise ValidationProblem("the index's answer does not end", [])
    return bytes(content)
