"""Models in real pools: from the owner's file or downloaded, as a process and in containers, paused and resumed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import certifi
import psutil
import pytest

from rma_core.agent import control
from rma_core.models.sizes import human
from tests import base_image, tiny_model
from tests.file_server import FileServer, file_server
from tests.fixtures import NOTES
from tests.needs import need
from tests.pools import NO_ENGINE, Running, environment, pool, rma, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.podmans import Podman
    from tests.pools import Pool

LLAMA = NOTES.parent / "llama-cpp"
VERSION = tomllib.loads((LLAMA / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
IMAGE = f"ghcr.io/rma/llama-cpp-worker:{VERSION}"
#: Seconds in which a paused machine has its memory back; measured, it is about one.
PAUSE_S = 8.0
#: Tokens of an answer that takes seconds.
LONG = 3000


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model that takes so much memory for its context that it is seen when it goes."""
    need("llama")
    return tiny_model.write_chat_model(tmp_path_factory.mktemp("file") / "tiny.gguf", context=65_536)


@pytest.fixture
def server(tmp_path: Path, file: Path) -> Iterator[FileServer]:
    with file_server(tmp_path) as made:
        made.files["/tiny.gguf"] = file.read_bytes()
        yield made


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    """A catalog with llama.cpp alone, for machines of any size, and a folder for models."""
    folder = tmp_path / "catalog"
    (folder / "models").mkdir(parents=True)
    entry = (LLAMA / "catalog.toml").read_text(encoding="utf-8").replace("tiers = [2, 1]", "tiers = [1, 2, 3]")
    (folder / "llama-cpp.toml").write_text(entry, encoding="utf-8")
    return folder


def describe(file: Path, catalog: Path, *, name: str = "tiny", url: str = "", licence: str = "Apache-2.0") -> None:
    """Write a model's entry as an admin does."""
    command = rma("models", "describe", str(file), "--name", name, "--licence", licence, "--url", url)
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    (catalog / "models" / f"{name}.toml").write_text(made, encoding="utf-8")


def trusting(server: FileServer, folder: Path) -> dict[str, str]:
    """Return an environment in which the server's certificate is good, and its owner downloads from it."""
    bundle = folder / "authorities.pem"
    bundle.write_bytes(Path(certifi.where()).read_bytes() + server.certificate.read_bytes())
    return {"SSL_CERT_FILE": str(bundle), "RMA_MODEL_HOSTS": server.place}


