"""The distributions as they are shipped: wheels that hold what they must, each plugin alone beside rma-core."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.needs import need
from tests.pools import environment

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
#: Distribution, its folder, and its one plugin: name, kind.
PLUGINS = {
    "rma-detect-nvidia": ("plugins/detect_nvidia", "nvidia", "detector"),
    "rma-detect-amd": ("plugins/detect_amd", "amd", "detector"),
    "rma-detect-apple": ("plugins/detect_apple", "apple", "detector"),
    "rma-detect-intel": ("plugins/detect_intel", "intel", "detector"),
    "rma-runtime-docker": ("plugins/runtime_docker", "docker", "runtime"),
    "rma-runtime-podman": ("plugins/runtime_podman", "podman", "runtime"),
}
FOLDERS = {
    "rma-core": ".",
    "rma-coordinator": "coordinator",
    "rma-llama-cpp": "containers/llama-cpp",
    "rma-notes": "containers/notes",
    "rma-ocr": "containers/ocr",
    "rma-vision": "containers/ollama-vision",
    **{name: folder for name, (folder, _, _) in PLUGINS.items()},
}


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, env=env, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every distribution's wheel, built from this tree."""
    need("pypi")
    folder = tmp_path_factory.mktemp("wheels")
    sources = [ROOT / path for path in FOLDERS.values()]
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, *sources)
    return {name: next(folder.glob(f"{name.replace('-', '_')}-*.whl")) for name in FOLDERS}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Path:
    """The Python of an environment that has rma-core's wheel and nothing else of ours."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", wheels["rma-core"])
    return python


@pytest.fixture
def beside_core(clean: Path, wheels: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[tuple[Path, str]]:
    name = request.param
    run(sys.executable, "-m", "pip", "--python", clean, "install", "-q", wheels[name])
    yield clean, name
    run(sys.executable, "-m", "pip", "--python", clean, "uninstall", "-q", "-y", name)


def listed(python: Path, home: Path) -> dict[str, dict[str, Any]]:
    out = run(python, "-m", "rma_core", "plugins", "list", "--json", env=environment(home), cwd=home)
    return {plugin["name"]: plugin for plugin in json.loads(out)["plugins"]}


def test_core_alone_has_its_built_in_plugins_and_no_more(clean: Path, tmp_path: Path) -> None:
    found = listed(clean, tmp_path)
    assert {name: plugin["state"] for name, plugin in found.items()} == dict.fromkeys(
        ("host", "process", "threshold"), "active"
    )
    assert "detect" in run(clean, "-m", "rma_core", "--help", env=environment(tmp_path), cwd=tmp_path)


@pytest.mark.parametrize("beside_core", sorted(PLUGINS), indirect=True)
def test_each_plugins_wheel_works_alone_beside_core(beside_core: tuple[Path, str], tmp_path: Path) -> None:
    python, name = beside_core
    _, plugin, kind = PLUGINS[name]
    found = listed(python, tmp_path)
    assert (found[plugin]["kind"], found[plugin]["state"]) == (kind, "active")
    assert (found[plugin]["distribution"], found[plugin]["reason"]) == (name, "")
    run(python, "-m", "rma_core", "plugins", "check", plugin, env=environment(tmp_path), cwd=tmp_path)
    if kind == "detector":
        report = json.loads(run(python, "-m", "rma_core", "detect", "--json", env=environment(tmp_path), cwd=tmp_path))
        [probe] = [probe for probe in report["probes"] if probe["detector"] == plugin]
        # In a container, a card of the machine may be in sight and not in reach; that is then said of it.
        assert probe["state"] in ("healthy", "undetected") or probe["reason"].startswith(("AMD GPU", "Intel GPU"))


def test_a_plugins_wheel_is_one_module(wheels: dict[str, Path]) -> None:
    for name in PLUGINS:
        with zipfile.ZipFile(wheels[name]) as wheel:
            modules = [entry for entry in wheel.namelist() if ".dist-info/" not in entry]
        assert len(modules) == 1, modules


def test_the_coordinators_wheel_brings_its_pages_and_the_catalog(wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels["rma-coordinator"]) as wheel:
        names = set(wheel.namelist())
    assert {f"rma_coordinator/static/{name}" for name in ("status.html", "status.js", "sample.pdf")} <= names
    services = ("llama-cpp", "notes", "ocr", "ollama-vision", "vllm")
    assert {f"rma_coordinator/catalog/{name}.toml" for name in services} <= names


def test_the_coordinators_wheel_serves_without_the_repository(
    wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, home = tmp_path_factory.mktemp("installed") / "venv", tmp_path_factory.mktemp("home")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    both = (wheels["rma-core"], wheels["rma-coordinator"])
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", *both)
    script = (
        "from rma_core.settings import CoordinatorSettings as S;"
        "from rma_coordinator.app import load_catalog as load;"
        "from rma_coordinator.api.pages import NAMES, static;"
        "print([entry.service for entry in load(S())], sum(len(static(name)) for name in NAMES) > 1000)"
    )
    assert (
        run(python, "-c", script, env=environment(home), cwd=home).strip()
        == "['llm', 'llm', 'notes', 'ocr', 'vision'] True"
    )
