"""Docker as a container runtime: finds the engine as the ``docker`` command does, and locks every container down.

``[plugins.docker]`` may hold ``host = "unix:///…"``; else DOCKER_HOST, the Docker context, or the usual sockets are
used. The SDK is imported on first use. Its calls block, so they run in threads, and each has its own timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import json
import logging
import math
import os
import re
import shutil
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from rma_core import (
    ContainerHandle,
    ContainerRuntime,
    ContainerState,
    ContainerStats,
    ImageMissing,
    ImagePullFailed,
    NotSupported,
    OutOfSpace,
    PortTaken,
    PullProgress,
    RuntimeAbsent,
    RuntimeFailure,
    RuntimeHealth,
    StartFailed,
    hookimpl,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import docker
    import requests

    from rma_core import ContainerSpec, PluginConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")
Json = dict[str, Any]
Action = Literal["ask", "pull", "start"]

#: Seconds until an engine must have accepted a connection and told its version.
CONNECT_S = 5
#: Seconds for one question to the engine.
ASK_S = 30
#: Seconds for making or starting a container; an engine that copies images (vfs) takes its time.
START_S = 120
#: Seconds in which a pull must move at least one byte, or reach another step.
PULL_IDLE_S = 120.0
#: The same once every layer has arrived: some engines unpack gigabytes without a word.
UNPACK_IDLE_S = 900.0
#: Seconds to wait for a removal that somebody else has begun.
REMOVAL_S = 30.0
#: Seconds between two looks at such a removal.
REMOVAL_LOOK_S = 0.2
#: User and group of a service whose image does not name a numeric one: nobody's, on no distribution.
NOBODY = "65532:65532"
#: Open files a service may have.
MAX_FILES = 4096
#: Bytes of /run.
RUN_BYTES = 16 * 1024**2
#: The kernel ends a service before the owner's own programs when memory runs out (-1000 to 1000).
OOM_SCORE = 800
#: Share of a contended CPU against the owner's programs, which have 1024.
CPU_SHARES = 128
#: The most that `DockerRuntime.logs` returns.
MAX_LOG_BYTES = 65_536
#: The most lines that are asked of the engine: it reads a whole line, of up to 16 KiB, before it is cut.
MAX_LOG_LINES = 1000
#: Lines and characters of a container's last words.
LAST_LINES = 5
LAST_CHARACTERS = 500
#: CDI names of this kind can also be given by the older NVIDIA Container Toolkit.
NVIDIA_CDI = "nvidia.com/gpu="
START_ADVICE = {
    "linux": "start it (sudo systemctl start docker, or open Docker Desktop)",
    "darwin": "start it (open Docker Desktop, or `colima start`)",
    "win32": "start it (open Docker Desktop)",
}


class Address(NamedTuple):
    """Where an engine listens and how that is known; ``tls`` are paths of CA, certificate and key."""

    host: str
    source: str = "default socket"
    tls: tuple[str, str, str] | None = None
    verify: bool = True


class Engine(NamedTuple):
    """Connections to one engine (``slow`` waits longer) and what it said about itself."""

    api: docker.APIClient
    slow: docker.DockerClient
    info: Json
    version: str
    address: Address


class NotInstalled(RuntimeAbsent):
    """Nothing of Docker is on this machine: no fault, and no advice."""


class DockerRuntime(ContainerRuntime):
    """Runs services in Docker containers; reconnects by itself when the engine has been away."""

    name = "docker"
    isolated = True

    def __init__(self, config: PluginConfig, *, environ: Mapping[str, str] | None = None) -> None:
        """Keep the settings; the engine is looked for at the first call."""
        self._config = config
        self._environ = os.environ if environ is None else environ
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._was_there = True

    async def probe(self) -> RuntimeHealth:
        """Say whether Docker can be used now: who does not have it is ``undetected``, all else has an advice."""
        try:
            # Asked anew each time: an engine that was upgraded meanwhile has other features.
            engine = await self._run(self._refreshed, "ask")
        except RuntimeFailure as failure:
            state: Literal["undetected", "unhealthy"]
            state = "undetected" if isinstance(failure, NotInstalled) else "unhealthy"
            return RuntimeHealth(state=state, reason=failure.message)
        reason = unusable(engine.info)
        if reason:
            return RuntimeHealth(state="unhealthy", reason=reason, version=engine.version)
        return RuntimeHealth(
            state="healthy",
            reason="; ".join(warnings(engine.info)),
            version=engine.version,
            features=tuple(features(engine.info)),
        )

    async def has_image(self, spec: ContainerSpec) -> bool:
        """Say whether the engine has the image, in the digest that is asked for."""
        return bool(await self._run(lambda engine: find_image(engine, spec), "ask"))

    async def pull(self, spec: ContainerSpec, progress: Callable[[PullProgress], None]) -> None:
        """Pull by digest where there is one; ends when for two minutes nothing moved, however long it takes in all."""
        if await self.has_image(spec):
            return
        response = await self._run(lambda engine: _open_pull(engine, spec), "pull")
        try:
            await self._follow(response, spec, progress)
        finally:
            _cut(response)
        if not await self.has_image(spec):
            raise ImagePullFailed(f"Docker pulled {reference(spec)}, but does not have it now")

    async def start(self, spec: ContainerSpec) -> ContainerHandle:
        """Make and start the container; who gives up waiting leaves none behind."""
        abandoned = threading.Event()
        try:
            return await self._run(lambda engine: _start(engine, spec, abandoned), "start")
        except asyncio.CancelledError:
            abandoned.set()
            raise

    async def inspect(self, handle: ContainerHandle) -> ContainerState:
        """Say how it stands, with the last words of one that ended."""
        return await self._run(lambda engine: _inspect(engine, handle.id), "ask")

    async def endpoint(self, handle: ContainerHandle) -> str:
        """Return the loopback address that its port is published at."""
        return await self._run(lambda engine: _endpoint(engine, handle), "ask")

    async def logs(self, handle: ContainerHandle, *, tail_lines: int = 100) -> str:
        """Return its last output, both streams together."""
        return await self._run(lambda engine: _logs(engine, handle.id, tail_lines), "ask")

    async def stats(self, handle: ContainerHandle) -> ContainerStats:
        """Return what it uses; caches that the kernel can drop do not count as memory."""
        return await self._run(lambda engine: _stats(engine, handle), "ask")

    async def stop(self, handle: ContainerHandle, *, grace_s: float = 10.0) -> None:
        """SIGTERM, SIGKILL after ``grace_s`` (whole seconds for Docker), then remove it with its volumes."""
        await self._run(lambda engine: _stop(engine, handle.id, grace_s), "ask")
        for _ in range(int(REMOVAL_S / REMOVAL_LOOK_S)):
            if (await self.inspect(handle)).state == "missing":
                return
            await asyncio.sleep(REMOVAL_LOOK_S)
        raise RuntimeFailure(f"Docker has been removing {handle.name} for {REMOVAL_S:.0f} s; restart it if this lasts")

    async def list_owned(self, worker_id: str) -> list[ContainerHandle]:
        """Return this worker's containers, the oldest first."""
        return await self._run(lambda engine: _owned(engine, worker_id), "ask")

    async def aclose(self) -> None:
        """Close the connections."""
        await asyncio.to_thread(self._forget)

    async def _run(self, job: Callable[[Engine], T], action: Action) -> T:
        return await asyncio.to_thread(self._attempt, lambda: job(self._connected()), action)

    def _attempt(self, job: Callable[[], T], action: Action) -> T:
        """Do ``job`` in this thread; what the SDK and its HTTP library raise becomes a RuntimeFailure."""
        import requests.exceptions
        import urllib3.exceptions
        from docker.errors import DockerException

        expected = (DockerException, requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError)
        try:
            answer = job()
        except RuntimeFailure as failure:
            self._note(failure)
            raise
        except expected as error:
            explained = explain(error, action)
            self._note(explained)
            raise explained from error
        self._note(None)
        return answer

    def _note(self, failure: RuntimeFailure | None) -> None:
        """Drop the connection to an engine that went away; the agent tells its owner, so this is for debugging."""
        absent = isinstance(failure, RuntimeAbsent)
        if absent:
            self._forget()
        if absent == self._was_there:
            self._was_there = not absent
            logger.debug("Docker: %s", failure if absent else "answers again", extra={"action": "runtime"})

    def _connected(self) -> Engine:
        with self._lock:
            if self._engine is None:
                self._engine = connect(locate(self._config, self._environ, Path.home()))
            engine = self._engine
        if engine.address.host.startswith("unix:"):
            # Cheap, says plainly what is wrong, and the SDK leaks a socket for each connection it is refused.
            _knock(engine.address)
        return engine

    def _refreshed(self, engine: Engine) -> Engine:
        # By connections of its own, which wait less: one that hangs is to be found out before the caller gives up.
        version, info = _introduce(engine.address)
        fresh = engine._replace(info=info, version=str(version.get("Version", "")))
        with self._lock:
            if self._engine is engine:
                self._engine = fresh
        return fresh

    def _forget(self) -> None:
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.api.close()
            engine.slow.close()

    async def _follow(
        self, response: requests.Response, spec: ContainerSpec, progress: Callable[[PullProgress], None]
    ) -> None:
        """Read a pull to its end, reporting progress, as long as there is some."""
        loop = asyncio.get_running_loop()
        layers = Layers()
        lines = response.iter_lines()
        deadline = loop.time() + layers.patience_s
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    event = await asyncio.to_thread(self._attempt, lambda: _next_event(lines), "pull")
            except TimeoutError:
                waited = f"nothing arrived for {layers.patience_s:.0f} s"
                raise ImagePullFailed(f"pulling {reference(spec)} broke off: {waited}") from None
            if event is None:
                return
            if "error" in event:
                raise explain(str(event["error"]), "pull")
            if layers.take(event):
                deadline = loop.time() + layers.patience_s
                progress(layers.progress())


