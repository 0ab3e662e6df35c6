"""Who published a wheel, as its index says; the index is played by a server that answers as PEP 691 and 740 have it."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from rma_core.publisher import SIMPLE, index_of_pip, publisher_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHA256 = "ab" * 32
GITHUB = {"kind": "GitHub", "repository": "odd/board", "workflow": "release.yml", "environment": None, "claims": None}
GITLAB = {"kind": "GitLab", "repository": "odd/board", "workflow_filepath": ".gitlab-ci.yml"}
SIGNED = {"version": 1, "attestation_bundles": [{"publisher": GITHUB, "attestations": [{"version": 1}]}]}


class Index(ThreadingHTTPServer):
    """Lists one file, and says of it what a test says; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.status, self.content = 200, b""
        self.file: dict[str, Any] = {}
        self.asked: list[tuple[str, str]] = []

    def words(self, content: Any, *, status: int = 200, **file: Any) -> str:
        self.status, self.content = status, content if isinstance(content, bytes) else json.dumps(content).encode()
        self.file = {
            "filename": "rma_detect_odd-1.0-py3-none-any.whl", "hashes": {"sha256": SHA256},
            "url": "x", "provenance": "/attested", **file,
        }  # fmt: skip
        url = f"http://127.0.0.1:{self.server_port}/simple/"
        return publisher_of("https://files.example.org/odd-1.0.whl", "rma-detect-odd", SHA256, index=url)


class Asked(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Accept"]))
        listed = self.path.startswith("/simple/")
        files = {"meta": {"api-version": "1.1"}, "name": "rma-detect-odd", "files": [self.server.file]}
        content = json.dumps(files).encode() if listed else self.server.content
        self.send_response(200 if listed else self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index() -> Iterator[Index]:
    with Index() as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join(30)


def test_the_publisher_that_the_index_has_checked_is_named(index: Index) -> None:
    assert index.words(SIGNED) == "GitHub/odd/board (release.yml), as 127.0.0.1 has checked"
    assert index.asked == [("/simple/rma-detect-odd/", SIMPLE), ("/attested", "application/json")]
    both = {"version": 1, "attestation_bundles": [{"publisher": one} for one in (GITHUB, GITLAB, GITHUB)]}
    words = "GitHub/odd/board (release.yml), GitLab/odd/board (.gitlab-ci.yml), as 127.0.0.1 has checked"
    assert index.words(both) == words
    google = {"version": 1, "attestation_bundles": [{"publisher": {"kind": "Google", "email": "odd@example.org"}}]}
    assert index.words(google) == "Google (odd@example.org), as 127.0.0.1 has checked"


@pytest.mark.parametrize(
    ("content", "more", "words"),
    [
        (SIGNED, {"provenance": None}, "not known: whoever uploaded it to 127.0.0.1 did not sign it"),
        (SIGNED, {"hashes": {"sha256": "cd" * 32}}, "not known: 127.0.0.1 has no such file"),
        (SIGNED, {"hashes": "many"}, "not known: 127.0.0.1 does not say (ValidationProblem)"),
        ({"attestation_bundles": []}, {}, "not known: nobody signed it at 127.0.0.1"),
        (b"oops", {"status": 500}, "not known: 127.0.0.1 does not say (HTTPStatusError)"),
        (b"<html>", {}, "not known: 127.0.0.1 does not say (ValidationProblem)"),
        (b" " * (2**24 + 1), {}, "not known: 127.0.0.1 does not say (ValidationProblem)"),
    ],
)
def test_where_nobody_vouches_for_it_that_is_said(index: Index, content: Any, more: Any, words: str) -> None:
    assert index.words(content, **more) == words


def test_what_no_index_has_is_not_asked_about() -> None:
    for file in ("dist/odd-1.0-py3-none-any.whl", "file:///tmp/odd-1.0-py3-none-any.whl"):
        assert publisher_of(file, "odd", SHA256) == "nobody vouches for it: it is a file"
    for index in ("", "file:///srv/index", "/srv/index"):
        words = "not known: the package index is none that could say"
        assert publisher_of("https://example.org/odd-1.0.whl", "odd", SHA256, index=index) == words


def test_the_index_is_the_one_that_pip_goes_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = tmp_path / "pip.conf"
    settings.write_text("[global]\nindex-url = https://one.example/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    assert index_of_pip() == "https://one.example/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://other.example/simple")
    assert index_of_pip() == "https://other.example/simple"
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert index_of_pip().startswith("https://"), "pip's own"
    monkeypatch.setitem(sys.modules, "pip._internal.models.index", None)
    assert index_of_pip() == ""
