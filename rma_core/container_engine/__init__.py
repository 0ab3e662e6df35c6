"""What runtimes share whose engines speak Docker's API: Docker itself, and Podman.

Public, as `rma_core` is: a plugin says where its engine is and what is particular about it (`Product`), and this
package does the rest: connecting, pulling with progress, locked-down containers, labels, reasons a person can act on.
The SDK (``pip install 'rma-core[container-engine]'``) is imported when an engine is first used. Its calls block, so
they run in threads, and each has its own timeout.
"""

from __future__ import annotations

from rma_core.container_engine.abilities import cannot_limit, features, unusable, warnings
from rma_core.container_engine.child import ChildEngine
from rma_core.container_engine.connection import Address, Engine, Json, NotInstalled, Product
from rma_core.container_engine.containers import measured
from rma_core.container_engine.images import Layers, find_image, reference, split_tag
from rma_core.container_engine.options import (
    CPU_SHARES,
    MAX_FILES,
    OOM_SCORE,
    container_name,
    cpus,
    environment,
    groups_of,
    labels,
    locked_down,
    mounts,
    no_preload_near_a_gpu,
    scratch,
    user,
)
from rma_core.container_engine.runtime import EngineRuntime
from rma_core.container_engine.sayings import Action, explain, last_words

__all__ = [
    "CPU_SHARES",
    "MAX_FILES",
    "OOM_SCORE",
    "Action",
    "Address",
    "ChildEngine",
    "Engine",
    "EngineRuntime",
    "Json",
    "Layers",
    "NotInstalled",
    "Product",
    "cannot_limit",
    "container_name",
    "cpus",
    "environment",
    "explain",
    "features",
    "find_image",
    "groups_of",
    "labels",
    "last_words",
    "locked_down",
    "measured",
    "mounts",
    "no_preload_near_a_gpu",
    "reference",
    "scratch",
    "split_tag",
    "unusable",
    "user",
    "warnings",
]