class Layers:
    """Folds what an engine says while it pulls into one number: what has arrived of all that is to arrive."""

    def __init__(self) -> None:
        """Start with no layer known."""
        self._status: dict[str, str] = {}
        self._done: dict[str, int] = {}
        self._total: dict[str, int] = {}

    def take(self, event: Json) -> bool:
        """Note one event; tells whether anything went on (a wait for the next try does not count)."""
        layer, status = str(event.get("id", "")), str(event.get("status", ""))
        if not layer or status.startswith("Pulling from"):
            return False
        if status.startswith("Retrying"):
            # It counts again from where it goes on. Before this, engines say that a layer which broke off is complete.
            self._done.pop(layer, None)
            self._total.pop(layer, None)
            return False
        before = (self._status.get(layer), self._done.get(layer))
        detail = event.get("progressDetail") or {}
        if status == "Downloading":
            self._done[layer] = int(detail.get("current") or 0)
            if int(detail.get("total") or 0) > 0:
                self._total[layer] = int(detail["total"])
        elif status in ("Download complete", "Pull complete", "Already exists"):
            self._done[layer] = self._total.setdefault(layer, self._done.get(layer, 0))
        self._status[layer] = f"{status} {detail.get('current')}" if status == "Extracting" else status
        return before != (self._status[layer], self._done.get(layer))

    @property
    def patience_s(self) -> float:
        """How long silence may last now: longer once all that remains is to unpack."""
        arrived = ("Download complete", "Pull complete", "Already exists", "Extracting")
        return UNPACK_IDLE_S if self._status and self._all(*arrived) else PULL_IDLE_S

    def progress(self) -> PullProgress:
        """Return the sum over all layers; the total is known once every layer's is."""
        total = sum(self._total.values()) if self._status.keys() <= self._total.keys() else None
        done = self._all("Pull complete", "Already exists")
        words = "complete" if done else "unpacking" if self.patience_s == UNPACK_IDLE_S else "downloading"
        return PullProgress(done_bytes=sum(self._done.values()), total_bytes=total, note=words)

    def _all(self, *statuses: str) -> bool:
        return all(status.startswith(statuses) for status in self._status.values())


