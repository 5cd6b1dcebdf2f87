"""The softmax of a model's own code, as of attention that is written out.

torch keeps the probabilities. Where packs stand for the scores, as they do for q k^T and what is
scaled, added and masked of it, these are kept, and the backward pass computes scores and
probabilities again: the gradient is that of attention of the decoded tensors, as that of
`layers/attention.py`. Elsewhere a pack of the probabilities is kept, by `Quantiser.for_scores`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import sharing
from packlight._checks import (
    autocast_dtype,
    needs_gradient,
    refuse_second_derivative,
    saved_with_operands,
)
from packlight._gradients import as_dtype
from packlight._overwrite import writable
from packlight.layers.casts import to
from packlight.layers.computed import computed, computed_pack_of
from packlight.pack import Pack
from packlight.packing.layout import dense_stride, is_dense
from packlight.quantiser import KEEPS, Quantiser, Restore, worth_packing
from packlight.reading import reader, reading_of


@dataclasses.dataclass
class _Softmax:
    """The function, with its settings."""

    dim: int
    dtype: torch.dtype | None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.softmax(x, self.dim, self.dtype)


class _OfScores(torch.autograd.Function):
    """y = softmax(x); keeps what y is computed from."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        function: _Softmax,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.settings = (function.dim, x.dtype, rebuild)
        return writable(function(x))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        dim, dtype, rebuild = ctx.settings
        tensors = saved_with_operands(ctx)
        dx = _gradient(dy, rebuild(dy.dtype, *tensors), dim, dtype)
        return dx, None, None, *[None] * len(tensors)


class _Packed(torch.autograd.Function):
    """y = softmax(x) and a pack of y, which it keeps."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: _Softmax, method: Quantiser, seed: Any
    ) -> tuple[Tensor, ...]:
        y = function(x)
        kept = method.pack(y, seed)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        ctx.settings = (function.dim, x.dtype, Restore(method, tuple(y.shape), dense_stride(y)))
        return y, *kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        dx = None
        if dy is not None:
            dim, dtype, rebuild = ctx.settings
            dx = _gradient(dy, rebuild(dy.dtype, *ctx.saved_tensors), dim, dtype)
        return dx, None, None, None


def _gradient(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return as_dtype(torch.ops.aten._softmax_backward_data(dy, y, dim, dy.dtype), dtype)


_of_scores: Callable[..., Tensor] = _OfScores.apply
_packed: Callable[..., tuple[Tensor, ...]] = _Packed.apply


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    method: Quantiser,
) -> Tensor:
    """`torch.nn.functional.softmax`.

    Keeps the packs of query and key that the scores are computed from, or a pack of its output,
    which readers share; biased, as a softmax is not linear in them.
    """
    if dim is None or torch.compiler.is_dynamo_compiling():
        return F.softmax(input, dim, _stacklevel, dtype)
    if not needs_gradient(input) or not worth_packing(input, method):
        return F.softmax(input, dim, _stacklevel, dtype)
    function = _Softmax(dim, dtype)
    if dtype is None:
        wanted = autocast_dtype(input, "softmax", lambda x: torch.softmax(x, 0))
        input = input if input.dtype == wanted else to(input, wanted)
    scores = computed_pack_of(input)
    if scores is not None:
        pack = _pack_of_result(input, function, scores)
        rebuild = reader(pack.reading, pack.rebuild)
        y = _of_scores(input, function, rebuild, *pack.tensors)
        if y.stride() == input.stride() and is_dense(y):
            sharing.note_pack(y, pack)
        return y
    method = method.for_scores()
    y, *kept = _packed(input, function, method, method.seed(input))
    rebuild = Restore(method, tuple(y.shape), dense_stride(y))
    sharing.note_pack(y, Pack(rebuild, tuple(y.shape), tuple(kept), method.grade))
    return y


def _pack_of_result(x: Tensor, function: _Softmax, scores: Pack) -> Pack:
    pack = computed(x, function, (x,), (scores,))
    return pack._replace(reading=reading_of(pack.rebuild))


def softmax_of(
    input: Tensor, dim: int, dtype: torch.dtype | None = None, *, method: Quantiser
) -> Tensor:
    """`torch.softmax` and `Tensor.softmax`; see `softmax`."""
    return softmax(input, dim, dtype=dtype, method=method)


# By what they become in a model's own code.
SOFTMAXES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.softmax: softmax,
    torch.softmax: softmax_of,
    Tensor.softmax: softmax_of,
}
