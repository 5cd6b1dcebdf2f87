"""A quantiser: a method that keeps any tensor as fewer bits.

It says how a tensor becomes tensors that stand for it (`keep`) and how it comes back (`restore`).
Every layer of `packlight.layers` works by those two alone. Where a method has operators that do the
work of a layer in one pass over memory, `fused` names them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from packlight import _torch, _tracer, sharing
from packlight._checks import without_autocast
from packlight._seeds import Seed, as_given, rounding_seed
from packlight._torch import question
from packlight.calls import uncovered
from packlight.method import Method
from packlight.pack import Grade, Pack
from packlight.packing.layout import dense_stride, memory_order
from packlight.reading import reading_of


class Fused(NamedTuple):
    """What a layer does by a method: its forward, its backward, and what its pack stands for.

    Arguments and results are those of the plain operations, which stand in the file of the layer.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    rebuild: Callable[..., Callable[..., Tensor]]


class Shift(NamedTuple):
    """What is taken off the first values of every `width`, in the order of memory, of a pack."""

    values: Tensor
    width: int

    def taken_off(self, x: Tensor) -> Tensor:
        """`x` less it, in its memory order and dense strides."""
        stride = dense_stride(x)
        flat = memory_order(x, stride).clone()
        self._of(flat).sub_(self.values)
        return flat.as_strided(x.shape, stride)

    def put_back(self, x: Tensor) -> Tensor:
        """`x`, of dense strides, with it again."""
        self._of(memory_order(x, x.stride())).add_(self.values)
        return x

    def _of(self, flat: Tensor) -> Tensor:
        return flat.view(-1, self.width)[:, : self.values.numel()]


