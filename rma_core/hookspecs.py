"""The three hooks, and nothing else: what a plugin may implement, with the exact arguments.

`rma_core.host` hands these signatures to pluggy; this module knows nothing of it.

A plugin is a module behind an entry point of the hook's group. Hooks are sync, take the plugin's own configuration
table, and register or detect; the objects they return act.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rma_core.interfaces import ContainerRuntime, PluginConfig, TierPolicy
    from rma_core.models.hardware import Detection

PROJECT = "rma"
#: Counted up when a hook gains an argument; hooks never lose one.
HOOK_VERSION = 1
#: The oldest version whose plugins still fit, and where a plugin says which one it was written for.
OLDEST_VERSION, VERSION_NAME = 1, "RMA_HOOK_VERSION"

#: Entry-point group of each hook: nobody has to import a plugin to learn its kind.
GROUPS = {
    "rma.detectors": "rma_detect_devices",
    "rma.runtimes": "rma_container_runtimes",
    "rma.policies": "rma_tier_policies",
}
COMMANDS_GROUP = "rma.commands"


def rma_detect_devices(config: PluginConfig) -> Detection:  # type: ignore[empty-body]
    """Return what of one kind this machine has.

    Called in a child process of its own, under a deadline (10 s unless ``deadline_s`` in ``config`` says otherwise):
    it may load drivers and take its time, it may even crash. It must not write to stdout.
    """


def rma_container_runtimes(config: PluginConfig) -> Iterable[ContainerRuntime]:  # type: ignore[empty-body]
    """Return the container runtimes this plugin can drive, without contacting any engine yet."""


def rma_tier_policies(config: PluginConfig) -> Iterable[TierPolicy]:  # type: ignore[empty-body]
    """Return named policies that turn a hardware report into a tier.

    A coordinator calls this in a child process for each version of a plugin, and asks the policies there.
    """
