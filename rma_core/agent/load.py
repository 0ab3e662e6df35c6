"""How busy this machine is: the busiest service, or its processors, whichever is more."""

from __future__ import annotations

import asyncio

#: Seconds between two looks at the processors.
SAMPLE_EVERY_S = 5.0


class Load:
    """Samples the processors in a thread; `share` is the latest value, 0 to 1."""

    def __init__(self) -> None:
        self.share = 0.0

    async def run(self) -> None:
        """Sample until cancelled."""
        import psutil

        await asyncio.to_thread(psutil.cpu_percent, None)  # the first value has nothing to compare with
        while True:
            await asyncio.sleep(SAMPLE_EVERY_S)
            self.share = min(1.0, await asyncio.to_thread(psutil.cpu_percent, None) / 100)
