"""Sizes as people write them: ``64.0GB`` of memory, ``1TB`` of storage; and how long something takes.

Memory is binary however it is spelled (a "16 GB" module holds 16 GiB); storage is decimal unless it says ``GiB``.
"""

from __future__ import annotations

import functools
import re

GIB = 2**30
GB = 10**9

#: Sizes that are known by heart: a catalog's are read again for each machine that is placed.
SIZES = 1024

_FORM = re.compile(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([KMGTP]?)(i?)B\s*", re.IGNORECASE)
_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


@functools.lru_cache(SIZES)
def parse_size(text: str, *, binary: bool) -> int:
    """Return the bytes in ``text``; ``binary`` reads a plain ``GB`` as 2**30. Raises ValueError."""
    found = _FORM.fullmatch(text)
    if not found:
        message = f"{text!r} is not a size such as '16GB', '62.7GiB' or '1TB'"
        raise ValueError(message)
    number, prefix, i = found.groups()
    base = 1024 if binary or i else 1000
    return int(float(number) * base ** _POWER[prefix.upper()])


def memory_text(size_bytes: int) -> str:
    """Return memory as CONTRACT writes it: ``64.0GB``, counted in 2**30."""
    return f"{size_bytes / GIB:.1f}GB"


def storage_text(size_bytes: int) -> str:
    """Return storage as CONTRACT writes it: ``512GB`` or ``1TB``, decimal."""
    terabytes = size_bytes / (1000 * GB)
    if terabytes >= 1:
        return f"{terabytes:.3g}TB" if terabytes < 100 else f"{terabytes:.0f}TB"  # noqa: PLR2004 - .3g would write 1e+03
    return f"{size_bytes / GB:.0f}GB" if size_bytes >= 100 * GB else f"{size_bytes / GB:.1f}GB"


def traffic_text(size_bytes: int) -> str:
    """Return what passed a network as those who charge for it count: ``1.5 GB``, ``812 MB``, decimal."""
    for unit, scale in (("TB", 1000 * GB), ("GB", GB), ("MB", 10**6), ("kB", 1000)):
        if size_bytes >= scale:
            number = size_bytes / scale
            return f"{number:.3g} {unit}" if number < 100 else f"{number:.0f} {unit}"  # noqa: PLR2004 - .3g would write 1e+03
    return f"{size_bytes} bytes"


def human(size_bytes: float) -> str:
    """Return a size for a sentence: ``62.7 GiB``, ``812 MiB``."""
    whole_from = 100  # three digits say enough
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= scale:
            number = size_bytes / scale
            return f"{number:.0f} {unit}" if number >= whole_from or number == int(number) else f"{number:.1f} {unit}"
    return f"{size_bytes:.0f} bytes"


def exact(size_bytes: int) -> str:
    """Return a size of any magnitude in the form that `parse_size` reads, never less than it is."""
    return f"{size_bytes}B" if size_bytes < 10**12 else f"{-(-size_bytes // 2**20)}MiB"


def duration(seconds: float) -> str:
    """Return how long something takes, for a sentence: ``40 s``, ``3 min``, ``2.5 h``."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            number = seconds / size
            return f"{number:.1f} {unit}" if unit == "h" and number < 10 else f"{number:.0f} {unit}"  # noqa: PLR2004 - one digit more where it matters
    return f"{seconds:.0f} s"
