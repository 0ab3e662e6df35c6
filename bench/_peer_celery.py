"""Celery's durable cycles: sent by threads, run by a worker of its own that acknowledges when it is done.

Run by the python of the peers: ``_peer_celery.py PORT CYCLES WAITING``. Prints JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from celery import Celery  # type: ignore[import-not-found]  # the peers' own environment has it

#: Seconds in which a worker must be there.
READY_S = 60.0

app = Celery("peer", broker=f"redis://127.0.0.1:{os.environ.get('PEER_PORT') or sys.argv[1]}/0")
app.conf.update(task_acks_late=True, task_ignore_result=True, worker_prefetch_multiplier=64, broker_pool_limit=64)


@app.task(name="peer.nothing")  # type: ignore[untyped-decorator]  # the same
def nothing(payload: str) -> None:
    """The work itself is none."""


def main() -> None:
    port, cycles, waiting = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    folder = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - as short as Python's path wants it
    command = [sys.executable, "-m", "celery", "-A", "_peer_celery", "worker", "-c", "2", "-l", "ERROR"]
    worker = subprocess.Popen(
        [*command, "--without-gossip", "--without-mingle", "--without-heartbeat"],
        env={**os.environ, "PEER_PORT": port, "PYTHONPATH": folder},
        stdout=subprocess.DEVNULL,
    )
    try:
        with app.connection() as connection:
            client = connection.default_channel.client
            _until_idle(client, first=True)
            began = time.perf_counter()
            with ThreadPoolExecutor(waiting) as threads:
                list(threads.map(lambda number: nothing.delay(f"{number:0200}"), range(cycles)))
            inserted = time.perf_counter() - began
            _until_idle(client)
            took = time.perf_counter() - began
    finally:
        worker.terminate()
        worker.wait(30)
    print(json.dumps({"cycles": cycles, "seconds": round(took, 3), "insert_s": round(inserted, 3)}))


def _until_idle(client: object, *, first: bool = False) -> None:
    """Wait until nothing is queued or unacknowledged; the ``first`` time, until a worker has done a task."""
    if first:
        nothing.delay("")
    deadline = time.monotonic() + (READY_S if first else 240)
    while client.llen("celery") or client.hlen("unacked"):  # type: ignore[attr-defined]  # a Redis client
        if time.monotonic() > deadline:
            sys.exit("the worker does not finish its tasks")
        time.sleep(0.01)


if __name__ == "__main__":
    main()
