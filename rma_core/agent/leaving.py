"""What is left of a machine that leaves its pool: models that were downloaded for it, and engines' copies of them."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING

from rma_core.agent.detecting import discover
from rma_core.agent.engines import asked
from rma_core.agent.start import plugin_tables
from rma_core.agent.state import MODELS_FOLDER
from rma_core.errors import RuntimeAbsent, RuntimeFailure

if TYPE_CHECKING:
    from rma_core.interfaces import ContainerRuntime
    from rma_core.settings import AgentSettings

#: Seconds that an engine has to remove its copies.
FORGET_S = 60.0


async def forget_models(settings: AgentSettings, worker_id: str) -> list[str]:
    """Remove what was downloaded and copied for a worker; return a sentence for each place where some is left."""
    plugins = discover(settings)
    engines = plugins.runtimes(plugin_tables(settings))
    left = [await _forget_copies(engine, worker_id) for engine in engines.values()]
    left.append(await asyncio.to_thread(_remove, settings))
    return [sentence for sentence in left if sentence]


async def _forget_copies(engine: ContainerRuntime, worker_id: str) -> str:
    try:
        await asked(engine, lambda: engine.forget_files(worker_id, ()), within_s=FORGET_S)
    except RuntimeAbsent:
        # An engine that is not there is most likely one that never ran anything.
        return ""
    except RuntimeFailure as error:
        return f"{engine.name} may keep copies of models: {error.message}"
    finally:
        await engine.aclose()
    return ""


def _remove(settings: AgentSettings) -> str:
    folder = settings.home_path / MODELS_FOLDER
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{folder} could not be removed: {error.strerror or error}"
    return ""
