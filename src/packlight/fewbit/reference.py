"""The few-bit activations in plain PyTorch: what is true, on every device.

Codes are k-bit integers packed as `packing/layout.py` says. Where the derivative has inputs at
which torch's gradient is not finite (`poison`, see `activations.py`), one flag byte follows the
codes: no code is free to say "NaN here", so a call that met such an input returns NaN for every
gradient. Loud, where a finite level would be silently wrong.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from packlight.fewbit.activations import (
    CONTINUOUS,
    EXACT,
    NEGATIVE_INFINITY,
    POSITIVE_INFINITY,
)
from packlight.packing import reference as packing
from packlight.packing.layout import (
    compute_dtype,
    dense_stride,
    from_memory_order,
    laid_out,
    memory_order,
    packed_bytes,
)


def _interval(x: Tensor, bits: int, borders: Sequence[float], parity: str, center: float) -> Tensor:
    """uint8 codes of flat `x`: the number of borders below x, or below |x - c| and its sign."""
    x = x.to(compute_dtype(x))
    x = x - center if center else x
    t = x if parity == "none" else x.abs()
    if len(borders) < 16:  # so many compares still cost less than a search
        code = torch.zeros_like(x, dtype=torch.uint8)
        for border in borders:
            code += t > border
    else:
        table = torch.tensor(borders, dtype=x.dtype, device=x.device)
        code = torch.bucketize(t, table, out_int32=True).to(torch.uint8)
    if parity == "odd":
        code |= torch.signbit(x).to(torch.uint8) << (bits - 1)
    return code


def _poisoned(x: Tensor, poison: int) -> Tensor:
    """Whether flat `x` holds an input at which the derivative is not finite: one bool."""
    low, high = torch.aminmax(x)  # NaN wins both
    bad = low.isnan()
    if poison & NEGATIVE_INFINITY:
        bad = bad | (low == -math.inf)
    if poison & POSITIVE_INFINITY:
        bad = bad | (high == math.inf)
    return bad


def encode(
    x: Tensor,
    bits: int,
    borders: Sequence[float],
    parity: str,
    center: float,
    poison: int,
    stride: Sequence[int],
) -> Tensor:
    """Packed codes of `x` in the memory order of `stride`, and the flag byte where there is one."""
    flat = memory_order(x, stride)
    return _pack(flat, _interval(flat, bits, borders, parity, center), bits, poison)


def _pack(flat: Tensor, codes: Tensor, bits: int, poison: int) -> Tensor:
    size = packed_bytes(flat.numel(), bits)
    packed = codes.new_empty(size + int(poison != 0))
    packing.pack(codes, bits, out=packed[:size])
    if poison:
        packed[size:] = _poisoned(flat, poison) if flat.numel() else 0
    return packed


def activation(
    x: Tensor,
    name: str,
    parameters: Sequence[float],
    bits: int,
    borders: Sequence[float],
    parity: str,
    center: float,
    poison: int,
) -> tuple[Tensor, Tensor]:
    """y = f(x), bit-equal to torch's, and the packed codes of f'(x) in y's memory order."""
    stride = dense_stride(x)
    if name in EXACT:
        exact = EXACT[name]
        y = laid_out(exact.function(x, *parameters), stride)
        flat = memory_order(x, stride)
        compared = exact.compared(parameters, x)
        codes = exact.code(flat.to(compute_dtype(flat)), *compared).to(torch.uint8)
        return y, _pack(flat, codes, bits, poison=0)
    # Of torch's functions only logsigmoid returns other strides than its input's.
    y = laid_out(CONTINUOUS[name].function(x, *parameters), stride)
    return y, encode(x, bits, borders, parity, center, poison, stride)


def activation_(
    x: Tensor,
    name: str,
    parameters: Sequence[float],
    bits: int,
    borders: Sequence[float],
    parity: str,
    center: float,
    poison: int,
) -> Tensor:
    """As `activation`, with the output written over `x`; the codes are in the order of `x`."""
    y, codes = activation(x, name, parameters, bits, borders, parity, center, poison)
    x.copy_(y)
    return codes


def decode_backward(
    grad_output: Tensor,
    codes: Tensor,
    bits: int,
    levels: Sequence[float],
    mask: bool,
    stride: Sequence[int],
) -> Tensor:
    """dx = dy * levels[code]; with `mask`, a level of 0 gives 0 whatever dy, infinity included."""
    flat = memory_order(grad_output, stride)
    count, size = flat.numel(), packed_bytes(flat.numel(), bits)
    dtype = compute_dtype(flat)
    table = torch.tensor(levels, dtype=dtype, device=codes.device)
    if codes.numel() > size:
        table = torch.where(codes[-1] == 0, table, math.nan)
    level = table.index_select(0, packing.unpack(codes[:size], bits, count).int())
    product = flat.to(dtype) * level
    if mask:
        product = torch.where(level == 0, 0.0, product)
    return from_memory_order(product, grad_output.shape, stride, grad_output.dtype)
