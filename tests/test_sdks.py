"""Environments of clients that live outside this one: made once for their pins, or a reason why not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests import needs, sdks

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pins of something, and nothing kept of it yet."""
    monkeypatch.setattr(sdks, "KEPT", tmp_path / "kept")
    file = tmp_path / "pins.txt"
    file.write_text("one==1")
    return file


def test_an_environment_is_made_once_for_its_pins(pins: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        folder.mkdir()

    first = sdks._made("x", [pins], make)
    assert (sdks._made("x", [pins], make), len(made), first.is_dir()) == (first, 1, True)
    pins.write_text("one==2")
    assert sdks._made("x", [pins], make) != first
    assert sorted(path.name[:2] for path in sdks.KEPT.iterdir()) == ["x-", "x-"]


def test_one_that_cannot_be_made_says_why_and_leaves_nothing(pins: Path) -> None:
    def make(folder: Path) -> None:
        folder.mkdir()
        sdks._run("sh", "-c", "echo no network >&2; exit 1")

    with pytest.raises(sdks.NotMadeError, match="no network"):
        sdks._made("x", [pins], make)
    assert list(sdks.KEPT.iterdir()) == []


def test_a_test_that_needs_one_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot() -> str:
        raise sdks.NotMadeError("pip failed: no index")

    monkeypatch.setattr(sdks, "litellm", cannot)
    monkeypatch.setattr(sdks, "node", cannot)
    for name in ("litellm", "node"):
        assert "pip failed: no index; it needs" in str(needs.CHECKS[name]())


def test_pins_name_every_package_with_its_version_and_no_address() -> None:
    for file in ("litellm.txt", "node.txt"):
        lines = (sdks.HERE / file).read_text(encoding="utf-8").splitlines()
        assert all("==" in line for line in lines if line and not line.startswith("#"))
    lock = (sdks.HERE / "package-lock.json").read_text(encoding="utf-8")
    assert "://" not in lock
    wanted = json.loads((sdks.HERE / "package.json").read_text(encoding="utf-8"))["dependencies"]
    packages = json.loads(lock)["packages"]
    assert {name: packages[f"node_modules/{name}"]["version"] for name in wanted} == wanted
