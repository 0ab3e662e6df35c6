"""A plugin with a tier policy in several versions, installed in a folder, that behaves as a machine's label says."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import psutil

from rma_core.policy_process import PROGRAM
from tests.plugin_files import distribute

if TYPE_CHECKING:
    from pathlib import Path

#: What the label ``does`` makes the policy do; ``config["hangs"]`` names a file while which is there it hangs for all.
SOURCE = """
import ctypes, os, socket, subprocess, sys, time
from rma_core import TierDecision, hookimpl

class Night:
    summary = "for tests"

    def __init__(self, name, config):
        self.name, self.config = name, config

    def decide(self, asked):
        does, answer = asked.labels.get("does", ""), TierDecision(tier={tier}, reason="tier {tier}: version {version}")
        if does == "hang" or os.path.exists(self.config.get("hangs", "")):
            time.sleep(3600)
        if does == "raise":
            raise ValueError("no idea")
        if does == "leave":
            sys.exit(3)
        if does == "die":
            os._exit(3)
        if does == "crash":
            ctypes.string_at(0)
        if does == "leak":
            held = []
            while True:
                held.append(bytearray(1024 * 1024))
        if does == "print":
            print("hello", flush=True)
            os.write(1, b"{{}}\\n")
        if does == "read":
            return TierDecision(tier=1, reason=open(asked.labels["file"]).read())
        if does == "connect":
            socket.create_connection(("127.0.0.1", 9), 1)
        if does == "start":
            subprocess.Popen(["sleep", "3600"], start_new_session=True)
        if does == "answer":
            for number in range(3, 20):
                try:
                    os.write(number, b"{{}}\\n" * 3)
                except OSError:
                    pass
        if does == "environment":
            return TierDecision(tier=1, reason=" ".join(sorted(os.environ)))
        return {{"gold": {{"tier": "gold", "reason": ""}}, "nothing": None, "high": TierDecision(tier=100, reason=""),
                "much": TierDecision(tier=1, reason="x" * 10_000_000)}}.get(does, answer)

@hookimpl
def rma_tier_policies(config):
    return [Night(name, config) for name in config.get("names", ["{name}"])]
"""
BROKEN = "import a_module_that_nobody_has\n"


def source(*, tier: int = 7, version: str = "1.0", name: str = "night") -> str:
    return SOURCE.format(tier=tier, version=version, name=name)


def install(folder: Path, version: str = "1.0", *, tier: int = 7, name: str = "night", code: str | None = None) -> None:
    """Install a version in place of any other, as pip leaves it."""
    module = f"rma_policy_{name}"
    uninstall(folder, name)
    code = source(tier=tier, version=version, name=name) if code is None else code
    points = {"rma.policies": {name: module}}
    distribute(folder, f"rma-policy-{name}", points, version=version, modules={module: code})


def uninstall(folder: Path, name: str = "night") -> None:
    for old in folder.glob(f"rma_policy_{name}-*.dist-info"):
        shutil.rmtree(old)
    (folder / f"rma_policy_{name}.py").unlink(missing_ok=True)


def children(of: int | None = None) -> list[psutil.Process]:
    """Return the children with policies of a process; of this one unless given."""
    found = []
    for process in psutil.Process(of).children(recursive=True):
        try:
            if PROGRAM in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
