"""procrastinate's durable cycles: deferred by many, then run by a worker with as many at once.

Run by the python of the peers: ``_peer_procrastinate.py PORT CYCLES WAITING``. Prints JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time

import procrastinate  # type: ignore[import-not-found]  # the peers' own environment has it


async def main() -> None:
    port, cycles, waiting = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    logging.disable(logging.WARNING)
    connector = procrastinate.PsycopgConnector(
        conninfo=f"host=127.0.0.1 port={port} user=bench dbname=postgres", max_size=32
    )
    app = procrastinate.App(connector=connector)

    @app.task(name="nothing")  # type: ignore[untyped-decorator]  # the same
    async def nothing(payload: str) -> None:
        """The work itself is none."""

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        numbers = iter(range(cycles))

        async def insert() -> None:
            for number in numbers:
                await nothing.defer_async(payload=f"{number:0200}")

        began = time.perf_counter()
        await asyncio.gather(*(insert() for _ in range(waiting)))
        inserted = time.perf_counter() - began
        await app.run_worker_async(concurrency=waiting, wait=False, install_signal_handlers=False)
        took = time.perf_counter() - began
        done = await app.job_manager.list_jobs_async(status="succeeded")
    if len(list(done)) != cycles:
        sys.exit(f"not all of {cycles} jobs were done")
    print(json.dumps({"cycles": cycles, "seconds": round(took, 3), "insert_s": round(inserted, 3)}))


if __name__ == "__main__":
    asyncio.run(main())
