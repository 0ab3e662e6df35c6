"""Podman as a container runtime, with or without root; no socket need be enabled beforehand.

``[plugins.podman]`` may hold ``host = "unix:///…"``; else CONTAINER_HOST counts. Otherwise, on Linux, the agent starts
``podman system service`` as a child of its own, on a socket below its state folder that only this user can open. It
ends with the agent, whatever ends that; containers go on without it. On macOS and Windows it is the machine that
``podman machine`` runs. What is the same as with Docker is `rma_core.container_engine`; containers are made by
Podman's own call, which can be told what Docker's cannot: no proxies of the owner, no systemd mode, CDI names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rma_core import (
    ContainerRuntime,
    ImageMissing,
    ImagePullFailed,
    NotSupported,
    RuntimeAbsent,
    RuntimeFailure,
    hookimpl,
)
from rma_core import container_engine as engines
from rma_core.container_engine import Address, ChildEngine, EngineRuntime, NotInstalled, Product

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import docker

    from rma_core import ContainerSpec, ContainerStats, PluginConfig
    from rma_core.container_engine import Engine, Json

#: The version of RMA's hooks that this was written for.
RMA_HOOK_VERSION = 1
#: The oldest Podman whose own call for making containers is spoken here, and the version of that call.
OLDEST, API = 4, "v4.0.0"
#: Seconds for `podman info`, which looks the whole storage over, and for other questions to the program.
INFO_S = 30.0
#: Where the kernel says that there is one hierarchy of control groups (version 2).
UNIFIED = Path("/sys/fs/cgroup/cgroup.controllers")
#: Processes of the one user that all services run as: Podman takes no more for itself, and cannot give more than it
#: has where CAP_SYS_RESOURCE is missing. Each container is limited by its control group.
MOST_PROCESSES = 32_768
#: Ids that a user without root must have to give away: nobody's, which services run as, is 65532.
LEAST_IDS = 65_533
#: Bytes of a container's output that are kept.
OUTPUT_BYTES = 10 * 1024**2
#: Where daemons' programs lie, iptables and runc among them; a plain user's PATH does not lead there.
DAEMONS = ("/usr/sbin", "/sbin")
#: Where Podman looks for what the makers of GPUs say of them.
CDI_FOLDERS, CDI_SUFFIXES = ("/etc/cdi", "/var/run/cdi"), (".json", ".yaml")
NETWORK_ADVICE = "install netavark, slirp4netns and iptables, and let this user open /dev/net/tun"
IDS_ADVICE = (
    "install newuidmap (Debian: apt-get install uidmap), then"
    " sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 $USER; podman system migrate"
)
STORAGE_ADVICE = "`podman system reset` makes it anew, without the images and containers it had"
#: How its owner finds out more, by platform: on Linux the agent starts it by itself.
START_ADVICE = {"linux": "see what `podman info` says as this user"}


class Podman(Product):
    """Podman 4 or newer."""

    name = "podman"
    title = "Podman"
    prune = "podman system prune"
    login = "podman login"
    sayings = (
        (
            r"(netavark|slirp4netns|pasta|iptables)\b.*(not found|no such file|failed)|find.*netavark|/dev/net/tun",
            NotSupported,
            f"Podman has no network for containers here ({{said}}): {NETWORK_ADVICE}",
        ),
        (
            r"catatonit|container-init binary",
            NotSupported,
            "Podman's own init is missing (Debian: apt-get install catatonit): {said}",
        ),
        (
            r"newuidmap|newgidmap|subuid|subgid|insufficient UIDs or GIDs",
            NotSupported,
            f"this user has no range of ids to give to containers ({{said}}): {IDS_ADVICE}",
        ),
        (
            r"no image found in (manifest list|image index) for architecture",
            ImageMissing,
            "the image was not made for this kind of machine: {said}",
        ),
        (
            r"HTTP response to HTTPS client",
            ImagePullFailed,
            "the registry speaks plain http; if that is meant, list it as insecure in registries.conf: {said}",
        ),
        (
            r"setting rlimit",
            NotSupported,
            "Podman asks for higher limits than it may give; set default_ulimits in containers.conf: {said}",
        ),
        (
            r"database .*(mismatch|not match)|layer not known|failed to init|not support overlay|invalid database",
            RuntimeFailure,
            f"Podman's storage is broken ({{said}}): {STORAGE_ADVICE}",
        ),
    )

    def start_advice(self) -> str:
        """Say how to find out more: the agent starts it by itself."""
        return START_ADVICE.get(sys.platform, "start its machine (podman machine start)")

    def refuse(self, version: Json, place: str) -> None:
        """Leave Docker to its own runtime, and say what is too old."""
        if not any(part.get("Name") == "Podman Engine" for part in version.get("Components") or ()):
            raise NotInstalled(f"it is not Podman that answers at {place}")
        refuse_old(str(version.get("Version", "")))

    def complete(self, api: docker.APIClient, info: Json) -> Json:
        """Correct what Podman tells Docker's clients: limits it only has on paper, GPUs it could give."""
        answer = api.get(f"{api.base_url}/{API}/libpod/info", timeout=INFO_S)
        answer.raise_for_status()
        return completed(info, answer.json())

    def create(self, engine: Engine, spec: ContainerSpec, image: Json) -> str:
        """Make the container by Podman's own call."""
        from docker.errors import APIError

        api = engine.slow.api
        made = container(spec, image, engine.info)
        answer = api.post(f"{api.base_url}/{API}/libpod/containers/create", json=made, timeout=api.timeout)
        if not answer.ok:
            raise APIError("container create", response=answer, explanation=_message(answer.text))
        return str(answer.json()["Id"])

    def measure(self, engine: Engine, container: Json) -> ContainerStats | None:
        """Add up processes where Podman cannot measure: without root and control groups of its own."""
        return None if engine.info.get("MemoryLimit") else engines.measured(int(container["State"]["Pid"]))


