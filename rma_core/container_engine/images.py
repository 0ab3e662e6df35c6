"""Images: which one is meant, whether the engine has it, and getting it with progress."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from rma_core.container_engine.connection import CONNECT_S
from rma_core.container_engine.sayings import LAST_CHARACTERS, explain, unless_absent
from rma_core.interfaces import PullProgress

if TYPE_CHECKING:
    from collections.abc import Iterator

    import requests

    from rma_core.container_engine.connection import Engine, Product
    from rma_core.interfaces import ContainerSpec

Json = dict[str, Any]

logger = logging.getLogger(__name__)

#: Seconds in which a pull must move at least one byte, or reach another step.
PULL_IDLE_S = 120.0
#: The same once every layer has arrived: some engines unpack gigabytes without a word.
UNPACK_IDLE_S = 900.0


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
        # Some engines tell of a layer that comes within a second no size at all.
        total = (sum(self._total.values()) or None) if self._status.keys() <= self._total.keys() else None
        done = self._all("Pull complete", "Already exists")
        words = "complete" if done else "unpacking" if self.patience_s == UNPACK_IDLE_S else "downloading"
        return PullProgress(done_bytes=sum(self._done.values()), total_bytes=total, note=words)

    def _all(self, *statuses: str) -> bool:
        return all(status.startswith(statuses) for status in self._status.values())


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
    found = image_of(engine, reference(spec))
    if found is None and spec.image_digest:
        local = image_of(engine, spec.image)
        found = local if local and local["Id"] == spec.image_digest else None
    return found


def image_of(engine: Engine, name: str) -> Json | None:
    """Return what the engine knows of the image of that name or id, or None."""
    return unless_absent(lambda: dict(engine.api.inspect_image(name)))  # type: ignore[no-untyped-call]


def unpacked_bytes(image: Json) -> int:
    """Return what an image takes on this machine, as its engine tells; 0 where it does not."""
    return max(0, int(image.get("Size") or 0))


def open_pull(product: Product, engine: Engine, spec: ContainerSpec) -> requests.Response:
    """Ask the engine to pull. The SDK's own method returns nothing that could be cut while another thread reads."""
    repository, tag = split_tag(spec.image)
    url = f"{engine.api.base_url}/v{engine.api.api_version}/images/create"
    response = engine.api.post(
        url,
        params={"fromImage": repository, "tag": spec.image_digest or tag},
        headers=_credentials(product, engine, repository),
        stream=True,
        timeout=(CONNECT_S, UNPACK_IDLE_S),
    )
    if response.ok:
        return response
    with response:
        raise explain(_message(response.text), "pull", product)


def _message(body: str) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body[:LAST_CHARACTERS]


def _credentials(product: Product, engine: Engine, repository: str) -> dict[str, str]:
    """Return what the owner has logged in with for this registry, if anything."""
    from docker import auth
    from docker.errors import DockerException

    try:
        registry, _ = auth.resolve_repository_name(repository)
        header = auth.get_config_header(engine.api, registry)
    except DockerException as error:
        logger.info(
            "%s: pulling %s without credentials: %s", product.title, repository, error, extra={"action": "pull"}
        )
        return {}
    return {"X-Registry-Auth": header.decode()} if header else {}


def next_event(lines: Iterator[bytes]) -> Json | None:
    """Return the next event, or None at the end."""
    line = next(lines, None)
    return None if line is None else dict(json.loads(line or b"{}"))


def cut(response: requests.Response) -> None:
    """Close a response; a thread that waits in it for more bytes returns at once."""
    try:
        response.raw.shutdown()
    except (AttributeError, RuntimeError, ValueError, OSError):
        logger.debug("nothing to cut: the response has ended, or this urllib3 cannot")
    response.close()
