"""`Stepping`: the optimiser of a copy, with what it holds, and its step.

A conversion changes what is kept for the backward pass, and neither parameters nor gradients. So
all walks of a copy have one optimiser, and its step is walked once.
"""

from typing import Any

import torch
from torch import Tensor, nn

from packlight._torch.modes import DispatchMode
from packlight.parallel import Parallel
from packlight.planner.devices import Device
from packlight.planner.ledger import Ledger
from packlight.planner.planner import OptimizerOf
from packlight.planner.timeline import Segment, added
from packlight.planner.walked import shifted
from packlight.planner.wires import local_parts
from packlight.profile.tensors import tensors_in


class Stepping:
    """An optimiser that has taken one step; of none, or where nothing is trained, nothing."""

    def __init__(
        self, make: OptimizerOf | None, parameters: list[nn.Parameter], parallel: Parallel
    ) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        # What the optimiser sees of each: where ranks have shards, one of them.
        self.seen = {parameter: _as_shard(parameter, parallel) for parameter in trained}
        self.optimizer: Any = None
        self._walked: tuple[object, list[Segment]] | None = None
        if make is None or not trained:
            return
        self.optimizer = make(list(self.seen.values()))
        for parameter in self.seen.values():
            parameter.grad = torch.empty_like(parameter)
        self._step()
        for parameter, shard in self.seen.items():
            if shard is parameter:
                parameter.grad = None

    def states(self, parameter: nn.Parameter) -> list[Tensor]:
        """What is held for a parameter."""
        if self.optimizer is None:
            return []
        return list(tensors_in(self.optimizer.state.get(self.seen.get(parameter), {})))

    def segments(self, ledger: Ledger, device: Device) -> list[Segment]:
        """Of a step that follows what the ledger has seen."""
        begin, waiting = ledger.allocated, ledger.taken()
        if self.optimizer is None:
            return []
        key = (device, [shard.grad is not None for shard in self.seen.values()])
        if self._walked is None or self._walked[0] != key:
            self._walked = key, self._walk(ledger)
        found = [shifted(segment, begin) for segment in self._walked[1]]
        if found:
            host_ms, sent = waiting
            first = found[0]
            found[0] = first._replace(host_ms=host_ms + first.host_ms, sent=added(sent, first.sent))
        return found

    def _walk(self, ledger: Ledger) -> list[Segment]:
        """Above what is allocated as the step begins."""
        for parameter, shard in self.seen.items():
            if shard is not parameter:  # it stands beside the weight
                ledger.owns(*tensors_in((shard, shard.grad)))
        begin, before = ledger.allocated, len(ledger.segments)
        with ledger:
            self._step()
        return [shifted(segment, -begin) for segment in ledger.segments[before:]]

    def _step(self) -> None:
        with _Ones():
            self.optimizer.step()


def _as_shard(parameter: nn.Parameter, parallel: Parallel) -> nn.Parameter:
    """What the optimiser sees of a parameter, but for its size."""
    dtype = parallel.shard_dtype
    (local,) = local_parts([parameter])
    if local is parameter and dtype is None:
        return parameter
    return nn.Parameter(torch.empty_like(local, dtype=dtype or local.dtype))


class _Ones(DispatchMode):  # type: ignore[misc]
    """Gives 1 for what an optimiser reads of a tensor that has no values: a norm, a count."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return 1.0 if args[0].is_floating_point() else 1
