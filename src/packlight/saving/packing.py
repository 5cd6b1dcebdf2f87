"""Packs of saved tensors, and notes on tensors of what is kept of them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import sharing
from packlight._seeds import operands
from packlight.groupquant import ops
from packlight.groupquant.method import GroupQuant
from packlight.groupquant.packs import Rebuild, draw
from packlight.packing.layout import dense_stride, memory_order
from packlight.saving.kept import Packed
from packlight.saving.tensors import repeats
from packlight.sharing import Pack


def pack(
    tensor: Tensor,
    method: GroupQuant,
    owner: Tensor | None = None,
    within: Callable[[Tensor], Tensor] | None = None,
    is_compiled: bool = False,
) -> Packed | None:
    """A pack of a tensor, shared with its owner where there is one; None for less than a group.

    Compiled code relies on the strides of what comes back, and may take a ReLU's side from it.
    `within` makes the tensor that is packed of the one that is shared by nobody.
    """
    shape = tuple(tensor.shape)
    # Repeated elements are packed once.
    repeated = repeats(tensor)
    if any(repeated):
        narrow = [1 if once else size for once, size in zip(repeated, shape, strict=True)]
        tensor, owner = tensor.as_strided(narrow, tensor.stride()), None
    if tensor.numel() < method.group_size:
        return None
    if within is not None:
        tensor, owner = within(tensor), None
    stride = dense_stride(tensor)
    found = None if owner is None else sharing.pack_of(owner, method.grade)
    if found is None:
        seed = operands(draw(tensor, method))
        codes, scales = ops.quantize(tensor, stride, method.bits, method.group_size, *seed)
        stands_for = tensor if owner is None else owner
        if is_compiled:
            codes = with_sides(codes, scales, memory_order(tensor, stride), method)
        layout = (tuple(stands_for.shape), dense_stride(stands_for), tensor.numel())
        rebuild = Rebuild(*layout, method.bits, method.group_size)
        found = Pack(rebuild, layout[0], (codes, scales), method.grade)
        if owner is not None:
            # Not `note_pack`: the holders keep the very tensors of the pack, hooks or no hooks.
            sharing.note_kept(owner, found)
    versions = tuple(-1 if kept is None else kept._version for kept in found.tensors)
    spread = tensor.stride() if is_compiled and tensor.stride() != stride else None
    return Packed(found, versions, shape, tuple(tensor.shape), stride, spread, tensor.dtype)


def with_sides(codes: Tensor, scales: Tensor, flat: Tensor, method: GroupQuant) -> Tensor:
    """The codes, with those of positive values above 0 and those of others not.

    Only codes next to 0 change, by less than a step. In a group whose least value is 0 zeros come
    back as that.
    """
    parts = 8 // method.bits
    last, shape = 2**method.bits - 1, (scales.numel(), parts, method.group_size // parts)
    low = (scales & -65536).view(torch.float32)
    step = (scales << 16).view(torch.float32)
    # Both have 8 significant bits, so that no rounding takes their ratio to a whole number.
    at_zero = (low / -step).floor().nan_to_num(0.0).view(-1, 1, 1)
    highest = at_zero.clamp(0, last).to(torch.uint8)
    least = (at_zero + 1).clamp(0, last).to(torch.uint8)
    positive, padding = flat > 0, scales.numel() * method.group_size - flat.numel()
    positive = (F.pad(positive, (0, padding)) if padding else positive).view(shape)

    numbers, shifts = codes.view(shape[0], 1, shape[2]), range(0, 8, method.bits)
    if parts > 1:
        numbers = torch.cat([(numbers >> shift) & last for shift in shifts], 1)
    numbers = torch.where(positive, numbers.maximum(least), numbers.minimum(highest))
    packed = numbers[:, 0]
    for part in range(1, parts):
        packed = packed | (numbers[:, part] << shifts[part])
    return packed.reshape(-1)
