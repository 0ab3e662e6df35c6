"""Whatever command looks at a plugin's policies, nothing of them is imported in the process of whoever typed it."""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from importlib.util import spec_from_file_location
from typing import TYPE_CHECKING, Any

import pytest

from rma_core import policies_apart, policy_process
from rma_core.commands import run
from rma_core.confinement import available
from rma_core.detection import mapped
from rma_core.errors import PluginError
from rma_core.host import Plugins
from rma_core.interfaces import PolicyInput, TierDecision
from rma_core.models.hardware import Capabilities
from rma_core.plugin_folders import PluginFolders
from rma_core.record import from_capabilities
from tests.policy_plugins import BROKEN, children, install, source

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.machinery import ModuleSpec
    from pathlib import Path

    from rma_core.models.worker import PluginReport

MACHINES = [{"cpu_cores": 4, "ram": "8GB"}, {"cpu_cores": 8, "ram": "16GB", "name": "large"}]
#: Writes a file wherever it is imported, and says in which process.
WRITES = "import os\nopen({path!r}, 'w').write(str(os.getpid()))\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where plugins are installed; no other plugin but RMA's own, no pool, and no child that is left."""
    for name in [name for name in os.environ if name.startswith("RMA_") or name == "COORDINATOR_URL"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RMA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RMA_ONLY_PLUGINS", "host,threshold,night,late")
    monkeypatch.chdir(tmp_path)
    found = tmp_path / "installed"
    found.mkdir()
    monkeypatch.syspath_prepend(str(found))
    (tmp_path / "machines.json").write_text(json.dumps(MACHINES))
    yield found
    assert children() == []


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    code = run([*arguments, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def plugin_in(found: Any) -> dict[str, Any]:
    [one] = [one for one in found["plugins"] if one["name"] == "night"]
    return dict(one)


@pytest.mark.parametrize(
    "command",
    [
        ("plugins",),
        ("plugins", "check", "night"),
        ("doctor",),
        ("policies", "preview", "night", "--report", "machines.json"),
        ("policies", "preview", "threshold", "--report", "machines.json"),
        ("detect",),
    ],
)
@pytest.mark.parametrize("state", ["approved", "confined = false", "blocked", "not approved"])
def test_no_command_imports_a_policy_where_it_runs_nor_lets_it_write_unless_its_owner_does(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...], state: str
) -> None:
    mark = tmp_path / "imported"
    install(folder, code=WRITES.format(path=str(mark)) + source())
    (tmp_path / "home").mkdir()
    rules = {"blocked": 'block_plugins = ["night"]', "not approved": 'approve_plugins = ["another"]'}.get(state, "")
    table = "[plugins.night]\nconfined = false" if state == "confined = false" else ""
    (tmp_path / "home" / "rma.toml").write_text(f"{rules}\n{table}\n")
    said(capsys, *command)
    assert "rma_policy_night" not in sys.modules
    # A check is asked for by name, and runs what nobody has approved; an own folder it does not.
    asked = command[1:2] == ("check",) or state in ("approved", "confined = false")
    if mark.exists():
        assert asked
        assert int(mark.read_text()) != os.getpid()
        assert state == "confined = false" or not available().files


def test_it_is_used_all_the_same_and_says_what_it_says_in_a_coordinator(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(folder)
    code, found, _ = said(capsys, "plugins")
    one = plugin_in(found)
    assert (code, one["state"], one["failures"], one["import_seconds"] > 0) == (0, "active", 0, True)
    code, found, _ = said(capsys, "policies", "preview", "night", "--report", "machines.json")
    reason = "tier 7: version 1.0"
    rows = [{"name": name, "tier": 7, "reason": reason} for name in ("#1", "large")]
    assert (code, found) == (0, {"policy": "night", "machines": rows})


@pytest.mark.parametrize(
    ("code", "state", "words"),
    [
        (BROKEN, "failed", "cannot be imported: module 'a_module_that_nobody_has' is not installed here"),
        ("import os\nos._exit(7)\n", "failed", "ended with exit code 7 before it answered"),
        ("def rma_tier_policies(config): return []\n", "invalid", "rma_tier_policies is not marked"),
        (source(name="threshold"), "invalid", "it gives a policy 'threshold', and 'threshold' is built in"),
    ],
)
def test_one_that_cannot_be_used_is_named_with_its_reason_everywhere(
    folder: Path, capsys: pytest.CaptureFixture[str], code: str, state: str, words: str
) -> None:
    install(folder, code=code)
    one = plugin_in(said(capsys, "plugins")[1])
    assert (one["state"], words in one["reason"]) == (state, True)
    assert one["failures"] == (0 if "built in" in words else 1)
    [finding] = [one for one in said(capsys, "doctor")[1]["findings"] if "rma-policy-night" in one["subject"]]
    assert (finding["level"], words in finding["message"]) == ("problem", True)
    exit_code, answer, _ = said(capsys, "policies", "preview", "night", "--report", "machines.json")
    assert (exit_code, answer["error"]["code"]) == (2, "usage")
    assert words in answer["error"]["message"]


def test_a_policy_that_was_installed_and_not_approved_is_not_run_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = PluginFolders(tmp_path / "home" / "plugins").path / "rma-policy-night"
    install(own)
    own.chmod(0o700)
    for command in (("policies", "preview", "night", "--report", "machines.json"), ("plugins", "check", "night")):
        code, answer, _ = said(capsys, *command)
        assert code == 2
        assert "not approved" in answer["error"]["message"]


async def test_one_machine_that_it_dies_of_costs_the_others_nothing_and_many_end_it(folder: Path) -> None:
    install(folder)
    plugins = Plugins.discover(kinds=["policy"], only=frozenset({"threshold", "night"}))
    report = from_capabilities(Capabilities(cpu_cores=4, ram="8GB"))
    does = ["", "die", "", "raise", "", "hang", "crash", "", "die"]
    machines = [PolicyInput(report=report, labels={"does": one}) for one in does]
    async with policies_apart.started(plugins, {"night": {"deadline_s": 0.5}}) as found:
        assert set(found) == {"night"}
        decided = await found["night"].decide(machines)
    well = TierDecision(tier=7, reason="tier 7: version 1.0")
    assert [one for one, what in zip(decided, does, strict=True) if not what][:3] == [well] * 3
    words = [one for one in decided if isinstance(one, str)]
    expected = [
        "ended with exit code 3 before it answered",
        "failed: ValueError: no idea",
        "did not answer within 0.5 s",
        "crashed in native code",
        "is asked no more: its child has ended 3 times",
        "is asked no more",
    ]
    assert len(words) == len(expected)
    assert all(one.startswith(start) for one, start in zip(words, expected, strict=True)), words
    assert reported(plugins).failures == 4


def reported(plugins: Plugins) -> PluginReport:
    [one] = [one for one in plugins.reports() if one.name == "night"]
    return one


async def test_two_with_one_policy_are_both_refused_and_strict_is_an_error(folder: Path) -> None:
    install(folder)
    install(folder, name="late", code=source(name="night"))
    plugins = Plugins.discover(kinds=["policy"])
    async with policies_apart.started(plugins, {}) as found:
        assert "night" not in found
    assert "policy 'night' is given 2 times, by rma-policy-" in reported(plugins).reason
    strict = Plugins.discover(kinds=["policy"], strict=True)
    with pytest.raises(PluginError, match="given 2 times"):
        async with policies_apart.started(strict, {}):
            pass


async def test_where_no_child_can_be_started_that_is_its_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(folder)
    plugins = Plugins.discover(kinds=["policy"])

    async def none(*_: object, **__: object) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(policy_process.PolicyProcess, "start", none)
    async with policies_apart.started(plugins, {}) as found:
        assert "night" not in found
    assert reported(plugins).reason == "no child process can be started for it: no more processes"
    assert reported(plugins).failures == 0


def test_what_is_installed_editable_is_found_where_it_lies_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "rma_package"
    package.mkdir()
    for file in (tmp_path / "rma_edited.py", package / "__init__.py", tmp_path / "rma_beside.py"):
        file.write_text("raise SystemExit('imported')\n")
    places = {"rma_edited": tmp_path / "rma_edited.py", "rma_package": package / "__init__.py"}

    class Mapping:
        """As pip leaves it of a project whose folder is not put on the path."""

        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            del path, target
            return spec_from_file_location(name, places[name]) if name in places else None

    class Broken:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            raise ZeroDivisionError(name, path, target)

    monkeypatch.setattr(sys, "meta_path", [BuiltinImporter, FrozenImporter, PathFinder, Broken, Mapping])
    assert mapped("rma_edited:made.here") == [str(places["rma_edited"])]
    assert mapped("rma_package.detector") == [str(package), str(places["rma_package"])]
    # Where somebody stands just now is no place for plugins.
    monkeypatch.syspath_prepend("")
    assert mapped("rma_beside") == []
