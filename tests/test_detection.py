"""Detection with real children and real bad detectors, found through the metadata of a distribution."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from rma_core import detection as module
from rma_core.detection import Observation, assemble, detect, observe
from rma_core.errors import PluginError
from rma_core.host import Plugins
from rma_core.models.hardware import Detection, Device, DeviceKind, HardwareReport
from rma_core.models.strict import decode, encode
from rma_core.platforms import neutral_folder
from rma_core.privacy import Identity, hide_identity
from rma_core.quarantine import Quarantine
from tests.plugin_files import distribute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DATA = Path(__file__).with_name("data")
#: Long enough for a child to start on a busy machine, short enough to wait for one that hangs.
DEADLINE_S = 3.0


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plugins]:
    """Install bad detectors by name as one distribution, and discover those alone."""

    def installed(*names: str, strict: bool = False, trace: bool = False) -> Plugins:
        points = {name: f"bad_detectors.{name}" for name in names}
        distribute(tmp_path, "bad-detectors", {"rma.detectors": points}, version="2.5")
        monkeypatch.syspath_prepend(str(DATA))
        monkeypatch.syspath_prepend(str(tmp_path))
        return Plugins.discover(kinds=["detector"], only=frozenset(names), strict=strict, trace=trace)

    return installed


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fail a test that leaves a process, a zombie or a thread behind."""
    threads = {thread for thread in threading.enumerate() if thread.is_alive()}
    children = set(psutil.Process().children(recursive=True))
    yield
    until = time.monotonic() + 10

    def left() -> list[object]:
        new_threads = [t for t in threading.enumerate() if t not in threads and t.is_alive()]
        return [*new_threads, *(set(psutil.Process().children(recursive=True)) - children)]

    while left() and time.monotonic() < until:
        time.sleep(0.02)
    assert not left()


def state_of(plugins: Plugins, name: str) -> tuple[str, str]:
    return next((r.state, r.reason) for r in plugins.reports() if r.name == name)


def probe_of(report: HardwareReport, name: str) -> tuple[str, str]:
    return next((p.state, p.reason) for p in report.probes if p.detector == name)


async def wait_for(condition: Callable[[], bool], *, seconds: float = 30) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:  # noqa: ASYNC110 - what other processes do sets no event
        await asyncio.sleep(0.02)
    return condition()


def is_gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def pid_in(path: Path) -> int:
    return int(path.read_text(encoding="utf-8"))