def locate(config: PluginConfig, environ: Mapping[str, str], home: Path) -> Address:
    """Return where the engine is, by the ``docker`` command's own order: DOCKER_HOST, context, default sockets.

    A ``host`` in the plugin's configuration comes before all. Raises RuntimeAbsent.
    """
    if host := config.get("host"):
        return Address(str(host), "host in [plugins.docker]")
    if host := environ.get("DOCKER_HOST"):
        folder = Path(environ.get("DOCKER_CERT_PATH") or _config_folder(environ, home))
        secure = bool(environ.get("DOCKER_TLS_VERIFY") or environ.get("DOCKER_TLS"))
        return Address(host, "DOCKER_HOST", _certificates(folder) if secure else None)
    name, source = _context_name(environ, home)
    if name != "default":
        return _context(_config_folder(environ, home), name, source)
    return _default_socket(environ, home)


def _config_folder(environ: Mapping[str, str], home: Path) -> Path:
    return Path(environ.get("DOCKER_CONFIG") or home / ".docker")


def _certificates(folder: Path) -> tuple[str, str, str]:
    return str(folder / "ca.pem"), str(folder / "cert.pem"), str(folder / "key.pem")


def _context_name(environ: Mapping[str, str], home: Path) -> tuple[str, str]:
    """Return the current context and who says so; an unreadable config.json counts as none, as for ``docker``."""
    if name := environ.get("DOCKER_CONTEXT"):
        return name, "DOCKER_CONTEXT"
    file = _config_folder(environ, home) / "config.json"
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return "default", ""
    name = content.get("currentContext") if isinstance(content, dict) else None
    return str(name or "default"), str(file)


def _context(folder: Path, name: str, source: str) -> Address:
    """Read one context's files. The SDK's own reader looks in the working directory when config.json is missing."""
    key = hashlib.sha256(name.encode()).hexdigest()
    meta = folder / "contexts" / "meta" / key / "meta.json"
    try:
        endpoint = json.loads(meta.read_bytes())["Endpoints"]["docker"]
        host = str(endpoint["Host"])
    except (OSError, ValueError, KeyError, TypeError):
        advice = "`docker context ls` shows those there are"
        raise RuntimeAbsent(f"{source} names the Docker context {name!r}, which cannot be read; {advice}") from None
    tls = folder / "contexts" / "tls" / key / "docker"
    verify = not endpoint.get("SkipTLSVerify", False)
    return Address(host, f"context {name!r}", _certificates(tls) if tls.is_dir() else None, verify=verify)


def _default_socket(environ: Mapping[str, str], home: Path) -> Address:
    """Return the first of the usual sockets that lets this user in, else the first there is. Raises RuntimeAbsent."""
    places = [Path(p) for p in _usual_sockets(environ, home) if Path(p).exists()]
    open_ones = [p for p in places if os.access(p, os.R_OK | os.W_OK)]
    for place in [*open_ones, *places]:
        return Address(f"unix://{place}" if sys.platform != "win32" else "npipe:////./pipe/docker_engine")
    if shutil.which("dockerd") or shutil.which("docker") or Path("/Applications/Docker.app").exists():
        raise RuntimeAbsent(f"Docker is installed, but its daemon does not run: {_start_advice()}")
    raise NotInstalled("Docker is not installed: no docker program, and no socket at the usual places")


