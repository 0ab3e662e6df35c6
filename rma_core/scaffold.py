"""`rma plugins new`: the files of a plugin that works as it is, for its author to change."""

from __future__ import annotations

import re
from string import Template
from typing import TYPE_CHECKING, NamedTuple

from rma_core.errors import UsageProblem
from rma_core.host import KINDS

if TYPE_CHECKING:
    from pathlib import Path

    from rma_core.host import Kind

#: How the distributions and modules of each kind begin.
PREFIXES: dict[Kind, str] = {"detector": "detect", "runtime": "runtime", "policy": "policy"}

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
#: What a name may be at most: it stands in file names, and in front of tables.
MOST_CHARACTERS = 40

PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.27,<2"]
build-backend = "hatchling.build"

[project]
name = "$distribution"
version = "0.1.0"
description = "RMA plugin: $summary"
requires-python = ">=3.11"
dependencies = ["$core>=$version,<$next"]

[project.entry-points."$group"]
$name = "$module"

[tool.hatch.build]
only-include = ["$module.py"]
dev-mode-dirs = ["."]
"""

DETECTOR = '''\
"""Finds $title devices on the PCI bus."""

from pathlib import Path

from rma_core import ContainerAccess, Detection, Device, hookimpl, sysfs

#: The version of RMA's hooks that this was written for.
RMA_HOOK_VERSION = $hooks
#: As `lspci -nn` shows them, [vendor:device]; nobody's yet.
VENDOR = "0xffff"
MODELS = {"0x0001": "$title"}
#: What it is (gpu, npu), how it is programmed (cuda, rocm, metal, level_zero, vulkan; None: another way), its memory.
KIND = "npu"
API = None
MEMORY_BYTES = 8 * 2**30
#: How a container gets it: CDI names, or device nodes such as "/dev/accel/accel0".
ACCESS = ContainerAccess(device_nodes=())


@hookimpl
def rma_detect_devices(config):
    """Return the $title devices of this machine."""
    root = Path(config.get("root", "/"))
    cards = [card for card in sysfs.pci_devices(root) if card.vendor == VENDOR and card.device in MODELS]
    if not cards:
        return Detection.undetected(f"no $title device on the PCI bus (below {root})")
    return Detection.healthy([device_of(card) for card in cards])


def device_of(card):
    """Return what is told of a card."""
    name = MODELS[card.device]
    return Device(id=f"{KIND}:{card.address}", kind=KIND, name=name, api=API, memory_bytes=MEMORY_BYTES, access=ACCESS)
'''

DETECTOR_TEST = '''\
"""What $distribution does: what every detector must (`rma plugins check`), and what it is for."""

import $module as plugin

pytest_plugins = ["rma_core.testing.pytest_plugin"]


def test_it_does_what_every_detector_must(rma_check):
    rma_check()


def test_a_device_in_a_slot_is_found(tmp_path):
    for slot, model in ("0000:01:00.0", next(iter(plugin.MODELS))), ("0000:02:00.0", "0xfffe"):
        folder = tmp_path / "sys/bus/pci/devices" / slot
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{plugin.VENDOR}\\n")
        (folder / "device").write_text(f"{model}\\n")
    found = plugin.rma_detect_devices({"root": str(tmp_path)})
    assert [device.id for device in found.devices] == [f"{plugin.KIND}:0000:01:00.0"]


def test_where_none_is_that_is_said(tmp_path):
    found = plugin.rma_detect_devices({"root": str(tmp_path)})
    assert (found.state, found.devices) == ("undetected", ())
    assert str(tmp_path) in found.reason
'''

POLICY = '''\
"""The tier policy `$name`."""

from rma_core import TierDecision, hookimpl

#: The version of RMA's hooks that this was written for.
RMA_HOOK_VERSION = $hooks
#: From so many cores on a machine without a GPU is in tier 2.
CORES = 4


class ${klass}Policy:
    """Sorts machines by their GPU, then by their cores."""

    name = "$name"
    summary = f"tier 1 with a GPU, tier 2 from {CORES} cores on, tier 3 for the rest"

    def decide(self, asked):
        """Return the tier of one machine, and why."""
        report = asked.report
        if report.gpus:
            return TierDecision(tier=1, reason=f"tier 1: it has {report.gpus[0].name}")
        tier = 2 if report.cpu_cores >= CORES else 3
        return TierDecision(tier=tier, reason=f"tier {tier}: no GPU and {report.cpu_cores} cores")


@hookimpl
def rma_tier_policies(config):
    """Return the policy."""
    return [${klass}Policy()]
'''

POLICY_TEST = '''\
"""What $distribution does: what every policy must (`rma plugins check`), and what it is for."""

import pytest
from rma_core import Capabilities, HardwareReport, PolicyInput

import $module as plugin

pytest_plugins = ["rma_core.testing.pytest_plugin"]


def test_it_does_what_every_policy_must(rma_check):
    rma_check()


@pytest.mark.parametrize(("cores", "tier"), [(plugin.CORES, 2), (plugin.CORES - 1, 3)])
def test_cores_decide_where_there_is_no_gpu(cores, tier):
    machine = HardwareReport(capabilities=Capabilities(cpu_cores=cores, ram="16GB"))
    assert plugin.${klass}Policy().decide(PolicyInput(report=machine)).tier == tier
'''

RUNTIME = '''\
"""$title as a container runtime; its engine speaks Docker's API."""

