"""Powers, exponentials and quotients of a model's own code, as norms and scans write them out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight import sharing
from packlight._checks import (
    autocast_dtype,
    is_supported,
    needs_gradient,
    refuse_second_derivative,
)
from packlight._gradients import as_dtype
from packlight._overwrite import writable
from packlight.layers.arithmetic import followed
from packlight.layers.casts import to
from packlight.layers.computed import (
    computed,
    computed_pack_of,
    exact,
    is_of_parameters,
    pack_operand,
)
from packlight.pack import Pack
from packlight.packing.layout import dense_stride, is_dense
from packlight.quantiser import KEEPS, Quantiser, Restore, pack_input, worth_packing
from packlight.reading import reader, reading_of

# ---- functions of one tensor ---------------------------------------------------------------------


class _OfPack(torch.autograd.Function):
    """y = f(x), by a gradient that reads what is kept: of x, or of y where that is computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        function: Callable[[Tensor], Tensor],
        gradient: Callable[[Tensor, Tensor], Tensor],
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.settings = (gradient, rebuild, x.dtype)
        return writable(function(x))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        gradient, rebuild, dtype = ctx.settings
        tensors = ctx.saved_tensors
        dx = as_dtype(gradient(dy, rebuild(dy.dtype, *tensors)), dtype)
        return dx, None, None, None, *[None] * len(tensors)


_of_pack: Callable[..., Tensor] = _OfPack.apply


@dataclasses.dataclass
class _Power:
    """x^n for a whole number n from 2 on, whose derivative is bounded near 0."""

    exponent: int

    def __call__(self, x: Tensor) -> Tensor:
        return torch.pow(x, self.exponent)

    def gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return dy * (self.exponent * (x if self.exponent == 2 else x.pow(self.exponent - 1)))


def pow(input: Tensor, exponent: Any, *, method: Quantiser) -> Tensor:
    """`torch.pow`. Keeps a pack of x for a whole exponent from 2 on; unbiased for 2."""
    number = isinstance(exponent, (int, float)) and exponent >= 2 and exponent == int(exponent)
    if not number or not _is_packed(input, method):
        return torch.pow(input, exponent)
    dtype = autocast_dtype(input, "pow", lambda x: torch.pow(x, 2))
    input = input if input.dtype == dtype else to(input, dtype)
    function = _Power(int(exponent))
    pack = pack_input(input, method)
    rebuild = reader(pack.reading, pack.rebuild)
    y = _of_pack(input, lambda x: torch.pow(x, exponent), function.gradient, rebuild, *pack.tensors)
    if is_dense(y):
        sharing.note_pack(y, computed(y, function, (input,), (pack,)))
    return y


def square(input: Tensor, *, method: Quantiser) -> Tensor:
    """`torch.square`; see `pow`."""
    return pow(input, 2, method=method)


class _Exponential(torch.autograd.Function):
    """y = e^x and a pack of y, which it keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, method: Quantiser, seed: Any) -> tuple[Tensor, ...]:
        y = torch.exp(x)
        kept = method.pack(y, seed)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        ctx.settings = (x.dtype, Restore(method, tuple(y.shape), dense_stride(y)))
        return y, *kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        dx = None
        if dy is not None:
            dtype, rebuild = ctx.settings
            dx = as_dtype(dy * rebuild(dy.dtype, *ctx.saved_tensors), dtype)
        return dx, None, None


_exponential: Callable[..., tuple[Tensor, ...]] = _Exponential.apply


def exp(input: Tensor, *, method: Quantiser) -> Tensor:
    """`torch.exp`. Keeps what x is computed from, as outer products are, or a pack of its output.

    Readers of the output share it.
    """
    if not _is_packed(input, method):
        return torch.exp(input)
    dtype = autocast_dtype(input, "exp", torch.exp)
    input = input if input.dtype == dtype else to(input, dtype)
    known = computed_pack_of(input)
    if known is not None:
        pack = computed(input, torch.exp, (input,), (known,))
        pack = pack._replace(reading=reading_of(pack.rebuild))
        rebuild = reader(pack.reading, pack.rebuild)
        y = _of_pack(input, torch.exp, torch.mul, rebuild, *pack.tensors)
        if y.stride() == input.stride() and is_dense(y):
            sharing.note_pack(y, pack)
        return y
    y, *kept = _exponential(input, method, method.seed(input))
    restore = Restore(method, tuple(y.shape), dense_stride(y))
    sharing.note_pack(y, Pack(restore, tuple(y.shape), tuple(kept), method.grade))
    return y


def _is_packed(x: Tensor, method: Quantiser) -> bool:
    return (
        not torch.compiler.is_dynamo_compiling()
        and needs_gradient(x)
        and worth_packing(x, method)
        and not is_of_parameters(x)
    )


# ---- quotients -----------------------------------------------------------------------------------


class _Quotient(torch.autograd.Function):
    """y = a / b; keeps a pack of a, and b."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, values: Tensor, rebuild: Any, *tensors: Tensor | None
    ) -> Tensor:
        """`values` is b without its history."""
        ctx.save_for_backward(values, *tensors)
        ctx.settings = (a.dtype, tuple(a.shape), rebuild)
        return a / b

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        b, *tensors = ctx.saved_tensors
        dtype, shape, rebuild = ctx.settings
        da = dy / b
        db = -(da * rebuild(dy.dtype, *tensors) / b)
        da, db = as_dtype(da.sum_to_size(shape), dtype), db.sum_to_size(b.shape)
        return da, as_dtype(db, b.dtype), None, None, *[None] * len(tensors)


