"""The contract suites of rma_core.testing: our own plugins keep them, and each check finds what breaks it."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from rma_core.errors import NotFound, UsageProblem, ValidationProblem
from rma_core.testing.checking import CONTRACTS, Result, Target, results, targets
from tests.machine_files import lay_out
from tests.plugin_files import distribute

OURS = ("host", "nvidia", "apple", "amd", "intel", "threshold", "process", "docker", "podman")
BAD = Path(__file__).with_name("data") / "bad_detectors"


async def checked(target: Target, **table: object) -> list[Result]:
    return [result async for result in results(target.case({target.name: table}))]


def failed(done: list[Result]) -> dict[str, str]:
    return {result.check: result.message for result in done if result.state != "kept"}


@pytest.mark.parametrize("name", OURS)
async def test_our_own_plugins_do_what_they_must(name: str) -> None:
    [target] = targets(name)
    done = await checked(target)
    assert failed(done) == {}
    assert len(done) == len(CONTRACTS[target.kind][1])


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("amd", "strix-halo-128gb"),
        ("amd", "server-mi300x-lent"),
        ("intel", "desktop-arc-b580"),
        ("intel", "server-two-max-1100-no-driver"),
    ],
)
async def test_our_own_detectors_do_what_they_must_where_there_is_something_to_find(
    name: str, machine: str, tmp_path: Path
) -> None:
    lay_out((BAD.parent / name / f"{machine}.txt").read_text(), tmp_path)
    [target] = targets(name)
    assert failed(await checked(target, root=str(tmp_path))) == {}


DETECTOR = """
import os, pathlib, random, socket, subprocess, sys, time
from rma_core import Detection, Device, hookimpl

RMA_HOOK_VERSION = 1

def board(**more):
    return Detection.healthy([Device(**{"id": "npu:0", "kind": "npu", "name": "Board", **more})])

@hookimpl
def rma_detect_devices(config):
"""
POLICY = """
import ctypes, random, time
from rma_core import TierDecision, hookimpl

RMA_HOOK_VERSION = 1

class Policy:
    name, summary = "odd", "for a test"
    def decide(self, asked):
        return self.decided(asked)
    def decided(self, asked):
"""
POLICY_END = """
@hookimpl
def rma_tier_policies(config):
    return [Policy()]
"""
RUNTIME = """
import subprocess, sys
from rma_core import ContainerRuntime, ContainerState, RuntimeAbsent, RuntimeHealth, hookimpl

RMA_HOOK_VERSION = 1

class Odd(ContainerRuntime):
    name, isolated = "odd", True
    async def probe(self):
        return RuntimeHealth(state="undetected", reason="it is made for a test")
    async def has_image(self, spec): raise RuntimeAbsent("none")
    async def pull(self, spec, progress): raise RuntimeAbsent("none")
    async def start(self, spec): raise RuntimeAbsent("none")
    async def inspect(self, handle): return ContainerState(state="missing")
    async def endpoint(self, handle): raise RuntimeAbsent("none")
    async def logs(self, handle, *, tail_lines=100): return ""
    async def stats(self, handle): raise RuntimeAbsent("none")
    async def stop(self, handle, *, grace_s=10.0): return
    async def list_owned(self, worker_id): return []
"""
RUNTIME_END = """
@hookimpl
def rma_container_runtimes(config):
    return [Odd()]
