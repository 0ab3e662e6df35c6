"""A real Docker engine and a real registry for the tests: ``python -m tests.engines up|down|status``.

Both are private: own folder, own socket, own bridge, a free port on loopback. They touch neither the Docker that may
already run on this machine nor its firewall, several of them can run at once, and ``down`` leaves nothing. They need
root, ``dockerd`` and ``docker-registry`` (Debian: docker.io, docker-registry, iproute2); no systemd. Standard library
only, so that this runs before there is a virtual environment.

``up`` prints what the tests need to know as ``NAME=value`` lines on stdout, everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import getpass
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Where ``up`` puts everything unless told otherwise. Short, for paths of sockets end at 107 bytes.
DEFAULT_FOLDER = Path(tempfile.gettempdir()) / f"rma-engines-{getpass.getuser()}"
#: The longest path below an engine's folder that must fit a socket's name.
LONGEST_SOCKET = "exec/containerd/containerd.sock.ttrpc"
#: Bytes the kernel takes for the name of a socket.
SOCKET_NAME_BYTES = 107
#: Seconds until a started engine or registry must answer; 1 to 2 are usual.
START_S = 60.0
#: Seconds until a new process shows its command line; it takes microseconds.
EXEC_S = 1.0
#: Seconds an engine gets to stop its containers and itself; then it is killed.
STOP_S = 30.0
#: Seconds between two looks at something that is starting or stopping.
LOOK_EVERY_S = 0.05
#: Seconds for one call of the docker client.
CALL_S = 60.0
MOUNTS = Path("/proc/self/mountinfo")
CONTROL_GROUPS = Path("/sys/fs/cgroup")


class EngineProblem(Exception):
    """The engine or registry could not be started or stopped; the sentence says why."""


@dataclass
class Daemon:
    """One process that outlives the one that started it; ``name`` is its program, ``folder`` holds all it writes."""

    folder: Path
    name: str = ""

    @property
    def log(self) -> Path:
        """What the process said."""
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """Its process id while it runs. The folder in its command line proves that no other process got the number."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.folder / f"{self.name}.pid").read_text())
            return pid if str(self.folder) in command_line(pid) else None
        return None

    def spawn(self, *arguments: str) -> None:
        """Start it in a session of its own, with its words in ``log``."""
        program = shutil.which(self.name, path=search_path())
        if program is None:
            raise EngineProblem(f"{self.name} is not installed (Debian: apt-get install docker.io docker-registry)")
        # Not Popen, which complains when it is forgotten while its process runs: this one is meant to outlive us.
        pid = os.posix_spawn(
            program,
            [program, *arguments],
            {**os.environ, "PATH": search_path(), "NO_PROXY": "127.0.0.1,localhost"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        (self.folder / f"{self.name}.pid").write_text(str(pid))
        # For an instant after exec the kernel shows no command line yet, as it does for the dead.
        wait_for(lambda: self.pid is not None, EXEC_S)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait until it answers; raise with its last words when it ends, or does not answer within START_S."""
        deadline = time.monotonic() + START_S
        while not ready():
            if self.pid is None or time.monotonic() > deadline:
                last = "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])
                raise EngineProblem(f"{self.name} did not start:\n{last}")
            time.sleep(LOOK_EVERY_S)

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop it with ``how`` and wait for its end; SIGKILL follows after STOP_S."""
        for number in (how, signal.SIGKILL):
            if (pid := self.pid) is None:
                break
            os.kill(pid, number)
            wait_for(functools.partial(gone, pid), STOP_S)


@dataclass
class Engine(Daemon):
    """A dockerd of our own; ``host`` is what goes into DOCKER_HOST."""

    name: str = "dockerd"

    @property
    def host(self) -> str:
        """The address for DOCKER_HOST and ``docker --host``."""
        return f"unix://{self.folder}/docker.sock"

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self.pid is not None

    def docker(self, *arguments: str, stdin: bytes | None = None) -> str:
        """Call the docker client on this engine; returns its stdout, raises with its stderr."""
        return call("docker", "--host", self.host, *arguments, stdin=stdin)

    def start(self) -> None:
        """Start the engine, or start it again with everything it had, and wait until it answers."""
        if self.running:
            return
        if len(os.fsencode(self.folder / LONGEST_SOCKET)) > SOCKET_NAME_BYTES:
            raise EngineProblem(f"{self.folder} is too long for the sockets below it; take a shorter --folder")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        subnet = self._bridge()
        # A dockerd killed leaves these behind, and an init that is slow to take the dead off the process table keeps
        # their numbers in use: dockerd would refuse to start, or believe its containerd to be running and wait in vain.
        for stale in ("docker.pid", "exec/containerd/containerd.pid"):
            (self.folder / stale).unlink(missing_ok=True)
        self.spawn(*self._flags(subnet))
        self.wait_until(lambda: answers(self.host))

    def stop(self) -> None:
        """Stop it as ``systemctl stop docker`` does: its containers are stopped too, and kept."""
        self.end()

    def kill(self) -> None:
        """End it as a crash does: its containers run on, with nobody to look after them."""
        self.end(signal.SIGKILL)
        # The kernel ends its containerd with it.
        wait_for(lambda: not processes_of(self.folder / "exec/containerd/containerd.toml"), STOP_S)

    def close(self) -> None:
        """Stop it and take away everything it made: containers, processes, mounts, bridge, control groups, files."""
        if self.running and answers(self.host):
            # Removed by force: a stop would wait ten seconds for each container that does not mind SIGTERM.
            with contextlib.suppress(EngineProblem):
                if containers := self.docker("ps", "--all", "--quiet").split():
                    self.docker("rm", "--force", "--volumes", *containers)
        self.end()
        end_processes(lambda: processes_of(self.folder / "exec"))
        unmount_below(self.folder)
        for container in (self.folder / "data/containers").glob("*"):
            shim_socket(self.folder, container.name).unlink(missing_ok=True)
        if name := self._bridge_name():
            remove_control_groups(name)
            subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False, timeout=CALL_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def control_group(self) -> str:
        """The parent of its containers' control groups; named as the bridge is, for that name is taken once only."""
        return self._bridge_name()

    def _flags(self, subnet: int) -> Iterator[str]:
        for name, folder in (("data-root", "data"), ("exec-root", "exec")):
            yield f"--{name}={self.folder / folder}"
        yield f"--pidfile={self.folder / 'docker.pid'}"
        yield f"--host={self.host}"
        # Two engines on the default docker0 give the same addresses out twice.
        yield f"--bridge={self._bridge_name()}"
        yield f"--default-address-pool=base=10.{subnet}.0.0/16,size=24"
        # With iptables dockerd flushes another engine's chains, turns FORWARD to DROP and leaves both behind, which
        # breaks tests with network namespaces. Ports published on loopback go through docker-proxy either way.
        yield from ("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false")
        # Its own control group can be removed with all that is left in it. The driver must be cgroupfs, as there is no
        # systemd to ask; where there is one, newer engines choose it by themselves and refuse this form of name.
        yield "--exec-opt=native.cgroupdriver=cgroupfs"
        yield f"--cgroup-parent=/{self.control_group}"
        # Not set, for the default is right: the storage driver (overlay2 on ext4 and xfs; vfs where the folder is on an
        # overlay itself), insecure registries (127.0.0.0/8 always is one), ulimits (without CAP_SYS_RESOURCE none may
        # be raised, and a --default-ulimit above the hard limit would keep containers from starting).

    def _bridge_name(self) -> str:
        with contextlib.suppress(OSError):
            return (self.folder / "bridge").read_text()
        return ""

    def _bridge(self) -> int:
        """Make the bridge, once; returns the second number of the 10.N networks this engine uses."""
        if name := self._bridge_name():
            return int(name.removeprefix("rmatest"))
        used = call("ip", "-4", "-o", "address")
        for number in range(201, 251):
            name = f"rmatest{number}"
            # The kernel refuses a second link of the same name: that is the lock between engines started at once.
            if f" 10.{number}." in used or not make_bridge(name, f"10.{number}.255.1/24"):
                continue
            (self.folder / "bridge").write_text(name)
            return number
        raise EngineProblem(
            "no free network 10.201 to 10.250: `ip link` shows rmatest… bridges of engines never closed"
        )


@dataclass
class Registry(Daemon):
    """A docker-registry of our own on loopback; ``address`` (host:port) is the prefix of its images' names."""

    name: str = "docker-registry"

    @property
    def address(self) -> str:
        """``127.0.0.1:PORT``; the port stays the same when it is started again."""
        return (self.folder / "address").read_text()

    def start(self) -> None:
        """Start it with an empty storage, or with what it had, and wait until it answers."""
        if self.pid is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (self.folder / "address").exists():
            (self.folder / "address").write_text(f"127.0.0.1:{free_port()}")
        configuration = self.folder / "config.yml"
        configuration.write_text(
            "version: 0.1\n"
            f"storage: {{filesystem: {{rootdirectory: {self.folder / 'storage'}}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '{self.address}'}}\n"
        )
        self.spawn("serve", str(configuration))
        self.wait_until(lambda: registry_answers(self.address))

    def stop(self) -> None:
        """Stop it; its images stay."""
        self.end()

    def close(self) -> None:
        """Stop it and remove its images."""
        self.end()
        shutil.rmtree(self.folder, ignore_errors=True)


def can_start_engine() -> str | None:
    """Why no engine of our own can be started here; None when one can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "an engine for the tests alone needs root on Linux"
    missing = [name for name in ("dockerd", "docker", "ip") if shutil.which(name, path=search_path()) is None]
    return f"not installed: {', '.join(missing)} (Debian: apt-get install docker.io iproute2)" if missing else None


def can_start_registry() -> str | None:
    """Why no registry of our own can be started here; None when one can."""
    found = shutil.which("docker-registry", path=search_path())
    return None if found else "docker-registry is not installed (Debian: apt-get install docker-registry)"


def search_path() -> str:
    """PATH with the folders of daemons, which a plain shell often lacks."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def call(*command: str, stdin: bytes | None = None) -> str:
    """Run a command; returns its stdout, raises EngineProblem with its stderr."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=CALL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineProblem(f"{' '.join(command)}: {error}") from error
    if done.returncode != 0:
        raise EngineProblem(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace")


def answers(host: str | None = None) -> bool:
    """Whether an engine answers at ``host``, or at the client's own choice (DOCKER_HOST, context, default socket)."""
    where = ["--host", host] if host else []
    with contextlib.suppress(EngineProblem):
        return bool(call("docker", *where, "version", "--format", "{{.Server.Version}}").strip())
    return False


def registry_answers(address: str) -> bool:
    """Whether a registry answers at ``host:port``."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/v2/", timeout=CALL_S):
        return True
    return False


def make_bridge(name: str, address: str) -> bool:
    """Make a bridge with an address; False when there is one of that name."""
    try:
        call("ip", "link", "add", name, "type", "bridge")
    except EngineProblem as problem:
        if "File exists" in str(problem):
            return False
        raise
    call("ip", "address", "add", address, "dev", name)
    call("ip", "link", "set", name, "up")
    return True


def wait_for(condition: Callable[[], bool], limit_s: float) -> bool:
    """Whether the condition came true within the limit."""
    deadline = time.monotonic() + limit_s
    while not (done := condition()) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
    return done


def command_line(pid: int) -> str:
    """A process' command line; empty when it is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def process_ids() -> list[int]:
    """Every process of this machine."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def gone(pid: int) -> bool:
    """Whether a process has ended; one that is our child is taken off the process table by asking."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return not command_line(pid)


def processes_of(path: Path) -> list[int]:
    """The processes that carry a path of ours in their command line: containerd, shims."""
    return [pid for pid in process_ids() if str(path) in command_line(pid)]


def end_processes(those: Callable[[], list[int]]) -> None:
    """Kill all of them, those that appear meanwhile included, and wait for their end."""
    deadline = time.monotonic() + STOP_S
    while (pids := those()) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(LOOK_EVERY_S)


def shim_socket(folder: Path, container: str) -> Path:
    """Where the shim of a container listens: the one thing that containerd puts outside of the engine's folder."""
    key = f"{folder}/exec/containerd/containerd.sock/moby/{container}"
    return Path("/run/containerd/s") / hashlib.sha256(key.encode()).hexdigest()


def unmount_below(folder: Path) -> None:
    """Take away every mount in the folder, the innermost first."""
    points = [line.split()[4] for line in MOUNTS.read_text().splitlines()]
    for point in sorted((point for point in points if point.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", point], capture_output=True, check=False, timeout=CALL_S)


def remove_control_groups(name: str) -> None:
    """Kill what is left of the containers and remove the control groups of that name in every hierarchy."""
    for parent in [*CONTROL_GROUPS.glob(name), *CONTROL_GROUPS.glob(f"*/{name}")]:
        end_processes(functools.partial(members_of, parent))
        for group in sorted((path for path in [parent, *parent.rglob("*")] if path.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                group.rmdir()


def members_of(group: Path) -> list[int]:
    """The processes in a control group and below it."""
    pids: list[int] = []
    for listed in group.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):
            pids += map(int, listed.read_text().split())
    return [pid for pid in pids if command_line(pid)]


def up(folder: Path) -> None:
    """Start what does not run yet, and print where it is."""
    if (reason := can_start_engine() or can_start_registry()) is not None:
        raise EngineProblem(reason)
    engine, registry = Engine(folder / "engine"), Registry(folder / "registry")
    engine.start()
    registry.start()
    print(f"DOCKER_HOST={engine.host}")
    print(f"RMA_TEST_REGISTRY={registry.address}")


def down(folder: Path) -> None:
    """Stop both and remove the folder."""
    Registry(folder / "registry").close()
    Engine(folder / "engine").close()
    shutil.rmtree(folder, ignore_errors=True)


def status(folder: Path) -> None:
    """Print what runs, and where."""
    engine, registry = Engine(folder / "engine"), Registry(folder / "registry")
    print(f"engine: pid {engine.pid} at {engine.host}" if engine.running else "engine: not running")
    print(f"registry: pid {registry.pid} at {registry.address}" if registry.pid else "registry: not running")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("up", "down", "status"))
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where everything is kept (%(default)s)")
    options = parser.parse_args()
    try:
        {"up": up, "down": down, "status": status}[options.action](options.folder.resolve())
    except EngineProblem as problem:
        print(f"engines: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
