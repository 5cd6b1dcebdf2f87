"""Who packed which tensor: a note about the tensor says what stands for it.

A layer that saves something from which its input or its output can be rebuilt writes a note about
that tensor. The next layer that needs the tensor finds the note and saves nothing of its own.
Notes are in a table beside the tensors, keyed by the identity of the tensor object: a note is in no
copy of the tensor and in no file, and it goes when the tensor goes.

- **Version and storage**: a note is valid for one version of the tensor and one storage. A tensor
  that was modified in place since has no valid note, and neither has a tensor that was given other
  memory (`x.data = ...`). A write that no version counter sees (through `x.data`, NumPy, or another
  library's kernel) is not seen here either.
- **Views**: a view of a whole tensor with all its elements in the order of their memory, such as a
  reshape or a transposition, shares the note of its base; any other view has no note.
- **Casts**: a copy in another dtype of as large a range (`note_copy`) has the elements of its
  source. While both are unchanged and the source is alive, packs are of the source and serve all
  its casts. A pack that the source had when the cast was made goes on serving the cast.
- **Grade**: a reader takes the pack that is there if the pack is as fine and as unbiased as the
  reader asks for. Otherwise the reader saves a pack of its own, which later readers find.
- **Lifetime**: a note refers to the pack weakly, and the graph holds the pack. So an input, an
  output or a feature map that a user holds keeps no pack alive once the backward pass has freed the
  graph. Where saved-tensor hooks take packs away (checkpointing, offloading), the note of an
  intermediate result holds the pack itself, until the backward pass goes through the result.
- **Saved-tensor hooks**: a note is valid under the hooks under which it was written. The two passes
  of a checkpoint must save alike. Where hooks around the checkpoint took its inputs away, the
  second pass gets other tensors, without the notes that the first pass saw.
- **Sketches** (`packlight.sketch`) are recorded apart from packs. A sketch does not give the tensor
  back, so it serves only the readers that ask for a sketch.
- **torch.compile**: a layer is one node of the tracer's graph (`_torch/nodes.py`), and writes and
  reads notes where what comes behind the tracer runs it. A note holds within the graph in which it
  was written, and in checkpoints within that; code that the tracer follows has none.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from packlight import _torch
from packlight._torch import HOOKS, STORAGES
from packlight.pack import Grade, Pack, View, WeakPack
from packlight.packing.layout import is_dense


class _Facts(NamedTuple):
    """What a note says about a tensor."""

    cast: Tensor | None = None
    pack: "Pack | WeakPack | HeldPack | None" = None
    sketch: Pack | WeakPack | None = None
    exact: Any = None  # weakly, an object of the operation that saves the tensor itself
    filled: bool = False  # some elements were filled with an infinity or a huge number
    source: "_Note | None" = None  # of what the tensor is a cast of

    def with_those_of(self, other: "_Facts", same_tensor: bool) -> "_Facts":
        """These facts, completed by those of `other`."""
        cast = other.cast if self.cast is None and same_tensor else self.cast
        pack = other.pack if self.pack is None else self.pack
        sketch = other.sketch if self.sketch is None else self.sketch
        source = other.source if self.source is None else self.source
        exact, filled = self.exact or other.exact, self.filled or other.filled
        return _Facts(cast, pack, sketch, exact, filled, source)


# How the tensor that carries a note is related to the tensor asked about: one object; one shape and
# strides; a whole view with rows of the same width in another number; any other whole view.
_Relation = Literal["itself", "alike", "rows", "view"]


# ---- writing and reading -------------------------------------------------------------------------


def note_cast(tensor: Tensor, cast: Tensor) -> None:
    """Records that `cast` is the result `tensor` in another dtype, with a gradient of its own."""
    _write(tensor, _Facts(cast=cast), holds=True)


def cast_of(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The result of `tensor` in `dtype`; None if no valid note has one."""
    relation, facts = _read(tensor)
    # A cast has a gradient of its own. A view may have passed a Function, a hook or `detach`.
    if relation != "itself" or facts.cast is None or facts.cast.dtype != dtype:
        return None
    # A hook on the tensor would not see a gradient that goes to the cast instead.
    if not _torch.is_traced() and tensor._backward_hooks:
        return None
    return facts.cast


# By dtype: a cast to one of a smaller number may overflow, and a pack of the source does not.
_RANGE = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 1, torch.float64: 2}


def note_copy(copy: Tensor, source: Tensor) -> None:
    """Records that `copy` has the elements of `source` in another dtype, in the same layout.

    A reader of `copy` then shares what stands for `source`. A wider dtype holds the same numbers;
    a narrower one rounds them by less than a step of 8 bits, so the grade of a pack stays. Nothing
    is recorded of a cast that may overflow, and of one that changed the layout.
    """
    if _RANGE.get(copy.dtype, -1) < _RANGE.get(source.dtype, len(_RANGE)) or copy is source:
        return
    source = source_of(source)
    if torch.compiler.is_dynamo_compiling():
        return
    alike = _are_equal((*copy.shape, *copy.stride()), (*source.shape, *source.stride()))
    if not (alike and copy.device == source.device and _may_be_noted(source)):
        return
    link = _Note(source, _NOTHING, _torch.saved_tensor_hooks())
    kept, sketch = pack_of(source), sketch_of(source)
    facts = _Facts(pack=kept, sketch=sketch, filled=is_filled(source), source=link)
    _write(copy, facts, holds=None)


