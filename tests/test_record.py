"""Recordings of what detectors saw, and machines read from a file."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.detection import Observation, assemble, observe
from rma_core.errors import ValidationProblem
from rma_core.host import Plugins
from rma_core.models.hardware import Capabilities, ContainerAccess, Detection, Device, HardwareReport
from rma_core.models.strict import decode, encode
from rma_core.models.worker import PluginReport
from rma_core.privacy import hide_hardware
from rma_core.record import Recording, from_capabilities, load, load_report, recording, save
from tests.test_hardware_models import GOOD, detections, names, seconds

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

observations = st.lists(
    st.builds(Observation, detector=names, detection=detections, seconds=seconds, import_seconds=st.none() | seconds),
    max_size=4,
    unique_by=lambda seen: seen.detector,
)


async def test_this_machine_recorded_and_replayed_gives_its_report_to_the_byte(tmp_path: Path) -> None:
    plugins = Plugins.discover(kinds=["detector"])
    seen = await observe(plugins)
    path = tmp_path / "machine.json"
    save(path, recording(seen, at=NOW))
    assert load(path).observations == hide_hardware(seen)
    assert encode(load(path).report) == encode(assemble(hide_hardware(seen)))
    assert load(path).recorded_at == "2026-01-02T03:04:05+00:00"
    assert {type(report) for report in plugins.reports()} == {PluginReport}


@given(observations)
def test_any_recording_gives_its_report_to_the_byte(seen: list[Observation]) -> None:
    made = recording(seen, at=NOW)
    again = decode(encode(made), Recording, subject="recording")
    assert again == made
    assert encode(again.report) == encode(made.report)


PARENT, PART = "GPU-5a3f7f2e-91ab-4f5c-8d86-2f4d5b6a7c81", "MIG-6A0B7C11-27CF-4F0D-B1C7-91F2A4B0E3D4"


def test_a_recording_tells_no_piece_of_hardware_from_others_of_its_kind() -> None:
    device = Device(
        id=f"gpu:{PART}",
        kind="gpu",
        name="NVIDIA A100",
        attributes={
            "parent": f"gpu:{PARENT}",
            "pci_address": "0000:03:00.0",
            "board_serial": "1324021034567",
            "nics": ["48:b0:2d:3c:9a:01", "48-B0-2D-3C-9A-02"],
            "machine": "4c4c4544004d35108052b4c04f4e4e32",
        },
        access=ContainerAccess(cdi=(f"nvidia.com/gpu={PART.lower()}",)),
    )
    reason = f"{PARENT} failed: asked https://ann:s3cret@10.0.0.7/x with rmaa_0123456789abcdef"
    seen = Observation(detector="nvidia", detection=Detection.unhealthy(reason, devices=[device]))
    made = recording([seen, Observation(detector="other", detection=Detection.undetected(reason))], at=NOW)
    text = encode(made).decode()
    for secret in ("5a3f", "6a0b", "132402", "48:b0", "48-b0", "4c4c", "s3cret", "ann", "rmaa_"):
        assert secret not in text.lower()
    assert "0000:03:00.0" in text
    (found,) = made.report.devices
    made_up = "00000000-0000-0000-0000-00000000000"
    assert found.id == f"gpu:MIG-{made_up}2"
    assert found.attributes["parent"] == f"gpu:GPU-{made_up}1"
    assert found.access == ContainerAccess(cdi=(f"nvidia.com/gpu=mig-{made_up}2",))
    first, second = (one.detection.reason for one in made.observations)
    assert first == second == f"GPU-{made_up}1 failed: asked https://<secret>@10.0.0.7/x with <secret>"


@given(observations)
def test_what_was_made_up_is_not_made_up_again(seen: list[Observation]) -> None:
    assert hide_hardware(hide_hardware(seen)) == hide_hardware(seen)


@given(observations)
def test_whatever_detectors_answer_the_report_is_one_a_coordinator_takes(seen: list[Observation]) -> None:
    report = assemble(seen)
    assert decode(encode(report), HardwareReport, subject="report") == report


def written(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{", "not JSON"),
        ([], "is no recording"),
        ({"format": 2, "observations": []}, r"\$.format: is 2, and this rma-core reads 1"),
        ({"format": 1, "observations": [{"detector": 7}]}, r"\$.observations\[0\].detector"),
    ],
)
def test_a_file_that_is_no_recording_is_refused_and_named(tmp_path: Path, data: object, words: str) -> None:
    with pytest.raises(ValidationProblem, match=rf"machine.json: .*{words}"):
        load(written(tmp_path / "machine.json", data))


def test_a_missing_file_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValidationProblem, match=r"nowhere.json: file: No such file"):
        load_report(tmp_path / "nowhere.json")


def test_a_machine_is_read_in_every_form_people_have_it(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    save(path, recording([], at=NOW))
    assert load_report(path).devices == ()
    assert load_report(written(path, GOOD)).devices[0].id == "cpu"
    assert load_report(written(path, GOOD["devices"])).capabilities.cpu_cores == 16
    assert load_report(written(path, GOOD["capabilities"])).gpus[0].name == "RTX"
    worker = {"worker_id": "worker-abc12345", "capabilities": GOOD["capabilities"]}
    assert load_report(written(path, worker)).gpus[0].api == "cuda"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (7, "neither a recording, a hardware report, a list of devices nor capabilities"),
        ([{"id": "x"}], r"\$\[0\].kind: is required"),
        ([{"id": "x", "kind": "gpu", "name": "x"}] * 2, "two devices with one id: x"),
        ({"ram": "much"}, r"\$.cpu_cores: is required; \$.ram"),
    ],
)
def test_a_machine_that_cannot_be_read_is_refused_with_every_problem(tmp_path: Path, data: object, words: str) -> None:
    with pytest.raises(ValidationProblem, match=words):
        load_report(written(tmp_path / "machine.json", data))


@pytest.mark.parametrize(
    ("gpu", "api"),
    [
        ("NVIDIA RTX 4090", "cuda"),
        ("AMD Radeon RX 7900 XTX", "rocm"),
        ("Apple M2", "metal"),
        ("Intel Arc A770", "level_zero"),
        ("Voodoo 2", None),
    ],
)
def test_bare_capabilities_become_devices_that_a_policy_can_weigh(gpu: str, api: str | None) -> None:
    short = Capabilities(cpu_cores=8, ram="32GB", storage="1TB", gpu_memory="24GB", gpu_type=gpu, gpu_count=2)
    report = from_capabilities(short)
    assert report.capabilities == short
    assert [(g.name, g.api, g.memory_bytes) for g in report.gpus] == [(gpu, api, 24 * 2**30)] * 2
