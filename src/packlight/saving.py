"""`saving`: packs what any operation of any model keeps for its backward pass.

A pair of saved-tensor hooks: where autograd saves a tensor it gets a `_Holder`, and the backward
pass gets back what the holder stands for. Nothing of the model changes, and no forward value.

**How a hook knows its operation.** Torch calls the pack hook in the middle of an operation and says
nothing of it: the inputs come before the kernel runs, the node of the graph is not reachable yet,
and only an output that is saved leads to it. So packing waits a moment. The hook notes the sequence
number of the newest node and holds the tensor; a `TorchFunctionMode` sees each call of a torch
function return, walks the graph behind the result down to the nodes that the call made, and packs
what each of them saved by the rule for its name. What is held meanwhile is what that one call keeps
anyway. This gives true node names, as `packlight.profile` reports them, whichever kernel torch has
chosen, with no table of functions to names. The alternatives: a `TorchDispatchMode` sees operators,
not nodes, costs more a call, and cannot be active around `torch.compile`; to wait until the context
ends would keep everything until then. A Python `autograd.Function` is known by the frame that calls
its `apply`, and packed when the next call begins.

**What a tensor is packed as.** Once for all operations: the pack is noted on the tensor
(`sharing.py`, weakly: it lives as long as a graph or layer that holds it), and the next operation
or packlight layer that keeps the tensor finds it there. A view that is a whole dense tensor in
another shape or order stands for that tensor, and so does the copy that autocast makes of an
argument; any other view is packed by itself.
"""

import contextlib
import dataclasses
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from packlight import _tracer, sharing
from packlight._seeds import follow_generator, operands
from packlight.errors import DoubleBackwardError, InputError
from packlight.groupquant import ops
from packlight.groupquant.method import GroupQuant
from packlight.groupquant.packs import Rebuild, draw
from packlight.packing.layout import dense_stride, is_dense, memory_order
from packlight.packing.ops import pack_mask, unpack_mask
from packlight.sharing import Pack

__all__ = ["saving"]

_CHECKPOINT = "checkpoint"  # what the inputs of checkpoints are called, in place of a node

# What stays exact: a softmax is small where it errs most, and a loss is where the gradient begins.
# The functions are for losses that torch composes of elementary operations.
_EXACT = (
    "*Softmax*",
    "softmax",
    "*Logsumexp*",
    "*Loss*",
    "*CrossEntropy*",
    "*_loss",
    "*cross_entropy*",
    "kl_div",
    # A checkpoint's inputs: its recomputation must see what the forward pass saw.
    _CHECKPOINT,
)

# Scores are exponentials of products of two packed tensors: 8 bits, whatever the method.
_ATTENTION = (
    "ScaledDotProduct*",
    "scaled_dot_product_attention",  # its composition of matmuls, on the "math" backend
    "*FlashAttention*",
    "*EfficientAttention*",
    "FlashAttn*",
    "FlexAttention*",
)

# A compiled region shows neither its operations nor what it makes of its weights.
_COMPILED = "CompiledFunctionBackward"

# A `Function` keeps tensors whose part in it nobody says. One that has this many times fewer
# elements than another beside it is a statistic (a norm's, attention's logsumexp) and stays exact;
# the other may be the codes that a layer of ours keeps in a compiled region.
_STATISTIC = 16

_FLOATING = (torch.float32, torch.bfloat16, torch.float16)

_Rule = tuple[str, GroupQuant | None]