@dataclasses.dataclass(frozen=True)
class Quantiser(Method, abstract=True):
    """Base of the methods that keep a tensor as fewer bits, `GroupQuant` among them.

    A subclass is a frozen dataclass that has `grade`, `keep` and `restore`. It then serves every
    layer, norm, activation, gated unit, convolution, attention and `saving`.
    """

    # Of a layer by its name: "activation", "activation_", "gated", "gated_", "norm",
    # "rounded_norm", "post_norm", "batch_norm", "group_norm".
    fused: ClassVar[Mapping[str, Fused]] = {}

    @property
    def grade(self) -> Grade:
        """How near to a tensor its packs are: a reader shares a pack of its own grade or better."""
        raise NotImplementedError(f"{type(self).__name__} has no grade")

    @property
    def smallest(self) -> int:
        """The fewest elements that are worth a pack."""
        return 1

    @property
    def stochastic(self) -> bool:
        """Whether `keep` wants a seed."""
        return self.grade.unbiased

    def keep(self, flat: Tensor, seed: Seed) -> tuple[Tensor, ...]:
        """Tensors that stand for the values of `flat` [n], always as many tensors.

        `flat` is contiguous, of any dtype of floating point; neighbours in it are neighbours in
        memory. `seed` is None unless `stochastic`. A NaN or an infinity must not come back finite.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps nothing")

    def restore(self, dtype: torch.dtype, count: int, *kept: Tensor) -> Tensor:
        """The values again, [count], contiguous, in `dtype`."""
        raise NotImplementedError(f"{type(self).__name__} restores nothing")

    def pack(self, x: Tensor, seed: Seed) -> tuple[Tensor, ...]:
        """`keep` of all values of `x`, in the order of its memory."""
        with without_autocast(x.device.type):
            flat = memory_order(x, dense_stride(x))
            kept: tuple[Tensor, ...] = uncovered(self.keep, flat, as_given(seed))
        return tuple(kept)

    def unpack(
        self, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], *kept: Tensor
    ) -> Tensor:
        """`restore` as a tensor of this shape and dense strides, those of `dense_stride(x)`."""
        with without_autocast(kept[0].device.type):
            flat: Tensor = uncovered(self.restore, dtype, math.prod(shape), *kept)
            return flat.as_strided(shape, stride)

    def pack_less(self, x: Tensor, seed: Seed, shift: Shift | None) -> tuple[Tensor, ...]:
        """`pack` of `x` less a shift, if there is one."""
        return self.pack(x if shift is None else shift.taken_off(x), seed)

    def unpack_less(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        *kept: Tensor,
        shift: Shift | None,
    ) -> Tensor:
        """What was packed less a shift, with it again."""
        x = self.unpack(dtype, shape, stride, *kept)
        return x if shift is None else shift.put_back(x)

    def with_sides(self, flat: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """What is kept of `flat`, so that values come back on their side of 0 and zeros as 0.

        A compiled region may take the mask of a ReLU from it. As it is where a format cannot.
        """
        return kept

    def for_scores(self) -> "Quantiser":
        """The method for what is the exponent of a softmax whose sum is kept exactly."""
        return self

    def for_attention(self) -> "Quantiser":
        """The method for query, key and value of which attention runs once more."""
        return self.for_scores()

    def for_pixels(self) -> "Quantiser":
        """The method for convolutions and norms of channels, whose gradients sum over pixels.

        In a channels-first tensor these are neighbours in memory.
        """
        return self

    def for_zeros(self) -> "Quantiser":
        """The method for the result of a ReLU, of which many elements are its minimum."""
        return self

    def for_functions(self) -> "Quantiser":
        """The method for what a function reads that is not linear."""
        return self

    def for_norms(self) -> "Quantiser":
        """The method for what a norm of rows normalises."""
        return self.for_functions()

    def keeps_rows(self, width: int) -> bool:
        """Whether rows of this width are worth packing."""
        return width >= self.smallest

    def seed(self, x: Tensor) -> Seed:
        """A seed for the rounding of `x`; None where nothing is drawn."""
        return rounding_seed(x) if self.stochastic else None


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class Restore:
    """What a pack stands for: the tensor that a method kept, of this shape and dense strides."""

    method: Quantiser
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __call__(self, dtype: torch.dtype, *kept: Tensor, shift: Shift | None = None) -> Tensor:
        return self.method.unpack_less(dtype, self.shape, self.stride, *kept, shift=shift)


# What the error of a second derivative says is kept.
KEEPS = "a quantised tensor"


# What is to be called before the next tensor is packed that a layer reads, once.
before_first_pack: list[Callable[[], None]] = []


def pack_input(x: Tensor, method: Quantiser) -> Pack:
    """The pack of `x`: one as good that is kept of it already, else a new one, which is noted.

    A new one is of what `x` is a cast of, where that is known: other casts share it.
    """
    if before_first_pack and not torch.compiler.is_dynamo_compiling():
        calls = before_first_pack[:]
        before_first_pack.clear()
        for call in calls:
            call()
    kept = sharing.pack_of(x, method.grade)
    if kept is not None:
        return kept
    if is_of_relu(x):
        method = method.for_zeros()
    source = sharing.source_of(x)
    kept = new_pack(source.detach(), method)
    sharing.note_pack(source, kept)
    if source is not x:  # which may live longer
        sharing.note_pack(x, kept)
    return kept


def is_of_relu(x: Tensor) -> bool:
    """Whether a ReLU made the tensor, or what it is a view of."""
    if torch.compiler.is_dynamo_compiling():
        found: bool = _torch.ask("is_traced_of_relu", False, x)
        return found
    made = (x if x._base is None else x._base).grad_fn
    if made is None:
        return False
    return made.name() == "ReluBackward0" or getattr(made, "is_relu", False)


@question
def is_traced_of_relu(tracer: Any, x: Any) -> bool:
    return is_of_relu(_tracer.fake_of(x))


def new_pack(x: Tensor, method: Quantiser) -> Pack:
    """A pack of all values of `x`."""
    tensors = method.pack(x, method.seed(x))
    shape = tuple(x.shape)
    rebuild = Restore(method, shape, dense_stride(x))
    return Pack(rebuild, shape, tensors, method.grade, reading_of(rebuild))


def worth_packing(x: Tensor, method: Quantiser) -> bool:
    """Whether a pack is smaller than the tensor."""
    return x.numel() >= method.smallest
