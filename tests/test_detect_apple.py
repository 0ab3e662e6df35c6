"""The Apple detector: its parsing on recorded shapes, its questions on stand-ins for macOS's programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rma_detect_apple as apple
from rma_core import Detection, Device
from rma_core.models.strict import decode, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = Path(__file__).parent / "data" / "apple"
MACS = sorted(path.stem for path in DATA.glob("*.json"))
GIB = 2**30
#: Seconds that a stand-in for a hung program would take, were it not for the detector's own limit.
FOREVER_S = 3600
#: Seconds for programs that do answer.
PATIENCE_S = 60


def profile(mac: str) -> str:
    return (DATA / f"{mac}.json").read_text()


def sysctl(mac: str) -> dict[str, str]:
    return apple.parse_sysctl((DATA / f"{mac}.sysctl").read_text())


def see(mac: str, working_set: int = 0) -> Detection:
    """Describe a recorded Mac; whatever comes of it must survive the way to the coordinator."""
    detection = apple.describe(profile(mac), sysctl(mac), working_set)
    assert decode(encode(detection), Detection, subject="detection") == detection
    assert detection == apple.describe(profile(mac), sysctl(mac), working_set)
    return detection


def only(detection: Detection) -> Device:
    (device,) = detection.devices
    return device


# Apple's chips


def test_an_m2_pro_is_told_with_everything_that_placement_asks_for() -> None:
    detection = see("macbook-pro-m2-pro")
    assert detection.state == "healthy"
    assert detection.reason == ""
    gpu = only(detection)
    assert (gpu.id, gpu.kind, gpu.name, gpu.vendor, gpu.api) == (
        "gpu:apple-m2-pro",
        "gpu",
        "Apple M2 Pro",
        "Apple",
        "metal",
    )
    assert gpu.memory_bytes == 16 * GIB * 2 // 3
    assert gpu.attributes == {
        "chip": "Apple M2 Pro",
        "gpu_cores": 19,
        "performance_cores": 8,
        "efficiency_cores": 4,
        "macos_version": "27.0",
        "metal_family": "metal4",
        "metal_memory_source": "estimate",
        "model": "Mac14,10",
        "system_memory_bytes": 16 * GIB,
        "unified_memory": True,
    }


@pytest.mark.parametrize(
    ("mac", "gpu_cores", "memory_bytes", "cores"),
    [
        ("macbook-air-m1", 7, 8 * GIB * 2 // 3, {"performance_cores": 4, "efficiency_cores": 4}),
        ("macbook-air-m2", 10, 16 * GIB * 2 // 3, {"performance_cores": 4, "efficiency_cores": 4}),
        ("macbook-pro-m3-max", 30, 27 * GIB, {"performance_cores": 10, "efficiency_cores": 4}),
        ("mac-studio-m2-ultra", 60, 56 * GIB, {"performance_cores": 16, "efficiency_cores": 8}),
        ("macbook-pro-m5-max", 40, 96 * GIB, {"super_cores": 6, "performance_cores": 12}),
    ],
)
def test_each_generation_is_read(mac: str, gpu_cores: int, memory_bytes: int, cores: dict[str, int]) -> None:
    gpu = only(see(mac))
    assert gpu.memory_bytes == memory_bytes
    told = {key: value for key, value in gpu.attributes.items() if key.endswith("_cores")}
    assert told == {"gpu_cores": gpu_cores, **cores}


def test_a_mac_without_screen_is_known_by_its_chip() -> None:
    detection = see("mac-mini-m4")
    assert detection.state == "healthy"
    assert "lists no GPU" in detection.reason
    gpu = only(detection)
    assert gpu.id == "gpu:apple-m4"
    assert "gpu_cores" not in gpu.attributes


def test_a_virtual_mac_has_no_gpu_to_offer() -> None:
    detection = see("virtual-mac")
    assert detection.state == "undetected"
    assert "virtual machine" in detection.reason
    assert detection.devices == ()


def test_metals_own_answer_goes_before_everything() -> None:
    gpu = only(see("mac-studio-m2-ultra", 51 * GIB))
    assert gpu.memory_bytes == 51 * GIB
    assert gpu.attributes["metal_memory_source"] == "metal"


@pytest.mark.parametrize(
    ("total_gib", "settings", "working_set", "expected"),
    [
        (8, {}, 0, (8 * GIB * 2 // 3, "estimate")),
        (32, {}, 0, (32 * GIB * 2 // 3, "estimate")),
        (36, {}, 0, (27 * GIB, "estimate")),
        (64, {}, 0, (48 * GIB, "estimate")),
        (64, {"iogpu.wired_limit_mb": "0"}, 0, (48 * GIB, "estimate")),
        (64, {"iogpu.wired_limit_mb": "57344"}, 0, (56 * GIB, "sysctl")),
        (64, {"debug.iogpu.wired_limit": str(50 * GIB)}, 0, (50 * GIB, "sysctl")),
        (64, {"iogpu.wired_limit_mb": "999999"}, 0, (64 * GIB, "sysctl")),
        (64, {"iogpu.wired_limit_mb": "many"}, 0, (48 * GIB, "estimate")),
        (64, {"iogpu.wired_limit_mb": "-1"}, 0, (48 * GIB, "estimate")),
        (128, {"iogpu.wired_limit_mb": "114688"}, 112 * GIB, (112 * GIB, "metal")),
        (16, {}, 17 * GIB, (16 * GIB * 2 // 3, "estimate")),
    ],
)
def test_the_share_metal_may_use(
    total_gib: int, settings: dict[str, str], working_set: int, expected: tuple[int, str]
) -> None:
    assert apple.metal_memory(total_gib * GIB, settings, working_set) == expected


def test_a_translated_python_does_not_hide_the_chip() -> None:
    facts = {**sysctl("macbook-air-m2"), "machdep.cpu.brand_string": "VirtualApple @ 2.50GHz"}
    assert only(apple.describe(profile("macbook-air-m2"), facts)).name == "Apple M2"
    assert only(apple.describe("", facts)).name == "Apple silicon"


def test_without_sysctl_the_profile_is_enough() -> None:
    gpu = only(apple.describe(profile("macbook-air-m2"), {}))
    assert gpu.memory_bytes == 16 * GIB * 2 // 3
    assert (gpu.attributes["performance_cores"], gpu.attributes["efficiency_cores"]) == (4, 4)
    assert "macos_version" not in gpu.attributes


def test_four_numbers_of_cores_are_not_guessed_at() -> None:
    for mac in ("macbook-pro-m2-pro", "mac-studio-m2-ultra", "macbook-pro-m5-max"):
        assert not {"performance_cores", "efficiency_cores"} & set(only(apple.describe(profile(mac), {})).attributes)


# Intel Macs


def test_an_intel_mac_has_a_device_for_each_gpu() -> None:
    detection = see("macbook-pro-16-2019")
    assert detection.state == "healthy"
    shared, card = detection.devices
    assert (shared.id, shared.vendor, shared.api) == ("gpu:intel-uhd-graphics-630", "Intel", "metal")
    assert shared.memory_bytes == 1536 * 2**20
    assert shared.attributes["unified_memory"] is True
    assert (card.id, card.vendor, card.api) == ("gpu:amd-radeon-pro-5500m", "AMD", "metal")
    assert card.memory_bytes == 8 * GIB
    assert card.attributes == {
        "macos_version": "11.6",
        "metal_family": "mtlgpufamilymac2",
        "model": "MacBookPro16,1",
        "pci_device_id": "0x7340",
        "removable": False,
        "system_memory_bytes": 32 * GIB,
        "unified_memory": False,
    }


def test_an_egpu_is_marked_as_removable_and_french_sizes_are_read() -> None:
    shared, card = see("mac-mini-2018-egpu").devices
    assert card.attributes["removable"] is True
    assert card.memory_bytes == 8 * GIB
    assert shared.memory_bytes == 1536 * 2**20


def test_two_cards_of_one_name_have_two_ids() -> None:
    assert [d.id for d in see("mac-pro-2013").devices] == ["gpu:amd-firepro-d500", "gpu:amd-firepro-d500-2"]


def test_a_gpu_without_metal_is_named_but_not_offered() -> None:
    detection = see("macbook-pro-2011")
    assert detection.state == "undetected"
    assert detection.reason == "no GPU that Metal supports (listed: Intel HD Graphics 3000)"


def test_an_intel_mac_without_gpus_is_undetected() -> None:
    text = json.dumps({"SPHardwareDataType": [{"cpu_type": "Quad-Core Intel Core i7"}], "SPDisplaysDataType": []})
    assert apple.describe(text, {}) == Detection.undetected("no GPU is listed")


# Reading


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8 GB", 8 * GIB),
        ("8 Go", 8 * GIB),
        ("1536 MB", 1536 * 2**20),
        ("1,5 GB", 3 * GIB // 2),
        ("1.5\N{NO-BREAK SPACE}GB", 3 * GIB // 2),
        ("8", 0),
        ("", 0),
        ("GB", 0),
        (None, 0),
        (8, 0),
        ("9" * 400 + " TB", 0),
    ],
)
def test_sizes_are_read(text: object, size: int) -> None:
    assert apple.size_bytes(text) == size


def test_sysctl_lines_are_read_and_others_passed_over() -> None:
    text = "hw.memsize: 8589934592\nsysctl: unknown oid 'iogpu.wired_limit_mb'\nempty:\nnonsense\n"
    assert apple.parse_sysctl(text)["hw.memsize"] == "8589934592"
    assert "iogpu.wired_limit_mb" not in apple.parse_sysctl(text)


def secrets(value: Any) -> Iterator[str]:
    """Give every serial number, UUID and UDID in a recorded profile."""
    for item in value if isinstance(value, list) else []:
        yield from secrets(item)
    for key, item in value.items() if isinstance(value, dict) else []:
        if any(word in key.lower() for word in ("serial", "uuid", "udid")):
            yield str(item)
        yield from secrets(item)


@pytest.mark.parametrize("mac", MACS)
def test_nothing_that_identifies_the_mac_leaves_it(mac: str) -> None:
    hidden = list(secrets(json.loads(profile(mac))))
    assert len(hidden) >= 2
    told = encode(see(mac)).decode()
    assert not [secret for secret in hidden if secret in told]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
gpu_keys = st.sampled_from(
    ["_name", "sppci_model", "sppci_cores", "spdisplays_vendor", "spdisplays_vram", "spdisplays_metal", "sppci_bus"]
)
hardware_keys = st.sampled_from(["chip_type", "machine_model", "number_processors", "physical_memory"])
texts = st.sampled_from(["Apple " + "x" * 300, "8 GB", "proc 8:4:4", "proc x", "y" * 500, "AMD", "999999999 TB"])


@given(
    st.lists(st.dictionaries(gpu_keys, json_values | texts), max_size=4) | json_values,
    st.lists(st.dictionaries(hardware_keys, json_values | texts), max_size=2) | json_values,
    st.dictionaries(st.sampled_from(apple.SYSCTL), st.text() | st.just("1")),
)
def test_whatever_is_answered_a_valid_detection_comes_of_it(gpus: Any, hardware: Any, facts: dict[str, str]) -> None:
    text = json.dumps({"SPDisplaysDataType": gpus, "SPHardwareDataType": hardware})
    detection = apple.describe(text, facts)
    assert decode(encode(detection), Detection, subject="detection") == detection
    assert len({d.id for d in detection.devices}) == len(detection.devices)


# Asking


def stand_in(monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Let Python scripts answer for system_profiler, sysctl and Metal, however slow this machine is."""
    for limit in ("SYSCTL_S", "PROFILER_S", "METAL_S"):
        monkeypatch.setattr(apple, limit, PATIENCE_S)
    for name, script in scripts.items():
        if name == "METAL":
            monkeypatch.setattr(apple, name, script)
        else:
            monkeypatch.setattr(apple, name, (sys.executable, "-I", "-S", "-c", script))


