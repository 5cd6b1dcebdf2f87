"""Who packed which tensor: a note about the tensor says what stands for it.

A layer that keeps something from which its input or its output can be had again writes a note about
that tensor, and the next layer that needs the tensor finds the note and keeps nothing of its own.
Notes are in a table beside the tensors, by the identity of the tensor object: a note is in no copy
of the tensor and in no file, and it goes when the tensor goes.

- **Version and storage**: a note holds for the version of the tensor that it was written for, and
  for the storage that the tensor had. A tensor that was modified in place since has no note, nor
  has one that was given other memory (`x.data = ...`). A write that no version counter sees
  (through `x.data`, NumPy, or another library's kernel) is not seen here either.
- **Views**: a view of a whole tensor with all its elements in the order of their memory, such as a
  reshape or the transposition that undoes one, is understood; any other view has no note.
- **Grade**: a reader takes the pack that is there where it is as fine and as unbiased as what the
  reader asks for, and else keeps a pack of its own, which later readers find.
- **Lifetime**: a note refers to the pack weakly, and the graph holds it. So what a user holds, an
  input, an output or a feature map, holds no pack once the backward pass has freed the graph. Where
  saved-tensor hooks take packs away (checkpointing, offloading), the note of an intermediate result
  holds them itself, until the backward pass goes through the result.
- **Saved-tensor hooks**: a note holds under the hooks under which it was written. The two passes of
  a checkpoint must keep alike, and where hooks around it took its inputs away, its second pass gets
  them as other tensors, without the notes that the first pass saw.
- **Sketches** (`packlight.sketch`) are noted apart from packs. The tensor cannot be had again from
  one, so it serves the readers that ask for a sketch, and no other.
- **torch.compile**: the notes of a compiled region are a table that lives as long as its tracing,
  with versions and views of the tracer's example tensors. A note from outside the region is no part
  of its graph, and is not read.
"""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from packlight import _torch
from packlight._torch import HOOKS, STORAGES, question
from packlight._tracer import fake_of, graph_facts, node_of
from packlight.packing.layout import is_dense


class Grade(NamedTuple):
    """How near to a tensor its pack is: what a reader asks for and what a pack offers."""

    bits: int
    group_size: int
    unbiased: bool

    def serves(self, asked: "Grade") -> bool:
        """Whether a pack of this grade is what a reader asks for, or better."""
        finer = self.bits > asked.bits
        fine = finer or (self.bits == asked.bits and self.group_size <= asked.group_size)
        return fine and (self.unbiased or not asked.unbiased)

    def and_of(self, other: "Grade") -> "Grade":
        """The grade of what is computed of two packs."""
        return Grade(
            min(self.bits, other.bits),
            max(self.group_size, other.group_size),
            self.unbiased and other.unbiased,
        )


# The tensor itself to its rounding, or with an error that its method answers for.
EXACT = Grade(64, 1, True)


@dataclasses.dataclass(frozen=True)
class Pack:
    """Tensors that are kept, and how the tensor of this shape that they stand for comes back.

    `rebuild(dtype, *tensors)` gives it, in its memory order.
    """

    rebuild: Callable[..., Tensor]
    shape: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]
    grade: Grade = EXACT


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
    references: tuple[TensorWeakRef | None, ...]
    grade: Grade

    @staticmethod
    def of(pack: Pack) -> "_WeakPack":
        references = [None if kept is None else TensorWeakRef(kept) for kept in pack.tensors]
        return _WeakPack(pack.rebuild, pack.shape, tuple(references), pack.grade)

    def pack(self) -> Pack | None:
        tensors: list[Tensor | None] = []
        for reference in self.references:  # no generator: this runs at every reader
            tensor = None if reference is None else reference()
            if tensor is None and reference is not None:
                return None
            tensors.append(tensor)
        return Pack(self.rebuild, self.shape, tuple(tensors), self.grade)


