"""What tests ask of the machine: ``need("docker")`` goes on, or skips with a reason and what to do about it.

``RMA_REQUIRE=docker,netns`` (or ``all``) turns the skip into a failure, so that CI cannot pass by running less.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rma_core import confinement
from tests import engines, podmans, real_systemd, sdks

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds for one look at the machine; an engine that takes longer to say its version is not usable for tests.
LOOK_S = 20.0

_found: dict[str, str | None] = {}
#: How a skip of ours looks in a report: what it needs, then why that is not there.
_SKIP = re.compile(r"Skipped: (?P<name>[a-z0-9-]+): (?P<reason>.*)", re.DOTALL)


def need(name: str) -> None:
    """Return if ``name`` can really be used here, else skip the test, or fail it where RMA_REQUIRE names it."""
    if name not in _found:
        _found[name] = CHECKS[name]()
    reason = _found[name]
    if reason is None:
        return
    if required(name):
        pytest.fail(f"RMA_REQUIRE asks for {name}, and it is not usable: {reason}", pytrace=False)
    pytest.skip(f"{name}: {reason}")


def required(name: str) -> bool:
    """Whether RMA_REQUIRE names it; an unknown name there is an error, for it would require nothing."""
    names = {part.strip() for part in os.environ.get("RMA_REQUIRE", "").split(",")} - {""}
    if unknown := names - set(CHECKS) - {"all"}:
        pytest.fail(f"RMA_REQUIRE: unknown {sorted(unknown)}; there are {sorted(CHECKS)}", pytrace=False)
    return name in names or "all" in names


def forget(name: str) -> None:
    """Look anew at the next ``need``: something was started or stopped."""
    _found.pop(name, None)


def summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the end of the run what could not be run here, why, and how to make that a failure."""
    # From the reports, for tests may have run in processes of their own.
    texts = [r.longrepr[2] for r in terminalreporter.stats.get("skipped", []) if isinstance(r.longrepr, tuple)]
    found = [
        (match["name"], match["reason"]) for text in texts if (match := _SKIP.match(text)) and match["name"] in CHECKS
    ]
    if not found:
        return
    terminalreporter.section("not run on this machine")
    reasons, counts = dict(found), Counter(name for name, _ in found)
    for name, count in sorted(counts.items()):
        terminalreporter.line(f"{name}: {count} not run: {reasons[name]}")
    terminalreporter.line(f"RMA_REQUIRE={','.join(sorted(counts))} makes these fail instead")


