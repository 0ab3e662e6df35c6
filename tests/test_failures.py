"""Failures of plugins are counted since the program that runs them started, within bounds, and without more to tell."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

import msgspec
import pytest

from rma_core import failures
from rma_core.agent.detecting import Detecting
from rma_core.agent.news import AGAIN_S, LONGEST_AGAIN_S, News, Told
from rma_core.commands import common
from rma_core.failures import NEVER, Failed, Failures
from rma_core.models.worker import Heartbeat, PluginReport
from rma_core.settings import AgentSettings
from tests.plugin_files import distribute

if TYPE_CHECKING:
    from pathlib import Path

BAD = PluginReport(name="bad", kind="detector", state="active", reason="unhealthy: raised")


def test_each_is_counted_by_kind_name_and_version_with_the_time_of_the_last() -> None:
    times = itertools.count(1_000_000_000, 60)
    found = Failures(lambda: next(times))
    found.add("detector", "a", "1")
    found.add("detector", "a", "1")
    found.add("policy", "a", "1")
    assert found.of("detector", "a", "1") == Failed(2, "2001-09-09T01:47:40Z")
    assert found.of("policy", "a", "1") == Failed(1, "2001-09-09T01:48:40Z")
    assert found.of("detector", "a", "2") == NEVER


def test_what_is_kept_is_bounded_and_the_latest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "MOST", 3)
    found = Failures()
    for name in ("a", "b", "c", "a", "d"):
        found.add("detector", name)
    assert {name: found.of("detector", name).times for name in "abcd"} == {"a": 2, "b": 0, "c": 1, "d": 1}


def test_a_count_alone_is_news_only_once_it_has_doubled() -> None:
    plugins = (BAD,)
    news = News(lambda: Told(plugins=plugins))
    told = []
    for times in range(1, 1000):
        plugins = (msgspec.structs.replace(BAD, failures=times, failed_at="2026-01-01T00:00:00Z"),)
        beat = news.added_to(Heartbeat(worker_id="worker-00000000"))
        if beat.plugins:
            told.append(times)
        news.read(beat)
    assert told == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def test_what_is_deprecated_no_more_is_news() -> None:
    plugins = (msgspec.structs.replace(BAD, deprecated=("old",)),)
    news = News(lambda: Told(plugins=plugins))
    news.read(news.added_to(Heartbeat(worker_id="worker-00000000")))
    plugins = (BAD,)
    assert news.added_to(Heartbeat(worker_id="worker-00000000")).plugins == plugins


def test_another_process_is_told_everything_once_more_and_many_of_them_ever_more_rarely() -> None:
    now = 0.0
    news = News(lambda: Told(plugins=(BAD,)), clock=lambda: now)

    def told() -> bool:
        beat = news.added_to(Heartbeat(worker_id="worker-00000000"))
        news.read(beat)
        return beat.plugins is not None

    assert told()
    assert (news.answered_by("a"), news.answered_by("a"), told()) == (False, False, False)
    assert (news.answered_by("b"), told(), told()) == (True, True, False)
    # Both are there, and answer in turns.
    assert not any(news.answered_by(word) for word in "abababab")
    times = []
    for number in range(20_000):
        now = number
        if news.answered_by(f"new {number}"):
            times.append(now)
    assert 5 <= len(times) <= 20, "it waits longer each time, an hour at most"
    assert times[0] <= AGAIN_S
    now += 2 * LONGEST_AGAIN_S
    assert news.answered_by("the last one"), "a restart after hours of quiet is told at once"


def test_a_coordinator_that_says_now_which_process_it_is_may_be_another() -> None:
    news = News(lambda: Told(plugins=(BAD,)), clock=lambda: 0.0)
    assert (news.answered_by(""), news.answered_by(""), news.answered_by("a")) == (False, False, True)


async def test_an_agent_counts_over_all_its_looks_and_what_is_mended_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {"rma.detectors": {"bad": "bad_now", "well": "well_now"}}
    well = "from rma_core import Detection, hookimpl\n@hookimpl\ndef rma_detect_devices(config):\n    "
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def install(version: str, code: str) -> None:
        modules = {"bad_now": code, "well_now": f"{well}return Detection.unhealthy('the card is broken')\n"}
        distribute(tmp_path / "site", "rma-detect-bad", points, version=version, modules=modules)

    def counted() -> dict[str, int]:
        return {one.name: one.failures for one in detecting.reports() if one.name in ("bad", "well", "host")}

    install("1.0", f"{well}return 1 / 0\n")
    detecting = Detecting(
        AgentSettings(home=str(tmp_path), only_plugins=["host", "bad", "well"], approve_plugins=["*"])
    )
    for times in (1, 2, 3):
        await detecting.look()
        # A broken card is no failure of the detector that says so.
        assert counted() == {"host": 0, "bad": times, "well": 0}
    for old in (tmp_path / "site").glob("*.dist-info"):
        old.rename(tmp_path / "old")
    install("1.1", f"{well}return Detection.undetected('none')\n")
    await detecting.look()
    assert counted() == {"host": 0, "bad": 0, "well": 0}


@pytest.mark.parametrize(
    ("times", "words"), [(0, r"^$"), (1, r"^once, \d+ (d|h) ago$"), (7, r"^7 times, last \d+ (d|h) ago$")]
)
def test_a_count_is_said_as_people_say_it(times: int, words: str) -> None:
    one = {"failures": times, "failed_at": "2026-01-01T00:00:00Z" if times else ""}
    assert re.search(words, common.failed(one))
    assert common.failed({}) == ""
