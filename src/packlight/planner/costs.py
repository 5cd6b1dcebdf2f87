"""What operators cost on a device: milliseconds, and memory that kernels take for themselves.

The time of an operator is a roofline, the longer of its arithmetic and of its reads and writes by
the figures of the data sheet, times a factor that was measured for the operator, and a kernel's
start.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from packlight import _torch
from packlight.groupquant.grouping import ROTATED
from packlight.low_rank.ops import in_tf32
from packlight.planner.devices import Device
from packlight.saving.rest import is_of_rest

_aten = torch.ops.aten


class Costs:
    """Of operators on a device."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def of(
        self, func: Any, args: Sequence[Any], result: Any, tensors: Sequence[Tensor]
    ) -> tuple[float, float]:
        """Milliseconds of the device and of the host that launches it.

        `tensors` are those that are read and written.
        """
        device, rates = self.device, self.device.rates
        ours = func.namespace == "packlight"
        others = rates.others_packlight if ours else rates.others
        name = name_of(func, args)
        if func.overloadpacket in _ATTENTION:
            seconds = attention_s(device, name, *parts_s(device, func, args, result, tensors))
        else:
            factor = rates.factors.get(name, others)
            if ours and _is_rotated(func, args):
                factor *= _ROTATED
            seconds = factor * max(parts_s(device, func, args, result, tensors))
        host = rates.host_us_packlight if ours else rates.host_us
        if is_hooked():
            host += rates.hooks_us
        return 1e3 * seconds + 1e-3 * rates.kernel_us, 1e-3 * host

    def copy_ms(self, tensor: Tensor) -> float:
        """Of a copy between the device and pinned memory of the host, one way."""
        return 1e3 * self.device.rates.copies * _bytes(tensor) / self.device.link


_ROTATED = 1.33  # how many times as long packs take whose groups are rotated: H200, 4 to 2 bits


def _is_rotated(func: Any, args: Sequence[Any]) -> bool:
    given = zip(func._schema.arguments, args, strict=False)
    return any(x.name == "groups" and value[2] == ROTATED for x, value in given)


def is_hooked() -> bool:
    """Whether hooks of Python see what an operator saves: in checkpoints, in both passes.

    Those that a first pass has to find out whether there is anything to pack are not counted.
    """
    hooks = _torch.saved_tensor_hooks()
    return hooks is not None and not is_of_rest(hooks[0])


_PRODUCTS = ("mm", "addmm", "wide_mm")
_THIN = 64  # the longest side of a product that is far from what long ones reach


def name_of(func: Any, args: Sequence[Any]) -> str:
    """The name by which an operator's factor is kept: on a GPU as on tensors without values.

    Products with a side as short as the rank of an adapter have one of their own, and so has
    attention by narrow heads; those by packlight's kernels have one by each precision, since three
    products of TF32 make one of float32.
    """
    name = _BACKENDS.sub("", func.overloadpacket.__name__)
    if name in _PRODUCTS:
        one, other = [x for x in args if isinstance(x, Tensor)][-2:]
        if min(*one.shape, *other.shape) <= _THIN:
            return THIN_PRODUCTS
        return "aten::mm" if name == "wide_mm" else f"aten::{name}"
    if name.startswith("low_rank") and in_tf32():
        name += IN_TF32
    if func.overloadpacket in _ATTENTION and _query(func, args).shape[-1] <= 64:
        name += NARROW_HEADS
    return f"{func.namespace}::{name.replace('cudnn_batch', 'native_batch')}"


def _query(func: Any, args: Sequence[Any]) -> Tensor:
    query: Tensor = args[func.overloadpacket.__name__.endswith("backward")]
    return query


THIN_PRODUCTS = "aten::mm of a short side"
IN_TF32 = " in TF32"
NARROW_HEADS = " of narrow heads"  # up to 64 wide: less of their arithmetic is in tensor cores
TRAFFIC = " by traffic"
_BACKENDS = re.compile("_for_cpu|(?<=product)_(flash|efficient|cudnn)")


def parts_s(
    device: Device, func: Any, args: Sequence[Any], result: Any, tensors: Sequence[Tensor]
) -> tuple[float, float]:
    """Seconds by the figures of the data sheet: of traffic, and of arithmetic."""
    traffic, arithmetic = sum(map(_bytes, tensors)) / device.bandwidth, 0.0
    if operations := flops(func, args, result):
        dtype = next((x.dtype for x in tensors if x.is_floating_point()), torch.float32)
        arithmetic = operations / device.flops(dtype)
    return traffic, arithmetic


def attention_s(device: Device, name: str, traffic: float, arithmetic: float) -> float:
    """Seconds of attention by what `parts_s` says of it."""
    factors, others = device.rates.factors, device.rates.others
    of_traffic = factors.get(name.removesuffix(NARROW_HEADS) + TRAFFIC, others)
    return of_traffic * traffic + factors.get(name, others) * arithmetic


