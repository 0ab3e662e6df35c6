"""The host detector, on what systems say of themselves and on this machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from rma_core.builtin import cpu_facts, cpuid, host_detector, host_storage, virtual
from rma_core.builtin.host_detector import Readings, detect
from rma_core.builtin.limits import CgroupLimits
from rma_core.models.hardware import Detection, Device, summarize

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30
STORAGE = host_storage.Storage("docker", 20 * 10**9, 32 * 10**9, "ext4")

PI_4 = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

Revision\t: c03114
Serial\t\t: 100000000badcafe
Model\t\t: Raspberry Pi 4 Model B Rev 1.4
"""
SPARK = "".join(
    f"processor : {n}\nFeatures : asimd asimddp sve i8mm bf16 sve2\nCPU implementer : 0x41\nCPU part : {part}\n\n"
    for n, part in enumerate(["0xd87"] * 10 + ["0xd85"] * 10)
)
XEON_VM = """processor : 0
vendor_id : GenuineIntel
model name : Intel(R) Xeon(R) Processor
flags : fpu vme avx f16c hypervisor avx2 fma avx512f avx_vnni avx512_bf16 avx512_vnni amx_bf16 amx_tile amx_int8 sha_ni
"""
M2_SYSCTL = """hw.model: Mac14,2
hw.optional.arm64: 1
hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_SME: 0
hw.perflevel0.physicalcpu: 4
machdep.cpu.brand_string: Apple M2
kern.hv_vmm_present: 0
"""
INTEL_MAC_SYSCTL = """hw.model: MacBookPro16,1
hw.optional.avx2_0: 1
machdep.cpu.vendor: GenuineIntel
machdep.cpu.brand_string: Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz
machdep.cpu.features: FPU VME SSE4.2 FMA F16C AVX1.0
machdep.cpu.leaf7_features: BMI1 AVX2
"""


def _readings(**changes: object) -> Readings:
    whole = Readings(
        system="linux",
        kernel="6.8.0",
        machine="x86_64",
        os_version="Debian GNU/Linux 12",
        logical_cpus=128,
        physical_cores=64,
        memory_bytes=256 * GIB,
        available_bytes=200 * GIB,
        swap_bytes=0,
    )
    return whole._replace(**changes)  # type: ignore[arg-type]


def _devices(found: Detection) -> dict[str, Device]:
    return {device.id: device for device in found.devices}


def _detect(root: Path, granted: CgroupLimits | None = None, **changes: object) -> dict[str, Device]:
    return _devices(detect(_readings(**changes), granted or CgroupLimits(), root, storage=STORAGE))


def test_a_64_core_host_that_grants_2_cpus_and_4_gib_is_a_2_core_4_gib_worker(tmp_path: Path) -> None:
    granted = CgroupLimits(cpus=2.0, memory_bytes=4 * GIB, available_bytes=3 * GIB)
    found = detect(_readings(), granted, tmp_path, storage=STORAGE)
    short = summarize(found.devices)
    assert (short.cpu_cores, short.ram) == (2, "4.0GB")
    memory = _devices(found)["memory"].attributes
    assert (memory["available_bytes"], memory["physical_bytes"]) == (3 * GIB, 256 * GIB)
    sentence = "the cgroup or container this runs in grants 2 of 128 CPUs and 4.0 of 256.0 GiB of memory"
    assert _devices(found)["host"].attributes["limited_by"] == sentence


@pytest.mark.parametrize(("quota", "cores"), [(0.5, 1), (1.0, 1), (2.5, 2), (100.0, 64), (None, 64)])
def test_a_part_of_a_cpu_counts_down_but_never_to_nothing(tmp_path: Path, quota: float | None, cores: int) -> None:
    cpu = _detect(tmp_path, CgroupLimits(cpus=quota))["cpu"].attributes
    assert cpu["cores"] == cores
    assert cpu.get("cpu_quota") == quota


def test_cores_are_physical_on_bare_metal_and_cpus_in_a_virtual_machine(tmp_path: Path) -> None:
    vm = cpu_facts.CpuFacts(hypervisor=True)
    assert _detect(tmp_path, logical_cpus=4, physical_cores=2)["cpu"].attributes["cores"] == 2
    assert _detect(tmp_path, logical_cpus=4, physical_cores=2, cpu=vm)["cpu"].attributes["cores"] == 4


def test_affinity_and_cpuset_limit_together(tmp_path: Path) -> None:
    granted = CgroupLimits(cpuset=frozenset({1, 2, 3}))
    assert _detect(tmp_path, granted, affinity=frozenset({0, 1, 2}))["cpu"].attributes["granted_cpus"] == 2.0