def source_of(tensor: Tensor) -> Tensor:
    """What the tensor is a cast of, where both are unchanged since; else the tensor itself."""
    relation, facts = _read(tensor)
    source = _source(facts) if relation in ("itself", "alike") else None
    return tensor if source is None else source


def _source(facts: _Facts) -> Tensor | None:
    """What a tensor with these facts is a cast of, if it is unchanged and alive."""
    link = facts.source
    if link is None:
        return None
    found: Tensor | None = link.reference()
    return found if found is not None and link.holds(found) else None


def note_pack(tensor: Tensor, pack: Pack) -> None:
    """Records a layer's pack of a tensor; the layer made the tensor or reads it."""
    _write(tensor, _Facts(None, pack), holds=None)


def note_held(tensor: Tensor, pack: Pack) -> None:
    """Records a pack of a result: the note holds the pack, which no reader has saved yet.

    Until one has, nobody else would notice that a tensor of the pack is written to.
    """
    if all(kept is None or not kept.is_inference() for kept in pack.tensors):
        _write(tensor, _Facts(pack=HeldPack(pack, _versions(pack))), holds=True)


def note_kept(tensor: Tensor, pack: Pack) -> None:
    """Records a pack that the graph saves of a tensor, for as long as the graph lives."""
    _write(tensor, _Facts(pack=pack), holds=False)


def note_sketch(tensor: Tensor, sketch: Pack) -> None:
    """Records the sketch that a layer saves of a tensor that it reads.

    `sketch.rebuild` gives the weight gradient, not the tensor.
    """
    _write(tensor, _Facts(sketch=sketch), holds=None)


def note_exact(tensor: Tensor, holder: object) -> None:
    """Records that an operation saves the tensor exactly, for as long as the holder lives."""
    _write(tensor, _Facts(exact=weakref.ref(holder)), holds=False)


def is_kept_exactly(tensor: Tensor) -> bool:
    """Whether an operation saves this version of the tensor exactly."""
    exact = _read(tensor)[1].exact
    return exact is not None and exact() is not None


def note_filled(tensor: Tensor) -> None:
    """Records that elements of the tensor were filled with an infinity or a huge number."""
    _write(tensor, _Facts(filled=True), holds=False)


def is_filled(tensor: Tensor) -> bool:
    """Whether elements of the tensor were filled with an infinity or a huge number."""
    return _read(tensor)[1].filled


def pack_of(tensor: Tensor, asked: Grade | None = None) -> Pack | None:
    """The pack that is saved of `tensor` already; None if none is valid and of this grade."""
    relation, facts = _read(tensor)
    if facts is _NOTHING:
        return None
    pack = _alive(facts.pack)
    if pack is None or (asked is not None and not pack.grade.serves(asked)):
        source = _source(facts)
        pack = None if source is None else pack_of(source, asked)
        if pack is None:
            return None
    if relation in ("itself", "alike"):
        return pack
    shape = tuple(tensor.shape)
    view = View(pack.rebuild, shape, tensor.stride())
    return Pack(view, shape, pack.tensors, pack.grade)


def sketch_of(tensor: Tensor) -> Pack | None:
    """The sketch that is saved of `tensor` already; None if none is valid.

    A view shares the sketch of its base if both are contiguous and have rows of one width.
    """
    relation, facts = _read(tensor)
    if relation == "view":
        return None
    sketch = _alive(facts.sketch)
    source = _source(facts) if sketch is None else None
    return sketch if source is None else sketch_of(source)


class HeldPack(NamedTuple):
    """A pack that a note holds, and the versions that its tensors had."""

    pack: Pack
    versions: tuple[int, ...]


def _versions(pack: Pack) -> tuple[int, ...]:
    return tuple([kept._version for kept in pack.tensors if kept is not None])


def _alive(pack: Pack | WeakPack | HeldPack | None) -> Pack | None:
    if isinstance(pack, HeldPack):
        return pack.pack if _versions(pack.pack) == pack.versions else None
    return pack.pack() if isinstance(pack, WeakPack) else pack


def _weakly(pack: Pack | WeakPack | HeldPack | None) -> WeakPack | None:
    if isinstance(pack, HeldPack):
        pack = pack.pack
    return WeakPack.of(pack) if isinstance(pack, Pack) else pack


