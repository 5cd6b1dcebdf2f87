"""Tensors without values, for `predict`, and the little that is known of values all the same.

`FakeTensorMode` runs models on tensors that have a shape, a dtype and a device. `Fakes` adds what a
prediction needs beside it:

- Small tensors that are real stay real, and so does what is computed of them alone: lengths,
  masks, positions, data. Models look at such values: `layerdrop` tosses a coin, transformers keeps
  no mask that is all ones, packed sequences have lengths.
- Other tensors are taken for finite numbers, so that a look for infinities and NaNs has an answer.
- Where a fake kernel of torch returns something else than the real kernel keeps, this one's counts.
"""

import math
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from packlight._torch.attributes import operands

__all__ = ["NEEDS_VALUES", "FakeFunctionMode", "Fakes", "is_small"]

NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

_aten = torch.ops.aten


def is_small(tensor: Tensor) -> bool:
    """Whether it is so small that its values can be kept and computed with."""
    return max(tensor.numel(), tensor.untyped_storage().nbytes() // 8) <= 2**20


class Fakes(FakeTensorMode):
    def __init__(self) -> None:
        # Tensors that a loss brings along are real, and so are the small ones that are known.
        super().__init__(allow_non_fake_inputs=True)
        # Storages of real tensors into which fake values were written. They live here, so that no
        # other storage takes the address of one.
        self.written: dict[int, torch.UntypedStorage] = {}

    def dispatch(
        self,
        func: Any,
        kinds: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] = {},
    ) -> Any:
        tensors = operands(args, kwargs)
        given = args, kwargs
        if any(map(_has_graph, tensors)):
            # A fake tensor is made of a real one with all that hangs on it, its gradient too.
            args, kwargs = tree_map_only(Tensor, _without_graph, given)
        if all(map(self._is_known, tensors)) if tensors else _makes_known(func, args):
            return self._computed(func, kinds, args, kwargs, given)
        answer = _answer(func, args)
        if answer is not None:
            return answer
        if func._schema.is_mutable:
            self._note_written(func, args, kwargs)
        if (kernel := _KERNELS.get(func)) is not None:

            def dispatch(*given: Any, **named: Any) -> Any:
                return super(Fakes, self).dispatch(func, kinds, given, named)

            result = kernel(self, dispatch, args, kwargs)
        else:
            result = super().dispatch(func, kinds, args, kwargs)
        if isinstance(result, FakeTensor):
            value = _uniform_value(func, args, kwargs, result)
            if value is not None:
                setattr(result, _UNIFORM, value)
            elif (well := _REDUCTIONS.get(func.overloadpacket)) is not None:
                setattr(result, _ALL_IS_WELL, well)
        return result

    # ---- what is known -----------------------------------------------------------------------

    def _is_known(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor) or hasattr(tensor, "__tensor_flatten__"):
            return False  # the latter is a wrapper around fake ones
        if tensor.layout is not torch.strided or not is_small(tensor):
            return False
        return tensor.device.type != "meta" and tensor.untyped_storage()._cdata not in self.written

    def _computed(
        self,
        func: Any,
        kinds: Sequence[type],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        given: tuple[Sequence[Any], Mapping[str, Any]],
    ) -> Any:
        """For real, unless the result is large: `repeat` makes much of little.

        `given` are the arguments with their graphs.
        """
        try:
            fake = super().dispatch(func, kinds, args, kwargs)
        except NEEDS_VALUES:
            pass  # its result is not larger than what it is computed of
        else:
            if not all(map(is_small, operands(fake))):
                return fake
        args, kwargs = given
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _note_written(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor):
                    storage = tensor.untyped_storage()
                    self.written[storage._cdata] = storage


class FakeFunctionMode(TorchFunctionMode):
    """What a fake mode alone is too late for: calls that leave torch, or lead around it."""

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, _Finite) for value in (*args, *kwargs.values())):
            raise _unknown()
        if func in (F.ctc_loss, torch.ctc_loss):
            # Of lengths that are numbers it makes tensors by a way that fakes lack.
            args = tuple(map(_as_tensor, args))
            kwargs = {name: _as_tensor(value) for name, value in kwargs.items()}
        elif func in (Tensor.numpy, Tensor.__array__) and isinstance(args[0], FakeTensor):
            raise DataDependentOutputException(func)
        elif func is Tensor.item and args[0].is_floating_point():
            try:
                return func(*args)
            except DataDependentOutputException:
                return _Finite()
        return func(*args, **kwargs)


def _unknown() -> DataDependentOutputException:
    return DataDependentOutputException(_aten._local_scalar_dense.default)