_divide: Callable[..., Tensor] = _Quotient.apply


class _KeptQuotient(torch.autograd.Function):
    """y = a / b and a pack of y, which it keeps, and b."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, values: Tensor, method: Quantiser, seed: Any
    ) -> tuple[Tensor, ...]:
        y = a / b
        kept = method.pack(y, seed)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, *kept)
        ctx.settings = (a.dtype, Restore(method, tuple(y.shape), dense_stride(y)))
        return y, *kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        if dy is None:
            return (None,) * 5
        b, *kept = ctx.saved_tensors
        dtype, rebuild = ctx.settings
        da = dy / b
        db = -(da * rebuild(dy.dtype, *kept)).sum_to_size(b.shape)
        return as_dtype(da, dtype), as_dtype(db, b.dtype), None, None, None


_divide_keeping: Callable[..., tuple[Tensor, ...]] = _KeptQuotient.apply


def div(
    input: Tensor, other: Any, *, rounding_mode: str | None = None, method: Quantiser
) -> Tensor:
    """`torch.div`. Where the divisor needs a gradient, keeps it, and a pack of the quotient.

    A quotient has no bound near a divisor of 0, so the divisor is kept as it is. Its gradient is
    -sum(dy / b y~): an error of the quotient counts as it is, one of the dividend would be divided
    by b once more, which is small where attention without a softmax finds no key. A dividend of
    which a pack is kept already, as by the norm that is the divisor, serves in place of y.
    """
    packed = (
        rounding_mode is None
        and isinstance(other, Tensor)
        and is_supported(other)
        and not torch.compiler.is_dynamo_compiling()
        and input.device == other.device
        and input.numel() >= other.numel()
        and needs_gradient(input)
        and needs_gradient(other)
        and worth_packing(input, method)
    )
    if not packed:
        if rounding_mode is not None:
            return torch.div(input, other, rounding_mode=rounding_mode)
        return followed(torch.div, input, other)
    values = exact(other)
    known = is_of_parameters(input) or sharing.pack_of(input, method.grade) is not None
    if not known and torch.broadcast_shapes(input.shape, other.shape) == input.shape:
        y, *kept = _divide_keeping(input, other, *values.tensors, method, method.seed(input))
        shape = tuple(y.shape)
        restore = Restore(method, shape, dense_stride(y))
        sharing.note_pack(y, Pack(restore, shape, tuple(kept), method.grade))
        return y
    pack = pack_operand(input, method)
    y = _divide(input, other, *values.tensors, pack.rebuild, *pack.tensors)
    if is_dense(y):
        sharing.note_pack(y, computed(y, torch.div, (input, other), (pack, values)))
    return y


# By what they become in a model's own code.
ELEMENTARY: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.pow: pow,
    Tensor.pow: pow,
    Tensor.__pow__: pow,
    torch.square: square,
    Tensor.square: square,
    torch.exp: exp,
    Tensor.exp: exp,
    torch.div: div,
    torch.divide: div,
    torch.true_divide: div,
    Tensor.div: div,
    Tensor.true_divide: div,
}