def chat(made: Pool, model: str = "tiny", **more: Any) -> Any:
    asked = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20, "temperature": 0}
    request = urllib.request.Request(
        f"{made.url}/v1/chat/completions", data=json.dumps({**asked, **more}).encode(),
        headers={"Authorization": f"Bearer {made.key}", "Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=100) as answer:
        return json.load(answer)


def text(answer: Any) -> str:
    said: str = answer["choices"][0]["message"]["content"]
    return said


def refusal(made: Pool, model: str = "tiny") -> tuple[int, dict[str, Any], str | None]:
    """Return how a request is refused: status, error, and Retry-After."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        chat(made, model)
    with contextlib.closing(refused.value) as answer:
        return answer.code, json.load(answer)["error"], answer.headers["retry-after"]


def engines(home: Path) -> list[psutil.Process]:
    """Return the processes below a state folder that hold a model."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if "rma_llama_cpp.engine" in words and str(home) in words:
                found.append(process)
    return found


def only_model(made: Pool) -> dict[str, Any]:
    [found] = made.json("models")["models"]
    model: dict[str, Any] = found
    return model


# -- files of the owner ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_rma_up_with_a_model_ends_in_a_line_that_chats_and_a_pause_gives_the_memory_back(
    home: Path, file: Path
) -> None:
    need("pypi")
    shared = f"tiny={file}#context=32768&slots=2"
    with pool(home, "--port", "0", "--model", shared, env=NO_ENGINE) as made:
        line = made.up.wait_for(r"(?m)^ +(curl -s .+/v1/chat/completions)$")[1]
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
        assert text(json.loads(done.stdout))
        before = text(chat(made))
        [engine] = engines(home)
        assert engine.memory_info().rss > 50_000_000
        said = made.json("pause")
        assert said["still_stopping"] == []
        assert not engine.is_running()
        assert engines(home) == []
        assert said["seconds"] < PAUSE_S
        assert "paused: since " in made.ask("status").stdout
        until(lambda: made.workers()[0]["paused"], within_s=20, what="the coordinator knows")
        assert "paused by its owner" in made.ask("workers").stdout
        status, error, retry_after = refusal(made)
        assert (status, error["code"], retry_after) == (503, "no_worker_available", "30")
        assert made.json("resume")["was_paused"]
        until(lambda: only_model(made)["state"] == "loaded", within_s=30, what="the model is back")
        assert text(chat(made)) == before
        assert made.json("resume") == {"was_paused": False}


@pytest.mark.timeout(300)
def test_a_pause_lasts_over_a_restart_and_what_ran_goes_on_elsewhere(home: Path, file: Path) -> None:
    need("pypi")
    with pool(home, "--port", "0", "--no-agent", env=NO_ENGINE) as made:
        agents = [agent_of(made, home / name, file) for name in ("one", "two")]
        try:
            until(lambda: len(made.workers()) == 2, within_s=60, what="both have joined")
            until(lambda: only_model(made)["workers"] == 2, within_s=120, what="both have the model")
            wanted = text(chat(made, max_tokens=LONG))
            while True:
                asked = asking(made, max_tokens=LONG)
                while (busy := busy_home(home)) is None and asked.poll() is None:
                    pass
                if busy is not None:
                    asyncio.run(control.ask(busy, "pause"))
                assert text(json.loads(asked.communicate(timeout=90)[0])) == wanted
                moved = [one for one in made.json("tasks")["tasks"] if len(one["attempts"]) > 1]
                if busy is not None and moved:
                    break
                # A quick machine may have answered before anybody looked, or had paused it.
                if busy is not None:
                    asyncio.run(control.ask(busy, "resume"))
                    until(lambda: only_model(made)["workers"] == 2, within_s=60, what="both have the model again")
            [task] = moved
            assert task["attempts"][0]["reason"] == "the owner of this machine has paused it"
            # The agent starts again and stays paused.
            number = [home / "one", home / "two"].index(busy)
            agents[number].stop(signal.SIGTERM)
            agents[number] = agent_of(made, busy, file)
            agents[number].wait_for(r"this machine is paused \(since .*`rma resume` lets it go on", within_s=60)
            agents[number].wait_for(r"is registered with the coordinator", within_s=60)
            assert engines(busy) == []
            subprocess.run(rma("resume"), env=environment(busy), capture_output=True, timeout=60, check=True)
            until(lambda: engines(busy), within_s=60, what="it works again")
        finally:
            for agent in agents:
                agent.stop(signal.SIGTERM)


def agent_of(made: Pool, home: Path, file: Path) -> Running:
    """Start an agent that shares the file, as processes; it joins where it has not yet."""
    env = {"RMA_COORDINATOR_URL": made.url, "RMA_RUNTIMES": "process", "RMA_MODELS": f"tiny={file}", **NO_ENGINE}
    env |= {"RMA_SERVICE_SOURCES": str(NOTES.parent), "RMA_DRAIN_S": "5"}
    if not (home / "worker.json").exists():
        env["RMA_JOIN_TOKEN"] = made.json("tokens", "create")["token"]
    return Running(rma("agent"), environment(home, env))


def asking(made: Pool, **more: Any) -> subprocess.Popen[bytes]:
    """Send a chat in the background."""
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, **more}
    headers = ["-H", f"Authorization: Bearer {made.key}", "-H", "Content-Type: application/json"]
    command = ["curl", "-sS", *headers, "-d", json.dumps(asked), f"{made.url}/v1/chat/completions"]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def busy_home(home: Path) -> Path | None:
    """Return the state folder of the agent that works on something."""
    # Not by a command: it takes longer to start than a quick machine takes for the answer.
    folders = (home / "one", home / "two")
    return next((one for one in folders if asyncio.run(control.ask(one, "status"))["attempts"]), None)


@pytest.mark.timeout(300)
def test_a_folder_of_models_is_offered_and_what_cannot_be_served_is_said(
    home: Path, file: Path, tmp_path: Path
) -> None:
    need("pypi")
    folder = tmp_path / "shared"
    (folder / "deeper").mkdir(parents=True)
    (folder / "deeper" / "Tiny Model.gguf").write_bytes(file.read_bytes())
    (folder / "broken.gguf").write_bytes(b"GGUF")
    (folder / "notes.txt").write_text("no model")
    with pool(home, "--port", "0", "--model", str(folder), env=NO_ENGINE) as made:
        assert only_model(made)["model"] == "Tiny-Model"
        assert text(chat(made, "Tiny-Model"))
        said = made.ask("status").stdout
        assert "not shared" in said
        assert "broken.gguf: GGUF: the file is cut off within its header" in said
    done = subprocess.run(
        rma("up", "--model", str(tmp_path / "nowhere.gguf")), env=environment(home), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, "there is no model file" in done.stderr) == (2, True)