def _usual_sockets(environ: Mapping[str, str], home: Path) -> Iterator[str]:
    """System's, rootless, Docker Desktop's, and those of the usual virtual machines on macOS."""
    if sys.platform == "win32":
        yield r"\\.\pipe\docker_engine"
    else:
        yield "/var/run/docker.sock"
        yield f"{environ.get('XDG_RUNTIME_DIR') or f'/run/user/{os.getuid()}'}/docker.sock"
    for place in (".docker/run", ".docker/desktop", ".colima/default", ".orbstack/run", ".rd"):
        yield str(home / place / "docker.sock")


def _start_advice() -> str:
    return START_ADVICE.get(sys.platform, START_ADVICE["linux"])


def connect(address: Address) -> Engine:
    """Return a connection to an engine of this machine that answers. Raises RuntimeAbsent with what to do."""
    from docker.errors import DockerException

    _knock(address)
    try:
        version, info = _introduce(address)
        spoken = str(version["ApiVersion"])
        ask, slow = _client(address, spoken, ASK_S), _client(address, spoken, START_S)
    except (DockerException, OSError, ValueError, KeyError, TypeError) as error:
        told = _words(error)
        raise RuntimeAbsent(f"Docker does not answer at {_place(address)}: {told}; {_start_advice()}") from error
    return Engine(ask.api, slow, info, str(version.get("Version", "")), address)


def _introduce(address: Address) -> tuple[Json, Json]:
    """Return what an engine says of its version and of itself. Raises NotInstalled when it is Podman."""
    from docker.constants import DEFAULT_DOCKER_API_VERSION

    with contextlib.closing(_client(address, DEFAULT_DOCKER_API_VERSION, CONNECT_S)) as first:
        version = dict(first.api.version(api_version=False))
    if any(part.get("Name") == "Podman Engine" for part in version.get("Components") or ()):
        raise NotInstalled(f"it is Podman, not Docker, that answers at {_place(address)}: use the podman runtime")
    with contextlib.closing(_client(address, str(version["ApiVersion"]), CONNECT_S)) as second:
        return version, dict(second.api.info())


def _client(address: Address, version: str, timeout_s: int) -> docker.DockerClient:
    """Make a client that obeys its address alone.

    Left to themselves, variables such as REQUESTS_CA_BUNDLE and HTTP_PROXY outweigh a context's certificates, and send
    what is meant for loopback elsewhere. That is also why the SDK may not ask for the version while it is made.
    """
    import docker
    from docker.tls import TLSConfig

    ca, cert, key = address.tls or ("", "", "")
    tls = TLSConfig(client_cert=(cert, key), ca_cert=ca, verify=address.verify) if address.tls else False
    client = docker.DockerClient(address.host, version=version, timeout=timeout_s, tls=tls)
    client.api.trust_env = False
    return client


def _place(address: Address) -> str:
    return f"{address.host} ({address.source})"


def _knock(address: Address) -> None:
    """Connect and hang up: the plain error of the system says more than what the SDK makes of it."""
    parts = urlsplit(address.host)
    try:
        if parts.scheme == "unix":
            _knock_unix(parts.path)
        elif parts.scheme in ("tcp", "http", "https"):
            _knock_tcp(address, parts.hostname or "", parts.port or 2375)
        elif parts.scheme != "npipe":
            raise RuntimeAbsent(_elsewhere(address))
    except FileNotFoundError:
        raise RuntimeAbsent(f"there is no Docker at {_place(address)}: {_start_advice()}") from None
    except PermissionError:
        advice = "add this user to the docker group (sudo usermod -aG docker $USER, then log in again), or use rootless"
        raise RuntimeAbsent(f"this user may not use Docker at {_place(address)}: {advice} Docker") from None
    except OSError as error:
        told = error.strerror or str(error) or "no answer in time"
        said = f"Docker is installed, but its daemon does not answer at {_place(address)} ({told})"
        raise RuntimeAbsent(f"{said}: {_start_advice()}") from None


def _knock_unix(path: str) -> None:
    if sys.platform == "win32":
        raise FileNotFoundError(path)
    else:  # noqa: RET506 - without it, mypy calls the rest unreachable there
        with socket.socket(socket.AF_UNIX) as caller:
            caller.settimeout(CONNECT_S)
            caller.connect(path)


def _knock_tcp(address: Address, hostname: str, port: int) -> None:
    if not _is_loopback(hostname):
        raise RuntimeAbsent(_elsewhere(address))
    socket.create_connection((hostname, port), timeout=CONNECT_S).close()


def _is_loopback(hostname: str) -> bool:
    try:
        return hostname == "localhost" or ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return False


def _elsewhere(address: Address) -> str:
    """Say why only an engine of this machine is of use: its ports are published on its own loopback."""
    return (
        f"{_place(address)} is not an engine on this machine, so its containers could not be reached from here;"
        " choose a local one (`docker context use default`, or unset DOCKER_HOST)"
    )


def unusable(info: Json) -> str:
    """Say why an engine that answers cannot run services; an empty string when it can."""
    if info.get("OSType", "linux") != "linux":
        return "Docker runs Windows containers here: switch it to Linux containers (in Docker Desktop's menu)"
    return ""


