"""Who packed which tensor: a note on the tensor itself says what stands for it.

A layer that keeps something from which its input or its output can be had again writes a note on
that tensor, and the next layer that needs the tensor finds it there and keeps nothing of its own.
The note is an attribute of the tensor object: identity decides, nothing is looked up by address or
by call order, and the note goes when the tensor goes.

- **Version**: a note holds for the version of the tensor that it was written for. A tensor modified
  in place since has no note.
- **Views**: a view of a whole tensor with all its elements in the order of their memory, such as a
  reshape or the transposition that undoes one, is understood; any other view has no note.
- **Lifetime**: the note on a tensor that a layer *read* refers to the pack weakly: an input of the
  model outlives the graph, and must not keep the graph's packs. Where saved-tensor hooks take the
  packs away (checkpointing, offloading), the note of an intermediate result holds them itself.
- **Saved-tensor hooks**: a note holds under the hooks under which it was written. The two passes of
  a checkpoint must keep alike, and where hooks around it took its inputs away, its second pass gets
  them as other tensors, without the notes that the first pass saw.
- **Sketches** (`packlight.sketch`) are noted apart from packs. The tensor cannot be had again from
  one, so it serves the readers that ask for a sketch, and no other.
- **torch.compile**: the tracer follows the attribute, so layers share within a compiled region.
  Versions and views are those of the tracer's example tensors. A tensor whose attributes it does
  not follow, an input of the region among them, is noted on an alias, which is nothing in the
  compiled code. A note from outside the region is no part of its graph, and is not read.
"""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from packlight import _tracer
from packlight.packing.layout import is_dense

_ATTRIBUTE = "_packlight_note"

# Tried with 2.11 and 2.13; the tracer of 2.8 refuses attributes of tensors. Where it does, compiled
# layers keep packs of their own.
_TRACER_FOLLOWS = torch.torch_version.TorchVersion(torch.__version__) >= "2.11"


