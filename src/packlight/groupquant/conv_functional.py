"""Functions of conv nets that keep group-quantised tensors: torch.nn.functional's names and
arguments, plus `bits`, `group_size`, `rounding` and `code` as `GroupQuant` has them.

See `functional.py`, and `packlight.layers.convolution` and `channel_norms` for how they do.
"""

from torch import Tensor

from packlight.groupquant.grouping import Code, Rounding
from packlight.groupquant.method import GroupQuant
from packlight.layers import channel_norms, convolution
from packlight.layers.convolution import Size

_DEFAULT = GroupQuant()

# ---- norms ---------------------------------------------------------------------------------------


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
    code: Code = _DEFAULT.code,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) gamma + beta over [N, C, ...], statistics over all but C.

    In training keeps a pack of x_hat = (x - mean) rstd, in units of its deviation,
    `bits + 32 / group_size` bits an element, and 12 bytes a channel. With the packed x~,

        dgamma = sum(g x~),  dbeta = sum(g),  dx = gamma rstd (g - mean g - x~ mean(g x~)):

    dgamma unbiased with stochastic rounding, dbeta exact, dx biased a little, since it has x~
    twice. Without `training`, where no gradient is asked for, and for small tensors, this is
    torch's function.
    """
    method = GroupQuant(bits, group_size, rounding, code).for_pixels()
    return channel_norms.batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, method=method
    )


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
    code: Code = _DEFAULT.code,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) gamma + beta over [N, C, ...], statistics a group of channels.

    Keeps a pack of the normalised value, 8 bytes a channel, and rstd; see `batch_norm`.
    """
    method = GroupQuant(bits, group_size, rounding, code).for_pixels()
    return channel_norms.group_norm(input, num_groups, weight, bias, eps, method=method)


# ---- convolutions --------------------------------------------------------------------------------


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """torch.nn.functional.conv1d over [N, C, L] or [C, L]; see `conv2d`."""
    method = GroupQuant(bits, group_size, rounding, code).for_pixels()
    return convolution.convolve(input, weight, bias, stride, padding, dilation, groups, 1, method)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """torch.nn.functional.conv2d over [N, C, H, W] or [C, H, W].

    Keeps `bits + 32 / group_size` bits an element of x, or nothing where x is packed already, and
    the weight itself. Input and bias gradients exact, weight gradient unbiased with stochastic
    rounding. Channels-last stays channels-last.
    """
    method = GroupQuant(bits, group_size, rounding, code).for_pixels()
    return convolution.convolve(input, weight, bias, stride, padding, dilation, groups, 2, method)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """torch.nn.functional.conv3d over [N, C, D, H, W] or [C, D, H, W]; see `conv2d`."""
    method = GroupQuant(bits, group_size, rounding, code).for_pixels()
    return convolution.convolve(input, weight, bias, stride, padding, dilation, groups, 3, method)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """torch.nn.functional.conv_transpose1d over [N, C, L] or [C, L];
    see `conv2d`.
    """
    method = GroupQuant(bits, group_size, rounding, code).for_pixels()
    return convolution.convolve(
        input, weight, bias, stride, padding, dilation, groups, 1, method, output_padding
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """torch.nn.functional.conv_transpose2d over [N, C, H, W] or [C, H, W];
    see `conv2d`.
    """
    method = GroupQuant(bits, group_size, rounding, code).for_pixels()
    return convolution.convolve(
        input, weight, bias, stride, padding, dilation, groups, 2, method, output_padding
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """torch.nn.functional.conv_transpose3d over [N, C, D, H, W] or [C, D, H, W];
    see `conv2d`.
    """
    method = GroupQuant(bits, group_size, rounding, code).for_pixels()
    return convolution.convolve(
        input, weight, bias, stride, padding, dilation, groups, 3, method, output_padding
    )
