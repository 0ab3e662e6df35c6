"""The AMD detector, on what Linux shows of machines below /sys and /dev."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rma_detect_amd as amd
from rma_core import Detection, Device
from rma_core.models.strict import decode, encode
from tests.machine_files import lay_out

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = Path(__file__).parent / "data" / "amd"
MACHINES = sorted(path.stem for path in DATA.glob("*.txt"))
GIB = 2**30
CARD = "sys/bus/pci/devices/0000:03:00.0"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty machine."""
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def machine(name: str, root: Path) -> Path:
    lay_out((DATA / f"{name}.txt").read_text(), root)
    return root


def see(root: Path, allowed: Callable[[Path], bool] = Path.exists) -> Detection:
    """Detect; whatever comes of it must survive the way to the coordinator, and its reasons fit for people."""
    detection = amd.detect(root, allowed=allowed)
    assert decode(encode(detection), Detection, subject="detection") == detection
    assert len(detection.reason) <= 500
    return detection


def only(detection: Detection) -> Device:
    (device,) = detection.devices
    return device


# Cards


def test_a_card_is_told_with_everything_that_placement_asks_for(root: Path) -> None:
    detection = see(machine("desktop-rx-7900-xtx", root))
    assert (detection.state, detection.reason) == ("healthy", "")
    gpu = only(detection)
    assert (gpu.id, gpu.kind, gpu.vendor, gpu.api) == ("gpu:0000:03:00.0", "gpu", "AMD", "rocm")
    assert gpu.name == "AMD Radeon RX 7900 XTX"
    assert gpu.memory_bytes == 24560 * 2**20
    assert gpu.attributes == {
        "pci_address": "0000:03:00.0",
        "pci_id": "1002:744c",
        "driver": "amdgpu",
        "gfx": "gfx1100",
        "compute_units": 96,
        "unified_memory": False,
    }
    assert gpu.access
    assert gpu.access.device_nodes == ("/dev/kfd", "/dev/dri/renderD128")


def test_eight_cards_are_eight_devices_each_with_its_own_way_in(root: Path) -> None:
    detection = see(machine("server-eight-mi300x", root))
    assert detection.state == "healthy"
    assert [gpu.memory_bytes for gpu in detection.devices] == [206_141_652_992] * 8
    assert {(gpu.name, gpu.attributes["gfx"], gpu.attributes["compute_units"]) for gpu in detection.devices} == {
        ("AMD Instinct MI300X OAM", "gfx942", 304)
    }
    assert [gpu.access and gpu.access.device_nodes[1] for gpu in detection.devices] == [
        f"/dev/dri/renderD{minor}" for minor in range(128, 192, 8)
    ]


def test_each_partition_is_a_device_with_its_share_and_its_render_node(root: Path) -> None:
    detection = see(machine("server-mi300x-cpx", root))
    assert [gpu.id for gpu in detection.devices] == [f"gpu:0000:1b:00.0-{part}" for part in range(1, 9)]
    assert {gpu.attributes["parent"] for gpu in detection.devices} == {"gpu:0000:1b:00.0"}
    assert sum(gpu.memory_bytes or 0 for gpu in detection.devices) == 206_141_652_992
    assert [gpu.access and gpu.access.device_nodes[1] for gpu in detection.devices] == [
        f"/dev/dri/renderD{minor}" for minor in range(128, 136)
    ]


def test_partitions_are_found_by_whichever_bits_have_their_number(root: Path) -> None:
    machine("server-mi300x-cpx", root)
    before = see(root)
    for part, node in enumerate(sorted((root / amd.KFD_NODES).iterdir())):
        facts = (
            (node / "properties")
            .read_text()
            .replace(f"location_id {0x1B00 + part}", f"location_id {part << 28 | 0x1B00}")
        )
        (node / "properties").write_text(facts)
    assert see(root) == before


