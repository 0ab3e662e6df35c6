"""A plugin's policies in a child: they answer as anywhere else, and whatever they do is their child's trouble only."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core import policy_process
from rma_core.confinement import available
from rma_core.host import Plugins
from rma_core.interfaces import PolicyInput, TierDecision
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.policy_file import read_policy
from rma_core.policy_process import Answer, PolicyProcess, Question
from rma_core.record import from_capabilities
from tests.coordinator_fixtures import soon, until
from tests.policy_plugins import BROKEN, install
from tests.pools import runs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rma_core.interfaces import TierPolicy

FILE = """
[[tiers]]
tier = 1
name = "large"
cpu_cores = 8
gpu_memory = "4GB"

[[tiers]]
tier = 9
name = "the rest"
ram = "2GB"

[[exceptions]]
tier = 9
labels = { site = "lab" }
prefers = ["ocr", "notes"]
"""
#: A plugin that gives a policy written as a file.
FROM_FILE = f"""
from rma_core import hookimpl
from rma_core.policy_file import read_policy

@hookimpl
def rma_tier_policies(config):
    return [read_policy({FILE!r}, name="file", subject="file.toml")]
"""
DEADLINE_S = 5.0
SIZES = st.integers(0, 4096).map(lambda gb: f"{gb}GB")
SHORT = st.builds(
    Capabilities,
    cpu_cores=st.integers(0, 256),
    ram=SIZES,
    storage=SIZES,
    gpu_memory=st.none() | SIZES,
    gpu_type=st.none() | st.text(max_size=20),
)
INPUTS = st.builds(
    PolicyInput,
    report=SHORT.map(from_capabilities),
    labels=st.dictionaries(st.sampled_from(("site", "does", "é")), st.sampled_from(("lab", "", "x" * 50)), max_size=2),
    worker_id=st.sampled_from(("", "worker-00000001")),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with one plugin."""
    install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def question(does: str = "", policy: str = "night", deadline_s: float = DEADLINE_S, **more: Any) -> bytes:
    report = HardwareReport(capabilities=Capabilities(cpu_cores=8, ram="16GB", storage="100GB"))
    asked = PolicyInput(**{"report": report, "labels": {"does": does}, **more})
    return msgspec.json.encode(Question(policy=policy, deadline_s=deadline_s, asked=asked)) + b"\n"


async def start(value: str = "rma_policy_night", **table: object) -> PolicyProcess:
    return await soon(PolicyProcess.start(value, table), within_s=30)


@pytest.mark.parametrize("kind", ["threshold", "file"])
def test_every_kind_of_policy_says_the_same_in_a_child(kind: str, folder: Path) -> None:
    (folder / "rma_policy_file.py").write_text(FROM_FILE)
    value = {"threshold": "rma_core.builtin.threshold", "file": "rma_policy_file"}[kind]
    found: dict[str, TierPolicy] = {
        "file": read_policy(FILE, name="file", subject="file.toml"),
        **Plugins.discover(kinds=["policy"], only=frozenset({"threshold"})).policies(),
    }
    with asyncio.Runner() as runner:
        process = runner.run(start(value))

        @given(asked=st.lists(INPUTS, min_size=1, max_size=5))
        def same(asked: list[PolicyInput]) -> None:
            lines = [
                msgspec.json.encode(Question(policy=kind, deadline_s=DEADLINE_S, asked=one)) + b"\n" for one in asked
            ]
            answers = runner.run(process.ask(lines, DEADLINE_S))
            assert [TierDecision(tier=one.tier, reason=one.reason, prefers=one.prefers) for one in answers] == [
                found[kind].decide(one) for one in asked
            ]

        same()
        assert not process.ended
        runner.run(process.close())


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("raise", "ValueError: no idea"),
        ("leave", "SystemExit: 3"),
        ("gold", "Expected `int | null`, got `str`"),
        ("nothing", "Expected `object`, got `null`"),
        ("high", "the tier is 100: give a whole number from 1 to 99, or None"),
    ],
)
async def test_one_that_raises_or_answers_nonsense_goes_on(folder: Path, does: str, words: str) -> None:
    process = await start()
    before, failed, after = await soon(process.ask([question(), question(does), question()], DEADLINE_S))
    assert words in failed.error
    assert before == after == Answer(tier=7, reason="tier 7: version 1.0")
    assert not process.ended
    await process.close()


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("hang", "did not answer within 0.5 s and was stopped; it was in decide (rma_policy_night.py:"),
        ("die", "ended with exit code 3 before it answered"),
        ("crash", "crashed in native code (SIGSEGV)"),
        ("answer", "gave an answer that does not fit"),
    ],
)
async def test_one_that_hangs_or_dies_says_on_which_machine(folder: Path, does: str, words: str) -> None:
    process = await start()
    asked = [question(deadline_s=0.5), question(does, deadline_s=0.5), question(deadline_s=0.5)]
    answers = await soon(process.ask(asked, 0.5))
    assert [one.tier for one in answers] == [7]
    assert words in process.ended
    assert await soon(process.ask(asked, 0.5)) == []