def _as_tensor(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, list | tuple) else value


class _Finite(float):
    """What `item` makes of a fake tensor: a number of which nothing is known but that it is finite.

    It can be printed, summed up and looked at by `math.isfinite`. Compared, or used with a tensor,
    it raises as `bool` of a fake tensor does.
    """

    def __new__(cls) -> "_Finite":
        return super().__new__(cls, 1.0)

    def _number(self, *others: object) -> "_Finite":
        return _Finite()

    def _compared(self, *others: object) -> Any:
        raise _unknown()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _number
    __truediv__ = __rtruediv__ = __neg__ = __abs__ = _number
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _compared
    __int__ = __trunc__ = __floor__ = __ceil__ = __round__ = _compared
    __hash__ = float.__hash__


def _has_graph(tensor: Tensor) -> bool:
    """Whether it is a real tensor that was computed of others."""
    return not isinstance(tensor, FakeTensor) and tensor.grad_fn is not None


def _without_graph(tensor: Tensor) -> Tensor:
    if not _has_graph(tensor):
        return tensor
    with unset_fake_temporarily():
        return tensor.detach()


def _makes_known(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operator that takes no tensor makes one of known values."""
    name = func.overloadpacket
    return name in _MAKES_KNOWN or (name is _aten.rand and not args[0])


# No random ones but a scalar, a coin that is tossed: of others the values do not matter.
_MAKES_KNOWN = (_aten.arange, _aten.full, _aten.ones, _aten.scalar_tensor, _aten.zeros)


# ---- finite numbers ------------------------------------------------------------------------------

# The attribute of a fake tensor all of whose elements have one value that is known.
_UNIFORM = "_packlight_uniform"

_OF_FINITE = (_aten.isnan, _aten.isinf, _aten.isposinf, _aten.isneginf)
_COMPARISONS = (_aten.eq, _aten.ne, _aten.lt, _aten.le, _aten.gt, _aten.ge)
_LOGIC = (
    *_COMPARISONS, _aten.all, _aten.any, _aten._is_all_true, _aten._is_any_true, _aten.mul,
    _aten.bitwise_and, _aten.bitwise_not, _aten.bitwise_or, _aten.logical_and, _aten.logical_not,
    _aten.logical_or, _aten.mean, _aten._to_copy,
)  # fmt: skip
_COUNTS = (_aten.sum, _aten.count_nonzero)


def _uniform_value(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
) -> Any:
    """The value of all elements of the result, if it holds for finite numbers; else None."""
    name = func.overloadpacket
    fakes = [value for value in args if isinstance(value, Tensor)]
    if name in _OF_FINITE or (name in _COMPARISONS and _holds_of_all_finite(args)):
        # What holds of every finite number holds of 0.
        values = [0.0] * len(fakes)
    elif name in (*_LOGIC, *_COUNTS) and all(hasattr(value, _UNIFORM) for value in fakes):
        values = [getattr(value, _UNIFORM) for value in fakes]
    else:
        return None
    pairs = iter(values)
    with unset_fake_temporarily():
        ones = [
            torch.full([1] * value.dim(), next(pairs)) if isinstance(value, Tensor) else value
            for value in args
        ]
        value = func(*ones, **kwargs).item()
    # Of a sum over one element for all.
    return value * fakes[0].numel() // max(result.numel(), 1) if name in _COUNTS else value


def _holds_of_all_finite(args: Sequence[Any]) -> bool:
    one, other = args
    if isinstance(other, Tensor):
        return one is other
    return one.is_floating_point() and isinstance(other, float) and not math.isfinite(other)


def _answer(func: OpOverload, args: Sequence[Any]) -> Any:
    """What a fake tensor of one element is taken for where code asks for it; None: unknown."""
    if func is not _aten._local_scalar_dense.default or not isinstance(args[0], FakeTensor):
        return None
    if (value := getattr(args[0], _UNIFORM, None)) is not None:
        return value
    if (value := getattr(args[0], _ALL_IS_WELL, None)) is not None and _asked_by(_CHECKING):
        return value
    return 1 if _asked_by(_COUNTING) else None


# The attribute of what `any` or `all` returned: what it is where no element is out of order.
_ALL_IS_WELL = "_packlight_all_is_well"
_REDUCTIONS = {_aten.any: False, _aten.all: True, _aten._is_all_true: True}

# Torch's own code that looks at values only to refuse them, and that which counts batches.
_CHECKING = (F.__file__, os.path.dirname(torch.distributions.__file__) + os.sep)
_COUNTING = (torch.nn.modules.batchnorm.__file__,)
_TORCH = os.path.dirname(torch.__file__) + os.sep


def _asked_by(files: tuple[str, ...]) -> bool:
    """Whether one of these files of torch is what runs, as far as frames of torch reach."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(files):
            return True
        if not name.startswith((_TORCH, __file__)):
            return False
        frame = frame.f_back
    return False


# ---- kernels whose fake ones err -----------------------------------------------------------------

_Dispatch = Callable[..., Any]
_Kernel = Callable[[FakeTensorMode, _Dispatch, Sequence[Any], Mapping[str, Any]], Any]


def _grouped_mm(
    mode: FakeTensorMode, dispatch: _Dispatch, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Any dtype, not bfloat16 alone."""
    with mode:
        halves = [factor.to(torch.bfloat16) for factor in args[:2]]
    product = dispatch(*halves, *args[2:], **kwargs)
    with mode:
        return product.to(args[0].dtype)


def _lstm(
    mode: FakeTensorMode, dispatch: _Dispatch, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """With the workspace of oneDNN, of which the fake kernel says that it is empty."""
    *results, _ = dispatch(*args, **kwargs)
    x, hidden = args[0], args[5]
    steps, batch, width = x.shape[0], x.shape[1], x.shape[-1]
    size = _lstm_workspace(steps, batch, width, hidden.shape[-1], x.element_size())
    with mode:
        return (*results, torch.empty(size, dtype=torch.uint8, device=x.device))


def _lstm_workspace(steps: int, batch: int, width: int, hidden: int, itemsize: int) -> int:
    """Bytes that oneDNN 3 sets aside for one layer in one direction; equal to those of a run.

    Rows are padded to 64 bytes and away from multiples of 256 elements, areas to pages.
    """

    def row(elements: int) -> int:
        line = 64 // itemsize
        padded = -(-elements // line) * line
        return padded + line if padded % 256 == 0 else padded

    states = 2 * (steps + 1)  # with the initial one, and for the layer below as for this one
    rows_and_lengths = (
        (steps, row(4 * hidden)),  # gates
        (steps, row(hidden)),  # outputs before a projection
        (states, row(max(width, hidden))),  # states, and their gradients by layer and by step
        (states, row(max(width, hidden))),
        (states, row(max(width, hidden))),
        (states, hidden),  # cells and their gradients
        (states, hidden),
    )
    page = 4096
    return sum(
        -(-rows * batch * length * itemsize // page) * page for rows, length in rows_and_lengths
    )


def _embedding_bag(
    mode: FakeTensorMode, dispatch: _Dispatch, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """On the CPU, with the storage that some of its results are cut from."""
    output, bag_of, sizes, largest = dispatch(*args, **kwargs)
    weight, offsets = args[0], args[2]
    if weight.device.type == "cpu":
        with mode:
            if bag_of.numel():
                bag_of = bag_of.new_empty(bag_of.numel() + 1)[:-1]
            sizes = sizes.new_empty(offsets.numel())[: sizes.numel()]
    return output, bag_of, sizes, largest


def _ctc_loss(
    mode: FakeTensorMode, dispatch: _Dispatch, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """The losses, and a table over steps and the longest target with a blank around each label."""
    log_probabilities, _, _, lengths = args[:4]
    if isinstance(lengths, FakeTensor):
        return dispatch(*args, **kwargs)  # which says that it needs them
    longest = int(max(lengths, default=0))
    steps, batch, _ = log_probabilities.shape
    with mode:
        return (
            log_probabilities.new_empty(batch),
            log_probabilities.new_empty(batch, steps, 2 * longest + 1),
        )


def _pack_padded_sequence(
    mode: FakeTensorMode, dispatch: _Dispatch, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """By the real lengths, where they are known."""
    padded, lengths, batch_first = args
    if isinstance(lengths, FakeTensor):
        return dispatch(*args, **kwargs)
    with unset_fake_temporarily():
        alike = torch.empty(*padded.shape[:2], 1)
        data, batch_sizes = _aten._pack_padded_sequence(alike, lengths, batch_first)
    with mode:
        return padded.new_empty(data.shape[0], *padded.shape[2:]), batch_sizes


_KERNELS: dict[OpOverload, _Kernel] = {
    _aten._grouped_mm.default: _grouped_mm,
    _aten.mkldnn_rnn_layer.default: _lstm,
    _aten._embedding_bag.default: _embedding_bag,
    _aten._ctc_loss.default: _ctc_loss,
    _aten._ctc_loss.Tensor: _ctc_loss,
    _aten._pack_padded_sequence.default: _pack_padded_sequence,
}
