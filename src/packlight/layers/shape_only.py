"""Functions whose gradient needs the shape of the input and none of its values.

Torch keeps the whole input of an average pooling, since its backward operator reads the shape off a
tensor. Here a `Function` keeps the shape, and gives that operator an empty tensor of the shape and
memory format. So forward results and gradients are torch's own, bit for bit, and a gradient can be
differentiated again. Some functions need indices or slopes besides, as torch keeps them.

Functions have the names and arguments of torch. What torch keeps nothing of is torch's own here.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import check_tensor, is_plain, needs_gradient, numbers

Size = int | Sequence[int]
# One number, or one an axis, and None for the size of the input; torch's annotations lack None.
OutputSize = Any


class _ShapeOnly(torch.autograd.Function):
    """function(x, *settings, *tensors), whose first result is differentiable in x alone.

    Its other results are kept, or else `tensors`. `backward(dy, like, *settings, *kept)` reads of
    `like` the shape and the memory format.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        function: Callable[..., Any],
        backward: Callable[..., Tensor],
        settings: tuple[Any, ...],
        *tensors: Tensor,
    ) -> Any:
        found = function(x, *settings, *tensors)
        kept = tensors
        if isinstance(found, tuple):
            kept = found[1:]
            ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*kept)
        ctx.gradient, ctx.settings, ctx.tensors = backward, settings, len(tensors)
        ctx.shape, ctx.layout, ctx.dtype = x.shape, _torch.memory_format(x), x.dtype
        return found

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
        like = torch.empty(
            ctx.shape,
            dtype=grad_output.dtype,
            device=grad_output.device,
            memory_format=ctx.layout,
        )
        dx = ctx.gradient(grad_output, like, *ctx.settings, *ctx.saved_tensors)
        return dx.to(ctx.dtype), None, None, None, *[None] * ctx.tensors


_apply: Callable[..., Any] = _torch.applied(_ShapeOnly)


def _keeps_shape(x: Tensor, name: str) -> bool:
    """Whether torch would keep the input; instances of tensor subclasses are left to torch."""
    check_tensor(x, name)
    return needs_gradient(x) and is_plain(x)


# ---- average pooling -----------------------------------------------------------------------------


def avg_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Average pooling over [N, C, L] or [C, L]; see `avg_pool2d`."""
    if not _keeps_shape(input, "avg_pool1d"):
        return F.avg_pool1d(input, kernel_size, stride, padding, ceil_mode, count_include_pad)  # type: ignore[arg-type]
    (kernel,) = numbers(kernel_size, 1, "kernel_size")
    steps = () if stride in (None, (), []) else (1, *numbers(stride, 1, "stride"))
    (pad,) = numbers(padding, 1, "padding")
    window = ((1, kernel), steps, (0, pad), ceil_mode, count_include_pad, None)
    return _avg_pool(2, input.unsqueeze(-2), window).squeeze(-2)


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pooling over [N, C, H, W] or [C, H, W], with torch's arguments and results.

    Keeps nothing, where torch keeps the input; exact.
    """
    window = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if not _keeps_shape(input, "avg_pool2d"):
        return F.avg_pool2d(input, *window)  # type: ignore[arg-type]
    return _avg_pool(2, input, window)