def warnings(info: Json) -> Iterator[str]:
    """Say what this engine cannot keep containers from, in sentences for the machine's owner."""
    version = info.get("CgroupVersion", "")
    advice = " (cgroup v2 is needed)" if _security(info, "rootless") and version != "2" else ""
    missing = [what for what, name in LIMITS.items() if not info.get(name)]
    if missing:
        yield f"Docker cannot limit {', '.join(missing)} of containers here{advice}"
    if "memory" in missing and not advice:
        yield "the kernel may need cgroup_enable=memory on its command line"
    if not _security(info, "seccomp"):
        yield "Docker runs containers without seccomp here"


#: What can be limited, and the name under which an engine says so.
LIMITS = {"memory": "MemoryLimit", "cpu": "CpuCfsQuota", "pids": "PidsLimit"}


def features(info: Json) -> Iterator[str]:
    """Say what containers can be given, and are limited by, in the words of `RuntimeHealth.features`."""
    yield from (f"limit:{what}" for what, name in LIMITS.items() if info.get(name))
    yield f"cgroup:v{info.get('CgroupVersion') or '1'}"
    yield from (
        f"security:{name}" for name in ("seccomp", "apparmor", "selinux", "userns", "rootless") if _security(info, name)
    )
    if _has_cdi(info):
        yield "gpu:cdi"
    if "nvidia" in (info.get("Runtimes") or {}):
        yield "gpu:nvidia"


def _security(info: Json, name: str) -> bool:
    """Tell whether a security option is on (``name=seccomp,profile=default``); an unconfined one is not."""
    options = [
        dict(word.partition("=")[::2] for word in option.split(",")) for option in info.get("SecurityOptions") or ()
    ]
    return any(option.get("name") == name and option.get("profile") != "unconfined" for option in options)


def _has_cdi(info: Json) -> bool:
    """Tell whether CDI names work: newer engines list the devices they found, older ones only where they look."""
    found = info.get("DiscoveredDevices")
    return bool(info.get("CDISpecDirs")) if found is None else any(d.get("Source") == "cdi" for d in found)


def locked_down(spec: ContainerSpec, *, image: Json | None = None, info: Json | None = None) -> Json:
    """Return every option a container is made with (those of the SDK's ``containers.create``), and no others.

    ``image`` is what the engine knows of the image: its user counts if it is a number other than root's, and what it
    declares as volumes becomes memory of limited size, for a volume would be a writable place without a limit.
    Raises NotSupported for a GPU that this engine cannot give.
    """
    from docker.types import LogConfig, Ulimit

    config = (image or {}).get("Config") or {}
    limits, known = spec.limits, info or {}
    scratch = f"rw,noexec,nosuid,nodev,size={limits.tmp_bytes},mode=1777"
    cpus = min(limits.cpus, float(known.get("NCPU") or limits.cpus))
    return {
        "name": container_name(spec),
        "hostname": spec.name,
        "labels": labels(spec),
        "environment": environment(spec, config),
        # The owner's proxies in ~/.docker/config.json, passwords included, are none of a stranger's business.
        "use_config_proxy": False,
        "ports": {f"{spec.port}/tcp": ("127.0.0.1", None)},
        "user": user(str(config.get("User") or "")),
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "privileged": False,
        "read_only": True,
        "tmpfs": {
            **dict.fromkeys(config.get("Volumes") or (), scratch),
            "/tmp": scratch,  # noqa: S108 - the container's own
            "/run": f"rw,noexec,nosuid,nodev,size={RUN_BYTES},mode=1777",
        },
        "shm_size": limits.shm_bytes,
        "mem_limit": limits.memory_bytes,
        "memswap_limit": limits.memory_bytes,
        "nano_cpus": round(cpus * 1e9),
        "cpu_shares": CPU_SHARES,
        "pids_limit": limits.pids,
        "oom_score_adj": OOM_SCORE,
        "ulimits": [Ulimit(name="nofile", soft=MAX_FILES, hard=MAX_FILES), Ulimit(name="core", soft=0, hard=0)],
        "network_mode": "bridge",
        "ipc_mode": "private",
        "cgroupns": "private",
        "init": True,
        "restart_policy": {"Name": "no"},
        "log_config": LogConfig(type="json-file", config={"max-size": "10m", "max-file": "2"}),
        **gpu_options(spec, config, known),
    }


def container_name(spec: ContainerSpec) -> str:
    """Return ``rma-<8 hex digits of the worker>-<name>``: two workers on one engine do not meet."""
    return f"rma-{spec.worker_id.removeprefix('worker-')}-{spec.name}"


def labels(spec: ContainerSpec) -> dict[str, str]:
    """Return the labels by which a restarted agent finds and knows its own."""
    return {
        "rma.worker": spec.worker_id,
        "rma.name": spec.name,
        "rma.service": spec.service,
        "rma.spec": spec.spec_hash,
    }


def environment(spec: ContainerSpec, config: Json) -> dict[str, str]:
    """Return the spec's variables, a HOME that can be written unless somebody set one, and no GPU by variable.

    An image may say ``NVIDIA_VISIBLE_DEVICES=all``; where NVIDIA's runtime is the default, it would get every GPU.
    """
    homes = [text for text in config.get("Env") or () if text.startswith("HOME=")]
    default = {} if homes else {"HOME": "/tmp"}  # noqa: S108 - the container's own
    return {**default, **spec.env, "NVIDIA_VISIBLE_DEVICES": "void"}


