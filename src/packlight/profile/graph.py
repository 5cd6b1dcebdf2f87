"""Reading the graph: what each node keeps, as hooks packed it."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import Node

from packlight import _torch
from packlight._torch.attributes import node_number
from packlight._torch.graph import is_python, slots
from packlight.profile.recording import Kept, Recorder

REENTRANT = "CheckpointFunctionBackward"


class _Foreign(NamedTuple):
    """What a node keeps without our hooks."""

    node: Node
    packed: object


@dataclasses.dataclass
class Graph:
    """What the nodes of the graph keep."""

    nodes: dict[int, Node] = dataclasses.field(default_factory=dict)  # by index of the record
    by_sequence: dict[int, Node] = dataclasses.field(default_factory=dict)
    foreign: list[_Foreign] = dataclasses.field(default_factory=list)


def read_graph(roots: Iterable[Tensor], recorder: Recorder) -> Graph:
    graph = Graph()
    for node in _nodes(roots, recorder.start):
        graph.by_sequence[node_number(node)] = node
        for packed in (*_saved_by(node), *_attributes_of_context(node)):
            if isinstance(packed, Kept) and recorder.records[packed.index].kept() is packed:
                graph.nodes[packed.index] = node
            else:
                graph.foreign.append(_Foreign(node, packed))
    graph.foreign.sort(key=lambda entry: node_number(entry.node))
    return graph


def _nodes(roots: Iterable[Tensor], start: int) -> Iterator[Node]:
    """All nodes behind the roots that the forward pass made: none of the inputs' own graph."""
    pending = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in seen or node_number(node) < start:
            continue
        seen.add(node)
        yield node
        pending.extend(next_node for next_node, _ in node.next_functions if next_node is not None)


def _saved_by(node: Node) -> Iterator[object]:
    """What the node holds, as hooks packed it. Nothing is unpacked: a checkpoint would rerun."""
    if _torch.SAVED:
        for _, packed in slots(node):
            yield packed


def _attributes_of_context(node: Any) -> list[object]:
    """What a Python function keeps as attributes of `ctx`, which is the node: fused losses do.

    Of re-entrant checkpoints these are states of generators and no activations.
    """
    if node.name() == REENTRANT or not is_python(node):
        return []
    return list(vars(node).values())
