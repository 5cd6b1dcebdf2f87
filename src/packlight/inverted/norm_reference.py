"""Inverted norms in plain PyTorch: what is true, and what the CPU runs.

All norms are y = x_hat gamma + beta with x_hat = (x - mean) rstd. The forward is torch's own
function; beside its output it gives

- `rstd`, in float32 (float64 for float64), and
- `exact`: the channels of x_hat named in `channels`, which cannot be had from y, in the dtype in
  which the output is kept.

The backward has x_hat = (y - beta) / gamma elsewhere, and with g = dy gamma

    dx = rstd (g - mean(g) - x_hat mean(g x_hat)),    dgamma = sum dy x_hat,    dbeta = sum dy.

There g x_hat = dy (y - beta), so a small gamma is divided by once and not twice. A gamma of 0 in a
channel that was not kept exactly gives NaN for that channel: x_hat is lost, and a finite number
would be wrong.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight.packing.layout import compute_dtype

# --- Norms of rows: LayerNorm and RMSNorm.


def row_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    channels: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
    cast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y in `dtype`, y in `cast`, rstd [rows], exact [rows, k]); empty where not asked for.

    LayerNorm if `centred`, else RMSNorm. Rows are over the last dimensions, `normalized_shape`.
    """
    if dtype != x.dtype:  # autocast
        x, weight, bias = x.to(dtype), _cast(weight, dtype), _cast(bias, dtype)
    if not centred:
        y = F.rms_norm(x, normalized_shape, weight, eps)
    elif x.is_cuda and weight is not None and weight.dtype != x.dtype:
        # torch's CUDA function refuses what its CPU function takes.
        wide = x.to(weight.dtype)
        y = F.layer_norm(wide, normalized_shape, weight, bias, eps).to(x.dtype)
    else:
        y = F.layer_norm(x, normalized_shape, weight, bias, eps)
    y = y.contiguous()
    narrow = y.new_empty(0) if cast is None else y.to(cast)

    rows = _rows(x, normalized_shape).to(compute_dtype(x))
    if centred:
        variance, mean = torch.var_mean(rows, 1, correction=0)
        rstd = (variance + eps).rsqrt()
        rows = rows - mean[:, None]
    else:
        rstd = (rows.square().mean(1) + eps).rsqrt()
    if channels is None:
        exact = y.new_empty(0)
    else:
        exact = (rows[:, channels] * rstd[:, None]).to(cast or dtype)
    return y, narrow, rstd, exact