def user(named: str) -> str:
    """Return the image's user if it is a number other than root's (a group may follow), else nobody's."""
    ordinary = re.fullmatch(r"[1-9]\d{0,9}(:\d{1,10})?", named)
    return named if ordinary else NOBODY


def gpu_options(spec: ContainerSpec, config: Json, info: Json) -> Json:
    """Return the options that give a container its GPU: by CDI, NVIDIA's older toolkit, or device nodes."""
    access = spec.access
    if access is None or not (access.cdi or access.device_nodes):
        return {}
    named = [*(config.get("Env") or ()), *(f"{name}=" for name in spec.env)]
    if any(text.startswith(("LD_PRELOAD=", "LD_AUDIT=")) for text in named):
        # Toolkits up to 1.17.7 load that library outside the container (CVE-2025-23266).
        raise NotSupported(f"{spec.image} sets LD_PRELOAD, which is not let near a GPU")
    options: Json = {}
    if access.cdi:
        options["device_requests"] = [_device_request(access.cdi, info)]
    if access.device_nodes:
        options["devices"] = [f"{node}:{node}:rw" for node in access.device_nodes]
        options["group_add"] = sorted({group for node in access.device_nodes for group in _group_of(node)})
    return options


def _device_request(names: tuple[str, ...], info: Json) -> Json:
    from docker.types import DeviceRequest

    if _has_cdi(info):
        return DeviceRequest(driver="cdi", device_ids=list(names))
    if "nvidia" in (info.get("Runtimes") or {}) and all(name.startswith(NVIDIA_CDI) for name in names):
        devices = [name.removeprefix(NVIDIA_CDI) for name in names]
        return DeviceRequest(driver="nvidia", device_ids=devices, capabilities=[["gpu", "compute", "utility"]])
    advice = "install the NVIDIA Container Toolkit and run `nvidia-ctk cdi generate`"
    raise NotSupported(f"Docker cannot give {', '.join(names)} to containers here: {advice}")


def _group_of(node: str) -> list[str]:
    """Return the group that may open a device node: without it, an ordinary user inside cannot."""
    try:
        return [str(Path(node).stat().st_gid)]
    except OSError:
        return []  # the engine runs in a virtual machine, whose nodes are not here


def reference(spec: ContainerSpec) -> str:
    """Return what to pull: ``repository@digest`` where there is a digest, else ``repository:tag``."""
    repository, tag = split_tag(spec.image)
    return f"{repository}@{spec.image_digest}" if spec.image_digest else f"{repository}:{tag}"


def split_tag(image: str) -> tuple[str, str]:
    """Return repository and tag; a colon before the last slash belongs to a port."""
    folder, slash, last = image.rpartition("/")
    name, _, tag = last.partition(":")
    return f"{folder}{slash}{name}", tag or "latest"


def find_image(engine: Engine, spec: ContainerSpec) -> Json | None:
    """Return what the engine knows of the image, or None when it does not have it.

    A digest may also be an image's local id: that is how an image is pinned which never was in a registry.
    """
    found = _image(engine, reference(spec))
    if found is None and spec.image_digest:
        local = _image(engine, spec.image)
        found = local if local and local["Id"] == spec.image_digest else None
    return found


def _image(engine: Engine, name: str) -> Json | None:
    from docker.errors import NotFound

    try:
        return dict(engine.api.inspect_image(name))  # type: ignore[no-untyped-call]
    except NotFound:
        return None


def _open_pull(engine: Engine, spec: ContainerSpec) -> requests.Response:
    """Ask the engine to pull. The SDK's own method returns nothing that could be cut while another thread reads."""
    repository, tag = split_tag(spec.image)
    url = f"{engine.api.base_url}/v{engine.api.api_version}/images/create"
    response = engine.api.post(
        url,
        params={"fromImage": repository, "tag": spec.image_digest or tag},
        headers=_credentials(engine, repository),
        stream=True,
        timeout=(CONNECT_S, UNPACK_IDLE_S),
    )
    if response.ok:
        return response
    with response:
        raise explain(_message(response.text), "pull")


def _message(body: str) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body[:LAST_CHARACTERS]


def _credentials(engine: Engine, repository: str) -> dict[str, str]:
    """Return what the owner has logged in with (``docker login``) for this registry, if anything."""
    from docker import auth
    from docker.errors import DockerException

    try:
        registry, _ = auth.resolve_repository_name(repository)
        header = auth.get_config_header(engine.api, registry)
    except DockerException as error:
        logger.info("Docker: pulling %s without credentials: %s", repository, error, extra={"action": "pull"})
        return {}
    return {"X-Registry-Auth": header.decode()} if header else {}


def _next_event(lines: Iterator[bytes]) -> Json | None:
    """Return the next event, or None at the end."""
    line = next(lines, None)
    return None if line is None else dict(json.loads(line or b"{}"))


def _cut(response: requests.Response) -> None:
    """Close a response; a thread that waits in it for more bytes returns at once."""
    try:
        response.raw.shutdown()
    except (AttributeError, RuntimeError, ValueError, OSError):
        logger.debug("nothing to cut: the response has ended, or this urllib3 cannot")
    response.close()