def test_unknown_physical_cores_count_as_the_logical_ones(tmp_path: Path) -> None:
    assert _detect(tmp_path, physical_cores=None, logical_cpus=4)["cpu"].attributes["cores"] == 4
    assert _detect(tmp_path, physical_cores=None, logical_cpus=None)["cpu"].attributes["cores"] == 1


def test_missing_facts_are_left_out_and_fail_nothing(tmp_path: Path) -> None:
    bare = Readings(system="linux", kernel="", machine="riscv64", os_version="", memory_bytes=GIB)
    found = detect(bare, CgroupLimits(), tmp_path, storage=STORAGE)
    assert found.state == "healthy"
    assert _devices(found)["cpu"].name == "riscv64"
    assert _devices(found)["host"].attributes["on_battery"] is None


def test_unreadable_memory_is_unhealthy_and_says_so(tmp_path: Path) -> None:
    found = detect(_readings(memory_bytes=None), CgroupLimits(), tmp_path, storage=None)
    assert found.state == "unhealthy"
    assert "memory size and free storage" in found.reason
    assert set(_devices(found)) == {"host", "cpu"}


@pytest.mark.parametrize(
    ("machine", "pointer_bytes", "name"),
    [
        ("aarch64", 8, "arm64"),
        ("aarch64", 4, "armv7l"),
        ("AMD64", 8, "x86_64"),
        ("x86_64", 4, "x86"),
        ("riscv64", 8, "riscv64"),
        ("", 8, "unknown"),
    ],
)
def test_architectures_have_one_name_each(machine: str, pointer_bytes: int, name: str) -> None:
    assert host_detector.architecture(machine, pointer_bytes=pointer_bytes) == name


def test_a_raspberry_pi_is_known_by_its_core_and_its_board() -> None:
    facts = cpu_facts.from_cpuinfo(PI_4)
    assert (facts.name, facts.vendor, facts.instruction_sets) == ("Cortex-A72", "ARM", ("neon",))
    assert facts.board == "Raspberry Pi 4 Model B Rev 1.4"


def test_a_processor_with_two_kinds_of_cores_names_both() -> None:
    facts = cpu_facts.from_cpuinfo(SPARK)
    assert facts.name == "Cortex-A725 + Cortex-X925"
    assert facts.instruction_sets == ("neon", "asimddp", "i8mm", "bf16", "sve", "sve2")


def test_only_instruction_sets_that_matter_to_inference_are_listed() -> None:
    facts = cpu_facts.from_cpuinfo(XEON_VM)
    assert facts.hypervisor
    assert facts.vendor == "Intel"
    assert set(facts.instruction_sets) == {
        "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16",
        "amx_tile", "amx_int8", "amx_bf16",
    }  # fmt: skip


def test_macs_say_their_instruction_sets_in_two_ways() -> None:
    m2 = cpu_facts.from_sysctl(host_detector.sysctl(M2_SYSCTL))
    assert (m2.name, m2.vendor, m2.board) == ("Apple M2", "Apple", "Mac14,2")
    assert m2.instruction_sets == ("neon", "asimddp", "i8mm", "bf16")
    intel = cpu_facts.from_sysctl(host_detector.sysctl(INTEL_MAC_SYSCTL))
    assert (intel.vendor, intel.instruction_sets) == ("Intel", ("avx", "avx2", "fma", "f16c"))


@pytest.mark.parametrize("text", ["", ":", "CPU implementer : zz\nCPU part : -", "flags", "Features :\n\n:::"])
def test_no_cpuinfo_makes_reading_fail(text: str) -> None:
    assert cpu_facts.from_cpuinfo(text).instruction_sets == ()


