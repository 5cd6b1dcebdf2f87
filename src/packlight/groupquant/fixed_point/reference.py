"""Fixed-point codes in plain PyTorch: what is true, on every device.

Codes are packed as `packing/layout.py` says. What is needed of each channel again is a table
[ROWS, channels] in float32 (float64 for float64 tensors), made when the codes are: parameters may
change before they are used.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight.groupquant.fixed_point.method import EDGE
from packlight.layers.channel_norms import along_channels, deviation
from packlight.packing import reference as packing
from packlight.packing.layout import compute_dtype, dense_stride, memory_order

# The rows of a table:
#   y~ = STEP code + LOW,   positive where code >= SHIFT
#   x~ = UNIT (code - CENTRE)
#   dx = SCALE UNIT (g - mean g - x~ mean(g x~)),   SCALE UNIT = gamma rstd
STEP, LOW, SHIFT, UNIT, CENTRE, SCALE = range(6)
ROWS = 6

# From here on beta / |gamma|, in bins, has less than 8 bits of fraction left in float32.
FAR = 2.0**16


def channel_table(
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    bits: int,
    width: float,
) -> Tensor:
    """The table of a batch norm with these statistics and parameters, [channels] each."""
    count = 2**bits
    gamma = torch.ones_like(rstd) if weight is None else weight.to(rstd.dtype)
    beta = torch.zeros_like(rstd) if bias is None else bias.to(rstd.dtype)
    widths = width * deviation(rstd, eps)
    # Left of everything where gamma and beta are both 0: y is 0, and not positive.
    position = (beta / gamma.abs() / widths).nan_to_num(-FAR, FAR, -FAR)
    whole = position.floor()
    phase = torch.where(position.abs() < FAR, position - whole, 0.0)
    # A channel that is not finite comes back as NaN: x_hat is NaN throughout.
    centre = phase + (count - 1) / 2 + 0.0 * (mean + rstd)
    step = gamma.abs() * widths
    unit = torch.where(gamma < 0, -widths, widths)
    rows = {
        STEP: step,
        LOW: beta - step * centre,
        SHIFT: (count // 2 - whole).clamp(1, count - 1),
        UNIT: unit,
        CENTRE: centre,
        SCALE: gamma * rstd / unit,
    }
    return torch.stack([rows[row] for row in range(ROWS)])


def _unpack(codes: Tensor, shape: Sequence[int], stride: Sequence[int], bits: int) -> Tensor:
    """The codes as a uint8 tensor of this shape and dense stride."""
    x = codes.new_empty_strided(tuple(shape), tuple(stride))
    x.as_strided((x.numel(),), (1,)).copy_(packing.unpack(codes, bits, x.numel()))
    return x


def encode(
    x: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, table: Tensor, bits: int, width: float
) -> Tensor:
    """Packed codes of the normalised `x`, in the memory order of `y`, which is its batch norm."""
    count = 2**bits
    x_hat = (x.to(table.dtype) - along_channels(mean, x)) * along_channels(rstd, x)
    offset = table[CENTRE] + (0.5 - EDGE / width)
    code = (
        (x_hat * along_channels(1 / table[UNIT], x) + along_channels(offset, x))
        .floor()
        .nan_to_num(0.0)
    )
    code = code.clamp(0, count - 1)
    shift = along_channels(table[SHIFT], x)
    # The side of 0 by y itself, which is what a ReLU sees.
    code = torch.where(y <= 0, code.minimum(shift - 1), code.maximum(shift))
    return packing.pack(memory_order(code.to(torch.uint8), y.stride()), bits)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    bits: int,
    width: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, bit-equal to torch's in training, codes and table; updates the running statistics.

    `width` is that of a bin, in standard deviations.
    """
    y, mean, rstd = torch.native_batch_norm(
        x, weight, bias, running_mean, running_var, True, momentum, eps
    )
    stride = dense_stride(x)
    if y.stride() != stride:
        y = y.new_empty_strided(y.shape, stride).copy_(y)
    mean, rstd = mean.to(compute_dtype(x)), rstd.to(compute_dtype(x))
    table = channel_table(mean, rstd, weight, bias, eps, bits, width)
    return y, encode(x, y, mean, rstd, table, bits, width), table


def batch_norm_(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    bits: int,
    width: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Codes and table of the batch norm, which is written over `x`, or its ReLU where asked."""
    running = (running_mean, running_var)
    y, codes, table = batch_norm(x, weight, bias, *running, momentum, eps, bits, width)
    x.copy_(y.relu_() if relu else y)
    return codes, table


def batch_norm_sum_(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    bits: int,
    width: float,
    other: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and table of the batch norm, and the mask of relu(batch_norm(x) + other).

    The last is written over `x`, of whose shape `other` is; it is added in place, whatever its
    dtype. The mask is one bit an element, in the memory order of x.
    """
    running = (running_mean, running_var)
    y, codes, table = batch_norm(x, weight, bias, *running, momentum, eps, bits, width)
    y.add_(other)
    # A NaN has a gradient, as in torch.
    signs = packing.pack(memory_order((~(y <= 0)).to(torch.uint8), y.stride()), 1)
    x.copy_(y.relu_())
    return codes, table, signs


def batch_norm_backward(
    grad_output: Tensor,
    codes: Tensor,
    table: Tensor,
    stride: Sequence[int],
    bits: int,
    relu: bool = False,
    signs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in the memory order of `stride`, dgamma and dbeta [channels].

    With `relu`, of the ReLU of the batch norm; with the mask of `batch_norm_sum_`, of the latter.
    """
    g = grad_output.to(table.dtype)
    code = _unpack(codes, g.shape, stride, bits).to(table.dtype)
    if relu:
        g = torch.where(code >= along_channels(table[SHIFT], code), g, 0.0)
    if signs is not None:
        g = torch.where(_unpack(signs, g.shape, stride, 1) != 0, g, 0.0)
    x = (code - along_channels(table[CENTRE], g)) * along_channels(table[UNIT], g)
    others = [0, *range(2, g.dim())]
    dgamma, dbeta = (g * x).sum(others), g.sum(others)
    count = g.numel() // g.shape[1]
    mean, slope = along_channels(dbeta / count, g), along_channels(dgamma / count, g)
    scale = along_channels(table[SCALE] * table[UNIT], g)
    dx = grad_output.new_empty_strided(g.shape, tuple(stride))
    return dx.copy_(scale * (g - mean - x * slope)), dgamma, dbeta


def relu_backward(
    grad_output: Tensor, codes: Tensor, table: Tensor, stride: Sequence[int], bits: int
) -> Tensor:
    """dy where the code is on the positive side of 0, else 0; in the memory order of `stride`."""
    code = _unpack(codes, grad_output.shape, stride, bits)
    dx = grad_output.new_empty_strided(grad_output.shape, tuple(stride))
    return dx.copy_(torch.where(code >= along_channels(table[SHIFT], code), grad_output, 0.0))


def rebuild(
    codes: Tensor,
    table: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    bits: int,
    dtype: torch.dtype,
    relu: bool,
) -> Tensor:
    """y~ or relu(y~) in `dtype`, of this shape and dense stride."""
    code = _unpack(codes, shape, stride, bits)
    step, low, shift = (along_channels(table[row], code) for row in (STEP, LOW, SHIFT))
    y = step * code + low
    if relu:
        # A value on the positive side is at least half a bin, also where the window lies left of 0.
        y = torch.where(code >= shift, y.maximum(step / 2), 0.0)
    return codes.new_empty_strided(tuple(shape), tuple(stride), dtype=dtype).copy_(y)