@contextlib.contextmanager
def saving(
    method: GroupQuant,
    *,
    min_bytes: int = 4096,
    skip: Callable[[Tensor], bool] | None = None,
    overrides: Mapping[str, GroupQuant | None] | None = None,
) -> Iterator[None]:
    """Within this context, forward passes keep packs for their backward passes, of any operation.

    Every floating tensor of 32 or 16 bits that an operation keeps is packed as `method` says, once
    however many operations keep it, at `bits + 32 / group_size` bits an element; masks take one
    bit an element. Backward passes may run inside or outside the context. Forward values are
    those of torch. Gradients are approximate: each tensor x that an operation kept is x~ in its
    backward, with |x~ - x| below one step of its group, and E[x~] = x with stochastic rounding. So
    an operation whose gradient is linear in what it kept (a matmul, a convolution) passes on an
    unbiased one, and one whose gradient is not (an activation, a norm) a biased one.

    Kept exactly:

    - leaves that require gradients (parameters), frozen `nn.Parameter`s, and views and casts of
      such. A weight that is computed (weight norm, a merged adapter) is an activation here;
    - what has no gradient history where a torch operation keeps it: data, buffers, masks with
      infinities, frozen weights under autocast, statistics of norms and attention (and the floating
      mask that dropout makes on the CPU). Somebody holds most of these anyway. A Python
      `autograd.Function` makes what it keeps without history, so there only tensors of at most
      1/16 of the elements of its largest, bytes included (codes of packlight layers), are taken
      for statistics, and kept exactly;
    - float64, complex, integer, sparse and nested tensors, tensor subclasses;
    - all that a packlight layer keeps: packed already, or exact for a reason;
    - softmax, logsumexp and losses, inputs of checkpoints, and tensors below `min_bytes`.

    The queries, keys, values and output of attention are packed at 8 bits.

    Args:
        method: how tensors are packed.
        min_bytes: smaller tensors are kept as they are.
        skip: called with a tensor that would be packed; True keeps it exactly.
        overrides: methods, or None for exact, by patterns (as in `fnmatch`) of operations. An
            operation is named as `packlight.profile` reports it, "GeluBackward0", or by the torch
            function called, "gelu"; "checkpoint" is the inputs of checkpoints, always rounded to
            nearest. The first pattern that matches counts, before the defaults above:
            `{"*Softmax*": GroupQuant(bits=8)}`.

    A tensor that is modified in place after it was saved: where torch would raise, a pack still
    gives the gradient of the value at save time. What is kept exactly raises as torch does.

    `create_graph=True` raises `DoubleBackwardError`: packs are not differentiable. Of nested
    contexts, and of other saved-tensor hooks, the innermost wins; inside a checkpointed block that
    is the checkpoint, which keeps nothing there. `torch.func` transforms refuse any hooks.

    Functions compiled by `torch.compile` may be called within the context: the tensors that cross
    to their backward are packed as they leave the forward, as those of a Function, at 8 bits unless
    `overrides={"CompiledFunctionBackward": ...}` says otherwise, since softmax and attention cannot
    be told apart there. Buffers and data are packed too, and a floating mask with infinities that
    crosses makes gradients NaN: pass a bool mask. The context cannot be entered inside a compiled
    function: that raises `InputError`.

    Masks: bool everywhere; uint8 that holds only 0 and 1 on the CPU, since the look at the values
    would make a GPU wait.
    """
    _check(method, min_bytes, skip, overrides)
    rules = _rules(method, overrides or {})
    saver = _Saver(min_bytes, skip, rules)
    follow_generator()
    with saved_tensors_hooks(_untraced(saver.pack), _untraced(_unpack)), _Calls(saver):
        try:
            yield
        finally:
            saver.settle()


def _check(method: object, min_bytes: object, skip: object, overrides: object) -> None:
    if _is_compiled():
        raise InputError(
            "saving(...) was entered inside a function that torch.compile compiles; enter it"
            " outside, around the call of the compiled function"
        )
    if not isinstance(method, GroupQuant):
        raise InputError(f"method={method!r} is not a GroupQuant; try GroupQuant(bits=4)")
    if not isinstance(min_bytes, int) or isinstance(min_bytes, bool) or min_bytes < 0:
        raise InputError(f"min_bytes={min_bytes!r} is not a number of bytes, 0 or more")
    if skip is not None and not callable(skip):
        raise InputError(f"skip={skip!r} cannot be called; pass a function of a tensor, or None")
    if overrides is None:
        return
    if not isinstance(overrides, Mapping):
        raise InputError(f"overrides={overrides!r} is not a mapping of patterns to methods")
    for pattern, value in overrides.items():
        if not isinstance(pattern, str):
            raise InputError(f"overrides: {pattern!r} is not a string; name an autograd node")
        if value is not None and not isinstance(value, GroupQuant):
            raise InputError(
                f"overrides[{pattern!r}]={value!r} is neither a GroupQuant nor None (exact)"
            )


def _rules(method: GroupQuant, overrides: Mapping[str, GroupQuant | None]) -> tuple[_Rule, ...]:
    fine = dataclasses.replace(method, bits=8)
    return (
        *overrides.items(),
        *((pattern, None) for pattern in _EXACT),
        *((pattern, fine) for pattern in _ATTENTION),
        (_COMPILED, fine),
        ("*", method),
    )


