"""The operators of group quantisation in plain PyTorch: what is true, on every device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight._seeds import NEAREST, as_tensor
from packlight.elementwise.derivatives import BACKWARD, FUNCTIONS
from packlight.elementwise.limits import Limits, limits, pack_limits
from packlight.groupquant import minmax_reference, rotated_reference
from packlight.groupquant.draws import other_seed, seed_of, words_of
from packlight.groupquant.grouping import MINMAX, ROTATED, Grouping, Groups
from packlight.groupquant.planes import from_bytes, to_bytes
from packlight.packing.layout import compute_dtype, dense_stride, memory_order


def quantize_rows(
    x: Tensor, width: int, groups: Groups, seed: Tensor | None, within: Limits | None = None
) -> tuple[Tensor, Tensor]:
    """Codes [code_bytes] uint8 and scales [words] int32 of flat `x`, rows of `width` elements.

    The limits are those of the dtype unless others are given. Without a seed, rounding is to
    nearest; offsets and rotations are then those of one seed.
    """
    rows = x.numel() // width if width else 0
    grouping = Grouping(rows, width, *groups)
    padded = grouping.row_groups * grouping.group_size
    values = x.view(rows, width)
    if padded != width:  # copies of the last value change no minimum and no maximum
        tail = values[:, -1:].expand(rows, padded - width)
        values = torch.cat([values, tail], 1)
    values = values.reshape(rows, grouping.row_groups, grouping.group_size)
    whole = limits(x.dtype)
    within = whole if within is None else within
    if grouping.code == MINMAX:
        numbers, words = minmax_reference.encode(values, grouping, seed, within, whole.highest)
        return to_bytes(numbers, grouping.bits), words.view(-1)
    key = torch.tensor([NEAREST], device=x.device) if seed is None else seed
    if grouping.code == ROTATED:
        numbers, words = rotated_reference.encode(values, grouping, key, within)
        codes = rotated_reference.to_bytes(numbers, grouping.bits)
    else:
        numbers, words = minmax_reference.encode(values, grouping, key, within, whole.highest)
        codes = to_bytes(numbers, grouping.bits)
    return codes, torch.cat([words_of(key), words.view(-1)])


def dequantize_rows(
    codes: Tensor, scales: Tensor, rows: int, width: int, groups: Groups, replaced: bool = True
) -> Tensor:
    """The float32 values [rows, width] that codes and scales stand for.

    Unless those in place of infinities will do, as they do for derivatives, groups with any come
    back as NaN.
    """
    grouping = Grouping(rows, width, *groups)
    bits, words = grouping.bits, scales
    if grouping.code != MINMAX:  # the seed stands before them
        words = scales[scales.numel() - grouping.groups :]
    if grouping.code == ROTATED:
        numbers = rotated_reference.from_bytes(codes, bits, grouping.group_size)
        values = rotated_reference.decode(numbers, words, bits, seed_of(scales), replaced)
    else:
        numbers = from_bytes(codes, bits, grouping.group_size)
        seed = None if grouping.code == MINMAX else seed_of(scales)
        values = minmax_reference.decode(numbers, words, bits, seed, replaced)
    whole = grouping.row_groups * grouping.group_size
    values = values.view(rows, whole)
    return values if whole == width else values[:, :width]


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


def quantize_less(
    x: Tensor,
    stride: Sequence[int],
    shift: Tensor,
    width: int,
    groups: Groups,
    seed: Tensor | None,
    number: int,
) -> tuple[Tensor, Tensor]:
    """`quantize` of x less a shift: the first values of every `width`, in the order of memory.

    Shift and width are whole groups.
    """
    less = memory_order(x, stride).clone()
    less.view(-1, width)[:, : shift.numel()].sub_(shift)
    return quantize(less, (1,), groups, seed, number)


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

    f is an activation by name, or nothing where the name is empty; weight and bias are [width]. A
    bias may be of the first whole groups alone.
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
        values = values + F.pad(bias, (0, width - bias.numel()))
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
    within = pack_limits(x.dtype, name, parameters, groups[0])
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


def activation_(
    x: Tensor,
    name: str,
    parameters: Sequence[float],
    groups: Groups,
    seed: Tensor | None,
    number: int,
) -> tuple[Tensor, Tensor]:
    """As `activation`, with y written over x."""
    y, codes, scales = activation(x, name, parameters, groups, seed, number)
    x.copy_(y)
    return codes, scales


def activation_backward_(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    name: str,
    parameters: Sequence[float],
    groups: Groups,
) -> None:
    """As `activation_backward`, with dx written over a dense gradient."""
    f = (name, parameters, grad_output.stride())
    grad_output.copy_(activation_backward(grad_output, codes, scales, *f, groups))


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
    within = pack_limits(gate.dtype, name, bits=groups[0])
    gate_pack = quantize_rows(memory_order(gate, stride), n, groups, key, within=within)
    up_pack = quantize_rows(memory_order(up, stride), n, groups, other_seed(key))
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


def gated_backward_(
    grad_output: Tensor,
    gate_codes: Tensor,
    gate_scales: Tensor,
    up_codes: Tensor,
    up_scales: Tensor,
    name: str,
    groups: Groups,
) -> Tensor:
    """As `gated_backward`, with dgate written over a dense gradient; dup."""
    packs = (gate_codes, gate_scales, up_codes, up_scales)
    dgate, dup = gated_backward(grad_output, *packs, name, grad_output.stride(), groups, True)
    grad_output.copy_(dgate)
    return dup


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
