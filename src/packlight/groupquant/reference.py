"""Group quantisation in plain PyTorch: what is true, on every device.

Codes lie as `Grouping` says. Minimum and step of a group are bfloat16 numbers in one int32 word,
the minimum in the high half. Arithmetic is in float32 whatever the dtype of the tensor.

What a pack holds is finite: `limits.py` says in place of what. Differences are taken of halves,
since those of whole numbers may overflow. A negative step says that in place of an infinity there
is a number at which the derivative is the same and the function is not.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight._philox import philox2x32
from packlight._seeds import as_tensor
from packlight.elementwise.derivatives import BACKWARD, FUNCTIONS
from packlight.elementwise.limits import Limits, limits
from packlight.groupquant.grouping import Grouping, Groups
from packlight.packing.layout import compute_dtype, dense_stride, memory_order

# Rounds of Philox2x32: 7 are the fewest that pass BigCrush (Random123 by Salmon et al.).
ROUNDS = 7


def fraction_bits(bits: int) -> int:
    """Bits of a random number: as many as fit a float32 number's 23 below a code, at most 16."""
    return min(16, 23 - bits)


def draws(seed: Tensor, grouping: Grouping, first_row: int = 0) -> Tensor:
    """Uniform numbers k / 2^f on [0, 1), f = `fraction_bits`, [rows, row_groups, group_size].

    One Philox call gives eight numbers: to the `parts` elements of one byte in 8 / parts
    consecutive groups. Its counter is (byte of the first of these groups in its row, row), rows
    counted from `first_row`. The key is the low half of the seed; the high half is xored to the
    row, so two seeds share numbers with a chance of about rows / 2^63.

    A word of bytes 0 to 3 gives the numbers of bytes (0, 1), (1, 2), (2, 3) and (3, 0), low byte
    first, without the top bit at 8 bits. Each is uniform, so each rounding is unbiased.

    Of two neighbours, one byte is the high one of the first and the low one of the second. Given
    that byte, the chance that the second rounds up takes one of two values 2^(8 - f) apart, so its
    deviation is at most 2^(7 - f); that of the first one's rounding is at most 1/2. So their
    covariance is at most 2^(6 - f), in steps squared: 1/1024, at 8 bits 1/512. All other pairs are
    independent. A sum of n roundings, as many neighbours, has a variance of at most n / 512 (at 8
    bits n / 256) more than independent ones, whose is at most n / 4.
    """
    rows, row_groups, size = grouping.rows, grouping.row_groups, grouping.group_bytes
    sets = 8 // grouping.parts
    calls = -(-row_groups // sets)
    c0 = torch.arange(calls * size, device=seed.device).repeat(rows) & 0xFFFFFFFF
    c1 = torch.arange(first_row, first_row + rows, device=seed.device)
    c1 = ((seed >> 32) ^ c1) & 0xFFFFFFFF
    c1 = c1.repeat_interleave(calls * size)
    words = torch.stack(philox2x32(seed & 0xFFFFFFFF, c0, c1, ROUNDS))
    fraction = fraction_bits(grouping.bits)
    turned = torch.stack([words >> shift | words << (32 - shift) for shift in (0, 8, 16, 24)], 1)
    uniform = (turned & ((1 << fraction) - 1)).float() / (1 << fraction)  # [2, 4, rows ...]
    uniform = uniform.view(sets, grouping.parts, rows, calls, size)
    uniform = uniform.permute(2, 3, 0, 1, 4).reshape(rows, calls * sets, grouping.group_size)
    return uniform[:, :row_groups]


# Bits of 2^-126, the least step: its inverse is finite.
TINY = 0x00800000
# The sign of a float32 number.
SIGN = -(2**31)


def _bf16_down(x: Tensor) -> Tensor:
    """float32 `x` rounded down to a bfloat16 number, as int32 bits with a zero low half."""
    bits = x.view(torch.int32)
    return (bits + torch.where(bits < 0, 0xFFFF, 0).int()) & -65536


def _bf16_up(x: Tensor) -> Tensor:
    """float32 `x` >= 0 rounded up to a bfloat16 number, as int32 bits with a zero low half."""
    return (x.view(torch.int32) + 0xFFFF) & -65536


def quantize_rows(
    x: Tensor,
    width: int,
    groups: Groups,
    seed: Tensor | None,
    first_row: int = 0,
    within: Limits | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes [code_bytes] uint8 and scales [groups] int32 of flat `x`, rows of `width` elements.

    `seed` [1] int64 makes the rounding stochastic; without it the rounding is to nearest. The
    limits are those of the dtype unless others are given.
    """
    bits, group_size = groups
    rows = x.numel() // width if width else 0
    grouping = Grouping(rows, width, *groups)
    padded = grouping.row_groups * group_size
    values = x.view(rows, width)
    if padded != width:  # copies of the last value change no minimum and no maximum
        tail = values[:, -1:].expand(rows, padded - width)
        values = torch.cat([values, tail], 1)
    values = values.reshape(rows, grouping.row_groups, group_size)

    lowest, highest, below, above, edge = limits(x.dtype) if within is None else within
    low, high = torch.aminmax(values, dim=-1) if values.numel() else (values[..., 0],) * 2
    far = low <= -edge, high >= edge
    replaced = (far[0] & (below > lowest)) | (far[1] & (above < highest))
    low = torch.where(far[0], below, low.clamp(lowest, highest))
    high = torch.where(far[1], above, high.clamp(lowest, highest)).maximum(low)
    values = values.clamp(low.unsqueeze(-1), high.unsqueeze(-1)).float()

    top = float(2**bits - 1)
    low_bits = _bf16_down(low.float().contiguous())
    half_low = low_bits.view(torch.float32) * 0.5
    half_spread = (high.float() * 0.5 - half_low).contiguous()
    finite = half_spread < float("inf")  # false for NaN too
    exact = half_spread * (2 / top)
    step_bits = _bf16_up(exact).clamp(min=TINY)
    step_bits = torch.where(finite, step_bits, 0x7FC00000).int()
    inverse = torch.where(finite, 1.0 / step_bits.view(torch.float32) * 2.0, 0.0)
    codes = (values * 0.5 - half_low.unsqueeze(-1)).nan_to_num(0.0, 0.0, 0.0)
    codes = codes * inverse.unsqueeze(-1)
    # The sum has `fraction_bits` behind the point, as in `kernels.py`.
    base = float(1 << (23 - fraction_bits(bits)))
    dither = 0.5 if seed is None else draws(seed, grouping, first_row)
    codes = codes.clamp(max=top) + (base + dither) - base
    codes = codes.floor().to(torch.uint8)

    # The step that is kept is rounded down where the last code would stand for more than is finite.
    last = step_bits.view(torch.float32) * (top / 2) + half_low
    past = last > limits(x.dtype).highest / 2
    step_bits = torch.where(past, exact.view(torch.int32) & -65536, step_bits)
    step_bits = torch.where(replaced, step_bits | SIGN, step_bits)
    bytes_ = codes.view(rows, grouping.row_groups, grouping.parts, grouping.group_bytes)
    packed = bytes_[:, :, 0].clone()
    for part in range(1, grouping.parts):
        packed |= bytes_[:, :, part] << (part * bits)
    scales = low_bits | ((step_bits >> 16) & 0xFFFF)
    return packed.view(-1), scales.view(-1)


def dequantize_rows(
    codes: Tensor, scales: Tensor, rows: int, width: int, groups: Groups, replaced: bool = True
) -> Tensor:
    """The float32 values [rows, width] that codes and scales stand for.

    Unless those in place of infinities will do, as they do for derivatives, groups with any come
    back as NaN.
    """
    bits, group_size = groups
    grouping = Grouping(rows, width, *groups)
    packed = codes.view(rows, grouping.row_groups, 1, grouping.group_bytes)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device).view(-1, 1)
    numbers = ((packed >> shifts) & (2**bits - 1)).float()
    low = (scales & -65536).view(torch.float32).view(rows, grouping.row_groups, 1, 1)
    step = (scales << 16).view(torch.float32).view(rows, grouping.row_groups, 1, 1)
    step = step.abs() if replaced else torch.where(step < 0, torch.nan, step)
    values = (low * 0.5 + step * 0.5 * numbers) * 2.0  # the product of whole ones may overflow
    rows_of_values: Tensor = values.view(rows, grouping.row_groups * group_size)
    return rows_of_values[:, :width]


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as float16 can hold them; other dtypes hold whatever a pack does."""
    if dtype != torch.float16:
        return values
    greatest = torch.finfo(dtype).max
    return values.clamp(-greatest, greatest)


def quantize(
    x: Tensor, stride: Sequence[int], groups: Groups, seed: Tensor | None, number: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x` in the memory order of `stride`, one row of all its elements."""
    flat = memory_order(x, stride)
    key = as_tensor(seed, number, x.device)
    return quantize_rows(flat, flat.numel(), groups, key)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    width: int,
    groups: Groups,
    dtype: torch.dtype,
    name: str,
    parameters: Sequence[float],
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """f(v) weight + bias of the packed values v, in `dtype`, of this shape and dense stride.

    f is an activation by name, or nothing where the name is empty; weight and bias are [width].
    """
    y = codes.new_empty_strided(tuple(shape), tuple(stride), dtype=dtype)
    if y.numel() == 0:
        return y
    rows = y.numel() // width
    values = dequantize_rows(codes, scales, rows, width, groups, replaced=not name)
    if name:
        values = FUNCTIONS[name](values, *parameters)
    if weight is not None:
        values = values * weight
    if bias is not None:
        values = values + bias
    if not name:
        values = saturated(values, dtype)
    y.as_strided((y.numel(),), (1,)).copy_(values.reshape(-1))
    return y


def activation(
    x: Tensor,
    name: str,
    parameters: Sequence[float],
    groups: Groups,
    seed: Tensor | None,
    number: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = f(x), bit-equal to torch's, and the pack of x in its memory order."""
    stride = dense_stride(x)
    y = FUNCTIONS[name](x, *parameters)
    if y.stride() != stride:  # logsigmoid drops it
        y = y.new_empty_strided(y.shape, stride).copy_(y)
    within = limits(x.dtype, name, parameters)
    flat, key = memory_order(x, stride), as_tensor(seed, number, x.device)
    return y, *quantize_rows(flat, flat.numel(), groups, key, within=within)


def activation_backward(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    name: str,
    parameters: Sequence[float],
    stride: Sequence[int],
    groups: Groups,
) -> Tensor:
    """dx = dy f'(x~)."""
    flat = memory_order(grad_output, stride)
    n, dtype = flat.numel(), compute_dtype(flat)
    x = dequantize_rows(codes, scales, 1, n, groups).view(-1).to(dtype)
    dx = grad_output.new_empty_strided(grad_output.shape, tuple(stride))
    dx.as_strided((n,), (1,)).copy_(BACKWARD[name](flat.to(dtype), x, *parameters))
    return dx


def gated(
    gate: Tensor, up: Tensor, name: str, groups: Groups, seed: Tensor | None, number: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y = f(gate) up, bit-equal to torch's, and the packs of gate and up in gate's order."""
    stride = dense_stride(gate)
    if name == "sigmoid":  # F.glu, which does not round the sigmoid to the tensors' dtype
        product = F.glu(torch.stack([up, gate]), 0)[0]
    else:
        product = FUNCTIONS[name](gate) * up
    y = gate.new_empty_strided(gate.shape, stride).copy_(product)
    n = gate.numel()
    key = as_tensor(seed, number, gate.device)
    within = limits(gate.dtype, name)
    gate_pack = quantize_rows(memory_order(gate, stride), n, groups, key, within=within)
    up_pack = quantize_rows(memory_order(up, stride), n, groups, key, first_row=1)
    return y, *gate_pack, *up_pack


def gated_backward(
    grad_output: Tensor,
    gate_codes: Tensor,
    gate_scales: Tensor,
    up_codes: Tensor,
    up_scales: Tensor,
    name: str,
    stride: Sequence[int],
    groups: Groups,
    through: bool,
) -> tuple[Tensor, Tensor]:
    """dgate = dy up~ f'(gate~), dup = dy f(gate~). Unless `through`, dy up~ in place of dgate."""
    flat = memory_order(grad_output, stride)
    n, dtype = flat.numel(), compute_dtype(flat)
    gate_pack = (gate_codes, gate_scales)
    gate = dequantize_rows(*gate_pack, 1, n, groups).view(-1).to(dtype)
    factor = dequantize_rows(*gate_pack, 1, n, groups, replaced=False).view(-1).to(dtype)
    up = dequantize_rows(up_codes, up_scales, 1, n, groups).view(-1).to(dtype)
    dy = flat.to(dtype)
    dgate = grad_output.new_empty_strided(grad_output.shape, tuple(stride))
    dup = torch.empty_like(dgate)
    dgate.as_strided((n,), (1,)).copy_(BACKWARD[name](dy * up, gate) if through else dy * up)
    dup.as_strided((n,), (1,)).copy_(dy * FUNCTIONS[name](factor))
    return dgate, dup


def gated_product(
    gate_codes: Tensor,
    gate_scales: Tensor,
    up_codes: Tensor,
    up_scales: Tensor,
    name: str,
    shape: Sequence[int],
    stride: Sequence[int],
    groups: Groups,
    dtype: torch.dtype,
) -> Tensor:
    """f(gate~) up~ in `dtype`, of this shape and dense stride."""
    y = gate_codes.new_empty_strided(tuple(shape), tuple(stride), dtype=dtype)
    n = y.numel()
    gate = dequantize_rows(gate_codes, gate_scales, 1, n, groups, replaced=False)
    up = dequantize_rows(up_codes, up_scales, 1, n, groups)
    y.as_strided((n,), (1,)).copy_((FUNCTIONS[name](gate) * up).view(-1))
    return y
