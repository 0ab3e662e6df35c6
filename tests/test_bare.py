"""An installed agent: no start-up code of any package runs before it, in it or in what it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from rma_core import bare
from tests.pools import NO_ENGINE, Running, environment, pool
from tests.tiny_service import MODULE, write_wheel

if TYPE_CHECKING:
    from collections.abc import Mapping

PROGRAM = str(Path(bare.__file__))
ENTRY = f"""
service = "tiny"
name = "rma-tiny-worker"
image = "ghcr.io/rma/tiny-worker:1"
routes = ["GET /tiny"]
tiers = [1, 2, 3]

[needs]
cpu_cores = 0

[process]
distribution = "rma-tiny"
module = "{MODULE}"
"""


class Machine(NamedTuple):
    """A virtual environment in which start-up code of packages leaves a line wherever it runs."""

    python: str
    packages: Path
    ran: Path

    def lines(self) -> list[str]:
        return self.ran.read_text(encoding="utf-8").splitlines() if self.ran.exists() else []

    def output(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            [self.python, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def machine_in(folder: Path) -> Machine:
    """Make a machine that has, by `.pth` lines, what this Python has, and two packages with start-up code."""
    venv.create(folder / "venv", with_pip=False)
    [packages] = (folder / "venv").glob("lib/python*/site-packages")
    here = [path for path in sys.path if path and Path(path).is_dir()]
    (packages / "all.pth").write_text("".join(f"{path}\n" for path in here), encoding="utf-8")
    ran = folder / "ran"
    note = f"import sys; print(' '.join(sys.orig_argv), file=open({str(ran)!r}, 'a', encoding='utf-8'))\n"
    (packages / "unasked.pth").write_text(note, encoding="utf-8")
    (packages / "sitecustomize.py").write_text(note, encoding="utf-8")
    return Machine(str(folder / "venv" / "bin" / "python"), packages, ran)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return machine_in(tmp_path)


def bare_rma(machine: Machine, *arguments: str) -> list[str]:
    return [machine.python, *bare.OPTIONS, PROGRAM, *arguments]


def tiny_pool(tmp_path: Path) -> dict[str, str]:
    """Write a catalog with a service that needs nothing, and its wheel; return the settings that name them."""
    wheels, catalog = tmp_path / "wheels", tmp_path / "catalog"
    write_wheel(wheels)
    catalog.mkdir()
    (catalog / "tiny.toml").write_text(ENTRY, encoding="utf-8")
    return {**NO_ENGINE, "RMA_CATALOG": str(catalog), "RMA_SERVICE_SOURCES": str(wheels), "PIP_NO_INDEX": "1"}


@pytest.mark.parametrize("started", ["bare", "as usual"])
def test_no_start_up_code_runs_in_an_installed_agent_nor_in_what_it_starts(
    machine: Machine, tmp_path_factory: pytest.TempPathFactory, started: str
) -> None:
    home = tmp_path_factory.mktemp("b")
    env = tiny_pool(home)
    command = bare_rma(machine, "agent") if started == "bare" else [machine.python, "-m", "rma_core", "agent"]
    with pool(home / "pool", "--port", "0", "--no-agent", env=env) as made:
        token = made.json("tokens", "create")["token"]
        told = {"RMA_COORDINATOR_URL": made.url, "RMA_JOIN_TOKEN": token, "RMA_RUNTIMES": "process"}
        agent = Running(command, environment(home / "agent", {**env, **told}))
        try:
            agent.wait_for("rma-tiny-worker is healthy")
            [worker] = made.workers()
            probes = made.json("workers", worker["worker_id"])["hardware"]["probes"]
        finally:
            assert agent.stop() == 0
    states = {probe["detector"]: probe["state"] for probe in probes}
    assert states["host"] == "healthy"
    assert "unhealthy" not in states.values()
    lines = machine.lines()
    if started == "bare":
        assert lines == []
    else:
        # What would be seen: the agent, its detectors, pip, and what guards the service.
        for part in ("rma_core agent", "rma_core/child.py", "-m pip", "rma_core.supervise"):
            assert any(part in line for line in lines), f"{part} in {lines}"


def path_of(python: str, *options: str, env: Mapping[str, str]) -> list[str]:
    """Return where a Python looks for modules, with its prefixes, but for the folder in which it is started."""
    command = [python, *options, "-m", "site"]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=True)
    return [line.strip(" ,'") for line in done.stdout.splitlines() if line.startswith("    ") and "'/'" not in line]


PYVENVS = {
    "shut": "include-system-site-packages = false",
    "open": "Include-System-Site-Packages = True",
    "says nothing": "",
}


@pytest.mark.parametrize("kind", [*PYVENVS, "beside", "none"])
def test_packages_are_found_where_python_itself_finds_them(tmp_path: Path, kind: str) -> None:
    machine, home = machine_in(tmp_path), tmp_path / "user"
    config = Path(machine.python).parents[1] / "pyvenv.cfg"
    told = "".join(f"{line}\n" for line in config.read_text().splitlines() if "include-system" not in line)
    config.write_text(f"{told}{PYVENVS.get(kind, PYVENVS['open'])}\n")
    if kind == "beside":
        config.rename(Path(machine.python).parent / "pyvenv.cfg")
    python = str(sys._base_executable) if kind == "none" else machine.python  # type: ignore[attr-defined]
    ask = "import site; print(site.getusersitepackages())"
    env = {"HOME": str(home), "PATH": os.environ["PATH"]}
    mine = Path(subprocess.run([python, "-c", ask], env=env, capture_output=True, text=True, check=True).stdout.strip())
    (mine / "named").mkdir(parents=True)
    (mine / "mine.pth").write_text("named\n", encoding="utf-8")
    (mine / "archive.zip").write_bytes(b"")
    (mine / "zipped.pth").write_text("archive.zip\n", encoding="utf-8")
    usual = [path for path in path_of(python, env=env) if not path.startswith("/etc/")]
    found = path_of(python, *bare.OPTIONS, PROGRAM, env=env)
    rest = [str(Path(PROGRAM).parent.parent)]
    assert found == usual + [path for path in rest if path not in usual]
    assert (str(mine) in found, str(mine / "archive.zip") in found) == (kind != "shut", kind != "shut")
    ask = "import sys; print(sys.prefix, sys.exec_prefix, sys.flags.utf8_mode)"
    (machine.packages / "asks.py").write_text(ask, encoding="utf-8")
    if kind != "none":
        prefix = str(Path(machine.python).parents[1])
        assert machine.output(*bare.OPTIONS, PROGRAM, "-m", "asks").split() == [prefix, prefix, "1"]


def test_pth_files_name_folders_and_nothing_else(machine: Machine, tmp_path: Path) -> None:
    named, beside = tmp_path / "named", machine.packages / "beside"
    for folder in (named, beside, tmp_path / "hidden", tmp_path / "commented"):
        folder.mkdir()
    lines = f"# {tmp_path}/commented\n\n{named}\nbeside\n/nowhere/at/all\nimport\tos\nimport os; os.abort()\n"
    lines += f"import {'x' * 5000}\n"
    (machine.packages / "some.pth").write_text(lines, encoding="utf-8-sig")
    (machine.packages / ".hidden.pth").write_text(f"{tmp_path}/hidden\n", encoding="utf-8")
    (machine.packages / "broken.pth").write_bytes(b"\xff\xfe\x00")
    found = machine.output(*bare.OPTIONS, PROGRAM, "-m", "site").splitlines()
    assert f"    {str(named)!r}," in found
    assert f"    {str(beside)!r}," in found
    assert not any("hidden" in line or "commented" in line or "nowhere" in line for line in found)


def test_it_runs_only_where_nothing_ran_before(machine: Machine) -> None:
    for options in ([], ["-I"], ["-S"]):
        done = subprocess.run(
            [machine.python, *options, PROGRAM, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 1
        assert f"start it as: {machine.python} -I -S" in done.stderr
    assert machine.output(*bare.OPTIONS, PROGRAM, "--version").startswith("rma, version ")


def test_a_module_is_run_as_this_python_was(machine: Machine, tmp_path: Path) -> None:
    assert bare.module("pip", "list") == [sys.executable, "-P", "-m", "pip", "list"]
    asks = f"""
import asyncio
from pathlib import Path
from rma_core import bare
from rma_core.builtin import cpuid
from rma_core.policy_process import PolicyProcess
from rma_core.publisher import index_of_pip
async def policies():
    process = await PolicyProcess.start("rma_core.builtin.threshold", {{}})
    await process.close()
    return process.hello.outcome
print(bare.module("pip"), asyncio.run(policies()))
print(cpuid.read(Path({str(tmp_path)!r})).instruction_sets != (), index_of_pip() != "")
"""
    (machine.packages / "asks.py").write_text(asks, encoding="utf-8")
    said = machine.output(*bare.OPTIONS, PROGRAM, "-m", "asks").splitlines()
    assert said == [f"{[machine.python, *bare.OPTIONS, PROGRAM, '-m', 'pip']} answered", "True True"]
    assert machine.lines() == []
    (tmp_path / "cpuid.json").unlink()
    machine.output("-m", "asks")
    words = " ".join(machine.lines())
    assert all(part in words for part in ("-m cpuinfo", "-m pip", "policy_child.py"))