# ---- torch.compile -------------------------------------------------------------------------------

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _is_compiled() -> bool:
    """Whether a region is traced, or runs between two graphs where tracing gave up."""
    if torch.compiler.is_compiling():
        return True
    if "torch._dynamo" not in sys.modules:
        return False
    callback = torch._C._dynamo.eval_frame.get_eval_frame_callback()
    return callback is not None and callback is not False


def _untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, out of reach of `torch.compile`, which would else compile it where it runs."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet, and the import takes a second
        return function
    untraced: Callable[_P, _T] = torch.compiler.disable(function)
    return untraced


def _run_as_written(code: types.CodeType) -> None:
    """Has `torch.compile` leave the frames of the function alone, but not what it calls.

    Where tracing gives up, frames that run in between are compiled one by one.
    """
    if "torch._dynamo" in sys.modules:
        from torch._dynamo.decorators import skip_code  # type: ignore[attr-defined]

        skip_code(code)


# ---- what is kept --------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True, weakref_slot=True, eq=False)
class _Exact:
    """The tensor itself, off the graph, and its version when it was saved."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        _check_version(self.tensor, self.version)
        return self.tensor


@dataclasses.dataclass(slots=True, eq=False)
class _Packed:
    """A pack, which may be shared, and the tensor that it stands for here.

    The versions are those of the pack's tensors: a layer's pack may hold a weight.
    """

    pack: Pack
    versions: tuple[int, ...]
    shape: tuple[int, ...]
    narrow: tuple[int, ...]  # the shape without repetition of elements
    stride: tuple[int, ...]  # dense, of that shape
    spread: tuple[int, ...] | None  # strides with gaps, where they are to come back
    dtype: torch.dtype

    def unpack(self) -> Tensor:
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                "packlight.saving packed a tensor that this second derivative needs; run this"
                " forward pass outside of it, or drop create_graph=True"
            )
        for tensor, version in zip(self.pack.tensors, self.versions, strict=True):
            if tensor is not None:
                _check_version(tensor, version)
        x = self.pack.rebuild(self.dtype, *self.pack.tensors)
        x = memory_order(x, dense_stride(x)).as_strided(self.narrow, self.stride)
        if self.spread is not None:
            x = x.new_empty_strided(self.narrow, self.spread).copy_(x)
        return x.expand(self.shape)


@dataclasses.dataclass(slots=True, eq=False)
class _Mask:
    """One bit an element."""

    bits: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def unpack(self) -> Tensor:
        mask: Tensor = unpack_mask(self.bits, self.shape, self.stride)
        return mask if self.dtype == torch.bool else mask.view(self.dtype)


@dataclasses.dataclass(slots=True, weakref_slot=True, eq=False)
class _Holder:
    """What autograd holds in place of a saved tensor."""

    kept: _Exact | _Packed | _Mask


def _unpack(holder: _Holder) -> Tensor:
    return holder.kept.unpack()


def _check_version(tensor: Tensor, version: int) -> None:
    """Torch checks no versions where there are hooks, so this is its check, in its words."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace"
            f" operation: [{tensor.type()} {list(tensor.shape)}] is at version {tensor._version};"
            f" expected version {version} instead"
        )


# ---- which operation saves -----------------------------------------------------------------------


class _Call(NamedTuple):
    """A call of a torch function that is running."""

    name: str
    arguments: tuple[Any, ...]
    start: int  # the first sequence number of the nodes that it makes


class _Pending(NamedTuple):
    """A tensor that is held until it is known which operation keeps it."""

    holder: _Holder
    exact: _Exact
    owner: Tensor
    is_cast: bool  # the owner is of another dtype
    sequence: int
    node: str  # the node's name, empty where it is not known yet
    caller: "_PythonCaller"


# What runs a backward pass: nodes that Python code makes in it are not the call's own.
_BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)


class _Calls(TorchFunctionMode):
    """Tells the saver which torch function runs."""

    def __init__(self, saver: "_Saver") -> None:
        super().__init__()
        self.saver = saver
        _run_as_written(_Calls.__torch_function__.__code__)
        _run_as_written(_Saver.call.__code__)

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # operations of a compiled region are not seen one by one
            return _tracer.traceable(func)(*args, **kwargs)
        return self.saver.call(func, args, kwargs)


