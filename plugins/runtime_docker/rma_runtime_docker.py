"""Docker as a container runtime: finds the engine as the ``docker`` command does.

``[plugins.docker]`` may hold ``host = "unix:///…"``; else DOCKER_HOST, the Docker context, or the usual sockets are
used. Everything else is `rma_core.container_engine`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rma_core import ContainerRuntime, NotSupported, RuntimeAbsent, hookimpl
from rma_core.container_engine import Address, EngineRuntime, Json, NotInstalled, Product

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from rma_core import PluginConfig

#: The version of RMA's hooks that this was written for.
RMA_HOOK_VERSION = 1
START_ADVICE = {
    "linux": "start it (sudo systemctl start docker, or open Docker Desktop)",
    "darwin": "start it (open Docker Desktop, or `colima start`)",
    "win32": "start it (open Docker Desktop)",
}


class Docker(Product):
    """Docker Engine and Docker Desktop."""

    name = "docker"
    title = "Docker"
    prune = "docker system prune"
    login = "docker login"
    sayings = (
        (
            r"docker-init.*(not found|no such file)",
            NotSupported,
            "Docker's own docker-init is missing (Debian: apt-get install tini): {said}",
        ),
    )

    def start_advice(self) -> str:
        """Say how its owner starts it on this system."""
        return START_ADVICE.get(sys.platform, START_ADVICE["linux"])

    def permission_advice(self) -> str:
        """Say how this user comes to be let in."""
        group = "add this user to the docker group (sudo usermod -aG docker $USER, then log in again)"
        return f"{group}, or use rootless Docker"

    def refuse(self, version: Json, place: str) -> None:
        """Leave Podman, which can be had behind Docker's socket, to the runtime that knows it."""
        if any(part.get("Name") == "Podman Engine" for part in version.get("Components") or ()):
            raise NotInstalled(f"it is Podman, not Docker, that answers at {place}: use the podman runtime")


DOCKER = Docker()


class DockerRuntime(EngineRuntime):
    """Runs services in Docker containers."""

    name = DOCKER.name
    product = DOCKER

    def __init__(self, config: PluginConfig, *, environ: Mapping[str, str] | None = None) -> None:
        """Keep the settings; the engine is looked for at the first call."""
        super().__init__()
        self._config = config
        self._environ = os.environ if environ is None else environ

    def _locate(self) -> Address:
        return locate(self._config, self._environ, Path.home())


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
        raise RuntimeAbsent(f"Docker is installed, but its daemon does not run: {DOCKER.start_advice()}")
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


@hookimpl
def rma_container_runtimes(config: PluginConfig) -> Iterable[ContainerRuntime]:
    """Return the one runtime for Docker; nothing is contacted yet."""
    return [DockerRuntime(config)]
