"""Which saved tensors are packed, and with which tensor they share a pack."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from packlight import _torch, sharing
from packlight.packing.layout import is_dense

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*FLOATING, torch.bool, torch.uint8)

# No activation is as large; a mask may be. Such a value leaves the others in its group no step.
_HUGE = {torch.float32: 1e9, torch.bfloat16: 1e9, torch.float16: 65504.0}

# Nodes that make a view or a copy of one tensor.
_SAME_VALUES = {
    f"{name}Backward{index}"
    for name in (
        "Alias", "AsStrided", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice",
        "Split", "Squeeze", "SplitWithSizes", "T", "ToCopy", "Transpose", "Unbind", "UnsafeView",
        "Unsqueeze", "View",
    )
    for index in range(3)
}  # fmt: skip


def tensors_in(values: Iterable[object]) -> Iterator[Tensor]:
    """The tensors among values, and in dicts, lists and tuples among the values."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())


def is_of_torch(value: object) -> bool:
    """Whether it is a tensor of no subclass, those without values of `predict` apart."""
    return type(value) is Tensor or (isinstance(value, Tensor) and _torch.is_fake(value))


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a dense tensor, of a dtype that can be packed, and of no subclass of others."""
    return (
        is_of_torch(tensor)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.dtype in _DTYPES
        and tensor.numel() > 0
    )


def repeats(tensor: Tensor) -> list[bool]:
    """For each dimension, whether the elements along it are one element in memory."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return [size > 1 and step == 0 for size, step in sizes]


def is_weight(tensor: Tensor) -> bool:
    """Whether it is a leaf that requires gradients, a parameter, or a view or copy of such."""
    for candidate in (tensor, tensor._base):
        if isinstance(candidate, nn.Parameter):
            return True
        if candidate is not None and candidate.is_leaf and candidate.requires_grad:
            return True
    node = tensor.grad_fn
    while node is not None and node.name() in _SAME_VALUES and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    # An expanded and copied parameter is an activation.
    leaf = getattr(node, "variable", None)
    return leaf is not None and leaf.numel() >= tensor.numel()


def comes_from_weight(tensor: Tensor, inputs: Iterable[Any]) -> bool:
    """Whether a Function made the tensor from one of its weights, as far as is visible.

    A view is recognised by the storage, which both share. A compiled region's cast of a weight is
    guessed by shape and dtype; a wrong guess costs memory, not accuracy.
    """
    address = tensor.untyped_storage().data_ptr()
    for weight in inputs:
        if isinstance(weight, nn.Parameter):
            if address and weight.untyped_storage().data_ptr() == address:
                return True
            if weight.dtype != tensor.dtype and sorted(weight.shape) == sorted(tensor.shape):
                return True
    return False


def owner_of(tensor: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, bool]:
    """The tensor that all uses of these elements have in common, and whether `tensor` is a cast.

    That is the base of a whole dense view, and the argument that autocast copied. The elements lie
    in memory in the same order. `arguments` are those of the call that runs.
    """
    owner = _whole(tensor)
    node = owner.grad_fn
    if not arguments or node is None or node.name() != "ToCopyBackward0":
        return owner, False
    source, output = node.next_functions[0]
    for argument in tensors_in(arguments):
        if argument.grad_fn is source and argument.output_nr == output:
            whole = _whole(argument)
            if is_dense(whole) and argument.stride() == owner.stride():
                return whole, True
    return owner, False


def _whole(tensor: Tensor) -> Tensor:
    """The base, if the tensor is a view of all its elements and both are dense; else the tensor."""
    base = tensor._base
    if base is None or base.numel() != tensor.numel() or not is_of_torch(base):
        return tensor
    return base if is_dense(base) and is_dense(tensor) else tensor


# ---- values that a group cannot hold -------------------------------------------------------------

_FILLING = frozenset(["masked_fill", "masked_fill_", "where", "fill_", "index_fill", "full"])


def note_filling(name: str, arguments: tuple[Any, ...], result: object) -> None:
    """Records on the result of a call that it was filled with an infinity or a huge number."""
    if name in _FILLING and isinstance(result, Tensor):
        numbers = (value for value in arguments if isinstance(value, float))
        if any(not abs(value) < _HUGE.get(result.dtype, torch.inf) for value in numbers):
            sharing.note_filled(result)


def is_extreme(tensor: Tensor, owner: Tensor | None) -> bool:
    """Whether it has infinities, NaNs or huge values, as far as is known without waiting.

    On the CPU the values are read. A GPU would have to finish all its work first.
    """
    if owner is not None and sharing.is_filled(owner):
        return True
    if tensor.device.type != "cpu" or _torch.is_fake(tensor):
        return False
    low, high = torch.aminmax(tensor)
    return not max(-low.item(), high.item()) < _HUGE[tensor.dtype]


def may_be_a_mask(tensor: Tensor) -> bool:
    """Whether a tensor of a compiled region has the shape of an attention mask for all heads.

    Such a mask has infinities, which no group can hold, and is as large as the scores of one head.
    """
    if tensor.device.type == "cpu":
        return False  # `is_extreme` reads the values
    if tensor.dim() == 2:
        return tensor.shape[0] == tensor.shape[1]
    return tensor.dim() == 4 and (tensor.shape[1] == 1 or tensor.stride(1) == 0)