async def test_what_it_prints_reaches_nobody_and_what_is_too_long_is_cut(folder: Path) -> None:
    process = await start()
    printed, much = await soon(process.ask([question("print"), question("much")], DEADLINE_S))
    assert printed.tier == 7
    assert (len(much.reason), much.reason[-1]) == (1500, "…")
    await process.close()


@pytest.mark.skipif(sys.platform != "linux", reason="no limit of memory that counts here")
async def test_one_that_leaks_has_a_limit(folder: Path) -> None:
    process = await start()
    answers = await soon(process.ask([question(deadline_s=20), question("leak", deadline_s=20)], 20), within_s=40)
    assert len(answers) == 1
    assert process.ended == "took more memory than the 512 MiB that it may have, and was ended"


@pytest.mark.skipif(not (available().files and available().network), reason="nothing confines a child here")
async def test_it_reads_no_file_and_uses_no_network(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("owner") / "key"
    file.write_text("4711")
    process = await start()
    labels = {"does": "read", "file": str(file)}
    read, connected, started = await soon(
        process.ask([question(labels=labels), question("connect"), question("start")], DEADLINE_S)
    )
    assert all(one.error.startswith("PermissionError") for one in (read, connected, started)), (
        read,
        connected,
        started,
    )
    await process.close()
    process = await start(confined=False)
    [read] = await soon(process.ask([question(labels=labels)], DEADLINE_S))
    assert read.reason == "4711"
    await process.close()


async def test_it_sees_no_secret_and_takes_along_what_it_has_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RMA_SECRET_TOKEN", "4711")
    process = await start(confined=False)
    [said] = await soon(process.ask([question("environment")], DEADLINE_S))
    assert "PATH" in said.reason
    assert "RMA_SECRET_TOKEN" not in said.reason
    await soon(process.ask([question("start")], DEADLINE_S))
    [started] = [p for p in psutil.Process().children(recursive=True) if p.name() == "sleep"]
    await soon(process.close())
    await until(lambda: not runs(started))


async def test_one_that_dies_takes_along_what_it_has_started(folder: Path) -> None:
    process = await start(confined=False)
    await soon(process.ask([question("start")], DEADLINE_S))
    [started] = [p for p in psutil.Process().children(recursive=True) if p.name() == "sleep"]
    assert await soon(process.ask([question("die")], DEADLINE_S)) == []
    await until(lambda: not runs(started))


@pytest.mark.parametrize(
    ("code", "outcome", "words"),
    [
        (BROKEN, "failed", "module 'a_module_that_nobody_has' is not installed here"),
        ("def rma_tier_policies(config): return []\n", "invalid", "rma_tier_policies"),
        (
            "from rma_core import hookimpl\n@hookimpl\ndef rma_tier_policies(config): return 1 / 0\n",
            "raised",
            "ZeroDiv",
        ),
        (
            "from rma_core import hookimpl\n@hookimpl\ndef rma_tier_policies(config): return [5]\n",
            "invalid",
            "no TierP",
        ),
        ("import sys\nsys.exit(0)\n", "failed", "SystemExit"),
    ],
)
async def test_one_that_cannot_be_used_says_why(folder: Path, code: str, outcome: str, words: str) -> None:
    install(folder, code=code)
    process = await start()
    assert process.hello.outcome == outcome
    assert words in process.hello.reason
    assert process.ended


async def test_two_policies_of_one_name_are_refused(folder: Path) -> None:
    process = await start(names=["late", "late"])
    assert (process.hello.outcome, process.hello.given) == ("invalid", ())
    assert "two policies of one name" in process.hello.reason


async def test_one_that_hangs_when_it_is_imported_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_process, "STARTING_S", 1.0)
    install(folder, code="import time\ntime.sleep(3600)\n")
    process = await soon(PolicyProcess.start("rma_policy_night", {}, start_s=1.0))
    assert "did not answer within 1 s and was stopped; it was in <module> (rma_policy_night.py:2)" in process.ended


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    from tests.policy_plugins import children

    assert children() == []