PODMAN = Podman()


def _message(body: str) -> str:
    try:
        said = json.loads(body)
        return str(said.get("message") or said.get("cause") or body)
    except (ValueError, AttributeError):
        return body


def refuse_old(version: str) -> None:
    """Raise RuntimeAbsent for a version that is too old."""
    major = re.match(r"\d+", version)
    if major and int(major[0]) < OLDEST:
        raise RuntimeAbsent(f"Podman {version} is too old: version {OLDEST}.0 or newer is needed")


def completed(info: Json, own: Json) -> Json:
    """Return what Podman tells Docker's clients, corrected by what it tells its own (``/libpod/info``)."""
    host = own.get("host") or {}
    security = host.get("security") or {}
    rootless = bool(security.get("rootless"))
    # Without root only systemd can hand control groups on, and only those of version 2.
    able = not rootless or (host.get("cgroupVersion") == "v2" and host.get("cgroupManager") == "systemd")
    controllers = host.get("cgroupControllers") or () if able else ()
    needs = {"MemoryLimit": "memory", "SwapLimit": "memory", "CpuCfsQuota": "cpu", "PidsLimit": "pids"}
    limits = {name: bool(info.get(name)) and controller in controllers for name, controller in needs.items()}
    kinds = {
        "rootless": rootless,
        "selinux": security.get("selinuxEnabled"),
        "apparmor": security.get("apparmorEnabled"),
    }
    named = [f"name={kind}" for kind, on in kinds.items() if on]
    seccomp = ["name=seccomp,profile=default"] if security.get("seccompEnabled") else []
    specs = [folder for folder in CDI_FOLDERS if any(file.suffix in CDI_SUFFIXES for file in Path(folder).glob("*"))]
    return {**info, **limits, "SecurityOptions": [*named, *seccomp], "CDISpecDirs": specs, "Runtimes": {}}


