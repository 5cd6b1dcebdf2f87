"""Layers on the shards of a tensor: what tensor and sequence parallel make of a model.

Under `torch.distributed.tensor.parallel` a layer has DTensors as parameters and reads one. Our
layers then run on what lies on this rank, and packs are of that:

- **A Linear cut by columns** reads the whole input on every rank. Each rank packs an equal part of
  it, and the parts are gathered again in the backward pass, as packs: of n ranks each keeps an n-th
  of what one GPU would, and a quarter of a 16-bit input goes over the wires at 4 bits.
- **A Linear cut by rows**, and one that is whole, pack their part of the input.
- **Norms of rows and activations** pack the rows that they have, as in sequence parallel.

A layer of another kind, a mesh of several dimensions and code that is compiled are left to torch's
own layer, which keeps what torch keeps. Gradients of one process come back but for the rounding of
packs. Ranks that compute the same (a norm on all tokens, without sequence parallel) have to round
alike, or their replicas drift apart: seed all ranks of a group with one number.

Source of gathering in the backward pass what each rank keeps a part of: Korthikanti et al. 2022,
arXiv 2205.05198.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from packlight import sharing
from packlight._checks import is_sharded, needs_gradient
from packlight.pack import Grade, Pack, View, WeakPack
from packlight.quantiser import Quantiser, new_pack, worth_packing
from packlight.reading import reading_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_POINTWISE = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.LeakyReLU, nn.LogSigmoid, nn.Mish,
    nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softsign, nn.Tanh,
)  # fmt: skip

Forward = Callable[..., Tensor]


def run(forward: Forward, plain: Forward, layer: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What a layer gives for a DTensor: of `forward` on this rank's part, or of torch's own layer.

    `forward` and `plain` take the layer and its arguments, of which the input is the first.
    """
    x, *more = (*args, *kwargs.values())
    parameters = [p for p in layer._parameters.values() if p is not None]
    mesh = x.device_mesh
    fits = layer.training and mesh.ndim == 1 and not more and not torch.compiler.is_compiling()
    fits &= all(is_sharded(p) and p.device_mesh == mesh for p in parameters)
    if fits and isinstance(layer, nn.Linear):
        found = _linear(forward, layer, x)
    elif fits and not parameters and isinstance(layer, _POINTWISE):
        found = _by_rows(forward, layer, x, 0)
    elif fits and (
        isinstance(layer, nn.LayerNorm | nn.RMSNorm) or getattr(layer, "by_rows", False)
    ):
        found = _by_rows(forward, layer, x, layer.weight.dim() if parameters else x.dim())
    else:
        found = None
    return plain(layer, *args, **kwargs) if found is None else found


# ---- the layers ----------------------------------------------------------------------------------


def _by_rows(forward: Forward, layer: Any, x: "DTensor", width: int) -> Tensor | None:
    """Of a layer to which the last `width` dimensions are one row, and all others alike."""
    from torch.distributed.tensor import Partial

    placed: Any = x.placements[0]
    if placed.is_partial() or (placed.is_shard() and placed.dim % x.dim() >= x.dim() - width):
        return None
    if any(not p.placements[0].is_replicate() for p in layer._parameters.values() if p is not None):
        return None
    of_weights = Partial() if placed.is_shard() else placed
    with _local_parameters(layer, of_weights):
        y = forward(layer, x.to_local(grad_placements=(placed,)))
    return _from_local(y, x.device_mesh, placed, x.shape)


def _linear(forward: Forward, layer: nn.Linear, x: "DTensor") -> Tensor | None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, last = x.device_mesh, x.dim() - 1
    (cut,) = cast("Any", layer.weight).placements
    (placed,) = x.placements
    shape = (*x.shape[:-1], layer.weight.shape[0])
    bias: Any = layer.bias
    if bias is not None and bias.placements != ((cut,) if cut.is_shard(0) else (Replicate(),)):
        return None
    if cut.is_shard(0):  # columns of the result
        x = x if placed.is_replicate() else x.redistribute(placements=(Replicate(),))
        local = x.to_local(grad_placements=(Partial(),))
        _note_parts(layer, x, local)
        with _local_parameters(layer, cut):
            return _from_local(forward(layer, local), mesh, Shard(last), shape)
    if cut.is_shard(1):  # rows of the weight: a sum over ranks
        x = x if placed.is_shard(last) else x.redistribute(placements=(Shard(last),))
        with _local_parameters(layer, cut, shares=mesh.size()):
            y = forward(layer, x.to_local(grad_placements=(Shard(last),)))
        return _from_local(y, mesh, Partial(), shape)
    if not cut.is_replicate() or placed.is_partial() or placed.is_shard(last):
        return None
    with _local_parameters(layer, Partial() if placed.is_shard() else placed):
        y = forward(layer, x.to_local(grad_placements=(placed,)))
    return _from_local(y, mesh, placed, shape)


