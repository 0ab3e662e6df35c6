"""The gallery of machines: the table that is checked in is what detectors, policy and placement say today."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests import gallery, nvml
from tests.needs import need

if TYPE_CHECKING:
    from pathlib import Path

RECORDED = [name for name in gallery.NAMES if gallery.recorded(name)]


Place = Callable[[str], gallery.Placed]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Replays a machine, each once; the stand-in for NVML is made when it is first needed."""

    @functools.cache
    def library() -> Path:
        need("gcc")
        return nvml.build(tmp_path_factory.mktemp("nvml"))

    return functools.cache(lambda name: gallery.placed(name, library))


def test_every_machine_has_its_line_in_the_table_and_nothing_else_has() -> None:
    assert list(gallery.rows()) == gallery.NAMES
    assert gallery.TABLE.read_text(encoding="utf-8").startswith(gallery.HEAD)


@pytest.mark.parametrize("name", gallery.NAMES)
def test_a_machine_is_placed_as_the_table_says(name: str, place: Place) -> None:
    is_, was = gallery.row(name, place(name)), gallery.rows()[name]
    assert is_ == was, f"\n- {was}\n+ {is_}\nis its owner going to agree? then run `python -m tests.gallery`"


@pytest.mark.parametrize("name", RECORDED)
def test_a_machine_gets_the_tier_that_its_owner_expects(name: str, place: Place) -> None:
    expected = gallery.recorded(name)["owner_expects"]
    assert place(name).decision.tier == (expected or None)


@pytest.mark.parametrize("name", gallery.NAMES)
def test_the_reason_begins_with_the_tier(name: str, place: Place) -> None:
    decision = place(name).decision
    assert decision.reason.startswith(f"tier {decision.tier}: " if decision.tier else "no tier: ")


@pytest.mark.parametrize("name", RECORDED)
def test_a_machine_says_where_it_was_seen(name: str) -> None:
    assert len(gallery.recorded(name)["source"]) > len("see tests/data/apple")


def test_the_gallery_has_machines_of_every_maker_and_kind(place: Place) -> None:
    reports = [place(name).report for name in gallery.NAMES]
    accelerators = [device for report in reports for device in report.devices if device.kind in ("gpu", "npu")]
    assert {device.vendor for device in accelerators} >= {"AMD", "Apple", "Intel", "NVIDIA"}
    assert {device.api for device in accelerators} >= {"cuda", "rocm", "metal", "level_zero", "vulkan"}
    virtual = {str(device.attributes["virtual"]) for report in reports for device in report.of_kind("host")}
    assert virtual >= {"", "wsl", "container:docker", "amazon"}
    assert max(len(report.gpus) for report in reports) == 8