def container(spec: ContainerSpec, image: Json, info: Json) -> Json:
    """Return every option a container is made with, in Podman's own words; the same as with Docker, and no others."""
    config = image.get("Config") or {}
    limits = spec.limits
    made: Json = {
        "name": engines.container_name(spec),
        "hostname": spec.name,
        "image": image["Id"],
        "labels": engines.labels(spec),
        "env": engines.environment(spec, config),
        # The owner's proxies, passwords included, are none of a stranger's business.
        "httpproxy": False,
        # Else an image whose program is called like systemd gets control groups to write to.
        "systemd": "false",
        "portmappings": [{"host_ip": "127.0.0.1", "container_port": spec.port, "host_port": 0, "protocol": "tcp"}],
        "user": engines.user(str(config.get("User") or "")),
        "cap_drop": ["ALL"],
        "no_new_privileges": True,
        "privileged": False,
        "read_only_filesystem": True,
        "image_volume_mode": "ignore",
        # Else it mounts files of its own over those of the image.
        "manage_password": False,
        "mounts": [
            {"destination": place, "type": "tmpfs", "source": "tmpfs", "options": [*options, "notmpcopyup"]}
            for place, options in engines.scratch(spec, config).items()
        ],
        "shm_size": limits.shm_bytes,
        "r_limits": [
            {"type": name, "soft": most, "hard": most}
            for name, most in (("nofile", engines.MAX_FILES), ("core", 0), ("nproc", most_processes()))
        ],
        "oom_score_adj": engines.OOM_SCORE,
        "ipcns": {"nsmode": "private"},
        "cgroupns": {"nsmode": "private"},
        "init": True,
        "restart_policy": "no",
        "log_configuration": {"driver": "k8s-file", "size": OUTPUT_BYTES},
        "resource_limits": resource_limits(spec, info),
    }
    if given := engines.mounts(spec):
        made["volumes"] = [{"Name": one["Source"], "Dest": one["Target"], "Options": ["ro"]} for one in given]
    access = spec.access
    if access is None or not (access.cdi or access.device_nodes):
        return made
    engines.no_preload_near_a_gpu(spec, config)
    if access.cdi and not info.get("CDISpecDirs"):
        advice = "install the NVIDIA Container Toolkit and run `nvidia-ctk cdi generate`"
        raise NotSupported(f"Podman cannot give {', '.join(access.cdi)} to containers here: {advice}")
    devices = [{"path": name} for name in (*access.cdi, *access.device_nodes)]
    return {**made, "devices": devices, "groups": engines.groups_of(access.device_nodes)}


def resource_limits(spec: ContainerSpec, info: Json) -> Json:
    """Return the limits that can be set here; one that cannot would keep the container from starting."""
    memory = {"limit": spec.limits.memory_bytes}
    if info.get("SwapLimit"):
        memory["swap"] = spec.limits.memory_bytes
    quota = round(engines.cpus(spec, info) * 100_000)
    every = {
        "MemoryLimit": ("memory", memory),
        "CpuCfsQuota": ("cpu", {"shares": engines.CPU_SHARES, "quota": quota, "period": 100_000}),
        "PidsLimit": ("pids", {"limit": spec.limits.pids}),
    }
    return dict(limit for name, limit in every.items() if info.get(name))


def most_processes() -> int:
    """Return the limit of processes that Podman may set, being started by us."""
    if sys.platform == "win32":
        return MOST_PROCESSES
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    return MOST_PROCESSES if hard == resource.RLIM_INFINITY else min(hard, MOST_PROCESSES)


class Command(NamedTuple):
    """How Podman is called here: the program, and options for what would certainly not work without."""

    program: str
    options: tuple[str, ...] = ()


def examine(environ: Mapping[str, str]) -> Command:
    """Ask Podman how it is, and return how it is to be called. Raises RuntimeAbsent with what to do."""
    program = shutil.which("podman", path=environ.get("PATH"))
    if program is None:
        raise NotInstalled("Podman is not installed: no podman program")
    options = () if Path("/run/systemd/system").is_dir() else ("--cgroup-manager=cgroupfs", "--events-backend=file")
    own = _info(Command(program, options), environ)
    refuse_old(str((own.get("version") or {}).get("Version", "")))
    host = own.get("host") or {}
    _enough_ids(host)
    if not UNIFIED.exists() and (host.get("ociRuntime") or {}).get("name") == "crun":
        runc = shutil.which("runc", path=environ.get("PATH"))
        if runc is None:
            raise RuntimeAbsent(
                "crun does not run containers on this kernel's control groups (version 1): install runc"
            )
        options = (*options, f"--runtime={runc}")
    return Command(program, options)


