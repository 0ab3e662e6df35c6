"""Who published a wheel, as its index says; PyPI is played by a server that answers as its interface is described."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from rma_core.publisher import publisher_of

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The parts of an answer that are read, as the interface has them.
GITHUB = {"kind": "GitHub", "repository": "odd/board", "workflow": "release.yml", "environment": None, "claims": None}
GITLAB = {"kind": "GitLab", "repository": "odd/board", "workflow_filepath": ".gitlab-ci.yml"}
SIGNED = {"version": 1, "attestation_bundles": [{"publisher": GITHUB, "attestations": [{"version": 1}]}]}


class PyPI(ThreadingHTTPServer):
    """Answers every question with what a test says, and keeps them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.status, self.content = 200, b""
        self.asked: list[tuple[str, str]] = []

    def words(self, status: int, content: Any, *, path: str = "packages/aa/rma_detect_odd-1.0-py3-none-any.whl") -> str:
        self.status, self.content = status, content if isinstance(content, bytes) else json.dumps(content).encode()
        url = f"http://127.0.0.1:{self.server_port}"
        source = f"http://127.0.0.1:{self.server_port}/{path}"
        return publisher_of(source, "rma-detect-odd", "1.0", integrity=url, files="127.0.0.1")


class Asked(BaseHTTPRequestHandler):
    server: PyPI

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Accept"]))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def pypi() -> Iterator[PyPI]:
    with PyPI() as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join(30)


def test_the_publisher_that_pypi_has_checked_is_named(pypi: PyPI) -> None:
    assert pypi.words(200, SIGNED) == "GitHub/odd/board (release.yml), as PyPI has checked"
    path = "/integrity/rma-detect-odd/1.0/rma_detect_odd-1.0-py3-none-any.whl/provenance"
    assert pypi.asked == [(path, "application/vnd.pypi.integrity.v1+json")]
    both = {"version": 1, "attestation_bundles": [{"publisher": one} for one in (GITHUB, GITLAB, GITHUB)]}
    assert pypi.words(200, both) == (
        "GitHub/odd/board (release.yml), GitLab/odd/board (.gitlab-ci.yml), as PyPI has checked"
    )
    google = {"version": 1, "attestation_bundles": [{"publisher": {"kind": "Google", "email": "odd@example.org"}}]}
    assert pypi.words(200, google) == "Google (odd@example.org), as PyPI has checked"


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (404, b"", "not known: whoever uploaded it to PyPI did not sign it"),
        (200, {"version": 1, "attestation_bundles": []}, "not known: nobody signed it"),
        (500, b"oops", "not known: PyPI could not be asked (HTTPStatusError)"),
        (200, b"<html>", "not known: PyPI could not be asked (ValidationProblem)"),
        (200, {"attestation_bundles": "many"}, "not known: PyPI could not be asked (ValidationProblem)"),
        (200, b" " * 2**21, "not known: PyPI's answer does not end"),
    ],
)
def test_where_nobody_vouches_for_it_that_is_said(pypi: PyPI, status: int, content: Any, words: str) -> None:
    assert pypi.words(status, content) == words


def test_what_comes_from_elsewhere_is_not_asked_about() -> None:
    assert publisher_of("dist/odd-1.0-py3-none-any.whl", "odd", "1.0") == "nobody vouches for it: it is a file"
    assert publisher_of("file:///tmp/odd-1.0-py3-none-any.whl", "odd", "1.0") == "nobody vouches for it: it is a file"
    assert publisher_of("https://example.org/odd-1.0.whl", "odd", "1.0") == "not known: example.org does not say"