def _start(engine: Engine, spec: ContainerSpec, abandoned: threading.Event) -> ContainerHandle:
    if reason := unusable(engine.info):
        raise NotSupported(reason)
    image = find_image(engine, spec)
    if image is None:
        raise ImageMissing(f"Docker does not have the image {reference(spec)} here; it must be pulled first")
    container_id = _create(engine, spec, str(image["Id"]), locked_down(spec, image=image, info=engine.info))
    try:
        engine.slow.api.start(container_id)
        state = _inspect(engine, container_id)
        if state.state != "running":
            raise StartFailed(f"{spec.name} ended at once: {state.reason}")
        if abandoned.is_set():
            raise StartFailed(f"nobody waits for {spec.name} any more")
    except BaseException:
        _try_to_remove(engine, container_id)
        raise
    return ContainerHandle(
        runtime=DockerRuntime.name,
        id=container_id,
        name=spec.name,
        service=spec.service,
        spec_hash=spec.spec_hash,
        image_id=str(image["Id"]),
    )


def _create(engine: Engine, spec: ContainerSpec, image_id: str, options: Json) -> str:
    """Make the container; a leftover of this worker under the same name gives way, anybody else's does not."""
    from docker.errors import APIError

    try:
        return str(engine.slow.containers.create(image_id, **options).id)
    except APIError as error:
        if error.status_code != CONFLICT:
            raise
    _remove_leftover(engine, spec)
    return str(engine.slow.containers.create(image_id, **options).id)


#: HTTP's status for a name that is in use.
CONFLICT = 409


def _remove_leftover(engine: Engine, spec: ContainerSpec) -> None:
    from docker.errors import NotFound

    name = container_name(spec)
    try:
        found = engine.api.inspect_container(name)
    except NotFound:
        return
    if (found["Config"].get("Labels") or {}).get("rma.worker") != spec.worker_id:
        raise StartFailed(
            f"the name {name} is taken by a container that is not this worker's ({found['Id'][:12]},"
            f" {found['Config'].get('Image')}): rename or remove it"
        )
    engine.slow.api.remove_container(found["Id"], v=True, force=True)


def _try_to_remove(engine: Engine, container_id: str) -> None:
    """Remove what would not start; what cannot be removed now is found by its labels later."""
    import requests.exceptions
    from docker.errors import DockerException

    try:
        engine.slow.api.remove_container(container_id, v=True, force=True)
    except (DockerException, requests.exceptions.RequestException, OSError) as error:
        logger.info("Docker: %s is left behind for now: %s", container_id[:12], error, extra={"action": "runtime"})


def _container(engine: Engine, container_id: str) -> Json | None:
    from docker.errors import NotFound

    try:
        return dict(engine.api.inspect_container(container_id))
    except NotFound:
        return None


def _inspect(engine: Engine, container_id: str) -> ContainerState:
    found = _container(engine, container_id)
    if found is None:
        return ContainerState(state="missing")
    state = found["State"]
    if state["Running"]:
        return ContainerState(state="running", reason="paused" if state.get("Paused") else "")
    if state["Status"] == "created":
        return ContainerState(state="exited", reason="it was made, but never started")
    words = last_words(_logs(engine, container_id, LAST_LINES))
    foreign = another_processor(_image(engine, str(found["Image"])) or {}, engine.info)
    return ContainerState(state="exited", exit_code=int(state["ExitCode"]), reason=why_it_ended(found, words, foreign))


def why_it_ended(found: Json, words: str, foreign: str = "") -> str:
    """Say why a container ended, from what the engine knows of it, its last words, and whether its image fits here."""
    state, memory = found["State"], int(found["HostConfig"].get("Memory") or 0)
    parts = [f"out of memory (limit {memory / 2**20:.0f} MiB)"] if state.get("OOMKilled") else []
    if foreign and state["ExitCode"]:
        parts.append(foreign)
    parts.append(f"exit code {state['ExitCode']}")
    if state.get("Error"):
        parts.append(last_words(str(state["Error"])))
    if words:
        parts.append(f"last words: {words}")
    return ", ".join(parts)


def another_processor(image: Json, info: Json) -> str:
    """Say that an image is for another kind of processor; an engine that emulates it may run it all the same.

    The words "exec format error" are rarely seen: docker-init hands such a program to the image's shell.
    """
    made_for, here = str(image.get("Architecture") or ""), str(info.get("Architecture") or "")
    known = PROCESSORS.get(here, here)
    if not made_for or not here or made_for == known:
        return ""
    return f"the image is for another kind of processor ({made_for}) than this one ({known})"


#: What engines call their own processor, and what images call the same.
PROCESSORS = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386", "i386": "386"}


