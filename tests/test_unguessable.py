"""Names that nobody can guess: even, never twice, and not shared with a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

from rma_coordinator.domain.unguessable import DIGITS, PAGE_BYTES, Source


def test_bytes_are_handed_out_once_and_in_order() -> None:
    pages = [os.urandom(PAGE_BYTES) for _ in range(3)]
    left = list(pages)
    source = Source(lambda count: left.pop(0)[:count])
    assert source.take(16) + source.take(1) + source.take(PAGE_BYTES - 17) == pages[0]
    assert source.hex(8) == pages[1][:8].hex()
    assert source.take(PAGE_BYTES - 4) == pages[2][: PAGE_BYTES - 4], "what is left of a page is never mixed in"


def test_digits_are_even() -> None:
    counts = Counter("".join(Source().digits(2000) for _ in range(50)))
    assert set(counts) == set(DIGITS.decode())
    mean = 100_000 / len(DIGITS)
    assert max(abs(count - mean) for count in counts.values()) < 6 * mean**0.5


FORKING = """
import os
from rma_coordinator.domain import unguessable

unguessable.source.take(1)
reading, writing = os.pipe()
if not os.fork():
    os.write(writing, unguessable.source.take(32))
    os._exit(0)
os.wait()
print(os.read(reading, 32) != unguessable.source.take(32))
"""


def test_a_fork_draws_bytes_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "True"