def row_norm_backward(
    grad_output: Tensor,
    y: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    channels: Tensor | None,
    rstd: Tensor,
    exact: Tensor | None,
    centred: bool,
    dtype: torch.dtype,
    needs_input: bool,
    needs_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in `dtype`, dgamma, dbeta); empty where not needed, or where there is none."""
    compute = compute_dtype(y)
    gamma, beta = _cast(weight, compute), _cast(bias, compute)
    dy = _rows(grad_output, normalized_shape).to(compute)
    shifted = _rows(y, normalized_shape).to(compute)
    if beta is not None:
        shifted = shifted - beta.flatten()
    x_hat = shifted
    if gamma is not None:
        gamma = gamma.flatten()
        x_hat = shifted * _reciprocal(gamma)
    if channels is not None and exact is not None:
        x_hat = x_hat.index_copy(1, channels, exact.to(compute))

    dx = y.new_empty(0, dtype=dtype)
    if needs_input:
        g, product = dy, dy * shifted
        if gamma is not None:
            g = dy * gamma
            if channels is not None:
                product = product.index_copy(1, channels, (g * x_hat)[:, channels])
        dx = g - x_hat * product.mean(1, keepdim=True)
        if centred:
            dx = dx - g.mean(1, keepdim=True)
        dx = (dx * rstd[:, None]).to(dtype).view(y.shape)
    dgamma, dbeta = y.new_empty(0), y.new_empty(0)
    if needs_affine and weight is not None:
        dgamma = (dy * x_hat).sum(0).to(weight.dtype).view(weight.shape)
    if needs_affine and bias is not None:
        dbeta = dy.sum(0).to(bias.dtype).view(bias.shape)
    return dx, dgamma, dbeta


def _cast(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


def _rows(x: Tensor, normalized_shape: Sequence[int]) -> Tensor:
    """`x` as [rows, width]."""
    return x.flatten(x.dim() - len(normalized_shape)).reshape(-1, row_width(normalized_shape))


def row_width(normalized_shape: Sequence[int]) -> int:
    width = 1
    for size in normalized_shape:
        width *= size
    return width


def _reciprocal(gamma: Tensor) -> Tensor:
    """1 / gamma, NaN where gamma is 0."""
    return gamma.reciprocal().masked_fill(gamma == 0, torch.nan)


# --- Norms of channels (dimension 1): BatchNorm, GroupNorm, InstanceNorm.


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    channels: Tensor | None,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
    kept: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y in `dtype`, rstd [1, C], exact [N, k, ...] in `kept`); updates the running statistics."""
    if dtype != x.dtype:  # autocast
        x, weight, bias = x.to(dtype), _cast(weight, dtype), _cast(bias, dtype)
    y, mean, rstd, *_ = _torch.batch_norm(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        True,
        momentum,
        eps,
        torch.backends.cudnn.enabled,
    )
    others = [0, *range(2, x.dim())]
    mean, rstd = _statistics(x, others, mean, rstd, eps)
    return y, rstd.view(1, -1), _exact(x, channels, mean.view(1, -1), rstd.view(1, -1), kept)


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    channels: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype,
    kept: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y in `dtype`, rstd [N, groups], exact [N, k, ...] in `kept`)."""
    if dtype != x.dtype:  # autocast
        x, weight, bias = x.to(dtype), _cast(weight, dtype), _cast(bias, dtype)
    x = x.contiguous(memory_format=group_norm_format(x))
    count, width = x.shape[:2]
    area = x.numel() // (count * width)
    y, mean, rstd = torch.native_group_norm(x, weight, bias, count, width, area, groups, eps)
    grouped = x.reshape(count, groups, -1)
    mean, rstd = _statistics(grouped, [2], mean, rstd, eps)
    per_channel = width // groups
    exact = _exact(
        x,
        channels,
        mean.repeat_interleave(per_channel, 1),
        rstd.repeat_interleave(per_channel, 1),
        kept,
    )
    return y, rstd, exact


def instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    channels: Tensor | None,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
    kept: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y in `dtype`, rstd [N, C], exact [N, k, ...] in `kept`); updates the running statistics.

    As torch does it: a batch norm of N C channels, its running statistics averaged over N.
    """
    count, width = x.shape[:2]

    def repeated(t: Tensor | None, kind: torch.dtype | None = None) -> Tensor | None:
        return None if t is None else t.to(kind or t.dtype).repeat(count)

    kind = dtype if weight is None else weight.dtype  # of the statistics while they are updated
    means, variances = repeated(running_mean, kind), repeated(running_var, kind)
    y, rstd, _ = batch_norm(
        x.contiguous().view(1, count * width, *x.shape[2:]),
        repeated(weight),
        repeated(bias),
        means,
        variances,
        None,
        momentum,
        eps,
        dtype,
        kept,
    )
    for statistic, each in ((running_mean, means), (running_var, variances)):
        if statistic is not None and each is not None:
            statistic.copy_(each.view(count, width).mean(0))
    rstd = rstd.view(count, width)
    wide = x.to(compute_dtype(x))
    exact = _exact(x, channels, wide.mean(list(range(2, x.dim()))), rstd, kept)
    # No view, which could not be modified in place outside an autograd function.
    return torch.ops.aten._unsafe_view.default(y, x.shape), rstd, exact


