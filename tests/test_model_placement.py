"""Which models a machine is given: those that fit, what the pool lacks most, the larger first, and nothing flaps."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rma_coordinator.domain.placement import TOLD_MODELS, Placement, place
from rma_core import model_describe
from rma_core.catalog import Room, load
from rma_core.commands.models import REMARKS
from rma_core.errors import ValidationProblem
from rma_core.model_catalog import ModelEntry, container_name, load_model, load_models
from rma_core.models.hardware import read_reports
from rma_core.models.weights import Geometry, ModelFile
from rma_core.models.worker import RuntimeReport
from tests import tiny_model
from tests.test_placement import NOTES, entry

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from rma_core import HardwareReport
    from rma_core.models.worker import Assignment

MACHINES = Path(__file__).parent / "data" / "machines"
CONTAINERS = Path(__file__).resolve().parents[1] / "containers"
GB, GIB = 10**9, 2**30
DOCKER = RuntimeReport(name="docker", isolated=True, state="healthy")
PROCESS = RuntimeReport(name="process", isolated=False, state="healthy")
LLAMA = load(CONTAINERS / "llama-cpp" / "catalog.toml")
VLLM = load(CONTAINERS / "vllm" / "catalog.toml")


def machine(name: str) -> HardwareReport:
    (report,) = read_reports(json.loads((MACHINES / f"{name}.json").read_text()), subject=name)
    return report


REPORTS = {path.stem: machine(path.stem) for path in sorted(MACHINES.glob("*.json"))}
DESKTOP, RTX_3060, SERVER = (
    REPORTS[name] for name in ("ryzen-16-cores-no-gpu", "desktop-rtx-3060-8-cores", "server-four-a100")
)


def model(name: str, gigabytes: float = 1, **more: Any) -> ModelEntry:
    plain: dict[str, Any] = {"sha256": "0" * 64, "size_bytes": int(gigabytes * GB), "licence": "Apache-2.0"}
    return ModelEntry(**{"name": name, **plain, **more})


def repository(name: str, gigabytes: float) -> ModelEntry:
    files = (ModelFile(name="model.safetensors", size_bytes=int(gigabytes * GB), sha256="1" * 64),)
    return ModelEntry(
        name=name, format="safetensors", repository="https://hub.example/x/y", revision="abc", files=files,
        licence="Apache-2.0",
    )  # fmt: skip


def on(report: HardwareReport, *models: ModelEntry, **more: Any) -> Placement:
    options: dict[str, Any] = {"pool": {}, "runtimes": (DOCKER,), **more}
    tier = options.pop("tier", 2)
    return place(options.pop("entries", (LLAMA,)), report, tier, models=models, **options)


def names(placement: Placement) -> list[str]:
    return [one.model.name for one in placement.assignments if one.model]


def test_a_model_is_sent_as_names_and_hashes_and_never_as_a_path() -> None:
    small = model("llama3.2:1b", url="https://hub.example/a/model.gguf", context=8192, slots=3, kv_type="q8_0")
    [sent] = on(DESKTOP, small).assignments
    assert sent.env == {
        "MODEL": "llama3.2:1b", "MODEL_SHA256": "0" * 64, "CONTEXT": "8192", "SLOTS": "3", "KV_TYPE": "q8_0",
    }  # fmt: skip
    assert (sent.slots, sent.service, sent.lane) == (3, "llm", "llm llama3.2:1b")
    assert sent.model == small.assigned()
    assert sent.model.files[0].name == "model.gguf"
    assert sent.name == container_name("rma-llama-cpp-worker", "llama3.2:1b")
    assert sent.limits.memory_bytes > sent.needs.memory_bytes > GB


def test_what_the_pool_lacks_comes_first_and_of_that_the_larger() -> None:
    small, large, huge = model("small", 1), model("large", 9), model("huge", 500)
    assert names(on(DESKTOP, small, large, huge)) == ["large", "small"]
    assert names(on(DESKTOP, small, large, pool={"llm large": 1})) == ["small"]
    # Nobody lacks anything: a machine that is there for models has one all the same, the one with the fewest copies.
    assert names(on(DESKTOP, small, large, pool={"llm large": 3, "llm small": 2})) == ["small"]


def test_why_a_model_does_not_fit_is_said_with_its_parts() -> None:
    geometry = Geometry(
        weights_bytes=40 * GIB, layers=80, kv_heads=8, key_length=128, value_length=128, embedding_length=8192,
        feed_forward_length=28672, vocabulary=128256, training_context=8192,
    )  # fmt: skip
    found = on(RTX_3060, model("70b", 43, geometry=geometry, context=8192, slots=1))
    words = found.reasons["llm 70b"]
    assert words.startswith("needs 43.1 GiB of memory, ")
    assert words.endswith("(40 GiB of weights, 2.5 GiB of KV cache for 8192 tokens, 658 MiB overhead)")
    assert "a fifth of that" in on(RTX_3060, model("unknown", 43)).reasons["llm unknown"]
    assert on(DESKTOP, model("full", 900)).reasons["llm full"].count("storage") == 1


def test_a_gpu_comes_before_main_memory_and_gets_its_own_build() -> None:
    [sent] = on(RTX_3060, model("small", 4), tier=1).assignments
    assert (sent.image, sent.requires_gpu) == (LLAMA.gpu_images["cuda"], True)
    assert sent.needs.gpu_memory_bytes > 4 * GB
    assert sent.needs.gpu_api == ("cuda", "rocm", "vulkan")
    # Larger than the GPU, but not than main memory.
    [sent] = on(RTX_3060, model("medium", 12.5), tier=1).assignments
    assert (sent.image, sent.requires_gpu, sent.needs.gpu_memory_bytes) == (LLAMA.image, False, 0)


def test_a_mac_computes_with_its_gpu_where_processes_are_allowed() -> None:
    mac = REPORTS["macbook-air-m2-16gb"]
    [sent] = on(mac, model("small", 2), runtimes=(DOCKER, PROCESS)).assignments
    assert (sent.requires_gpu, sent.needs.gpu_api) == (True, ("metal",))
    [sent] = on(mac, model("small", 2)).assignments
    assert not sent.requires_gpu


def test_a_large_gpu_prefers_vllm_and_takes_it_whole() -> None:
    both = (model("m", 8), repository("m", 15))
    [first, *_] = on(SERVER, *both, entries=(LLAMA, VLLM), tier=1).assignments
    assert (first.image, first.env["MODEL"]) == (VLLM.image, "m")
    assert first.needs.gpu_memory_bytes == SERVER.gpus[0].memory_bytes
    assert names(on(SERVER, *both, entries=(LLAMA, VLLM), tier=1)) == ["m"]
    [other] = on(RTX_3060, *both, entries=(LLAMA, VLLM), tier=1).assignments
    assert other.image == LLAMA.gpu_images["cuda"]


#: What each machine is given of five models that nobody has yet; with a star what goes to its GPU.
GIVEN = {
    "container-2-of-64-cpus-4gib": "3b",
    "desktop-rtx-3060-6-cores": "32b 8b* 3b* 0.5b*",
    "desktop-rtx-3060-8-cores": "32b 8b* 3b* 0.5b*",
    "desktop-rtx-4090-driver-mismatch": "70b 8b 0.5b",
    "dgx-spark": "70b* 32b* 8b* 3b* 0.5b*",
    "jetson-orin-nano-8gb": "3b* 0.5b*",
    "laptop-2-cores-4gb": "3b",
    "laptop-rtx-4060-16gb": "8b* 3b 0.5b",
    "mac-mini-m1-8gb": "3b* 0.5b*",
    "macbook-air-m2-16gb": "8b* 3b* 0.5b",
    "macbook-air-m2-8gb": "3b* 0.5b*",
    "raspberry-pi-4-4gb": "3b",
    "raspberry-pi-5-4gb": "3b",
    "ryzen-16-cores-no-gpu": "70b 8b 0.5b",
    "server-four-a100": "70b* 32b* 8b* 3b* 0.5b*",
    "server-three-of-four-a100": "70b* 32b* 8b* 3b* 0.5b*",
    "vm-1-core-2gb": "0.5b",
}


@pytest.mark.parametrize("name", sorted(REPORTS))
def test_each_machine_of_the_collection_gets_what_fits_and_is_told_of_the_rest(name: str) -> None:
    sizes = {"0.5b": 0.4, "3b": 2, "8b": 4.9, "32b": 20, "70b": 43}
    placed = on(REPORTS[name], *(model(one, size) for one, size in sizes.items()), runtimes=(DOCKER, PROCESS))
    shown = [f"{one.model.name}{'*' * one.requires_gpu}" for one in placed.assignments if one.model]
    assert " ".join(shown) == GIVEN[name]
    assert set(names(placed)) | {reason.removeprefix("llm ") for reason in placed.reasons} == set(sizes)
    fits_together(REPORTS[name], placed.assignments)


def fits_together(report: HardwareReport, assignments: Collection[Assignment]) -> None:
    room = Room.of(report)
    for one in assignments:
        contained = not (one.requires_gpu and one.needs.gpu_api == ("metal",))
        assert room.lacks(one.needs, contained=contained) == "", one.name
        room.take(one.needs, contained=contained)


def test_only_models_that_the_owner_agreed_to_and_not_those_that_are_offered_from_files() -> None:
    found = on(DESKTOP, model("a"), model("b"), model("c"), agreed={"a", "c"}, own={"c"})
    assert names(found) == ["a"]
    assert found.reasons == {
        "llm b": "the owner has not agreed to this model", "llm c": "the owner offers this model already",
    }  # fmt: skip


def test_without_models_an_engine_is_of_no_use_and_says_so() -> None:
    assert on(DESKTOP).reasons == {"llm": "the pool has no model for it yet"}
    assert on(DESKTOP, repository("m", 1)).reasons == {"llm": "the pool has no model for it yet"}
    assert on(DESKTOP, model("m"), tier=None).reasons == {"llm": "the machine is below the lowest tier"}


def test_what_a_machine_has_needs_no_more_disk() -> None:
    # Beside what stays with its owner it would not fit any more.
    tight = model("m", (DESKTOP.storage_bytes - 5 * GB) / GB)
    small = Geometry(weights_bytes=GIB)
    fitting = ModelEntry(**{**{f: getattr(tight, f) for f in tight.__struct_fields__}, "geometry": small})
    assert names(on(DESKTOP, fitting)) == []
    assert names(on(DESKTOP, fitting, current=("llm m",))) == ["m"]


def test_reasons_for_many_models_are_summed_up() -> None:
    found = on(DESKTOP, *(model(f"m{number:02}", 900) for number in range(TOLD_MODELS + 5)))
    assert len(found.reasons) == TOLD_MODELS + 1
    assert found.reasons["llm"] == "and 5 more models"


def test_a_model_of_which_there_is_enough_gives_way_to_one_that_nobody_has() -> None:
    old, new = model("old", 25), model("new", 30)
    assert names(on(DESKTOP, old, new, current=("llm old",))) == ["old"]
    assert names(on(DESKTOP, old, new, current=("llm old",), pool={"llm old": 1})) == ["new"]
    # As soon as anybody has it, nothing is changed for it any more.
    assert names(on(DESKTOP, old, new, current=("llm old",), pool={"llm old": 1, "llm new": 1})) == ["old"]
    # What cannot be served here instead changes nothing either.
    assert names(on(DESKTOP, old, model("new", 500), current=("llm old",), pool={"llm old": 1})) == ["old"]


def test_a_model_never_drives_out_a_service_that_runs() -> None:
    big = entry("big", 2, cpu_cores=1, memory="50GB")
    found = on(DESKTOP, model("new", 30), entries=(LLAMA, big), current=("big",))
    assert [one.service for one in found.assignments] == ["big"]


SIZES = st.sampled_from([0.3, 1, 2, 5, 9, 20, 40, 90])
MODELS = st.lists(st.tuples(SIZES, st.integers(0, 3)), min_size=1, max_size=6).map(
    lambda found: [model(f"m{number}", size, wanted=wanted) for number, (size, wanted) in enumerate(found)]
)


@settings(max_examples=60)
@given(
    models=MODELS,
    name=st.sampled_from(sorted(REPORTS)),
    tier=st.sampled_from([1, 2, 3]),
    pool=st.dictionaries(st.integers(0, 5).map(lambda number: f"llm m{number}"), st.integers(0, 3)),
)
def test_the_same_machine_gets_the_same_and_keeps_it(
    models: list[ModelEntry], name: str, tier: int, pool: Mapping[str, int]
) -> None:
    report = REPORTS[name]

    def once(found: list[ModelEntry], current: Sequence[str]) -> Placement:
        return on(report, *found, entries=(NOTES, LLAMA), tier=tier, pool=pool, current=current)

    first = once(models, ())
    assert once(models[::-1], ()) == first
    fits_together(report, first.assignments)
    current = [one.lane for one in first.assignments]
    again = once(models, current)
    kept = [one.lane for one in again.assignments]
    # At most a model that the pool has enough of was exchanged for one that nobody has; then all stays.
    spared = {lane for lane in set(current) - set(kept) if lane != "notes"}
    assert all(pool.get(lane, 0) >= 1 for lane in spared)
    assert [one.lane for one in once(models, kept).assignments] == kept


@settings(max_examples=25)
@given(models=MODELS, order=st.permutations(sorted(REPORTS)))
def test_a_fleet_comes_to_rest_and_has_what_any_of_its_machines_could_have_in_place_of_a_spare(
    models: list[ModelEntry], order: list[str]
) -> None:
    has: dict[str, list[str]] = {}

    def pool_without(name: str) -> dict[str, int]:
        lanes = itertools.chain.from_iterable(found for other, found in has.items() if other != name)
        counts: dict[str, int] = {}
        for lane in lanes:
            counts[lane] = counts.get(lane, 0) + 1
        return counts

    def round_of_all() -> bool:
        changed = False
        for name in order:
            found = on(REPORTS[name], *models, pool=pool_without(name), current=has.get(name, []))
            now = [one.lane for one in found.assignments]
            changed = changed or set(now) != set(has.get(name, ["none yet"]))
            has[name] = now
        return changed

    rounds = sum(1 for _ in itertools.takewhile(lambda _: round_of_all(), range(20)))
    assert rounds <= 4, "it goes on and on"
    offered = set(itertools.chain.from_iterable(has.values()))
    for one in models:
        lane = f"llm {one.name}"
        if lane in offered or not one.wanted:
            continue
        # Nobody has it: then nobody can have it in place of what they could spare.
        for name in order:
            spare = {
                lane for lane in has[name] if pool_without(name).get(lane, 0) >= max(1, wanted_of(models, lane))
            }  # fmt: skip
            left = [lane for lane in has[name] if lane not in spare]
            found = on(REPORTS[name], *models, pool=pool_without(name), current=left)
            assert lane not in {one.lane for one in found.assignments} or not spare


def wanted_of(models: list[ModelEntry], lane: str) -> int:
    return next(one.wanted for one in models if f"llm {one.name}" == lane)


# -- entries as files ------------------------------------------------------------------------------------------------


def test_an_entry_is_written_from_a_file_and_read_again(tmp_path: Path) -> None:
    from rma_core import gguf

    file = tiny_model.write_chat_model(tmp_path / "tiny.gguf")
    found = gguf.read(file)
    made = model_describe.described(
        found, sha256=model_describe.digest(file), name="tiny", url="https://hub.example/tiny.gguf", licence="MIT"
    )
    (tmp_path / "tiny.toml").write_text(model_describe.toml(made, remarks=REMARKS), encoding="utf-8")
    [read] = load_models(tmp_path)
    assert read == made
    foretold = gguf.memory(found, context=made.context, slots=made.slots)
    assert read.memory().total_bytes == foretold.total_bytes


BAD = {
    "no file at all": ('name = "m"\nlicence = "MIT"', "either a file"),
    "a file and a repository": (
        f'name = "m"\nlicence = "MIT"\nsha256 = "{"0" * 64}"\nsize_bytes = 1\nrepository = "https://h/x"', "either a",
    ),
    "a repository without its files": ('name = "m"\nlicence = "MIT"\nrepository = "https://h/x"', "needs a `revision`"),
    "no size": (f'name = "m"\nlicence = "MIT"\nsha256 = "{"0" * 64}"', "needs `sha256` and `size_bytes`"),
    "no licence": (f'name = "m"\nsha256 = "{"0" * 64}"\nsize_bytes = 1', "$.licence: is required"),
    "no https": (f'name = "m"\nlicence = "MIT"\nsha256 = "{"0" * 64}"\nsize_bytes = 1\nurl = "http://h/x"', "$.url"),
    "a misspelt field": (
        f'name = "m"\nlicence = "MIT"\nsha256 = "{"0" * 64}"\nsize_bytes = 1\ncontxt = 9', "unknown field `contxt`",
    ),
    "a file in several parts": (
        (f'name = "m"\nlicence = "MIT"\nrepository = "https://h/x"\nrevision = "1"\n'
         f'files = [{{name = "a", size_bytes = 1, sha256 = "{"0" * 64}"}}, '
         f'{{name = "b", size_bytes = 1, sha256 = "{"0" * 64}"}}]'), "a GGUF model is one file",
    ),
    "two files of one name": (
        (f'name = "m"\nlicence = "MIT"\nformat = "safetensors"\nrepository = "https://h/x"\nrevision = "1"\n'
         f'files = [{{name = "a", size_bytes = 1, sha256 = "{"0" * 64}"}}, '
         f'{{name = "a", size_bytes = 2, sha256 = "{"1" * 64}"}}]'), "have the same name",
    ),
    "no TOML": ("name =", "file: "),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_entry_is_refused_with_its_file_and_the_reason(tmp_path: Path, what: str) -> None:
    text, reason = BAD[what]
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValidationProblem) as refused:
        load_model(path)
    assert str(path) in str(refused.value)
    assert reason in str(refused.value)


def test_a_name_stands_once_for_each_format(tmp_path: Path) -> None:
    text = f'name = "m"\nlicence = "MIT"\nsha256 = "{"0" * 64}"\nsize_bytes = 1\n'
    (tmp_path / "one.toml").write_text(text, encoding="utf-8")
    (tmp_path / "two.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValidationProblem, match="'m' is described twice"):
        load_models(tmp_path)
    assert load_models(tmp_path / "nowhere") == ()


def test_the_files_of_a_repository_have_addresses_of_its_revision() -> None:
    [file] = repository("m", 1).parts()
    assert file.url == "https://hub.example/x/y/resolve/abc/model.safetensors"


def test_names_of_containers_are_valid_and_tell_models_apart() -> None:
    made = {container_name("rma-llama-cpp-worker", name) for name in ("a:b", "a/b", "A:b", "x" * 200, "Ü" * 9)}
    assert len(made) == 5
    assert all(len(name) <= 63 for name in made)