def test_a_card_that_kfd_passes_over_has_vulkan_and_says_why_not_rocm(root: Path) -> None:
    gpu = only(see(machine("desktop-rx-580", root)))
    assert (gpu.api, gpu.memory_bytes, gpu.name) == ("vulkan", 4 * GIB, "AMD Radeon RX 580 Series")
    assert "PCIe atomics" in str(gpu.attributes["rocm_reason"])
    assert gpu.access
    assert gpu.access.device_nodes == ("/dev/dri/renderD128",)


def test_a_card_that_rocm_no_longer_supports_has_vulkan_though_kfd_has_it(root: Path) -> None:
    machine("desktop-rx-580", root)
    node = root / amd.KFD_NODES / "1"
    node.mkdir()
    (node / "properties").write_text("simd_count 144\nsimd_per_cu 4\ngfx_target_version 80003\nlocation_id 768\n")
    gpu = only(see(root))
    assert (gpu.api, gpu.attributes["gfx"], gpu.attributes["compute_units"]) == ("vulkan", "gfx803", 36)
    assert gpu.attributes["rocm_reason"] == "ROCm no longer supports gfx803"


@pytest.mark.parametrize(
    ("version", "gfx"),
    [(90402, "gfx942"), (90010, "gfx90a"), (110501, "gfx1151"), (100300, "gfx1030"), (90012, "gfx90c")],
)
def test_targets_are_written_as_compilers_write_them(root: Path, version: int, gfx: str) -> None:
    assert amd.node_of(root, {}, version).gfx == gfx


# Graphics in the processor


def test_a_strix_halo_has_the_memory_that_rocm_may_take_and_an_npu(root: Path) -> None:
    detection = see(machine("strix-halo-128gb", root))
    assert detection.state == "healthy"
    gpu, npu = detection.devices
    assert (gpu.api, gpu.memory_bytes, gpu.attributes["unified_memory"]) == ("rocm", 96 * GIB, True)
    assert (npu.id, npu.kind, npu.name, npu.api, npu.memory_bytes) == (
        "npu:0000:c7:00.1", "npu", "AMD XDNA 2 NPU", None, None,
    )  # fmt: skip
    assert npu.access
    assert npu.access.device_nodes == ("/dev/accel/accel0",)


def test_what_the_firmware_set_aside_is_no_memory_of_the_systems(root: Path) -> None:
    machine("strix-halo-128gb", root)
    (root / "sys/bus/pci/devices/0000:c6:00.0/mem_info_vram_total").write_text(f"{96 * GIB}\n")
    gpu = see(root).devices[0]
    assert (gpu.memory_bytes, gpu.attributes["unified_memory"]) == (96 * GIB, False)


def test_graphics_that_rocm_does_not_support_have_only_what_was_set_aside(root: Path) -> None:
    machine("laptop-ryzen-7840u", root)
    bank = root / amd.KFD_NODES / "1/mem_banks/0/properties"
    assert see(root).devices[0].memory_bytes == GIB
    # Since Linux 6.10, KFD offers half of the system's memory.
    bank.write_text(f"heap_type 1\nsize_in_bytes {15 * GIB}\n")
    gpu = see(root).devices[0]
    assert (gpu.memory_bytes, gpu.attributes["unified_memory"], gpu.attributes["gfx"]) == (GIB, False, "gfx1103")


# Names


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("usr/share/libdrm/amdgpu.ids", "744C,\tC8,\tAMD Radeon RX 7900 XTX\n", "AMD Radeon RX 7900 XTX"),
        ("usr/share/libdrm/amdgpu.ids", "744C,\tCC,\tAMD Radeon RX 7900 XT\n", "AMD GPU 744c"),
        (
            "usr/share/misc/pci.ids",
            "1000  Other\n\t744c  No\n1002  AMD\n\t73bf  Navi 21\n\t\t1002 1  Sub\n#\n\t744c  N31 [RX 7900 XTX]\n",
            "AMD RX 7900 XTX",
        ),
        ("usr/share/hwdata/pci.ids", "1002  AMD\n\t73bf  Navi 21\n1003  Next\n\t744c  Not AMD's\n", "AMD GPU 744c"),
        (f"{CARD}/product_name", "AMD Radeon PRO W7900\x07", "AMD Radeon PRO W7900"),
    ],
)
def test_names_come_from_wherever_one_is_written(root: Path, file: str, text: str, name: str) -> None:
    machine("desktop-rx-7900-xtx", root)
    shutil.rmtree(root / "usr")
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text)
    assert only(see(root)).name == name