def avg_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pooling over [N, C, D, H, W] or [C, D, H, W]; see `avg_pool2d`."""
    window = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if not _keeps_shape(input, "avg_pool3d"):
        return F.avg_pool3d(input, *window)  # type: ignore[arg-type]
    return _avg_pool(3, input, window)


def _avg_pool(axes: int, input: Tensor, window: tuple[Any, ...]) -> Tensor:
    kernel, stride, *rest = window
    settings = (kernel, () if stride is None else stride, *rest)
    forward = F.avg_pool2d if axes == 2 else F.avg_pool3d
    y: Tensor = _apply(input, forward, avg_pool_gradient(axes), settings)
    return y


def avg_pool_gradient(axes: int) -> Callable[..., Tensor]:
    """The gradient of an average pooling over two or three axes, by dy, x and its arguments."""
    gradient: Callable[..., Tensor] = getattr(torch.ops.aten, f"avg_pool{axes}d_backward")
    return gradient


# ---- adaptive pooling ----------------------------------------------------------------------------


def adaptive_avg_pool1d(input: Tensor, output_size: OutputSize) -> Tensor:
    """Average pooling to a length, over [N, C, L] or [C, L]; see `avg_pool2d`."""
    sizes = _output_sizes(input, output_size, 1)
    if sizes == (1,) or not _keeps_shape(input, "adaptive_avg_pool1d"):
        return F.adaptive_avg_pool1d(input, output_size)
    return _adaptive_avg_pool(2, input.unsqueeze(-2), (1, *sizes)).squeeze(-2)


def adaptive_avg_pool2d(input: Tensor, output_size: OutputSize) -> Tensor:
    """Average pooling to a size, over [N, C, H, W] or [C, H, W]; see `avg_pool2d`.

    To size 1 it is a mean, of which torch keeps nothing itself.
    """
    sizes = _output_sizes(input, output_size, 2)
    if sizes == (1, 1) or not _keeps_shape(input, "adaptive_avg_pool2d"):
        return F.adaptive_avg_pool2d(input, output_size)
    return _adaptive_avg_pool(2, input, sizes)


def adaptive_avg_pool3d(input: Tensor, output_size: OutputSize) -> Tensor:
    """Average pooling to a size, over [N, C, D, H, W] or [C, D, H, W]; see `avg_pool2d`."""
    sizes = _output_sizes(input, output_size, 3)
    if sizes == (1, 1, 1) or not _keeps_shape(input, "adaptive_avg_pool3d"):
        return F.adaptive_avg_pool3d(input, output_size)
    return _adaptive_avg_pool(3, input, sizes)


def _adaptive_avg_pool(axes: int, input: Tensor, sizes: tuple[int, ...]) -> Tensor:
    forward = F.adaptive_avg_pool2d if axes == 2 else F.adaptive_avg_pool3d
    operator = _torch.adaptive_avg_pool_gradient(axes)
    if operator is None:
        return forward(input, sizes)  # type: ignore[arg-type]

    def gradient(grad_output: Tensor, like: Tensor, _: Any) -> Tensor:
        return operator(grad_output, like)

    y: Tensor = _apply(input, forward, gradient, (sizes,))
    return y


def _output_sizes(input: Tensor, output_size: OutputSize, axes: int) -> tuple[int, ...]:
    """The size of the output for each axis; empty where torch is to say what is wrong with it."""
    sizes = output_size if isinstance(output_size, Sequence) else (output_size,) * axes
    if len(sizes) != axes or input.dim() <= axes:
        return ()
    given = zip(sizes, input.shape[-axes:], strict=True)
    return tuple(own if size is None else size for size, own in given)


def adaptive_max_pool1d(
    input: Tensor, output_size: OutputSize, return_indices: bool = False
) -> Any:
    """Max pooling to a length, over [N, C, L] or [C, L]; see `adaptive_max_pool2d`."""
    if not _keeps_shape(input, "adaptive_max_pool1d"):
        return _plain_max(1, input, output_size, return_indices)
    sizes = (1, *_output_sizes(input, output_size, 1))
    found = _adaptive_max_pool(2, input.unsqueeze(-2), sizes)
    y, indices = (each.squeeze(-2) for each in found)
    return (y, indices) if return_indices else y


def adaptive_max_pool2d(
    input: Tensor, output_size: OutputSize, return_indices: bool = False
) -> Any:
    """Max pooling to a size, over [N, C, H, W] or [C, H, W], with torch's arguments and results.

    Keeps an int64 index an output element, where torch keeps the input besides; exact.
    """
    if not _keeps_shape(input, "adaptive_max_pool2d"):
        return _plain_max(2, input, output_size, return_indices)
    found = _adaptive_max_pool(2, input, output_size)
    return found if return_indices else found[0]


def adaptive_max_pool3d(
    input: Tensor, output_size: OutputSize, return_indices: bool = False
) -> Any:
    """Max pooling to a size, over [N, C, D, H, W] or [C, D, H, W]; see `adaptive_max_pool2d`."""
    if not _keeps_shape(input, "adaptive_max_pool3d"):
        return _plain_max(3, input, output_size, return_indices)
    found = _adaptive_max_pool(3, input, output_size)
    return found if return_indices else found[0]


def _plain_max(axes: int, x: Tensor, sizes: OutputSize, return_indices: bool) -> Any:
    return getattr(F, f"adaptive_max_pool{axes}d")(x, sizes, return_indices)


def _adaptive_max_pool(axes: int, input: Tensor, sizes: OutputSize) -> tuple[Tensor, Tensor]:
    operator = getattr(torch.ops.aten, f"adaptive_max_pool{axes}d_backward")

    def forward(x: Tensor, sizes: OutputSize) -> Any:
        return _plain_max(axes, x, sizes, True)

    def gradient(grad_output: Tensor, like: Tensor, _: Any, indices: Tensor) -> Any:
        return operator(grad_output, like, indices)

    found: tuple[Tensor, Tensor] = _apply(input, forward, gradient, (sizes,))
    return found


# ---- fractional pooling --------------------------------------------------------------------------


def fractional_max_pool2d(
    input: Tensor,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Any:
    """Max pooling over windows that torch draws; see `adaptive_max_pool2d`."""
    sizes = (kernel_size, output_size, output_ratio)
    return _fractional_max_pool(2, input, sizes, return_indices, _random_samples)


def fractional_max_pool3d(
    input: Tensor,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Any:
    """Max pooling over windows that torch draws; see `adaptive_max_pool2d`."""
    sizes = (kernel_size, output_size, output_ratio)
    return _fractional_max_pool(3, input, sizes, return_indices, _random_samples)


def _fractional_max_pool(
    axes: int, input: Tensor, sizes: tuple[Any, ...], return_indices: bool, samples: Tensor | None
) -> Any:
    pool = getattr(F, f"fractional_max_pool{axes}d")
    if not _keeps_shape(input, f"fractional_max_pool{axes}d"):
        return pool(input, *sizes, return_indices, _random_samples=samples)
    operator = getattr(torch.ops.aten, f"fractional_max_pool{axes}d_backward")

    def forward(x: Tensor, *settings: Any) -> Any:
        *sizes, samples = settings if len(settings) > 3 else (*settings, None)
        return pool(x, *sizes, return_indices=True, _random_samples=samples)

    def gradient(grad_output: Tensor, like: Tensor, kernel: Size, *rest: Any) -> Any:
        return operator(grad_output, like, kernel, grad_output.shape[-axes:], rest[-1])

    found = _apply(input, forward, gradient, sizes, *([] if samples is None else [samples]))
    return found if return_indices else found[0]


# ---- padding -------------------------------------------------------------------------------------

_PADDED = {"reflect": "reflection", "replicate": "replication"}


def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Tensor:
    """`torch.nn.functional.pad`. Keeps nothing, where torch keeps what it reflects or repeats.

    Exact. What torch does otherwise in its deterministic mode is torch's own.
    """
    is_edge = mode in _PADDED and not torch.are_deterministic_algorithms_enabled()
    if not is_edge or not _keeps_shape(input, "pad"):
        return F.pad(input, pad, mode, value)

    def forward(x: Tensor, widths: Sequence[int]) -> Tensor:
        return F.pad(x, widths, mode)

    gradient = getattr(torch.ops.aten, f"{_PADDED[mode]}_pad{len(pad) // 2}d_backward", None)
    y: Tensor = _apply(input, forward, gradient, (tuple(pad),))
    return y


# ---- interpolation -------------------------------------------------------------------------------


def interpolate(
    input: Tensor,
    size: Size | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """`torch.nn.functional.interpolate`. Keeps nothing; torch keeps the input of mode "area".

    Exact.
    """
    axes = input.dim() - 2
    others = (align_corners, recompute_scale_factor, antialias)
    given = scale_factor if size is None else size
    fits = axes in _AREA and (not isinstance(given, Sequence) or len(given) == axes)
    is_area = mode == "area" and fits and (size is None) != (scale_factor is None)
    if not is_area or any(others) or not _keeps_shape(input, "interpolate"):
        return F.interpolate(input, size, scale_factor, mode, *others)
    if scale_factor is not None:
        many = isinstance(scale_factor, Sequence)
        scales: Any = scale_factor if many else [scale_factor] * axes
        lengths = zip(input.shape[2:], scales, strict=True)
        size = [math.floor(float(length) * scale) for length, scale in lengths]
    return _AREA[axes](input, size)


_AREA = {1: adaptive_avg_pool1d, 2: adaptive_avg_pool2d, 3: adaptive_avg_pool3d}


# ---- what else torch keeps an input of -----------------------------------------------------------


def rrelu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """`torch.nn.functional.rrelu`, with its random slopes.

    Keeps the slopes, where torch keeps the input besides; exact. In place, and with `upper` not
    above `lower`, it is torch's own.
    """
    is_random = training and not inplace and upper - lower > 1e-6  # as its backward operator has it
    if not is_random or not _keeps_shape(input, "rrelu"):
        return F.rrelu(input, lower, upper, training, inplace)
    y: Tensor
    y, _ = _apply(input, _with_slopes, _slopes_gradient, (lower, upper))
    return y


def _with_slopes(x: Tensor, lower: float, upper: float) -> tuple[Tensor, Tensor]:
    slopes = torch.empty_like(x, memory_format=torch.contiguous_format)  # as torch draws them
    return torch.ops.aten.rrelu_with_noise(x, slopes, lower, upper, True), slopes


def _slopes_gradient(
    grad_output: Tensor, like: Tensor, lower: float, upper: float, slopes: Tensor
) -> Any:
    operator = torch.ops.aten.rrelu_with_noise_backward
    return operator(grad_output, like, slopes, lower, upper, True, False)


def gather(input: Tensor, dim: int, index: Tensor) -> Tensor:
    """`torch.gather`. Keeps the indices in as few bytes as they fit, where torch keeps them in 8
    and the input besides; exact.
    """
    if not _keeps_shape(input, "gather"):
        return torch.gather(input, dim, index)
    if not torch.compiler.is_compiling() and input.dim() and index.is_contiguous():
        index = index.to(_index_dtype(input.shape[dim]))
    y: Tensor = _apply(input, _gather, _gather_gradient, (dim,), index)
    return y


def _index_dtype(size: int) -> torch.dtype:
    """The narrowest dtype of indices along a dimension of this size."""
    dtypes = (torch.int16, torch.int32, torch.int64)
    return next(dtype for dtype in dtypes if size <= torch.iinfo(dtype).max)


def _gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return torch.gather(x, dim, index.long())


def _gather_gradient(grad_output: Tensor, like: Tensor, dim: int, index: Tensor) -> Any:
    return torch.ops.aten.gather_backward(grad_output, like, dim, index.long(), False)


def masked_select(input: Tensor, mask: Tensor) -> Tensor:
    """`torch.masked_select`. Keeps the mask, where torch keeps the input besides; exact."""
    if not _keeps_shape(input, "masked_select"):
        return torch.masked_select(input, mask)
    gradient = torch.ops.aten.masked_select_backward
    y: Tensor = _apply(input, torch.masked_select, gradient, (), mask)
    return y
