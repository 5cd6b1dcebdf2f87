"""Making and finding sketches, and what they give."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from packlight import sharing
from packlight._seeds import rounding_tensor
from packlight.pack import Pack
from packlight.sketch import ops
from packlight.sketch.method import ROW_KINDS, Kind


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class WeightGradient:
    """(S^T G)^T (S^T X), [out, features], from what is kept of X in `dtype`.

    Takes G [tokens, out] and, for the kinds that need it, its sum over the tokens.
    """

    kind: Kind
    rows: int
    features: int
    dtype: torch.dtype

    @property
    def needs_total(self) -> bool:
        return self.kind in ROW_KINDS

    def __call__(self, grad_output: Tensor, total: Tensor | None, kept: Tensor) -> Tensor:
        shape = (self.rows, self.features)
        gradient: Tensor = ops.weight_gradient(
            grad_output, kept, total, self.kind, *shape, self.dtype
        )
        return gradient


def sketch_input(
    x: Tensor, tokens: Tensor, layout: tuple[int, ...], kind: Kind, rows: int, dtype: torch.dtype
) -> Pack:  # fmt: skip
    """The sketch of `x`: the one that is kept of it already, else a new one, noted for the next.

    `tokens` are the rows of `x`, and `layout` tells the ways to see a tensor as rows apart. A pack
    of another method is not used, though it would do: it may be biased, and a sketch is not. Casts
    of one tensor share a sketch where their layers compute in one dtype, as adapters do.
    """
    found = sharing.sketch_of(x)
    if found is not None and found.shape == layout:
        gradient: Any = found.rebuild
        if gradient.dtype == dtype:
            return found
    kept = ops.keep(tokens.detach(), rounding_tensor(x), kind, rows, dtype)
    sketch = Pack(WeightGradient(kind, rows, tokens.shape[1], dtype), layout, (kept,))
    sharing.note_sketch(sharing.source_of(x), sketch)
    return sketch
