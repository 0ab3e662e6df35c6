"""A real Podman for the tests alone, with or without root: ``python -m tests.podmans down --folder FOLDER``.

Each has storage, settings, network and, without root, a user of its own. It touches no Podman that already runs on this
machine, several can be used at once, and ``close`` leaves nothing. This needs root and Debian's podman, runc, netavark,
slirp4netns, fuse-overlayfs, uidmap, catatonit, iptables and iproute2; no systemd. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import secrets
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests import engines
from tests.engines import EngineProblem

#: Seconds for one call of podman: it copies layers file by file where it must.
CALL_S = 120.0
#: The first and last N of the networks 10.N.0.0/16; those above are the Docker engines'.
FIRST_NETWORK, LAST_NETWORK = 151, 200
#: Interfaces that mark a network as taken.
LOCK = "rmapodlock"
#: Sysctl that Podman's network sets and leaves.
FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
#: What containers without root need, and how its users are called.
DEVICES = (Path("/dev/net/tun"), Path("/dev/fuse"))
USERS = "rma-test-"
#: Chains of the firewall that all of Podman's networks share.
CHAINS = (
    ("filter", "NETAVARK_FORWARD"),
    ("nat", "NETAVARK-HOSTPORT-DNAT"),
    ("nat", "NETAVARK-HOSTPORT-MASQ"),
    ("nat", "NETAVARK-HOSTPORT-SETMARK"),
)
#: Control groups that Podman and its runtime make and leave where there is no systemd.
LEFT_GROUPS = ("libpod_parent", "conmon")
PROGRAMS = {
    "podman": "podman",
    "runc": "runc",
    "catatonit": "catatonit",
    "iptables": "iptables",
    "ip": "iproute2",
}
ROOTLESS_PROGRAMS = {"newuidmap": "uidmap", "slirp4netns": "slirp4netns", "setpriv": "util-linux", "useradd": "passwd"}
CONTAINERS_CONF = """
[containers]
log_driver = "k8s-file"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
runtime = "runc"
static_dir = "{folder}/storage/libpod"
tmp_dir = "{folder}/tmp"
volume_path = "{folder}/storage/volumes"
"""
STORAGE_CONF = """
[storage]
driver = "{driver}"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""
REGISTRIES_CONF = """
unqualified-search-registries = []
short-name-mode = "disabled"
[[registry]]
location = "127.0.0.1"
insecure = true
"""


