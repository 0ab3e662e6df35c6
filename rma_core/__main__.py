"""``python -m rma_core`` is ``rma``."""

from __future__ import annotations

from rma_core.commands import main

if __name__ == "__main__":
    main()
