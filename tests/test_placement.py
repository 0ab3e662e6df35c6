"""Placement: what one machine is given of the catalog, and the sentence for everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.domain.placement import Placement, assignment, place
from rma_core import Capabilities, CatalogEntry, Device, HardwareReport, Needs, ProcessForm
from rma_core.catalog import Room
from rma_core.models.hardware import ContainerAccess, read_reports, summarize
from rma_core.models.worker import RuntimeReport

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

MACHINES = Path(__file__).parent / "data" / "machines"
GIB = 2**30
DOCKER = RuntimeReport(name="docker", isolated=True, state="healthy")
NO_DOCKER = RuntimeReport(name="docker", isolated=True, state="undetected", reason="Docker is not installed")
PROCESS = RuntimeReport(name="process", isolated=False, state="healthy")
AS_PROCESS = ProcessForm(distribution="rma-notes", module="rma_notes")


def entry(service: str, *tiers: int, process: bool = False, wanted: int = 1, **needs: object) -> CatalogEntry:
    return CatalogEntry(
        service=service,
        name=f"{service}-worker",
        image=f"ghcr.io/rma/{service}-worker:1",
        routes=(f"POST /{service}",),
        tiers=tiers,
        wanted=wanted,
        needs=Needs(**needs),  # type: ignore[arg-type]
        process=AS_PROCESS if process else None,
    )


LLM = entry("llm", 1, cpu_cores=4, memory="8GB", gpu_memory="8GB", gpu_api=("cuda",), os=("linux",))
VISION = entry("vision", 1, cpu_cores=2, memory="4GB", gpu_memory="8GB", gpu_api=("cuda",))
METAL = entry("llm-metal", 1, 2, process=True, cpu_cores=2, memory="1GB", gpu_memory="4GB", gpu_api=("metal",))
COMPUTE = entry("compute", 1, process=True, memory="1GB")
RAG = entry("rag", 2, cpu_cores=1, memory="2GB")
NOTES = entry("notes", 2, 3, process=True, cpu_cores=1, memory="512MB")
POSTGRES = entry("postgres", 3, cpu_cores=1, memory="1GB", storage="5GB")
REDIS = entry("redis", 3, cpu_cores=0.5, memory="512MB")
CATALOG = (LLM, VISION, COMPUTE, RAG, NOTES, POSTGRES, REDIS)


def machine(name: str) -> HardwareReport:
    (report,) = read_reports(json.loads((MACHINES / f"{name}.json").read_text()), subject=name)
    return report


PI = machine("raspberry-pi-4-4gb")
RTX_3060 = machine("desktop-rtx-3060-8-cores")
MAC = machine("macbook-air-m2-16gb")


def chosen(placement: Placement) -> list[str]:
    return [item.service for item in placement.assignments]


def test_a_pool_of_one_small_machine_offers_whatever_fits_on_it() -> None:
    found = place(CATALOG, PI, 3, pool={}, runtimes=(DOCKER,))
    assert chosen(found) == ["postgres", "redis", "notes"]
    assert found.reasons["rag"] == "needs 2 GiB of memory, 797 MiB free"
    assert found.reasons["llm"].endswith("needs a GPU with 8 GiB and cuda, there is none")


def test_own_tier_first_and_the_others_only_where_the_pool_lacks_them() -> None:
    found = place(CATALOG, RTX_3060, 1, pool={"rag": 1, "redis": 0}, runtimes=(DOCKER,))
    assert chosen(found)[:2] == ["compute", "llm"]
    assert found.reasons["rag"] == "enough copies in the pool (1 running, 1 wanted)"
    assert "redis" in chosen(found)


def test_a_preferred_service_is_placed_even_where_the_pool_has_enough() -> None:
    assert chosen(place((RAG,), RTX_3060, 2, pool={"rag": 5})) == ["rag"]


def test_a_service_of_which_the_pool_wants_none_goes_nowhere_not_even_where_it_was() -> None:
    none = entry("vision", 2, wanted=0)
    for current in ((), ("vision",)):
        found = place((none,), RTX_3060, 2, pool={}, current=current)
        assert (chosen(found), found.reasons) == ([], {"vision": "the pool wants no copies of it"})


def test_an_earlier_place_in_its_tiers_goes_first_then_what_nobody_offers() -> None:
    first, second = entry("b-first", 2, 1), entry("a-second", 1, 2)
    assert chosen(place((second, first), RTX_3060, 2, pool={})) == ["b-first", "a-second"]
    many, none = entry("many", 2, wanted=9), entry("none", 2)
    assert chosen(place((many, none), RTX_3060, 2, pool={"many": 1})) == ["none", "many"]
    assert chosen(place((many, none), RTX_3060, 2, pool={})) == ["many", "none"]


def test_two_services_share_a_gpu_only_as_far_as_its_memory_goes() -> None:
    found = place((LLM, VISION), RTX_3060, 1, pool={}, runtimes=(DOCKER,))
    assert chosen(found) == ["llm"]
    assert found.reasons["vision"] == (
        "needs a GPU with 8 GiB and cuda, there is NVIDIA GeForce RTX 3060 (cuda, 4 GiB free)"
    )
    assert len(place((LLM, VISION), machine("server-four-a100"), 1, pool={}).assignments) == 2


def test_services_get_gpus_of_their_own_while_there_are_some() -> None:
    room = Room.of(machine("server-four-a100"))
    ids = {gpu.id for _ in range(4) if (gpu := room.take(LLM.needs))}
    assert len(ids) == 4
    assert room.take(LLM.needs) is not None


def test_a_machine_without_a_tier_gets_nothing_and_is_told() -> None:
    found = place(CATALOG, machine("vm-1-core-2gb"), None, pool={})
    assert found.assignments == ()
    assert set(found.reasons.values()) == {"the machine is below the lowest tier"}
    assert set(found.reasons) == {item.service for item in CATALOG}


def test_only_what_the_owner_agreed_to_is_placed() -> None:
    found = place(CATALOG, RTX_3060, 1, pool={}, allowed={"notes"}, runtimes=(DOCKER,))
    assert chosen(found) == ["notes"]
    assert set(found.reasons.values()) == {"the owner has not agreed"}


def test_without_an_engine_only_services_that_run_as_processes_are_placed() -> None:
    found = place(CATALOG, RTX_3060, 2, pool={}, runtimes=(NO_DOCKER, PROCESS))
    assert chosen(found) == ["notes"]
    assert found.reasons["rag"] == ("only as a container, and no engine works here (docker: Docker is not installed)")
    assert found.reasons["compute"] == found.reasons["rag"]


def test_processes_the_owner_did_not_allow_are_said_to_be_missing() -> None:
    found = place((NOTES,), RTX_3060, 2, pool={}, runtimes=(NO_DOCKER,))
    assert found.reasons["notes"].endswith("and the owner does not let services run as plain processes")


def test_a_gpu_that_containers_cannot_use_is_named_with_what_to_do() -> None:
    gpu = Device(
        id="gpu:0",
        kind="gpu",
        name="RTX 3060",
        api="cuda",
        memory_bytes=12 * GIB,
        attributes={"container_access": "none", "container_access_reason": "install nvidia-container-toolkit"},
    )
    devices = (*(d for d in RTX_3060.devices if d.kind != "gpu"), gpu)
    report = HardwareReport(capabilities=summarize(devices), devices=devices)
    found = place((LLM,), report, 1, pool={}, runtimes=(DOCKER,))
    assert found.reasons["llm"] == (
        "needs a GPU with 8 GiB and cuda: a GPU is there, but containers cannot use it: "
        "install nvidia-container-toolkit"
    )
    toolkit = Device(id="gpu:0", kind="gpu", name="x", api="cuda", memory_bytes=12 * GIB)
    toolkit_report = HardwareReport(
        capabilities=report.capabilities,
        devices=(*devices[:-1], _with(toolkit, container_access="nvidia-container-toolkit")),
    )
    assert chosen(place((LLM,), toolkit_report, 1, pool={}, runtimes=(DOCKER,))) == ["llm"]


def _with(device: Device, **attributes: str) -> Device:
    return Device(
        id=device.id,
        kind=device.kind,
        name=device.name,
        api=device.api,
        memory_bytes=device.memory_bytes,
        attributes=dict(attributes),
    )


def test_a_mac_runs_containers_of_linux_and_metal_only_as_a_process() -> None:
    linux = entry("linux-only", 1, memory="1GB", os=("linux",))
    assert chosen(place((linux, METAL), MAC, 1, pool={}, runtimes=(DOCKER,))) == ["linux-only"]
    assert chosen(place((linux, METAL), MAC, 1, pool={}, runtimes=(PROCESS,))) == ["llm-metal"]
    assert chosen(place((linux, METAL), MAC, 1, pool={}, runtimes=(DOCKER, PROCESS))) == ["linux-only", "llm-metal"]
    assert "needs a GPU with 8 GiB and cuda" in place((LLM,), MAC, 1, pool={}).reasons["llm"]


def test_unified_memory_is_given_away_once() -> None:
    room = Room.of(MAC)
    before = room.memory_bytes
    room.take(METAL.needs, contained=False)
    assert before - room.memory_bytes == 5 * GIB


def test_an_owner_keeps_a_quarter_of_a_small_machine_and_4_gib_of_a_large_one() -> None:
    assert Room.of(PI).memory_bytes == PI.memory_bytes * 3 / 4
    large = machine("server-four-a100")
    assert Room.of(large).memory_bytes == large.memory_bytes - 4 * GIB
    assert Room.of(PI).storage_bytes == PI.storage_bytes * 9 / 10


def test_what_runs_already_stays_and_what_no_longer_fits_goes() -> None:
    tight = entry("a-new", 3, memory="2GB")
    found = place((tight, POSTGRES), PI, 3, pool={"postgres": 9}, current=("postgres",))
    assert chosen(found) == ["postgres"]
    assert found.reasons["a-new"].startswith("needs 2 GiB of memory, ")
    assert chosen(place((tight, POSTGRES), PI, 3, pool={"postgres": 9})) == ["a-new"]
    huge = entry("huge", 3, memory="64GB")
    assert chosen(place((huge,), PI, 3, pool={}, current=("huge",))) == []


def test_what_runs_stays_whatever_the_pool_comes_to_lack() -> None:
    current = ("rag", "notes", "redis")
    pools: tuple[dict[str, int], ...] = ({}, {"rag": 9}, {"notes": 3, "redis": 1}, {"postgres": 0, "redis": 7})
    placed = [chosen(place(CATALOG, RTX_3060, 2, pool=pool, current=current)) for pool in pools]
    assert all(services[:3] == ["rag", "notes", "redis"] for services in placed)


def test_a_machine_that_sends_its_short_form_only_gets_what_it_claims_to_carry() -> None:
    short = Capabilities(cpu_cores=16, ram="64.0GB", storage="1TB", gpu_memory="24GB", gpu_type="NVIDIA RTX 4090")
    found = place((LLM, VISION, RAG), HardwareReport(capabilities=short), 1, pool={})
    assert chosen(found) == ["llm", "vision", "rag"]


def test_a_small_gpu_is_taken_before_a_large_one() -> None:
    gpus = tuple(
        Device(id=f"gpu:{size}", kind="gpu", name="x", api="cuda", memory_bytes=size * GIB, access=ContainerAccess())
        for size in (80, 12, 4)
    )
    room = Room.of(HardwareReport(capabilities=Capabilities(cpu_cores=8, ram="64GB"), devices=gpus))
    first, second = room.take(LLM.needs), room.take(LLM.needs)
    assert (first and first.id, second and second.id) == ("gpu:12", "gpu:80")


def test_an_assignment_carries_the_entry_and_the_pools_environment() -> None:
    made = assignment(LLM, env={"COORDINATOR_URL": "https://pool.example"})
    assert made.requires_gpu
    assert made.env == {"COORDINATOR_URL": "https://pool.example"}
    assert (made.name, made.image, made.port, made.routes) == ("llm-worker", LLM.image, 8000, LLM.routes)


amounts = st.sampled_from(["0B", "256MB", "1GB", "3GB", "8GB", "40GB"])
names = st.sampled_from([f"s{n}" for n in range(8)])


@st.composite
def catalogs(draw: st.DrawFn) -> list[CatalogEntry]:
    services = draw(st.lists(names, unique=True))
    return [
        entry(
            service,
            *draw(st.lists(st.integers(1, 3), unique=True)),
            process=draw(st.booleans()),
            wanted=draw(st.integers(0, 3)),
            cpu_cores=draw(st.sampled_from([0, 0.5, 1, 4, 9])),
            memory=draw(amounts),
            storage=draw(amounts),
            gpu_memory=draw(amounts),
            gpu_api=draw(st.sampled_from([(), ("cuda",), ("metal",)])),
        )
        for service in services
    ]


worlds = st.fixed_dictionaries(
    {
        "pool": st.dictionaries(names, st.integers(0, 4)),
        "allowed": st.none() | st.sets(names),
        "current": st.lists(names, unique=True),
        "runtimes": st.lists(st.sampled_from([DOCKER, NO_DOCKER, PROCESS]), unique=True).map(tuple),
    }
)
machines = st.sampled_from([machine(path.stem) for path in sorted(MACHINES.glob("*.json"))])
tiers = st.none() | st.integers(1, 3)


def _place(
    entries: Collection[CatalogEntry], report: HardwareReport, tier: int | None, world: Mapping[str, object]
) -> Placement:
    return place(entries, report, tier, **world)  # type: ignore[arg-type]


@given(catalogs(), machines, tiers, worlds)
def test_every_entry_is_either_chosen_or_has_a_reason(
    entries: list[CatalogEntry], report: HardwareReport, tier: int | None, world: dict[str, object]
) -> None:
    found = _place(entries, report, tier, world)
    placed = set(chosen(found))
    assert placed | set(found.reasons) == {item.service for item in entries}
    assert not placed & set(found.reasons)
    assert all(found.reasons.values())


@given(catalogs(), machines, tiers, worlds)
def test_what_is_chosen_fits_the_machine_together(
    entries: list[CatalogEntry], report: HardwareReport, tier: int | None, world: dict[str, object]
) -> None:
    needs = [item.needs for item in _place(entries, report, tier, world).assignments]
    assert sum(need.cpu_cores for need in needs) <= report.cpu_cores
    assert sum(need.memory_bytes for need in needs) <= report.memory_bytes
    assert sum(need.storage_bytes for need in needs) <= report.storage_bytes
    gpu_bytes = sum(gpu.memory_bytes or 0 for gpu in report.gpus)
    assert sum(need.gpu_memory_bytes for need in needs) <= gpu_bytes * 8 / 7


@given(catalogs(), machines, tiers, worlds, st.randoms())
def test_the_order_of_the_catalog_does_not_matter(
    entries: list[CatalogEntry], report: HardwareReport, tier: int | None, world: dict[str, object], random: object
) -> None:
    shuffled = list(entries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert _place(entries, report, tier, world) == _place(shuffled, report, tier, world)


def test_what_shares_a_gpu_goes_on_sharing_it_when_others_have_theirs_whole() -> None:
    three = [Device(id=f"gpu:{n}", kind="gpu", name="A2", api="cuda", memory_bytes=16 * 2**30, access=ContainerAccess())
             for n in range(3)]  # fmt: skip
    report = HardwareReport(capabilities=Capabilities(cpu_cores=8, ram="64GB", storage="1TB"), devices=tuple(three))
    entries = [
        entry(f"s{n}", 1, gpu_memory=size, gpu_api=("cuda",), wanted=3)
        for n, size in enumerate(("256MB", "0B", "0B", "256MB"))
    ]
    first = place(entries, report, 1, pool={"s0": 2, "s3": 2})
    assert sorted(chosen(first)) == ["s0", "s1", "s2", "s3"]
    assert chosen(place(entries, report, 1, pool={}, current=chosen(first))) == chosen(first)


@given(catalogs(), machines, st.integers(1, 3), worlds)
def test_placing_again_what_was_placed_changes_nothing(
    entries: list[CatalogEntry], report: HardwareReport, tier: int, world: dict[str, object]
) -> None:
    first = _place(entries, report, tier, world)
    again = _place(entries, report, tier, world | {"current": chosen(first)})
    assert set(chosen(again)) >= set(chosen(first))