# -- models of the pool ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_a_model_of_the_catalog_is_downloaded_shown_on_its_way_and_served_by_a_process(
    home: Path, catalog: Path, file: Path, server: FileServer, tmp_path: Path
) -> None:
    need("pypi")
    describe(file, catalog, url=server.url("/tiny.gguf"))
    slow = server.files["/tiny.gguf"] = file.read_bytes() + bytes(30_000_000)
    padded = tmp_path / "padded.gguf"
    padded.write_bytes(slow)
    describe(padded, catalog, url=server.url("/tiny.gguf"))
    server.cuts, server.pause_s = [9_000_000, 9_000_000], 0.02
    env = {**NO_ENGINE, **trusting(server, tmp_path), "RMA_CATALOG": str(catalog)}
    with pool(home, "--port", "0", "--no-agent", env=env) as made:
        assert (only_model(made)["state"], only_model(made)["reason"]) == ("away", "no worker has joined yet")
        status, error, _ = refusal(made)
        assert (status, error["code"]) == (503, "no_worker_available")
        token = made.json("tokens", "create")["token"]
        told = {"RMA_COORDINATOR_URL": made.url, "RMA_JOIN_TOKEN": token, "RMA_RUNTIMES": "process"}
        agent = Running(
            rma("agent"), environment(home / "agent", {**env, **told, "RMA_SERVICE_SOURCES": str(NOTES.parent)})
        )
        try:
            seen = until(
                lambda: (one := only_model(made))["progress"] and one["progress"] > 0.1 and one, within_s=60,
                what="a download on its way",
            )  # fmt: skip
            assert (seen["state"], seen["coming"], seen["workers"]) == ("loading", 1, 0)
            status, error, retry_after = refusal(made)
            assert (status, retry_after is not None) == (503, True)
            assert "is made ready on 1 worker: " in error["message"]
            until(lambda: only_model(made)["workers"] == 1, within_s=120, what="it is served")
            assert text(chat(made))
            [worker] = made.workers()
            [container] = worker["containers"]
            assert (container["runtime"], container["models"][0]["context"]) == ("process", 8192)
            [assigned] = worker["assigned_containers"]
            assert assigned["env"]["MODEL"] == "tiny"
            assert "MODEL_FILE" not in assigned["env"]
            begins = [one.range for one in server.asked]
            assert begins[:3] == ["", "bytes=9000000-", "bytes=18000000-"]
        finally:
            assert agent.stop(signal.SIGTERM) == 0
        [kept] = (home / "agent" / "models").glob("*/tiny.gguf")
        assert kept.read_bytes() == slow


@pytest.mark.timeout(200)
def test_another_file_than_the_catalogs_is_not_served_and_a_model_that_fits_nowhere_says_why(
    home: Path, catalog: Path, file: Path, server: FileServer, tmp_path: Path
) -> None:
    need("pypi")
    describe(file, catalog, url=server.url("/tiny.gguf"))
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    server.files["/tiny.gguf"] = bytes(changed)
    huge = (catalog / "models" / "tiny.toml").read_text(encoding="utf-8").replace('name = "tiny"', 'name = "huge"')
    (catalog / "models" / "huge.toml").write_text(
        huge.replace("weights_bytes = ", "weights_bytes = 9000000"), encoding="utf-8"
    )
    env = {**NO_ENGINE, **trusting(server, tmp_path), "RMA_CATALOG": str(catalog)}
    with pool(home, "--port", "0", env=env) as made:
        made.up.wait_for(r"llm tiny: failed: tiny.gguf is not the file that was asked for: its SHA-256 is")
        status, error, _ = refusal(made)
        assert (status, error["code"]) == (503, "no_worker_available")
        models = {one["model"]: one for one in made.json("models")["models"]}
        assert models["huge"]["reason"].startswith("needs 8.2 TiB of memory, ")
        assert "weights" in models["huge"]["reason"]
        [worker] = made.workers()
        shown = made.ask("workers", worker["worker_id"]).stdout
        assert "llm huge" in shown
        assert "needs 8.2 TiB of memory" in shown
        assert refusal(made, "nobody-knows")[0] == 404


