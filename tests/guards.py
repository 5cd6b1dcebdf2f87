"""Buffers between guard bytes: what a kernel writes outside of its outputs is seen."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# More than any tile of a kernel takes, so that what one writes past an end lies in the guard.
BYTES = 1 << 17
PATTERN = 0xA5

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}


class Guards(TorchDispatchMode):
    """What is allocated within it lies between guard bytes. Inputs are moved there by `of`."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and made.device.type != "meta" and made.numel():
            return self._between(made)
        return made

    def of(self, x: Tensor) -> Tensor:
        """A copy of a dense tensor that lies between guard bytes."""
        return self._between(x).copy_(x)

    def _between(self, like: Tensor) -> Tensor:
        steps = zip(like.shape, like.stride(), strict=True)
        count = 1 + sum((size - 1) * step for size, step in steps)
        size = count * like.element_size()
        raw = torch.full((size + 2 * BYTES,), PATTERN, dtype=torch.uint8, device=like.device)
        self.buffers.append((raw, size))
        inside = torch.tensor([], dtype=like.dtype, device=like.device)
        first = BYTES // like.element_size()
        return inside.set_(raw.untyped_storage(), first, like.shape, like.stride())

    def intact(self) -> bool:
        """Whether all guard bytes are as they were."""
        return all(
            bool((part == PATTERN).all())
            for raw, size in self.buffers
            for part in (raw[:BYTES], raw[BYTES + size :])
        )
