"""With what a container is made: locked down, and nothing of the host's but a GPU it was promised."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rma_core.container_engine.abilities import has_cdi
from rma_core.container_engine.volumes import FOLDER, inside, volume_name
from rma_core.errors import NotSupported

if TYPE_CHECKING:
    from rma_core.interfaces import ContainerSpec

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
#: CDI names of this kind can also be given by the older NVIDIA Container Toolkit.
NVIDIA_CDI = "nvidia.com/gpu="


def locked_down(
    spec: ContainerSpec,
    *,
    image: dict[str, Any] | None = None,
    info: dict[str, Any] | None = None,
    title: str = "the engine",
) -> dict[str, Any]:
    """Return every option a container is made with (those of the SDK's ``containers.create``), and no others.

    ``image`` is what the engine knows of the image: its user counts if it is a number other than root's, and what it
    declares as volumes becomes memory of limited size, for a volume would be a writable place without a limit.
    Raises NotSupported for a GPU that this engine cannot give.
    """
    from docker.types import LogConfig, Ulimit

    config = (image or {}).get("Config") or {}
    limits, known = spec.limits, info or {}
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
        "tmpfs": {place: ",".join(options) for place, options in scratch(spec, config).items()},
        "shm_size": limits.shm_bytes,
        "mem_limit": limits.memory_bytes,
        "memswap_limit": limits.memory_bytes,
        "nano_cpus": round(cpus(spec, known) * 1e9),
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
        **({"mounts": mounts(spec)} if spec.files else {}),
        **gpu_options(spec, config, known, title=title),
    }


def scratch(spec: ContainerSpec, config: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return every place that can be written, with its mount options: memory, of a size that is limited."""
    common = ("rw", "noexec", "nosuid", "nodev", "mode=1777")
    sized = (*common, f"size={spec.limits.tmp_bytes}")
    volumes = dict.fromkeys(config.get("Volumes") or (), sized)
    return {**volumes, "/tmp": sized, "/run": (*common, f"size={RUN_BYTES}")}  # noqa: S108 - the container's own


def cpus(spec: ContainerSpec, info: dict[str, Any]) -> float:
    """Return how many processors it may use: engines refuse to promise more than there are."""
    return min(spec.limits.cpus, float(info.get("NCPU") or spec.limits.cpus))


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


def environment(spec: ContainerSpec, config: dict[str, Any]) -> dict[str, str]:
    """Return the spec's variables, a HOME that can be written unless somebody set one, and no GPU by variable.

    An image may say ``NVIDIA_VISIBLE_DEVICES=all``; where NVIDIA's runtime is the default, it would get every GPU.
    """
    homes = [text for text in config.get("Env") or () if text.startswith("HOME=")]
    default = {} if homes else {"HOME": "/tmp"}  # noqa: S108 - the container's own
    given = {spec.files.variable: inside(spec.files)} if spec.files else {}
    return {**default, **spec.env, **given, "NVIDIA_VISIBLE_DEVICES": "void"}


def mounts(spec: ContainerSpec) -> list[dict[str, Any]]:
    """Return the volume with the files that a container is given, to read only; nothing of the host."""
    from docker.types import Mount

    if spec.files is None:
        return []
    source = volume_name(spec.worker_id, spec.files.key)
    return [Mount(target=FOLDER, source=source, type="volume", read_only=True)]


def user(named: str) -> str:
    """Return the image's user if it is a number other than root's (a group may follow), else nobody's."""
    ordinary = re.fullmatch(r"[1-9]\d{0,9}(:\d{1,10})?", named)
    return named if ordinary else NOBODY


def gpu_options(spec: ContainerSpec, config: dict[str, Any], info: dict[str, Any], *, title: str) -> dict[str, Any]:
    """Return the options that give a container its GPU: by CDI, NVIDIA's older toolkit, or device nodes."""
    access = spec.access
    if access is None or not (access.cdi or access.device_nodes):
        return {}
    no_preload_near_a_gpu(spec, config)
    options: dict[str, Any] = {}
    if access.cdi:
        options["device_requests"] = [_device_request(access.cdi, info, title)]
    if access.device_nodes:
        options["devices"] = [f"{node}:{node}:rw" for node in access.device_nodes]
        options["group_add"] = groups_of(access.device_nodes)
    return options


def no_preload_near_a_gpu(spec: ContainerSpec, config: dict[str, Any]) -> None:
    """Refuse a GPU to what names a library to be loaded first: toolkits up to 1.17.7 load it outside the container.

    That is CVE-2025-23266. Raises NotSupported.
    """
    named = [*(config.get("Env") or ()), *(f"{name}=" for name in spec.env)]
    if any(text.startswith(("LD_PRELOAD=", "LD_AUDIT=")) for text in named):
        raise NotSupported(f"{spec.image} sets LD_PRELOAD, which is not let near a GPU")


def _device_request(names: tuple[str, ...], info: dict[str, Any], title: str) -> dict[str, Any]:
    from docker.types import DeviceRequest

    if has_cdi(info):
        return DeviceRequest(driver="cdi", device_ids=list(names))
    if "nvidia" in (info.get("Runtimes") or {}) and all(name.startswith(NVIDIA_CDI) for name in names):
        devices = [name.removeprefix(NVIDIA_CDI) for name in names]
        return DeviceRequest(driver="nvidia", device_ids=devices, capabilities=[["gpu", "compute", "utility"]])
    advice = "install the NVIDIA Container Toolkit and run `nvidia-ctk cdi generate`"
    raise NotSupported(f"{title} cannot give {', '.join(names)} to containers here: {advice}")


def groups_of(nodes: tuple[str, ...]) -> list[str]:
    """Return the groups that may open device nodes: without them, an ordinary user inside cannot."""
    return sorted({group for node in nodes for group in _group_of(node)})


def _group_of(node: str) -> list[str]:
    try:
        return [str(Path(node).stat().st_gid)]
    except OSError:
        return []  # the engine runs in a virtual machine, whose nodes are not here