"""


class Case(NamedTuple):
    """A plugin that breaks rules: its source, and words of the complaint by check."""

    source: str
    complaints: dict[str, str]
    #: Half of it is what may be used; a child's start is a good part of a second where others use the machine.
    deadline_s: float = 8


def detector(body: str, complaints: dict[str, str], *, above: str = "") -> Case:
    return Case(above + DETECTOR + textwrap.indent(textwrap.dedent(body).strip(), "    "), complaints)


def policy(body: str, complaints: dict[str, str]) -> Case:
    return Case(POLICY + textwrap.indent(textwrap.dedent(body).strip(), " " * 8) + POLICY_END, complaints)


def runtime(body: str, complaints: dict[str, str], end: str = RUNTIME_END) -> Case:
    return Case(RUNTIME + textwrap.indent(textwrap.dedent(body).strip(), "    ") + end, complaints)


UNITS, REASONS = "its devices have names and units", "its reasons are for people"
NEEDS = "it needs no more than it is given"
DETECTORS = {
    "good": detector("return board()", {}),
    "heavy": detector("return board()", {"its import is light": "loads click"}, above="import click"),
    "aged": Case(
        DETECTOR.replace("RMA_HOOK_VERSION = 1", "") + "    return board()\n",
        {"it uses nothing deprecated": "a release from 2028-01-01 on may refuse it"},
    ),
    "empty": detector("return Detection.healthy([])", {"its answer is consistent": "names no device"}),
    "twins": detector(
        "return Detection.healthy([*board().devices, *board().devices])",
        {"its answer is consistent": "'npu:0' more than once"},
    ),
    "curt": detector("return Detection.undetected('no')", {REASONS: "'no': write a sentence"}),
    "silent": detector("return board(health='unhealthy')", {REASONS: "npu:0 is unhealthy without a reason"}),
    "wordy": detector("return Detection.undetected('word ' * 200)", {REASONS: "at most 500"}),
    "megabytes": detector("return board(memory_bytes=24576)", {UNITS: "24576 bytes of memory"}),
    "gigabytes": detector("return board(attributes={'vram_gb': 24})", {UNITS: "called vram_bytes"}),
    "camels": detector("return board(attributes={'powerLimit': 1})", {UNITS: "'powerLimit' in lower case"}),
    "secrets": detector("return board(attributes={'board_serial': 'x1'})", {UNITS: "tells who the owner is"}),
    "badly_named": detector("return board(id='0')", {UNITS: "begin with 'npu:'"}),
    "changing": detector(
        "return board(attributes={'power_w': random.random()})",
        {
            "it says the same twice": "npu:0, attributes, power_w is",
            "it can be stopped while its driver hangs": "after it was stopped",
            "it can be killed": "after it was killed",
        },
    ),
    "changing_as_it_may": detector("return board(attributes={'available_w': random.random()})", {}),
    "large": detector(
        "return Detection.healthy([d for n in range(90) for d in board(id=f'npu:{n}', reason='x y ' * 400).devices])",
        {"its answer is small and quick": "bytes", REASONS: "at most 500"},
    ),
    "slow": detector("time.sleep(2.6); return board()", {"its answer is small and quick": "of 5: bound what"})._replace(
        deadline_s=5
    ),
    "loud": detector("print('hello'); return board()", {"it prints nothing": "it printed: hello"}),
    "writing": detector(
        "pathlib.Path(config['place'], 'mark').write_text('x'); return board()",
        {"it writes nothing": "mark", NEEDS: "raised PermissionError"},
    ),
    "calling": detector(
        """
        try:
            socket.create_connection(("127.0.0.1", 9), timeout=1).close()
        except OSError:
            pass
        return board()
        """,
        {"it uses no network": "127.0.0.1"},
    ),
    "prying": detector("pathlib.Path('/etc/passwd').read_text(); return board()", {NEEDS: "'/etc/passwd'"}),
    "piping": detector("read, write = os.pipe(); os.fdopen(write, 'w').write('x'); os.close(read); return board()", {}),
    "searching": detector("import ctypes.util; ctypes.util.find_library('nobody-has-it'); return board()", {}),
    "japanese": detector("return Detection.undetected('このマシンにはありません')", {}),
    "leaving": detector(
        "if not config.get('x'): subprocess.Popen(['sleep', '60'], start_new_session=True)\nreturn board()",
        {"it leaves nothing running": "sleep", NEEDS: "PermissionError", "it answers where nothing is": "it raised"},
    ),
    "trusting": detector(
        "subprocess.run([sys.executable, '-c', ''], check=True); return board()",
        {"it answers where nothing is": "where nothing can be opened, it raised FileNotFoundError"},
    ),
    "scarred": detector(
        """
        mark = pathlib.Path(config["place"], "lock")
        if mark.exists():
            return Detection.unhealthy("another one is looking: remove the lock")
        mark.write_text("x")
        try:
            subprocess.run([sys.executable, "-c", ""])
        except OSError:
            pass
        mark.unlink()
        return board()
        """,
        {
            NEEDS: "raised PermissionError",
            "it can be stopped while its driver hangs": "after it was stopped",
            "it can be killed": "after it was killed",
        },
    ),
}
DECIDED, SAME = "it decides for every machine", "it decides the same twice"
QUICK = "it decides quickly"
POLICIES = {
    "good": policy("return TierDecision(tier=None, reason='below every bar')", {}),
    "raising": policy("return 1 / asked.report.cpu_cores", {DECIDED: "0 cores, 0.0GB: raised ZeroDivisionError"}),
    "tuple": policy("return (1, 'why')", {DECIDED: "returned a tuple"}),
    "zeroth": policy("return TierDecision(tier=0, reason='why not')", {DECIDED: "its tier is 0"}),
    "true": policy("return TierDecision(tier=True, reason='why not')", {DECIDED: "its tier is a bool, True"}),
    "silent": policy("return TierDecision(tier=1, reason='')", {DECIDED: "its reason is ''"}),
    "fickle": policy("return TierDecision(tier=1, reason=f'{random.random()}')", {SAME: "and then tier 1"}),
    "grasping": policy(
        "asked.labels['mine'] = 'yes'; return TierDecision(tier=1, reason='why not')", {DECIDED: "changed the labels"}
    ),
    "picky": policy(
        "return TierDecision(tier=1, reason='why not', prefers=('No Service',))",
        {DECIDED: "what it prefers is no list of services"},
    ),
    "fractional": policy("return TierDecision(tier=float('nan'), reason='why not')", {DECIDED: "its tier is a float"}),
    "huge": policy("return TierDecision(tier=10**4000, reason='why not')", {DECIDED: "its tier is 1000"}),
    "binary": policy("return TierDecision(tier=1, reason=b'why not')", {DECIDED: "its reason is a bytes"}),
    "half_a_character": policy("return TierDecision(tier=1, reason='why \\ud800 not')", {}),
    "twins": Case(
        POLICY
        + "        return TierDecision(tier=1, reason='why not')\n"
        + POLICY_END.replace("[Policy()]", "[Policy(), Policy()]"),
        {"it gives a policy": "gives two called 'odd'"},
    ),
    "ours": Case(
        (POLICY + "        return TierDecision(tier=1, reason='why not')\n" + POLICY_END).replace(
            '"odd"', '"threshold"'
        ),
        {"it gives a policy": "'threshold' is RMA's own"},
    ),
    "slow": policy("time.sleep(0.1); return TierDecision(tier=1, reason='why not')", {QUICK: "at most 50"}),
    "curious": policy(
        """
        try:
            ctypes.CDLL("libnobody.so")
        except OSError:
            pass
        return TierDecision(tier=1, reason='why not')
        """,
        {"it looks at nothing else": "libnobody"},
    ),
    "busy": policy(
        """
        import subprocess, sys
        if not hasattr(self, "started"):
            self.started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        return TierDecision(tier=1, reason='why not')
        """,
        {"it looks at nothing else": "python", "it leaves nothing running": "it leaves running: "},
    ),
    "none": Case(
        POLICY + "        pass\n" + POLICY_END.replace("[Policy()]", "[]"),
        {"it gives a policy": "return a list", **dict.fromkeys((DECIDED, SAME, QUICK), "gives no policy")},
    ),
}
PROBED, UNKNOWN = "its probe always answers", "what is unknown is missing"
RUNTIMES = {
    "good": runtime("pass", {}),
    "raising": runtime("async def probe(self): raise OSError('no socket')", {PROBED: "probe raised OSError"}),
    "silent": runtime("async def probe(self): return RuntimeHealth(state='unhealthy')", {PROBED: "without a reason"}),
    "ageless": runtime("async def probe(self): return RuntimeHealth(state='healthy')", {PROBED: "tells its version"}),
    "odd": runtime("async def probe(self): return 'fine'", {PROBED: "probe returned 'fine'"}),
    "strict": runtime(
        "async def stop(self, handle, *, grace_s=1): raise KeyError(handle.id)", {UNKNOWN: "stop raised"}
    ),
    "none": runtime(
        "pass",
        {"it gives a runtime": "return a list", **dict.fromkeys((PROBED, UNKNOWN), "gives no runtime")},
        RUNTIME_END.replace("[Odd()]", "[]"),
    ),
    "haunted": runtime("async def inspect(self, handle): return ContainerState(state='running')", {UNKNOWN: "missing"}),
    "vague": runtime("async def inspect(self, handle): return None", {UNKNOWN: "inspect says None"}),
    "hanging": runtime(
        "async def probe(self):\n    import asyncio; await asyncio.sleep(60)", {PROBED: "probe raised TimeoutError"}
    ),
    "twins": runtime(
        "pass", {"it gives a runtime": "gives two called 'odd'"}, RUNTIME_END.replace("()]", "(), Odd()]")
    ),
    "eager": runtime(
        "pass",
        {"it contacts nothing yet": "leave that to probe()"},
        "\n@hookimpl\ndef rma_container_runtimes(config):\n"
        "    subprocess.run([sys.executable, '-c', '']); return [Odd()]\n",
    ),
}
ALL = [
    pytest.param(kind, case, id=f"{kind}-{name}")
    for kind, cases in (("detector", DETECTORS), ("policy", POLICIES), ("runtime", RUNTIMES))
    for name, case in cases.items()
]


@pytest.mark.parametrize(("kind", "case"), ALL)
async def test_each_check_finds_what_breaks_it_and_nothing_else(kind: str, case: Case, tmp_path: Path) -> None:
    (tmp_path / "odd_plugin.py").write_text(case.source)
    target = Target("odd", kind, "odd_plugin", str(tmp_path))  # type: ignore[arg-type]  # one of the kinds
    place = tmp_path / "place"
    place.mkdir()
    found = failed(await checked(target, place=str(place), deadline_s=case.deadline_s))
    assert found.keys() == case.complaints.keys(), found
    for check, words in case.complaints.items():
        assert words in found[check]


def test_every_check_is_broken_by_some_plugin_here() -> None:
    broken = {
        kind: {check for case in cases.values() for check in case.complaints}
        for kind, cases in (("detector", DETECTORS), ("policy", POLICIES), ("runtime", RUNTIMES))
    }
    # Found by the tests below, by bad detectors or by those of another kind: the check is one function for all.
    elsewhere = {"its hook fits", "it answers"}
    everywhere = set.union(*broken.values()) | elsewhere
    for kind, (_, contract) in CONTRACTS.items():
        assert {check.__name__.replace("_", " ") for check in contract} <= everywhere
        assert broken[kind]
    assert {check.__name__.replace("_", " ") for check in CONTRACTS["detector"][1]} - elsewhere == broken["detector"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "it raised ZeroDivisionError: no such luck"),
        ("returns_nothing", "its answer cannot be used: returned nothing"),
        ("segfaults", "it crashed in native code (SIGSEGV)"),
        ("exits_three", "it ended with exit code 3"),
        ("hangs", "it did not answer within 2 s"),
        ("returns_too_much", "it gave an answer of more than"),
        ("closes_its_pipe", "it closed the pipe for its answer"),
    ],
)
async def test_without_an_answer_nothing_else_can_be_told(name: str, words: str) -> None:
    done = await checked(Target(name, "detector", name, str(BAD)), deadline_s=2 if name == "hangs" else 15)
    broken = [result for result in done if result.state == "broken"]
    assert [result.check for result in broken] == ["it answers"]
    assert words in broken[0].message
    # Whether its hook fits can be told of those that were called.
    assert {result.check for result in done if result.state == "kept"} <= {"its hook fits"}


async def test_where_it_raised_is_said(tmp_path: Path) -> None:
    source = DETECTOR + "    return deeper()\n\ndef deeper():\n    return 1 / 0\n"
    (tmp_path / "odd_plugin.py").write_text(source)
    found = failed(await checked(Target("odd", "detector", "odd_plugin", str(tmp_path))))
    assert re.search(r"ZeroDivisionError: division by zero \(odd_plugin.py:\d+, in deeper\)", found["it answers"])


async def test_what_is_left_running_is_ended_with_the_check(tmp_path: Path) -> None:
    source = DETECTOR + "    subprocess.Popen(['sleep', '61.5'], start_new_session=True)\n    return board()\n"
    (tmp_path / "odd_plugin.py").write_text(source)
    seen = await Target("odd", "detector", "odd_plugin", str(tmp_path)).case({}).run()
    assert seen.left == ("sleep",)
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "61.5"]]


async def test_modules_beside_it_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "odd_helper.py").touch()
    (tmp_path / "resource.py").write_text("raise RuntimeError('not the one of Python')\n")
    (tmp_path / "odd_plugin.py").write_text("import odd_helper\n" + DETECTOR + "    return board()\n")
    assert failed(await checked(Target("odd", "detector", "odd_plugin", str(tmp_path)))) == {}


@pytest.mark.parametrize("deadline", [float("inf"), True, "5", 0, -1, 301])
def test_a_deadline_that_is_none_is_refused(deadline: object) -> None:
    with pytest.raises(UsageProblem, match="deadline_s in"):
        Target("odd", "detector", "odd").case({"odd": {"deadline_s": deadline}})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("statistics", "a module of Python's own"),
        ("", "names no module"),
        ("pa.py", "there is no"),
        ("pa", "there is no"),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_said(value: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(f'[project.entry-points."rma.detectors"]\none = "{value}"\n')
    with pytest.raises(UsageProblem, match=words):
        targets(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "words"),
    [("is_async", "hooks are plain functions"), ("lacks_a_module", "it cannot be imported"), ("misspelt", "did you")],
)
async def test_a_hook_that_does_not_fit_is_the_only_complaint(name: str, words: str) -> None:
    done = await checked(Target(name, "detector", name, str(BAD)))
    [broken] = [result for result in done if result.state == "broken"]
    assert broken.check == "its hook fits"
    assert words in broken.message


def test_a_folder_means_every_plugin_that_its_project_announces(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "two.py").touch()
    (tmp_path / "one.py").touch()
    (tmp_path / "pyproject.toml").write_text(
        '[project.entry-points."rma.detectors"]\none = "one"\n[project.entry-points."rma.policies"]\ntwo = "two:made"\n'
    )
    assert targets(str(tmp_path)) == [
        Target("one", "detector", "one", str(tmp_path)),
        Target("two", "policy", "two:made", str(tmp_path / "src")),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("[project", "cannot be read"),
        ("[project]\nname = 'x'\n", "announces no plugin"),
        ("project = 3\n", "cannot be read"),
        ("[project]\nentry-points = 3\n", "cannot be read"),
        ("[project.entry-points]\n'rma.detectors' = 3\n", "cannot be read"),
    ],
)
def test_a_folder_without_a_plugin_is_said(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises((UsageProblem, ValidationProblem), match=words):
        targets(str(tmp_path))


def test_a_name_means_the_installed_plugins_and_an_unknown_one_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = distribute(tmp_path, "rma-both", {"rma.detectors": {"both": "d"}, "rma.policies": {"both": "p"}})
    monkeypatch.syspath_prepend(str(site))
    assert [(target.kind, target.value) for target in targets("both")] == [("detector", "d"), ("policy", "p")]
    with pytest.raises(NotFound, match="no plugin called 'neither'"):
        targets("neither")
