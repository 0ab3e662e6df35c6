"""`rma plugins new` and `rma plugins check`: a plugin that works as it is, and a table that says what fails."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core import scaffold
from rma_core.errors import UsageProblem
from rma_core.host import KINDS
from tests.pools import environment

if TYPE_CHECKING:
    from pathlib import Path

    from rma_core.host import Kind


def rma(*arguments: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rma_core", *arguments]
    env = environment(folder / "home", more)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_keeps_the_contract_and_its_own_test_passes(kind: Kind, tmp_path: Path) -> None:
    made = rma("plugins", "new", "odd_board", "--kind", kind, "--json", folder=tmp_path)
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    folder = tmp_path / told["folder"]
    assert sorted(told["files"]) == sorted(path.name for path in folder.iterdir())
    checked = rma("plugins", "check", told["folder"], "--json", folder=tmp_path)
    assert checked.returncode == 0, checked.stdout
    [plugin] = json.loads(checked.stdout)["plugins"]
    assert (plugin["plugin"], plugin["kind"]) == ("odd_board", kind)
    assert {check["state"] for check in plugin["checks"]} == {"kept"}
    its_own = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    env = environment(tmp_path / "home", {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"})
    ran = subprocess.run(its_own, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    more = {"detector": 2, "policy": 2, "runtime": 1}[kind]
    assert f"{len(plugin['checks']) + more} passed" in ran.stdout


def test_a_new_runtime_says_what_it_is_for_and_what_is_not_checked(tmp_path: Path) -> None:
    made = rma("plugins", "new", "runtime_bar", folder=tmp_path)
    assert "for an engine with Docker's API" in made.stderr
    assert "write the methods of a ContainerRuntime" in made.stderr
    checked = rma("plugins", "check", "runtime_bar", folder=tmp_path)
    for suite in ("runtime_contract", "adoption_contract", "isolation_contract"):
        assert suite in checked.stderr
    assert "Docker's API" not in rma("plugins", "new", "detect_bar", folder=tmp_path).stderr


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_new_leaves_nothing_for_a_linter(kind: Kind, tmp_path: Path) -> None:
    made = scaffold.create("odd_board", kind, tmp_path)
    # What a test does, its name says.
    rules = ["--isolated", "--no-cache", "--line-length=120", "--select=E,F,W,I,B,D1,UP,SIM,RET", "--ignore=D103"]
    ruff = [sys.executable, "-m", "ruff", "check", "--output-format=concise", *rules, "."]
    ran = subprocess.run(ruff, cwd=made.folder, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout
    assert not any("TODO" in path.read_text() for path in made.folder.iterdir())


@pytest.mark.parametrize("kind", ["policy", "runtime"])
@pytest.mark.parametrize("name", ["none", "true", "tier_decision", "path", "address", "runtime_absent", "engine"])
def test_no_name_gets_in_the_way_of_what_a_plugin_imports(kind: Kind, name: str, tmp_path: Path) -> None:
    made = scaffold.create(f"{kind}_{name}", kind, tmp_path)
    checked = rma("plugins", "check", str(made.folder), folder=tmp_path)
    assert checked.returncode == 0, checked.stdout


def test_six_lines_make_a_detector_for_a_card_that_is_there(tmp_path: Path) -> None:
    made = scaffold.create("detect_coral", None, tmp_path)
    module = made.folder / "rma_detect_coral.py"
    text = module.read_text()
    for old, new in (("0xffff", "0x1ac1"), ('"0x0001": "Coral"', '"0x089a": "Coral Edge TPU"'), ("8 * 2**30", "None")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    module.write_text(text)
    slot = tmp_path / "machine/sys/bus/pci/devices/0000:03:00.0"
    slot.mkdir(parents=True)
    (slot / "vendor").write_text("0x1ac1\n")
    (slot / "device").write_text("0x089a\n")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "rma.toml").write_text(f'[plugins.coral]\nroot = "{tmp_path / "machine"}"\n')
    checked = rma("plugins", "check", str(made.folder), folder=tmp_path)
    assert (checked.returncode, "coral: all 17 kept" in checked.stdout) == (0, True), checked.stdout
    found = runpy.run_path(str(module))["rma_detect_devices"]({"root": str(tmp_path / "machine")})
    assert [(device.id, device.name) for device in found.devices] == [("npu:0000:03:00.0", "Coral Edge TPU")]


def test_what_fails_is_a_sentence_in_the_table_and_an_exit_code(tmp_path: Path) -> None:
    made = scaffold.create("detect_loud", None, tmp_path)
    module = made.folder / "rma_detect_loud.py"
    module.write_text(module.read_text().replace("    root = Path", "    print('looking')\n    root = Path"))
    checked = rma("plugins", "check", str(made.folder), folder=tmp_path)
    assert checked.returncode == 1
    assert re.search(r"✗ +it prints nothing +it printed: looking", checked.stdout)
    assert "loud: 1 broken" in checked.stdout
    assert "Traceback" not in checked.stderr


def test_what_cannot_be_checked_is_told_with_what_to_do(tmp_path: Path) -> None:
    missing = rma("plugins", "check", "nobody", "--json", folder=tmp_path)
    error = json.loads(missing.stdout)["error"]
    assert (missing.returncode, error["code"]) == (6, "not_found")
    assert "host" in error["hints"][0]
    (tmp_path / "empty").mkdir()
    assert rma("plugins", "check", "empty", folder=tmp_path).returncode == 2


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "detect_foo").mkdir()
    (tmp_path / "detect_foo" / "mine").write_text("mine")
    refused = rma("plugins", "new", "detect_foo", folder=tmp_path)
    assert refused.returncode == 2
    assert "is there already" in refused.stderr
    assert [path.name for path in (tmp_path / "detect_foo").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("text", "kind", "made"),
    [
        ("detect_foo", None, ("foo", "detector")),
        ("rma-detect-foo", None, ("foo", "detector")),
        ("Policy Night Owl", None, ("night_owl", "policy")),
        ("runtime_bar", "runtime", ("bar", "runtime")),
        ("bar", "policy", ("bar", "policy")),
        ("bar", None, ("bar", "detector")),
    ],
)
def test_a_name_tells_its_kind(text: str, kind: Kind | None, made: tuple[str, Kind]) -> None:
    assert scaffold.named(text, kind) == made


@pytest.mark.parametrize(
    "text", ["", "_", "detect_", "3d", "../foo", "foo/bar", "föö", "x" * 41, "foo__bar", "a\nb", "test", "my_test"]
)
def test_a_name_that_cannot_be_one_is_refused(text: str) -> None:
    with pytest.raises(UsageProblem, match="cannot be called"):
        scaffold.named(text, None)


def test_two_kinds_at_once_are_refused() -> None:
    with pytest.raises(UsageProblem, match="is a detector by its name, and a policy by --kind"):
        scaffold.named("detect_foo", "policy")


@given(text=st.text(max_size=60), kind=st.sampled_from([None, *KINDS]))
def test_whatever_the_name_no_file_is_made_elsewhere(text: str, kind: Kind | None) -> None:
    try:
        name, found = scaffold.named(text, kind)
    except UsageProblem:
        return
    assert re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name)
    assert scaffold.named(f"rma_{scaffold.PREFIXES[found]}_{name}", None) == (name, found)


def test_an_installed_plugin_can_be_checked_in_its_authors_own_tests(tmp_path: Path) -> None:
    (tmp_path / "test_host.py").write_text(
        'pytest_plugins = ["rma_core.testing.pytest_plugin"]\nRMA_PLUGIN = "threshold"\n\n\n'
        "def test_it(rma_check):\n    rma_check()\n"
    )
    pytest_of_its_own = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "error",
        "-p",
        "no:asyncio",
        f"--rootdir={tmp_path}",
    ]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        pytest_of_its_own, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stdout
    assert "13 passed" in ran.stdout
