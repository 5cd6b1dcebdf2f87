"""Packs of saved tensors, and notes about them on the tensors."""

from collections.abc import Callable

from torch import Tensor

from packlight import sharing
from packlight.pack import Pack
from packlight.packing.layout import dense_stride, memory_order
from packlight.quantiser import Quantiser, Restore
from packlight.saving.kept import Packed
from packlight.saving.tensors import repeats


def pack(
    tensor: Tensor,
    method: Quantiser,
    owner: Tensor | None = None,
    within: Callable[[Tensor], Tensor] | None = None,
    is_compiled: bool = False,
) -> Packed | None:
    """A pack of a tensor, shared with its owner if there is one; None for less than a group.

    Compiled code relies on the strides of the rebuilt tensor, and may take a ReLU's side from it.
    `within` transforms the tensor before it is packed; such a pack is not shared.
    """
    shape = tuple(tensor.shape)
    # Repeated elements are packed once.
    repeated = repeats(tensor)
    if any(repeated):
        narrow = [1 if once else size for once, size in zip(repeated, shape, strict=True)]
        tensor, owner = tensor.as_strided(narrow, tensor.stride()), None
    if is_compiled:
        method = method.for_pixels()  # of which sides are known
    if tensor.numel() < method.smallest:
        return None
    if within is not None:
        tensor, owner = within(tensor), None
    stride = dense_stride(tensor)
    found = None if owner is None else sharing.pack_of(owner, method.grade)
    if found is None:
        tensors = method.pack(tensor, method.seed(tensor))
        stands_for = tensor if owner is None else owner
        if is_compiled:
            tensors = method.with_sides(memory_order(tensor, stride), *tensors)
        layout = (tuple(stands_for.shape), dense_stride(stands_for))
        found = Pack(Restore(method, *layout), layout[0], tensors, method.grade)
        if owner is not None:
            # Not `note_pack`: with or without hooks the holders keep the tensors of the pack.
            sharing.note_kept(owner, found)
    versions = tuple(-1 if kept is None else kept._version for kept in found.tensors)
    spread = tensor.stride() if is_compiled and tensor.stride() != stride else None
    return Packed(found, versions, shape, tuple(tensor.shape), stride, spread, tensor.dtype)
