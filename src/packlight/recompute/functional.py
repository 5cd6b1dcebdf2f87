"""`checkpoint`: torch's checkpoint, which keeps its inputs as packs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from packlight._checks import is_plain, is_taken
from packlight.errors import InputError
from packlight.pack import Pack
from packlight.quantiser import Quantiser, pack_input
from packlight.recompute.method import Checkpoint
from packlight.recompute.offloading import Away, put_away

# Below, a pack is not worth its kernels.
_SMALLEST = 4096


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    keep: Quantiser | None = Checkpoint.keep,
    offload: bool = False,
    **kwargs: Any,
) -> Any:
    """Calls `function`, and has its backward pass call it again; keeps packs of its inputs.

    `torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)` but for what
    it keeps: the first argument, and those that require gradients, are packed by `keep`, once for
    all calls that are given a tensor. Gradients are those of `function` at the inputs as they come
    back: biased, exact where `keep` is None. Keeps the bits of `keep`, an element of such an input,
    and other inputs as they are: masks, what is below 4096 bytes, float64, parameters.

    With `offload` these packs, or inputs, lie in the memory of the host meanwhile (`Offload`).

    In code that `torch.compile` traces, inputs are kept as they are.

    >>> import torch, packlight
    >>> layer, x = torch.nn.Linear(64, 64), torch.randn(32, 64, requires_grad=True)
    >>> packlight.recompute.checkpoint(layer, x, keep=packlight.GroupQuant(bits=4)).sum().backward()
    """
    plain = torch.utils.checkpoint.checkpoint
    if torch.compiler.is_compiling():
        return plain(function, *args, use_reentrant=False, **kwargs)
    if not callable(function):
        raise InputError(f"function={function!r} cannot be called")
    if (keep is None and not offload) or not torch.is_grad_enabled():
        return plain(function, *args, use_reentrant=False, **kwargs)
    # The checkpoint keeps positional arguments by way of hooks, and others as they are.
    named = {name: value for name, value in kwargs.items() if _needs_gradient(value)}
    others = {name: value for name, value in kwargs.items() if name not in named}
    names, places = tuple(named), len(args)

    def call(*values: Any) -> Any:
        given = dict(zip(names, values[places:], strict=True))
        return function(*values[:places], **given, **others)

    inputs = _Inputs((*args, *named.values()), keep, offload)
    with saved_tensors_hooks(inputs.pack, _unpack):
        try:
            return plain(call, *args, *named.values(), use_reentrant=False)
        finally:
            inputs.packs.clear()  # the hooks live as long as the graph


class _Kept:
    """Stands for an input: its pack, and the dtype in which it comes back."""

    def __init__(self, pack: Pack, dtype: torch.dtype) -> None:
        self.pack, self.dtype = pack, dtype


class _Inputs:
    """The pack hook of one call, which knows what the packs of its inputs are."""

    def __init__(self, values: tuple[Any, ...], keep: Quantiser | None, offload: bool) -> None:
        found = [
            x
            for place, x in enumerate(values)
            if isinstance(x, Tensor)
            and (place == 0 or x.requires_grad)
            and _is_packed(x)
            and (keep is None or x.numel() >= keep.smallest)
        ]
        self.packs: list[tuple[Tensor, _Kept | Away]]
        if offload:
            self.packs = [(x, put_away(x, keep)) for x in found]
        else:
            assert keep is not None
            self.packs = [(x, _Kept(pack_input(x, keep), x.dtype)) for x in found]

    def pack(self, tensor: Tensor) -> "Tensor | _Kept | Away":
        for x, kept in self.packs:
            if _is_same(tensor, x):
                return kept
        return tensor


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same elements of one storage; fakes cannot be asked `is_set_to`."""
    return (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


def _unpack(kept: Tensor | _Kept | Away) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    if isinstance(kept, Away):
        return kept.back()
    return kept.pack.rebuild(kept.dtype, *kept.pack.tensors)


def _needs_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _is_packed(x: Tensor) -> bool:
    held = isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter)
    large = x.numel() * x.element_size() >= _SMALLEST
    return large and not held and x.dtype != torch.float64 and is_plain(x) and is_taken(x)