BROKEN = {
    "raises": "raised ZeroDivisionError: no such luck (a bug in the plugin)",
    "declines": "the driver is too old: install 535 or newer",
    "unshowable": "raised an exception that cannot be shown (a bug in the plugin)",
    "exits_zero": "ended with exit code 0 before it answered",
    "exits_three": "ended with exit code 3 before it answered; it printed: licence expired",
    "exits_politely": "raised SystemExit: enough",
    "segfaults": "crashed in native code (SIGSEGV) before it answered",
    "killed": "was killed by SIGKILL before it answered, most likely because memory ran out",
    "returns_nothing": "return Detection.undetected(reason) when there is nothing",
    "returns_a_list": "returned a list: return Detection.healthy(devices)",
    "returns_a_million": "returned 1,000,000 devices, and at most 1,024 are taken",
    "returns_wrong_types": "$.detection.devices[0].id: Expected `str`, got `int`",
    "returns_objects": "its answer cannot be used: TypeError: Encoding objects of type object is unsupported",
    "returns_too_much": "gave an answer of more than 512 KiB",
    "contradicts_itself": "says that nothing is there and names 1 devices",
    "gives_no_reason": "the detector gives no reason",
    "closes_its_pipe": "closed the pipe for its answer and went on",
    "forges": "its answer does not fit: $.outcome",
    "dies_leaving_a_fork": "ended with exit code 3 before it answered",
    "lacks_a_module": "module 'nothing_of_that_name' is not installed here",
    "breaks_on_import": "cannot be imported: SystemExit: no licence",
    "is_async": "rma_detect_devices is `async def`; hooks are plain functions",
    "wants_more": "asks for 'context', which this rma-core does not give",
    "misspelt": "did you mean rma_detect_devices?",
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_detector_costs_its_own_devices_only_and_says_why(
    install: Callable[..., Plugins], tmp_path: Path, name: str
) -> None:
    plugins = install(name, "works")
    # One of them writes down which process it leaves behind, which it may not otherwise.
    config = {name: {"pid_file": str(tmp_path / "pid"), "confined": name != "dies_leaving_a_fork"}}
    report = await detect(plugins, config=config, deadline_s=30)
    state, reason = probe_of(report, name)
    assert (state, [d.id for d in report.devices]) == ("unhealthy", ["cpu"])
    assert BROKEN[name] in reason
    assert probe_of(report, "works") == ("healthy", "")
    assert report.capabilities.cpu_cores == 4


@pytest.mark.parametrize("name", ["lacks_a_module", "breaks_on_import"])
async def test_a_detector_that_cannot_be_imported_is_failed(install: Callable[..., Plugins], name: str) -> None:
    plugins = install(name)
    await detect(plugins)
    assert state_of(plugins, name)[0] == "failed"
    assert [d.name for d in plugins.detectors()] == [name], "it may have been mended by the next round"


@pytest.mark.parametrize("name", ["is_async", "wants_more", "misspelt"])
async def test_a_detector_that_does_not_fit_its_hook_is_invalid(install: Callable[..., Plugins], name: str) -> None:
    plugins = install(name)
    await detect(plugins)
    assert state_of(plugins, name)[0] == "invalid"


async def test_a_detector_with_a_bug_stays_active_and_knows_its_import_time(install: Callable[..., Plugins]) -> None:
    plugins = install("raises")
    report = await detect(plugins)
    plugin = next(p for p in plugins.reports() if p.name == "raises")
    assert (plugin.state, plugin.distribution, plugin.version) == ("active", "bad-detectors", "2.5")
    assert plugin.import_seconds is not None
    assert (report.probes[0].distribution, report.probes[0].version) == ("bad-detectors", "2.5")


async def test_strict_mode_raises_what_would_disable_a_detector(install: Callable[..., Plugins]) -> None:
    with pytest.raises(PluginError, match=r"bad-detectors: .*nothing_of_that_name"):
        await detect(install("lacks_a_module", strict=True))


@pytest.mark.parametrize(
    ("name", "where"), [("hangs", "hangs.py"), ("hangs_in_native_code", "hangs_in_native_code.py")]
)
async def test_a_hung_detector_is_stopped_at_its_deadline_and_says_where_it_was(
    install: Callable[..., Plugins], name: str, where: str
) -> None:
    plugins = install(name, "works")
    report = await detect(plugins, config={name: {"deadline_s": DEADLINE_S}}, deadline_s=30)
    state, reason = probe_of(report, name)
    assert state == "unhealthy"
    assert reason.startswith(f"did not answer within 3 s and was stopped; it was in rma_detect_devices ({where}:")
    assert probe_of(report, "works")[0] == "healthy"


async def test_what_a_hung_detector_printed_is_quoted(install: Callable[..., Plugins]) -> None:
    report = await detect(install("hangs"), deadline_s=DEADLINE_S)
    assert report.probes[0].reason.endswith("it printed: waiting for the driver")


async def test_megabytes_of_output_block_nothing_and_only_the_end_is_logged(
    install: Callable[..., Plugins], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "rma_core.detection"):
        report = await detect(install("prints_megabytes"), deadline_s=60)
    assert [d.id for d in report.devices] == ["loud"]
    assert sum(len(record.getMessage()) for record in caplog.records) < 5000


async def test_a_fork_left_behind_is_killed_with_its_detector(install: Callable[..., Plugins], tmp_path: Path) -> None:
    for name in ("leaves_a_fork", "dies_leaving_a_fork"):
        (tmp_path / name).mkdir()
    plugins = install("leaves_a_fork", "dies_leaving_a_fork")
    config: dict[str, dict[str, object]] = {
        name: {"pid_file": str(tmp_path / name / "pid"), "confined": False}
        for name in ("leaves_a_fork", "dies_leaving_a_fork")
    }
    report = await detect(plugins, config=config, deadline_s=60)
    assert probe_of(report, "leaves_a_fork") == ("undetected", "left a process behind")
    for name in config:
        pid = pid_in(tmp_path / name / "pid")
        assert await wait_for(lambda pid=pid: is_gone(pid))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("leaves_a_thread", "left a thread"),
        ("answers_twice", "said by two"),
        ("reads_stdin", "read ''"),
    ],
)
async def test_a_detector_with_odd_habits_is_understood(
    install: Callable[..., Plugins], name: str, answer: str
) -> None:
    report = await detect(install(name), deadline_s=60)
    assert probe_of(report, name) == ("undetected", answer)


