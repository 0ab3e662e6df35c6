"""Detection over time: what changes is told, what got worse is looked at twice, and trouble is looked at sooner."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.agent.detecting import Detecting
from rma_core.agent.lookout import CONFIRM_S, TROUBLE_S, Lookout
from rma_core.changes import changes, has_trouble, worse
from rma_core.detection import Observation, assemble, without
from rma_core.errors import SettingProblem
from rma_core.models.hardware import Capabilities, Detection, Device, HardwareReport, ProbeReport, summarize
from rma_core.settings import AgentSettings
from tests.coordinator_fixtures import until as soon_true
from tests.pools import NO_ENGINE, notes_alone, pool, until

if TYPE_CHECKING:
    from collections.abc import Sequence

State = Literal["healthy", "undetected", "unhealthy"]
MACHINES = Path(__file__).with_name("data") / "machines"
PATIENCE_S = 60.0


def gpu(name: str = "0", **more: Any) -> Device:
    return Device(id=f"gpu:{name}", kind="gpu", name="Radeon", memory_bytes=16 * 2**30, **more)


def report(*devices: Device, state: State = "healthy", reason: str = "") -> HardwareReport:
    ids = tuple(device.id for device in devices)
    probe = ProbeReport(detector="cards", distribution="", version="1", state=state, reason=reason, devices=ids)
    return HardwareReport(capabilities=summarize(devices), devices=devices, probes=(probe,))


class Watched(Lookout):
    """One whose machine is what a test says, and whose waits take no time."""

    def __init__(self, *seen: HardwareReport | Exception, interval_s: float = 900.0) -> None:
        first, *self._coming = seen
        assert isinstance(first, HardwareReport)
        self.told: list[HardwareReport] = []
        self.waits: list[float | None] = []
        self.over = asyncio.Event()
        super().__init__(first, self._next, self.told.append, interval_s=interval_s, uniform=lambda _, most: most)

    async def _next(self) -> HardwareReport:
        coming = self._coming.pop(0)
        if isinstance(coming, Exception):
            raise coming
        return coming

    async def _wait(self, delay_s: float | None) -> None:
        self.waits.append(delay_s)
        if not self._coming:
            self.over.set()
            await asyncio.Event().wait()

    async def _pause(self, seconds: float) -> None:
        self.waits.append(-seconds)

    async def all_seen(self) -> Watched:
        running = asyncio.create_task(self.run())
        ended = asyncio.create_task(self.over.wait())
        await asyncio.wait({running, ended}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        running.cancel()
        ended.cancel()
        assert self.over.is_set()
        return self


async def test_a_machine_that_stays_the_same_is_not_told_again() -> None:
    free = report(gpu(attributes={"free_bytes": 1}))
    found = await Watched(free, report(gpu(attributes={"free_bytes": 2})), free).all_seen()
    assert (found.told, found.rounds) == ([], 2)
    assert found.waits == [900.0, 900.0, 900.0]


async def test_what_got_worse_is_looked_at_twice_and_what_got_better_is_told_at_once() -> None:
    well, gone = report(gpu()), report(state="undetected", reason="no card")
    found = await Watched(well, gone, gone, well).all_seen()
    assert found.told == [gone, well]
    assert found.waits == [900.0, -CONFIRM_S, 900.0, 900.0]


async def test_a_card_that_is_away_for_a_moment_is_not_told() -> None:
    well, gone = report(gpu()), report(state="undetected", reason="no card")
    found = await Watched(well, gone, well, well).all_seen()
    assert found.told == []


async def test_trouble_is_looked_at_sooner_and_ever_later_until_it_heals() -> None:
    well, sick = report(gpu()), report(gpu(health="unhealthy", reason="ECC errors"))
    found = await Watched(well, sick, sick, *[sick] * 5, well, well).all_seen()
    assert found.told == [sick, well]
    assert [wait for wait in found.waits if wait and wait > 0] == [
        900.0, TROUBLE_S, 2 * TROUBLE_S, 4 * TROUBLE_S, 8 * TROUBLE_S, 900.0, 900.0, 900.0, 900.0,
    ]  # fmt: skip


async def test_a_look_that_fails_leaves_what_was_seen_and_the_next_one_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    well, more = report(gpu()), report(gpu(), gpu("1"))
    found = await Watched(well, SettingProblem("decisions.json is damaged"), more).all_seen()
    assert (found.told, found.rounds) == ([more], 2)
    assert "cannot be looked at now: decisions.json is damaged" in caplog.text


async def test_without_an_interval_only_the_owner_makes_it_look() -> None:
    looks = 0

    async def look() -> HardwareReport:
        nonlocal looks
        looks += 1
        return report(gpu(), gpu("1"))

    told: list[HardwareReport] = []
    lookout = Lookout(report(gpu(), state="unhealthy", reason="one is gone"), look, told.append, interval_s=0)
    assert lookout.delay_s() is None
    running = asyncio.create_task(lookout.run())
    assert lookout.ask() == 0
    await soon_true(lambda: lookout.rounds)
    assert (looks, told, lookout.report) == (1, [lookout.report], told[0])
    running.cancel()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (report(gpu()), report(), ["gpu:0 has vanished"]),
        (report(), report(gpu()), ["gpu:0 is there (Radeon)"]),
        (report(gpu()), report(gpu(health="unhealthy", reason="hot")), ["gpu:0 is unhealthy: hot"]),
        (report(gpu(health="unhealthy", reason="hot")), report(gpu()), ["gpu:0 is healthy"]),
        (report(gpu()), report(gpu(attributes={"driver": "2"})), ["gpu:0 is another"]),
        (report(gpu()), report(gpu(), state="unhealthy", reason="x y"), ["detector cards says unhealthy: x y"]),
        (report(state="unhealthy", reason="again in 5 s"), report(state="unhealthy", reason="again in 60 s"), []),
        (report(*map(gpu, "abcdefghijk")), report(), [*(f"gpu:{n} has vanished" for n in "abcdefgh"), "and 3 more"]),
    ],
)
def test_what_became_of_a_machine_is_said_in_words(
    old: HardwareReport, new: HardwareReport, words: Sequence[str]
) -> None:
    assert changes(old, new) == list(words)


def test_free_room_counts_when_much_of_it_came_or_went() -> None:
    def room(size: int) -> HardwareReport:
        return report(Device(id="storage:0", kind="storage", name="disk", memory_bytes=size))

    assert changes(room(100 * 2**30), room(95 * 2**30)) == []
    assert changes(room(100 * 2**30), room(80 * 2**30)) == ["storage:0 is another"]


devices = st.lists(
    st.builds(
        gpu,
        st.sampled_from("0123"),
        health=st.sampled_from(["healthy", "unhealthy"]),
        reason=st.sampled_from(["", "hot"]),
    ),
    max_size=4,
    unique_by=lambda device: device.id,
)
reports = st.builds(
    lambda found, state: report(*found, state=state, reason="" if state == "healthy" else "it is so"),
    devices,
    st.sampled_from(["healthy", "unhealthy"]),
)


@given(reports, reports)
def test_whatever_got_worse_is_a_change_and_nothing_changes_against_itself(
    old: HardwareReport, new: HardwareReport
) -> None:
    assert changes(old, old) == []
    assert not worse(old, old)
    if worse(old, new):
        assert changes(old, new)
        assert has_trouble(new) or len(new.devices) < len(old.devices) or old.devices != new.devices


def test_what_its_owner_keeps_back_is_not_the_pools_and_is_said() -> None:
    found = Detection.unhealthy("one of three is broken", devices=[gpu("0"), gpu("1")])
    cards = Observation(detector="cards", detection=found)
    cpu = Observation(detector="host", detection=Detection.healthy([Device(id="cpu", kind="cpu", name="CPU")]))
    left = assemble(without([cpu, cards], ["gpu:1", "npu:*"]))
    assert [device.id for device in left.devices] == ["cpu", "gpu:0"]
    assert left.probes[0].reason == ""
    assert left.probes[1].reason == "one of three is broken; kept back by the owner (exclude_devices): gpu:1"
    assert without([cpu, cards], []) == (cpu, cards)
    assert [device.id for device in assemble(without([cpu, cards], ["*"])).devices] == []
    assert assemble(without([cards], ["gpu:*"])).capabilities == Capabilities(cpu_cores=0, ram="0.0GB")


async def test_what_the_settings_say_of_devices_counts_from_the_next_look_on(tmp_path: Path) -> None:
    (tmp_path / "found").mkdir(mode=0o755)
    device = tmp_path / "found" / "board.json"
    device.write_text(
        '[{"id": "npu:0", "kind": "npu", "name": "Board"}, {"id": "npu:1", "kind": "npu", "name": "Other"}]'
    )
    device.chmod(0o644)
    first = AgentSettings(home=str(tmp_path), detectors=str(tmp_path / "found"), only_plugins=["none"])
    now = first
    detecting = Detecting(first, again=lambda: now)
    assert [one.id for one in (await detecting.look()).devices] == []
    now = msgspec.structs.replace(first, only_plugins=["board"])
    assert [one.id for one in (await detecting.look()).devices] == ["npu:0", "npu:1"]
    now = msgspec.structs.replace(now, exclude_devices=["npu:1"])
    assert [one.id for one in (await detecting.look()).devices] == ["npu:0"]
    assert {one.name: one.state for one in detecting.reports()}["board"] == "active"


def test_a_running_agent_tells_its_pool_when_a_gpu_vanishes_and_when_it_is_back(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home, devices = tmp_path_factory.mktemp("up"), tmp_path_factory.mktemp("devices") / "machine.json"
    whole = json.loads((MACHINES / "desktop-rtx-3060-8-cores.json").read_text())
    devices.write_text(json.dumps(whole))
    env = {**NO_ENGINE, "RMA_FAKE_DEVICES": str(devices), "RMA_CATALOG": notes_alone(home)}
    with pool(home, "--port", "0", env=env) as made:
        [worker] = made.workers()
        assert worker["tier"] == 1
        seen = made.json("detect", "--rescan")
        assert [d["kind"] for d in seen["devices"]].count("gpu") == 1
        gone = msgspec.json.decode(msgspec.json.encode(whole))
        gone["devices"] = [d for d in whole["devices"] if d["kind"] != "gpu"]
        gone["capabilities"] |= {"gpu_type": None, "gpu_memory": None}
        gone["probes"] = [
            {**p, "state": "unhealthy", "reason": "the driver was updated while it ran", "devices": []}
            if p["detector"] == "nvidia" else p
            for p in whole["probes"]
        ]  # fmt: skip
        devices.write_text(json.dumps(gone))
        made.json("detect", "--rescan")
        until(lambda: made.workers()[0]["tier"] == 2, within_s=PATIENCE_S, what="the tier without its GPU")
        assert "the driver was updated" in made.workers()[0]["tier_reason"]
        devices.write_text(json.dumps(whole))
        made.json("detect", "--rescan")
        until(lambda: made.workers()[0]["tier"] == 1, within_s=PATIENCE_S, what="the tier with its GPU")
        assert "gpu:" in (home / "agent.log").read_text()


async def test_a_bug_in_a_look_is_told_to_who_asked_and_the_next_look_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    well, more = report(gpu()), report(gpu(), gpu("1"))
    found = Watched(well, ZeroDivisionError("no such luck"))
    await found.all_seen()
    assert "something went wrong in rma itself (ZeroDivisionError: no such luck)" in found.error
    assert "a look at the hardware failed" in caplog.text
    found = await Watched(well, ZeroDivisionError("no such luck"), more).all_seen()
    assert (found.told, found.error) == ([more], "")