class _Saver:
    """Packs what is saved in one context."""

    def __init__(
        self, min_bytes: int, skip: Callable[[Tensor], bool] | None, rules: tuple[_Rule, ...]
    ) -> None:
        self.min_bytes = min_bytes
        self.skip = skip
        self.rules = rules
        self.known: dict[tuple[str, str], GroupQuant | None] = {}
        self.running: _Call | None = None
        self.pending: list[_Pending] = []
        # Of the last Function that saved bytes: the most of them, by its sequence number.
        self.codes: dict[int, int] = {}
        # Sequence numbers are counted a thread, and backward passes on other threads use the hooks.
        self.thread = threading.get_ident()
        self.settle = _untraced(self._settle)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a torch function, and packs what it saved."""
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute; another hook may read one between two of our own
            return func(*args, **kwargs)
        if self.pending:
            # A checkpoint may have begun since; those of other packages run without gradients.
            begun = not torch.is_grad_enabled() or _in_checkpoint(sys._getframe(1))
            self.settle(draws=not begun)
        if func in _BACKWARD or threading.get_ident() != self.thread:
            return func(*args, **kwargs)
        before = self.running
        arguments = (*args, *kwargs.values())
        self.running = _Call(name, arguments, _sequence())
        result = None
        try:
            result = func(*args, **kwargs)
        finally:
            if self.pending:
                self.settle(result)
            self.running = before
        return result

    def pack(self, tensor: Tensor) -> _Holder:
        """The pack hook."""
        # Our own operations are not calls of the user's, and are not differentiated.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return self._pack(tensor, sys._getframe(1))

    def _pack(self, tensor: Tensor, frame: types.FrameType) -> _Holder:
        sequence = _sequence() - 1  # before anything below makes torch renew the node of a view
        # Off the graph, since an operation's own output would hold the node that holds it.
        exact = _Exact(tensor.detach() if tensor.requires_grad else tensor, tensor._version)
        holder = _Holder(exact)
        if not self._is_large(tensor):
            return holder
        caller = _python_caller(frame)
        if not self._may_pack(tensor, caller):
            if tensor.dtype == torch.uint8:
                self.codes = {sequence: max(self.codes.get(sequence, 0), tensor.numel())}
            return holder
        if tensor.dtype in (torch.bool, torch.uint8):
            stride = dense_stride(tensor)
            bits = pack_mask(tensor.view(torch.uint8), stride)
            holder.kept = _Mask(bits, tuple(tensor.shape), stride, tensor.dtype)
            return holder

        owner, is_cast = _owner(tensor, self.running)
        node = caller.node
        produced = tensor.grad_fn
        if not node and produced is not None and produced._sequence_nr() == sequence:
            node = produced.name()  # the operation's own output
        elsewhere = threading.get_ident() != self.thread
        entry = _Pending(holder, exact, owner, is_cast, sequence, node, caller)
        if caller.node == _CHECKPOINT:
            # All before its first pass begins. A note written in there would hold in there, where
            # the second pass, which gets what was unpacked, has none; and it has noted the state of
            # the generator already, so after a draw its two passes would see two dropout masks.
            self._settle(draws=False)
            self._decide([entry], "", {}, draws=False)
            return holder
        if self.running is None and self.pending and self.pending[-1].sequence != sequence:
            self.settle()
        if elsewhere:
            self._decide([entry], "", {})
        else:
            self.pending.append(entry)
        return holder

    def _is_large(self, tensor: Tensor) -> bool:
        """Whether it is a plain dense tensor that is worth a look."""
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_nested:
            return False
        return tensor.numel() > 0 and tensor.numel() * tensor.element_size() >= self.min_bytes

    def _may_pack(self, tensor: Tensor, caller: "_PythonCaller") -> bool:
        if tensor.dtype == torch.uint8:
            # A Function's bytes are codes. To look at the values would make a GPU wait.
            if caller.function is not None or tensor.device.type != "cpu" or tensor.max() > 1:
                return False
        elif tensor.dtype in _FLOATING:
            if _is_weight(tensor):
                return False
            if caller.function is None:
                if not tensor.requires_grad:
                    return False
            elif not tensor.requires_grad and _comes_from_weight(tensor, caller.arguments):
                return False
        elif tensor.dtype != torch.bool:
            return False
        return self.skip is None or not self.skip(tensor)

    def _settle(self, result: object = None, draws: bool = True) -> None:
        """`settle`: packs what is pending; `result` is what the call that saved it returned.

        Without draws, all is rounded to nearest.
        """
        if not self.pending or threading.get_ident() != self.thread:
            return  # what another thread calls says nothing of this one's operations
        pending, self.pending = self.pending, []
        call = self.running
        with torch._C.DisableTorchFunction(), torch.no_grad():
            nodes: dict[int, str] = {}
            unknown = {entry.sequence for entry in pending if not entry.node}
            if call is not None:
                for roots in ((result,), call.arguments):  # an in-place function returns nothing
                    if unknown - nodes.keys():
                        nodes |= _nodes_behind(roots, call.start, pending[-1].sequence)
            # An output that is saved tells for the inputs, outside of calls too.
            nodes |= {entry.sequence: entry.node for entry in pending if entry.node}
            self._decide(pending, call.name if call is not None else "", nodes, draws)

    def _decide(
        self, pending: list[_Pending], function: str, nodes: dict[int, str], draws: bool = True
    ) -> None:
        largest = max(entry.exact.tensor.numel() for entry in pending)
        for entry in pending:
            node = entry.node or nodes.get(entry.sequence, "")
            method = self._method(node, function)
            tensor = entry.exact.tensor
            if entry.caller.is_ours:
                method = None
            beside = max(largest, self.codes.get(entry.sequence, 0))
            if entry.caller.function is not None and tensor.numel() * _STATISTIC <= beside:
                method = None
            # A tensor that the operation itself has overwritten since cannot be packed any more.
            if method is not None and tensor._version == entry.exact.version:
                if not draws:
                    method = dataclasses.replace(method, rounding="nearest")
                _keep_pack(entry, method, node == _COMPILED)
            else:
                _note_exact(entry)

    def _method(self, node: str, function: str) -> GroupQuant | None:
        if (node, function) not in self.known:
            self.known[node, function] = next(
                method
                for pattern, method in self.rules
                if fnmatchcase(node, pattern) or fnmatchcase(function, pattern)
            )
        return self.known[node, function]


def _sequence() -> int:
    """The number that the next graph node of this thread gets."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def _nodes_behind(roots: Iterable[object], start: int, last: int) -> dict[int, str]:
    """Names of the graph nodes from number `start` to `last`, by number."""
    pending = [tensor.grad_fn for tensor in _tensors(roots)]
    names: dict[int, str] = {}
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        number = node._sequence_nr()
        if number < start or node.name() == "torch::autograd::AccumulateGrad":
            continue
        if number <= last:
            names[number] = node.name()
        pending.extend(next_node for next_node, _ in node.next_functions)
    return names


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class _PythonCaller(NamedTuple):
    """What the Python frame that saves tells of the operation."""

    node: str = ""
    function: type | None = None  # the `autograd.Function`
    arguments: tuple[Any, ...] = ()

    @property
    def is_ours(self) -> bool:
        return self.function is not None and self.function.__module__.startswith("packlight.")


