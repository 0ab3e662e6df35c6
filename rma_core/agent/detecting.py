"""The detectors of a running agent: found anew for each look, so that what its owner decides meanwhile counts."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rma_core.host import Plugins
from rma_core.quarantine import Quarantine

if TYPE_CHECKING:
    from collections.abc import Callable

    from rma_core.models.hardware import HardwareReport
    from rma_core.models.worker import PluginReport
    from rma_core.settings import AgentSettings


#: Settings that count for the next look; all others are those of the start.
OF_LOOKS = ("approve_plugins", "block_plugins", "only_plugins", "plugins", "detectors", "detect_deadline_s",
            "exclude_devices")  # fmt: skip


class Detecting:
    """Looks at this machine, and says how its plugins stand; a detector that keeps failing is left alone a while."""

    def __init__(
        self,
        settings: AgentSettings,
        plugins: Plugins | None = None,
        *,
        again: Callable[[], AgentSettings] | None = None,
    ) -> None:
        """Take the detectors and runtimes that the settings allow; given ``plugins`` stay the only ones.

        ``again`` reads the settings anew: what they say of detectors and devices counts from the next look on.
        """
        self._settings, self._given, self._read = settings, plugins is not None, again
        self.plugins = plugins or discover(settings)
        self._detectors = self.plugins
        self._quarantine = Quarantine(clock=time.monotonic)
        self._looked = False

    async def look(self) -> HardwareReport:
        """Detect this machine's hardware, or take the recording that stands in for it. Raises SettingProblem."""
        detectors = self._detectors
        if self._looked and not self._given:
            detectors = await asyncio.to_thread(self._again)
        self._looked = True
        report = await look(self._settings, detectors, self._quarantine)
        # Only now does each of them say how it went.
        self._detectors = detectors
        return report

    def _again(self) -> Plugins:
        if self._read is not None:
            new = self._read()
            self._settings = msgspec.structs.replace(self._settings, **{name: getattr(new, name) for name in OF_LOOKS})
        found = Plugins.discover(kinds=["detector"], **self._settings.plugin_rules())
        found.failures = self.plugins.failures
        return found

    def reports(self) -> tuple[PluginReport, ...]:
        """Return how each plugin stands."""
        if self._detectors is self.plugins:
            return self.plugins.reports()
        rest = (one for one in self.plugins.reports() if one.kind != "detector")
        return (*self._detectors.reports(), *rest)


def discover(settings: AgentSettings) -> Plugins:
    """Find the detectors and runtimes of this machine, as its settings allow."""
    return Plugins.discover(kinds=["detector", "runtime"], **settings.plugin_rules())


async def look(settings: AgentSettings, plugins: Plugins, quarantine: Quarantine | None = None) -> HardwareReport:
    """Detect this machine's hardware once, or take the recording that stands in for it."""
    if settings.fake_devices:
        from rma_core.record import load_report

        return await asyncio.to_thread(load_report, Path(settings.fake_devices))
    from rma_core.detection import detect

    return await detect(
        plugins,
        config=settings.plugins,
        deadline_s=settings.detect_deadline_s,
        quarantine=quarantine,
        excluded=settings.exclude_devices,
    )
