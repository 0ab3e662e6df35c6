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
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.models.strict import decode, encode
from rma_core.models.worker import PluginReport
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
    assert load(path).observations == seen
    assert encode(load(path).report) == encode(assemble(seen))
    assert load(path).recorded_at == "2026-01-02T03:04:05+00:00"
    assert {type(report) for report in plugins.reports()} == {PluginReport}


@given(observations)
def test_any_recording_gives_its_report_to_the_byte(seen: list[Observation]) -> None:
    made = recording(seen, at=NOW)
    again = decode(encode(made), Recording, subject="recording")
    assert again == made
    assert encode(again.report) == encode(made.report)


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