def _statistics(
    x: Tensor, others: list[int], mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Those of torch's kernel, computed afresh where it rounds them to 16 bits (on the CPU)."""
    compute = compute_dtype(x)
    if rstd.dtype == compute:
        return mean, rstd
    variance, mean = torch.var_mean(x.to(compute), others, correction=0)
    return mean, (variance + eps).rsqrt()


def _exact(
    x: Tensor, channels: Tensor | None, mean: Tensor, rstd: Tensor, kept: torch.dtype
) -> Tensor:
    """x_hat of these channels; `mean` and `rstd` are [1 or N, C]."""
    if channels is None:
        return x.new_empty(0)
    shape = (*mean.shape[:1], channels.numel(), *[1] * (x.dim() - 2))
    mean, rstd = (t.index_select(1, channels).view(shape) for t in (mean, rstd))
    return ((x.index_select(1, channels).to(rstd.dtype) - mean) * rstd).to(kept).contiguous()


def channel_norm_backward(
    grad_output: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    channels: Tensor | None,
    rstd: Tensor,
    exact: Tensor | None,
    dtype: torch.dtype,
    needs_input: bool,
    needs_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in `dtype`, dgamma, dbeta); empty where not needed, or where there is none.

    `rstd` [1 or N, G] tells which norm it is: a row for all samples or one for each, a column for
    each of G groups of channels.
    """
    compute = compute_dtype(y)
    gamma, beta = _cast(weight, compute), _cast(bias, compute)
    count, width = y.shape[:2]
    shape = (-1, width, *[1] * (y.dim() - 2))
    dy, x_hat = grad_output.to(compute), y.to(compute)
    if beta is not None:
        x_hat = x_hat - beta.view(shape)
    if gamma is not None:
        x_hat = x_hat * _reciprocal(gamma).view(shape)
    if channels is not None and exact is not None:
        x_hat = x_hat.index_copy(1, channels, exact.to(compute))
    sums = dy.reshape(count, width, -1).sum(2)  # [N, C]
    products = (dy * x_hat).reshape(count, width, -1).sum(2)

    dx = y.new_empty(0, dtype=dtype)
    if needs_input:
        scale = torch.ones_like(sums[:1]) if gamma is None else gamma.view(1, -1)
        size = y.numel() // rstd.numel()  # elements that share an rstd
        mean_g = _over_groups(sums * scale, rstd) / size  # [1 or N, C]
        mean_product = _over_groups(products * scale, rstd) / size
        rstd = rstd.repeat_interleave(width // rstd.shape[1], 1)
        factors = (scale * rstd, -rstd * mean_product, -rstd * mean_g)
        a, b, c = (factor.view(shape) for factor in factors)
        dx = (dy * a + x_hat * b + c).to(dtype)
        dx = dx.contiguous(memory_format=_torch.memory_format(y))
    dgamma, dbeta = y.new_empty(0), y.new_empty(0)
    if needs_affine and weight is not None:
        dgamma = products.sum(0).to(weight.dtype)
    if needs_affine and bias is not None:
        dbeta = sums.sum(0).to(bias.dtype)
    return dx, dgamma, dbeta


def _over_groups(values: Tensor, rstd: Tensor) -> Tensor:
    """[N, C] summed over all that share an rstd, as [1 or N, C]."""
    rows, groups = rstd.shape
    if rows == 1:
        values = values.sum(0, keepdim=True)
    width = values.shape[1]
    sums = values.view(rows, groups, width // groups).sum(2)
    return sums.repeat_interleave(width // groups, 1)


# --- Layouts, which the fakes share.


def batch_norm_format(x: Tensor) -> torch.memory_format:
    """The layout of torch's batch norm of `x`."""
    return _torch.memory_format(x)


def group_norm_format(x: Tensor) -> torch.memory_format:
    """The layout of torch's group norm of `x`: channels-last is kept on the CPU only."""
    if x.device.type == "cpu":
        return _torch.memory_format(x)
    return torch.contiguous_format
