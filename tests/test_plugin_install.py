"""`rma plugins install`, `approve`, `block`, `remove`: a folder for each; nothing of it runs before its owner's yes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from rma_core.host import Plugins
from rma_core.plugin_folders import PluginFolders
from tests.pools import environment
from tests.wheels import BOARD, detector, wheel

if TYPE_CHECKING:
    from pathlib import Path

ODD = "rma-detect-odd"
POINTS = {"rma.detectors": {"odd": "rma_detect_odd"}}


def rma(*arguments: str | Path, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rma_core", *map(str, arguments)]
    env = environment(folder / "home", more)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def told(*arguments: str | Path, folder: Path, **more: str) -> dict[str, Any]:
    done = rma(*arguments, "--json", folder=folder, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(*arguments: str | Path, folder: Path, **more: str) -> str:
    """Return what a command that must fail says, its hints included."""
    done = rma(*arguments, "--json", folder=folder, **more)
    assert done.returncode != 0, done.stdout
    error = json.loads(done.stdout)["error"]
    return " ".join([error["code"], error["message"], *error["hints"]])


def state_of(name: str, folder: Path, **more: str) -> tuple[str, str]:
    plugins = told("plugins", folder=folder, **more)["plugins"]
    return next(((p["state"], p["reason"]) for p in plugins if p["name"] == name), ("absent", ""))


def boards(folder: Path, **more: str) -> list[str]:
    """Return the names of the boards that detection finds."""
    return [device["name"] for device in told("detect", folder=folder, **more)["devices"] if device["kind"] == "npu"]


def test_a_plugin_runs_once_its_owner_approves_it(tmp_path: Path) -> None:
    installed = told("plugins", "install", detector(tmp_path), folder=tmp_path)
    assert (installed["plugin"], installed["version"], installed["approved"]) == (ODD, "1.0", False)
    state, reason = state_of("odd", tmp_path)
    assert (state, boards(tmp_path)) == ("unapproved", [])
    assert f"rma plugins approve {ODD}" in reason
    assert "not approved" in refused("plugins", "check", "odd", folder=tmp_path)
    assert told("plugins", "approve", "odd", "--yes", folder=tmp_path)["approved"]
    assert (state_of("odd", tmp_path), boards(tmp_path)) == (("active", ""), ["Odd board"])
    assert told("plugins", "check", "odd", folder=tmp_path)["broken"] == 0


def test_an_update_takes_the_place_of_what_runs_only_with_a_yes(tmp_path: Path) -> None:
    assert told("plugins", "install", detector(tmp_path), "--yes", folder=tmp_path)["approved"]
    newer = detector(tmp_path, "Odder board", "1.1")
    found = told("plugins", "install", newer, folder=tmp_path)
    assert (found["installed"], found["approved"]) == (False, False)
    assert "1.0 that you approved stays" in rma("plugins", "install", newer, folder=tmp_path).stderr
    assert boards(tmp_path) == ["Odd board"]
    assert told("plugins", "install", newer, "--yes", folder=tmp_path)["installed"]
    assert boards(tmp_path) == ["Odder board"]
    (tmp_path / "home" / "plugins" / ODD / "more.py").write_text("")
    assert told("plugins", "install", detector(tmp_path), folder=tmp_path)["installed"], "what ran does not any more"
    assert state_of("odd", tmp_path)[0] == "unapproved"
    assert boards(tmp_path) == []


@pytest.mark.parametrize("change", ["changed", "added", "cached", "linked", "opened"])
def test_what_changed_since_it_was_approved_does_not_run(change: str, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "plugins" / ODD
    assert told("plugins", "install", detector(tmp_path), "--yes", folder=tmp_path)["folder"] == str(folder)
    module = folder / "rma_detect_odd.py"
    if change == "changed":
        module.write_text(module.read_text().replace("Odd", "Bad"))
    elif change == "added":
        (folder / "json.py").write_text("")
    elif change == "cached":
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__" / "rma_detect_odd.cpython-311.pyc").write_bytes(b"x")
    elif change == "linked":
        (folder / "more.py").symlink_to("/etc/hostname")
    else:
        folder.chmod(0o755)
    state, reason = state_of("odd", tmp_path)
    assert (state, boards(tmp_path)) == ("unapproved", [])
    words = {"linked": "neither a file nor a folder", "opened": "chmod 700"}
    assert words.get(change, "not those of 1.0 that you approved") in reason
    if change in words:
        assert words[change] in refused("plugins", "approve", "odd", "--yes", folder=tmp_path)
    else:
        assert told("plugins", "approve", "odd", "--yes", folder=tmp_path)["approved"]
        assert state_of("odd", tmp_path)[0] == "active"


def test_running_it_leaves_its_files_as_they_were_approved(tmp_path: Path) -> None:
    told("plugins", "install", detector(tmp_path), "--yes", folder=tmp_path)
    runtime = BOARD.replace("rma_detect_devices", "rma_container_runtimes").format(name="x")
    points = {"rma.runtimes": {"odd": "rma_runtime_odd"}}
    other = wheel(tmp_path, "rma-runtime-odd", modules={"rma_runtime_odd": runtime}, points=points)
    told("plugins", "install", other, "--yes", folder=tmp_path)
    for _ in range(2):
        # Without PYTHONDONTWRITEBYTECODE, which tests have set.
        assert boards(tmp_path, PYTHONDONTWRITEBYTECODE="") == ["Odd board"]
    assert state_of("odd", tmp_path)[0] == "active"
    kinds = {p["kind"]: p["state"] for p in told("plugins", folder=tmp_path)["plugins"] if p["name"] == "odd"}
    assert kinds == {"detector": "active", "runtime": "invalid"}, "it was imported, and gives no runtime"


def test_nothing_runs_while_it_is_installed_or_shown(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    loud = f"open({str(mark)!r}, 'a').write('x')\n"
    files = {
        "odd.pth": f"import sys; exec({loud!r})\n",
        "sitecustomize.py": loud,
        "rma_core.py": loud,
        "msgspec.py": loud,
    }
    made = wheel(tmp_path, ODD, modules={"rma_detect_odd": loud + BOARD.format(name="x")}, points=POINTS, extra=files)
    told("plugins", "install", made, folder=tmp_path)
    state_of("odd", tmp_path)
    told("detect", folder=tmp_path)
    rma("plugins", "approve", "odd", folder=tmp_path)
    assert not mark.exists()
    told("plugins", "approve", "odd", "--yes", folder=tmp_path)
    assert state_of("odd", tmp_path)[0] == "failed", "it may run now, and may write nothing"
    assert not mark.exists()


def test_what_it_needs_comes_into_its_own_folder(tmp_path: Path) -> None:
    helper = wheel(tmp_path / "index", "odd-helper", modules={"odd_helper": "NAME = 'Helped board'"})
    source = BOARD.replace("{name!r}", "NAME").replace("from rma_core", "from odd_helper import NAME\nfrom rma_core", 1)
    made = wheel(tmp_path, ODD, modules={"rma_detect_odd": source}, points=POINTS, needs=["odd-helper", "rma-core"])
    pip = {"PIP_FIND_LINKS": str(helper.parent), "PIP_NO_INDEX": "1"}
    told("plugins", "install", made, "--yes", folder=tmp_path, **pip)
    assert boards(tmp_path) == ["Helped board"]
    there = {path.name for path in (tmp_path / "home" / "plugins" / ODD).iterdir()}
    assert {"odd_helper.py", "rma_detect_odd.py"} <= there
    assert not {name for name in there if name.startswith("rma_core")}


def test_a_plugin_is_fetched_by_its_name(tmp_path: Path) -> None:
    pip = {"PIP_FIND_LINKS": str(detector(tmp_path / "index").parent), "PIP_NO_INDEX": "1"}
    found = told("plugins", "install", f"{ODD}==1.0", "--yes", folder=tmp_path, **pip)
    assert found["source"].startswith("file://")
    assert found["source"].endswith(".whl")
    assert boards(tmp_path) == ["Odd board"]


def test_what_cannot_be_installed_is_refused_with_what_to_do_and_changes_nothing(tmp_path: Path) -> None:
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd-1.0-py3-none-any.whl").write_text("no wheel")
    plain = wheel(tmp_path, "odd-thing")
    ours = wheel(tmp_path / "a", "RMA.Core", points=POINTS)
    twin = wheel(tmp_path / "b", "rma-detect-other", points={"rma.detectors": {"host": "other"}})
    older = wheel(tmp_path / "c", ODD, points=POINTS, needs=["click<8"])
    for what, words in {
        "odd": "installing from source would run its code",
        "odd-1.0.tar.gz": "no wheel",
        "odd-1.0-py3-none-any.whl": "plugin_invalid odd-1.0-py3-none-any.whl cannot be read as a wheel",
        "nowhere.whl": "there is no file nowhere.whl",
        "./nowhere": "there is no file",
        "http://example.org/odd-1.0-py3-none-any.whl": "not an https address",
        "git+https://example.org/odd": "not an https address",
        str(plain): "no plugin of RMA's",
        str(ours): "which is RMA itself",
        str(twin): "plugin_conflict rma-detect-other has a detector called 'host', and so has rma-core",
        str(older): "plugin_install rma-detect-odd needs click <8, and ",
        "nobody-has-this": "plugin_install Could not find a version",
    }.items():
        assert words in refused("plugins", "install", what, folder=tmp_path, **pip)
    assert "no such option" in refused("plugins", "install", "-r", folder=tmp_path).lower()
    assert "neither a wheel nor a name" in rma("plugins", "install", "--", "-r", folder=tmp_path).stderr
    assert [path.name for path in (tmp_path / "home" / "plugins").iterdir() if path.name != ".lock"] == []


def test_what_a_wheel_needs_by_an_address_is_not_fetched_for_building_it_would_run_its_code(tmp_path: Path) -> None:
    mark, source = tmp_path / "mark", tmp_path / "evil"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "back"\nbackend-path = ["."]\n'
    )
    (source / "back.py").write_text(f"open({str(mark)!r}, 'w').write('ran')\n")
    evil = f"evil @ file://{source}"
    direct = wheel(tmp_path / "a", ODD, points=POINTS, needs=[evil])
    helper = wheel(tmp_path / "index", "odd-helper", needs=[evil])
    through = wheel(tmp_path / "b", ODD, points=POINTS, needs=["odd-helper"])
    pip = {"PIP_FIND_LINKS": str(helper.parent), "PIP_NO_INDEX": "1"}
    for made, who in ((direct, ODD), (through, "odd-helper")):
        assert f"{who} needs evil from file://" in refused("plugins", "install", made, "--yes", folder=tmp_path, **pip)
    assert not mark.exists()
    assert state_of("odd", tmp_path)[0] == "absent"


def test_what_pip_would_take_for_a_file_is_not_asked_for(tmp_path: Path) -> None:
    mark, source = tmp_path / "mark", tmp_path / "evil"
    source.mkdir()
    built = ["[build-system]", "requires = []", 'build-backend = "back"', 'backend-path = ["."]', ""]
    (source / "pyproject.toml").write_text("\n".join(built))
    (source / "back.py").write_text(f"open({str(mark)!r}, 'w').write('ran')\n")
    with tarfile.open(tmp_path / "payload.tgz", "w:gz") as archive:
        archive.add(source, "payload-1.0")
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "nothing")}
    assert "plugin_install" in refused("plugins", "install", "payload.tgz", "--yes", folder=tmp_path, **pip)
    assert "more than a name" in refused("plugins", "install", "payload===1.tgz", "--yes", folder=tmp_path, **pip)
    for number, need in enumerate(("payload.tgz", f"x==={tmp_path}/payload.tgz", "x===../payload.tgz")):
        made = wheel(tmp_path / str(number), ODD, points=POINTS, needs=[need])
        assert "plugin_install" in refused("plugins", "install", made, "--yes", folder=tmp_path, **pip)
    assert not mark.exists()


def test_what_an_extra_needs_comes_along(tmp_path: Path) -> None:
    fast = wheel(tmp_path / "index", "odd-fast", modules={"odd_fast": "NAME = 'Fast board'"})
    wheel(fast.parent, "odd-helper", modules={"odd_helper": ""}, needs=['odd-fast; extra == "fast"'])
    source = BOARD.replace("{name!r}", "NAME").replace("from rma_core", "from odd_fast import NAME\nfrom rma_core", 1)
    made = wheel(tmp_path, ODD, modules={"rma_detect_odd": source}, points=POINTS, needs=["odd-helper[fast]>=1"])
    pip = {"PIP_FIND_LINKS": str(fast.parent), "PIP_NO_INDEX": "1"}
    told("plugins", "install", made, "--yes", folder=tmp_path, **pip)
    assert boards(tmp_path) == ["Fast board"]


def test_approving_one_plugin_decides_nothing_about_another(tmp_path: Path) -> None:
    other = wheel(
        tmp_path,
        "odd",
        modules={"odd_other": BOARD.format(name="Other")},
        points={"rma.detectors": {"o2": "odd_other"}},
    )
    told("plugins", "install", other, "--yes", folder=tmp_path)
    told("plugins", "block", "o2", folder=tmp_path)
    folders = PluginFolders(tmp_path / "home" / "plugins")
    folders.decide(lambda known: known.block("odd"))
    told("plugins", "install", detector(tmp_path), "--yes", folder=tmp_path)
    decisions = folders.decisions()
    assert (decisions.blocked, set(decisions.approved)) == (("o2", "odd"), {"odd", ODD})


def test_what_is_shown_is_what_is_installed(tmp_path: Path) -> None:
    module = {"rma_detect_odd": BOARD.format(name="x")}
    info = "rma_detect_odd-1.0.dist-info/entry_points.txt"
    hidden = "[rma.runtimes]\nodd = rma_detect_odd\n"
    over = {f"rma_detect_odd-1.0.data/purelib/{info}": hidden}
    made = wheel(tmp_path / "a", ODD, modules=module, points=POINTS, extra=over)
    assert "take the place of its description" in refused("plugins", "install", made, "--yes", folder=tmp_path)
    second = {
        "rma_other-1.0.dist-info/entry_points.txt": hidden,
        "rma_other-1.0.dist-info/METADATA": "Name: rma-other\n",
    }
    made = wheel(tmp_path / "b", ODD, modules=module, points=POINTS, extra=second)
    assert "no metadata, or a file twice" in refused("plugins", "install", made, "--yes", folder=tmp_path)
    made = wheel(tmp_path / "c", ODD, modules=module, points=POINTS)
    renamed = made.with_name("nvidia_official-1.0-py3-none-any.whl")
    made.rename(renamed)
    assert "are called differently" in refused("plugins", "install", renamed, "--yes", folder=tmp_path)
    assert state_of("odd", tmp_path)[0] == "absent"


def test_a_plugin_that_is_too_large_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    many = {f"odd_{number}.txt": "" for number in range(20_001)}
    made = wheel(tmp_path, ODD, modules={"rma_detect_odd": ""}, points=POINTS, extra=many)
    assert "more than 20000 files" in refused("plugins", "install", made, "--yes", folder=tmp_path)
    assert state_of("odd", tmp_path)[0] == "absent"


def test_a_folder_of_plugins_that_others_can_change_is_not_used(tmp_path: Path) -> None:
    told("plugins", "install", detector(tmp_path), "--yes", folder=tmp_path)
    (tmp_path / "home" / "plugins").chmod(0o775)
    assert "chmod go-w" in refused("plugins", "install", detector(tmp_path), "--yes", folder=tmp_path)
    assert (state_of("odd", tmp_path)[0], boards(tmp_path)) == ("unapproved", [])


def test_a_new_version_beside_an_imported_runtime_is_not_taken_for_one_of_pythons_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"rma.detectors": {"odd": "rma_detect_odd"}, "rma.runtimes": {"odd": "rma_runtime_odd"}}
    source = {"rma_detect_odd": BOARD.format(name="x"), "rma_runtime_odd": ""}
    told("plugins", "install", wheel(tmp_path, ODD, modules=source, points=both), "--yes", folder=tmp_path)
    own = PluginFolders(tmp_path / "home" / "plugins")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    first = Plugins.discover(kinds=["detector", "runtime"], own=own)
    assert str(own.path / ODD) in sys.path
    assert [one.folder for one in first.detectors() if one.name == "odd"] == [str(own.path / ODD)]
    (own.path / ODD / "rma_detect_odd.py").write_text("raise SystemExit")
    again = Plugins.discover(kinds=["detector"], own=own)
    assert [one.name for one in again.detectors() if one.name == "odd"] == []
    sys.modules.pop("rma_runtime_odd", None)


def test_a_blocked_plugin_does_not_run_until_that_is_taken_back(tmp_path: Path) -> None:
    told("plugins", "install", detector(tmp_path), "--yes", folder=tmp_path)
    for name in ("odd", ODD, "host"):
        told("plugins", "block", name, folder=tmp_path)
        plugin = "host" if name == "host" else "odd"
        state, reason = state_of(plugin, tmp_path)
        assert (state, "you blocked it" in reason) == ("blocked", True)
        told("plugins", "approve", name, "--yes", folder=tmp_path)
        assert state_of(plugin, tmp_path)[0] == "active"
    assert "not_found" in refused("plugins", "block", "nobody", folder=tmp_path)
    assert "approve_plugins" in refused("plugins", "approve", "host", "--yes", folder=tmp_path)


def test_a_removed_plugin_is_gone_and_is_asked_about_anew(tmp_path: Path) -> None:
    told("plugins", "install", detector(tmp_path), "--yes", folder=tmp_path)
    told("plugins", "block", "odd", folder=tmp_path)
    told("plugins", "install", detector(tmp_path), "--yes", folder=tmp_path)
    assert state_of("odd", tmp_path)[0] == "active", "a yes takes back that it was blocked"
    told("plugins", "remove", "odd", folder=tmp_path)
    assert state_of("odd", tmp_path)[0] == "absent"
    assert not told("plugins", "install", detector(tmp_path), folder=tmp_path)["approved"]
    assert state_of("odd", tmp_path)[0] == "unapproved"
    assert "pip uninstall rma-core" in refused("plugins", "remove", "host", folder=tmp_path)
    assert "not_found" in refused("plugins", "remove", "../home", folder=tmp_path)


def test_what_is_decided_about_a_policy_is_taken_up_by_a_coordinator(tmp_path: Path) -> None:
    points = {"rma.policies": {"odd_tiers": "rma_policy_odd"}}
    made = wheel(tmp_path, "rma-policy-odd", modules={"rma_policy_odd": ""}, points=points)
    for words in (("install", made, "--yes"), ("block", "odd_tiers"), ("remove", "odd_tiers")):
        said = rma("plugins", *words, folder=tmp_path).stderr
        assert "`rma policies rescan`" in said
        assert "rma detect" not in said
    told("plugins", "install", detector(tmp_path), folder=tmp_path)
    assert "rma policies" not in rma("plugins", "block", "odd", folder=tmp_path).stderr


def test_decisions_that_cannot_be_read_end_the_program_rather_than_let_a_blocked_one_run(tmp_path: Path) -> None:
    told("plugins", "install", detector(tmp_path), folder=tmp_path)
    told("plugins", "block", "odd", folder=tmp_path)
    (tmp_path / "home" / "plugins" / "decisions.json").write_text("{")
    assert "decisions.json is damaged" in refused("detect", folder=tmp_path)


@pytest.mark.parametrize(("says", "runs"), [("y\n", True), ("\n", False)])
def test_a_person_is_shown_what_it_is_and_asked(says: str, runs: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rma_core", "plugins", "install", str(detector(tmp_path))]
    ours, theirs = pty.openpty()
    try:
        asked = subprocess.Popen(
            command, cwd=tmp_path, env=environment(tmp_path / "home", {}), stdin=theirs, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.write(ours, says.encode())
        out, err = asked.communicate(timeout=120)
    finally:
        os.close(ours)
        os.close(theirs)
    assert (asked.returncode, out) == (0, "")
    for words in (
        "nobody vouches for it: it is a file",
        "detector odd (rma_detect_odd)",
        "Let it run on this machine?",
    ):
        assert words in err
    assert (state_of("odd", tmp_path)[0] == "active") is runs
