"""A real systemd as the first process of namespaces of its own, with the test's units and this machine's files."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.pools import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: Where Debian and others have it; it is not on the path.
PROGRAMS = ("/lib/systemd/systemd", "/usr/lib/systemd/systemd")
CGROUPS = Path("/sys/fs/cgroup")
#: All that is started: no unit of this machine's.
UNITS = {
    "nothing.target": "[Unit]\nDefaultDependencies=no\n",
    **{f"{name}.target": "[Unit]\nDefaultDependencies=no\n" for name in ("sysinit", "basic", "network-online")},
    "multi-user.target": "[Unit]\n",
    "shutdown.target": "[Unit]\nDefaultDependencies=no\n",
}
#: In a mount namespace: what systemd writes to is hidden or empty, and it has control groups of its own.
START = """
set -eu
folder=$1 program=$2
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mount --bind "$folder/units" "$(dirname "$program")/system"
mount --bind "$folder/etc" /etc/systemd
if [ -e /sys/fs/cgroup/cgroup.procs ]; then
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
else
    mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
    mkdir /sys/fs/cgroup/systemd /sys/fs/cgroup/unified
    mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
    mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
fi
exec env -i container=test "PATH=$PATH" "$program" --system --unit=nothing.target --log-target=console
"""


class System:
    """A running systemd: commands are run beside it, as root of its machine."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in there."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--", *command]
        done = subprocess.run(
            enter, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def active(self, unit: str) -> bool:
        """Whether a unit is active."""
        return self.run("systemctl", "is-active", unit, check=False).returncode == 0

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()


def missing() -> str | None:
    """Say why systemd cannot be started here, ``None`` where it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "starting a systemd needs root on Linux; run the tests with sudo"
    for program in ("unshare", "nsenter", "systemctl"):
        if shutil.which(program) is None:
            return f"{program} is not installed; apt-get install systemd util-linux"
    if not any(map(os.path.exists, PROGRAMS)):
        return "systemd is not installed; apt-get install systemd"
    return None


@contextlib.contextmanager
def systemd(folder: Path) -> Iterator[System]:
    """Start a systemd with empty folders of units; end it, and all that it has started."""
    program = next(filter(os.path.exists, PROGRAMS))
    for name in ("units", "etc"):
        (folder / name).mkdir(parents=True)
    (folder / "etc" / "system").mkdir()
    for name, text in UNITS.items():
        (folder / "units" / name).write_text(text, encoding="utf-8")
    groups = _groups(f"rma-test-{os.getpid()}")
    # The shell enters the groups before it makes the namespace of groups, whose root they then are.
    enter = "".join(f"echo $$ > {group}/cgroup.procs; " for group in groups)
    spaces = ["unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup", "--mount-proc", "--kill-child"]
    with (folder / "systemd.log").open("wb") as log:
        process = subprocess.Popen(
            ["sh", "-c", enter + 'exec "$@"', "sh", *spaces, "sh", "-c", START, "sh", str(folder), program],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:

        def up() -> System | None:
            assert process.poll() is None, (folder / "systemd.log").read_text(errors="replace")
            found = [System(child.pid) for child in psutil.Process(process.pid).children() if _is_systemd(child)]
            return next((one for one in found if one.active("nothing.target")), None)

        yield until(up, within_s=60, what=f"systemd starts: {folder}/systemd.log")
    finally:
        # Its end is the end of all processes of its namespace.
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        for group in groups:
            until(functools.partial(_removed, group), within_s=30, what=f"{group} is empty")


def _groups(name: str) -> list[Path]:
    """Make a control group where systemd manages its own: in the one hierarchy, or in its two of several."""
    roots = [CGROUPS] if (CGROUPS / "cgroup.procs").exists() else [CGROUPS / "systemd", CGROUPS / "unified"]
    for root in roots:
        (root / name).mkdir(exist_ok=True)
    return [root / name for root in roots]


def _is_systemd(process: psutil.Process) -> bool:
    """Whether it is what the shell in the namespaces has become."""
    with contextlib.suppress(psutil.Error):
        return process.name() == "systemd"
    return False


def _removed(group: Path) -> bool:
    for folder, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()
    return not group.exists()
