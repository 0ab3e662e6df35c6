"""Who published a distribution's file: what its index says it has checked (PEP 740), never what the file claims."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

import msgspec

from rma_core.errors import ValidationProblem
from rma_core.models.strict import decode

if TYPE_CHECKING:
    import httpx2

#: Where PyPI keeps files, and where it says who published one.
FILES_HOST = "files.index.example"
INTEGRITY = "https://index.example"
#: Seconds for an answer, and its most bytes.
ANSWER_S, MOST_BYTES = 10.0, 1024 * 1024
NOT_FOUND = 404


class _Publisher(msgspec.Struct, frozen=True):
    kind: str
    repository: str = ""
    workflow: str = ""
    workflow_filepath: str = ""
    email: str = ""

    def words(self) -> str:
        where = "/".join(filter(None, (self.kind, self.repository))) or self.kind
        how = self.workflow or self.workflow_filepath or self.email
        return f"{where} ({how})" if how else where


class _Bundle(msgspec.Struct, frozen=True):
    publisher: _Publisher


class _Provenance(msgspec.Struct, frozen=True):
    attestation_bundles: list[_Bundle]


def publisher_of(source: str, name: str, version: str, *, integrity: str = INTEGRITY, files: str = FILES_HOST) -> str:
    """Say who published the file that came from ``source``, as far as anybody vouches for it."""
    parts = urlsplit(source)
    if not parts.hostname:
        return "nobody vouches for it: it is a file"
    if parts.hostname != files:
        return f"not known: {parts.hostname} does not say"
    import httpx2

    file = quote(unquote(parts.path.rpartition("/")[2]))
    url = f"{integrity}/integrity/{quote(name)}/{quote(version)}/{file}/provenance"
    headers = {"Accept": "application/vnd.pypi.integrity.v1+json"}
    try:
        with httpx2.Client(timeout=ANSWER_S) as client, client.stream("GET", url, headers=headers) as answer:
            return _words(answer)
    except (httpx2.HTTPError, ValidationProblem) as error:
        return f"not known: PyPI could not be asked ({type(error).__name__})"


def _words(answer: httpx2.Response) -> str:
    if answer.status_code == NOT_FOUND:
        return "not known: whoever uploaded it to PyPI did not sign it"
    answer.raise_for_status()
    content = b""
    for piece in answer.iter_bytes():
        content += piece
        if len(content) > MOST_BYTES:
            return "not known: PyPI's answer does not end"
    found = decode(content, _Provenance, subject="provenance")
    names = dict.fromkeys(bundle.publisher.words() for bundle in found.attestation_bundles)
    return f"{', '.join(names)}, as PyPI has checked" if names else "not known: nobody signed it"