def _run(*command: str) -> str | None:
    """None if the command succeeds, else its last words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_S, check=False)
    except FileNotFoundError:
        return f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return f"`{' '.join(command)}` did not end within {LOOK_S:g} s"
    words = (done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}").splitlines()
    return None if done.returncode == 0 else words[-1]


def _advised(reason: str | None, advice: str) -> str | None:
    return reason and f"{reason}; {advice}"


def _docker() -> str | None:
    reason = _run("docker", "version", "--format", "{{.Server.Version}}")
    return _advised(reason, "start Docker, or as root: apt-get install docker.io, python -m tests.engines up")


def _own_engine() -> str | None:
    return engines.can_start_engine()


def _debootstrap() -> str | None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "making a base image needs root"
    return _advised(_run("debootstrap", "--version"), "apt-get install debootstrap")


def _registry() -> str | None:
    address = os.environ.get("RMA_TEST_REGISTRY")
    if not address:
        return "RMA_TEST_REGISTRY is not set; as root: apt-get install docker-registry, python -m tests.engines up"
    try:
        with urllib.request.urlopen(f"http://{address}/v2/", timeout=LOOK_S):
            return None
    except (OSError, urllib.error.URLError) as error:
        return f"no registry answers at {address} ({error}); python -m tests.engines up starts one"


def _netns() -> str | None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root on Linux; run the tests with sudo"
    name = f"rma-need-{os.getpid()}"
    reason = _run("ip", "netns", "add", name)
    if reason is None:
        # A namespace is of use only where a pair of interfaces can lead into it.
        reason = _run("ip", "link", "add", f"rn{os.getpid()}", "type", "veth", "peer", "netns", name)
        _run("ip", "netns", "delete", name)
    return _advised(reason, "this needs iproute2 and CAP_SYS_ADMIN (in a container: --privileged)")


def _landlock() -> str | None:
    return None if confinement.version() else "this kernel has no Landlock (Linux 5.13 or later, and not turned off)"


def _podman() -> str | None:
    return podmans.missing(rootless=False)


def _podman_rootless() -> str | None:
    return podmans.missing(rootless=True)


def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), names[0])
    return _advised(_run(found, "--version"), "apt-get install chromium")


def _nginx() -> str | None:
    return _advised(_run("nginx", "-v"), "apt-get install nginx-light")


def _redis() -> str | None:
    return _advised(_run("redis-server", "--version"), "apt-get install redis-server")


def _tesseract() -> str | None:
    return _advised(_run("tesseract", "--version"), "apt-get install tesseract-ocr")


def _gcc() -> str | None:
    return _advised(_run("gcc", "--version"), "apt-get install gcc libc6-dev")


def _go() -> str | None:
    return _advised(_run("go", "version"), "apt-get install golang-go")


def _openapi() -> str | None:
    if importlib.util.find_spec("openapi_spec_validator"):
        return None
    return "the validator of OpenAPI documents is not installed; pip install openapi-spec-validator"


def _llama() -> str | None:
    missing = [name for name in ("xllamacpp", "gguf", "rma_llama_cpp") if not importlib.util.find_spec(name)]
    return f"{', '.join(missing)} not installed; pip install -r requirements-dev.txt" if missing else None


def _node() -> str | None:
    try:
        sdks.node()
    except sdks.NotMadeError as error:
        return f"{error}; it needs Node {sdks.LEAST_NODE} and npm, or an index that pip can fetch Node from"
    return None


def _litellm() -> str | None:
    try:
        sdks.litellm()
    except sdks.NotMadeError as error:
        return f"{error}; it needs an index that pip can fetch packages from"
    return None


def _mount() -> str | None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "mounting a small file system needs root on Linux"
    with tempfile.TemporaryDirectory(prefix="rma-need-") as folder:
        reason = _run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder)
        if reason is None:
            _run("umount", folder)
    return _advised(reason, "this needs CAP_SYS_ADMIN (in a container: --privileged)")


def _cgroup_v1() -> str | None:
    for controller in ("cpu", "memory"):
        folder = Path("/sys/fs/cgroup") / controller / f"rma-need-{os.getpid()}"
        try:
            folder.mkdir()
            folder.rmdir()
        except OSError as error:
            return f"a cgroup of version 1 cannot be made ({error}); this needs root on Linux with version 1 or hybrid"
    return None


def _runc() -> str | None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "runc limits what it starts only as root"
    reason = _run("runc", "--version") or _run("/bin/busybox", "true")
    return _advised(reason, "apt-get install runc busybox-static")


def _pypi() -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        reason = _run(sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, "hatchling")
    return _advised(reason, "this needs an index that pip can fetch packages from")


#: Everything a test may ask for, with what looks for it.
CHECKS: dict[str, Callable[[], str | None]] = {
    "cgroup-v1": _cgroup_v1,
    "chromium": _chromium,
    "debootstrap": _debootstrap,
    "docker": _docker,
    "gcc": _gcc,
    "go": _go,
    "landlock": _landlock,
    "litellm": _litellm,
    "llama": _llama,
    "mount": _mount,
    "netns": _netns,
    "nginx": _nginx,
    "node": _node,
    "openapi": _openapi,
    "own-engine": _own_engine,
    "podman": _podman,
    "podman-rootless": _podman_rootless,
    "pypi": _pypi,
    "redis": _redis,
    "registry": _registry,
    "runc": _runc,
    "systemd": real_systemd.missing,
    "tesseract": _tesseract,
}