def echo(text: str, *, exit_code: int = 0) -> str:
    return f"import sys; sys.stdout.write({text!r}); sys.exit({exit_code})"


HANG = f"import time; time.sleep({FOREVER_S})"


def recorded(suffix: str, *, mac: str = "macbook-air-m2", exit_code: int = 0) -> str:
    return echo((DATA / f"{mac}.{suffix}").read_text(), exit_code=exit_code)


def test_elsewhere_than_on_macos_there_is_nothing() -> None:
    assert apple.detect("linux") == Detection.undetected("not macOS")
    assert apple.detect("win32") == Detection.undetected("not macOS")


def test_all_three_questions_make_one_answer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    metal = echo(str(int(11.84 * GIB)))
    # sysctl ends with 1 when one of the names is not known to this macOS.
    stand_in(monkeypatch, PROFILER=recorded("json"), SYSCTL=recorded("sysctl", exit_code=1), METAL=metal)
    gpu = only(apple.detect("darwin"))
    assert gpu.name == "Apple M2"
    assert gpu.memory_bytes == int(11.84 * GIB)
    assert gpu.attributes["metal_memory_source"] == "metal"
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("metal", ["", "print(0)", "print('-5')", "import os; os.abort()", "raise OSError", HANG])
def test_metal_that_does_not_answer_costs_only_its_answer(monkeypatch: pytest.MonkeyPatch, metal: str) -> None:
    stand_in(monkeypatch, PROFILER=recorded("json"), SYSCTL=recorded("sysctl"), METAL=metal)
    if metal == HANG:
        monkeypatch.setattr(apple, "METAL_S", 0.5)
    gpu = only(apple.detect("darwin"))
    assert gpu.memory_bytes == 16 * GIB * 2 // 3
    assert gpu.attributes["metal_memory_source"] == "estimate"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (HANG, "gave no answer within 0.5 s"),
        ("import sys; sys.exit(3)", "gave no answer (exit 3)"),
        (echo("not JSON"), "answer is not JSON"),
        (echo("[" * 100_000), "answer is not JSON"),
        (echo("[]"), "lacks the hardware or the displays"),
        (echo('{"SPHardwareDataType": []}'), "lacks the hardware or the displays"),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\xfe')", "answer is not JSON"),
    ],
)
def test_a_system_profiler_that_fails_leaves_what_sysctl_knows(
    monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    stand_in(monkeypatch, PROFILER=script, SYSCTL=recorded("sysctl"), METAL="")
    if script == HANG:
        monkeypatch.setattr(apple, "PROFILER_S", 0.5)
    detection = apple.detect("darwin")
    assert detection.state == "unhealthy"
    assert words in detection.reason
    gpu = only(detection)
    assert (gpu.id, gpu.memory_bytes) == ("gpu:apple-m2", 16 * GIB * 2 // 3)
    assert "gpu_cores" not in gpu.attributes


def test_an_intel_mac_whose_system_profiler_fails_has_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, PROFILER="", SYSCTL=recorded("sysctl", mac="macbook-pro-16-2019"), METAL="")
    detection = apple.detect("darwin")
    assert detection.state == "unhealthy"
    assert detection.devices == ()


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apple, "PROFILER", ("/nonexistent/system_profiler",))
    monkeypatch.setattr(apple, "SYSCTL", ("/nonexistent/sysctl",))
    detection = apple.detect("darwin")
    assert detection.state == "unhealthy"
    assert detection.reason.startswith("system_profiler cannot be run (No such file or directory): ")


def test_the_questions_end_before_a_detectors_deadline() -> None:
    assert apple.SYSCTL_S + apple.PROFILER_S + apple.METAL_S < 10


def test_metals_question_is_a_program() -> None:
    compile(apple.METAL, "METAL", "exec")


def test_the_hook_answers_on_this_machine() -> None:
    state = apple.rma_detect_devices({}).state
    assert state == "undetected" if sys.platform != "darwin" else state in ("healthy", "unhealthy", "undetected")


def test_importing_the_plugin_is_cheap_and_silent() -> None:
    script = (
        "import atexit, sys, rma_core, subprocess, json; before = set(sys.modules); hooks = atexit._ncallbacks(); "
        "import rma_detect_apple; assert set(sys.modules) - before == {'rma_detect_apple'}, set(sys.modules) - before; "
        "assert atexit._ncallbacks() == hooks"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE_S, capture_output=True)
    assert done.stdout == b""