# What keeps a card from being used


def test_without_amd_hardware_there_is_nothing(root: Path) -> None:
    detection = see(root)
    assert (detection.state, detection.devices) == ("undetected", ())
    assert detection.reason == "no AMD GPU or NPU on the PCI bus (/sys/bus/pci/devices)"


def test_cards_without_driver_share_one_sentence_that_says_what_to_do(root: Path) -> None:
    detection = see(machine("server-mi300x-no-driver", root))
    assert (detection.state, detection.devices) == ("unhealthy", ())
    assert detection.reason.startswith(
        "AMD GPU at 0000:1b:00.0, 0000:3d:00.0: no driver has it: run `sudo modprobe amdgpu`"
    )


def test_a_card_lent_to_virtual_machines_is_named_and_its_virtual_functions_are_not(root: Path) -> None:
    detection = see(machine("server-mi300x-lent", root))
    assert detection.state == "unhealthy"
    assert detection.reason == (
        "AMD GPU at 0000:85:00.0: it is given to virtual machines (driver gim): bind it to amdgpu to use it here"
    )


def test_a_card_lent_beside_one_that_works_is_what_its_owner_wanted(root: Path) -> None:
    machine("desktop-rx-7900-xtx", root)
    machine("server-mi300x-lent", root)
    detection = see(root)
    assert detection.state == "healthy"
    assert [gpu.id for gpu in detection.devices] == ["gpu:0000:03:00.0"]
    assert "driver gim" in detection.reason


@pytest.mark.parametrize("missing", ["dev/kfd", "dev/dri/renderD128"])
def test_a_container_that_sees_the_card_and_not_its_nodes_is_told_how_to_be_started(root: Path, missing: str) -> None:
    machine("desktop-rx-7900-xtx", root)
    (root / missing).unlink()
    detection = see(root)
    assert (detection.state, detection.devices) == ("unhealthy", ())
    assert "is not here: in a container, start that with `--device`" in detection.reason


@pytest.mark.parametrize(
    ("closed", "named"),
    [(("kfd",), "/dev/kfd"), (("renderD128",), "/dev/dri/renderD*"), (("kfd", "renderD128"), "and")],
)
def test_a_user_outside_the_group_is_told_how_to_get_in(root: Path, closed: tuple[str, ...], named: str) -> None:
    detection = see(machine("desktop-rx-7900-xtx", root), lambda node: node.name not in closed)
    assert (detection.state, detection.devices) == ("unhealthy", ())
    assert "sudo usermod -aG render USER" in detection.reason
    assert named in detection.reason


def test_kfd_that_is_closed_does_not_matter_to_a_card_without_rocm(root: Path) -> None:
    assert see(machine("desktop-rx-580", root), lambda node: node.name != "kfd").state == "healthy"


def test_a_card_that_did_not_start_says_where_the_reason_stands(root: Path) -> None:
    machine("desktop-rx-7900-xtx", root)
    (root / CARD / "drm/renderD128").rmdir()
    assert "did not start it: `sudo dmesg | grep amdgpu`" in see(root).reason


def test_a_card_that_reports_no_memory_is_not_offered(root: Path) -> None:
    machine("desktop-rx-7900-xtx", root)
    (root / CARD / "mem_info_vram_total").write_text("0\n")
    detection = see(root)
    assert (detection.state, detection.devices) == ("unhealthy", ())
    assert "it reports no memory: power this machine off and on" in detection.reason


