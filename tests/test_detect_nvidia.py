"""The NVIDIA detector, run as it is for real: in a child, through pynvml and the loader, on a stand-in for NVML."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

import rma_detect_nvidia
from rma_core import Detection
from rma_core.models.strict import decode
from tests import nvml
from tests.needs import need
from tests.nvml import CHILD, DATA, PATIENCE_S, environment, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

UUID = "GPU-00000000-1111-2222-3333-{:012d}"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the stand-in as libnvidia-ml.so.1."""
    need("gcc")
    return nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty machine."""
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def see(library: Path, root: Path) -> Callable[..., Detection]:
    """Run the detector against the stand-in with these settings; it must start and stop NVML exactly once."""

    def look(**settings: str) -> Detection:
        detection, trace = run(root, library, FAKE_NVML_TRACE="1", **settings)
        assert trace in ("started\nstopped\n", "started\n")
        assert ("nvmlInitWithFlags" in settings.get("FAKE_NVML_FAIL", "")) == (trace == "started\n")
        return detection

    return look


def add_card(root: Path, address: str, *, vendor: str = "0x10de", kind: str = "0x030000", driver: str = "") -> None:
    device = root / "sys/bus/pci/devices" / address
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    if driver:
        folder = root / "sys/bus/pci/drivers" / driver
        folder.mkdir(parents=True, exist_ok=True)
        (device / "driver").symlink_to(folder)


def add_spec(root: Path, name: str, *, folder: str = "etc/cdi") -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(DATA / "cdi" / name, root / folder / name)


def add_program(root: Path, name: str) -> None:
    (root / "usr/bin").mkdir(parents=True, exist_ok=True)
    (root / "usr/bin" / name).write_text("#!/bin/sh\n")
    (root / "usr/bin" / name).chmod(0o755)


# GPUs


def test_a_gpu_is_told_with_everything_that_placement_asks_for(see: Callable[..., Detection]) -> None:
    detection = see()
    assert detection.state == "healthy"
    (gpu,) = detection.devices
    assert (gpu.id, gpu.kind, gpu.vendor, gpu.api) == (f"gpu:{UUID.format(0)}", "gpu", "NVIDIA", "cuda")
    assert gpu.name == "NVIDIA GeForce RTX 4090"
    assert gpu.memory_bytes == 24564 * 2**20
    assert gpu.health == "healthy"
    told = dict(gpu.attributes)
    assert told.pop("container_access_reason")
    assert told == {
        "index": 0,
        "driver_version": "580.126.09",
        "cuda_version": "13.0",
        "compute_capability": "8.9",
        "architecture": "Ada",
        "pci_address": "0000:01:00.0",
        "power_limit_w": 450.0,
        "memory_free_bytes": 24052 * 2**20,
        "unified_memory": False,
        "container_access": "none",
    }


def test_the_same_machine_gives_the_same_answer(see: Callable[..., Detection]) -> None:
    assert see(FAKE_NVML_GPUS="2") == see(FAKE_NVML_GPUS="2")


def test_four_gpus_are_four_devices_in_order(see: Callable[..., Detection]) -> None:
    detection = see(FAKE_NVML_GPUS="4", FAKE_NVML_MODEL="a100")
    assert [d.id for d in detection.devices] == [f"gpu:{UUID.format(index)}" for index in range(4)]
    assert [d.attributes["pci_address"] for d in detection.devices] == [f"0000:0{n}:00.0" for n in (1, 2, 3, 4)]
    assert all(d.attributes["ecc"] is True and d.attributes["mig_mode"] is False for d in detection.devices)


def test_a_lost_gpu_leaves_the_other_three(see: Callable[..., Detection]) -> None:
    detection = see(FAKE_NVML_GPUS="4", FAKE_NVML_FAIL="nvmlDeviceGetHandleByIndex_v2@2:15")
    assert detection.state == "unhealthy"
    assert [d.attributes["index"] for d in detection.devices] == [0, 1, 3]
    assert detection.reason.startswith("GPU 2 is lost: it has fallen off the bus; reboot")
    assert "(3 usable)" in detection.reason


@pytest.mark.parametrize("function", ["nvmlDeviceGetPciInfo_v3", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo"])
def test_a_gpu_lost_between_two_questions_is_lost_too(see: Callable[..., Detection], function: str) -> None:
    detection = see(FAKE_NVML_GPUS="2", FAKE_NVML_FAIL=f"{function}@0:15")
    assert detection.state == "unhealthy"
    assert [d.attributes["index"] for d in detection.devices] == [1]
    assert "GPU 0 is lost" in detection.reason


def test_gpus_with_the_same_trouble_share_one_sentence(see: Callable[..., Detection]) -> None:
    detection = see(FAKE_NVML_GPUS="16", FAKE_NVML_FAIL="nvmlDeviceGetHandleByIndex_v2:16")
    assert detection.state == "unhealthy"
    assert detection.devices == ()
    assert detection.reason.startswith("GPU 0, 1, 2, 3,")
    assert "nvidia-smi --gpu-reset" in detection.reason
    assert len(detection.reason) < 400


@pytest.mark.parametrize("code", [3, 4, 13, 999])
@pytest.mark.parametrize(
    ("function", "field"),
    [
        ("nvmlDeviceGetPowerManagementLimit", "power_limit_w"),
        ("nvmlDeviceGetPciInfo_v3", "pci_address"),
        ("nvmlDeviceGetCudaComputeCapability", "compute_capability"),
        ("nvmlDeviceGetArchitecture", "architecture"),
        ("nvmlSystemGetDriverVersion", "driver_version"),
        ("nvmlSystemGetCudaDriverVersion_v2", "cuda_version"),
    ],
)
def test_what_a_gpu_does_not_tell_is_left_out(
    see: Callable[..., Detection], function: str, field: str, code: int
) -> None:
    detection = see(FAKE_NVML_FAIL=f"{function}:{code}")
    assert detection.state == "healthy"
    assert field not in detection.devices[0].attributes
    assert detection.devices[0].memory_bytes == 24564 * 2**20


def test_a_gpu_without_a_uuid_is_known_by_its_place(see: Callable[..., Detection]) -> None:
    assert see(FAKE_NVML_FAIL="nvmlDeviceGetUUID:999").devices[0].id == "gpu:nvidia-0000:01:00.0"


def test_a_gpu_without_a_name_is_still_a_gpu(see: Callable[..., Detection]) -> None:
    assert see(FAKE_NVML_FAIL="nvmlDeviceGetName:999").devices[0].name == "NVIDIA GPU"


def test_a_gpu_that_may_not_tell_its_memory_says_so(see: Callable[..., Detection]) -> None:
    (gpu,) = see(FAKE_NVML_FAIL="nvmlDeviceGetMemoryInfo:4").devices
    assert gpu.memory_bytes is None
    assert gpu.reason == "NVML does not tell its memory: Insufficient Permissions"
    assert gpu.attributes["unified_memory"] is False


def test_unified_memory_is_the_systems_memory(see: Callable[..., Detection]) -> None:
    detection = see(FAKE_NVML_MODEL="gb10")
    (gpu,) = detection.devices
    assert detection.state == "healthy"
    assert gpu.name == "NVIDIA GB10"
    assert gpu.memory_bytes == psutil.virtual_memory().total
    assert gpu.attributes["unified_memory"] is True
    assert gpu.attributes["compute_capability"] == "12.1"
    assert gpu.attributes["architecture"] == "Blackwell"
    assert gpu.attributes["pci_address"] == "000f:01:00.0"
    free = gpu.attributes["memory_free_bytes"]
    assert isinstance(free, int)
    assert 0 < free <= gpu.memory_bytes


# MIG


def test_each_mig_instance_is_a_device_and_its_gpu_is_not(see: Callable[..., Detection]) -> None:
    detection = see(FAKE_NVML_GPUS="2", FAKE_NVML_MODEL="a100", FAKE_NVML_MIG="2")
    assert detection.state == "healthy"
    first, second, whole = detection.devices
    assert first.id == "gpu:MIG-00000000-1111-2222-3333-000000000000"
    assert second.id == "gpu:MIG-00000000-1111-2222-3333-000000000002"
    assert first.name == "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    assert first.memory_bytes == 4864 * 2**20
    assert first.attributes["mig_profile"] == "1g.5gb"
    assert first.attributes["parent"] == f"gpu:{UUID.format(0)}"
    assert first.attributes["mig_mode"] is True
    assert whole.id == f"gpu:{UUID.format(1)}"
    assert "parent" not in whole.attributes


def test_mig_mode_without_instances_says_how_to_get_out(see: Callable[..., Detection]) -> None:
    detection = see(FAKE_NVML_MODEL="a100", FAKE_NVML_MIG="0")
    assert detection.state == "unhealthy"
    assert detection.devices == ()
    assert "GPU 0 is in MIG mode" in detection.reason
    assert "nvidia-smi -mig 0" in detection.reason


def test_mig_instances_are_matched_with_their_names_in_cdi(see: Callable[..., Detection], root: Path) -> None:
    add_spec(root, "nvidia-mig.json")
    first, second = see(FAKE_NVML_MODEL="a100", FAKE_NVML_MIG="2").devices
    assert first.access
    assert first.access.cdi == ("nvidia.com/gpu=0:0",)
    assert second.access
    assert second.access.cdi == ("nvidia.com/gpu=0:2",)


# Drivers that are absent or broken


def test_without_driver_and_card_there_is_nothing(root: Path) -> None:
    detection, _ = run(root, None)
    assert detection.state == "undetected"
    assert detection.reason == "no NVIDIA driver on this machine (libnvidia-ml.so.1 not found)"


def test_a_card_without_driver_says_what_to_install(root: Path) -> None:
    add_card(root, "0000:01:00.0")
    add_card(root, "0000:01:00.1", kind="0x040300")  # its sound
    add_card(root, "0000:02:00.0", vendor="0x1002")
    detection, _ = run(root, None)
    assert detection.state == "unhealthy"
    assert detection.reason.startswith("NVIDIA GPU at 0000:01:00.0, but no driver")
    assert "ubuntu-drivers install" in detection.reason


def test_a_card_lent_to_a_virtual_machine_is_not_missed(root: Path) -> None:
    add_card(root, "0000:01:00.0", driver="vfio-pci")
    assert run(root, None)[0].state == "undetected"


def test_a_jetson_without_nvml_is_told_to_update(root: Path) -> None:
    (root / "etc").mkdir()
    (root / "etc/nv_tegra_release").write_text("# R35 (release)\n")
    detection, _ = run(root, None)
    assert detection.state == "unhealthy"
    assert "JetPack 6" in detection.reason


def test_a_library_that_does_not_load_is_not_taken_for_absent(root: Path, tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"not a library at all, but long enough to have a header" * 4)
    detection, _ = run(root, tmp_path)
    assert detection.state == "unhealthy"
    assert "cannot be loaded" in detection.reason
    assert "invalid ELF header" in detection.reason


def test_a_version_mismatch_says_to_reboot_or_reload(see: Callable[..., Detection], root: Path) -> None:
    (root / "sys/module/nvidia").mkdir(parents=True)
    (root / "sys/module/nvidia/version").write_text("575.64.03\n")
    detection = see(FAKE_NVML_FAIL="nvmlInitWithFlags:18")
    assert detection.state == "unhealthy"
    assert detection.reason.startswith("driver/library version mismatch")
    assert "kernel module 575.64.03 stayed loaded; reboot, or" in detection.reason


def test_a_module_that_is_not_loaded_says_how_to_load_it(see: Callable[..., Detection], root: Path) -> None:
    add_card(root, "0000:01:00.0")
    detection = see(FAKE_NVML_FAIL="nvmlInitWithFlags:9")
    assert detection.state == "unhealthy"
    assert "not loaded for the GPU at 0000:01:00.0: run `sudo modprobe nvidia`" in detection.reason


def test_nouveau_in_the_way_is_named(see: Callable[..., Detection], root: Path) -> None:
    add_card(root, "0000:01:00.0", driver="nouveau")
    (root / "sys/module/nouveau").mkdir(parents=True)
    assert "blacklist nouveau" in see(FAKE_NVML_FAIL="nvmlInitWithFlags:9").reason


def test_a_library_without_card_and_module_is_no_fault(see: Callable[..., Detection]) -> None:
    detection = see(FAKE_NVML_FAIL="nvmlInitWithFlags:9")
    assert detection.state == "undetected"
    assert "no NVIDIA GPU" in detection.reason


def test_a_user_without_permission_is_told_how_to_get_it(see: Callable[..., Detection]) -> None:
    detection = see(FAKE_NVML_FAIL="nvmlInitWithFlags:4")
    assert detection.state == "unhealthy"
    assert "usermod" in detection.reason


@pytest.mark.parametrize("code", [8, 10, 11, 14, 17, 20, 27, 999, 4711])
def test_any_other_failure_at_the_start_has_nvmls_words(see: Callable[..., Detection], code: int) -> None:
    detection = see(FAKE_NVML_FAIL=f"nvmlInitWithFlags:{code}")
    assert detection.state == "unhealthy"
    assert detection.reason.startswith("NVML does not start: ")
    assert ";" in detection.reason


def test_a_driver_that_cannot_count_is_unhealthy(see: Callable[..., Detection]) -> None:
    detection = see(FAKE_NVML_FAIL="nvmlDeviceGetCount_v2:999")
    assert detection.state == "unhealthy"
    assert "NVML does not answer: Unknown Error" in detection.reason


def test_a_stop_that_fails_costs_nothing(see: Callable[..., Detection]) -> None:
    assert see(FAKE_NVML_FAIL="nvmlShutdown:999").state == "healthy"


def test_a_driver_without_gpu_is_undetected(see: Callable[..., Detection]) -> None:
    detection = see(FAKE_NVML_GPUS="0")
    assert detection.state == "undetected"


def test_a_driver_that_does_not_drive_the_card_is_unhealthy(see: Callable[..., Detection], root: Path) -> None:
    add_card(root, "0000:41:00.0", kind="0x030200")
    detection = see(FAKE_NVML_GPUS="0")
    assert detection.state == "unhealthy"
    assert "0000:41:00.0" in detection.reason


def test_wsl_has_its_library_where_the_loader_does_not_look(library: Path, root: Path) -> None:
    folder = root / "usr/lib/wsl/lib"
    folder.mkdir(parents=True)
    shutil.copy(library / "libnvidia-ml.so.1", folder)
    detection, _ = run(root, None)
    assert detection.state == "healthy"
    assert detection.devices[0].name == "NVIDIA GeForce RTX 4090"


def test_a_crash_in_the_driver_ends_the_child_and_nothing_else(library: Path, root: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(root), str(root / "answer")]
    settings = environment(library, FAKE_NVML_FAIL="nvmlDeviceGetName:crash")
    done = subprocess.run(command, env=settings, capture_output=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert done.stdout == b""


@pytest.mark.parametrize("function", ["nvmlInitWithFlags", "nvmlDeviceGetMemoryInfo", "nvmlShutdown"])
def test_a_hung_driver_can_be_ended_by_a_plain_signal(library: Path, root: Path, function: str) -> None:
    before = "started" if function != "nvmlShutdown" else "stopped"
    settings = environment(library, FAKE_NVML_FAIL=f"{function}:hang", FAKE_NVML_TRACE="1")
    command = [sys.executable, "-c", CHILD, str(root), str(root / "answer")]
    with subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr
        try:
            while before not in child.stderr.readline():
                assert child.poll() is None
            child.terminate()
            assert child.wait(timeout=PATIENCE_S) == -signal.SIGTERM
        finally:
            child.kill()


# Containers


def test_a_gpu_named_by_uuid_in_cdi_is_given_by_uuid(see: Callable[..., Detection], root: Path) -> None:
    add_spec(root, "nvidia.yaml", folder="var/run/cdi")
    (gpu,) = see().devices
    assert gpu.access
    assert gpu.access.cdi == (f"nvidia.com/gpu={UUID.format(0)}",)
    assert gpu.attributes["container_access"] == "cdi"
    assert gpu.attributes["container_access_reason"] == "named in /var/run/cdi/nvidia.yaml"


def test_an_index_in_cdi_is_used_where_there_is_no_uuid(see: Callable[..., Detection], root: Path) -> None:
    add_spec(root, "nvidia-index-only.yaml")
    first, second = see(FAKE_NVML_GPUS="2").devices
    assert first.access
    assert first.access.cdi == ("nvidia.com/gpu=0",)
    assert second.access
    assert second.access.cdi == ("nvidia.com/gpu=1",)


def test_all_is_used_only_where_there_is_one_gpu(see: Callable[..., Detection], root: Path) -> None:
    add_spec(root, "wsl.yaml")
    (gpu,) = see().devices
    assert gpu.access
    assert gpu.access.cdi == ("nvidia.com/gpu=all",)
    assert [d.access for d in see(FAKE_NVML_GPUS="2").devices] == [None, None]


def test_a_stale_specification_says_to_renew_it(see: Callable[..., Detection], root: Path) -> None:
    add_spec(root, "nvidia.yaml")
    add_program(root, "nvidia-container-runtime-hook")
    second = see(FAKE_NVML_GPUS="2").devices[1]
    assert second.access is None
    assert second.attributes["container_access"] == "nvidia-container-toolkit"
    assert "does not name this device: renew it with `sudo nvidia-ctk" in str(
        second.attributes["container_access_reason"]
    )


def test_the_toolkit_alone_is_a_way_without_cdi_names(see: Callable[..., Detection], root: Path) -> None:
    add_spec(root, "other-kind.yaml")
    add_program(root, "nvidia-container-runtime-hook")
    (gpu,) = see().devices
    assert gpu.access is None
    assert gpu.attributes["container_access"] == "nvidia-container-toolkit"


def test_nvidia_ctk_alone_needs_a_specification(see: Callable[..., Detection], root: Path) -> None:
    add_program(root, "nvidia-ctk")
    (gpu,) = see().devices
    assert gpu.attributes["container_access"] == "none"
    assert "nvidia-ctk is installed, but" in str(gpu.attributes["container_access_reason"])


def test_docker_settings_without_the_program_are_no_way(see: Callable[..., Detection], root: Path) -> None:
    settings = {"runtimes": {"nvidia": {"path": "nvidia-container-runtime", "runtimeArgs": []}}}
    (root / "etc/docker").mkdir(parents=True)
    (root / "etc/docker/daemon.json").write_text(json.dumps(settings))
    (gpu,) = see().devices
    assert gpu.attributes["container_access"] == "none"
    assert "daemon.json names the nvidia runtime" in str(gpu.attributes["container_access_reason"])


@pytest.mark.parametrize("text", ["not json", "[]", '{"runtimes": 1}', "\x00"])
def test_broken_docker_settings_do_no_harm(see: Callable[..., Detection], root: Path, text: str) -> None:
    (root / "etc/docker").mkdir(parents=True)
    (root / "etc/docker/daemon.json").write_text(text)
    assert see().devices[0].attributes["container_access"] == "none"


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("nvidia.yaml", ["0", UUID.format(0), "all"]),
        ("nvidia-index-only.yaml", ["0", "1"]),
        ("nvidia-mig.json", ["0:0", "0:2", "all"]),
        ("wsl.yaml", ["all"]),
        ("other-kind.yaml", []),
    ],
)
def test_names_are_read_from_every_layout_of_a_specification(name: str, names: list[str]) -> None:
    assert rma_detect_nvidia.cdi_names((DATA / "cdi" / name).read_text()) == names


@pytest.mark.parametrize(
    "text", ["", "{", "{}", '{"kind": "nvidia.com/gpu", "devices": 3}', "- - -", "kind: [", "\x00\n:"]
)
def test_a_broken_specification_names_nothing(text: str) -> None:
    assert rma_detect_nvidia.cdi_names(text) == []


# The plugin


def test_the_hook_looks_at_this_machine(library: Path, tmp_path: Path) -> None:
    script = CHILD.replace("detect(pathlib.Path(sys.argv[1]))", "rma_detect_devices({})")
    answer = tmp_path / "answer"
    command = [sys.executable, "-c", script, "unused", str(answer)]
    subprocess.run(command, env=environment(library), check=True, timeout=PATIENCE_S)
    assert decode(answer.read_bytes(), Detection, subject="answer").state == "healthy"


def test_importing_the_plugin_costs_no_driver_and_leaves_nothing_to_wait_for() -> None:
    script = (
        "import atexit, sys, threading, rma_core; hooks = atexit._ncallbacks(); import rma_detect_nvidia; "
        "assert not {'pynvml', 'psutil'} & set(sys.modules); assert atexit._ncallbacks() == hooks; "
        "assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE_S)
