"""Batch norm and group norm that keep a pack of the normalised value, which the next layer shares.

A group of a pack may span channels, so what is kept is x_hat / d, d the `deviation` of x_hat. The
backward pass of a norm that is given x~ for its input, mean 0 and rstd 1 is that of the packed one,
but for the factor rstd; torch's kernels are given d for rstd.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch, sharing
from packlight._checks import autocast, check_tensor, needs_gradient, refuse_second_derivative
from packlight._seeds import Seed
from packlight.layers.computed import exact, is_of_parameters, note_computed
from packlight.pack import Pack
from packlight.packing.layout import compute_dtype, dense_stride, in_memory_format, laid_out
from packlight.quantiser import KEEPS, Fused, Quantiser

# Below so many values a channel, what is kept of the channel outweighs what codes save.
MIN_VALUES = 16

# The least variance of normalised values that counts.
LEAST = 2.0**-20


def worth_packing(input: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a backward pass may come, and a pack of the input of a norm is smaller than it."""
    given = (tensor for tensor in parameters if tensor is not None)
    if not (needs_gradient(input) or any(map(needs_gradient, given))):
        return False
    return input.dim() > 1 and input.numel() >= MIN_VALUES * input.shape[1] > 0


def deviation(rstd: Tensor, eps: float) -> Tensor:
    """The deviation of normalised values, sqrt(var / (var + eps)) = sqrt(1 - eps rstd^2).

    Codes are of values in units of it. The backward pass multiplies their error by rstd: for values
    without variance, which are 0 normalised, by 1 / sqrt(eps).
    """
    return (1 - eps * rstd.square()).clamp(min=LEAST).sqrt()


def along_channels(values: Tensor, x: Tensor) -> Tensor:
    """[channels] as it multiplies `x` [n, channels, ...]."""
    return values.view(-1, *[1] * (x.dim() - 2))


def along_groups(values: Tensor, x: Tensor) -> Tensor:
    """[n, groups] as it multiplies `x` [n, channels, ...]."""
    repeats = x.shape[1] // values.shape[1]
    return values.repeat_interleave(repeats, 1).view(*x.shape[:2], *[1] * (x.dim() - 2))


# ---- what a method without operators of its own does ---------------------------------------------

Kept = Sequence[Tensor]


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class Scaled:
    """gamma x~ + beta along dimension 1. The table of a batch norm has gamma d for gamma."""

    method: Quantiser
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    eps: float
    grouped: bool

    def __call__(self, dtype: torch.dtype, table: Tensor, *tensors: Tensor) -> Tensor:
        kept = tensors[1:] if self.grouped else tensors
        x = self.method.unpack(dtype, self.shape, self.stride, *kept)
        factor = along_channels(table[0], x)
        if self.grouped:
            factor = factor * along_groups(deviation(tensors[0], self.eps), x)
        y: Tensor = x * factor + along_channels(table[1], x)
        return y.to(dtype)


def forward_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    method: Quantiser,
    seed: Seed,
) -> tuple[Tensor, ...]:
    """y, [3, channels] of gamma d, beta and rstd, and tensors that stand for x_hat / d."""
    y, mean, rstd = torch.native_batch_norm(
        x, weight, bias, running_mean, running_var, True, momentum, eps
    )
    dtype = compute_dtype(x)
    mean, rstd = mean.to(dtype), rstd.to(dtype)
    d = deviation(rstd, eps)
    values = (x - along_channels(mean, x)) * along_channels(rstd / d, x)
    gamma = torch.ones_like(rstd) if weight is None else weight.to(dtype)
    beta = torch.zeros_like(rstd) if bias is None else bias.to(dtype)
    stride = dense_stride(x)
    kept = method.pack(laid_out(values, stride), seed)
    return laid_out(y, stride), torch.stack([gamma * d, beta, rstd]), *kept


