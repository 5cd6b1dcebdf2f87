"""Batch norm and group norm that keep a pack of the normalised value, which the next layer shares.

torch.nn.functional's names and arguments, plus `bits`, `group_size` and `rounding`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import sharing
from packlight._checks import autocast, check_tensor, refuse_second_derivative
from packlight._seeds import Seed, operands
from packlight.groupquant import channel_norm_ops, ops
from packlight.groupquant.channel_norm_ops import along_channels, along_groups
from packlight.groupquant.fixed_point.functional import norm_worth_packing
from packlight.groupquant.fixed_point.reference import deviation
from packlight.groupquant.method import GroupQuant, Rounding
from packlight.groupquant.packs import KEEPS, draw
from packlight.sharing import Pack

_DEFAULT = GroupQuant()


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class ChannelRebuild:
    """gamma x~ + beta along dimension 1, from what the operators keep.

    x~ is d times what is packed. The table of a batch norm has gamma d, that of a group norm gamma.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    bits: int
    group_size: int
    eps: float = 0.0

    def __call__(
        self,
        dtype: torch.dtype,
        codes: Tensor,
        scales: Tensor,
        table: Tensor,
        rstd: Tensor | None = None,
    ) -> Tensor:
        width = codes.new_empty_strided(self.shape, self.stride, device="meta").numel()
        layout = (self.shape, self.stride, width, self.bits, self.group_size)
        x = ops.dequantize(codes, scales, *layout, dtype, "", (), None, None)
        factor = along_channels(table[0], x)
        if rstd is not None:
            factor = factor * along_groups(deviation(rstd, self.eps), x)
        y: Tensor = x * factor + along_channels(table[1], x)
        return y.to(dtype)


class _BatchNorm(torch.autograd.Function):
    """y, codes, scales and table; keeps all but y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        bits: int,
        group_size: int,
        seed: Seed,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, *kept = channel_norm_ops.batch_norm(
            x, weight, bias, running_mean, running_var, momentum, eps, bits, group_size,
            *operands(seed),
        )  # fmt: skip
        _keep(ctx, kept, (weight, bias))
        ctx.layout = (eps, y.stride(), bits, group_size)
        return y, *kept

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        gradients: Any = (None, None, None)
        if grad_output is not None:
            gradients = channel_norm_ops.batch_norm_backward(
                grad_output, *ctx.saved_tensors, *ctx.layout
            )
        return *_wanted(ctx, gradients, ctx.needs_input_grad[:3]), *[None] * 7


class _GroupNorm(torch.autograd.Function):
    """y, codes, scales, table and rstd; keeps all but y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        bits: int,
        group_size: int,
        seed: Seed,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        y, *kept = channel_norm_ops.group_norm(
            x, groups, weight, bias, eps, bits, group_size, *operands(seed)
        )
        _keep(ctx, kept, (weight, bias))
        ctx.layout = (eps, y.stride(), bits, group_size)
        return y, *kept

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        gradients: Any = (None, None, None)
        if grad_output is not None:
            gradients = channel_norm_ops.group_norm_backward(
                grad_output, *ctx.saved_tensors, *ctx.layout
            )
        return *_wanted(ctx, gradients, ctx.needs_input_grad[:3]), *[None] * 5


def _keep(ctx: Any, kept: list[Tensor], parameters: tuple[Tensor | None, ...]) -> None:
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept)
    ctx.dtypes = [None, *(None if p is None else p.dtype for p in parameters)]


def _wanted(ctx: Any, gradients: Any, needed: Any) -> list[Tensor | None]:
    """The gradients that are asked for, each in the dtype of what it belongs to."""
    rows = zip(gradients, ctx.dtypes, needed, strict=True)
    return [
        None if gradient is None or not need else gradient.to(dtype or gradient.dtype)
        for gradient, dtype, need in rows
    ]


_apply_batch_norm: Callable[..., tuple[Tensor, ...]] = _BatchNorm.apply
_apply_group_norm: Callable[..., tuple[Tensor, ...]] = _GroupNorm.apply


def _noted(y: Tensor, method: GroupQuant, eps: float, tensors: tuple[Tensor, ...]) -> Tensor:
    shape = tuple(y.shape)
    rebuild = ChannelRebuild(shape, y.stride(), method.bits, method.group_size, eps)
    sharing.note_pack(y, Pack(rebuild, shape, tensors, method.grade))
    return y


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) gamma + beta over [N, C, ...], statistics over all but C.

    In training keeps a pack of x_hat = (x - mean) rstd, in units of its deviation,
    `bits + 32 / group_size` bits an element, and 12 bytes a channel. With the packed x~,

        dgamma = sum(g x~),  dbeta = sum(g),  dx = gamma rstd (g - mean g - x~ mean(g x~)):

    dgamma unbiased with stochastic rounding, dbeta exact, dx biased a little, since it has x~
    twice. Without `training`, where no gradient is asked for, and for small tensors, this is
    torch's function.
    """
    check_tensor(input, "batch_norm")
    method = GroupQuant(bits, group_size, rounding)
    if not training or not norm_worth_packing(input, weight, bias) or input.numel() < group_size:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y, *kept = _apply_batch_norm(
        input, weight, bias, running_mean, running_var, momentum, eps, bits, group_size,
        draw(input, method),
    )  # fmt: skip
    return _noted(y, method, eps, tuple(kept))


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) gamma + beta over [N, C, ...], statistics a group of channels.

    Keeps a pack of the normalised value, 8 bytes a channel, and rstd; see `batch_norm`.
    """
    check_tensor(input, "group_norm")
    method = GroupQuant(bits, group_size, rounding)

    def plain(x: Tensor) -> Tensor:
        return F.group_norm(x, num_groups, weight, bias, eps)

    if not norm_worth_packing(input, weight, bias) or input.numel() < group_size:
        return plain(input)
    if input.shape[1] % num_groups or (weight is not None and weight.numel() != input.shape[1]):
        return plain(input)  # raises
    x = autocast(input, None, lambda empty: plain(empty.view(0, input.shape[1])))
    seed = draw(x, method)
    y, *kept = _apply_group_norm(x, weight, bias, num_groups, eps, bits, group_size, seed)
    return _noted(y, method, eps, tuple(kept))
