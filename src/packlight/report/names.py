"""Names of modules for reading."""

import itertools
import re
from collections.abc import Iterable

from packlight.report.tree import ranges


def condensed(names: Iterable[str]) -> list[str]:
    """Names that differ in their numbers as one: "layers.0-11.fc1"."""
    groups: dict[str, list[list[str]]] = {}
    for name in names:
        groups.setdefault(without_numbers(name), []).append(re.findall(r"\d+", name))
    return [_filled(pattern, numbers) for pattern, numbers in groups.items()]


def together(names: list[str]) -> str:
    """Several names as one text, a set where parts differ: "layers.0-11.{q, k}.{lora_A, lora_B}".

    Of names with different numbers of parts, what they begin with stands once.
    """
    parts = [name.split(".") for name in names]
    if len({len(each) for each in parts}) > 1:
        head = beginning(parts)
        ends = ", ".join(".".join(each[len(head) :]) or "itself" for each in parts)
        return ".".join([*head, f"{{{ends}}}"]) if head else ", ".join(names)
    columns = [list(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
    if not any(len(column) == 1 for column in columns):
        return ", ".join(names)
    texts = (f"{{{', '.join(column)}}}" if len(column) > 1 else column[0] for column in columns)
    return ".".join(texts)


def beginning(parts: list[list[str]]) -> list[str]:
    """The parts with which all names begin."""
    columns = zip(*parts, strict=False)
    same = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return [column[0] for column in same]


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
