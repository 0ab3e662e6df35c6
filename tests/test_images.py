"""Images and catalog entries say the same, also where an image cannot be built here; the service `vision` is run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from containers import build
from rma_core.agent.llm.own_models import LLAMA_CPP
from rma_core.catalog import load, load_folder
from tests import model_servers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rma_core.catalog import CatalogEntry

CONTAINERS = Path(__file__).resolve().parents[1] / "containers"
FOLDERS = sorted(path.parent for path in CONTAINERS.glob("*/Dockerfile"))
#: What can be written in a container: the working folder of every image.
SCRATCH = "/tmp"


class Dockerfile:
    """The instructions of a Dockerfile, in order, each in one line; those of its last stage apart."""

    def __init__(self, path: Path) -> None:
        text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", path.read_text(encoding="utf-8")))
        self.steps = [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines())]
        self.steps = [(word, rest) for word, rest in self.steps if word]
        last = max(number for number, (word, _) in enumerate(self.steps) if word == "FROM")
        self.last = dict(self.steps[last:])
        self.environment = dict(
            re.findall(r"(\w+)=(\S+)", " ".join(rest for word, rest in self.steps[last:] if word == "ENV"))
        )


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture
def entry(folder: Path) -> CatalogEntry:
    return load(folder / "catalog.toml")


@pytest.fixture
def dockerfile(folder: Path) -> Dockerfile:
    return Dockerfile(folder / "Dockerfile")


def test_every_image_is_what_its_catalog_entry_says(folder: Path, entry: CatalogEntry, dockerfile: Dockerfile) -> None:
    known = {"ARG", "FROM", "COPY", "RUN", "ENV", "USER", "WORKDIR", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in dockerfile.steps} <= known
    assert entry.image.startswith(f"ghcr.io/rma/{folder.name}-worker:")
    assert (dockerfile.last["EXPOSE"], dockerfile.environment["PORT"]) == (str(entry.port), str(entry.port))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", dockerfile.last["USER"]), "nobody in particular, and not root"
    assert dockerfile.last["WORKDIR"] == SCRATCH
    command = json.loads(dockerfile.last["ENTRYPOINT"])
    if entry.process is not None:
        assert command[-2:] == ["-m", entry.process.module]
    if (folder / "pyproject.toml").exists():
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert entry.image.endswith(f":{project['version']}")
        assert entry.process is None or entry.process.distribution == project["name"]


def test_what_a_dockerfile_copies_is_there(folder: Path, dockerfile: Dockerfile) -> None:
    stages = {rest.split(" AS ")[1] for word, rest in dockerfile.steps if word == "FROM" and " AS " in rest}
    for word, rest in dockerfile.steps:
        if word != "COPY":
            continue
        source = next(part for part in rest.split() if not part.startswith("--"))
        if found := re.match(r"--from=(\S+)", rest):
            assert found[1] in stages
        elif source != "wheels":
            assert (folder / source).exists(), f"{source} is not in {folder.name}"


def test_every_argument_of_a_base_image_is_pinned(dockerfile: Dockerfile) -> None:
    bases = [rest for word, rest in dockerfile.steps if word == "ARG" and rest.split("=")[0] in ("BASE", "OLLAMA")]
    assert bases
    for base in bases:
        assert re.search(r"=docker\.io/[\w./-]+:[\w.-]*\d[\w.-]*$", base), base


def test_all_entries_load_together_and_the_routes_are_those_of_the_contract() -> None:
    entries = {entry.name: entry for entry in load_folder(CONTAINERS)}
    assert {name: entry.service for name, entry in entries.items()} == {
        "rma-llama-cpp-worker": "llm", "rma-vllm-worker": "llm", "rma-notes-worker": "notes", "rma-ocr-worker": "ocr",
        "rma-ollama-vision-worker": "vision",
    }  # fmt: skip
    assert [entry.routes[0] for entry in entries.values()] == [
        "POST /v1/chat/completions", "POST /v1/chat/completions", "POST /notes", "POST /ocr", "POST /vision",
    ]  # fmt: skip


def test_the_agent_runs_llama_cpp_for_its_owner_as_the_catalog_does_for_the_pool() -> None:
    assert load(CONTAINERS / "llama-cpp" / "catalog.toml") == LLAMA_CPP


def test_each_build_for_a_gpu_has_a_name_and_something_to_stand_on() -> None:
    entry = load(CONTAINERS / "llama-cpp" / "catalog.toml")
    assert set(entry.gpu_images) == set(build.GPUS)
    names = {image.partition(":")[0] for image in (entry.image, *entry.gpu_images.values())}
    assert len(names) == 1 + len(build.GPUS)


def test_only_what_needs_no_gpu_is_built_unless_it_is_named() -> None:
    assert [folder.name for folder in FOLDERS if not build.is_large(folder)] == ["llama-cpp", "notes", "ocr"]


def run_build(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CONTAINERS / "build.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_build_for_a_gpu_needs_an_index_and_a_service_that_has_one() -> None:
    assert "--index" in run_build("llama-cpp", "--gpu", "cuda").stderr
    assert "name one" in run_build("notes", "--gpu", "cuda", "--index", "https://index.example").stderr


def test_a_build_for_a_gpu_takes_one_package_from_its_index_and_the_rest_as_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, ...]] = []
    read: list[str] = []

    def run(*command: str, capture: bool = False) -> str:
        ran.append(command)
        read.extend(Path(word.partition("=")[2]).read_text() for word in command if word.startswith("--requirement="))
        (tmp_path / "wheels").mkdir(exist_ok=True)
        return ""

    monkeypatch.setattr(build, "run", run)
    target = build.Target(*build.GPU_TARGET)
    folder = CONTAINERS / "llama-cpp"
    build.fetch_wheels(folder, tmp_path / "wheels", target, package="xllamacpp", index="https://index.example")
    assert [command[3] for command in ran] == ["--disable-pip-version-check"] * 3
    assert ("h11==" in read[0], "xllamacpp" in read[0]) == (True, False)
    assert ran[2][-1].startswith("xllamacpp==")
    assert [word for word in ran[2] if "index" in word] == ["--index-url=https://index.example"]
    assert not [word for word in ran[1] if "index" in word]
    assert list((tmp_path / "wheels").iterdir()) == []


def test_vllm_is_started_with_what_the_environment_says(tmp_path: Path) -> None:
    script = CONTAINERS / "vllm" / "serve"
    assert os.access(script, os.X_OK)
    stand_in = tmp_path / "python3"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    told = {"MODEL_FILE": "/models", "MODEL": "qwen2.5:7b", "CONTEXT": "16384", "SLOTS": "8"}
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", **told}
    said = subprocess.run([str(script)], env=env, capture_output=True, text=True, timeout=20, check=True).stdout
    words = said.splitlines()
    for option, value in {
        "--model": "/models", "--served-model-name": "qwen2.5:7b", "--max-model-len": "16384", "--max-num-seqs": "8",
        "--port": "8000",
    }.items():  # fmt: skip
        assert words[words.index(option) + 1] == value
    bare = subprocess.run([str(script)], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert bare.returncode != 0
    assert "the folder of the model is needed" in bare.stderr


# -- the service `vision`, with a stand-in for Ollama ----------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n" + b"a picture"


class Ollama(BaseHTTPRequestHandler):
    """Answers /api/chat as Ollama does; what it was asked is kept."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012 - one server at a time
    answer: dict[str, Any] = {}  # noqa: RUF012 - the same
    status = 200

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        self.asked.append({"path": self.path, **json.loads(self.rfile.read(length))})
        body = json.dumps(self.answer).encode()
        self.send_response(self.status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def vision(tmp_path: Path) -> Iterator[model_servers.ModelServer]:
    assert importlib.util.find_spec("rma_vision") is not None, "pip install -r requirements-dev.txt"
    Ollama.asked, Ollama.status = [], 200
    Ollama.answer = {
        "message": {"role": "assistant", "content": "A cat."}, "done": True, "done_reason": "stop",
        "prompt_eval_count": 9, "eval_count": 3,
    }  # fmt: skip
    with ThreadingHTTPServer(("127.0.0.1", 0), Ollama) as ollama:
        threading.Thread(target=ollama.serve_forever, daemon=True).start()
        env = {"MODEL": "a-model", "OLLAMA_HOST": f"127.0.0.1:{ollama.server_port}"}
        log = tmp_path / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-u", "-m", "rma_vision", "--uds", str(tmp_path / "s")],
                env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        made = model_servers.ModelServer(process, f"unix:{tmp_path / 's'}", "a-model", log)
        try:
            model_servers.until(lambda: _listens(made), what="the service listens")
            yield made
        finally:
            process.terminate()
            process.wait(20)
            ollama.shutdown()


def _listens(server: model_servers.ModelServer) -> bool:
    assert server.process.poll() is None, server.said()
    with contextlib.suppress(OSError):
        return server.get("/health").status == 200
    return False


def test_a_picture_is_described_by_the_model_beside_the_service(vision: model_servers.ModelServer) -> None:
    reply = vision.post("/vision?prompt=What+is+it%3F&max_tokens=7", PNG, Content_Type="image/png")
    assert (reply.status, reply.body) == (
        200,
        {"text": "A cat.", "model": "a-model", "done_reason": "stop",
         "usage": {"prompt_tokens": 9, "completion_tokens": 3}},
    )  # fmt: skip
    [asked] = Ollama.asked
    assert (asked["path"], asked["model"], asked["options"]) == ("/api/chat", "a-model", {"num_predict": 7})
    assert asked["messages"][0]["content"] == "What is it?"
    assert vision.get("/health").body["model"] == "a-model"


def test_what_is_no_picture_and_an_answer_that_is_not_whole_are_problems(vision: model_servers.ModelServer) -> None:
    assert vision.post("/vision", b"%PDF-1.7", Content_Type="application/pdf").status == 415
    assert vision.post("/vision?max_tokens=0", PNG, Content_Type="image/png").status == 422
    Ollama.answer = {**Ollama.answer, "done": False}
    reply = vision.post("/vision", PNG, Content_Type="image/png")
    assert (reply.status, "not whole" in reply.body["detail"]) == (503, True)
    Ollama.status = 500
    assert vision.post("/vision", PNG, Content_Type="image/png").status == 503