_APPLY = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)
_CHECKPOINTS = torch.utils.checkpoint.__name__

# Modules whose frames stand between the hook and the operation: a profile calls the hook around it.
_BETWEEN = ("packlight.profile", "packlight.saving", "torch._dynamo.eval_frame")


def _python_caller(frame: types.FrameType | None) -> _PythonCaller:
    while frame is not None and frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    if frame is None:
        return _PythonCaller()
    if frame.f_globals.get("__name__") == _CHECKPOINTS:
        return _PythonCaller(_CHECKPOINT)
    if frame.f_code is not _APPLY:
        return _PythonCaller()
    function = frame.f_locals["cls"]
    if function.__module__ == _CHECKPOINTS:
        return _PythonCaller(_CHECKPOINT)
    return _PythonCaller(f"{function.__name__}Backward", function, frame.f_locals["args"])


def _in_checkpoint(frame: types.FrameType | None) -> bool:
    """Whether a pass of one of torch's checkpoints runs, both of which must draw alike."""
    while frame is not None:
        if frame.f_globals.get("__name__") == _CHECKPOINTS:
            return True
        frame = frame.f_back
    return False


# ---- which tensors -------------------------------------------------------------------------------

# What makes a view or a copy of one tensor.
_SAME_VALUES = {
    f"{name}Backward{index}"
    for name in (
        "Alias", "AsStrided", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice",
        "Split", "Squeeze", "SplitWithSizes", "T", "ToCopy", "Transpose", "Unbind", "UnsafeView",
        "Unsqueeze", "View",
    )
    for index in range(3)
}  # fmt: skip