@pytest.mark.parametrize(
    ("files", "flagged", "name"),
    [
        ({}, False, ""),
        ({}, True, "vm-other"),
        ({"sys/class/dmi/id/sys_vendor": "QEMU", "sys/class/dmi/id/product_name": "Standard PC"}, True, "qemu"),
        ({"sys/class/dmi/id/sys_vendor": "DigitalOcean", "sys/class/dmi/id/product_name": "Droplet"}, True, "kvm"),
        ({"sys/class/dmi/id/sys_vendor": "Amazon EC2", "sys/class/dmi/id/product_name": "m7g.large"}, False, "amazon"),
        ({"sys/class/dmi/id/sys_vendor": "Amazon EC2", "sys/class/dmi/id/product_name": "m7g.metal"}, False, ""),
        ({"sys/class/dmi/id/sys_vendor": "Dell Inc.", "sys/class/dmi/id/product_name": "PowerEdge"}, False, ""),
        ({"proc/device-tree/compatible": "linux,dummy-virt\0"}, False, "kvm"),
        ({"sys/devices/system/clocksource/clocksource0/available_clocksource": "kvm-clock tsc"}, True, "kvm"),
        ({"sys/hypervisor/type": "xen", "proc/xen/capabilities": "control_d"}, True, ""),
        ({"proc/sys/kernel/osrelease": "5.15.153.1-microsoft-standard-WSL2"}, True, "microsoft"),
    ],
)
def test_hypervisors_betray_themselves(tmp_path: Path, files: dict[str, str], name: str, *, flagged: bool) -> None:
    _write(tmp_path, files)
    assert virtual.hypervisor(tmp_path, flagged=flagged) == name


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({}, ""),
        ({".dockerenv": ""}, "docker"),
        ({"run/.containerenv": 'engine="podman-4.3.1"'}, "podman"),
        ({"proc/self/cgroup": "0::/system.slice/docker-8c2f.scope"}, "docker"),
        ({"proc/self/cgroup": "5:memory:/kubepods/burstable/pod1f/8c2f"}, "kubernetes"),
        ({"proc/self/cgroup": "0::/user.slice/user-1000.slice/libpod-8c2f.scope"}, "podman"),
        ({"proc/self/cgroup": "0::/lxc.payload.box/init.scope"}, "lxc"),
        ({"var/run/secrets/kubernetes.io/serviceaccount/namespace": "x", ".dockerenv": ""}, "kubernetes"),
        ({"run/systemd/container": "systemd-nspawn"}, "systemd-nspawn"),
    ],
)
def test_containers_betray_themselves(tmp_path: Path, files: dict[str, str], name: str) -> None:
    _write(tmp_path, files)
    assert virtual.container(tmp_path) == name


def test_the_innermost_wall_is_named() -> None:
    assert virtual.summary(hypervisor="kvm", container="docker", wsl=False) == "container:docker"
    assert virtual.summary(hypervisor="microsoft", container="", wsl=True) == "wsl"
    assert virtual.summary(hypervisor="kvm", container="", wsl=False) == "kvm"


def test_os_release_gives_name_and_version() -> None:
    text = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\nVERSION_ID="12"\n'
    assert host_detector.os_release(text) == "Debian GNU/Linux 12"
    assert host_detector.os_release("") == "Linux"


def test_storage_is_measured_where_docker_keeps_its_data(tmp_path: Path) -> None:
    _write(tmp_path, {"etc/docker/daemon.json": '{"data-root": "/srv/docker"}', "srv/docker/keep": ""})
    found = host_storage.find(root=tmp_path, home=tmp_path / "home")
    assert found is not None
    assert found.place == "docker"
    assert found.free_bytes == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.2)
    assert found.filesystem


def test_storage_is_measured_where_rma_keeps_its_state_when_no_engine_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RMA_HOME", str(tmp_path / "not" / "made" / "yet"))
    found = host_storage.find(root=tmp_path, home=tmp_path)
    assert found is not None
    assert found.place == "rma"


def test_the_owner_may_say_where_containers_live(tmp_path: Path) -> None:
    found = host_storage.find(str(tmp_path))
    assert found is not None
    assert found.place == "storage_path"


def test_no_path_leaves_the_machine(tmp_path: Path) -> None:
    found = host_detector.rma_detect_devices({"storage_path": str(tmp_path)})
    assert str(tmp_path) not in repr(found)
    assert platform.node() not in {device.name for device in found.devices}


def test_this_machine_is_described_as_the_system_describes_it() -> None:
    found = host_detector.rma_detect_devices({})
    devices = _devices(found)
    assert found.state == "healthy", found.reason
    assert devices["host"].attributes["architecture"] == host_detector.architecture(platform.machine())
    assert 0 < (devices["memory"].memory_bytes or 0) <= psutil.virtual_memory().total
    cores = devices["cpu"].attributes["cores"]
    assert isinstance(cores, int)
    assert 1 <= cores <= (os.cpu_count() or 1)


def test_a_psutil_that_fails_everywhere_costs_facts_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise NotImplementedError("no such file")

    for name in ("virtual_memory", "swap_memory", "cpu_count", "sensors_battery", "cpu_freq", "disk_partitions"):
        monkeypatch.setattr(psutil, name, broken, raising=False)
    found = host_detector.rma_detect_devices({})
    assert found.state == "unhealthy"
    assert "memory size" in found.reason
    assert {"host", "cpu", "storage"} <= set(_devices(found))


def test_the_slow_library_is_asked_once_and_its_answer_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = cpuid.read(tmp_path)
    assert asked.instruction_sets or platform.machine() not in {"x86_64", "AMD64"}

    def never(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(subprocess, "run", never)
    assert cpuid.read(tmp_path) == asked


def test_a_slow_library_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpuid, "TIMEOUT_S", 0.05)
    assert cpuid.read(tmp_path).instruction_sets == ()
    assert not list(tmp_path.iterdir())


def test_importing_the_detector_imports_nothing_heavy() -> None:
    code = "import rma_core.builtin.host_detector, sys; print(sorted({'psutil', 'cpuinfo'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