@dataclass
class Podman:
    """One Podman below ``folder``; ``user`` is whom it runs as, empty for root."""

    folder: Path
    user: str = ""

    @property
    def environ(self) -> dict[str, str]:
        """The variables by which every podman program is this one."""
        settings = {f"CONTAINERS_{name}": str(self.folder / file) for name, file in FILES.items()}
        own = {"HOME": str(self.folder / "home"), "XDG_RUNTIME_DIR": str(self.folder / "xdg"), "USER": self.user}
        plain = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "PYTHONPATH")}
        return {**plain, **settings, **(own if self.user else {"HOME": os.environ.get("HOME", "/root")})}

    @property
    def agent_environ(self) -> dict[str, str]:
        """The same for an agent that runs as root while its podman runs as the user."""
        return {**self.environ, "PATH": f"{self.folder / 'bin'}:{os.environ.get('PATH', os.defpath)}"}

    @property
    def home(self) -> Path:
        """A folder of the user's, for an agent."""
        return self.folder / "agent"

    def command(self, *arguments: str) -> list[str]:
        """A command, as this Podman's user."""
        if not self.user:
            return list(arguments)
        known = pwd.getpwnam(self.user)
        identity = [f"--reuid={known.pw_uid}", f"--regid={known.pw_gid}", "--clear-groups", "--inh-caps=-all"]
        return ["setpriv", *identity, "--", *arguments]

    def run(self, *arguments: str, stdin: bytes | None = None) -> str:
        """Call podman; returns its stdout, raises with its stderr."""
        words = self.command("podman", *arguments)
        done = subprocess.run(
            words, input=stdin, capture_output=True, timeout=CALL_S, check=False, env=self.environ, cwd="/"
        )
        if done.returncode != 0:
            raise EngineProblem(f"{' '.join(words)}: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout.decode(errors="replace")

    def prepare(self) -> None:
        """Write its settings and take its network."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o711)
        for name in ("home", "xdg", "agent", "networks", "storage", "run", "tmp"):
            (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        # Overlay on an overlay needs root, and a place that is none; vfs works everywhere and copies every layer.
        texts = {"CONF": CONTAINERS_CONF, "STORAGE_CONF": STORAGE_CONF, "REGISTRIES_CONF": REGISTRIES_CONF}
        driver = "vfs" if _on_overlay(self.folder) else "overlay"
        for name, text in texts.items():
            (self.folder / FILES[name]).write_text(text.format(folder=self.folder, driver=driver))
            (self.folder / FILES[name]).chmod(0o644)
        if self.user:
            known = pwd.getpwnam(self.user)
            for path in self.folder.iterdir():
                os.chown(path, known.pw_uid, known.pw_gid)
            self._program(known.pw_uid, known.pw_gid)
            # As udev has them; without it they are root's alone.
            (self.folder / "before").write_text(" ".join(f"{device.stat().st_mode:o}" for device in DEVICES))
            for device in DEVICES:
                device.chmod(0o666)
        else:
            (self.folder / "before").write_text(f"{FORWARD.read_text().strip()} {int('NETAVARK' in _rules())}")
            self._network()

    def _program(self, uid: int, gid: int) -> None:
        """Write a ``podman`` that becomes the user first, and lets it into the folder of the socket it is given."""
        program = self.folder / "bin" / "podman"
        program.parent.mkdir(mode=0o755, exist_ok=True)
        become = f"setpriv --reuid={uid} --regid={gid} --clear-groups --inh-caps=-all --pdeathsig=TERM"
        program.write_text(
            "#!/bin/sh\nfor last; do :; done\n"
            'case "$last" in unix://*) socket=${last#unix://}; folder=${socket%/*}\n'
            f'    chown {uid}:{gid} "$folder" "${{folder%/*}}" ;;\nesac\n'
            f'exec {become} -- {shutil.which("podman")} "$@"\n'
        )
        program.chmod(0o755)

    def _network(self) -> None:
        number = _take_network()
        (self.folder / "number").write_text(str(number))
        # Two that make them at once would stand in each other's way.
        for table, chain in CHAINS:
            _iptables(table, "--new-chain", chain)
        network = {
            "name": "podman",
            "id": secrets.token_hex(32),
            "driver": "bridge",
            "network_interface": f"rmapod{number}",
            "created": "2026-01-01T00:00:00Z",
            "subnets": [{"subnet": f"10.{number}.0.0/16", "gateway": f"10.{number}.0.1"}],
            "ipv6_enabled": False,
            "internal": False,
            "dns_enabled": False,
            "ipam_options": {"driver": "host-local"},
        }
        (self.folder / "networks" / "podman.json").write_text(json.dumps(network))

    def processes(self) -> list[int]:
        """Every process of it: by its folder in the command line and, without root, by the user."""
        found = set(engines.processes_of(self.folder)) - {os.getpid()}
        if self.user:
            found |= {pid for pid in engines.process_ids() if _owner(pid) in _ids_of(self.user)}
        return sorted(pid for pid in found if engines.command_line(pid))

    def close(self) -> None:
        """Remove everything it made: containers, processes, mounts, network, firewall's rules, user, files."""
        if (self.folder / FILES["CONF"]).exists():
            with contextlib.suppress(EngineProblem, subprocess.TimeoutExpired, KeyError):
                self.run("rm", "--all", "--force", "--time=0")
        with contextlib.suppress(KeyError):
            engines.end_processes(self.processes)
        engines.unmount_below(self.folder)
        if self.user:
            subprocess.run(["userdel", "--force", self.user], capture_output=True, check=False, timeout=CALL_S)
            self._give_devices_back()
        else:
            self._give_network_back()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _give_devices_back(self) -> None:
        if any(entry.pw_name.startswith(USERS) for entry in pwd.getpwall()):
            return
        with contextlib.suppress(OSError, ValueError):
            for device, mode in zip(DEVICES, (self.folder / "before").read_text().split(), strict=True):
                device.chmod(int(mode, 8) & 0o777)

    def _give_network_back(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            number = int((self.folder / "number").read_text())
            for name in (f"rmapod{number}", f"{LOCK}{number}"):
                subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False, timeout=CALL_S)
            forward, rules = (self.folder / "before").read_text().split()
            if LOCK in engines.call("ip", "link"):
                return
            FORWARD.write_text(forward)
            if rules == "0":
                _remove_rules()
        _remove_empty_groups()


FILES = {"CONF": "containers.conf", "STORAGE_CONF": "storage.conf", "REGISTRIES_CONF": "registries.conf"}


def missing(*, rootless: bool) -> str | None:
    """Why no Podman of our own can be used here; None when one can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a Podman for the tests alone needs root on Linux"
    programs = {**PROGRAMS, **(ROOTLESS_PROGRAMS if rootless else {})}
    absent = [package for name, package in programs.items() if shutil.which(name, path=engines.search_path()) is None]
    absent += [] if any(Path(place, "netavark").exists() for place in NETAVARK) else ["netavark"]
    if absent:
        return f"not installed: apt-get install {' '.join(absent)}"
    if rootless and not all(device.exists() for device in DEVICES):
        return "there is no /dev/net/tun or /dev/fuse here, which containers without root need"
    return None


NETAVARK = ("/usr/lib/podman", "/usr/libexec/podman", "/usr/local/libexec/podman")


def make_user(folder: Path) -> str:
    """Make a user with a range of ids to give away; returns its name."""
    name = f"{USERS}{secrets.token_hex(3)}"
    for file in ("/etc/subuid", "/etc/subgid"):
        # useradd gives ranges only where these exist.
        Path(file).touch()
    engines.call("useradd", "--no-create-home", "--home-dir", str(folder / "home"), "--shell", "/bin/sh", name)
    if name not in Path("/etc/subuid").read_text():
        engines.call("usermod", "--add-subuids=524288-589823", "--add-subgids=524288-589823", name)
    return name


def _ids_of(user: str) -> set[int]:
    """The ids that processes of a user may have: its own, and those of its range."""
    ids = {pwd.getpwnam(user).pw_uid}
    for line in Path("/etc/subuid").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == user:
            first, _, count = rest.partition(":")
            ids |= set(range(int(first), int(first) + int(count)))
    return ids


def _owner(pid: int) -> int:
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return -1


def _on_overlay(folder: Path) -> bool:
    done = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=False)
    return "overlay" in done.stdout


def _remove_empty_groups() -> None:
    """Take away the control groups that nothing runs in; the kernel keeps all others."""
    for name in LEFT_GROUPS:
        for parent in [*engines.CONTROL_GROUPS.glob(name), *engines.CONTROL_GROUPS.glob(f"*/{name}")]:
            for group in sorted((path for path in [parent, *parent.rglob("*")] if path.is_dir()), reverse=True):
                with contextlib.suppress(OSError):
                    group.rmdir()


def _take_network() -> int:
    used = engines.call("ip", "-4", "-o", "address")
    for number in range(FIRST_NETWORK, LAST_NETWORK + 1):
        if f" 10.{number}." in used:
            continue
        # The kernel refuses a second link of the same name: that is the lock between those prepared at once.
        with contextlib.suppress(EngineProblem):
            engines.call("ip", "link", "add", f"{LOCK}{number}", "type", "bridge")
            return number
    raise EngineProblem(f"no free network: `ip link` shows {LOCK}… of Podmans never closed")


def _rules() -> str:
    done = subprocess.run(
        ["iptables-save"], capture_output=True, text=True, check=False, env={"PATH": engines.search_path()}
    )
    return done.stdout


def _remove_rules() -> None:
    """Take away the chains that Podman's network leaves in the firewall."""
    table = ""
    for line in sorted(_by_table(_rules()), key=lambda pair: pair[1].startswith(":")):
        table, rule = line
        if rule.startswith("-A"):
            _iptables(table, "-D", *shlex.split(rule)[1:])
    for table, rule in _by_table(_rules()):
        if rule.startswith(":"):
            _iptables(table, "-X", rule[1:].split()[0])


def _by_table(rules: str) -> list[tuple[str, str]]:
    """The lines of a saved firewall that are about Podman's chains, each with its table."""
    found, table = [], ""
    for line in rules.splitlines():
        table = line[1:] if line.startswith("*") else table
        if "NETAVARK" in line and line[:1] in "-:":
            found.append((table, line))
    return found


def _iptables(table: str, *arguments: str) -> None:
    words = ["iptables", "--wait", "-t", table, *arguments]
    subprocess.run(words, capture_output=True, check=False, timeout=CALL_S, env={"PATH": engines.search_path()})


def find(folder: Path) -> Podman:
    """The Podman that a killed run left in a folder, whoever its user was."""
    users = [entry.pw_name for entry in pwd.getpwall() if entry.pw_dir == str(folder / "home")]
    return Podman(folder, users[0] if users else "")


def main() -> int:
    """The command: close what a killed run left."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("down",))
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder.resolve() / "podman"
    if folder.exists():
        find(folder).close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
