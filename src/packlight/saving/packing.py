"""Packs of saved tensors, and notes on tensors of what is kept of them."""

import weakref

from torch import Tensor

from packlight import sharing
from packlight.groupquant import ops
from packlight.groupquant.method import GroupQuant
from packlight.groupquant.packs import Rebuild, draw
from packlight.packing.layout import dense_stride
from packlight.saving.kept import Exact, Packed
from packlight.saving.tensors import repeats
from packlight.sharing import Pack

_EXACT = "_packlight_exact"


def note_exact(owner: Tensor, exact: Exact) -> None:
    """Notes on a tensor that an operation keeps it exactly: others do so at no cost."""
    setattr(owner, _EXACT, weakref.ref(exact))


def is_kept_exactly(owner: Tensor) -> bool:
    """Whether an operation keeps this version of the tensor exactly."""
    note: weakref.ref[Exact] | None = getattr(owner, _EXACT, None)
    exact = note() if note is not None else None
    return exact is not None and exact.version == owner._version


def pack(
    tensor: Tensor, method: GroupQuant, owner: Tensor | None, same_strides: bool = False
) -> Packed | None:
    """A pack of a tensor, shared with its owner where there is one; None for less than a group.

    Compiled code relies on the strides of what comes back.
    """
    shape = tuple(tensor.shape)
    # Repeated elements are packed once.
    repeated = repeats(tensor)
    if any(repeated):
        narrow = [1 if once else size for once, size in zip(repeated, shape, strict=True)]
        tensor, owner = tensor.as_strided(narrow, tensor.stride()), None
    if tensor.numel() < method.group_size:
        return None
    stride = dense_stride(tensor)
    found = None if owner is None else sharing.pack_of(owner)
    # A pack without bits of its own is a layer's, which knows what it needs.
    if found is None or getattr(found.rebuild, "bits", method.bits) < method.bits:
        codes, scales = ops.quantize(
            tensor, stride, method.bits, method.group_size, draw(tensor, method)
        )
        stands_for = tensor if owner is None else owner
        layout = (tuple(stands_for.shape), dense_stride(stands_for), tensor.numel())
        rebuild = Rebuild(*layout, method.bits, method.group_size)
        found = Pack(rebuild, layout[0], (codes, scales))
        if owner is not None:
            # Not `note_input`: the holders keep the very tensors of the pack, hooks or no hooks.
            sharing.note_kept(owner, found)
    versions = tuple(-1 if kept is None else kept._version for kept in found.tensors)
    spread = tensor.stride() if same_strides and tensor.stride() != stride else None
    return Packed(found, versions, shape, tuple(tensor.shape), stride, spread, tensor.dtype)