def _info(command: Command, environ: Mapping[str, str]) -> Json:
    asked = [command.program, *command.options, "info", "--format=json"]
    try:
        done = subprocess.run(asked, capture_output=True, timeout=INFO_S, check=False, env=environ)
    except subprocess.TimeoutExpired:
        raise RuntimeAbsent(
            f"`podman info` did not end within {INFO_S:.0f} s: is its storage on a slow disk?"
        ) from None
    except OSError as error:
        raise RuntimeAbsent(f"Podman cannot be started: {error}") from None
    if done.returncode != 0:
        raise cannot_work(done.stderr.decode(errors="replace"))
    try:
        return dict(json.loads(done.stdout))
    except (ValueError, TypeError):
        raise cannot_work("`podman info` says something else than it should") from None


def cannot_work(said: str) -> RuntimeAbsent:
    """Return what Podman's complaint about itself means."""
    failure = engines.explain(engines.last_words(said) or "it says nothing", "ask", PODMAN)
    return RuntimeAbsent(f"Podman does not work for this user: {failure.message}; {PODMAN.start_advice()}")


def _enough_ids(host: Json) -> None:
    """Refuse what could not be used: without root, services run as a user out of a range of this user's own."""
    mapped = (host.get("idMappings") or {}).get("uidmap") or ()
    if (host.get("security") or {}).get("rootless") and sum(int(part.get("size", 0)) for part in mapped) < LEAST_IDS:
        raise cannot_work("no subuid range of 65536 ids for this user")


class PodmanRuntime(EngineRuntime):
    """Runs services in Podman's containers, through a service of its own unless an address is set."""

    name = PODMAN.name
    product = PODMAN

    def __init__(self, config: PluginConfig, *, environ: Mapping[str, str] | None = None) -> None:
        """Keep the settings; Podman is looked for at the first call."""
        super().__init__()
        given = os.environ if environ is None else environ
        path = os.pathsep.join([given.get("PATH", os.defpath), *DAEMONS])
        self._environ = {**given, "PATH": path}
        named = ((config.get("host"), "host in [plugins.podman]"), (given.get("CONTAINER_HOST"), "CONTAINER_HOST"))
        self._given = next((Address(str(host), source) for host, source in named if host), None)
        home = str(config.get("home") or given.get("RMA_HOME") or "")
        folder = Path(home).expanduser().absolute() / "podman" if home else None
        self._child = ChildEngine(PODMAN.title, self._command, folder=folder, env=self._environ)
        self._address: Address | None = None

    async def _prepare(self) -> None:
        if self._given is None and sys.platform == "linux":
            self._address = Address(await self._child.host(), "started by this agent")
            self._child.keep_log_small()

    def _locate(self) -> Address:
        return self._given or self._address or machine(self._environ)

    def _command(self, address: str) -> Sequence[str]:
        command = examine(self._environ)
        return [command.program, "--log-level=error", *command.options, "system", "service", "--time=0", address]

    async def aclose(self) -> None:
        """Close the connections, and end the service; containers go on."""
        await super().aclose()
        await self._child.close()


def machine(environ: Mapping[str, str]) -> Address:
    """Return where the virtual machine listens that runs Podman on macOS and Windows. Raises RuntimeAbsent."""
    program = shutil.which("podman", path=environ.get("PATH"))
    if program is None:
        raise NotInstalled("Podman is not installed: no podman program")
    if sys.platform == "win32":
        return Address("npipe:////./pipe/podman-machine-default", "podman machine")
    asked = [program, "machine", "inspect", "--format={{.ConnectionInfo.PodmanSocket.Path}}"]
    try:
        done = subprocess.run(asked, capture_output=True, timeout=INFO_S, check=False, env=environ, text=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeAbsent(f"`podman machine inspect`: {error}") from None
    if done.returncode != 0 or not done.stdout.strip():
        raise RuntimeAbsent(f"Podman has no machine ({engines.last_words(done.stderr)}): podman machine init --now")
    return Address(f"unix://{done.stdout.split()[0]}", "podman machine")


@hookimpl
def rma_container_runtimes(config: PluginConfig) -> Iterable[ContainerRuntime]:
    """Return the one runtime for Podman; nothing is contacted or started yet."""
    return [PodmanRuntime(config)]
