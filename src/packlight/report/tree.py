"""The tree of modules that a report prints: blocks that are alike share a line."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from packlight.report.words import short_operation

if TYPE_CHECKING:
    from packlight.report.memory import KeptTensor, MemoryReport


@dataclass
class Node:
    """A module, or one kind of operation in it, with its bytes in each of the reports compared."""

    label: str
    sizes: list[int]
    kind: str = ""
    operation: str = ""
    children: list["Node"] = field(default_factory=list)

    def child(self, label: str, kind: str = "", operation: str = "") -> "Node":
        for node in self.children:
            if (node.label, node.operation) == (label, operation):
                return node
        node = Node(label, [0] * len(self.sizes), kind, operation)
        self.children.append(node)
        return node

    def shape(self) -> tuple[object, ...]:
        """What two blocks of a model must have in common to be shown as one line."""
        inner = tuple((child.label, child.shape()) for child in self.children)
        return (self.kind, self.operation, tuple(self.sizes), inner)


def tree_of(reports: "Sequence[MemoryReport]", with_operations: bool, depth: int | None) -> Node:
    root = Node(reports[0].model, [0] * len(reports))
    for column, report in enumerate(reports):
        for row in report.rows:
            node = root
            node.sizes[column] += row.bytes
            parts = row.module.split(".")[:depth] if row.module else []
            for level, part in enumerate(parts, start=1):
                path = ".".join(parts[:level])
                node = node.child(part, kind=report.module_types.get(path, ""))
                node.sizes[column] += row.bytes
            # Without operations one leaf stands for all that the module keeps itself.
            source = _short_source(row.source) if with_operations else ""
            operation = _operations(row) if with_operations else "all"
            node.child(source, operation=operation).sizes[column] += row.bytes
    return root


def _operations(row: "KeptTensor") -> str:
    """All operations that keep the row's storage: "Relu + Addmm x3"."""
    names = Counter(short_operation(holder.operation) for holder in row.holders)
    return " + ".join(name if count == 1 else f"{name} x{count}" for name, count in names.items())


def _short_source(source: str | None) -> str:
    return "" if source is None else re.split(r"[/\\]", source)[-1]


def condense(node: Node) -> None:
    """Put a lone operation on its module's line, and blocks that are alike on one line."""
    for child in node.children:
        condense(child)
    if len(node.children) == 1 and node.children[0].operation and not node.children[0].label:
        node.operation = node.children.pop().operation
    for child in node.children:
        if child.operation and not child.label:
            child.label = "(itself)"
    alike: dict[object, list[Node]] = {}
    for child in node.children:
        # Only numbered modules are merged: names such as q_proj and k_proj are worth reading.
        key = child.shape() if child.label.isdigit() else id(child)
        alike.setdefault(key, []).append(child)
    node.children = [_merged(group) for group in alike.values()]


def _merged(group: list[Node]) -> Node:
    if len(group) == 1:
        return group[0]
    first = group[0]
    numbers = ranges(sorted(int(node.label) for node in group))
    merged = _summed(group)
    merged.label = numbers
    merged.kind = f"{len(group)} x {first.kind}" if first.kind else f"{len(group)} alike"
    return merged


def _summed(group: list[Node]) -> Node:
    first = group[0]
    sizes = [sum(column) for column in zip(*(node.sizes for node in group), strict=True)]
    inner = zip(*(node.children for node in group), strict=True)
    children = [_summed(list(nodes)) for nodes in inner]
    return Node(first.label, sizes, first.kind, first.operation, children)


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def join_chains(node: Node, root: bool = True) -> None:
    """Show `a` that holds nothing but `b` as `a.b`."""
    while not root and len(node.children) == 1 and not node.operation:
        only = node.children[0]
        if only.operation and (not only.kind or only.children):
            break
        node.label = f"{node.label}.{only.label}"
        node.kind, node.operation, node.children = only.kind, only.operation, only.children
    for child in node.children:
        join_chains(child, root=False)


def _flat(node: Node, depth: int = 0) -> Iterator[tuple[int, Node]]:
    yield depth, node
    for child in sorted(node.children, key=lambda child: -max(child.sizes)):
        yield from _flat(child, depth + 1)


def largest_lines(root: Node, limit: int) -> list[tuple[int, Node]]:
    """(depth, node) of the `limit` largest nodes, with an "n more" node for what is left out."""
    nodes = list(_flat(root))
    # A parent is at least as large as its child and stands before it, so no child loses its parent.
    order = sorted(range(len(nodes)), key=lambda index: -max(nodes[index][1].sizes))
    shown = {id(nodes[index][1]) for index in order[:limit]}

    def visible(node: Node, depth: int) -> Iterator[tuple[int, Node]]:
        yield depth, node
        children = sorted(node.children, key=lambda child: -max(child.sizes))
        hidden = [child for child in children if id(child) not in shown]
        if len(hidden) == 1 and not hidden[0].children:
            hidden = []
        left_out = {id(child) for child in hidden}
        for child in children:
            if id(child) not in left_out:
                yield from visible(child, depth + 1)
        if hidden:
            columns = zip(*(child.sizes for child in hidden), strict=True)
            yield depth + 1, Node(f"... {len(hidden)} more", [sum(column) for column in columns])

    return list(visible(root, 0))
