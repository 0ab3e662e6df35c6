"""The agent's state folder, consent, backoff and flow control."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from rma_core.agent.consent import Consent, repository
from rma_core.agent.flow import Pipe, Window
from rma_core.agent.keys import DeviceKey
from rma_core.agent.state import StateFolder, WorkerRecord
from rma_core.backoff import Backoff
from rma_core.errors import SettingProblem
from rma_core.models.worker import Assignment

if TYPE_CHECKING:
    from pathlib import Path

RECORD = WorkerRecord(worker_id="worker-0123abcd", coordinator_url="https://pool.example")


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    made = StateFolder(tmp_path / "home")
    made.prepare()
    return made


def notes(image: str = "ghcr.io/rma/notes-worker:latest", service: str = "notes") -> Assignment:
    return Assignment(name=f"rma-{service}", service=service, image=image, port=8000)


def test_the_folder_is_for_its_owner_only_even_if_it_was_open_before(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    StateFolder(tmp_path / "home").prepare()
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700


def test_key_and_record_survive_and_are_readable_by_their_owner_only(folder: StateFolder) -> None:
    key = DeviceKey.generate()
    folder.save_key(key)
    folder.save_record(RECORD)
    again = folder.load_key()
    assert again is not None
    assert again.thumbprint == key.thumbprint
    assert folder.load_record() == RECORD
    assert {p.name: p.stat().st_mode & 0o777 for p in folder.path.iterdir()} == {
        "device.key": 0o600,
        "worker.json": 0o600,
    }


def test_a_key_that_others_could_read_is_refused_with_what_to_do(folder: StateFolder) -> None:
    folder.save_key(DeviceKey.generate())
    (folder.path / "device.key").chmod(0o644)
    with pytest.raises(SettingProblem, match="may have been copied") as found:
        folder.load_key()
    assert any("chmod 600" in hint for hint in found.value.hints)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    folder: StateFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.save_record(RECORD)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SettingProblem, match="No space left"):
        folder.save_record(WorkerRecord(worker_id="worker-00000000", coordinator_url="https://other.example"))
    assert folder.load_record() == RECORD
    assert [p.name for p in folder.path.iterdir()] == ["worker.json"]


def test_a_second_agent_on_one_folder_is_refused_and_told_who_has_it(folder: StateFolder) -> None:
    folder.lock()
    code = "import sys, pathlib; from rma_core.agent.state import StateFolder as S; S(pathlib.Path(sys.argv[1])).lock()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder.path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert f"another agent (process {os.getpid()})" in done.stderr
    folder.unlock()
    other = StateFolder(folder.path)
    other.lock()
    other.unlock()


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"worker_id": "me", "coordinator_url": "x"}'])
def test_a_broken_record_is_a_sentence_that_says_what_to_do(folder: StateFolder, content: str) -> None:
    (folder.path / "worker.json").write_text(content)
    with pytest.raises(SettingProblem) as found:
        folder.load_record()
    assert "join again" in found.value.hints[0]


def test_what_the_key_signs_holds_for_the_coordinators_library(folder: StateFolder) -> None:
    key = DeviceKey.generate()
    public = load_pem_private_key(key.to_pem(), None).public_key()
    proof = key.proof(issuer="rma-x", nonce="n1", join_token="rmaj_secret")
    assert jwt.get_unverified_header(proof)["typ"] == "rma-proof+jwt"
    claims = jwt.decode(proof, public, ["EdDSA"], audience="rma-x", issuer=key.thumbprint)  # type: ignore[arg-type]
    assert claims["tkn"] == hashlib.sha256(b"rmaj_secret").hexdigest()
    assert (claims["sub"], claims["nonce"], claims["exp"] - claims["iat"]) == (key.thumbprint, "n1", 60)
    assertion = key.assertion(issuer="rma-x", nonce="n2", worker_id="worker-0123abcd")
    claims = jwt.decode(assertion, public, ["EdDSA"], audience="rma-x", issuer="worker-0123abcd")  # type: ignore[arg-type]
    assert jwt.get_unverified_header(assertion)["typ"] == "rma-assertion+jwt"


def test_consent_covers_what_was_shown_and_new_versions_of_it() -> None:
    consent = Consent.to([notes()])
    assert consent.refusal(notes("ghcr.io/rma/notes-worker:v2")) == ""
    assert "has not agreed to run ner" in consent.refusal(notes(service="ner"))
    assert "not from evil.example/notes-worker" in consent.refusal(notes("evil.example/notes-worker:latest"))
    assert consent.names == ("notes",)


def test_the_owners_setting_is_stronger_than_what_was_agreed_to() -> None:
    narrowed = Consent.to([notes()]).narrowed(["ner"])
    assert narrowed.refusal(notes()) != ""
    assert narrowed.refusal(notes("any.example/ner", service="ner")) == ""
    assert Consent(everything=True).narrowed([]).refusal(notes("any.example/x")) == ""


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("a:1", "a"),
        ("host:5000/a/b", "host:5000/a/b"),
        ("host:5000/a/b:v1", "host:5000/a/b"),
        ("host/a@sha256:00", "host/a"),
        ("host:5000/a:v@sha256:00", "host:5000/a"),
    ],
)
def test_the_repository_of_an_image_has_no_tag(image: str, name: str) -> None:
    assert repository(image) == name


def test_waits_grow_to_the_cap_and_what_the_other_side_asks_for_wins() -> None:
    backoff = Backoff(base_s=2, cap_s=300, uniform=lambda _, high: high)
    assert [backoff.next_s() for _ in range(10)] == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert backoff.next_s(7) == pytest.approx(7.7)
    backoff.reset()
    assert Backoff(uniform=lambda low, _: low).next_s() == 1.0
    for _ in range(2000):
        assert backoff.next_s() <= 300


async def test_a_pipe_holds_its_writer_back_and_gives_every_byte_in_order() -> None:
    pipe = Pipe(10)
    await pipe.put(b"0123456789ab")
    writer = asyncio.create_task(pipe.put(b"cd"))
    await asyncio.sleep(0)
    assert not writer.done()
    assert await pipe.take(4) == b"0123"
    await writer
    pipe.end()
    assert await pipe.take(100) == b"456789abcd"
    assert await pipe.take(100) == b""


async def test_a_broken_pipe_wakes_both_sides_with_the_reason() -> None:
    pipe = Pipe(1)
    await pipe.put(b"x")
    writer = asyncio.create_task(pipe.put(b"y"))
    await asyncio.sleep(0)
    pipe.fail(OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        await writer
    with pytest.raises(OSError, match="gone"):
        await pipe.take(1)


async def test_a_window_allows_what_was_given_back_and_never_more_than_its_size() -> None:
    window = Window(10)
    assert await window.take(8) == 8
    assert await window.take(8) == 2
    waiter = asyncio.create_task(window.take(5))
    await asyncio.sleep(0)
    assert not waiter.done()
    window.give(3)
    assert await waiter == 3
    window.give(1000)
    assert await window.take(1000) == 10
