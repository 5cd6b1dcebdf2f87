"""Residual sums that are rebuilt from what their terms keep already.

At the end of a residual block, y = relu(batch_norm(h) + x), the batch norm keeps its codes and the
ReLU its mask, whatever reads y. Where something is kept of x as well, y comes back from the three,
and what reads it keeps nothing of its own. If x is itself the end of a block, so does x: a chain.
"""

from typing import Any

import torch
from torch import Tensor

from packlight import _torch, sharing
from packlight.groupquant.fixed_point.packs import Rebuild, ResidualRebuild
from packlight.layers import arithmetic
from packlight.pack import Pack

# Batch norms that a sum is rebuilt from. To rebuild the end of the k-th block of a chain costs k
# links, so that a longer chain would cost more time than the pack of one sum in eight is worth.
MAX_LINKS = 8
# Tensors of a pack that a chain may start with. What is itself made of more takes long to rebuild.
_MAX_TENSORS = 4


def add(input: Tensor, other: Any, *, alpha: Any = 1) -> Tensor:
    """`torch.add`. The sum of two tensors of which something is kept already needs no pack.

    One of them is the output of `fixed_point.batch_norm`. Shape, dtype and memory order are those
    of the other; else this is the sum of `layers/arithmetic.py`.
    """
    kept = _kept_of_sum(input, other, alpha)
    y = arithmetic.add(input, other, alpha=alpha)
    if kept is not None:
        sharing.note_pack(y, kept)
    return y


def add_(input: Tensor, other: Any, *, alpha: Any = 1) -> Tensor:
    """`add` that overwrites its input, as `y += x` does."""
    # Before the addition, after which no note on the input holds.
    kept = _kept_of_sum(input, other, alpha)
    y = arithmetic.add_(input, other, alpha=alpha)
    if kept is not None:
        sharing.note_pack(y, kept)
    return y


def _kept_of_sum(a: Tensor, b: object, alpha: object) -> Pack | None:
    """What a + alpha b can be rebuilt from, None where nothing is kept that it can be."""
    if not isinstance(b, Tensor) or alpha != 1 or not torch.is_grad_enabled():
        return None
    # First, since most sums end here, and in a compiled region shapes may be unknown numbers.
    one = sharing.pack_of(a)
    two = None if one is None else sharing.pack_of(b)
    if one is None or two is None:
        return None
    if a.shape != b.shape or a.dtype != b.dtype or a.stride() != b.stride():
        return None
    # What is noted on a leaf may be gone in one pass of a checkpoint and there in the other, and
    # both must keep alike. In a compiled region leaves, its inputs, have no notes.
    if not _torch.is_traced() and (a.grad_fn is None or b.grad_fn is None):
        return None
    stride = a.stride()
    kept = _linked(one, two, stride)
    return _linked(two, one, stride) if kept is None else kept


def sum_of(one: Pack, two: Pack | None, stride: tuple[int, ...], mask: Tensor) -> Pack | None:
    """What the ReLU of a sum can be rebuilt from: of a batch norm, `one`, and of `two`."""
    kept = None if two is None else _linked(one, two, stride)
    if kept is None and two is not None:
        kept = _linked(two, one, stride)
    if kept is None:
        return None
    rebuild = kept.rebuild
    assert isinstance(rebuild, ResidualRebuild)
    return kept._replace(rebuild=rebuild.with_mask(), tensors=(*kept.tensors, mask))


def _linked(one: Pack, two: Pack, stride: tuple[int, ...]) -> Pack | None:
    """The sum of a batch norm, `one`, and of `two`."""
    norm, other = one.rebuild, two.rebuild
    # A tensor that stood twice among those that a layer saves, the tracer would refuse.
    others = set(map(id, two.tensors))
    if not others.isdisjoint(map(id, one.tensors)):
        return None
    if not isinstance(norm, Rebuild) or norm.relu or norm.stride != stride:
        return None
    tensors = (*two.tensors, *one.tensors)
    grade = one.grade.and_of(two.grade)
    layout = (norm.shape, stride, norm.bits)
    if isinstance(other, ResidualRebuild) and (other.shape, other.stride, other.bits) == layout:
        if len(other.masked) >= MAX_LINKS:
            return None
        return Pack(other.with_link(), norm.shape, tensors, grade)
    if isinstance(other, Rebuild) and not other.relu and other == norm:
        return Pack(ResidualRebuild(*layout, (False, False)), norm.shape, tensors, grade)
    count = len(two.tensors)
    if count > _MAX_TENSORS:
        return None
    rebuild = ResidualRebuild(*layout, (False,), other, count)
    return Pack(rebuild, norm.shape, tensors, grade)
