"""The Intel detector, on what Linux shows of machines below /sys and /dev."""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rma_detect_intel as intel
from rma_core import Detection, Device
from rma_core.models.strict import decode, encode
from tests.machine_files import lay_out, own_memory

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = Path(__file__).parent / "data" / "intel"
MACHINES = sorted(path.stem for path in DATA.glob("*.txt"))
ARC = "sys/bus/pci/devices/0000:03:00.0"
IRIS = "sys/bus/pci/devices/0000:00:02.0"
GIB = 2**30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty machine."""
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def text(name: str) -> str:
    return (DATA / f"{name}.txt").read_text()


def machine(name: str, root: Path) -> Path:
    lay_out(text(name), root)
    return root


def regions(*sizes: tuple[int, int]) -> bytes:
    """What i915 answers: its header, and for each region its class and size."""
    told = b"".join(struct.pack("=HHIQ72x", kind, 0, 0, size) for kind, size in sizes)
    return struct.pack("=I12x", len(sizes)) + told


def i915(name: str, root: Path) -> Callable[[Path], bytes]:
    """What the machine's i915 answers through each of its render nodes: the system's memory, then the card's own."""
    own = own_memory(text(name))
    return lambda node: regions((0, 32 * GIB), (1, own[node.relative_to(root).as_posix()]))


def see(name: str, root: Path, allowed: Callable[[Path], bool] = Path.exists) -> Detection:
    """Detect; whatever comes of it must survive the way to the coordinator, and its reasons fit for people."""
    detection = intel.detect(root, allowed=allowed, ask=i915(name, root))
    assert decode(encode(detection), Detection, subject="detection") == detection
    assert len(detection.reason) <= 500
    return detection


def look(name: str, root: Path) -> Detection:
    return see(name, machine(name, root))


def only(detection: Detection) -> Device:
    (device,) = detection.devices
    return device


# Cards


def test_a_card_of_the_kernels_i915_is_told_with_everything_that_placement_asks_for(root: Path) -> None:
    detection = look("desktop-arc-a770", root)
    assert (detection.state, detection.reason) == ("healthy", "")
    gpu = only(detection)
    assert (gpu.id, gpu.kind, gpu.vendor, gpu.api) == ("gpu:0000:03:00.0", "gpu", "Intel", "level_zero")
    assert (gpu.name, gpu.memory_bytes, gpu.reason) == ("Intel Arc A770", 16288 * 2**20, "")
    assert gpu.attributes == {
        "pci_address": "0000:03:00.0",
        "pci_id": "8086:56a0",
        "driver": "i915",
        "unified_memory": False,
    }
    assert gpu.access
    assert gpu.access.device_nodes == ("/dev/dri/renderD128",)


def test_xe_writes_a_cards_memory_down_and_is_not_asked(root: Path) -> None:
    gpu = only(look("desktop-arc-b580", root))
    assert (gpu.memory_bytes, gpu.api, gpu.name) == (12 * GIB, "level_zero", "Intel Arc B580")


def test_the_tiles_of_a_card_are_added_up(root: Path) -> None:
    machine("desktop-arc-b580", root)
    tile = root / "sys/bus/pci/devices/0000:01:00.0/tile1"
    tile.mkdir()
    (tile / "physical_vram_size_bytes").write_text(f"{12 * GIB}\n")
    assert only(see("desktop-arc-b580", root)).memory_bytes == 24 * GIB


def test_i915_of_intels_own_packages_writes_memory_down_too(root: Path) -> None:
    machine("desktop-arc-a770", root)
    (root / ARC / "drm/card0/lmem_total_bytes").write_text(f"{16 * GIB}\n")
    assert only(see("desktop-arc-a770", root)).memory_bytes == 16 * GIB


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("8086  Intel Corporation\n\t56a1  DG2 [Arc A750]\n1234  Other\n\t56a0  Not Intel's\n", "Intel GPU 56a0"),
        ("8086  Intel Corporation\n\t56a0  DG2\n", "Intel DG2"),
        ("8086  Intel Corporation\n\t56a0  DG2 [Intel Arc A770]\n", "Intel Arc A770"),
        ("", "Intel GPU 56a0"),
    ],
)
def test_names_come_from_the_list_of_pci_ids(root: Path, text: str, name: str) -> None:
    machine("desktop-arc-a770", root)
    (root / "usr/share/misc/pci.ids").write_text(text)
    assert only(see("desktop-arc-a770", root)).name == name


