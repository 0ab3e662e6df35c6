"""Files of models that an owner has anyway: how they are named, found, read, and offered or left out with a reason."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.agent.llm.own_models import LLAMA_CPP, MAX_OWN, SLOTS, OwnFile, found, offered, own_files
from rma_core.catalog import load
from rma_core.errors import UsageProblem
from rma_core.models.hardware import Capabilities, Device, HardwareReport
from rma_core.models.sizes import GIB
from rma_core.models.worker import RuntimeReport
from tests import tiny_model
from tests.fixtures import NOTES

PROCESS = RuntimeReport(name="process", state="healthy", isolated=False)
DOCKER = RuntimeReport(name="docker", state="healthy", isolated=True)


def machine(memory_gib: float, *gpus: Device) -> HardwareReport:
    memory = Device(id="memory", kind="memory", name="memory", memory_bytes=int(memory_gib * GIB))
    return HardwareReport(capabilities=Capabilities(cpu_cores=8, ram=f"{memory_gib:g}GB"), devices=(memory, *gpus))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_model.write_chat_model(tmp_path_factory.mktemp("model") / "m.gguf").read_bytes()


# -- what the owner writes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/models", OwnFile(Path("/models"))),
        ("/models/a.gguf", OwnFile(Path("/models/a.gguf"))),
        ("small=/models/a.gguf", OwnFile(Path("/models/a.gguf"), "small")),
        ("qwen/small:q4=/m/a.gguf", OwnFile(Path("/m/a.gguf"), "qwen/small:q4")),
        ("small=/m/a=b.gguf#context=8192&slots=1", OwnFile(Path("/m/a=b.gguf"), "small", 8192, 1)),
        ("/m/x=y/a.gguf", OwnFile(Path("/m/x=y/a.gguf"))),
        ("  /models  ", OwnFile(Path("/models"))),
    ],
)
def test_a_file_is_named_by_itself_or_by_its_owner(text: str, wanted: OwnFile) -> None:
    assert own_files([text]) == (wanted,)


def test_a_file_with_a_sign_in_its_name_is_no_name_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.gguf").touch()
    assert own_files(["a=b.gguf"]) == (OwnFile(tmp_path / "a=b.gguf"),)
    assert own_files(["c=b.gguf"]) == (OwnFile(tmp_path / "b.gguf", "c"),)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "names no file or folder"),
        ("small=", "names no file or folder"),
        ("a b=/m/a.gguf", "no name that a client could ask for"),
        ("small=~nobody-here/a.gguf", "there is no such home folder"),
        ("/m/a.gguf#contxt=1", "only `context` and `slots`"),
        ("/m/a.gguf#context", "context is a number from 16"),
        ("/m/a.gguf#context=4k", "context is a number from 16"),
        ("/m/a.gguf#slots=0", "slots is a number from 1 to 64"),
        ("/m/a.gguf#slots=9999999999999999999999", "slots is a number from 1 to 64"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_how_it_is_written(text: str, why: str) -> None:
    with pytest.raises(UsageProblem, match=why) as refused:
        own_files([text])
    assert 'models = ["FOLDER", "NAME=FILE.gguf"]' in refused.value.hints[0]


@given(text=st.text(max_size=60))
def test_any_text_is_a_file_or_a_clear_refusal(text: str) -> None:
    try:
        [one] = own_files([text])
    except UsageProblem:
        return
    assert one.path.is_absolute()
    assert 1 <= one.slots <= 64


# -- what there is ---------------------------------------------------------------------------------------------------


def test_folders_are_looked_into_but_links_to_others_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "shared" / "deeper").mkdir(parents=True)
    (tmp_path / "private").mkdir()
    for name in ("shared/b.gguf", "shared/deeper/a.GGUF", "shared/readme.md", "private/secret.gguf"):
        (tmp_path / name).touch()
    (tmp_path / "shared" / "link").symlink_to(tmp_path / "private")
    [folder] = own_files([f"{tmp_path / 'shared'}#slots=3"])
    assert [(one.path.name, one.slots) for one in found([folder])] == [("b.gguf", 3), ("a.GGUF", 3)]


def test_models_are_offered_where_they_fit_and_left_out_with_their_file_and_a_reason(
    tmp_path: Path, chat: bytes
) -> None:
    (tmp_path / "Tiny Chat.gguf").write_bytes(chat)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    files = own_files([str(tmp_path), f"again={tmp_path / 'Tiny Chat.gguf'}#context=64&slots=1", str(tmp_path / "no")])
    made = offered(files, machine(16), [PROCESS])
    assert list(made.paths) == ["Tiny-Chat", "again"]
    first, second = made.assignments
    assert (first.env["MODEL"], first.env["CONTEXT"], first.slots) == ("Tiny-Chat", "2048", 2)
    assert (second.env["CONTEXT"], second.slots) == ("64", 1)
    assert first.name != second.name
    assert len(made.left_out) == 2
    assert any("broken.gguf" in why and "cut off" in why for why in made.left_out)
    assert any(str(tmp_path / "no") in why for why in made.left_out)


def test_a_machine_too_small_says_what_a_model_takes(tmp_path: Path, chat: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(chat)
    made = offered(own_files([str(tmp_path)]), machine(0.05), [PROCESS])
    assert made.assignments == ()
    [why] = made.left_out
    assert f"{tmp_path / 'm.gguf'}: needs " in why
    assert "of memory" in why
    assert "weights" in why


def test_without_an_engine_that_works_nothing_is_offered_and_the_engines_say_why(tmp_path: Path, chat: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(chat)
    away = RuntimeReport(name="docker", state="unhealthy", isolated=True, reason="it does not answer")
    made = offered(own_files([str(tmp_path)]), machine(16), [away])
    assert made.left_out == (f"{tmp_path / 'm.gguf'}: no engine works here: docker: it does not answer",)


def test_no_more_models_are_offered_than_a_machine_should_hold(tmp_path: Path, chat: bytes) -> None:
    for number in range(MAX_OWN + 3):
        (tmp_path / f"m{number:02}.gguf").write_bytes(chat)
    made = offered(own_files([str(tmp_path)]), machine(16), [PROCESS])
    assert len(made.assignments) == MAX_OWN
    assert made.left_out == (f"{tmp_path / f'm{MAX_OWN}.gguf'}: only the first {MAX_OWN} models are offered",)


def test_a_file_takes_no_disk_where_it_lies_but_once_more_in_an_engines_volume(tmp_path: Path, chat: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(chat)
    full = machine(16)
    storage = Device(id="storage", kind="storage", name="disk", memory_bytes=100_000_000)
    full = msgspec.structs.replace(
        full,
        devices=(*full.devices, storage),
        capabilities=msgspec.structs.replace(full.capabilities, storage="0.1GB"),
    )
    assert len(offered(own_files([str(tmp_path)]), full, [PROCESS]).assignments) == 1
    [why] = offered(own_files([str(tmp_path)]), full, [DOCKER]).left_out
    assert "of storage" in why


def test_a_part_of_a_model_is_none(tmp_path: Path, chat: bytes) -> None:
    # What a projector is, its header says; the rest of it is of no interest.
    where = chat.index(b"general.architecture") + len(b"general.architecture")
    told, clip = chat[where:], b"\x08\0\0\0\x04\0\0\0\0\0\0\0clip"
    (tmp_path / "mmproj.gguf").write_bytes(chat[:where] + clip + told[17:] + b"\0")
    made = offered(own_files([str(tmp_path)]), machine(16), [PROCESS])
    assert (made.assignments, made.left_out) == ((), ())


# -- how they are run ------------------------------------------------------------------------------------------------


def test_an_owners_model_is_run_as_the_catalogs_are() -> None:
    path = NOTES.parent / "llama-cpp" / "catalog.toml"
    assert load(path) == LLAMA_CPP
    assert LLAMA_CPP.slots == SLOTS