def drive(root: Path, driver: str) -> None:
    (root / CARD / "driver").unlink()
    (root / CARD / "driver").symlink_to(f"../drivers/{driver}")


def test_an_old_card_that_shows_the_screen_is_no_fault(root: Path) -> None:
    drive(machine("desktop-rx-580", root), "radeon")
    detection = see(root)
    assert detection.state == "undetected"
    assert detection.reason.startswith(
        "AMD GPU at 0000:03:00.0: radeon drives it, which is for graphics alone; cards from"
    )
    machine("strix-halo-128gb", root)
    detection = see(root)
    assert (detection.state, len(detection.devices)) == ("healthy", 2)


def test_a_driver_that_is_not_amds_is_named(root: Path) -> None:
    drive(machine("desktop-rx-7900-xtx", root), "fglrx")
    assert "its driver is fglrx, and only amdgpu makes it usable" in see(root).reason


def test_banks_of_more_memory_than_there_can_be_are_none(root: Path) -> None:
    machine("server-mi300x-cpx", root)
    for bank in root.rglob("mem_banks/0/properties"):
        bank.write_text(f"heap_type 1\nsize_in_bytes {10**18 - 1}\n")
    assert {gpu.memory_bytes for gpu in see(root).devices} == {None}


def test_one_broken_card_leaves_the_other_seven(root: Path) -> None:
    machine("server-eight-mi300x", root)
    (root / "sys/bus/pci/devices/0000:4e:00.0/driver").unlink()
    detection = see(root)
    assert detection.state == "unhealthy"
    assert len(detection.devices) == 7
    assert detection.reason.startswith("AMD GPU at 0000:4e:00.0: no driver")
    assert detection.reason.endswith("(7 usable)")


def test_an_npu_without_driver_is_said_beside_the_gpu_that_works(root: Path) -> None:
    machine("laptop-ryzen-7840u", root)
    (root / "sys/bus/pci/devices/0000:c2:00.1/driver").unlink()
    detection = see(root)
    assert [device.kind for device in detection.devices] == ["gpu"]
    assert detection.reason == (
        "AMD NPU at 0000:c2:00.1: no driver has it: run `sudo modprobe amdxdna` (Linux 6.14 or newer) (1 usable)"
    )


# Files that are not what they should be


def test_a_card_pulled_out_while_we_look_is_no_fault(root: Path) -> None:
    machine("desktop-rx-7900-xtx", root)

    def pull_out(_: Path) -> bool:
        shutil.rmtree(root / CARD, ignore_errors=True)
        return False

    detection = see(root, pull_out)
    assert (detection.state, detection.reason) == ("undetected", "the AMD GPU or NPU that was here is gone")


def test_a_card_that_does_not_tell_its_memory_is_still_a_card(root: Path) -> None:
    machine("desktop-rx-7900-xtx", root)
    (root / CARD / "mem_info_vram_total").unlink()
    gpu = only(see(root))
    assert (gpu.memory_bytes, gpu.reason) == (None, "the driver does not tell its memory")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_whatever_stands_in_a_file_and_whichever_is_gone_nothing_raises(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = machine(data.draw(st.sampled_from(MACHINES)), tmp_path_factory.mktemp("machine"))
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    for path in data.draw(st.lists(st.sampled_from(files), max_size=4, unique=True)):
        junk = data.draw(st.none() | st.binary(max_size=40) | st.sampled_from([b"9" * 30, b"-1", b"x" * 300_000]))
        path.unlink() if junk is None else path.write_bytes(junk)
    see(root)


@pytest.mark.parametrize("name", MACHINES)
def test_the_same_machine_gives_the_same_answer(root: Path, name: str) -> None:
    machine(name, root)
    assert see(root) == see(root)


def test_the_owners_setting_says_where_to_look(root: Path) -> None:
    assert amd.rma_detect_devices({"root": str(machine("server-mi300x-lent", root))}).state == "unhealthy"
