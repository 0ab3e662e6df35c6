"""What is deprecated warns with its date and what to do instead, once, wherever somebody looks; and goes on working."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from rma_core import deprecations, policies_apart
from rma_core.agent.detecting import Detecting
from rma_core.deprecations import DEPRECATED, LASTS, used_by, words_of
from rma_core.host import Plugins, installed
from rma_core.settings import AgentSettings
from rma_core.testing import PluginDeprecation, policy_contract
from rma_core.testing.checking import Target, results
from tests.plugin_files import distribute
from tests.policy_plugins import install, source
from tests.pools import environment, rma

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
OLD = "states no RMA_HOOK_VERSION, which is deprecated: a release from 2028-01-01 on may refuse it; its author writes"
DETECTOR = "from rma_core import Detection, hookimpl\n@hookimpl\ndef rma_detect_devices(config):\n    "
DETECTOR += "return Detection.undetected('there is no such board')\n"
RUNTIME = "from rma_core import hookimpl\n@hookimpl\ndef rma_container_runtimes(config):\n    return []\n"
STATED = "RMA_HOOK_VERSION = 1\n"


@pytest.fixture(autouse=True)
def _nobody_was_warned_yet() -> Iterator[None]:
    deprecations.warn.cache_clear()
    yield
    deprecations.warn.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with a detector and a runtime that state no version, and detectors that do."""
    points = {
        "rma.detectors": {"aged": "aged_detector", "stating": "stating_detector"},
        "rma.runtimes": {"elderly": "aged_runtime"},
    }
    modules = {"aged_detector": DETECTOR, "stating_detector": STATED + DETECTOR, "aged_runtime": RUNTIME}
    folder = distribute(tmp_path / "site", "rma-aged", points, modules=modules)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if getattr(one, "action", "") == "deprecated"]


def test_each_deprecation_lasts_a_year_at_least_and_is_in_the_docs_and_the_changelog() -> None:
    page = (ROOT / "docs" / "plugin-authors.md").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for one in DEPRECATED.values():
        assert one.gone - one.since >= LASTS
        assert f"| {one.since} | {one.gone} |" in page
        assert f"a release from {one.gone} on may refuse it" in changes
    assert words_of(["no_hook_version", "a word that nobody knows", "no_hook_version"]) == (
        f"{OLD} `RMA_HOOK_VERSION = 1` into the module",
    )


def test_our_own_plugins_use_nothing_deprecated() -> None:
    ours = [one for one in installed() if one.shipped_by.startswith("rma-")]
    assert {one.name for one in ours} >= {"host", "threshold", "process", "nvidia", "docker"}
    assert [one.name for one in ours if used_by(import_module(one.value))] == []
    assert used_by(SimpleNamespace()) == ("no_hook_version",)


@pytest.mark.usefixtures("site")
async def test_a_running_agent_warns_once_however_often_it_looks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = AgentSettings(home=str(tmp_path), only_plugins=["host", "aged", "stating", "elderly"])
    with caplog.at_level(logging.WARNING, "rma_core.deprecations"):
        detecting = Detecting(settings)
        for _ in range(3):
            await detecting.look()
    said = warned(caplog)
    assert sorted(one.partition(" states")[0] for one in said) == [
        "the detector aged of rma-aged 1.0",
        "the runtime elderly of rma-aged 1.0",
    ]
    assert all(OLD in one for one in said)
    told = {one.name: one for one in detecting.reports() if one.name in settings.only_plugins}
    # It works all the same.
    assert {one.state for one in told.values()} == {"active"}
    assert {name: bool(one.deprecated) for name, one in told.items()} == {
        "host": False, "aged": True, "stating": False, "elderly": True,
    }  # fmt: skip


async def test_a_policy_in_its_child_is_warned_of_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    install(tmp_path)
    install(tmp_path, name="late", code=STATED + source(name="late"))
    plugins = Plugins.discover(kinds=["policy"], only=frozenset({"night", "late"}))
    async with policies_apart.started(plugins, {}) as found:
        assert set(found) == {"night", "late"}
    told = {one.name: one.deprecated for one in plugins.reports() if one.name in found}
    assert (told["late"], [OLD in one for one in told["night"]]) == ((), [True])


async def test_a_check_that_warns_breaks_nothing(tmp_path: Path) -> None:
    (tmp_path / "aged.py").write_text(source())
    target = Target("night", "policy", "aged", str(tmp_path))
    found = {one.check: one for one in [one async for one in results(target.case({}))]}
    assert {one.state for one in found.values()} == {"kept", "deprecated"}
    assert found["it uses nothing deprecated"].message.startswith(f"it {OLD}")
    [check] = [one for one in policy_contract if one.__name__ == "it_uses_nothing_deprecated"]
    with pytest.warns(PluginDeprecation, match="states no RMA_HOOK_VERSION"):
        await check(target.case({}))  # type: ignore[arg-type]  # a policy's


def test_commands_show_it_and_end_well(tmp_path: Path, site: Path) -> None:
    env = environment(tmp_path / "home", {"PYTHONPATH": str(site), "RMA_ONLY_PLUGINS": "host,threshold,aged,process"})

    def said(*arguments: str) -> tuple[str, str]:
        done = subprocess.run(
            rma(*arguments), env=env, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, done.stderr

    out, err = said("plugins", "--json")
    told = {one["name"]: one["deprecated"] for one in json.loads(out)["plugins"]}
    assert {name: len(words) for name, words in told.items() if words} == {"aged": 1}
    assert OLD in told["aged"][0]
    assert err == "", "it stands in what was printed"
    assert said("detect", "--json")[1].count("states no RMA_HOOK_VERSION") == 1
    assert OLD in " ".join(said("plugins")[0].split())
    out, _ = said("plugins", "check", "aged")
    assert re.search(r"! +it uses nothing deprecated", out)
    assert "kept, and a warning" in out


def test_what_a_plugin_calls_itself_reaches_no_terminal_as_a_command(tmp_path: Path) -> None:
    points = {"rma.detectors": {"aged": "aged_board"}}
    title = "1.0\x1b]0;OWNED\x07"
    distribute(tmp_path / "site", "rma-detect-aged", points, version=title, modules={"aged_board": DETECTOR})
    env = environment(tmp_path / "home", {"PYTHONPATH": str(tmp_path / "site"), "RMA_ONLY_PLUGINS": "host,aged"})
    env["RMA_APPROVE_PLUGINS"] = "*"
    for command in ("detect", "plugins", "doctor"):
        done = subprocess.run(
            rma(command), env=env, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
        )
        assert "\x1b]0" not in done.stdout + done.stderr
        assert "states no RMA_HOOK_VERSION" in done.stdout + done.stderr


def test_in_an_authors_tests_it_is_a_warning_and_an_error_for_who_wants_that(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[project.entry-points."rma.detectors"]\nx = "aged"\n'
    )
    (tmp_path / "aged.py").write_text(DETECTOR)
    test = 'pytest_plugins = ["rma_core.testing.pytest_plugin"]\ndef test_it(rma_check):\n    rma_check()\n'
    (tmp_path / "test_aged.py").write_text(test)

    def tested(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:asyncio", "-p", "no:cacheprovider", *more]
        command += ["-k", "deprecated", "--rootdir", str(tmp_path), str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)

    well = tested()
    assert (well.returncode, "1 passed" in well.stdout, "1 warning" in well.stdout) == (0, True, True), well.stdout
    assert OLD[:40] in well.stdout
    assert tested("-W", "error::DeprecationWarning").returncode == 1
