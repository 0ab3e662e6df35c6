"""What may import what: the layers of the design, and that importing rma_core stays cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import rma_core
from rma_core import container_engine, sysfs

ROOT = Path(__file__).parent.parent
CORE = ROOT / "rma_core"

#: Heavy, or none of an agent's business; only what needs one imports it, where it is used.
HEAVY = ("quart", "hypercorn", "docker", "pynvml", "cpuinfo", "httpx", "httpx2", "psutil", "cryptography", "rich")
#: Never anywhere in rma_core: the coordinator, its server, and what plugins are for.
FOREIGN = ("quart", "hypercorn", "uvicorn", "rma_coordinator", "docker", "podman", "pynvml")
#: The one exception, and the part of rma_core that may.
ENGINE_SDK = ("docker", "container_engine")
#: What plugins import from, with the names they may.
PUBLIC = {
    "rma_core": {*rma_core.__all__, "container_engine", "sysfs"},
    "rma_core.container_engine": set(container_engine.__all__),
}
#: Bottom to top; a module imports from its own layer or from below. What is not listed is a tool below the agent.
LAYERS = (
    {"errors"},
    {"models", "catalog"},
    {"interfaces"},
    {"hookspecs"},
    {"own_files"},
    {"deprecations", "detector_files", "failures", "plugin_folders", "signatures", "offers", "host"},
    {"agent"},
    {"commands", "diagnosis", "__main__"},
)
#: The agent's side of rma_core; of the coordinator only its commands, which start both, may use it.
AGENT_SIDE = {"agent", "builtin", "child", "commands", "detection", "diagnosis", "isolation", "quarantine", "supervise"}

#: The coordinator's commands, which also start an agent beside it.
COMMANDS = {"commands", "engine_choice", "local_worker", "serving", "up"}


class Import(NamedTuple):
    """One import: of ``module``, the names taken from it, and where it stands."""

    module: str
    names: tuple[str, ...]
    place: str

    @property
    def part(self) -> str:
        """The part of rma_core that it comes from: ``models`` for ``rma_core.models.worker``; '' for the package."""
        if self.module == "rma_core":
            return next((n for n in self.names if (CORE / n).is_dir() or (CORE / f"{n}.py").exists()), "")
        return self.module.split(".")[1]


def sources(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def imports_of(path: Path) -> list[Import]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            found += [Import(alias.name, (), place) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place}: relative import"
            found.append(Import(node.module or "", tuple(alias.name for alias in node.names), place))
    return found


def from_core(path: Path) -> list[Import]:
    return [i for i in imports_of(path) if i.module.partition(".")[0] == "rma_core"]


def part_of(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def layer(part: str) -> int | None:
    return next((number for number, parts in enumerate(LAYERS) if part in parts), None)


def test_importing_rma_core_pulls_in_nothing_heavy() -> None:
    program = f"import sys, rma_core; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == []


def test_importing_rma_core_does_not_load_what_only_detectors_use() -> None:
    program = "import sys, rma_core; print('rma_core.sysfs' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == ["False"]


@pytest.mark.parametrize(
    "module",
    ["rma_core.host", "rma_core.detection", "rma_core.record", "rma_core.child", "rma_core.container_engine"],
)
def test_the_host_and_detection_pull_in_nothing_heavy_either(module: str) -> None:
    program = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == []


def test_a_coordinator_that_calls_nobody_does_not_carry_an_http_client() -> None:
    names = ("httpx2", "httpcore2", "psutil", "anyio", "truststore")
    program = f"import sys, rma_coordinator.app, rma_coordinator.server; print(*set({names!r}) & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == []


def test_pluggy_is_imported_in_the_host_and_nowhere_else() -> None:
    folders = (CORE, ROOT / "plugins", ROOT / "coordinator")
    using = {
        str(p.relative_to(ROOT)) for f in folders for p in sources(f) for i in imports_of(p) if i.module == "pluggy"
    }
    assert using == {"rma_core/host.py"}


def test_nothing_in_rma_core_knows_the_coordinator_or_what_plugins_are_for() -> None:
    foreign = [i for p in sources(CORE) for i in imports_of(p) if i.module.partition(".")[0] in FOREIGN]
    # What Docker's and Podman's runtimes share speaks Docker's API; it imports the SDK once there is an engine to ask.
    assert [i for i in foreign if (i.module.partition(".")[0], i.place.split("/")[1]) != ENGINE_SDK] == []


def test_no_layer_of_rma_core_imports_from_above() -> None:
    upwards = [
        i
        for path in sources(CORE)
        for i in from_core(path)
        if (above := layer(i.part)) is not None
        and above > (own if (own := layer(part_of(path))) is not None else layer("host") or 0)
        and part_of(path) not in ("__init__", "testing")
    ]
    assert upwards == []


def test_the_vocabulary_imports_nothing_but_itself() -> None:
    low = set().union(*LAYERS[: (layer("host") or 0) + 1])
    outside = [i for p in sources(CORE) if part_of(p) in low for i in from_core(p) if i.part not in low]
    assert outside == []


def test_the_conformance_suite_is_imported_by_no_part_of_rma_core() -> None:
    # `rma plugins check` runs it, which is why commands are left out.
    users = [i for p in sources(CORE) if part_of(p) not in ("testing", "commands") for i in from_core(p)]
    assert [i for i in users if i.part == "testing"] == []


def test_plugins_use_public_names_only_and_never_each_other() -> None:
    modules = {p.stem for p in (ROOT / "plugins").glob("*/*.py")}
    for path in sources(ROOT / "plugins"):
        for found in imports_of(path):
            assert found.module.partition(".")[0] not in {"rma_coordinator", *modules} - {path.stem}, found
            if found.module.startswith("rma_core"):
                assert found.module in PUBLIC, f"{found}: only what {' and '.join(PUBLIC)} list is public"
                assert set(found.names) <= PUBLIC[found.module], found
        used = set(re.findall(r"\bsysfs\.(\w+)", path.read_text(encoding="utf-8")))
        assert used <= set(sysfs.__all__), f"{path}: not public: {used - set(sysfs.__all__)}"


def test_the_coordinator_uses_no_code_of_the_agent() -> None:
    folder = ROOT / "coordinator" / "rma_coordinator"
    domain = [p for p in sources(folder) if p.relative_to(folder).parts[0].removesuffix(".py") not in COMMANDS]
    assert [i for p in domain for i in from_core(p) if i.part in AGENT_SIDE] == []
