"""The tier policy ``threshold``, on machines as their owners call them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core import Capabilities, Device, HardwareReport, PolicyInput, TierDecision, TierPolicy
from rma_core.builtin.threshold import ThresholdPolicy, read_table, rma_tier_policies
from rma_core.errors import ValidationProblem
from rma_core.models.hardware import read_reports, summarize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rma_core import PluginConfig

MACHINES = Path(__file__).parent / "data" / "machines"
GIB = 2**30

NAMES = sorted(path.stem for path in MACHINES.glob("*.json"))


def machine(name: str) -> HardwareReport:
    (report,) = read_reports(json.loads((MACHINES / f"{name}.json").read_text()), subject=name)
    return report


def decide(report: HardwareReport) -> TierDecision:
    return ThresholdPolicy().decide(PolicyInput(report=report))


def bare(**fields: object) -> HardwareReport:
    (report,) = read_reports(fields, subject="machine")
    return report


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_machines_short_form_is_made_from_its_devices(name: str) -> None:
    report = machine(name)
    assert report.capabilities == summarize(report.devices)
    assert decide(HardwareReport(capabilities=report.capabilities)).tier == decide(report).tier


def test_a_bare_capabilities_object_is_enough() -> None:
    found = decide(bare(cpu_cores=16, ram="64.0GB", storage="1TB", gpu_memory="24GB", gpu_type="NVIDIA RTX 4090"))
    assert found == TierDecision(tier=1, reason="tier 1: NVIDIA RTX 4090 with 24 GiB, 16 cores and 64 GiB")


def test_a_machine_below_every_tier_is_told_everything_it_lacks() -> None:
    found = decide(bare(cpu_cores=1, ram="2GB", storage="5GB"))
    assert found.tier is None
    assert found.reason == (
        "no tier: 1 core, tier 3 needs 2; 2 GiB of RAM, tier 3 needs 4 GB; 5.0 GB of free storage, tier 3 needs 10 GB"
    )


@pytest.mark.parametrize(("ram_mib", "tier"), [(3584, 3), (3583, None)])
def test_a_memory_bar_holds_from_seven_eighths_on(ram_mib: int, tier: int | None) -> None:
    memory = Device(id="memory", kind="memory", name="memory", memory_bytes=ram_mib * 2**20)
    report = HardwareReport(
        capabilities=Capabilities(cpu_cores=2, ram="0.0GB", storage="20GB"),
        devices=(memory,),
    )
    assert decide(report).tier == tier


def test_only_gpus_of_the_largest_ones_name_are_counted_with_it() -> None:
    names = ("Radeon 780M", "RX 7900 XTX", "RX 7900 XTX")
    gpus = tuple(
        Device(id=f"gpu:{index}", kind="gpu", name=name, memory_bytes=(1 + 23 * (index > 0)) * GIB)
        for index, name in enumerate(names)
    )
    report = HardwareReport(capabilities=Capabilities(cpu_cores=16, ram="64GB", gpu_count=3), devices=gpus)
    assert decide(report).reason == "tier 1: 2 x RX 7900 XTX with 24 GiB, 16 cores and 64 GiB"


def test_an_unhealthy_gpu_is_mentioned_and_not_replaced_by_the_short_form() -> None:
    sick = Device(id="gpu:0", kind="gpu", name="RTX 4090", health="unhealthy", reason="fell\noff the bus")
    short = Capabilities(cpu_cores=16, ram="64.0GB", gpu_memory="24GB")
    found = decide(HardwareReport(capabilities=short, devices=(sick,)))
    assert found.tier == 2
    assert found.reason == (
        "tier 2: 16 cores and 64 GiB, but no GPU with 8 GB; a GPU is there but unhealthy: fell off the bus"
    )


def test_a_pool_may_have_a_table_of_its_own() -> None:
    config: PluginConfig = {
        "tiers": [{"tier": 5, "name": "Any"}, {"tier": 1, "name": "Big", "ram": "512GB", "storage": "1TB"}]
    }
    (policy,) = rma_tier_policies(config)
    assert isinstance(policy, TierPolicy)
    assert policy.name == "threshold"
    found = policy.decide(PolicyInput(report=bare(cpu_cores=1, ram="1GB")))
    assert found.tier == 5
    assert found.reason == "tier 5: 1 core and 1 GiB, but tier 1 needs 512 GB of RAM and 1 TB of free storage"


def test_a_wrong_table_is_refused_with_every_problem() -> None:
    config: PluginConfig = {
        "tires": [],
        "tiers": [{"tier": 0, "ram": "lots", "gpu": "8GB"}, {"tier": 2, "name": "x"}, {"tier": 2, "name": "y"}],
    }
    with pytest.raises(ValidationProblem) as caught:
        rma_tier_policies(config)
    where = {problem.where for problem in caught.value.problems}
    assert where == {"$.tires", "$.tiers", "$.tiers[0].gpu", "$.tiers[0].name", "$.tiers[0].tier", "$.tiers[0].ram"}


@pytest.mark.parametrize("tiers", [[], "x", None, [1], [{"tier": "one", "name": "x"}]])
def test_a_table_that_is_none_is_refused(tiers: object) -> None:
    with pytest.raises(ValidationProblem):
        read_table({"tiers": tiers}, subject="x")


sizes = st.integers(0, 2**44)


@st.composite
def reports(draw: st.DrawFn) -> HardwareReport:
    gpus = draw(st.lists(st.tuples(st.none() | sizes, st.sampled_from(["healthy", "unhealthy"])), max_size=3))
    return build(draw(st.integers(0, 256)), draw(sizes), draw(sizes), gpus)


def build(cores: int, memory: int, storage: int, gpus: Sequence[tuple[int | None, str]]) -> HardwareReport:
    devices = [
        Device(id="cpu", kind="cpu", name="cpu", attributes={"cores": cores}),
        Device(id="memory", kind="memory", name="memory", memory_bytes=memory),
        Device(id="storage", kind="storage", name="storage", memory_bytes=storage),
        *(
            Device(id=f"gpu:{n}", kind="gpu", name="GPU", memory_bytes=size, health=health)  # type: ignore[arg-type]
            for n, (size, health) in enumerate(gpus)
        ),
    ]
    return HardwareReport(capabilities=summarize(tuple(devices)), devices=tuple(devices))


@given(reports())
def test_every_machine_gets_the_same_answer_twice_with_a_reason(report: HardwareReport) -> None:
    found = decide(report)
    assert found == decide(report)
    assert found.tier in {1, 2, 3, None}
    assert found.reason


@given(reports(), st.integers(0, 64), sizes, sizes, st.none() | sizes)
def test_more_of_everything_never_gives_a_worse_tier(
    report: HardwareReport, cores: int, memory: int, storage: int, gpu: int | None
) -> None:
    more = build(
        report.cpu_cores + cores,
        report.memory_bytes + memory,
        report.storage_bytes + storage,
        [
            *((device.memory_bytes, device.health) for device in report.devices if device.kind == "gpu"),
            *([(gpu, "healthy")] if gpu is not None else []),
        ],
    )
    assert (decide(more).tier or 99) <= (decide(report).tier or 99)
