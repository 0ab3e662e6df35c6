"""Finding out whether an engine answers at an address of this machine, and what it says about itself."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from rma_core.container_engine import options
from rma_core.container_engine.sayings import words
from rma_core.errors import RuntimeAbsent, RuntimeFailure

if TYPE_CHECKING:
    import docker

    from rma_core.interfaces import ContainerSpec, ContainerStats

Json = dict[str, Any]

#: Seconds until an engine must have accepted a connection and told its version.
CONNECT_S = 5
#: Seconds for one question to the engine.
ASK_S = 30
#: Seconds for making or starting a container; an engine that copies images (vfs) takes its time.
START_S = 120


class Address(NamedTuple):
    """Where an engine listens and how that is known; ``tls`` are paths of CA, certificate and key."""

    host: str
    source: str = "default socket"
    tls: tuple[str, str, str] | None = None
    verify: bool = True

    @property
    def place(self) -> str:
        """The address with how it is known."""
        return f"{self.host} ({self.source})"


class Engine(NamedTuple):
    """Connections to one engine (``slow`` waits longer) and what it said about itself."""

    api: docker.APIClient
    slow: docker.DockerClient
    info: Json
    version: str
    address: Address


class NotInstalled(RuntimeAbsent):
    """Nothing of the engine is on this machine: no fault, and no advice."""


class Product:
    """What is particular about one kind of engine that speaks Docker's API; a plugin derives its own from this."""

    #: The runtime's name, lower-case, and the product's as people write it.
    name = ""
    title = ""
    #: Commands that the owner is told to run: when the disk is full, when a registry wants to know who asks.
    prune = ""
    login = ""
    #: What only this product says, as (pattern, failure, sentence); see `sayings.SAYINGS`.
    sayings: tuple[tuple[str, type[RuntimeFailure], str], ...] = ()

    def start_advice(self) -> str:
        """Say how its owner starts it."""
        return "start it"

    def permission_advice(self) -> str:
        """Say how this user comes to be let in."""
        return "run the agent as a user who may"

    def refuse(self, version: Json, place: str) -> None:
        """Raise NotInstalled when what answers at ``place`` is another product, RuntimeAbsent when it is too old."""

    def complete(self, api: docker.APIClient, info: Json) -> Json:
        """Return what the engine says about itself with what its answer to Docker's question leaves out."""
        del api
        return info

    def create(self, engine: Engine, spec: ContainerSpec, image: Json) -> str:
        """Make the container with every option of `options.locked_down`, and return its id."""
        made = options.locked_down(spec, image=image, info=engine.info, title=self.title)
        return str(engine.slow.containers.create(str(image["Id"]), **made).id)

    def measure(self, engine: Engine, container: Json) -> ContainerStats | None:
        """Return what a running container uses where the engine cannot tell; ``None`` to ask the engine."""
        del engine, container
        return None


def connect(product: Product, address: Address) -> Engine:
    """Return a connection to an engine of this machine that answers. Raises RuntimeAbsent with what to do."""
    # First, for where nobody opens, the SDK is not even imported.
    knock(product, address)
    from docker.constants import DEFAULT_DOCKER_API_VERSION
    from docker.errors import DockerException

    try:
        with contextlib.closing(_client(address, DEFAULT_DOCKER_API_VERSION, CONNECT_S)) as first:
            version, info = introduce(product, first.api, address)
        spoken = str(version["ApiVersion"])
        ask, slow = _client(address, spoken, ASK_S), _client(address, spoken, START_S)
    except (DockerException, OSError, ValueError, KeyError, TypeError) as error:
        told = f"{product.title} does not answer at {address.place}: {words(error)}"
        raise RuntimeAbsent(f"{told}; {product.start_advice()}") from error
    return Engine(ask.api, slow, info, str(version.get("Version", "")), address)


def introduce(product: Product, api: docker.APIClient, address: Address) -> tuple[Json, Json]:
    """Return what an engine says of its version and of itself; it has CONNECT_S for each answer.

    Raises RuntimeAbsent when it is not ``product``, and what the SDK and its HTTP library raise.
    """
    version = _asked(api, "version")
    product.refuse(version, address.place)
    return version, product.complete(api, _asked(api, f"v{version.get('ApiVersion')}/info"))


def _asked(api: docker.APIClient, path: str) -> Json:
    """Ask what is answered at once. The SDK's own methods wait as long as its slowest."""
    answer = api.get(f"{api.base_url}/{path}", timeout=CONNECT_S)
    answer.raise_for_status()
    said = answer.json()
    if not isinstance(said, dict):
        raise OSError(f"it answers {path} with something else")
    return said


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


def knock(product: Product, address: Address) -> None:
    """Connect and hang up: the plain error of the system says more than what the SDK makes of it.

    Raises RuntimeAbsent.
    """
    parts, title = urlsplit(address.host), product.title
    try:
        if parts.scheme == "unix":
            _knock_unix(parts.path)
        elif parts.scheme in ("tcp", "http", "https"):
            _knock_tcp(address, parts.hostname or "", parts.port or 2375)
        elif parts.scheme != "npipe":
            raise RuntimeAbsent(_elsewhere(address))
    except FileNotFoundError:
        raise RuntimeAbsent(f"there is no {title} at {address.place}: {product.start_advice()}") from None
    except PermissionError:
        told = f"this user may not use {title} at {address.place}"
        raise RuntimeAbsent(f"{told}: {product.permission_advice()}") from None
    except OSError as error:
        told = error.strerror or str(error) or "no answer in time"
        said = f"{title} is installed, but its daemon does not answer at {address.place} ({told})"
        raise RuntimeAbsent(f"{said}: {product.start_advice()}") from None


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
        f"{address.place} is not an engine on this machine, so its containers could not be reached from here;"
        f" choose a local one ({address.source} names this one)"
    )
