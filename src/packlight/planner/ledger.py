"""`Ledger`: what operators allocate and free, in the order in which they run.

A mode of the dispatcher sees each operator, those of the backward pass too. A storage that a result
has and no tensor had before is allocated; it is freed when its last tensor is. So lifetimes are
those that autograd and the model's own code give them, and nothing is assumed about either.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packlight._torch.attributes import operands
from packlight._torch.modes import DispatchMode
from packlight.parallel import Parallel
from packlight.planner.costs import Costs, name_of, workspace
from packlight.planner.timeline import BACKWARDS, Segment, Sent, added
from packlight.planner.wires import is_on_shards, local_parts, on_the_wires

_ROUNDED = 512  # bytes: what the allocator of CUDA counts in


def rounded(size: int) -> int:
    return -(-size // _ROUNDED) * _ROUNDED


class _Operator(NamedTuple):
    """`times` are milliseconds of the device, of the host, and of copies between them."""

    name: str
    before: int
    peak: int
    times: tuple[float, float, float]
    sent: Sent


class Ledger(DispatchMode):  # type: ignore[misc]
    """`where` says the phase and the place of what runs."""

    def __init__(
        self, costs: Costs, where: Callable[[], tuple[str, str]], parallel: Parallel
    ) -> None:
        super().__init__()
        self.costs, self.where, self.parallel = costs, where, parallel
        self.sent: Sent = {}  # what the next operator sends
        self.host_ms = 0.0  # of Python between operators, to be added to the next
        self.allocated = 0
        self._segments: list[Segment] = []
        # The last operator, where it ran, and what it read by the addresses of `_known`.
        self._unsettled: tuple[tuple[str, str], _Operator, list[int]] | None = None
        self._known: dict[int, Any] = {}  # storages by their addresses
        self.freed: dict[str, int] | None = None  # while asked for: bytes, by who allocated them

    @property
    def segments(self) -> list[Segment]:
        """Of what has run."""
        self._settle()
        return self._segments

    def taken(self) -> tuple[float, Sent]:
        """What was for the next operator, which does not come: milliseconds of the host, bytes."""
        host_ms, sent = self.host_ms, self.sent
        self.host_ms, self.sent = 0.0, {}
        return host_ms, sent

    def owns(self, *tensors: Tensor) -> int:
        """Takes these for allocated before all, and returns their bytes."""
        total = 0
        for tensor in local_parts(tensors):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known[storage._cdata] = storage
                total += rounded(storage.nbytes())
        return total

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(map(is_on_shards, types)):
            return NotImplemented  # the operators that it becomes on this rank come next
        kwargs = kwargs or {}
        self._settle()
        if func is torch.ops.prim.device.default:  # more than half of all calls, and no work
            return args[0].device
        before = self.allocated
        result = func(*args, **kwargs)
        made = operands(result)
        fresh = sum([self._allocate(tensor) for tensor in made])
        if fresh or func._schema.is_mutable:
            given = operands(args, kwargs)
            peak = self.allocated + workspace(self.costs.device, func, args)
            device_ms, host_ms = self.costs.of(func, args, result, [*given, *made])
            times, sent = on_the_wires(func, args, self.parallel)
            device_ms *= times
            host_before, sent_before = self.taken()
            sent_now = added(sent_before, sent)
            name = name_of(func, args).partition("::")[2]  # as it is on a GPU
            self._unsettled = (
                self.where(),
                _Operator(name, before, peak, (device_ms, host_ms + host_before, 0.0), sent_now),
                [leaf.untyped_storage()._cdata for leaf in given] if _adds_up(func) else [],
            )
        return result

    def _settle(self) -> None:
        """Notes the last operator, when it is known what was freed after it.

        Where a sum of the backward pass reads something for the last time, autograd adds to that in
        place, but not on tensors without values.
        """
        if self._unsettled is None:
            return
        place, done, read = self._unsettled
        self._unsettled = None
        in_place = place[0] in BACKWARDS and any(key not in self._known for key in read)
        self._note(place, done._replace(peak=done.before) if in_place else done)

    def copy(self, tensor: Tensor) -> None:
        self._settle()
        now, times = self.allocated, (0.0, 0.0, self.costs.copy_ms(tensor))
        self._note(self.where(), _Operator("copy", now, now, times, {}))

    def wait(self) -> None:
        self._settle()
        now = self.allocated
        phase, place = self.where()
        self._segments.append(Segment(phase, place, "wait", now, now, now, 0.0, 0.0, waits=True))

    def _allocate(self, tensor: Tensor) -> bool:
        """Counts the storage of a tensor, and whether it is a new one."""
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return False
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        size = rounded(storage.nbytes())
        self.allocated += size
        _, place = self.where()

        def free(_: object, ledger: "Ledger" = self) -> None:
            ledger.allocated -= size
            del ledger._known[key]
            if ledger.freed is not None:
                ledger.freed[place] = ledger.freed.get(place, 0) + size

        self._known[key] = weakref.ref(storage, free)
        return size > 0

    def _note(self, where: tuple[str, str], done: _Operator) -> None:
        last = self._segments[-1] if self._segments else None
        if last is None or (last.phase, last.place) != where:
            self._segments.append(
                Segment(
                    *where, done.name, done.before, done.peak, self.allocated, *done.times,
                    sent=done.sent,
                )
            )  # fmt: skip
            return
        self._segments[-1] = last._replace(
            operator=done.name if done.peak > last.peak else last.operator,
            peak=max(done.peak, last.peak),
            after=self.allocated,
            device_ms=last.device_ms + done.times[0],
            host_ms=last.host_ms + done.times[1],
            copy_ms=last.copy_ms + done.times[2],
            sent=added(last.sent, done.sent),
        )


def _adds_up(func: Any) -> bool:
    return func is torch.ops.aten.add.Tensor
