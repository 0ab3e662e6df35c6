"""What detectors read with: never an exception, never without a bound, never a wait."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rma_core import sysfs
from tests.machine_files import lay_out

if TYPE_CHECKING:
    from pathlib import Path

MACHINE = """\
[sys/bus/pci/devices/0000:03:00.0]
vendor = 0x1002
device = 0x744c
class = 0x030000
driver -> ../../../../bus/pci/drivers/amdgpu
[sys/bus/pci/devices/0000:01:00.1]
vendor = 0x8086
device = 0x56a0
class = 0x038000
physfn -> ../0000:01:00.0
[usr/share/misc]
pci.ids:
  # comment
  1002  AMD
  \t744c  Navi 31 [Radeon RX 7900 XTX]
  \t\t1002 0e3b  a board
  8086  Intel Corporation
  \t1234  Plain name
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    lay_out(MACHINE, tmp_path)
    return tmp_path


def test_devices_on_the_bus_are_told_in_the_order_of_their_addresses(root: Path) -> None:
    virtual, card = sysfs.pci_devices(root)
    assert (card.address, card.pci_id, card.class_code) == ("0000:03:00.0", "1002:744c", "0x030000")
    assert (card.driver, card.is_virtual) == ("amdgpu", False)
    assert (virtual.address, virtual.driver, virtual.is_virtual) == ("0000:01:00.1", "", True)


def test_a_machine_without_a_bus_has_no_devices(tmp_path: Path) -> None:
    assert sysfs.pci_devices(tmp_path) == []


def test_what_is_pulled_out_while_one_looks_says_nothing(root: Path) -> None:
    (root / "sys/bus/pci/devices/0000:04:00.0").symlink_to("gone")
    gone = sysfs.pci_devices(root)[-1]
    assert gone[1:] == ("", "", "", "", False)


@pytest.mark.parametrize(
    ("vendor", "device", "name"),
    [
        ("0x1002", "0x744c", "Radeon RX 7900 XTX"),
        ("0x8086", "0x1234", "Plain name"),
        ("0x8086", "0x744c", ""),
        ("0x1002", "0x0e3b", ""),
        ("0x1002", ".*", ""),
        ("", "", ""),
    ],
)
def test_a_name_is_taken_from_its_makers_part_of_the_list(root: Path, vendor: str, device: str, name: str) -> None:
    assert sysfs.pci_name(root, vendor, device) == name


@pytest.mark.parametrize("where", ["absent", "folder", "nul\0in", "closed/file", "lone\ud800", "pipe"])
def test_what_cannot_be_read_says_nothing(tmp_path: Path, where: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / where
    assert (sysfs.read_text(path), sysfs.read_int(path), sysfs.link_name(path)) == ("", None, "")
    assert sysfs.list_names(path) == []
    assert sysfs.exists(path) is sysfs.may_open(path) is (where in ("folder", "pipe"))


def test_no_more_of_a_file_is_read_than_is_asked_for(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    assert sysfs.read_text(tmp_path / "huge") == "\0" * sysfs.MOST_BYTES
    assert sysfs.read_text(tmp_path / "huge", most_bytes=3) == "\0" * 3


def test_no_more_entries_are_listed_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}").touch()
    assert sysfs.list_names(tmp_path) == [f"{number:02}" for number in range(20)]
    monkeypatch.setattr(sysfs, "MOST_ENTRIES", 5)
    names = sysfs.list_names(tmp_path)
    assert len(names) == 5
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("17163091968", 17163091968), ("0x10", None), ("-1", None), ("", None), (None, None), ("٣", None)],
)
def test_a_whole_number_is_decimal_digits_and_nothing_else(text: str | None, number: int | None) -> None:
    assert sysfs.whole_number(text) == number


def test_more_than_any_card_has_is_no_number() -> None:
    assert sysfs.whole_number(str(sysfs.MOST)) == sysfs.MOST
    assert sysfs.whole_number(str(sysfs.MOST + 1)) is None
    assert sysfs.whole_number("9" * 5000) is None


def test_a_device_node_may_be_opened_by_those_who_may_read_and_write_it(tmp_path: Path) -> None:
    node = tmp_path / "renderD128"
    assert not sysfs.may_open(node)
    node.touch(0o600)
    assert sysfs.may_open(node)
    node.chmod(0o400)
    assert sysfs.may_open(node) is (os.geteuid() == 0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(content=st.binary(max_size=400))
def test_whatever_a_file_holds_it_is_text_that_can_be_shown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    shown = sysfs.printable(sysfs.read_text(tmp_path / "file"))
    assert len(shown) <= 100
    assert not shown or shown.isprintable()
    assert sysfs.read_int(tmp_path / "file") is None or content.strip().isdigit()
