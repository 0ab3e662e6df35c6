"""The service `ocr` in a pool: a scanned page that is sent to the pool comes back as text, however the service runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from tests import base_image
from tests import ocr_pages as pages
from tests.fixtures import NOTES
from tests.needs import need
from tests.pools import NO_ENGINE, pool

if TYPE_CHECKING:
    from pathlib import Path

    from tests.podmans import Podman
    from tests.pools import Pool

OCR = NOTES.parent / "ocr"
VERSION = tomllib.loads((OCR / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
IMAGE = f"ghcr.io/rma/ocr-worker:{VERSION}"
LINES = pages.licence(8)


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ocr")


@pytest.fixture
def catalog(tmp_path: Path) -> str:
    """A catalog with `ocr` alone, for machines of any size."""
    entry = (OCR / "catalog.toml").read_text(encoding="utf-8").replace("tiers = [2, 1]", "tiers = [1, 2, 3]")
    folder = tmp_path / "catalog"
    folder.mkdir()
    (folder / "ocr.toml").write_text(entry, encoding="utf-8")
    return str(folder)


def docker_image(host: str) -> None:
    """Build the service's image in the engine, as `make images` does, unless it is there already."""
    client = ["docker", "--host", host] if host else ["docker"]
    if subprocess.run([*client, "image", "inspect", IMAGE], capture_output=True, check=False).returncode == 0:
        return
    base = base_image.ensure(base_image.BASE_TESSERACT, client)
    build = [sys.executable, str(OCR.parent / "build.py"), "ocr", "--base", base, "--network", "none"]
    subprocess.run(build, env={**os.environ, "DOCKER_HOST": host}, check=True, timeout=600)


def check(made: Pool, page: Path, *, engine: str, runtime: str) -> None:
    [worker] = made.workers()
    [ocr] = worker["containers"]
    assert (ocr["state"], ocr["runtime"], ocr["isolated"]) == ("healthy", runtime, runtime != "process")
    answer = post(made, page.read_bytes(), f"engine={engine}&languages=eng")
    assert (answer["engine"], answer["pages"][0]["orientation"]) == (engine, 90)
    assert pages.word_accuracy(answer["text"], " ".join(LINES)) >= 0.97
    told = made.json("infer", "ocr", str(page), "-o", f"engine={engine}", "-o", "orientation=90")
    assert told["text"] == answer["text"]


def post(made: Pool, body: bytes, query: str) -> Any:
    request = urllib.request.Request(
        f"{made.url}/api/inference/ocr?{query}", data=body,
        headers={"Authorization": f"Bearer {made.key}", "Content-Type": "image/png"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=100) as answer:
        return json.load(answer)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "scan.png"
    path.write_bytes(pages.encoded(pages.page(LINES, height=3).rotate(90, expand=True)))
    return path


@pytest.mark.timeout(400)
def test_as_a_process_a_page_on_its_side_comes_back_as_text(home: Path, catalog: str, page: Path) -> None:
    need("pypi")
    with pool(home, "--port", "0", env={**NO_ENGINE, "RMA_CATALOG": catalog}) as made:
        check(made, page, engine="rapidocr", runtime="process")


@pytest.fixture
def built(docker_engine: str) -> str:
    """The host of a Docker that has the service's image."""
    need("debootstrap")
    need("pypi")
    docker_image(docker_engine)
    return docker_engine


def in_a_container(home: Path, page: Path, env: dict[str, str], *, runtime: str) -> None:
    with pool(home, "--port", "0", "--runtime", runtime, env=env) as made:
        check(made, page, engine="rapidocr", runtime=runtime)
        check(made, page, engine="tesseract", runtime=runtime)


@pytest.mark.timeout(600)
def test_in_docker_both_engines_read_it(home: Path, catalog: str, page: Path, built: str) -> None:
    env = {"RMA_CATALOG": catalog, **({"DOCKER_HOST": built} if built else {})}
    in_a_container(home, page, env, runtime="docker")


@pytest.mark.timeout(600)
def test_in_podman_both_engines_read_it(
    home: Path, catalog: str, page: Path, built: str, rootful_podman: Podman
) -> None:
    # In a folder of Podman's own, which whoever it runs as can read.
    archive = rootful_podman.folder / "ocr.tar"
    subprocess.run(
        ["docker", *(["--host", built] if built else []), "save", "--output", str(archive), IMAGE],
        check=True, timeout=300,
    )  # fmt: skip
    try:
        rootful_podman.run("load", "--input", str(archive))
    finally:
        archive.unlink()
    in_a_container(home, page, {"RMA_CATALOG": catalog, **rootful_podman.agent_environ}, runtime="podman")
