"""What backward passes of layers share: casts of parameters, products and sums of gradients.

Each is what the line of plain PyTorch in it says.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from packlight import _torch
from packlight._imagined import kind_of
from packlight._library import define_op
from packlight.packing.layout import compute_dtype

_recast = define_op(
    "recast(Tensor x, Tensor like) -> Tensor",
    reference=lambda x, like: x.to(like.dtype),
    fake=lambda x, like: torch.empty_like(x, dtype=like.dtype),
    tags=(torch.Tag.flexible_layout,),
)


def recast(x: Tensor, like: Tensor) -> Tensor:
    """The parameter `x` in the dtype of `like`, a gradient.

    Under autocast the forward pass has cast the parameter already. A compiler would take that cast
    for this one and keep it from pass to pass, 16 bits a parameter; the operator, which depends on
    the gradient, it cannot make before the backward pass. Inductor makes a cast of it again once
    the passes are apart.

    Call it before anything else reads a view of the gradient, which Inductor writes where it is
    first asked for: in its own shape it can be fused with the sum that it is of.
    """
    if x.dtype == like.dtype:
        return x
    if not _torch.is_traced():
        return x.to(like.dtype)
    _torch.lower(torch.ops.packlight.recast.default, _cast)
    cast: Tensor = _recast(x, like)
    return cast


def _cast(of: Callable[[Any], Any], x: Any, like: Any) -> Any:
    return of(torch.ops.prims.convert_element_type.default)(x, like.get_dtype())


def _cast_parts(of: Callable[[Any], Any], parts: Sequence[Any], like: Any) -> Any:
    return of(torch.ops.aten.cat.default)([_cast(of, part, like) for part in parts])


def one_above_another(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The parts one behind the other in `dtype`, without a copy of each."""
    if _torch.is_traced():  # which fuses the casts
        return torch.cat([as_dtype(part, dtype) for part in parts])
    rows = sum([part.shape[0] for part in parts])
    whole = parts[0].new_empty((rows, *parts[0].shape[1:]), dtype=dtype)
    return torch.cat(tuple(parts), out=whole)


_recast_parts = define_op(
    "recast_parts(Tensor[] parts, Tensor like) -> Tensor",
    reference=lambda parts, like: one_above_another(parts, like.dtype),
    fake=lambda parts, like: torch.cat(parts).to(like.dtype),
    tags=(torch.Tag.flexible_layout,),
)


def recast_parts(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Parameters one behind the other in the dtype of `like`, a gradient; as `recast` of one."""
    if _torch.is_traced():
        _torch.lower(torch.ops.packlight.recast_parts.default, _cast_parts)
        joined: Tensor = _recast_parts(list(parts), like)
        return joined
    return one_above_another(parts, like.dtype)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, without the call where there is nothing to cast."""
    return x if x.dtype == dtype else x.to(dtype)


def _adds_up_in_32(x: Tensor) -> bool:
    """Whether matmuls of 16-bit tensors like `x` do, and can write it."""
    in_half = x.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation
    return kind_of(x) == "cuda" and not in_half


def _mm(a: Tensor, b: Tensor) -> Tensor:
    wide = a.is_cuda and _adds_up_in_32(a)
    return torch.mm(a, b, out_dtype=torch.float32) if wide else a.mm(b).float()


# Where a GPU is imagined: a CPU has no matmul with a dtype of its own.
_wide_mm = define_op(
    "wide_mm(Tensor a, Tensor b) -> Tensor",
    reference=_mm,
    fake=lambda a, b: a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32),
)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a.mm(b).to(dtype)`.

    A matmul of 16 bits adds up in 32 and can write those: no rounding, and no kernel to widen it.
    """
    if kind_of(a) == "cuda" and a.dtype.itemsize == 2 and dtype == torch.float32:
        return _mm(a, b) if a.is_cuda else _wide_mm(a, b)
    return as_dtype(a.mm(b), dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total + a.mm(b)`, over `total`.

    A matmul of one dtype adds before it rounds: no kernel for it, and no tensor for the product.
    """
    if _torch.is_traced() or not total.dtype == a.dtype == b.dtype:
        return total.add_(product(a, b, total.dtype))
    return total.addmm_(a, b)


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.sum(0, dtype=dtype)`; `x` is [rows, columns].

    torch reads a matrix of 16 bits at a third of the memory's bandwidth; a row of ones times the
    matrix, which adds up in 32 bits, reads it at three quarters and more. Inductor's sums are as
    fast where they are of chunks of rows, and then of those; of its own it makes too few.
    """
    if _torch.is_traced():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        wide = torch.promote_types(compute_dtype(x), dtype)
        for chunk in (128, 64, 32):
            # Of a number of rows that is not known nothing is asked: a guard would bind it.
            if statically_known_true(x.shape[0] % chunk == 0):
                chunks: Tensor = x.unflatten(0, (-1, chunk)).sum(1, dtype=wide)
                return chunks.sum(0).to(dtype)
    elif x.dtype.itemsize == 2 and dtype.itemsize <= 4 and _adds_up_in_32(x):
        ones = _row_of_ones(x) if x.is_cuda else x.new_ones(1, x.shape[0])
        sums = _mm(ones, x)[0]
        return as_dtype(sums, dtype)
    return x.sum(0, dtype=dtype)


# For each stream, which alone is sure to have written them when it reads them, and each dtype: all
# that there are, and as many of them as were last asked for.
_ones: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}


def _row_of_ones(x: Tensor) -> Tensor:
    """[1, rows] of ones for `x` [rows, columns], made once and long enough for what has come."""
    count, stream = x.shape[0], _torch.current_stream(x)
    if stream is None:
        return x.new_ones(1, count)
    key = (x.get_device(), stream, x.dtype)
    found, row = _ones.get(key, (None, None))
    if row is not None and row.shape[1] == count:
        return row
    if found is None or found.shape[1] < count:
        if torch.cuda.is_current_stream_capturing():  # what is recorded is not written yet
            return x.new_ones(1, count)
        found = x.new_ones(1, 1 << (count - 1).bit_length())
    row = found[:, :count]
    _ones[key] = found, row
    return row
