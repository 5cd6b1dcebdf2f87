"""Bytes, shares and names for reading."""

import re
from collections import Counter
from collections.abc import Iterable

from packlight.errors import InputError


def human_bytes(count: int) -> str:
    """A number of bytes for reading: 1536 -> "1.50 KiB"."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    # 999.5 rounds to a fourth digit, which the next unit shows better.
    while abs(size) >= 999.5 and len(units) > 1:
        size, units = size / 1024, units[1:]
    unit = units[0]
    if unit == "B":
        return f"{count} B"
    decimals = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{decimals}f} {unit}"


def times_less(before: int, after: int) -> str:
    """ ", 2.00 times less" for 2 bytes before and 1 after; nothing where there are not fewer."""
    return f", {before / after:.2f} times less" if before > after > 0 else ""


def percent(share: float) -> str:
    """0.123 -> "12%", 0.0123 -> "1.2%"."""
    digits = 1 if abs(share) < 0.0995 else 0
    return f"{100 * share:.{digits}f}%"


def short_operation(name: str) -> str:
    """An autograd node's name for reading: "AddmmBackward0" -> "Addmm"."""
    return re.sub(r"Backward\d*$", "", name) or name


def shortened(name: str, length: int = 40) -> str:
    """The end of a long module path, which says more than its beginning."""
    return name if len(name) <= length else "..." + name[3 - length :]


def cut_path(path: str, depth: int | None) -> str:
    """The first `depth` components of a module path, or all of them."""
    if depth is None:
        return path
    check_depth(depth)
    return ".".join(path.split(".")[:depth])


def check_depth(depth: int | None) -> None:
    if depth is not None and depth < 1:
        raise InputError(f"depth is {depth}; expected at least 1, or None for whole paths")


def add_up(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for name, size in pairs:
        totals[name] += size
    return dict(totals.most_common())