def _bytes(tensor: Tensor) -> int:
    """What is read or written of a tensor: no more than its storage has."""
    if tensor.layout is not torch.strided:
        return 0
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


# ---- arithmetic ----------------------------------------------------------------------------------


def flops(func: Any, args: Sequence[Any], result: Any) -> int:
    """Floating-point operations of products, of attention and of convolutions; else 0."""
    packet = func.overloadpacket
    count: Callable[[Sequence[Any]], int] | None = _ATTENTION.get(packet)
    if count is not None:
        return count(args)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, out_val=result))
    if func.namespace == "packlight" and packet.__name__ == "wide_mm":
        rows, inner = args[0].shape
        return int(2 * rows * inner * args[1].shape[1])
    return 0


def _attention(times: float, at: int, causal: int) -> Callable[[Sequence[Any]], int]:
    """Products of queries [B, H, S, D] and keys [B, H, T, D] or values [B, H, T, E], about as many
    of each; half of them where causal.
    """

    def count(args: Sequence[Any]) -> int:
        query, key, value = args[at : at + 3]
        *batch, length, width = query.shape
        width = (width + value.shape[-1]) / 2
        share = 0.5 if len(args) > causal and args[causal] else 1.0
        return int(share * times * 2 * math.prod(batch) * length * key.shape[-2] * width)

    return count


# Two products forward; five backward, of which one computes the scores again.
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention(2, 0, 4),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention(5, 1, 7),
    _aten._scaled_dot_product_flash_attention: _attention(2, 0, 4),
    _aten._scaled_dot_product_flash_attention_backward: _attention(5, 1, 11),
    _aten._scaled_dot_product_efficient_attention: _attention(2, 0, 6),
    _aten._scaled_dot_product_efficient_attention_backward: _attention(5, 1, 11),
    _aten._scaled_dot_product_cudnn_attention: _attention(2, 0, 6),
    _aten._scaled_dot_product_cudnn_attention_backward: _attention(5, 1, 14),
}


# ---- memory --------------------------------------------------------------------------------------


def workspace(device: Device, func: Any, args: Sequence[Any]) -> int:
    """Bytes that a kernel takes beside its results, while it runs."""
    count: Callable[[Device, Sequence[Any]], int] | None = _WORKSPACES.get(func.overloadpacket)
    return 0 if count is None else count(device, args)


def _flash_backward(device: Device, args: Sequence[Any]) -> int:
    """FlashAttention adds up the gradient of the query in float32, with rows padded to 128, and
    has two numbers a row. Where heads of keys are fewer, it has gradients of key and value for each
    head of the query first.
    """
    query, key = args[1], args[2]
    *batch, length, width = query.shape
    rows = int(math.prod(batch)) * (-(-int(length) // 128) * 128)
    wide = -(-int(width) // 32) * 32 if query.element_size() == 2 else 0
    grouped = int(query.shape[1]) != int(key.shape[1])
    repeated = 2 * query.numel() // query.shape[2] * key.shape[2] if grouped else 0
    return int(4 * rows * (wide + 1) + query.element_size() * repeated)


def _efficient_backward(device: Device, args: Sequence[Any]) -> int:
    """The memory-efficient kernel adds up the gradient of the query in float32 and has a number a
    row; in float32 it takes as much as the output besides (H200, torch 2.11).
    """
    query, out = args[1], args[5]
    wide = out.numel() if query.dtype == torch.float32 else 0
    return int(4 * (query.numel() + query.numel() // query.shape[-1] + wide))


def _sum_of_columns(device: Device, args: Sequence[Any]) -> int:
    """torch adds up the columns of a matrix by so many blocks of threads that each multiprocessor
    has sixteen, and each block has partial sums of 128 columns by 128 threads.
    """
    x, dims = args[0], args[1] if len(args) > 1 else None
    if x.dim() < 2 or not dims or any(d % x.dim() == x.dim() - 1 for d in dims):
        return 0
    columns, rows = x.shape[-1], x.numel() // max(x.shape[-1], 1)
    groups, values = -(-columns // 128), -(-rows // 4)
    target = 16 * device.multiprocessors
    if values < 256 or groups > target:
        return 0
    blocks = max(min(-(-target // groups), -(-values // 16)), -(-values // 256))
    return 4 * 128 * columns * blocks if blocks > 1 else 0


_WORKSPACES = {
    _aten.sum: _sum_of_columns,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
    _aten._scaled_dot_product_flash_attention_backward: _flash_backward,
    _aten._scaled_dot_product_efficient_attention_backward: _efficient_backward,
}