@dataclasses.dataclass(frozen=True)
class Pack:
    """Tensors that are kept, and how the tensor of this shape that they stand for comes back.

    `rebuild(dtype, *tensors)` gives it, in its memory order.
    """

    rebuild: Callable[..., Tensor]
    shape: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class _View:
    """A view of what a pack stands for: all its elements, in the order of their memory."""

    rebuild: Callable[..., Tensor]
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __call__(self, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        return self.rebuild(dtype, *tensors).as_strided(self.shape, self.stride)


class _WeakPack(NamedTuple):
    """A `Pack` that does not keep its tensors alive."""

    rebuild: Callable[..., Tensor]
    shape: tuple[int, ...]
    references: tuple[TensorWeakRef, ...]

    def pack(self) -> Pack | None:
        tensors = tuple(tensor for ref in self.references if (tensor := ref()) is not None)
        gone = len(tensors) < len(self.references)
        return None if gone else Pack(self.rebuild, self.shape, tensors)


# Version, cast, pack, sketch and pack hook, weakly, for a note must not keep alive what the hook
# refers to. A plain tuple, which every version of torch.compile can hand out with a tensor
# that leaves the region.
_Note: TypeAlias = tuple[
    int,
    Tensor | None,
    Pack | _WeakPack | None,
    Pack | _WeakPack | None,
    "weakref.ref[Any] | None",
]


def note_cast(tensor: Tensor, cast: Tensor) -> None:
    """Notes on `tensor` that `cast` is the same result in another dtype, with its own gradient."""
    _write(tensor, cast=cast)


def cast_of(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The noted result of `tensor` in `dtype`, None where there is none that still holds."""
    owner, note = _read(tensor)
    cast = None if note is None else note[1]
    if cast is None or cast.dtype != dtype:
        return None
    # A cast has a gradient of its own: a view may have passed a Function, a hook or `detach`.
    if not _is_itself(owner, tensor):
        return None
    # A hook on the tensor would not see a gradient that goes to the cast instead.
    if not torch.compiler.is_compiling() and (owner._backward_hooks or tensor._backward_hooks):
        return None
    return cast


def note_output(tensor: Tensor, pack: Pack) -> None:
    """Notes on an output what its producer keeps, from which it can be had again."""
    _write(tensor, pack=pack)


def note_input(tensor: Tensor, pack: Pack) -> None:
    """Notes on a tensor that a layer read what that layer keeps of it."""
    _write(tensor, pack=pack if _holds_packs(tensor) else _weak(pack))


def note_kept(tensor: Tensor, pack: Pack) -> None:
    """Notes on a tensor what the graph keeps of it, for as long as the graph does."""
    _write(tensor, pack=_weak(pack))


def note_sketch(tensor: Tensor, sketch: Pack) -> None:
    """Notes on a tensor that a layer read the sketch that the layer keeps of it.

    `sketch.rebuild` gives the weight gradient, not the tensor.
    """
    _write(tensor, sketch=sketch if _holds_packs(tensor) else _weak(sketch))


def _holds_packs(tensor: Tensor) -> bool:
    """Whether the note on this tensor, which a layer read, holds the pack itself."""
    return torch.compiler.is_compiling() or (tensor.grad_fn is not None and _hooks_are_active())


def _weak(pack: Pack) -> _WeakPack:
    references = tuple(TensorWeakRef(kept) for kept in pack.tensors if kept is not None)
    return _WeakPack(pack.rebuild, pack.shape, references)


def _hooks_are_active() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _hooks() -> Any:
    """The pack hook that is active, None where there is none."""
    top: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if top is None else top[0]


def _holds(note: _Note, version: int, hooks: Any) -> bool:
    """Whether a note is on this version of its tensor, and was written under these hooks."""
    written_under = None if note[4] is None else note[4]()
    same_hooks = written_under is hooks and (hooks is not None or note[4] is None)
    return note[0] == version and same_hooks


def _alive(pack: Pack | _WeakPack | None) -> Pack | None:
    return pack.pack() if isinstance(pack, _WeakPack) else pack


def pack_of(tensor: Tensor) -> Pack | None:
    """What is kept of `tensor` already, None where nothing is that still holds."""
    owner, note = _read(tensor)
    pack = None if note is None else _alive(note[2])
    if pack is None or _laid_out_alike(owner, tensor):
        return pack
    shape = tuple(tensor.shape)
    return Pack(_View(pack.rebuild, shape, tensor.stride()), shape, pack.tensors)


def sketch_of(tensor: Tensor) -> Pack | None:
    """The sketch that is kept of `tensor` already, None where there is none that still holds.

    A view has the sketch of its base where both are contiguous and have rows of one width.
    """
    owner, note = _read(tensor)
    sketch = None if note is None else _alive(note[3])
    if sketch is None or _laid_out_alike(owner, tensor):
        return sketch
    rows_are_the_same = (
        tensor.is_contiguous()
        and owner.is_contiguous()
        and owner.dim() > 0
        and owner.shape[-1] == tensor.shape[-1]
    )
    return sketch if rows_are_the_same else None


def _write(
    tensor: Tensor,
    cast: Tensor | None = None,
    pack: Pack | _WeakPack | None = None,
    sketch: Pack | _WeakPack | None = None,
) -> None:
    """Adds a fact to what is noted on this version of the tensor."""
    traced = torch.compiler.is_compiling()
    if traced and not _TRACER_FOLLOWS:
        return
    owner, note = _read(tensor)
    if note is not None and _laid_out_alike(owner, tensor):
        cast = note[1] if cast is None and _is_itself(owner, tensor) else cast
        pack = note[2] if pack is None else pack
        sketch = note[3] if sketch is None else sketch
    if traced and not _tracer.takes_notes(tensor):
        tensor = tensor.detach()
    version = _tracer.version(tensor) if traced else tensor._version
    hooks = None if traced else _hooks()
    reference = None if hooks is None else weakref.ref(hooks)
    setattr(tensor, _ATTRIBUTE, (version, cast, pack, sketch, reference))


def _read(tensor: Tensor) -> tuple[Tensor, _Note | None]:
    """The note that holds for the tensor, and the tensor that carries it."""
    traced = torch.compiler.is_compiling()
    if traced and not _TRACER_FOLLOWS:
        return tensor, None
    owner = _traced_owner(tensor) if traced else _owner(tensor)
    note: _Note | None = None if owner is None else getattr(owner, _ATTRIBUTE, None)
    if owner is None or note is None:
        return tensor, None
    version = _tracer.version(owner) if traced else owner._version
    return owner, note if _holds(note, version, None if traced else _hooks()) else None


def _owner(tensor: Tensor) -> Tensor | None:
    """The tensor that a note on this one would be on: itself, or the base of a whole view."""
    if not hasattr(tensor, _ATTRIBUTE) and _is_whole_view(tensor, tensor._base):
        return tensor._base
    return tensor


def _is_itself(owner: Tensor, tensor: Tensor) -> bool:
    """Whether the note that was just read is on this tensor, not on one with the same memory."""
    if torch.compiler.is_compiling():
        itself: bool = _tracer.fact("itself")
        return itself
    return owner is tensor


def _laid_out_alike(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.stride() == b.stride())


def _is_whole_view(tensor: Tensor, base: Tensor | None) -> bool:
    """Whether a view of `base` has all of its elements, in the order of their memory."""
    return (
        base is not None
        and base.dtype == tensor.dtype
        and base.numel() == tensor.numel()
        and base.storage_offset() == tensor.storage_offset()
        and is_dense(base)
        and is_dense(tensor)
    )


# --- What the tracer of torch.compile knows.


def _find_owner(context: Any) -> None:
    """Puts what carries the note of the local `tensor` into the local `owner`.

    That is a tensor with the same memory and of the same version, laid out alike or a base of which
    the local one is a whole view; of several the last. What is not known of symbolic sizes counts
    as different, since a guess would be a guard on the sizes of the model's inputs.
    """
    variable = context.get_local("tensor")
    tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    fake, node = variable.as_fake(), variable.as_proxy().node
    _tracer.told["itself"] = False
    believed = variable._i_will_not_complain_if_bc_breaks_VariableTracker().stride
    if believed is not None and tuple(believed) != tuple(fake.stride()):
        return  # transposed in place, which the tracer has not noticed
    graphs: list[Any] = []
    graph = tracer.output.current_tracer
    while graph is not None:  # not those of the body of a checkpoint that ended
        graphs, graph = [*graphs, graph], graph.parent
    alike = viewed = None
    for tracker, attributes in tracer.output.side_effects.store_attr_mutations.items():
        if _ATTRIBUTE not in attributes or tracker.as_proxy().tracer not in graphs:
            continue
        noted = tracker.as_proxy().node.meta["example_value"]
        if not _same_elements(noted, fake):
            continue
        if _known_equal((*noted.shape, *noted.stride()), (*fake.shape, *fake.stride())):
            alike = tracker
        elif _is_whole_view(fake, noted):
            viewed = tracker
    found = viewed if alike is None else alike
    if found is not None:
        tracer.symbolic_locals["owner"] = found
        carrier = found.as_proxy().node
        # An alias is `detach` of the tensor that it was made for.
        is_alias = carrier.target == "detach" and carrier.args[0] is node
        _tracer.told["itself"] = carrier is node or is_alias


def _same_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two traced tensors have one memory, all of it known to be the same numbers."""
    try:
        same_storage = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    except NotImplementedError:  # a tensor of torch.func
        return False
    return (
        same_storage
        and a._version == b._version
        and a.dtype == b.dtype
        and a.is_neg() == b.is_neg()
        and a.is_conj() == b.is_conj()
        and _known_equal((a.storage_offset(), a.numel()), (b.storage_offset(), b.numel()))
    )


def _known_equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(a) == len(b) and all(
        statically_known_true(p == q) for p, q in zip(a, b, strict=True)
    )


def _traced_owner(tensor: Tensor) -> Tensor | None:
    """The tensor that carries a note on memory and elements of the traced one, if there is one."""
    from torch._dynamo.comptime import comptime  # an import of a second, so only here

    owner = None
    comptime(_find_owner)
    return owner