def backward_batch(
    grad_output: Tensor, kept: Kept, eps: float, stride: tuple[int, ...], method: Quantiser
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in the memory order of `stride`, dgamma and dbeta [channels]."""
    table, *tensors = kept
    x = method.unpack(grad_output.dtype, tuple(grad_output.shape), stride, *tensors)
    gamma, _, rstd = table  # gamma d
    d = deviation(rstd, eps)
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        laid_out(grad_output, stride), x, gamma * rstd / d.square(), None, None,
        torch.zeros_like(d), d, True, 0.0, [True, True, True],
    )  # fmt: skip
    return laid_out(dx, stride), dgamma, dbeta


def rebuild_batch(y: Tensor, eps: float, method: Quantiser) -> Scaled:
    """What the tensors of a batch norm stand for, to a reader of its output."""
    return Scaled(method, tuple(y.shape), y.stride(), eps, grouped=False)


def forward_group(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    method: Quantiser,
    seed: Seed,
) -> tuple[Tensor, ...]:
    """y, gamma and beta [2, channels], rstd [n, groups], and tensors that stand for x_hat / d."""
    n, channels = x.shape[:2]
    stride, dtype = dense_stride(x), compute_dtype(x)
    size = x.numel() // (n * channels)
    y, mean, rstd = torch.native_group_norm(
        _regular(x), weight, bias, n, channels, size, groups, eps
    )
    mean, rstd = mean.to(dtype), rstd.to(dtype)
    values = (x - along_groups(mean, x)) * along_groups(rstd / deviation(rstd, eps), x)
    gamma = torch.ones(channels, dtype=dtype, device=x.device) if weight is None else weight
    beta = torch.zeros_like(gamma) if bias is None else bias
    table = torch.stack([gamma.to(dtype), beta.to(dtype)])
    return laid_out(y, stride), table, rstd, *method.pack(laid_out(values, stride), seed)


def backward_group(
    grad_output: Tensor, kept: Kept, eps: float, stride: tuple[int, ...], method: Quantiser
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in the memory order of `stride`, dgamma and dbeta [channels]."""
    table, rstd, *tensors = kept
    x = method.unpack(grad_output.dtype, tuple(grad_output.shape), stride, *tensors)
    n, channels = x.shape[:2]
    size = x.numel() // (n * channels)
    d = deviation(rstd, eps)
    dx, dgamma, dbeta = torch.ops.aten.native_group_norm_backward(
        _regular(laid_out(grad_output, stride)), _regular(x), torch.zeros_like(d), d, table[0], n,
        channels, size, rstd.shape[1], [True, True, True],
    )  # fmt: skip
    dx = (dx * along_groups(rstd / d, dx)).to(grad_output.dtype)
    return laid_out(dx, stride), dgamma, dbeta


def rebuild_group(y: Tensor, eps: float, method: Quantiser) -> Scaled:
    """What the tensors of a group norm stand for, to a reader of its output."""
    return Scaled(method, tuple(y.shape), y.stride(), eps, grouped=True)


def _regular(x: Tensor) -> Tensor:
    """`x` in a memory format that torch's kernels of group norm take."""
    if x.device.type == "cpu":
        for layout in (torch.channels_last, torch.channels_last_3d):
            axes = 4 if layout == torch.channels_last else 5
            if x.dim() == axes and x.is_contiguous(memory_format=layout):
                return x
    return x.contiguous()


_PLAIN = {
    "batch_norm": Fused(forward_batch, backward_batch, rebuild_batch),
    "group_norm": Fused(forward_group, backward_group, rebuild_group),
}


def _keeping(method: Quantiser, name: str) -> Fused:
    return method.fused.get(name, _PLAIN[name])


# ---- norms of channels ---------------------------------------------------------------------------


class _Norm(torch.autograd.Function):
    """y, and what the method keeps; `numbers` go between the parameters and `eps`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        name: str,
        eps: float,
        method: Quantiser,
        seed: Seed,
        *numbers: Any,
    ) -> tuple[Tensor, ...]:
        keeping = _keeping(method, name)
        y, *kept = keeping.forward(x, weight, bias, *numbers, eps, method, seed)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        ctx.settings = (eps, y.stride(), method)
        ctx.differentiate = keeping.backward
        ctx.dtypes = [None, *(None if p is None else p.dtype for p in (weight, bias))]
        ctx.others = 4 + len(numbers)
        return y, *kept

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        gradients: Any = (None, None, None)
        if grad_output is not None:
            gradients = ctx.differentiate(grad_output, ctx.saved_tensors, *ctx.settings)
        rows = zip(gradients, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        wanted = [
            None if gradient is None or not need else gradient.to(dtype or gradient.dtype)
            for gradient, dtype, need in rows
        ]
        return *wanted, *[None] * ctx.others


_apply: Callable[..., tuple[Tensor, ...]] = _torch.applied(_Norm)


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    name: str,
    eps: float,
    method: Quantiser,
    *numbers: Any,
) -> Tensor:
    x = in_memory_format(x)
    y, *kept = _apply(x, weight, bias, name, eps, method, method.seed(x), *numbers)
    rebuild = _keeping(method, name).rebuild(y, eps, method)
    sharing.note_pack(y, Pack(rebuild, tuple(y.shape), tuple(kept), method.grade))
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
    method: Quantiser,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) gamma + beta over [N, C, ...], statistics over all but C.

    In training keeps a pack of x_hat = (x - mean) rstd, in units of its deviation, and 12 bytes a
    channel. With the packed x~,

        dgamma = sum(g x~),  dbeta = sum(g),  dx = gamma rstd (g - mean g - x~ mean(g x~)):

    dgamma unbiased where the method is, dbeta exact, dx biased a little, since it has x~ twice.
    Without `training`, where no gradient is asked for, and for small tensors, this is torch's
    function. Of a parameter too, whose standardised value a convolution takes for its weight: torch
    keeps the parameter, and what reads the result keeps nothing and computes it again.
    """
    check_tensor(input, "batch_norm")
    if is_of_a_weight(input, running_mean, training):
        return standardised(input, weight, bias, eps)
    small = input.numel() < method.smallest
    if not training or small or not worth_packing(input, weight, bias):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    statistics = (running_mean, running_var, momentum)
    return _norm(input, weight, bias, "batch_norm", eps, method, *statistics)


def is_of_a_weight(x: Tensor, running_mean: Tensor | None, training: bool) -> bool:
    """Whether the norm standardises a parameter, as for the weight of a convolution."""
    return training and running_mean is None and x.requires_grad and is_of_parameters(x)


def standardised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The batch norm of a parameter, with a note of what it is computed from."""
    operands = [x, *(p for p in (weight, bias) if p is not None)]
    function = _Standardise(weight is not None, bias is not None, eps)
    y = function(*operands)
    note_computed(y, function, operands, [exact(operand) for operand in operands])
    return y


@dataclasses.dataclass
class _Standardise:
    has_weight: bool
    has_bias: bool
    eps: float

    def __call__(self, x: Tensor, *affine: Tensor) -> Tensor:
        left = iter(affine)
        weight = next(left) if self.has_weight else None
        bias = next(left) if self.has_bias else None
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    method: Quantiser,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) gamma + beta over [N, C, ...], statistics a group of channels.

    Keeps a pack of the normalised value, 8 bytes a channel, and rstd; see `batch_norm`.
    """
    check_tensor(input, "group_norm")

    def plain(x: Tensor) -> Tensor:
        return F.group_norm(x, num_groups, weight, bias, eps)

    if input.numel() < method.smallest or not worth_packing(input, weight, bias):
        return plain(input)
    if input.shape[1] % num_groups or (weight is not None and weight.numel() != input.shape[1]):
        return plain(input)  # raises
    x = autocast(input, None, lambda empty: plain(empty.view(0, input.shape[1])))
    return _norm(x, weight, bias, "group_norm", eps, method, num_groups)
