"""The hardware records: what is written comes back the same, and what does not fit is named in full."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.errors import ValidationProblem
from rma_core.models.hardware import (
    DEVICE_NODES,
    Capabilities,
    ContainerAccess,
    Detection,
    Device,
    DeviceApi,
    DeviceKind,
    HardwareReport,
    Health,
    ProbeReport,
    ProbeState,
    summarize,
)
from rma_core.models.sizes import GB, GIB, human, memory_text, parse_size, storage_text
from rma_core.models.strict import MAX_PROBLEMS, convert, decode, encode, parse

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
sizes = st.integers(0, 2**60)
seconds = st.floats(0, 86_400)
attributes = st.dictionaries(
    names,
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | text | st.lists(names, max_size=4),
    max_size=6,
)  # fmt: skip
cores = st.fixed_dictionaries({"cores": st.integers(-(2**53), 2**53) | st.booleans() | st.floats(0, 64) | st.none()})
access = st.builds(
    ContainerAccess,
    cdi=st.lists(names, max_size=3).map(tuple),
    device_nodes=st.lists(st.sampled_from(DEVICE_NODES).map(lambda node: node + "0"), max_size=3).map(tuple),
)
devices = st.builds(
    Device,
    id=names,
    kind=st.sampled_from(get_args(DeviceKind)),
    name=names,
    vendor=text,
    api=st.none() | st.sampled_from(get_args(DeviceApi)),
    memory_bytes=st.none() | sizes,
    health=st.sampled_from(["healthy", "unhealthy"]),
    reason=text,
    attributes=attributes | cores,
    access=st.none() | access,
)
device_lists = st.lists(devices, max_size=6, unique_by=lambda device: device.id).map(tuple)
detections = st.builds(Detection, state=st.sampled_from(get_args(ProbeState)), reason=text, devices=device_lists)
probes = st.builds(
    ProbeReport,
    detector=names,
    distribution=text,
    version=text,
    state=st.sampled_from(get_args(ProbeState)),
    reason=text,
    seconds=seconds,
    import_seconds=seconds,
    devices=st.lists(names, max_size=3).map(tuple),
)
reports = device_lists.flatmap(
    lambda found: st.builds(
        HardwareReport,
        capabilities=st.just(summarize(found)),
        devices=st.just(found),
        probes=st.lists(probes, max_size=3).map(tuple),
    )
)

GOOD: dict[str, Any] = {
    "capabilities": {"cpu_cores": 16, "ram": "64.0GB", "storage": "1TB", "gpu_memory": "24GB", "gpu_type": "RTX"},
    "devices": [{"id": "cpu", "kind": "cpu", "name": "CPU", "attributes": {"cores": 16}}],
    "probes": [{"detector": "host", "distribution": "rma-core", "version": "1", "state": "healthy"}],
}


def problems(value: object, kind: type = HardwareReport) -> list[str]:
    with pytest.raises(ValidationProblem) as caught:
        convert(value, kind, subject="report")
    return [problem.where for problem in caught.value.problems]


@given(reports)
def test_a_report_comes_back_from_json_as_it_was(report: HardwareReport) -> None:
    written = encode(report)
    again = decode(written, HardwareReport, subject="report")
    assert again == report
    assert encode(again) == written


@given(detections)
def test_a_detection_comes_back_from_json_as_it_was(detection: Detection) -> None:
    assert decode(encode(detection), Detection, subject="detection") == detection


@given(device_lists)
def test_the_short_form_of_any_devices_is_valid_and_counts_healthy_ones_only(found: tuple[Device, ...]) -> None:
    short = summarize(found)
    assert convert(msgspec.to_builtins(short), Capabilities, subject="capabilities") == short
    assert short.gpu_count == sum(d.kind == "gpu" and d.health == "healthy" for d in found)
    assert summarize(tuple(d for d in found if d.health == "healthy")) == short


@given(st.integers(0, 2**50))
def test_memory_as_text_is_read_back_within_a_tenth_of_a_gigabyte(size: int) -> None:
    assert abs(parse_size(memory_text(size), binary=True) - size) <= 0.051 * GIB


@given(st.integers(0, 10**16))
def test_storage_as_text_is_read_back_within_a_percent(size: int) -> None:
    assert abs(parse_size(storage_text(size), binary=False) - size) <= max(0.01 * size, 0.051 * GB)
    assert human(size)


def test_a_report_as_published_is_read() -> None:
    report = convert(GOOD, HardwareReport, subject="report")
    assert report.capabilities.gpu_memory_bytes == 24 * GIB
    assert report.capabilities.storage_bytes == 1000 * GB


def test_decoding_names_every_problem_at_once() -> None:
    bad = {
        "capabilities": {"cpu_cores": -1, "storage": "plenty", "gpu_type": 7},
        "devices": [{"kind": "toaster", "name": "", "memory_bytes": -5}, {"id": "x", "kind": "gpu", "name": "x"}, 3],
        "probes": [{"detector": "d", "distribution": "", "version": "1", "state": "fine", "seconds": -1}],
    }
    assert problems(bad) == [
        "$.capabilities.ram",
        "$.capabilities.cpu_cores",
        "$.capabilities.storage",
        "$.capabilities.gpu_type",
        "$.devices[0].id",
        "$.devices[0].kind",
        "$.devices[0].name",
        "$.devices[0].memory_bytes",
        "$.devices[2]",
        "$.probes[0].state",
        "$.probes[0].seconds",
    ]


def test_the_sentence_holds_every_problem_and_what_was_checked() -> None:
    with pytest.raises(ValidationProblem, match=r"^registration: .*\$\.cpu_cores.*; \$\.ram") as caught:
        convert({"cpu_cores": "many", "ram": 64}, Capabilities, subject="registration")
    assert len(caught.value.problems) == 2


def gpu(**fields: object) -> dict[str, object]:
    return {"devices": [{"id": "a", "kind": "gpu", "name": "g"} | fields]}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"devices": [{"id": "a", "kind": "gpu", "name": "g"}] * 2}, "$"),
        (gpu(access={"device_nodes": ["/dev/sda"]}), "$.devices[0].access"),
        (gpu(access={"device_nodes": ["/dev/dri/../sda"]}), "$.devices[0].access"),
        (gpu(attributes={"x": {"nested": 1}}), "$.devices[0].attributes.x"),
        (gpu(id="x" * 201), "$.devices[0].id"),
        ({"devices": "none"}, "$.devices"),
        ({"capabilities": None}, "$.capabilities"),
    ],
)
def test_what_a_report_may_not_hold_is_refused_by_its_path(change: dict[str, object], where: str) -> None:
    assert problems(GOOD | change) == [where]


def test_a_body_with_a_million_problems_names_a_few() -> None:
    assert len(problems({"capabilities": GOOD["capabilities"], "devices": [7] * 1000})) == MAX_PROBLEMS


def test_fields_of_a_newer_version_are_ignored() -> None:
    assert convert(GOOD | {"firmware": "9"}, HardwareReport, subject="report") == convert(
        GOOD, HardwareReport, subject="report"
    )


@pytest.mark.parametrize(
    "body", [b"{", b"", b"NaN", b'{"a": 1e400}', b'"\xed\xa0\x80"', b"[" * 100_000, b"[" * 40 + b"]" * 40, b"\xff\xfe"]
)
def test_what_is_no_plain_json_is_refused(body: bytes) -> None:
    with pytest.raises(ValidationProblem):
        parse(body, subject="body")


def test_a_gpu_without_memory_of_its_own_is_named_and_has_none_in_the_short_form() -> None:
    shared = Device(id="gpu:0", kind="gpu", name="Iris Xe", attributes={"unified_memory": True})
    short = summarize((shared,))
    assert (short.gpu_type, short.gpu_memory, short.gpu_memory_bytes) == ("Iris Xe", None, 0)
    assert HardwareReport(capabilities=short, devices=(shared,)).gpu_memory_bytes == 0


def test_the_largest_gpu_speaks_for_a_machine_with_several() -> None:
    def found(size: int, health: Health = "healthy") -> Device:
        return Device(id=f"g{size}", kind="gpu", name=f"GPU {size}", memory_bytes=size * GIB, health=health)

    gpus = [found(8), found(24), found(80, "unhealthy")]
    short = summarize(tuple(gpus))
    assert (short.gpu_type, short.gpu_memory, short.gpu_count) == ("GPU 24", "24.0GB", 2)
    report = HardwareReport(capabilities=short, devices=tuple(gpus))
    assert [gpu.id for gpu in report.gpus] == ["g24", "g8"]
