"""Tier policies without Python: what a file says, what is wrong with it and where, and how a coordinator uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.tiers import FOLDER, with_files
from rma_core.errors import SettingProblem, ValidationProblem
from rma_core.interfaces import PolicyInput
from rma_core.policy_file import read_file, read_policy
from rma_core.record import read_report
from rma_core.toml_lines import line_of
from tests.coordinator_fixtures import running

if TYPE_CHECKING:
    from pathlib import Path

LAB = """\
summary = "the lab's machines first"

[[tiers]]
tier = 1
name = "GPU"
gpu_memory = "8GB"

[[tiers]]
tier = 4
name = "everything else"
cpu_cores = 2

[[exceptions]]
workers = ["worker-loud"]
tier = "none"
reason = "its fans are loud"

[[exceptions]]
labels = { site = "lab", room = "2" }
tier = 1
"""
SMALL, TINY = (read_report({"cpu_cores": cores, "ram": "4GB"}, subject="x") for cores in (2, 1))


def tier_of(text: str, **asked: Any) -> tuple[int | None, str]:
    found = read_policy(text, name="lab", subject="lab.toml").decide(PolicyInput(**{"report": SMALL, **asked}))
    return found.tier, found.reason


def test_a_machine_gets_the_first_exception_that_fits_it_else_the_best_tier_that_it_clears() -> None:
    assert tier_of(LAB) == (4, "tier 4: 2 cores and 4 GiB, but no GPU with 8 GB")
    assert tier_of(LAB, report=TINY)[0] is None
    lab = {"site": "lab", "room": "2", "more": "x"}
    assert tier_of(LAB, report=TINY, labels=lab) == (1, "tier 1: an exception for room = 2 and for site = lab")
    assert tier_of(LAB, labels={"site": "lab"})[0] == 4, "all of its labels must fit"
    both = tier_of(LAB, worker_id="worker-loud", labels=lab)
    assert both == (None, "no tier: its fans are loud")


def test_an_exception_for_a_machine_with_labels_needs_both() -> None:
    text = LAB.replace('workers = ["worker-loud"]', 'workers = ["worker-loud"]\nlabels = { site = "lab" }')
    assert tier_of(text, worker_id="worker-loud")[0] == 4
    assert tier_of(text, worker_id="worker-loud", labels={"site": "lab"})[0] is None


def test_a_tier_or_an_exception_prefers_services_in_its_own_order() -> None:
    text = LAB.replace("cpu_cores = 2", 'cpu_cores = 2\nprefers = ["redis", "notes"]')
    text = text.replace('"2" }\ntier = 1', '"2" }\ntier = 1\nprefers = ["ocr"]')
    policy = read_policy(text, name="lab", subject="lab.toml")
    assert policy.decide(PolicyInput(report=SMALL)).prefers == ("redis", "notes")
    assert policy.decide(PolicyInput(report=SMALL, labels={"site": "lab", "room": "2"})).prefers == ("ocr",)
    assert policy.decide(PolicyInput(report=TINY)).prefers == ()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (('gpu_memory = "8GB"', 'gpu_memory = "8 potatoes"'), 'line 6, tiers[0].gpu_memory: is no size such as "16GB"'),
        (("cpu_cores = 2", "cpu_cores = -2"), "line 11, tiers[1].cpu_cores: Expected `int` >= 0"),
        (("cpu_cores = 2", "cores = 2"), "line 11, tiers[1].cores: is unknown; there are cpu_cores, gpu_memory,"),
        (("cpu_cores = 2", 'prefers = ["Two Words"]'), "line 11, tiers[1].prefers[0]: Expected `str` matching regex"),
        (('tier = "none"', 'tier = "none"\nprefers = ["ocr"]'), "line 16, exceptions[0].prefers: a machine without a"),
        (("tier = 4", "tier = 1"), "line 3, tiers: tier 1 is there twice"),
        (('workers = ["worker-loud"]\n', ""), "line 13, exceptions[0]: is for nobody: it needs workers or labels"),
        (('"2" }\ntier = 1', '"2" }\ntier = 9'), "line 20, exceptions[1].tier: there is no tier 9 among the tiers"),
        (('summary = "the lab\'s machines first"', "summary = 3"), "line 1, summary: is a sentence"),
        (("[[tiers]]", "[[tires]]"), "line 1: has no tiers: each is a table [[tiers]] with a number and a name"),
        (("[[tiers]]", "[[tires]]"), "line 3, tires: is unknown; there are 'tiers' and 'exceptions'"),
        (('name = "GPU"', "name = GPU"), "line 5: invalid value"),
        (('name = "GPU"', 'name = "GPU'), "line 5: illegal character"),
    ],
)
def test_everything_wrong_is_said_with_the_line_that_it_stands_on(change: tuple[str, str], problem: str) -> None:
    text = LAB.replace(*change)
    assert text != LAB
    with pytest.raises(ValidationProblem, match=r"lab\.toml") as caught:
        read_policy(text, name="lab", subject="lab.toml")
    assert any(str(one).startswith(problem) for one in caught.value.problems), str(caught.value)


NAMES = st.sampled_from(["tier", "name", "ram", "cpu_cores"])


@given(st.lists(st.lists(NAMES, unique=True, max_size=4), max_size=6), st.data())
def test_the_line_of_a_key_is_where_it_is_written(tables: list[list[str]], data: st.DataObject) -> None:
    lines, places = ['summary = "x"', "# [[tiers]] is a comment here"], {"$.summary": 1}
    for index, keys in enumerate(tables):
        lines += [""] * data.draw(st.integers(0, 2))
        lines.append(data.draw(st.sampled_from(["[[tiers]]", "  [[ tiers ]]  # a comment"])))
        places[f"$.tiers[{index}]"] = len(lines)
        for key in keys:
            lines.append(data.draw(st.sampled_from([f"{key} = 1", f'  "{key}"=1'])))
            places[f"$.tiers[{index}].{key}"] = len(lines)
    text = "\n".join(lines)
    assert {path: line_of(text, path) for path in places} == places


def test_a_file_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingProblem, match="cannot be read: No such file"):
        read_file(tmp_path / "lab.toml")
    (tmp_path / "My Lab.toml").write_text(LAB)
    with pytest.raises(SettingProblem, match="no name of a tier policy"):
        read_file(tmp_path / "My Lab.toml")
    (tmp_path / "lab.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValidationProblem, match="UTF-8"):
        read_file(tmp_path / "lab.toml")
    for text in ("#" * 300_000, "#" + "\N{SNOWMAN}" * 300_000):
        (tmp_path / "lab.toml").write_text(text, encoding="utf-8")
        with pytest.raises(ValidationProblem, match="more than 200000 characters"):
            read_file(tmp_path / "lab.toml")


# -- a coordinator -------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_cost_only_themselves_unless_one_is_to_be_active(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    installed: dict[str, Any] = {"threshold": object()}
    assert with_files(installed, tmp_path / "none", active="threshold") == installed
    for name, text in (("lab", LAB), ("bad", "tiers = 3"), ("threshold", LAB)):
        (tmp_path / f"{name}.toml").write_text(text)
    found = with_files(installed, tmp_path, active="lab")
    assert set(found) == {"threshold", "lab"}
    assert found["threshold"] is installed["threshold"]
    assert caplog.text.count("cannot be used") == 2
    with pytest.raises(ValidationProblem, match="line 1, tiers"):
        with_files(installed, tmp_path, active="bad")


async def test_a_policy_from_a_file_gives_tiers_and_another_can_be_tried_on_the_live_fleet(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "lab.toml").write_text(LAB)
    async with running(tmp_path, tier_policy="lab") as pool:
        machine = await pool.enrol()
        given_tier = machine.answer["tier"]
        assert given_tier == 4
        listed = (await pool.client.get("/api/admin/policies")).json()
        assert listed["active"] == "lab"
        assert {one["name"]: one["summary"] for one in listed["policies"]}["lab"] == "the lab's machines first"
        tried = LAB.replace('"worker-loud"', f'"{machine.id}"')
        path = "/api/admin/policies/preview"
        answer = (await pool.client.post(path, json={"policy": "quiet", "file": tried})).json()
        assert (answer["policy"], answer["changes"]) == ("quiet", 1)
        assert {key: answer["workers"][0][key] for key in ("worker_id", "from", "to", "reason")} == {
            "worker_id": machine.id, "from": 4, "to": None, "reason": "no tier: its fans are loud",
        }  # fmt: skip
        refused = await pool.client.post(path, json={"file": LAB.replace("cpu_cores", "cores")})
        assert refused.status_code == 400
        assert "line 11" in refused.json()["detail"]
        assert (await pool.client.get("/api/admin/policies")).json() == listed, "a preview changes nothing"