def test_two_cards_are_two_devices_in_order(root: Path) -> None:
    detection = look("server-two-flex-170", root)
    assert [(gpu.id, gpu.memory_bytes) for gpu in detection.devices] == [
        ("gpu:0000:4d:00.0", 0x37A800000),
        ("gpu:0000:b3:00.0", 0x37A800000),
    ]


def test_a_card_that_does_not_tell_its_memory_does_not_pass_for_one_without(root: Path) -> None:
    machine("desktop-arc-a770", root)
    gpu = only(intel.detect(root, allowed=Path.exists, ask=lambda _: b""))
    assert (gpu.memory_bytes, gpu.attributes["unified_memory"]) == (None, False)
    assert gpu.reason == "the driver does not tell its memory: a newer kernel may"


@pytest.mark.parametrize(
    ("told", "size"),
    [
        (b"", 0),
        (b"\1\0", 0),
        (regions(), 0),
        (regions((0, 32 * GIB)), 0),
        (regions((0, 32 * GIB), (1, 8 * GIB), (1, 8 * GIB)), 16 * GIB),
        (regions((1, 2**64 - 1)), 0),
        (regions((1, 8 * GIB))[:-1], 0),
        (b"\xff" * 4 + regions((1, 8 * GIB))[4:], 8 * GIB),
    ],
)
def test_what_i915_answers_is_read_and_never_believed(told: bytes, size: int) -> None:
    assert intel.region_bytes(told) == size


def test_i915_is_asked_for_the_length_and_then_for_the_regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node, told, asked = tmp_path / "renderD128", regions((0, 32 * GIB), (1, 16 * GIB)), []
    node.touch()

    def kernel(_: int, code: int, query: bytes) -> None:
        """Answer as i915_query.c does: a length of 0 asks for the length, another one must be right."""
        count, flags, items = struct.unpack("=IIQ", query)
        query_id, length, item_flags, place = struct.unpack("=QiIQ", ctypes.string_at(items, 24))
        asked.append((code, count, flags, query_id, length, item_flags))
        if length:
            assert ctypes.string_at(place, length) == bytes(length)
            ctypes.memmove(place, told, length)
        ctypes.memmove(items + 8, struct.pack("=i", len(told)), 4)

    monkeypatch.setattr(fcntl, "ioctl", kernel)
    assert intel.region_bytes(intel.ask_i915(node)) == 16 * GIB
    # DRM_IOWR(0x40 + 0x39, 16 bytes), one item each, DRM_I915_QUERY_MEMORY_REGIONS.
    assert asked == [(0xC0106479, 1, 0, 4, 0, 0), (0xC0106479, 1, 0, 4, len(told), 0)]


@pytest.mark.parametrize("node", ["/dev/null", "/nonexistent", "/"])
def test_what_is_no_render_node_answers_nothing(node: str) -> None:
    assert intel.ask_i915(Path(node)) == b""


# Graphics in the processor


def test_graphics_in_the_processor_have_no_memory_of_their_own_and_claim_none(root: Path) -> None:
    gpu = only(look("laptop-iris-xe", root))
    assert (gpu.id, gpu.api, gpu.memory_bytes) == ("gpu:0000:00:02.0", "level_zero", None)
    assert gpu.attributes["unified_memory"] is True
    assert gpu.reason == "it uses the system's memory"


def test_graphics_older_than_intels_compute_runtime_have_no_api(root: Path) -> None:
    machine("laptop-iris-xe", root)
    (root / IRIS / "device").write_text("0x5917\n")
    gpu = only(see("laptop-iris-xe", root))
    assert (gpu.api, gpu.health) == (None, "healthy")
    assert gpu.reason == "it uses the system's memory; it is older than what Intel's compute runtime supports"


def test_a_core_ultra_has_graphics_and_an_npu(root: Path) -> None:
    detection = look("laptop-core-ultra-155h", root)
    assert detection.state == "healthy"
    gpu, npu = detection.devices
    assert gpu.api == "level_zero"
    assert (npu.id, npu.kind, npu.name, npu.api) == ("npu:0000:00:0b.0", "npu", "Intel NPU (Meteor Lake)", None)
    assert npu.access
    assert npu.access.device_nodes == ("/dev/accel/accel0",)


# What keeps one from being used


def test_without_intel_hardware_there_is_nothing(root: Path) -> None:
    detection = intel.detect(root)
    assert detection.state == "undetected"
    assert detection.reason == "no Intel GPU or NPU on the PCI bus (/sys/bus/pci/devices)"