async def test_a_child_sees_no_secret_and_none_of_our_folders(
    install: Callable[..., Plugins], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RMA_JOIN_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, "secret")
    report = await detect(install("tells_all"))
    seen = report.devices[0].attributes
    assert seen["cwd"] == neutral_folder()
    assert isinstance(seen["environment"], list)
    assert not {"RMA_JOIN_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "PYTHONSTARTUP"} & set(seen["environment"])
    assert "PATH" in seen["environment"]


@pytest.mark.parametrize("flag", ["", "-P"])
def test_a_folder_that_was_named_is_looked_in_also_where_it_is_the_one_we_were_started_in(
    tmp_path: Path, flag: str
) -> None:
    where = "from rma_core.detection import _path; import os; print(os.getcwd() in _path())"
    (tmp_path / "asks.py").write_text(where)
    flags = [flag] if flag else []
    for environment, found in (({}, False), ({"PYTHONPATH": str(tmp_path)}, True)):
        done = subprocess.run(
            [sys.executable, *flags, "-m", "asks"] if environment or not flag else [sys.executable, "-P", "asks.py"],
            cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == str(found)


async def test_a_detector_is_given_its_own_table_and_no_other(install: Callable[..., Plugins]) -> None:
    report = await detect(install("configured"), config={"configured": {"a": 1}, "other": {"token": "x"}})
    assert report.probes[0].reason == "configured with [('a', 1)]"


@pytest.mark.parametrize("value", [0, -1, "ten", True, 100_000])
async def test_a_deadline_that_is_no_number_of_seconds_is_named(install: Callable[..., Plugins], value: object) -> None:
    report = await detect(install("works"), config={"works": {"deadline_s": value}})
    assert probe_of(report, "works") == (
        "unhealthy",
        f"deadline_s in [plugins.works] is {value!r}: give seconds, up to 300",
    )


async def test_one_id_twice_from_one_detector_keeps_the_first(install: Callable[..., Plugins]) -> None:
    report = await detect(install("names_one_twice"))
    state, reason = probe_of(report, "names_one_twice")
    assert [d.name for d in report.devices] == ["first"]
    assert (state, "gives the device id 'gpu:0' more than once" in reason) == ("unhealthy", True)


async def test_one_id_from_two_detectors_keeps_the_first_by_name(install: Callable[..., Plugins]) -> None:
    report = await detect(install("works", "finds_the_same"))
    assert [d.name for d in report.devices] == ["another CPU", "another CPU"]
    assert probe_of(report, "works") == ("healthy", "device 'cpu' was already found by finds_the_same, which is kept")
    assert report.probes[1].devices == ()


async def test_detectors_run_at_once_but_no_more_than_allowed(install: Callable[..., Plugins]) -> None:
    names = ("hangs", "hangs_in_native_code", "works")
    started = time.monotonic()
    await detect(install(*names), deadline_s=DEADLINE_S)
    both = time.monotonic() - started
    assert both < 2 * DEADLINE_S, "two that hang were waited for one after the other"


async def test_cancelling_detection_kills_its_children(install: Callable[..., Plugins]) -> None:
    # Engines of other tests may be children of this process too.
    before = set(psutil.Process().children())
    task = asyncio.create_task(detect(install("hangs", "hangs_in_native_code"), deadline_s=300))
    assert await wait_for(lambda: len(set(psutil.Process().children()) - before) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not set(psutil.Process().children()) - before


async def test_a_child_that_cannot_be_started_is_a_reason_not_a_traceback(
    install: Callable[..., Plugins], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    report = await detect(install("works"))
    assert probe_of(report, "works")[1].startswith("no child process can be started for it: ")


async def test_tracing_logs_each_call_with_its_result_and_hides_secrets(
    install: Callable[..., Plugins], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "rma_core.host"):
        await detect(install("works", trace=True), config={"works": {"api_token": "abc", "size": 3}})
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("works.rma_detect_devices(config={'api_token': '…', 'size': 3}) -> healthy, 1 devices in ")


def observed(name: str, devices: list[Device], *, reason: str = "") -> Observation:
    return Observation(detector=name, detection=Detection.healthy(devices, reason=reason))


def test_a_report_never_outgrows_its_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    big = [Device(id=f"d{n}", kind="npu", name="x" * 150, reason="y" * 500) for n in range(900)]
    small = [Device(id="cpu", kind="cpu", name="CPU")]
    report = assemble([observed("small", small), observed("big", big)])
    assert len(encode(report.devices)) < module.MAX_REPORT_BYTES + 2000
    assert report.devices[0].id == "cpu"
    assert "left out: the report is full" in report.probes[1].reason


def test_a_detector_that_lies_about_sizes_leaves_the_report_valid() -> None:
    kinds: tuple[DeviceKind, ...] = ("cpu", "memory", "storage", "gpu")
    lies = [
        Device(id=f"{kind}{n}", kind=kind, name="x", memory_bytes=2**60, attributes={"cores": 2**50})
        for kind in kinds
        for n in range(200)
    ]
    report = assemble([observed("liar", lies)])
    assert decode(encode(report), HardwareReport, subject="report") == report


def test_home_user_and_host_are_hidden_in_sentences_and_where_they_stand_alone() -> None:
    seen = observed(
        "x",
        [
            Device(
                id="tux-box",
                kind="npu",
                name="tux-box",
                attributes={"path": "/home/alice/models", "brand": "tux-boxer"},
            )
        ],
        reason="alice cannot read /home/alice/.cache on tux-box, malice aside",
    )
    hidden = hide_identity(seen, Identity("/home/alice", "alice", "tux-box"))
    (device,) = hidden.detection.devices
    assert hidden.detection.reason == "<user> cannot read ~/.cache on <host>, malice aside"
    assert (device.id, device.name) == ("tux-box", "<host>")
    assert device.attributes == {"path": "~/models", "brand": "tux-boxer"}


def test_hiding_names_never_makes_a_text_too_long_for_its_field() -> None:
    seen = observed("x", [Device(id="a", kind="npu", name="x", reason="bob " * 500)], reason="bob " * 500)
    hidden = hide_identity(seen, Identity("", "bob", ""))
    assert len(hidden.detection.reason) == 2000
    assert "bob" not in hidden.detection.reason


@pytest.mark.skipif(sys.platform == "win32", reason="a kernel timer ends the child, which Windows does not have")
def test_a_child_whose_parent_has_died_ends_by_itself(install: Callable[..., Plugins]) -> None:
    (detector,) = install("hangs_in_native_code").detectors()
    request = module.request_for(detector.value, {}, 0.5)
    program = [sys.executable, "-I", module.CHILD]
    ran = subprocess.run(program, input=request, capture_output=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (-14, b""), "SIGALRM"


async def test_a_detector_that_keeps_hanging_is_left_alone_for_a_while(install: Callable[..., Plugins]) -> None:
    now = [0.0]
    plugins, quarantine = install("exits_three"), Quarantine(clock=lambda: now[0], rounds=2)
    for _ in range(2):
        await detect(plugins, quarantine=quarantine)
        assert state_of(plugins, "exits_three")[0] == "active"
    (seen,) = await observe(plugins, quarantine=quarantine)
    assert seen.seconds == 0.0
    assert seen.detection.reason.startswith("left alone: it failed 2 times in a row and is tried again in 60 s; ")
    assert state_of(plugins, "exits_three")[0] == "quarantined"
    now[0] = 61.0
    (seen,) = await observe(plugins, quarantine=quarantine)
    assert seen.crashed
    assert quarantine.reason("exits_three").startswith("failed 3 times in a row and is tried again in 300 s")


def test_quarantine_grows_to_an_hour_and_ends_with_an_answer() -> None:
    now = [0.0]
    quarantine = Quarantine(clock=lambda: now[0])
    waits = []
    for _ in range(9):
        quarantine.failed("gpu", "hung")
        waits.append(
            0.0 if not quarantine.reason("gpu") else float(quarantine.reason("gpu").split(" in ")[2].split()[0])
        )
    assert waits == [0, 0, 60, 300, 1800, 3600, 3600, 3600, 3600]
    assert not quarantine.reason("other")
    quarantine.passed("gpu")
    assert not quarantine.reason("gpu")
