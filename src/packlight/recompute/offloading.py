"""What blocks keep, in the memory of the host until the backward pass asks for it.

On a GPU copies go over a stream of their own, one for each device. Out: the copy begins when what
it copies is computed, and the allocator gives the memory to no one until it has ended. Back: what a
block kept is asked for when that block runs again, and with it what was put away before it is sent
for, so that this copy runs beside the block. Each thing that is away refers weakly to the one
before it, so what a failed or forgotten pass has put away dies with its graph, and passes without
gradients in between put nothing away.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight import _imagined
from packlight.errors import CannotGraphError
from packlight.quantiser import Quantiser, new_pack

_Rebuild = Callable[..., Tensor]


class Away:
    """A tensor that is away: on the host, as a pack or as it is."""

    def __init__(
        self, tensors: tuple[Tensor | None, ...], rebuild: _Rebuild, dtype: torch.dtype
    ) -> None:
        self.rebuild, self.dtype = rebuild, dtype
        self.device = next(t.device for t in tensors if t is not None)
        self.hosted = [None if t is None else _to_host(t) for t in tensors]
        self.here: list[Tensor | None] | None = None  # what has been sent for
        self.arrived: Any = None
        before = getattr(_last, "away", None)
        self.before: Callable[[], Away | None] = before if before is not None else _nothing
        _last.away = weakref.ref(self)

    def fetch(self) -> None:
        """Sends for it; it may be under way already."""
        if self.here is None:
            self.here, self.arrived = _to_device(self.hosted, self.device)

    def back(self) -> Tensor:
        """The tensor, or what its pack stands for; called as often as the graph goes through it."""
        self.fetch()
        assert self.here is not None
        _imagined.waited()
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
        tensor = self.rebuild(self.dtype, *self.here)
        self.here = self.arrived = None
        if (before := self.before()) is not None and before.device == self.device:
            before.fetch()
        return tensor


def _nothing() -> None:
    return None


# What was put away last, by thread: passes of several threads do not send for each other's.
_last = threading.local()


def put_away(x: Tensor, keep: Quantiser | None) -> Away:
    """A pack of `x`, or `x`, on its way to the host. The pack is no other layer's."""
    if keep is None:
        return Away((x.detach(),), _as_it_was, x.dtype)
    pack = new_pack(x.detach(), keep)
    return Away(pack.tensors, pack.rebuild, x.dtype)


def _as_it_was(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor


# ---- copies --------------------------------------------------------------------------------------

_streams: dict[torch.device, Any] = {}


def _stream(device: torch.device) -> Any:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _to_host(tensor: Tensor) -> Tensor:
    if _imagined.kind_of(tensor) == "cuda" and not tensor.is_cuda:
        _imagined.copied(tensor)
        return torch.empty_like(tensor, device="meta")  # in no memory of the device
    if not tensor.is_cuda:
        return tensor.clone()
    if torch.cuda.is_current_stream_capturing():
        raise CannotGraphError(
            "Offload copies to memory of the host that a CUDA graph does not hold; use Checkpoint"
        )
    stream = _stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    host = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=True
    )
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)
    return host


def _to_device(
    hosted: list[Tensor | None], device: torch.device
) -> tuple[list[Tensor | None], Any]:
    """Tensors on the device, and the event after which they have their values, if there is one."""
    made = [None if host is None else torch.empty_like(host, device=device) for host in hosted]
    if device.type != "cuda":
        for host, tensor in zip(hosted, made, strict=True):
            if host is None or tensor is None:
                continue
            if host.is_meta:
                _imagined.copied(tensor)
            else:
                tensor.copy_(host)
        return made, None
    stream = _stream(device)
    # The memory may be another kernel's until the stream that runs now is where it is now.
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for host, tensor in zip(hosted, made, strict=True):
            if host is not None and tensor is not None:
                tensor.copy_(host, non_blocking=True)
                tensor.record_stream(stream)  # a graph may be let go of before it is there
        arrived = torch.cuda.Event()
        arrived.record(stream)
    return made, arrived
