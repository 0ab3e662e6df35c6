"""Detectors without Python: executables and JSON files in a folder that the machine's owner chose."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core import detector_files
from rma_core.builtin import file_detector
from rma_core.detection import observe
from rma_core.errors import DetectionError, SettingProblem
from rma_core.host import Plugins
from rma_core.settings import AgentSettings
from rma_core.testing.checking import results, targets

if TYPE_CHECKING:
    from pathlib import Path

    from rma_core.detection import Observation
    from rma_core.models.worker import PluginReport

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="executables begin with #! here")

BOARD: dict[str, Any] = {"id": "npu:0", "kind": "npu", "name": "Board"}
SAYS_BOARD = f"echo '{json.dumps([BOARD])}'"


def write(folder: Path, name: str, text: str, mode: int = 0o755) -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(mode)
    return path


def script(folder: Path, name: str, body: str) -> Path:
    return write(folder, name, f"#!/bin/sh\n{body}\n")


async def detected(folder: Path, *, deadline_s: float = 60, **tables: dict[str, object]) -> dict[str, Observation]:
    """What the files of a folder detect, by name."""
    plugins = Plugins.discover(kinds=["detector"], files=str(folder))
    seen = await observe(plugins, config=tables, deadline_s=deadline_s)
    return {one.detector: one for one in seen if one.distribution == detector_files.SHIPPED_BY}


def reports(folder: Path, **rules: Any) -> dict[str, PluginReport]:
    return {
        one.name: one
        for one in Plugins.discover(kinds=["detector"], files=str(folder), **rules).reports()
        if one.distribution == detector_files.SHIPPED_BY
    }


async def test_an_executable_and_a_file_say_what_there_is(tmp_path: Path) -> None:
    script(tmp_path, "board.sh", SAYS_BOARD)
    write(tmp_path, "fixed.json", json.dumps({"devices": [{**BOARD, "id": "npu:1", "memory_bytes": 2**33}]}), 0o644)
    write(tmp_path, ".hidden", "x")
    seen = await detected(tmp_path)
    assert {name: one.detection.state for name, one in seen.items()} == {"board": "healthy", "fixed": "healthy"}
    assert seen["fixed"].detection.devices[0].memory_bytes == 2**33


async def test_an_executable_is_given_its_table_and_nothing_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RMA_JOIN_TOKEN", "rmaj_secret")
    script(tmp_path, "nosy", 'exit "$(env | grep -c RMA_)"')
    script(tmp_path, "told", """grep -q CORAL && echo '[{"id": "npu:0", "kind": "npu", "name": "Coral"}]'""")
    seen = await detected(tmp_path, told={"board": "CORAL"})
    assert seen["told"].detection.devices[0].name == "Coral"
    assert "JSON" in seen["nosy"].detection.reason, "it ended well, with nothing of ours in its environment"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("exit 3", "ended with exit code 3"),
        ("echo no driver here >&2; exit 1", "ended with exit code 1: no driver here"),
        ("echo not json", "JSON"),
        ("echo '[{}]'", "$.devices[0]"),
        ("kill -9 $$", "ended with exit code -9"),
        ("sleep 60", "did not answer within 1 s"),
        ("head -c 600000 /dev/zero | tr '\\0' ' '", "more than 512 KiB"),
    ],
)
async def test_what_goes_wrong_costs_that_one_only_and_is_said(body: str, words: str, tmp_path: Path) -> None:
    script(tmp_path, "bad", body)
    write(tmp_path, "good.json", json.dumps([BOARD]))
    seen = await detected(tmp_path, bad={"deadline_s": 1 if body == "sleep 60" else 60})
    assert seen["bad"].detection.state == "unhealthy"
    assert words in seen["bad"].detection.reason
    assert seen["good"].detection.state == "healthy"


async def test_a_file_that_no_system_runs_is_said_with_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path, "text", "echo hello\n")
    assert "does it begin with #!" in (await detected(tmp_path))["text"].detection.reason


def test_what_others_could_change_and_what_is_none_is_not_run(tmp_path: Path) -> None:
    write(tmp_path, "loose", "#!/bin/sh\n", 0o775)
    write(tmp_path, "plain.txt", "x", 0o644)
    write(tmp_path, "b a d", "#!/bin/sh\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    found = {one.name: one.problem for one in detector_files.listed(tmp_path)}
    assert "others may change loose: chmod go-w" in found["loose"]
    assert "neither executable" in found["plain"]
    assert "no name of a detector" in found["b a d"]
    assert "is no file" in found["folder"]
    assert "cannot be looked at" in found["gone"]
    assert {one.state for one in reports(tmp_path).values()} == {"invalid"}
    tmp_path.chmod(0o777)
    script(tmp_path, "fine", "exit 0")
    assert "others may change" in {one.name: one.problem for one in detector_files.listed(tmp_path)}["fine"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_not_run(tmp_path: Path) -> None:
    os.chown(script(tmp_path, "theirs", "exit 0"), 65534, 65534)
    [found] = detector_files.listed(tmp_path)
    assert "belongs to another user" in found.problem


def test_its_owner_has_approved_it_and_can_block_it(tmp_path: Path) -> None:
    script(tmp_path, "board", "exit 0")
    assert reports(tmp_path, approval_required=True)["board"].state == "active"
    assert reports(tmp_path, blocked=frozenset({"board"}))["board"].state == "blocked"


def test_one_that_is_called_like_an_installed_detector_is_refused_with_it(tmp_path: Path) -> None:
    script(tmp_path, "host", "exit 0")
    found = [one for one in Plugins.discover(kinds=["detector"], files=str(tmp_path)).reports() if one.name == "host"]
    assert [one.state for one in found] == ["invalid", "invalid"]
    assert "2 plugins in rma.detectors are called 'host'" in found[0].reason


def test_a_folder_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingProblem, match="No such file"):
        Plugins.discover(kinds=["detector"], files=str(tmp_path / "nowhere"))
    for number in range(65):
        write(tmp_path, f"f{number}", "")
    with pytest.raises(SettingProblem, match="has 65 files"):
        detector_files.listed(tmp_path)
    # A coordinator, which detects nothing, does not look.
    Plugins.discover(kinds=["policy"], files=str(tmp_path / "nowhere"))


def test_the_setting_names_the_folder() -> None:
    assert AgentSettings(detectors="/srv/detectors").plugin_rules()["files"] == "/srv/detectors"
    assert AgentSettings().plugin_rules()["files"] == ""


async def test_a_file_can_be_checked_like_any_plugin(tmp_path: Path) -> None:
    path = script(tmp_path, "board", SAYS_BOARD)
    [target] = targets(str(path))
    assert [one async for one in results(target.case({})) if one.state != "kept"] == []


@pytest.mark.parametrize(
    ("said", "state", "reason"),
    [
        ([BOARD], "healthy", ""),
        ([], "undetected", "x lists no device"),
        ({"devices": [BOARD]}, "healthy", ""),
        ({"devices": [], "reason": "no card in any slot"}, "undetected", "no card in any slot"),
        ({"state": "unhealthy", "reason": "restart it", "devices": [BOARD]}, "unhealthy", "restart it"),
    ],
)
def test_the_forms_of_an_answer(said: object, state: str, reason: str) -> None:
    found = file_detector.read(json.dumps(said).encode(), "x")
    assert (found.state, found.reason) == (state, reason)


JSON = st.recursive(
    st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_is_said_is_a_detection_or_a_sentence(data: bytes) -> None:
    with contextlib.suppress(DetectionError):
        assert file_detector.read(data, "x").state in ("healthy", "undetected", "unhealthy")
