"""What packs of several tensors stand for together: what a function makes of them.

Attention scores are q k^T scale + mask, so packs of q and k stand for them, and for their softmax.
A layer that would keep such a result keeps these packs, which the graph has already, and computes
the result again in its backward pass: nothing of the size of the scores is kept.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from packlight import sharing
from packlight.pack import EXACT, Grade, Pack, View
from packlight.packing.layout import is_dense, laid_out
from packlight.quantiser import Quantiser, pack_input, worth_packing


@dataclasses.dataclass
class Itself:
    """What a tensor that is kept as it is stands for."""

    def __call__(self, dtype: torch.dtype, x: Tensor) -> Tensor:
        return x if x.dtype == dtype or not x.is_floating_point() else x.to(dtype)


@dataclasses.dataclass
class Computed:
    """What a function makes of operands, each in the dtype that the forward pass had."""

    function: Callable[..., Tensor]
    rebuilds: tuple[Callable[..., Tensor], ...]
    parts: tuple[int, ...]  # of each operand's pack
    dtypes: tuple[torch.dtype, ...]
    stride: tuple[int, ...]

    def __call__(self, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        operands, start = [], 0
        for rebuild, parts, own in zip(self.rebuilds, self.parts, self.dtypes, strict=True):
            operands.append(rebuild(own, *tensors[start : start + parts]))
            start += parts
        return laid_out(self.function(*operands), self.stride).to(dtype)


def computed(
    y: Tensor, function: Callable[..., Tensor], operands: Sequence[Tensor], packs: Sequence[Pack]
) -> Pack:
    """The pack of y = function(*operands) that the packs of the operands are."""
    rebuild = Computed(
        function,
        tuple(pack.rebuild for pack in packs),
        tuple(len(pack.tensors) for pack in packs),
        tuple(x.dtype for x in operands),
        y.stride(),
    )
    grade: Grade = EXACT
    for pack in packs:
        grade = grade.and_of(pack.grade)
    tensors = tuple(tensor for pack in packs for tensor in pack.tensors)
    return Pack(rebuild, tuple(y.shape), tensors, grade)


def computed_pack_of(x: Tensor) -> Pack | None:
    """The packs from which x is computed, where it is; they may be the packs of another view."""
    if torch.compiler.is_dynamo_compiling():
        return None
    pack = sharing.pack_of(x)
    return pack if pack is not None and is_computed(pack) else None


# For a part of a computed tensor with more than this share of its elements all of it is computed.
_MOST = 0.5


@dataclasses.dataclass
class _Part:
    """A view of what a pack stands for."""

    rebuild: Callable[..., Tensor]
    place: tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides and offset

    def __call__(self, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        whole, (shape, stride, start) = self.rebuild(dtype, *tensors), self.place
        return whole.as_strided(shape, stride, whole.storage_offset() + start)


def _pack_of_part(x: Tensor) -> Pack | None:
    """The packs from which x is computed that is a slice of a result, as without its sinks.

    For the one reader that a slice has; not where it is a small part, of several perhaps.
    """
    whole = None if torch.compiler.is_dynamo_compiling() else x._base
    if whole is None or x.dtype != whole.dtype or x.numel() <= _MOST * whole.numel():
        return None
    pack = computed_pack_of(whole)
    if pack is None:
        return None
    place = tuple(x.shape), x.stride(), int(x.storage_offset() - whole.storage_offset())
    return Pack(_Part(pack.rebuild, place), tuple(x.shape), pack.tensors, pack.grade)


def is_computed(pack: Pack) -> bool:
    """Whether a tensor is computed from its pack, rather than restored."""
    rebuild = pack.rebuild
    while isinstance(rebuild, View):
        rebuild = rebuild.rebuild
    return isinstance(rebuild, Computed)


def is_of_exact(rebuild: Callable[..., Any]) -> bool:
    """Whether a tensor comes back of tensors that are kept as they are, as an adapted weight does.

    A grade does not say so: codes whose error their method was chosen for count as exact.
    """
    if isinstance(rebuild, View):
        return is_of_exact(rebuild.rebuild)
    if isinstance(rebuild, Computed):
        return all(map(is_of_exact, rebuild.rebuilds))
    return isinstance(rebuild, Itself)


def exact(x: Tensor) -> Pack:
    """The tensor as its own pack."""
    return Pack(Itself(), tuple(x.shape), (x.detach(),))


def is_of_parameters(x: Tensor) -> bool:
    """Whether x is a parameter or a view of one, which torch holds anyway, or has no gradient."""
    return not x.requires_grad or is_parameter(x)


def is_parameter(x: Tensor) -> bool:
    """Whether x is a parameter or a view of one."""
    if torch.compiler.is_dynamo_compiling():
        return isinstance(x, nn.Parameter)
    return isinstance(x if x._base is None else x._base, nn.Parameter)


def pack_operand(x: Tensor, method: Quantiser) -> Pack:
    """What is kept of an operand: its pack, or itself where it is small or held anyway."""
    if is_of_parameters(x) or not worth_packing(x, method):
        return exact(x)
    part = _pack_of_part(x)
    if part is not None and part.grade.serves(method.grade):
        return part
    return pack_input(x, method)


def note_computed(
    y: Any, function: Callable[..., Tensor], operands: Sequence[Tensor], packs: Sequence[Pack]
) -> None:
    """Records that y, of which nothing is kept, can be computed from packs; the note holds them."""
    if isinstance(y, Tensor) and y.requires_grad and is_dense(y):
        sharing.note_held(y, computed(y, function, operands, packs))