@contextlib.contextmanager
def _local_parameters(layer: Any, gradients: Any, shares: int | None = None) -> Iterator[None]:
    """The layer with this rank's part of its parameters, whose gradients are placed so.

    Of several shares of a sum over ranks each has one of the bias, which counts once.
    """
    from torch.distributed.tensor import Partial

    whole = dict(layer._parameters)
    for name, parameter in whole.items():
        if parameter is None:
            continue
        if name == "bias" and shares is not None:
            local = parameter.to_local(grad_placements=(Partial(),)) / shares
        else:
            local = parameter.to_local(grad_placements=(gradients,))
        layer._parameters[name] = local
    try:
        yield
    finally:
        layer._parameters.update(whole)


def _from_local(y: Tensor, mesh: "DeviceMesh", placed: Any, shape: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    shape = torch.Size(shape)
    stride = torch.empty(shape, device="meta").stride()
    kept = sharing.pack_of(y)
    made = DTensor.from_local(y, mesh, (placed,), run_check=False, shape=shape, stride=stride)
    node: Any = made.grad_fn
    if kept is not None and placed.is_shard() and node is not None:
        node.packlight_parts = (placed, WeakPack.of(kept))
    return made


# ---- parts of an input that all ranks have -------------------------------------------------------


def _note_parts(layer: Any, x: "DTensor", local: Tensor) -> None:
    """Has the layer find a pack of `local`, all of `x`, of which each rank keeps a part."""
    method, mesh = getattr(layer, "method", None), x.device_mesh
    if not isinstance(method, Quantiser) or not needs_gradient(layer.weight):
        return
    if sharing.pack_of(local, method.grade) is not None:
        return
    kept = _pack_of_parts(x, method.grade) or _pack_of_rows(local, method, mesh)
    if kept is not None:
        sharing.note_pack(local, kept)


def _pack_of_parts(x: "DTensor", asked: Grade) -> Pack | None:
    """From the packs of the parts that `x` was gathered of, which a layer on each rank noted."""
    made = x.grad_fn
    if made is None or made.name() != "RedistributeBackward":
        return None
    noted: Any = getattr(made.next_functions[0][0], "packlight_parts", None)
    if noted is None:
        return None
    placed, pack = noted[0], noted[1].pack()
    if pack is None or not pack.grade.serves(asked) or x.shape[placed.dim] % x.device_mesh.size():
        return None
    rebuild = _Gathered(pack.rebuild, placed.dim, pack.shape, x.device_mesh)
    return Pack(rebuild, tuple(x.shape), pack.tensors, pack.grade, reading_of(rebuild))


def _pack_of_rows(x: Tensor, method: Quantiser, mesh: "DeviceMesh") -> Pack | None:
    """A new pack of an equal part of the rows of `x`."""
    ranks, count = mesh.size(), x.shape[:-1].numel()
    if count % ranks or not x.is_contiguous():
        return None
    part = x.detach().view(ranks, count // ranks, x.shape[-1])[mesh.get_local_rank()]
    if not worth_packing(part, method):
        return None
    kept = new_pack(part, method)
    rebuild = _Gathered(kept.rebuild, 0, tuple(part.shape), mesh)
    whole = View(rebuild, tuple(x.shape), x.stride())
    return Pack(whole, tuple(x.shape), kept.tensors, kept.grade, reading_of(whole))


@dataclasses.dataclass
class _Gathered:
    """A tensor of which each rank keeps a pack of an equal part along one dimension."""

    rebuild: Callable[..., Tensor]
    dim: int
    part: tuple[int, ...]  # its shape
    mesh: "DeviceMesh"

    def __call__(self, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        of_all = [None if kept is None else self._gathered(kept) for kept in tensors]
        parts = [
            self.rebuild(dtype, *[None if kept is None else kept[rank] for kept in of_all])
            for rank in range(self.mesh.size())
        ]
        return torch.cat([part.reshape(self.part) for part in parts], self.dim)

    def _gathered(self, kept: Tensor) -> Tensor:
        found = kept.new_empty(self.mesh.size(), *kept.shape)
        group = self.mesh.get_group()
        _all_gather(found.view(-1), kept.reshape(-1), group=group)
        return found


def _all_gather(found: Tensor, part: Tensor, group: Any) -> None:
    """By the name that newer releases of torch have for it."""
    named = torch.distributed
    gather = getattr(named, "all_gather_single", None) or named.all_gather_into_tensor
    gather(found, part, group=group)