def last_words(text: str) -> str:
    """Return the end of a container's output on one line, without control characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()][-LAST_LINES:]
    return "".join(c if c.isprintable() else " " for c in " / ".join(lines))[-LAST_CHARACTERS:].strip()


def _endpoint(engine: Engine, handle: ContainerHandle) -> str:
    found = _container(engine, handle.id) or {}
    ports = (found.get("NetworkSettings") or {}).get("Ports") or {}
    published = [binding for bindings in ports.values() for binding in bindings or ()]
    if not published:
        raise RuntimeFailure(f"{handle.name} has no address: it does not run")
    return f"http://127.0.0.1:{published[0]['HostPort']}"


def _logs(engine: Engine, container_id: str, lines: int) -> str:
    from docker.errors import NotFound

    try:
        output = engine.api.logs(container_id, stdout=True, stderr=True, tail=max(0, min(lines, MAX_LOG_LINES)))
    except NotFound:
        return ""
    return output[-MAX_LOG_BYTES:].decode("utf-8", "ignore")


def _stats(engine: Engine, handle: ContainerHandle) -> ContainerStats:
    from docker.errors import NotFound

    try:
        found = engine.api.stats(handle.id, stream=False, one_shot=True)
    except NotFound:
        found = {}
    if str(found.get("read", "0001")).startswith("0001"):
        raise RuntimeFailure(f"{handle.name} has no stats: it does not run")
    memory = found.get("memory_stats") or {}
    detail = memory.get("stats") or {}
    droppable = int(detail.get("total_inactive_file", detail.get("inactive_file", 0)))
    return ContainerStats(
        cpu_seconds=found["cpu_stats"]["cpu_usage"]["total_usage"] / 1e9,
        memory_bytes=max(0, int(memory.get("usage") or 0) - droppable),
        pids=int((found.get("pids_stats") or {}).get("current") or 0),
    )


def _stop(engine: Engine, container_id: str, grace_s: float) -> None:
    from docker.errors import APIError, NotFound

    try:
        engine.slow.api.stop(container_id, timeout=math.ceil(max(0.0, grace_s)))
        engine.slow.api.remove_container(container_id, v=True, force=True)
    except NotFound:
        return
    except APIError as error:
        if error.status_code != CONFLICT:  # somebody else is removing it already
            raise


def _owned(engine: Engine, worker_id: str) -> list[ContainerHandle]:
    found = engine.api.containers(all=True, filters={"label": f"rma.worker={worker_id}"})
    return [_handle(container) for container in sorted(found, key=lambda c: int(c["Created"]))]


def _handle(container: Json) -> ContainerHandle:
    named: Mapping[str, str] = container["Labels"]
    return ContainerHandle(
        runtime=DockerRuntime.name,
        id=container["Id"],
        name=named.get("rma.name", ""),
        service=named.get("rma.service", ""),
        spec_hash=named.get("rma.spec", ""),
        image_id=container["ImageID"],
    )


#: What engines and registries say (a pattern, searched in any case), what that is, and what to tell the owner; {} is
#: what was said. The first that fits counts.
SAYINGS: tuple[tuple[str, type[RuntimeFailure], str], ...] = (
    (
        r"no space left on device|disk quota exceeded|not enough space",
        OutOfSpace,
        "the disk Docker writes to is full ({}): free some space, for instance with `docker system prune`",
    ),
    (
        r"port is already allocated|address already in use|ports are not available",
        PortTaken,
        "the address for the container is in use by something else: {}",
    ),
    (
        r"toomanyrequests|rate limit|too many requests",
        ImagePullFailed,
        "the registry takes no more pulls from here for now ({}): wait, or `docker login`",
    ),
    (
        r"no matching manifest|does not match the specified platform|no match for platform",
        ImageMissing,
        "the image was not made for this kind of machine: {}",
    ),
    (
        r"manifest unknown|: not found|no such image|name unknown|repository does not exist|invalid reference format",
        ImageMissing,
        "no registry has the image: {}",
    ),
    (
        r"access denied|(?<!permission )denied: |unauthorized|no basic auth",
        ImageMissing,
        "no registry gives the image to this machine ({}): is its name right, or is a `docker login` missing?",
    ),
    (
        r"could not select device driver|nvidia-container-cli|CDI device|CDI is|error gathering device information",
        NotSupported,
        "Docker could not give the container its GPU: {}",
    ),
    (
        r"exec format error",
        StartFailed,
        "the image is for another kind of processor than this one: {}",
    ),
    (
        r"docker-init.*(not found|no such file)",
        NotSupported,
        "Docker's own docker-init is missing (Debian: apt-get install tini): {}",
    ),
    (
        r"executable file not found|exec: .*no such file or directory",
        StartFailed,
        "the image's own program is not in it: {}",
    ),
)


def explain(error: Exception | str, action: Action) -> RuntimeFailure:
    """Return the failure that an engine's answer, or the lack of one, means while ``action`` was done."""
    text = _words(error)
    if not isinstance(error, str) and getattr(error, "explanation", None) is None:
        return RuntimeAbsent(f"Docker does not answer ({text}): {_start_advice()}")
    for pattern, kind, sentence in SAYINGS:
        if re.search(pattern, text, re.IGNORECASE):
            return kind(sentence.format(text))
    kinds: dict[Action, type[RuntimeFailure]] = {"ask": RuntimeFailure, "pull": ImagePullFailed, "start": StartFailed}
    return kinds[action](f"Docker: {text}")


def _words(error: Exception | str) -> str:
    said = getattr(error, "explanation", None) or error
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    return last_words(text) or type(error).__name__


@hookimpl
def rma_container_runtimes(config: PluginConfig) -> Iterable[ContainerRuntime]:
    """Return the one runtime for Docker; nothing is contacted yet."""
    return [DockerRuntime(config)]
