"""Sums, scales and masks of a model's own code, after which packs go on standing for the result.

They run torch's functions, and torch keeps what it keeps: nothing, a mask, or a small factor. What
is noted is how the result is computed from the packs of the operands, so that the softmax of scaled
and masked scores keeps packs of query and key. A bias of relative positions is kept as it is, once
for all layers, batches or windows that add it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight._checks import is_plain
from packlight.layers.computed import computed_pack_of, exact, is_parameter, note_computed
from packlight.pack import Pack


@dataclasses.dataclass
class _Again:
    """A call, whose operands that are tensors are given once more."""

    function: Callable[..., Tensor]
    operands: tuple[Any, ...]  # None for those
    settings: dict[str, Any]

    def __call__(self, *tensors: Tensor) -> Tensor:
        left = iter(tensors)
        operands = (next(left) if operand is None else operand for operand in self.operands)
        return self.function(*operands, **self.settings)


def followed(
    function: Callable[..., Tensor],
    *operands: Any,
    again: Callable[..., Tensor] | None = None,
    **settings: Any,
) -> Tensor:
    """function(*operands, **settings), with a note of the packs that it can be computed from.

    `again` is the same function without writing to its operands, where `function` does.
    """
    tensors = tuple(x for x in operands if isinstance(x, Tensor))
    known = _known_of(tensors)
    if again is not None and known is not None and known[0] is None:
        known = None  # what is written over is not there to compute the result from
    y = function(*operands, **settings)
    packs = None if known is None else _packs_of(tensors, known, y)
    if packs is not None:
        others = tuple(None if isinstance(x, Tensor) else x for x in operands)
        note_computed(y, _Again(again or function, others, settings), tensors, packs)
    return y


def _known_of(tensors: tuple[Tensor, ...]) -> list[Pack | None] | None:
    """The packs of the operands that are computed themselves; None where nothing is noted."""
    if torch.compiler.is_dynamo_compiling() or not torch.is_grad_enabled():
        return None
    return [computed_pack_of(x) for x in tensors]


def _packs_of(
    tensors: tuple[Tensor, ...], known: list[Pack | None], y: Tensor
) -> list[Pack] | None:
    """What is kept of the operands of a result; None where it would be of the result's size.

    An operand with fewer elements is one for several rows, heads or layers. Parameters are held
    anyway, and torch keeps masks.
    """
    packs = []
    for x, pack in zip(tensors, known, strict=True):
        held = x.numel() < y.numel() or x.dtype == torch.bool or is_parameter(x)
        if pack is None and not held:
            return None
        packs.append(exact(x) if pack is None else pack)
    return packs


def add(input: Tensor, other: Any, *, alpha: Any = 1) -> Tensor:
    """`torch.add`; keeps nothing."""
    return followed(torch.add, input, other, alpha=alpha)


def add_(input: Tensor, other: Any, *, alpha: Any = 1) -> Tensor:
    """`Tensor.add_`; keeps nothing."""
    return followed(Tensor.add_, input, other, again=torch.add, alpha=alpha)


def sub(input: Tensor, other: Any, *, alpha: Any = 1) -> Tensor:
    """`torch.sub`; keeps nothing."""
    return followed(torch.sub, input, other, alpha=alpha)


def div_(input: Tensor, other: Any, *, rounding_mode: Any = None) -> Tensor:
    """`Tensor.div_`; torch keeps a divisor that is a tensor."""
    return followed(Tensor.div_, input, other, again=torch.div, rounding_mode=rounding_mode)


def mul_(input: Tensor, other: Any) -> Tensor:
    """`Tensor.mul_`; torch keeps a factor that is a tensor."""
    return followed(Tensor.mul_, input, other, again=torch.mul)


def masked_fill(input: Tensor, mask: Tensor, value: Any) -> Tensor:
    """`torch.masked_fill`; torch keeps the mask."""
    return followed(torch.masked_fill, input, mask, value)


def masked_fill_(input: Tensor, mask: Tensor, value: Any) -> Tensor:
    """`Tensor.masked_fill_`; torch keeps the mask."""
    return followed(Tensor.masked_fill_, input, mask, value, again=torch.masked_fill)


def where(condition: Tensor, input: Any, other: Any) -> Tensor:
    """`torch.where`; torch keeps the condition."""
    return followed(torch.where, condition, input, other)


def _cat(*tensors: Tensor, dim: int) -> Tensor:
    return torch.cat(tensors, dim)


# What is joined to scores and is no scores has this many times fewer elements, as a sink has.
_MUCH = 16


def cat(tensors: Any, dim: int = 0) -> Tensor:
    """`torch.cat`; keeps nothing. Scores to which sinks are joined can be computed again."""
    y = torch.cat(tensors, dim)
    parts = tuple(tensors)
    known = _known_of(parts)
    if known is None or not any(known) or not all(map(is_plain, parts)):
        return y
    rest = sum(x.numel() for x, pack in zip(parts, known, strict=True) if pack is None)
    packs = None if rest * _MUCH > y.numel() else _packs_of(parts, known, y)
    if packs is not None:
        again = _Again(_cat, (None,) * len(parts), {"dim": dim})
        note_computed(y, again, parts, packs)
    return y


# By what they become in a model's own code.
ARITHMETIC: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.add: add,
    Tensor.add: add,
    Tensor.add_: add_,
    torch.sub: sub,
    torch.subtract: sub,
    Tensor.sub: sub,
    Tensor.div_: div_,
    Tensor.mul_: mul_,
    torch.masked_fill: masked_fill,
    Tensor.masked_fill: masked_fill,
    Tensor.masked_fill_: masked_fill_,
    torch.where: where,
    torch.cat: cat,
}
