"""What is done to containers through an engine: start, look at, listen to, measure, stop, find one's own."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from typing import TYPE_CHECKING, Any

from rma_core.container_engine.abilities import unusable
from rma_core.container_engine.connection import ASK_S
from rma_core.container_engine.images import find_image, image_of, reference, unpacked_bytes
from rma_core.container_engine.options import container_name
from rma_core.container_engine.sayings import LAST_LINES, last_words, unless_absent
from rma_core.errors import ImageMissing, NotSupported, RuntimeFailure, StartFailed
from rma_core.interfaces import ContainerHandle, ContainerState, ContainerStats

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping

    from rma_core.container_engine.connection import Engine, Product
    from rma_core.interfaces import ContainerSpec

Json = dict[str, Any]

logger = logging.getLogger(__name__)

#: HTTP's statuses for a name that is in use, for what is not there, and the first of the server's own troubles.
CONFLICT, NOT_FOUND, SERVER_ERROR = 409, 404, 500
#: How often an engine that is still clearing away is asked for a file, and the seconds between.
LOOKS, LOOK_AGAIN_S = 10, 0.2
#: What Podman says instead.
NAME_TAKEN = "is already in use"
#: The exit code of what was killed (SIGKILL).
KILLED = 137
#: The most that `logs` returns.
MAX_LOG_BYTES = 65_536
#: The most lines that are asked of the engine: it reads a whole line, of up to 16 KiB, before it is cut.
MAX_LOG_LINES = 1000
#: What engines call their own processor, and what images call the same.
PROCESSORS = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386", "i386": "386"}


def start(product: Product, engine: Engine, spec: ContainerSpec, abandoned: threading.Event) -> ContainerHandle:
    """Make and start a container; when it does not run, or ``abandoned`` is set meanwhile, nothing of it is left."""
    if reason := unusable(engine.info, product.title):
        raise NotSupported(reason)
    image = find_image(engine, spec)
    if image is None:
        raise ImageMissing(f"{product.title} does not have the image {reference(spec)} here; it must be pulled first")
    container_id = _create(product, engine, spec, image)
    try:
        engine.slow.api.start(container_id)
        state = inspect(engine, container_id)
        if state.state != "running":
            raise StartFailed(f"{spec.name} ended at once: {state.reason}")
        if abandoned.is_set():
            raise StartFailed(f"nobody waits for {spec.name} any more")
    except BaseException:
        _try_to_remove(product, engine, container_id)
        raise
    return ContainerHandle(
        runtime=product.name,
        id=container_id,
        name=spec.name,
        service=spec.service,
        spec_hash=spec.spec_hash,
        image_id=str(image["Id"]),
        image_bytes=unpacked_bytes(image),
    )


def _create(product: Product, engine: Engine, spec: ContainerSpec, image: Json) -> str:
    """Make the container; a leftover of this worker under the same name gives way, anybody else's does not."""
    from docker.errors import APIError

    try:
        return product.create(engine, spec, image)
    except APIError as error:
        if error.status_code != CONFLICT and NAME_TAKEN not in str(error.explanation):
            raise
    _remove_leftover(engine, spec)
    return product.create(engine, spec, image)


def _remove_leftover(engine: Engine, spec: ContainerSpec) -> None:
    name = container_name(spec)
    found = container(engine, name)
    if found is None:
        return
    if (found["Config"].get("Labels") or {}).get("rma.worker") != spec.worker_id:
        raise StartFailed(
            f"the name {name} is taken by a container that is not this worker's ({found['Id'][:12]},"
            f" {found['Config'].get('Image')}): rename or remove it"
        )
    engine.slow.api.remove_container(found["Id"], v=True, force=True)


def _try_to_remove(product: Product, engine: Engine, container_id: str) -> None:
    """Remove what would not start; what cannot be removed now is found by its labels later."""
    import requests.exceptions
    from docker.errors import DockerException

    try:
        engine.slow.api.remove_container(container_id, v=True, force=True)
    except (DockerException, requests.exceptions.RequestException, OSError) as error:
        logger.info(
            "%s: %s is left behind for now: %s", product.title, container_id[:12], error, extra={"action": "runtime"}
        )


def container(engine: Engine, container_id: str) -> Json | None:
    """Return what the engine knows of a container, or None."""
    return unless_absent(lambda: dict(engine.api.inspect_container(container_id)))


def inspect(engine: Engine, container_id: str) -> ContainerState:
    """Say how a container stands, with the last words of one that ended."""
    found = container(engine, container_id)
    if found is None:
        return ContainerState(state="missing")
    state = found["State"]
    if state["Running"]:
        return ContainerState(state="running", reason="paused" if state.get("Paused") else "")
    if state["Status"] == "created":
        return ContainerState(state="exited", reason="it was made, but never started")
    words = last_words(logs(engine, container_id, LAST_LINES)) or without_program(engine, found)
    foreign = another_processor(image_of(engine, str(found["Image"])) or {}, engine.info)
    return ContainerState(state="exited", exit_code=int(state["ExitCode"]), reason=why_it_ended(found, words, foreign))


