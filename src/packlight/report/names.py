"""Names of modules for reading."""

import itertools
import re
from collections.abc import Iterable, Sequence

from packlight.report.tree import ranges


def condensed(names: Iterable[str]) -> list[str]:
    """Names that differ in their numbers as one: "layers.0-11.fc1"."""
    groups: dict[str, list[list[str]]] = {}
    for name in names:
        groups.setdefault(without_numbers(name), []).append(re.findall(r"\d+", name))
    return [_filled(pattern, numbers) for pattern, numbers in groups.items()]


def together(names: Iterable[str]) -> str:
    """Several names as one text, a set where parts differ: "layers.0-11.{q, k}.{lora_A, lora_B}".

    What names begin with stands once, and what follows several parts alike stands once behind them.
    """
    return ", ".join(_alternatives([name.split(".") for name in names]))


def _alternatives(names: list[list[str]]) -> list[str]:
    """What may stand at a place of names: each a text with all that may follow it."""
    following: dict[str, list[list[str]]] = {}
    for first, *others in names:
        following.setdefault(first, []).append(others)
    alike: dict[tuple[str, ...], list[str]] = {}
    for first, ends in following.items():
        inner = _alternatives([end for end in ends if end])
        alike.setdefault((*(["itself"] if [] in ends and inner else []), *inner), []).append(first)
    return [
        text
        for inner, firsts in alike.items()
        for text in ([f"{_set(firsts)}.{_set(inner)}"] if inner else firsts)
    ]


def _set(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{{{', '.join(texts)}}}"


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
