"""RMA: what plugin authors need. Import from here; everything else may move."""

from __future__ import annotations

from rma_core.catalog import CatalogEntry, Limits, Needs, ProcessForm
from rma_core.errors import (
    DetectionError,
    ImageMissing,
    ImagePullFailed,
    NotSupported,
    OutOfSpace,
    PortTaken,
    RMAError,
    RuntimeAbsent,
    RuntimeFailure,
    StartFailed,
)
from rma_core.hookspecs import HOOK_VERSION
from rma_core.host import hookimpl
from rma_core.interfaces import (
    ContainerHandle,
    ContainerRuntime,
    ContainerSpec,
    ContainerState,
    ContainerStats,
    GivenFile,
    GivenFiles,
    PluginConfig,
    PolicyInput,
    PullProgress,
    RuntimeHealth,
    TierDecision,
    TierPolicy,
)
from rma_core.models.hardware import Capabilities, ContainerAccess, Detection, Device, HardwareReport

__version__ = "0.1.0"

__all__ = [
    "HOOK_VERSION",
    "Capabilities",
    "CatalogEntry",
    "ContainerAccess",
    "ContainerHandle",
    "ContainerRuntime",
    "ContainerSpec",
    "ContainerState",
    "ContainerStats",
    "Detection",
    "DetectionError",
    "Device",
    "GivenFile",
    "GivenFiles",
    "HardwareReport",
    "ImageMissing",
    "ImagePullFailed",
    "Limits",
    "Needs",
    "NotSupported",
    "OutOfSpace",
    "PluginConfig",
    "PolicyInput",
    "PortTaken",
    "ProcessForm",
    "PullProgress",
    "RMAError",
    "RuntimeAbsent",
    "RuntimeFailure",
    "RuntimeHealth",
    "StartFailed",
    "TierDecision",
    "TierPolicy",
    "__version__",
    "hookimpl",
]
