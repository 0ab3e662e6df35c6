"""Fewer writes: what is known to be followed by more waits a moment, and leaves with that in one piece."""

from __future__ import annotations

import asyncio
from typing import Any

#: Bytes that wait at most; beyond that they leave at once, so that flow control sees them.
GATHERED_BYTES = 64 * 1024
#: Seconds that bytes wait at most.
PATIENCE_S = 0.005


class Gathered:
    """A transport's writing side; everything else goes to the transport itself.

    A write costs more than all else that a small frame costs, and wakes the other side up.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        #: The next write may wait a moment for others.
        self.patient = False

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the transport has
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send bytes behind those that wait, or let them wait as well."""
        patient, self.patient = self.patient, False
        self._parts.append(data)
        self._size += len(data)
        if not patient or self._size >= GATHERED_BYTES:
            self.flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(PATIENCE_S, self.flush)

    def flush(self) -> None:
        """Send what waits."""
        self._forget()
        if self._parts:
            data = b"".join(self._parts)
            self._parts.clear()
            self._size = 0
            self._transport.write(data)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def write_eof(self) -> None:
        """Send what waits, and that nothing follows."""
        self.flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Close behind what waits."""
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._forget()
        self._parts.clear()
        self._transport.abort()
