"""What `rma up` runs services with: a container engine that has their images, else plain processes, and why."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rma_core.agent.start import plugin_tables
from rma_core.commands.machine import settings_of
from rma_core.host import Plugins
from rma_core.interfaces import ContainerSpec
from rma_core.settings import AgentSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rma_core.catalog import CatalogEntry
    from rma_core.interfaces import ContainerRuntime

#: Engines in the order they are looked for, when nobody names any.
ENGINES = ("docker", "podman")
#: Seconds an engine gets to answer.
PROBE_S = 10.0


class Choice(NamedTuple):
    """Which runtimes the local worker uses, and the sentence that says why."""

    runtimes: tuple[str, ...]
    sentence: str


def service_sources() -> list[Path]:
    """Return where the distributions of RMA's own services lie: beside the coordinator in a clone, else nowhere."""
    spec = importlib.util.find_spec("rma_coordinator")
    here = Path(spec.origin).resolve() if spec and spec.origin else Path(__file__).resolve()
    folder = here.parents[2] / "containers"
    return [folder] if folder.is_dir() else []


async def choose_runtimes(
    catalog: Sequence[CatalogEntry], asked: tuple[str, ...], home: Path, sources: list[Path]
) -> Choice:
    """Choose what the local worker runs services with: an engine that has the images, else plain processes.

    Services that cannot run as processes decide nothing: without their images they run nowhere.
    """
    ours = [entry for entry in catalog if entry.process is not None]
    settings = settings_of(str(home), service_sources=[str(source) for source in sources])
    if not asked and settings.runtimes != AgentSettings().runtimes:
        asked = tuple(settings.runtimes)
    if asked:
        return Choice(asked, f"Services run with {', '.join(asked)}, as you said.")
    runtimes = Plugins.discover(kinds=["runtime"], **settings.plugin_rules()).runtimes(plugin_tables(settings))
    reasons = []
    for name in ENGINES:
        if name in runtimes:
            missing = await _missing(runtimes[name], ours)
            if missing == "":
                return Choice((name,), f"Services run in containers ({name}).")
            reasons.append(f"{name}: {missing}")
    why = "; ".join(reasons) or "no container engine is installed"
    return Choice(("process",), f"Services run as plain processes of this user, which are not isolated ({why}).")


async def _missing(runtime: ContainerRuntime, catalog: Sequence[CatalogEntry]) -> str:
    """Say what keeps an engine from running the catalog's services; an empty string when nothing does."""
    try:
        health = await asyncio.wait_for(runtime.probe(), PROBE_S)
        if health.state != "healthy":
            return health.reason
        absent = [
            entry.service for entry in catalog if not await asyncio.wait_for(runtime.has_image(_spec(entry)), PROBE_S)
        ]
    except TimeoutError:
        return f"no answer within {PROBE_S:.0f} s"
    finally:
        await runtime.aclose()
    return f"works, but has no image for {', '.join(absent)}: `make images` builds them" if absent else ""


def _spec(entry: CatalogEntry) -> ContainerSpec:
    return ContainerSpec(
        worker_id="worker-00000000",
        name=entry.name,
        service=entry.service,
        image=entry.image,
        image_digest=entry.image_digest,
        port=entry.port,
        env={},
        limits=entry.limits,
        spec_hash="",
    )
