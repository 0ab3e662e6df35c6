"""RMA's coordinator: keeps a fleet of volunteers' machines, hands out work and answers clients."""

from __future__ import annotations

__version__ = "0.1.0"