def _is_weight(tensor: Tensor) -> bool:
    """Whether it is a leaf that requires gradients, a frozen parameter, or a view or copy of it."""
    for candidate in (tensor, tensor._base):
        if isinstance(candidate, nn.Parameter):
            return True
        if candidate is not None and candidate.is_leaf and candidate.requires_grad:
            return True
    node = tensor.grad_fn
    while node is not None and node.name() in _SAME_VALUES and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    # An expanded and copied parameter is an activation.
    leaf = getattr(node, "variable", None)
    return leaf is not None and leaf.numel() >= tensor.numel()


def _comes_from_weight(tensor: Tensor, arguments: tuple[Any, ...]) -> bool:
    """Whether a Function made the tensor of one of its weights, as far as can be told.

    A view is told by the storage, which both hold now. A compiled region's cast of a weight is
    guessed by shape and dtype; a wrong guess costs memory, not accuracy.
    """
    storage = tensor.untyped_storage()._cdata
    for argument in arguments:
        if isinstance(argument, nn.Parameter):
            if argument.untyped_storage()._cdata == storage:
                return True
            if argument.dtype != tensor.dtype and sorted(argument.shape) == sorted(tensor.shape):
                return True
    return False


def _owner(tensor: Tensor, call: _Call | None) -> tuple[Tensor, bool]:
    """The tensor that all uses of these elements have in common, and whether this one is a cast.

    That is the base of a whole dense view, and the argument that autocast copied. Their elements
    lie in the same order in memory.
    """
    owner = _whole(tensor)
    node = owner.grad_fn
    if call is None or node is None or node.name() != "ToCopyBackward0":
        return owner, False
    source, output = node.next_functions[0]
    for argument in _tensors(call.arguments):
        if argument.grad_fn is source and argument.output_nr == output:
            whole = _whole(argument)
            if is_dense(whole) and argument.stride() == owner.stride():
                return whole, True
    return owner, False


def _whole(tensor: Tensor) -> Tensor:
    """The base of a view of all its elements, both dense; else the tensor."""
    base = tensor._base
    if base is None or base.numel() != tensor.numel() or type(base) is not Tensor:
        return tensor
    return base if is_dense(base) and is_dense(tensor) else tensor


# ---- packing -------------------------------------------------------------------------------------

_NOTE = "_packlight_exact"


def _note_exact(entry: _Pending) -> None:
    """Notes on a tensor that an operation keeps it exactly: others do so at no cost."""
    if not entry.is_cast:
        setattr(entry.owner, _NOTE, weakref.ref(entry.exact))


def _is_kept_exactly(owner: Tensor) -> bool:
    note: weakref.ref[_Exact] | None = getattr(owner, _NOTE, None)
    exact = note() if note is not None else None
    return exact is not None and exact.version == owner._version


def _keep_pack(entry: _Pending, method: GroupQuant, same_strides: bool) -> None:
    """Has the holder keep a pack; compiled code relies on the strides of what comes back."""
    tensor = entry.exact.tensor
    owner = entry.owner
    if not entry.is_cast and _is_kept_exactly(owner):
        return
    shape = tuple(tensor.shape)
    # Repeated elements are packed once.
    repeats = [size > 1 and step == 0 for size, step in zip(shape, tensor.stride(), strict=True)]
    if any(repeats):
        narrow = [1 if repeat else size for repeat, size in zip(repeats, shape, strict=True)]
        tensor = tensor.as_strided(narrow, tensor.stride())
    if tensor.numel() < method.group_size:
        return
    stride = dense_stride(tensor)
    pack = None if any(repeats) else sharing.pack_of(owner, method.grade)
    if pack is None:
        codes, scales = ops.quantize(
            tensor, stride, method.bits, method.group_size, *operands(draw(tensor, method))
        )
        stands_for = tensor if any(repeats) else owner
        layout = (tuple(stands_for.shape), dense_stride(stands_for), tensor.numel())
        rebuild = Rebuild(*layout, method.bits, method.group_size)
        pack = Pack(rebuild, layout[0], (codes, scales), method.grade)
        if stands_for is owner:
            # Not `note_input`: the holders keep the very tensors of the pack, hooks or no hooks.
            sharing.note_kept(owner, pack)
    versions = tuple(-1 if kept is None else kept._version for kept in pack.tensors)
    spread = tensor.stride() if same_strides and tensor.stride() != stride else None
    narrow_shape = tuple(tensor.shape)
    entry.holder.kept = _Packed(pack, versions, shape, narrow_shape, stride, spread, tensor.dtype)