def _write(tensor: Tensor, facts: _Facts, holds: bool | None) -> None:
    """Adds facts to the note about this version of the tensor.

    With `holds` the note keeps the packs alive; otherwise something else does. With None it does
    where saved-tensor hooks take away what the graph saves of an intermediate result.
    """
    if torch.compiler.is_dynamo_compiling() or not _may_be_noted(tensor):
        return
    hooks = _torch.saved_tensor_hooks()
    if holds is None:
        holds = hooks is not None and tensor.grad_fn is not None
    if not holds:
        cast, pack, sketch, *rest = facts
        facts = _Facts(cast, _weakly(pack), _weakly(sketch), *rest)
    if id(tensor) in _notes or tensor._base is not None:
        relation, known = _read(tensor)
        if known is not _NOTHING and relation in ("itself", "alike"):
            facts = facts.with_those_of(known, relation == "itself")
    _notes[id(tensor)] = note = _Note(tensor, facts, hooks)
    if holds and hooks is not None and tensor.grad_fn is not None:
        note.drop_later(tensor)


def _read(tensor: Tensor) -> tuple[_Relation | None, _Facts]:
    """The facts about the tensor, or about one with the same elements, and how the two relate."""
    if torch.compiler.is_dynamo_compiling():
        return None, _NOTHING
    note = _notes.get(id(tensor))
    if note is not None and note.holds(tensor):
        return "itself", note.facts
    base = tensor._base
    note = None if base is None else _notes.get(id(base))
    if base is None or note is None or not note.holds(base):
        return None, _NOTHING
    relation = _relation(base, tensor)
    return relation, _NOTHING if relation is None else note.facts


_NOTHING = _Facts()


def _relation(base: Tensor, tensor: Tensor) -> _Relation | None:
    """How a view of `base` relates to `base`."""
    if not _is_whole_view(tensor, base):
        return None
    if _are_equal((*base.shape, *base.stride()), (*tensor.shape, *tensor.stride())):
        return "alike"
    same_rows = (
        base.dim() > 0
        and tensor.dim() > 0
        and _are_equal(base.shape[-1:], tensor.shape[-1:])
        and base.is_contiguous()
        and tensor.is_contiguous()
    )
    return "rows" if same_rows else "view"


def _is_whole_view(tensor: Tensor, base: Tensor) -> bool:
    """Whether a view of `base` has all elements of `base`, in the order of their memory."""
    return (
        base.dtype == tensor.dtype
        and _are_equal(
            (base.numel(), base.storage_offset()), (tensor.numel(), tensor.storage_offset())
        )
        and is_dense(base)
        and is_dense(tensor)
    )


# ---- the table of notes --------------------------------------------------------------------------


_notes: "dict[int, _Note]" = {}


class _Reference(weakref.ref):  # type: ignore[type-arg]  # which has no arguments at run time
    """A weak reference that takes the note away when the tensor goes."""

    __slots__ = ("key",)

    key: int


def _forget(reference: Any, notes: "dict[int, _Note]" = _notes) -> None:
    note = notes.get(reference.key)
    if note is not None and note.reference is reference:
        del notes[reference.key]


class _Note:
    """Facts about a tensor, and when they are valid."""

    __slots__ = ("__weakref__", "facts", "hooks", "reference", "scope", "storage", "version")

    def __init__(self, tensor: Tensor, facts: _Facts, hooks: Any) -> None:
        self.reference = _Reference(tensor, _forget)
        self.reference.key = id(tensor)
        self.version = tensor._version
        self.storage = _torch.storage_reference(tensor)
        self.hooks = None if hooks is None else _weak_hook(hooks[0])
        self.scope = _torch.scopes()[0]
        self.facts = facts

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is unchanged and the note was written under the present hooks."""
        if (
            self.reference() is not tensor
            or tensor._version != self.version
            or not _torch.has_storage(tensor, self.storage)
            or self.scope not in _torch.scopes()
        ):
            return False
        now = _torch.saved_tensor_hooks()
        if now is None or self.hooks is None:
            return now is self.hooks
        hook = self.hooks() if isinstance(self.hooks, weakref.ref) else self.hooks
        return hook is now[0]

    def drop_later(self, tensor: Tensor) -> None:
        """Has the backward pass clear the note when it goes through the tensor.

        No backward pass goes through what a checkpoint computes again within one: such a note is
        cleared at the end of that backward pass.
        """
        reference = weakref.ref(self)

        def drop(*_: Any) -> None:
            note = reference()
            if note is not None:
                note.facts = _NOTHING

        assert tensor.grad_fn is not None
        tensor.grad_fn.register_hook(drop)
        _torch.at_end_of_backward(drop)


def _may_be_noted(tensor: Tensor) -> bool:
    """Whether the validity of a note can be checked: an inference tensor has no version."""
    known = HOOKS.values is not None and STORAGES.values is not None
    return known and not tensor.is_inference()


def _weak_hook(hook: Callable[..., Any]) -> Any:
    """A pack hook, weakly: a note must not keep alive what the hook refers to."""
    try:
        return weakref.ref(hook)
    except TypeError:  # a built-in method, which refers to nothing
        return hook


# ---- sizes that may be symbols -------------------------------------------------------------------


def _are_equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists of sizes are equal.

    Symbols that are not known to be equal count as different, since a guess would be a guard on
    the sizes of the model's inputs.
    """
    if not _torch.is_traced():
        return tuple(a) == tuple(b)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(a) == len(b) and all(
        statically_known_true(p == q) for p, q in zip(a, b, strict=True)
    )
