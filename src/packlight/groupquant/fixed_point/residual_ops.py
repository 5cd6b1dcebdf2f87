"""The operator that rebuilds a residual sum: schema, fake, reference, kernel.

A sum of batch norms is rebuilt link by link: to what there is of it a link adds the STEP code + LOW
of one batch norm, and where a ReLU read the sum, it puts 0 where the ReLU's mask says so. `kept`
has codes, table and, where `masked` says so, mask of each link after the other.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from packlight._library import define_op
from packlight.groupquant.fixed_point import reference
from packlight.packing import reference as packing


def links(kept: Sequence[Tensor], masked: Sequence[bool]) -> Iterator[tuple[Tensor, ...]]:
    """Codes and table of each link, and the mask where it has one."""
    first = 0
    for has_mask in masked:
        count = 3 if has_mask else 2
        yield tuple(kept[first : first + count])
        first += count


def _residual(
    start: Tensor | None,
    codes: Tensor,
    table: Tensor,
    kept: Sequence[Tensor],
    masked: Sequence[bool],
    shape: Sequence[int],
    stride: Sequence[int],
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """The sum in `dtype`, of this shape and dense stride; computes as `table` is."""
    shape, stride = tuple(shape), tuple(stride)
    y = torch.zeros((), dtype=table.dtype, device=table.device)
    y = y.expand(shape) if start is None else start.to(table.dtype)
    for link_codes, link_table, *mask in links((codes, table, *kept), masked):
        y = y + reference.rebuild(link_codes, link_table, shape, stride, bits, table.dtype, False)
        if mask:
            positive = codes.new_empty_strided(shape, stride)
            flat = positive.as_strided((positive.numel(),), (1,))
            flat.copy_(packing.unpack(mask[0], 1, flat.numel()))
            y = torch.where(positive != 0, y, 0.0)
    return codes.new_empty_strided(shape, stride, dtype=dtype).copy_(y)


# The first link's codes and table stand by themselves: a tensor has to say where the operator runs.
residual = define_op(
    "fixed_point_residual(Tensor? start, Tensor codes, Tensor table, Tensor[] kept, bool[] masked,"
    " SymInt[] shape, SymInt[] stride, int bits, ScalarType dtype) -> Tensor",
    reference=_residual,
    fake=lambda start, codes, table, kept, masked, shape, stride, bits, dtype: (
        codes.new_empty_strided(shape, stride, dtype=dtype)
    ),
    kernel="packlight.groupquant.fixed_point.residual_kernels:residual",
)
