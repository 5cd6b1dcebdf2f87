"""Names of modules for reading."""

import re
from collections.abc import Iterable

from packlight.report.tree import ranges


def condensed(names: Iterable[str]) -> list[str]:
    """Names that differ in their numbers as one: "layers.0-11.fc1"."""
    groups: dict[str, list[list[str]]] = {}
    for name in names:
        groups.setdefault(without_numbers(name), []).append(re.findall(r"\d+", name))
    return [_filled(pattern, numbers) for pattern, numbers in groups.items()]


def without_numbers(name: str) -> str:
    """The name with each number replaced by "*"."""
    return re.sub(r"\d+", "*", name) or "(the model itself)"


def _filled(pattern: str, numbers: list[list[str]]) -> str:
    """Puts the numbers back: one where all agree, a range where nothing else varies."""
    columns = [sorted({int(number) for number in column}) for column in zip(*numbers, strict=True)]
    varying = sum(len(column) > 1 for column in columns)
    texts = [ranges(column) if varying == 1 or len(column) == 1 else "*" for column in columns]
    remaining = iter(texts)
    return re.sub(r"\*", lambda _: next(remaining), pattern)
