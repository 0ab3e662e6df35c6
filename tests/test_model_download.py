"""Files of models: downloaded from a real https server that fails in every way, found by hash, checked, bounded."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rma_core.addresses import is_public
from rma_core.agent.llm.download import MAX_REDIRECTS, Rules, download
from rma_core.agent.llm.model_files import ModelFiles
from rma_core.backoff import Backoff
from rma_core.errors import DownloadFailed, ModelMissing, OutOfSpace
from rma_core.interfaces import GivenFiles, PullProgress
from rma_core.models.weights import AssignedModel, ModelFile
from tests.agent_service import eventually
from tests.file_server import FileServer, file_server
from tests.needs import need

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20
CONTENT = bytes(range(256)) * (5 * 4096) + b"and the end"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("file-server")


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with file_server(folder) as made:
        made.files["/model.gguf"] = CONTENT
        yield made


def file_of(server: FileServer, path: str = "/model.gguf", **changes: object) -> ModelFile:
    plain = {"name": "model.gguf", "size_bytes": len(CONTENT), "sha256": DIGEST, "url": server.url(path)}
    return ModelFile(**{**plain, **changes})  # type: ignore[arg-type]


def rules(server: FileServer, *hosts: str) -> Rules:
    return Rules(hosts=hosts or (server.place,), context=server.context())


async def get(server: FileServer, part: Path, file: ModelFile | None = None, *, stall_s: float = 20.0) -> list[int]:
    """Download to ``part``, hardly waiting between tries; returns the bytes there were at each step."""
    steps: list[int] = []
    await download(
        file or file_of(server), part, rules=rules(server), told=steps.append, stall_s=stall_s,
        backoff=Backoff(base_s=0.01, cap_s=0.02),
    )  # fmt: skip
    return steps


async def test_a_file_comes_whole_and_tells_how_far_it_is(server: FileServer, tmp_path: Path) -> None:
    steps = await get(server, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, len(CONTENT))
    assert len(steps) > 4
    assert [one.range for one in server.asked] == [""]


async def test_a_cut_connection_is_taken_up_where_it_broke_off(server: FileServer, tmp_path: Path) -> None:
    server.cuts = [2 * MIB, 0, 300_000, 1]
    await get(server, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert server.sent_bytes == len(CONTENT), "nothing came twice"
    begins = [int(one.range.removeprefix("bytes=").rstrip("-") or 0) for one in server.asked]
    assert begins == [0, 2 * MIB, 2 * MIB, 2 * MIB + 300_000, 2 * MIB + 300_001]


async def test_what_an_earlier_run_left_is_gone_on_with(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(CONTENT[: 3 * MIB])
    steps = await get(server, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert (steps[0], server.sent_bytes) == (3 * MIB, len(CONTENT) - 3 * MIB)


async def test_a_download_that_was_cancelled_leaves_what_came(server: FileServer, tmp_path: Path) -> None:
    server.pause_s = 0.01
    running = asyncio.create_task(get(server, tmp_path / "part"))
    await eventually(lambda: (tmp_path / "part").exists() and (tmp_path / "part").stat().st_size)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    left = (tmp_path / "part").read_bytes()
    assert 0 < len(left) < len(CONTENT)
    assert CONTENT.startswith(left)


@pytest.mark.parametrize("left", [0, 2 * MIB])
async def test_a_server_that_knows_no_ranges_gives_all_of_it_again(
    server: FileServer, tmp_path: Path, left: int
) -> None:
    server.ranges, server.cuts = False, [2 * MIB]
    (tmp_path / "part").write_bytes(CONTENT[:left])
    await get(server, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT


async def test_what_is_longer_than_the_file_is_begun_anew(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(CONTENT + b"x")
    await get(server, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT


async def test_a_file_of_another_size_is_not_taken(server: FileServer, tmp_path: Path) -> None:
    wanted = file_of(server, size_bytes=len(CONTENT) - 1)
    with pytest.raises(ModelMissing, match=f"should have {len(CONTENT) - 1} bytes, and the server has {len(CONTENT)}"):
        await get(server, tmp_path / "part", wanted)
    server.lengths = False
    with pytest.raises(ModelMissing, match="more comes than the"):
        await get(server, tmp_path / "part", wanted)
    assert (tmp_path / "part").stat().st_size <= len(CONTENT) - 1


async def test_a_file_that_ends_too_soon_is_waited_for_and_given_up(server: FileServer, tmp_path: Path) -> None:
    server.lengths = False
    with pytest.raises(DownloadFailed, match="nothing came for"):
        await get(server, tmp_path / "part", file_of(server, size_bytes=len(CONTENT) + 9), stall_s=0.3)


async def test_a_busy_server_is_asked_again(server: FileServer, tmp_path: Path) -> None:
    server.statuses = [503, 429, 500]
    await get(server, tmp_path / "part")
    assert len(server.asked) == 4
    assert (tmp_path / "part").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [401, 403, 404, 410])
async def test_a_server_that_will_never_give_it_is_not_asked_again(
    server: FileServer, tmp_path: Path, status: int
) -> None:
    server.statuses = [status]
    with pytest.raises(ModelMissing, match=f"localhost answers {status}"):
        await get(server, tmp_path / "part")
    assert len(server.asked) == 1


async def test_redirects_are_followed_a_few_times_and_no_more(server: FileServer, tmp_path: Path) -> None:
    server.redirects = {f"/{n}": f"/{n + 1}" for n in range(MAX_REDIRECTS - 1)}
    server.redirects[f"/{MAX_REDIRECTS - 1}"] = server.url("/model.gguf")
    await get(server, tmp_path / "part", file_of(server, "/0"))
    assert (tmp_path / "part").read_bytes() == CONTENT
    server.redirects["/model.gguf"] = "/0"
    with pytest.raises(ModelMissing, match="sends on and on"):
        await get(server, tmp_path / "other", file_of(server, "/0"))


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("http://localhost/model.gguf", "over https only"), ("file:///etc/passwd", "over https only"),
        ("https://me:secret@localhost/x", "over https only"), ("//other.example/x", "downloads from"),
        ("https://127.0.0.1:1/x", "downloads from"), ("https://[::1", "over https only"),
    ],
)  # fmt: skip
async def test_a_redirect_leads_nowhere_that_its_owner_has_not_named(
    server: FileServer, tmp_path: Path, where: str, why: str
) -> None:
    server.redirects["/away"] = where
    with pytest.raises(ModelMissing, match=why):
        await get(server, tmp_path / "part", file_of(server, "/away"))


async def test_an_address_of_this_network_is_connected_to_only_if_its_owner_names_it(
    server: FileServer, tmp_path: Path
) -> None:
    unnamed = Rules(context=server.context())
    with pytest.raises(ModelMissing, match="is in a private network") as refused:
        await download(file_of(server), tmp_path / "part", rules=unnamed)
    assert "model_hosts" in refused.value.hints[0]
    assert server.asked == []
    await download(file_of(server), tmp_path / "part", rules=rules(server, "localhost"))
    assert (tmp_path / "part").read_bytes() == CONTENT


async def test_a_server_with_another_certificate_gets_no_request(server: FileServer, tmp_path: Path) -> None:
    strict = Rules(hosts=(server.place,))
    with pytest.raises(DownloadFailed, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
        await download(
            file_of(server), tmp_path / "part", rules=strict, stall_s=0.1, backoff=Backoff(base_s=0.01, cap_s=0.02)
        )
    assert server.asked == []


async def test_a_disk_that_gets_short_ends_it(server: FileServer, tmp_path: Path) -> None:
    large = bytes(70 * MIB)
    server.files["/large"] = large
    short = Rules(hosts=(server.place,), context=server.context(), short=lambda: "9 bytes are left")
    with pytest.raises(OutOfSpace, match="9 bytes are left"):
        await download(file_of(server, "/large", size_bytes=len(large)), tmp_path / "part", rules=short)


PUBLIC = ["8.8.8.8", "140.82.112.3", "2606:4700:4700::1111", "2a00:1450:4001:810::200e", "64:ff9b::8.8.8.8"]
OURS = [
    "127.0.0.1", "10.0.0.1", "172.16.0.9", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1",
    "2001::1", "3fff::1", "5f00::1", "not an address", "",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_an_address_out_there_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", OURS)
def test_no_address_of_this_machine_its_networks_or_a_tunnel_is_public(address: str) -> None:
    assert not is_public(address)


# -- what the agent makes of it --------------------------------------------------------------------------------------


def model_of(*files: ModelFile) -> AssignedModel:
    return AssignedModel(name="a-model", files=files)


def content(given: GivenFiles) -> bytes:
    return b"".join(Path(one.path).read_bytes() for one in given.files)


def files_in(folder: Path, server: FileServer, **more: object) -> ModelFiles:
    options = {"hosts": (server.place,), "context": server.context(), "stall_s": 2.0, **more}
    return ModelFiles(folder / "models", **options)  # type: ignore[arg-type]


async def test_a_model_is_downloaded_once_and_found_by_the_next_run(server: FileServer, tmp_path: Path) -> None:
    told: list[PullProgress] = []
    found = await files_in(tmp_path, server).get(model_of(file_of(server)), told.append)
    assert content(found) == CONTENT
    assert found.variable == "MODEL_FILE"
    assert {one.note for one in told} == {"downloading model.gguf", "checking model.gguf"}
    assert (told[0].done_bytes, told[-1].done_bytes, told[-1].total_bytes) == (0, len(CONTENT), len(CONTENT))
    again = await files_in(tmp_path, server).get(model_of(file_of(server)), told.append)
    assert (again, len(server.asked)) == (found, 1)


async def test_another_file_than_the_one_that_was_asked_for_is_not_kept(server: FileServer, tmp_path: Path) -> None:
    files = files_in(tmp_path, server)
    with pytest.raises(ModelMissing, match=f"its SHA-256 is {DIGEST}"):
        await files.get(model_of(file_of(server, sha256="0" * 64)), lambda _: None)
    assert list((tmp_path / "models").iterdir()) == []


async def test_several_files_share_one_progress(server: FileServer, tmp_path: Path) -> None:
    server.files["/small"] = b"{}"
    small = ModelFile(
        name="config.json", size_bytes=2, sha256=hashlib.sha256(b"{}").hexdigest(), url=server.url("/small")
    )
    told: list[PullProgress] = []
    found = await files_in(tmp_path, server).get(model_of(file_of(server), small), told.append)
    assert [Path(one.path).name for one in found.files] == ["model.gguf", "config.json"]
    assert {one.total_bytes for one in told} == {len(CONTENT) + 2}
    assert [one.done_bytes for one in told] == sorted(one.done_bytes for one in told)


async def test_a_file_that_the_owner_has_anyway_is_found_by_its_hash(server: FileServer, tmp_path: Path) -> None:
    own = tmp_path / "mine.gguf"
    own.write_bytes(CONTENT)
    (tmp_path / "of-its-size").write_bytes(bytes(len(CONTENT)))
    paths = {"other": tmp_path / "of-its-size", "mine": own, "gone": tmp_path / "gone"}
    told: list[PullProgress] = []
    found = await files_in(tmp_path, server, own=paths).get(model_of(file_of(server)), told.append)
    assert found.files[0].path == str(own)
    assert server.asked == []
    assert [one.note for one in told] == [f"looking whether {name} is model.gguf" for name in ("of-its-size", own.name)]


async def test_a_file_that_nobody_says_where_to_get_is_missing(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match="names no place to get it from"):
        await files_in(tmp_path, server).get(model_of(file_of(server, url="")), lambda _: None)


@pytest.mark.parametrize("copied", [False, True])
async def test_the_disk_is_looked_at_before_anything_is_downloaded(
    server: FileServer, tmp_path: Path, copied: bool
) -> None:
    free = (len(CONTENT) * (2 if copied else 1)) * 10 // 9
    tight = files_in(tmp_path, server, free=lambda _: free - 20)
    with pytest.raises(OutOfSpace, match="stay with the owner") as refused:
        await tight.get(model_of(file_of(server)), lambda _: None, copied=copied)
    assert ("a copy for its container included" in refused.value.message) is copied
    assert server.asked == []
    enough = files_in(tmp_path, server, free=lambda _: free + 20)
    await enough.get(model_of(file_of(server)), lambda _: None, copied=copied)
    assert len(server.asked) == 1


async def test_models_that_nobody_wants_give_way_and_those_that_are_wanted_stay(
    server: FileServer, tmp_path: Path
) -> None:
    old, new = b"o" * MIB, b"n" * MIB
    server.files |= {"/old": old, "/new": new}

    def made(path: str, data: bytes) -> AssignedModel:
        digest = hashlib.sha256(data).hexdigest()
        return model_of(ModelFile(name=path[1:], size_bytes=len(data), sha256=digest, url=server.url(path)))

    def free(folder: Path) -> int:
        used = sum(one.stat().st_size for one in (tmp_path / "models").rglob("*") if one.is_file())
        return 3 * MIB - used

    files = files_in(tmp_path, server, free=free)
    files.want([made("/old", old)])
    await files.get(made("/old", old), lambda _: None)
    assert list((tmp_path / "models").glob("*/old"))
    third = made("/new", new)
    files.want([made("/old", old), third])
    await files.get(third, lambda _: None)
    # Now there is no room left for a third one while both are wanted.
    server.files["/more"] = b"m" * MIB
    with pytest.raises(OutOfSpace):
        await files.get(made("/more", b"m" * MIB), lambda _: None)
    files.want([third])
    await files.get(made("/more", b"m" * MIB), lambda _: None)
    assert not list((tmp_path / "models").glob("*/old"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    need("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


async def test_a_disk_that_is_really_full_leaves_no_half_of_a_model(server: FileServer, small_disk: Path) -> None:
    # The look at the disk is deceived; only the system itself says how full it is.
    files = files_in(small_disk, server, free=lambda _: 10**12)
    with pytest.raises(OutOfSpace, match=r"the disk that holds .* is full"):
        await files.get(model_of(file_of(server)), lambda _: None)
    assert not list((small_disk / "models").iterdir())


async def test_one_download_at_a_time_and_who_waits_is_told(server: FileServer, tmp_path: Path) -> None:
    other = b"x" * MIB
    server.files["/other"] = other
    server.pause_s = 0.005
    second = ModelFile(name="other", size_bytes=MIB, sha256=hashlib.sha256(other).hexdigest(), url=server.url("/other"))
    files, told = files_in(tmp_path, server), list[PullProgress]()
    first = asyncio.create_task(files.get(model_of(file_of(server)), lambda _: None))
    await eventually(lambda: server.asked)
    await files.get(model_of(second), told.append)
    assert first.done()
    await first
    assert told[0].note == "waits for another download"
    assert [one.path for one in server.asked] == ["/model.gguf", "/other"]


async def test_an_owners_file_that_changed_or_went_is_said(server: FileServer, tmp_path: Path) -> None:
    own = tmp_path / "mine.gguf"
    own.write_bytes(b"GGUF")
    files = files_in(tmp_path, server, own={"a-model": own})
    wanted = model_of(ModelFile(name="mine.gguf", size_bytes=4))
    before = files.key(wanted)
    assert (await files.get(wanted, lambda _: None)).files[0].path == str(own)
    own.write_bytes(b"GGUF, longer")
    assert files.key(wanted) != before
    with pytest.raises(ModelMissing, match="is not there any more, or has changed"):
        await files.get(wanted, lambda _: None)