@pytest.mark.timeout(200)
def test_who_joins_sees_size_source_and_licence_before_anything_is_downloaded_and_agrees_to_that(
    home: Path, catalog: Path, file: Path, server: FileServer
) -> None:
    describe(file, catalog, url=server.url("/tiny.gguf"), licence="Very-Own-1.0")
    with pool(home, "--port", "0", "--no-agent", env={**NO_ENGINE, "RMA_CATALOG": str(catalog)}) as made:
        joining = rma("join", made.url, made.json("tokens", "create")["token"], "--runtime", "process", "--enrol-only")
        env = environment(home / "one", {**NO_ENGINE, "RMA_SERVICE_SOURCES": str(NOTES.parent)})
        joined = subprocess.run([*joining, "--yes"], env=env, capture_output=True, text=True, timeout=60, check=True)
        [line] = [one for one in joined.stdout.splitlines() if "Very-Own-1.0" in one]
        assert line.split() == ["tiny", *human(file.stat().st_size).split(), "localhost", "Very-Own-1.0"]
        assert json.loads((home / "one" / "worker.json").read_bytes())["consent"]["models"] == {"tiny": "Very-Own-1.0"}
        [worker] = made.workers()
        assert [one["model"]["licence"] for one in worker["assigned_containers"]] == ["Very-Own-1.0"]
    assert server.asked == []


def docker_image(host: str) -> None:
    """Build the service's image in the engine, as `make images` does, unless it is there already."""
    client = ["docker", "--host", host] if host else ["docker"]
    if subprocess.run([*client, "image", "inspect", IMAGE], capture_output=True, check=False).returncode == 0:
        return
    base = base_image.ensure(base_image.BASE_TESSERACT, client)
    build = [sys.executable, str(LLAMA.parent / "build.py"), "llama-cpp", "--base", base, "--network", "none"]
    subprocess.run(build, env={**os.environ, "DOCKER_HOST": host}, check=True, timeout=600)


@pytest.fixture
def built(docker_engine: str) -> str:
    """The host of a Docker that has the service's image."""
    need("debootstrap")
    need("pypi")
    docker_image(docker_engine)
    return docker_engine


def in_a_container(
    home: Path,
    catalog: Path,
    file: Path,
    server: FileServer,
    env: Mapping[str, str],
    *,
    runtime: str,
    volumes: Callable[[], str],
) -> None:
    """Let a machine with one engine join, serve the model, pause, go on, end, and leave the pool for good."""
    describe(file, catalog, url=server.url("/tiny.gguf"))
    told = {**env, **trusting(server, home), "RMA_CATALOG": str(catalog)}
    with pool(home, "--port", "0", "--runtime", runtime, env=told) as made:
        [worker] = made.workers()
        [container] = worker["containers"]
        assert (container["state"], container["runtime"], container["isolated"]) == ("healthy", runtime, True)
        assert container["models"][0].get("state", "loaded") == "loaded"
        before = text(chat(made))
        assert len(before) == 20
        said = made.json("pause")
        assert said["still_stopping"] == []
        until(lambda: made.workers()[0]["paused"], within_s=20, what="the coordinator knows")
        made.ask("resume")
        until(lambda: only_model(made)["state"] == "loaded", within_s=60, what="the model is back")
        assert text(chat(made)) == before
        assert len(server.asked) == 1, "what was downloaded is kept"
    prefix = f"rma-{worker['worker_id'].removeprefix('worker-')}-files-"
    assert len([one for one in volumes().split() if one.startswith(prefix)]) == 1, "it is there for the next start"
    assert list((home / "agent" / "models").glob("*/tiny.gguf"))
    left = subprocess.run(
        rma("leave", "--yes"), env=environment(home, told), capture_output=True, text=True, timeout=100, check=True
    )
    assert left.stderr.count("\n") == 1, left.stderr
    assert prefix not in volumes()
    assert not (home / "agent" / "models").exists()


@pytest.mark.timeout(600)
def test_in_docker_the_same_entry_serves_the_model_from_a_volume(
    home: Path, catalog: Path, file: Path, server: FileServer, built: str
) -> None:
    env = {"DOCKER_HOST": built} if built else {}
    in_a_container(home, catalog, file, server, env, runtime="docker", volumes=lambda: docker_volumes(built))


def docker_volumes(host: str) -> str:
    command = ["docker", *(["--host", host] if host else []), "volume", "ls", "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture
def podman(built: str, rootful_podman: Podman) -> Podman:
    """A Podman that has the service's image."""
    archive = rootful_podman.folder / "llama.tar"
    client = ["docker", *(["--host", built] if built else [])]
    subprocess.run([*client, "save", "--output", str(archive), IMAGE], check=True, timeout=300)
    try:
        rootful_podman.run("load", "--input", str(archive))
    finally:
        archive.unlink()
    return rootful_podman


@pytest.mark.timeout(600)
def test_in_podman_the_same_entry_serves_the_model_from_a_volume(
    home: Path, catalog: Path, file: Path, server: FileServer, podman: Podman
) -> None:
    def volumes() -> str:
        return podman.run("volume", "ls", "--quiet")

    in_a_container(home, catalog, file, server, podman.agent_environ, runtime="podman", volumes=volumes)
