"""Counting: from what is held to the rows of a report."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from packlight import _torch
from packlight._torch.attributes import node_number
from packlight.profile.graph import REENTRANT, Graph, read_graph
from packlight.profile.recording import Recorder
from packlight.profile.scene import Place, Scene, buffers_of
from packlight.profile.tensors import Storage, storages, tensors_in
from packlight.report import Holding, KeptTensor


class _Findings(NamedTuple):
    rows: tuple[KeptTensor, ...]
    parameter_bytes: int
    buffer_bytes: int
    input_bytes: int
    reentrant: bool  # the graph holds a re-entrant checkpoint


class _Held(NamedTuple):
    """One operation's hold on one packed object."""

    packed: object
    place: Place
    operation: str
    source: str | None
    node: object  # what tells operations apart


def find_kept(scene: Scene, recorder: Recorder, outputs: object) -> _Findings:
    # Auxiliary losses are often left on a module, so attributes are roots beside the outputs.
    left = (tensor for module in scene.modules() for tensor in buffers_of(module))
    roots = [*tensors_in(outputs), *left]
    graph = read_graph(roots, recorder)
    held = [*_held_by_us(recorder, graph), *_held_by_others(recorder, graph)]

    owned: dict[object, str] = {}
    sizes: dict[object, int] = {}
    # Parameters last: where one is also an input or a buffer, it is a parameter.
    groups: dict[str, Sequence[Tensor]] = {
        "input": scene.arguments,
        "buffer": scene.buffers,
        "parameter": [*scene.parameters, *recorder.loose_parameters],
    }
    for owner, tensors in groups.items():
        for tensor in tensors:
            for storage in storages(tensor):
                owned[storage.key] = owner
                sizes[storage.key] = storage.bytes

    rows: dict[object, _Row] = {}
    kept_inputs: dict[object, int] = {}
    for hold in held:
        for tensor in tensors_in(hold.packed):
            for storage in storages(tensor):
                owner = owned.get(storage.key, "")
                if owner == "input":
                    kept_inputs[storage.key] = storage.bytes
                elif not owner and storage.bytes:
                    rows.setdefault(storage.key, _Row(storage)).add(hold)

    def total(owner: str) -> int:
        return sum(sizes[key] for key, name in owned.items() if name == owner)

    return _Findings(
        rows=tuple(row.finished() for row in rows.values()),
        parameter_bytes=total("parameter"),
        buffer_bytes=total("buffer"),
        input_bytes=sum(kept_inputs.values()),
        reentrant=any(node.name() == REENTRANT for node in graph.by_sequence.values()),
    )


def _held_by_us(recorder: Recorder, graph: Graph) -> Iterator[_Held]:
    for index, record in enumerate(recorder.records):
        kept = record.kept()
        if kept is None:
            continue
        node = graph.nodes.get(index)
        if node is None and not _torch.SAVED:
            # A node saves right after it is made, so the last one made is the one that saves.
            node = graph.by_sequence.get(record.sequence)
        fallback = "checkpoint" if record.checkpointed else "unknown"
        yield _Held(
            packed=kept.packed,
            place=record.place,
            operation=fallback if node is None else node.name(),
            source=record.source,
            node=(record.place, record.source) if node is None else node,
        )


def _held_by_others(recorder: Recorder, graph: Graph) -> Iterator[_Held]:
    for node, packed in graph.foreign:
        place = recorder.place_of(node_number(node))
        yield _Held(packed, place, node.name(), None, node)


class _Row:
    """A storage that is kept, and its holders so far."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.holds: dict[object, _Held] = {}

    def add(self, hold: _Held) -> None:
        # Once a node, which saves x twice for x * x.
        self.holds.setdefault(hold.node, hold)

    def finished(self) -> KeptTensor:
        holders = tuple(
            Holding(hold.place.path, hold.operation, hold.source) for hold in self.holds.values()
        )
        first = holders[0]
        tensor = self.storage.tensor
        return KeptTensor(
            bytes=self.storage.bytes,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            device=str(tensor.device),
            module=first.module,
            module_type=next(iter(self.holds.values())).place.kind,
            operation=first.operation,
            source=first.source,
            holders=holders,
        )