from pathlib import Path

from rma_core import RuntimeAbsent, hookimpl
from rma_core.container_engine import Address, EngineRuntime, Product

#: The version of RMA's hooks that this was written for.
RMA_HOOK_VERSION = $hooks
#: Where its engine listens, unless `host` in [plugins.$name] says otherwise.
SOCKET = "unix:///run/$name/$name.sock"


class ${klass}Engine(Product):
    """What is particular about $title, beside what Docker does."""

    name = "$name"
    title = "$title"
    prune = "$name system prune"
    login = "$name login"

    def start_advice(self):
        """Say how its owner starts it."""
        return "start it (sudo systemctl start $name)"

    def permission_advice(self):
        """Say how this user comes to be let in."""
        return "add this user to the group that owns its socket"


class ${klass}Runtime(EngineRuntime):
    """Runs services in containers of $title."""

    name = ${klass}Engine.name
    product = ${klass}Engine()

    def __init__(self, config):
        """Keep the settings; the engine is looked for at the first call."""
        super().__init__()
        self._host = str(config.get("host", SOCKET))

    def _locate(self):
        """Return where the engine is."""
        if self._host.startswith("unix://") and not Path(self._host.removeprefix("unix://")).exists():
            raise RuntimeAbsent(f"$title does not run: there is no socket at {self._host}")
        return Address(self._host)


@hookimpl
def rma_container_runtimes(config):
    """Return the one runtime; nothing is contacted yet."""
    return [${klass}Runtime(config)]
'''

RUNTIME_TEST = '''\
"""What $distribution does: what every runtime must (`rma plugins check`), and what it is for.

With an engine at hand, `runtime_contract` of rma_core.testing tries it with real containers.
"""

import asyncio

import $module as plugin

pytest_plugins = ["rma_core.testing.pytest_plugin"]


def test_it_does_what_every_runtime_must(rma_check):
    rma_check()


def test_without_its_engine_it_says_where_it_looked(tmp_path):
    [runtime] = plugin.rma_container_runtimes({"host": f"unix://{tmp_path}/none.sock"})
    health = asyncio.run(runtime.probe())
    assert health.state != "healthy"
    assert str(tmp_path) in health.reason
'''

#: What of a kind is described in its pyproject.toml, its module and its test.
TEMPLATES: dict[Kind, tuple[str, str, str]] = {
    "detector": ("finds $title devices", DETECTOR, DETECTOR_TEST),
    "policy": ("sorts machines into tiers", POLICY, POLICY_TEST),
    "runtime": ("runs services in containers of $title", RUNTIME, RUNTIME_TEST),
}


class Scaffold(NamedTuple):
    """What was made: the plugin's entry-point name and kind, its folder, and its files there."""

    name: str
    kind: Kind
    folder: Path
    files: tuple[str, ...]


def named(text: str, kind: Kind | None) -> tuple[str, Kind]:
    """Return a plugin's name and kind from what its author calls it (``detect_foo``, ``rma-detect-foo``, ``foo``).

    Raises UsageProblem for a name that cannot be one, and for two kinds at once.
    """
    words = re.sub(r"[-. ]+", "_", text.strip().lower()).removeprefix("rma_")
    for found, prefix in PREFIXES.items():
        if words.startswith(f"{prefix}_"):
            if kind not in (None, found):
                raise UsageProblem(f"{text!r} is a {found} by its name, and a {kind} by --kind")
            words, kind = words.removeprefix(f"{prefix}_"), found
            break
    # Pytest takes files called so for tests.
    if not _NAME.fullmatch(words) or len(words) > MOST_CHARACTERS or words.endswith(("_test", "test")):
        hints = (f"letters, digits and _, at most {MOST_CHARACTERS}; for example `rma plugins new detect_foo`",)
        raise UsageProblem(f"a plugin cannot be called {text!r}", hints=hints)
    return words, kind or "detector"


def create(text: str, kind: Kind | None, below: Path) -> Scaffold:
    """Write a new plugin into a folder of its own ``below``. Raises UsageProblem where there is one already."""
    from rma_core import HOOK_VERSION, __version__

    name, kind = named(text, kind)
    stem = f"{PREFIXES[kind]}_{name}"
    module, folder = f"rma_{stem}", below / stem
    major, minor, *_ = __version__.split(".")
    values = {
        "name": name,
        "title": name.replace("_", " ").capitalize(),
        "klass": "".join(word.capitalize() for word in name.split("_")),
        "module": module,
        "distribution": module.replace("_", "-"),
        "group": KINDS[kind],
        "core": "rma-core[container-engine]" if kind == "runtime" else "rma-core",
        "hooks": str(HOOK_VERSION),
        "version": f"{major}.{minor}",
        "next": f"{major}.{int(minor) + 1}",
    }
    summary, code, test = TEMPLATES[kind]
    values["summary"] = Template(summary).substitute(values)
    texts = {"pyproject.toml": PYPROJECT, f"{module}.py": code, f"test_{module}.py": test}
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UsageProblem(f"{folder} is there already", hints=("choose another name, or remove it first",)) from None
    for file, template in texts.items():
        (folder / file).write_text(Template(template).substitute(values), encoding="utf-8")
    return Scaffold(name, kind, folder, tuple(texts))
