"""Max pooling that keeps the offset of each maximum in its window."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import (
    autocast,
    check_tensor,
    needs_gradient,
    numbers,
    refuse_second_derivative,
)
from packlight._overwrite import writable
from packlight.errors import InputError
from packlight.fewbit import ops

Size = int | Sequence[int]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, window: tuple[tuple[int, ...], ...], ceil_mode: bool, indices: bool
    ) -> Any:
        kernel, stride, padding, dilation = window
        y, codes = ops.max_pool(x, kernel, stride, padding, dilation, ceil_mode)
        y = writable(y)
        ctx.save_for_backward(codes)
        ctx.window = window
        ctx.input_size, ctx.output_stride = x.shape, y.stride()
        if not indices:
            return y
        index = ops.max_pool_indices(codes, *window, x.shape, y.shape, y.stride())
        ctx.mark_non_differentiable(index)
        return y, index

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
        refuse_second_derivative()
        (codes,) = ctx.saved_tensors
        dx = ops.max_pool_backward(
            grad_output, codes, *ctx.window, ctx.input_size, ctx.output_stride
        )
        return dx, None, None, None


_pool: Callable[..., Any] = _torch.applied(_MaxPool)


def _max_pool(
    input: Tensor,
    axes: int,
    plain: Callable[..., Any],
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
    ceil_mode: bool,
    return_indices: bool,
) -> Any:
    check_tensor(input, f"max_pool{axes}d")
    if not needs_gradient(input):
        return plain(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    if input.dim() not in (axes + 1, axes + 2):
        raise InputError(
            f"max_pool{axes}d takes {axes + 1} or {axes + 2} dimensions, got shape"
            f" {tuple(input.shape)}"
        )
    name = f"max_pool{axes}d"
    input = autocast(input, name, lambda empty: plain(empty.new_empty((1,) * (axes + 1)), 1))
    kernel = numbers(kernel_size, axes, "kernel_size")
    window = (
        kernel,
        # torch takes an empty stride for "the kernel size" as well as None.
        kernel if stride is None or stride in ((), []) else numbers(stride, axes, "stride"),
        numbers(padding, axes, "padding"),
        numbers(dilation, axes, "dilation"),
    )
    if axes > 1 or input.dim() < 3 or input.is_contiguous():
        return _pool(input, window, ceil_mode, return_indices)
    # As torch does it, which gives channels-last results of what lies so.
    wide = tuple((one, *numbers) for one, numbers in zip((1, 1, 0, 1), window, strict=True))
    found = _pool(input.unsqueeze(2), wide, ceil_mode, return_indices)
    return tuple(each.squeeze(2) for each in found) if return_indices else found.squeeze(2)


def max_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max pooling over [N, C, L] or [C, L]; see `max_pool2d`."""
    return _max_pool(
        input, 1, F.max_pool1d, kernel_size, stride, padding, dilation, ceil_mode, return_indices
    )


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max pooling over [N, C, H, W] or [C, H, W], with torch's arguments and results.

    Keeps ceil(log2(window size)) bits an output element, the offset of the maximum in its window
    (4 for a 3x3 window), where torch keeps the input and an int64 index. Exact; overlapping windows
    add in fp32. `return_indices` gives torch's int64 indices, rebuilt; whether they live on is the
    caller's choice. Channels-last stays channels-last. Windows of more than 256 elements run in
    plain PyTorch on a GPU, and round up to 64 bytes for every 8 bits of an offset.
    """
    return _max_pool(
        input, 2, F.max_pool2d, kernel_size, stride, padding, dilation, ceil_mode, return_indices
    )


def max_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max pooling over [N, C, D, H, W] or [C, D, H, W]; see `max_pool2d`."""
    return _max_pool(
        input, 3, F.max_pool3d, kernel_size, stride, padding, dilation, ceil_mode, return_indices
    )