def without_program(engine: Engine, found: Json) -> str:
    """Say that an image has not the program it names: a busy Podman can lose what its low-level runtime said of it."""
    path = program(found)
    if not found["State"].get("ExitCode") or not path.startswith("/"):
        return ""
    # The SDK can only fetch the file itself.
    address = f"{engine.api.base_url}/containers/{found['Id']}/archive"
    for _ in range(LOOKS):
        status = engine.api.head(address, params={"path": path}, timeout=ASK_S).status_code
        if status < SERVER_ERROR:
            return f"the image's own program is not in it: {path}" if status == NOT_FOUND else ""
        # Podman is still clearing away what ended.
        time.sleep(LOOK_AGAIN_S)
    return ""


def program(found: Json) -> str:
    """Return the program a container runs: behind the engine's init, which Podman shows until it has cleared away."""
    path, words = str(found.get("Path") or ""), [str(word) for word in found.get("Args") or ()]
    return words[1] if path.endswith("-init") and words[:1] == ["--"] and len(words) > 1 else path


def why_it_ended(found: Json, words: str, foreign: str = "") -> str:
    """Say why a container ended, from what the engine knows of it, its last words, and whether its image fits here."""
    state, memory = found["State"], int(found["HostConfig"].get("Memory") or 0)
    parts = [f"out of memory (limit {memory / 2**20:.0f} MiB)"] if state.get("OOMKilled") else []
    if not parts and memory and state["ExitCode"] == KILLED:
        # Podman on control groups of version 1 does not notice; and who else would kill it?
        parts.append(f"killed, most likely out of memory (limit {memory / 2**20:.0f} MiB)")
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


def endpoint(engine: Engine, handle: ContainerHandle) -> str:
    """Return the loopback address its port is published at. Raises RuntimeFailure for one that has none."""
    found = container(engine, handle.id) or {}
    ports = (found.get("NetworkSettings") or {}).get("Ports") or {}
    published = [binding for bindings in ports.values() for binding in bindings or ()]
    if not published:
        raise RuntimeFailure(f"{handle.name} has no address: it does not run")
    return f"http://127.0.0.1:{published[0]['HostPort']}"


def logs(engine: Engine, container_id: str, lines: int) -> str:
    """Return its last output, both streams together; of an unknown one nothing."""
    most = max(0, min(lines, MAX_LOG_LINES))
    output = unless_absent(lambda: engine.api.logs(container_id, stdout=True, stderr=True, tail=most))
    return (output or b"")[-MAX_LOG_BYTES:].decode("utf-8", "ignore")


def stats(product: Product, engine: Engine, handle: ContainerHandle) -> ContainerStats:
    """Return what a container uses; caches that the kernel can drop do not count as memory."""
    there = container(engine, handle.id)
    if there is None or not there["State"]["Running"]:
        raise RuntimeFailure(f"{handle.name} has no stats: it does not run")
    if (measured := product.measure(engine, there)) is not None:
        return measured
    found = engine.api.stats(handle.id, stream=False, one_shot=True)
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


def stop(engine: Engine, container_id: str, grace_s: float) -> None:
    """Ask it to end, kill it after ``grace_s``, and remove it with its volumes."""
    from docker.errors import APIError

    def end() -> None:
        engine.slow.api.stop(container_id, timeout=math.ceil(max(0.0, grace_s)))
        engine.slow.api.remove_container(container_id, v=True, force=True)

    try:
        unless_absent(end)
    except APIError as error:
        if error.status_code != CONFLICT:  # somebody else is removing it already
            raise


def owned(product: Product, engine: Engine, worker_id: str) -> list[ContainerHandle]:
    """Return a worker's containers by their labels, the oldest first."""
    listed = engine.api.containers(all=True, filters={"label": f"rma.worker={worker_id}"})
    sizes = {image_id: _image_bytes(engine, image_id) for image_id in {str(found["ImageID"]) for found in listed}}
    return [
        _handle(product, found, sizes[str(found["ImageID"])])
        for found in sorted(listed, key=lambda c: int(c["Created"]))
    ]


def _image_bytes(engine: Engine, image_id: str) -> int:
    """Return what an image takes here; 0 where the engine cannot tell: its containers are taken over all the same."""
    from docker.errors import APIError

    try:
        return unpacked_bytes(image_of(engine, image_id) or {})
    except APIError as error:
        logger.debug("the size of %s is not known: %s", image_id, error)
        return 0


def _handle(product: Product, container: Json, image_bytes: int) -> ContainerHandle:
    named: Mapping[str, str] = container["Labels"]
    return ContainerHandle(
        runtime=product.name,
        id=container["Id"],
        name=named.get("rma.name", ""),
        service=named.get("rma.service", ""),
        spec_hash=named.get("rma.spec", ""),
        image_id=container["ImageID"],
        image_bytes=image_bytes,
    )


def measured(pid: int) -> ContainerStats | None:
    """Return what a process and all below it use, for engines that cannot measure; files are counted by each."""
    import psutil

    try:
        first = psutil.Process(pid)
        processes = [first, *first.children(recursive=True)]
    except (psutil.Error, ValueError):
        return None
    seconds, memory, count = 0.0, 0, 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times, used = process.cpu_times(), process.memory_info()
            seconds += times.user + times.system
            memory, count = memory + used.rss, count + 1
    return ContainerStats(cpu_seconds=seconds, memory_bytes=memory, pids=count)