class _Facts(NamedTuple):
    """What is noted about a tensor."""

    cast: Tensor | None = None
    pack: Pack | _WeakPack | None = None
    sketch: Pack | _WeakPack | None = None
    exact: Any = None  # weakly, what an operation holds that keeps the tensor itself
    filled: bool = False  # with an infinity or a number as huge, in places

    def with_those_of(self, other: "_Facts", same_tensor: bool) -> "_Facts":
        """These facts, and what else is known."""
        cast = other.cast if self.cast is None and same_tensor else self.cast
        pack = other.pack if self.pack is None else self.pack
        sketch = other.sketch if self.sketch is None else self.sketch
        return _Facts(cast, pack, sketch, self.exact or other.exact, self.filled or other.filled)


# How the tensor that carries a note and the one asked about are related: one object; laid out
# alike; a whole view with rows of the same width, in another number of them; any whole view.
_Relation = Literal["itself", "alike", "rows", "view"]


# ---- writing and reading -------------------------------------------------------------------------


def note_cast(tensor: Tensor, cast: Tensor) -> None:
    """Notes that `cast` is the same result as `tensor` in another dtype, with its own gradient."""
    _write(tensor, _Facts(cast=cast), holds=True)


def cast_of(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The noted result of `tensor` in `dtype`, None where there is none that still holds."""
    relation, facts = _read(tensor)
    # A cast has a gradient of its own: a view may have passed a Function, a hook or `detach`.
    if relation != "itself" or facts.cast is None or facts.cast.dtype != dtype:
        return None
    # A hook on the tensor would not see a gradient that goes to the cast instead.
    if not torch.compiler.is_compiling() and tensor._backward_hooks:
        return None
    return facts.cast


def note_pack(tensor: Tensor, pack: Pack) -> None:
    """Notes about a tensor what a layer keeps of it, the one that made it or one that reads it."""
    _write(tensor, _Facts(pack=pack), holds=_takes_packs_away(tensor))


def note_held(tensor: Tensor, pack: Pack) -> None:
    """Notes about a result what stands for it; nothing else keeps the pack until a reader does."""
    _write(tensor, _Facts(pack=pack), holds=True)


def note_kept(tensor: Tensor, pack: Pack) -> None:
    """Notes about a tensor what the graph keeps of it, for as long as the graph does."""
    _write(tensor, _Facts(pack=pack), holds=False)


def note_sketch(tensor: Tensor, sketch: Pack) -> None:
    """Notes about a tensor that a layer read the sketch that the layer keeps of it.

    `sketch.rebuild` gives the weight gradient, not the tensor.
    """
    _write(tensor, _Facts(sketch=sketch), holds=_takes_packs_away(tensor))


def note_exact(tensor: Tensor, holder: object) -> None:
    """Notes about a tensor that an operation keeps it exactly, for as long as the holder lives."""
    _write(tensor, _Facts(exact=weakref.ref(holder)), holds=False)


def is_kept_exactly(tensor: Tensor) -> bool:
    """Whether an operation keeps this version of the tensor exactly."""
    exact = _read(tensor)[1].exact
    return exact is not None and exact() is not None


def note_filled(tensor: Tensor) -> None:
    """Notes about a tensor that places of it were filled with an infinity or a number as huge."""
    _write(tensor, _Facts(filled=True), holds=False)


def is_filled(tensor: Tensor) -> bool:
    """Whether places of the tensor were filled so."""
    return _read(tensor)[1].filled


def pack_of(tensor: Tensor, asked: Grade | None = None) -> Pack | None:
    """What is kept of `tensor` already, None where nothing is that still holds and serves."""
    relation, facts = _read(tensor)
    pack = _alive(facts.pack)
    if pack is None or (asked is not None and not pack.grade.serves(asked)):
        return None
    if relation in ("itself", "alike"):
        return pack
    shape = tuple(tensor.shape)
    view = _View(pack.rebuild, shape, tensor.stride())
    return Pack(view, shape, pack.tensors, pack.grade)


def sketch_of(tensor: Tensor) -> Pack | None:
    """The sketch that is kept of `tensor` already, None where there is none that still holds.

    A view has the sketch of its base where both are contiguous and have rows of one width.
    """
    relation, facts = _read(tensor)
    return None if relation == "view" else _alive(facts.sketch)


def _alive(pack: Pack | _WeakPack | None) -> Pack | None:
    return pack.pack() if isinstance(pack, _WeakPack) else pack


def _weakly(pack: Pack | _WeakPack | None) -> _WeakPack | None:
    return _WeakPack.of(pack) if isinstance(pack, Pack) else pack


def _takes_packs_away(tensor: Tensor) -> bool:
    """Whether hooks take what the graph keeps of this intermediate result."""
    if torch.compiler.is_compiling():
        return True
    return tensor.grad_fn is not None and _torch.saved_tensor_hooks() is not None


def _write(tensor: Tensor, facts: _Facts, holds: bool) -> None:
    """Adds facts to what is noted about this version of the tensor.

    Where the note does not hold what it tells of, something else keeps it.
    """
    relation, known = _read(tensor)
    if torch.compiler.is_compiling():
        if relation in ("itself", "alike"):
            facts = facts.with_those_of(known, relation == "itself")
        _torch.ask("keep_note", None, tensor, facts)
        return
    if not holds:
        facts = facts._replace(pack=_weakly(facts.pack), sketch=_weakly(facts.sketch))
    if relation in ("itself", "alike"):
        facts = facts.with_those_of(known, relation == "itself")
    if _may_be_noted(tensor):
        _notes[id(tensor)] = note = _Note(tensor, facts)
        if holds and tensor.grad_fn is not None and _torch.saved_tensor_hooks() is not None:
            note.drop_later(tensor)


def _read(tensor: Tensor) -> tuple[_Relation | None, _Facts]:
    """What is noted about the tensor, or about one with the same elements, and how they relate."""
    if torch.compiler.is_compiling():
        traced: _Facts | None = _torch.ask("find_note", None, tensor)
        if traced is None:
            return None, _NOTHING
        return _torch.ask("find_relation", None, tensor), traced
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
    """How a view of `base` relates to it."""
    if not _is_whole_view(tensor, base):
        return None
    if base.shape == tensor.shape and base.stride() == tensor.stride():
        return "alike"
    same_rows = (
        base.dim() > 0
        and tensor.dim() > 0
        and base.shape[-1] == tensor.shape[-1]
        and base.is_contiguous()
        and tensor.is_contiguous()
    )
    return "rows" if same_rows else "view"


def _is_whole_view(tensor: Tensor, base: Tensor) -> bool:
    """Whether a view of `base` has all of its elements, in the order of their memory."""
    return (
        base.dtype == tensor.dtype
        and base.numel() == tensor.numel()
        and base.storage_offset() == tensor.storage_offset()
        and is_dense(base)
        and is_dense(tensor)
    )


# ---- the table of notes --------------------------------------------------------------------------


_notes: "dict[int, _Note]" = {}


class _Reference(weakref.ref):  # type: ignore[type-arg]  # which has no arguments at run time
    """A weak reference that takes the note away when the tensor goes."""

    __slots__ = ("key",)

    def __new__(cls, tensor: Tensor, key: int) -> "_Reference":
        return super().__new__(cls, tensor, _forget)

    def __init__(self, tensor: Tensor, key: int) -> None:
        self.key = key


def _forget(reference: Any, notes: "dict[int, _Note]" = _notes) -> None:
    note = notes.get(reference.key)
    if note is not None and note.reference is reference:
        del notes[reference.key]


class _Note:
    """What is noted about a tensor, and when that holds."""

    __slots__ = ("__weakref__", "facts", "hooks", "reference", "storage", "version")

    def __init__(self, tensor: Tensor, facts: _Facts) -> None:
        self.reference = _Reference(tensor, id(tensor))
        self.version = tensor._version
        self.storage = _torch.storage_reference(tensor)
        self.hooks = _hooks_now()
        self.facts = facts

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is about this tensor, as it was, and was written under the present hooks."""
        if (
            self.reference() is not tensor
            or tensor._version != self.version
            or not _torch.has_storage(tensor, self.storage)
        ):
            return False
        now = _torch.saved_tensor_hooks()
        if now is None or self.hooks is None:
            return now is None and self.hooks is None
        hook = self.hooks() if isinstance(self.hooks, weakref.ref) else self.hooks
        return hook is now[0]

    def drop_later(self, tensor: Tensor) -> None:
        """Has the backward pass take away what the note holds.

        That is when it goes through the tensor. None goes through what a checkpoint computes again
        in a backward pass, at whose end the note goes.
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
    """Whether notes can be told to hold: an inference tensor has no version to tell it by."""
    return bool(HOOKS and STORAGES) and not tensor.is_inference()


def _hooks_now() -> Any:
    """The pack hook that is active, weakly: a note must not keep alive what the hook refers to."""
    hooks = _torch.saved_tensor_hooks()
    if hooks is None:
        return None
    try:
        return weakref.ref(hooks[0])
    except TypeError:  # a built-in method, which refers to nothing
        return hooks[0]


# ---- notes of a region that is traced ------------------------------------------------------------

_NOTES = "_packlight_notes"


class _TracedNote(NamedTuple):
    """Facts, as the tracer's variable, about the tensor of a node."""

    node: Any
    facts: Any
    version: int
    graph: Any  # the tracer of the graph, of the region or of a body in it, that was traced then


@question
def keep_note(tracer: Any, tensor: Any, facts: Any) -> None:
    node = node_of(tensor)
    graph = tracer.output.current_tracer
    note = _TracedNote(node, facts, fake_of(tensor)._version, graph)
    graph_facts(tracer, _NOTES)[node, graph] = note


@question
def find_note(tracer: Any, tensor: Any) -> Any:
    found = _find_traced(tracer, tensor)
    return None if found is None else found[1].facts


@question
def find_relation(tracer: Any, tensor: Any) -> str | None:
    found = _find_traced(tracer, tensor)
    return None if found is None else found[0]


def _find_traced(tracer: Any, tensor: Any) -> tuple[_Relation, _TracedNote] | None:
    """The note about the traced tensor, or else about one with the same elements; the last one.

    What is not known of symbolic sizes counts as different, since a guess would be a guard on the
    sizes of the model's inputs.
    """
    fake, node = fake_of(tensor), node_of(tensor)
    believed = tensor.stride
    if believed is not None and tuple(believed) != tuple(fake.stride()):
        return None  # transposed in place, which the tracer has not noticed
    graphs: list[Any] = []
    graph = tracer.output.current_tracer
    while graph is not None:  # not those of the body of a checkpoint that ended
        graphs, graph = [*graphs, graph], graph.parent
    best: tuple[_Relation, _TracedNote] | None = None
    order: tuple[_Relation | None, ...] = ("itself", "alike", "rows", "view", None)
    for note in graph_facts(tracer, _NOTES).values():
        if note.graph not in graphs:
            continue
        noted = note.node.meta["example_value"]
        if noted._version != note.version or not _same_elements(noted, fake):
            continue
        relation = "itself" if note.node is node else _traced_relation(noted, fake)
        known = None if best is None else best[0]
        if relation is not None and order.index(relation) <= order.index(known):
            best = relation, note
    return best


def _traced_relation(noted: Tensor, fake: Tensor) -> _Relation | None:
    if _known_equal((*noted.shape, *noted.stride()), (*fake.shape, *fake.stride())):
        return "alike"
    return _relation(noted, fake)


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