def test_cards_without_driver_share_one_sentence_that_says_what_to_do(root: Path) -> None:
    detection = look("server-two-max-1100-no-driver", root)
    assert (detection.state, detection.devices) == ("unhealthy", ())
    assert detection.reason.startswith("Intel GPU at 0000:29:00.0, 0000:9a:00.0: no driver has it: ")
    assert "install a newer one" in detection.reason


def test_graphics_without_driver_are_said_too(root: Path) -> None:
    detection = look("nas-sandy-bridge-no-driver", root)
    assert detection.state == "unhealthy"
    assert "sudo modprobe i915" in detection.reason


def test_a_card_lent_to_virtual_machines_is_named_and_its_virtual_functions_are_not(root: Path) -> None:
    machine("server-two-flex-170", root)
    card = root / "sys/bus/pci/devices/0000:4d:00.0"
    (card / "driver").unlink()
    (card / "driver").symlink_to("../drivers/vfio-pci")
    virtual = root / "sys/bus/pci/devices/0000:b3:00.1"
    shutil.copytree(root / "sys/bus/pci/devices/0000:b3:00.0", virtual, symlinks=True)
    (virtual / "physfn").symlink_to("../0000:b3:00.0")
    detection = see("server-two-flex-170", root)
    assert detection.state == "healthy"
    assert [gpu.id for gpu in detection.devices] == ["gpu:0000:b3:00.0"]
    assert detection.reason == (
        "Intel GPU at 0000:4d:00.0: it is given to virtual machines (driver vfio-pci): "
        "bind it to i915 or xe to use it here"
    )


def test_a_container_without_the_node_is_told_how_to_be_started(root: Path) -> None:
    machine("desktop-arc-a770", root)
    (root / "dev/dri/renderD128").unlink()
    assert "/dev/dri/renderD* is not here: in a container" in see("desktop-arc-a770", root).reason


def test_a_user_outside_the_group_is_told_how_to_get_in_and_i915_is_not_asked(root: Path) -> None:
    machine("desktop-arc-a770", root)
    detection = intel.detect(root, allowed=lambda _: False, ask=lambda _: pytest.fail("asked through a closed node"))
    assert (detection.state, detection.devices) == ("unhealthy", ())
    assert "sudo usermod -aG render USER" in detection.reason


def test_a_card_that_did_not_start_says_where_the_reason_stands(root: Path) -> None:
    machine("desktop-arc-a770", root)
    (root / ARC / "drm/renderD128").rmdir()
    assert "did not start it: `sudo dmesg | grep i915`" in see("desktop-arc-a770", root).reason


def test_an_npu_without_driver_is_said_beside_the_gpu_that_works(root: Path) -> None:
    machine("laptop-core-ultra-155h", root)
    (root / "sys/bus/pci/devices/0000:00:0b.0/driver").unlink()
    detection = see("laptop-core-ultra-155h", root)
    assert (detection.state, [device.kind for device in detection.devices]) == ("unhealthy", ["gpu"])
    assert "Intel NPU at 0000:00:0b.0: no driver has it: run `sudo modprobe intel_vpu`" in detection.reason


# Files that are not what they should be


def test_a_card_pulled_out_while_we_look_is_no_fault(root: Path) -> None:
    machine("desktop-arc-a770", root)

    def pull_out(_: Path) -> bool:
        shutil.rmtree(root / ARC, ignore_errors=True)
        return False

    assert see("desktop-arc-a770", root, pull_out).reason == "the Intel GPU or NPU that was here is gone"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data(), told=st.binary(max_size=300))
def test_whatever_stands_in_a_file_and_whatever_a_driver_says_nothing_raises(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, told: bytes
) -> None:
    root = machine(data.draw(st.sampled_from(MACHINES)), tmp_path_factory.mktemp("machine"))
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    for path in data.draw(st.lists(st.sampled_from(files), max_size=4, unique=True)):
        junk = data.draw(st.none() | st.binary(max_size=40) | st.sampled_from([b"9" * 30, b"-1", b"x" * 300_000]))
        path.unlink() if junk is None else path.write_bytes(junk)
    detection = intel.detect(root, allowed=Path.exists, ask=lambda _: told)
    assert decode(encode(detection), Detection, subject="detection") == detection


@pytest.mark.parametrize("name", MACHINES)
def test_the_same_machine_gives_the_same_answer(root: Path, name: str) -> None:
    machine(name, root)
    assert see(name, root) == see(name, root)


def test_the_owners_setting_says_where_to_look(root: Path) -> None:
    machine("nas-sandy-bridge-no-driver", root)
    assert intel.rma_detect_devices({"root": str(root)}).state == "unhealthy"
