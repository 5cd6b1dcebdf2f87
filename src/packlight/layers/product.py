"""Products: of two tensors of which one is packed already, and of rows and a vector.

The former is an activation and its gate, the latter the scale of a layer or an adapter.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from packlight import _torch, _tracer, sharing
from packlight._checks import is_supported, needs_gradient, refuse_second_derivative
from packlight._gradients import as_dtype, column_sums
from packlight.fewbit.activations import CONTINUOUS
from packlight.layers.activations import UNITS, Applied, GatedProduct, gated, how, unit_of
from packlight.layers.arithmetic import followed
from packlight.layers.computed import computed_pack_of, exact, is_of_parameters, pack_operand
from packlight.pack import Pack
from packlight.quantiser import KEEPS, Quantiser, Restore, pack_input, worth_packing

# A factor with this many times fewer elements than the other is kept as it is.
_MUCH = 16


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class _Product:
    """What the packs of two factors of these shapes stand for: their product."""

    rebuilds: tuple[Callable[..., Tensor], Callable[..., Tensor]]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    first: int  # how many tensors belong to the first

    def __call__(self, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        one, other = self._factors(dtype, *tensors)
        return one * other

    def factor_gradients(self, dy: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        one, other = self._factors(dy.dtype, *tensors)
        gradients = (dy * other, dy * one)
        if self.shapes[0] == self.shapes[1]:
            return gradients
        return gradients[0].sum_to_size(self.shapes[0]), gradients[1].sum_to_size(self.shapes[1])

    def _factors(self, dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        one = self.rebuilds[0](dtype, *tensors[: self.first]).reshape(self.shapes[0])
        other = self.rebuilds[1](dtype, *tensors[self.first :]).reshape(self.shapes[1])
        return one, other


def _gated_product(f: Pack, up: Pack, shape: tuple[int, ...] | None) -> GatedProduct | None:
    """The product as f(gate) up, where the kernels of gated units can read the packs."""
    a, b = f.rebuild, up.rebuild
    if not (isinstance(a, Applied) and isinstance(b, Restore)):
        return None
    alike = (a.method, a.shape, a.stride) == (b.method, b.shape, b.stride) and a.shape == shape
    if not alike or a.parameters:
        return None
    product: Any = unit_of(a.method).rebuild(shape, a.stride, a.name, a.method)
    return product  # type: ignore[no-any-return]


class _Multiplication(torch.autograd.Function):
    """y = a b; keeps the packs of both."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, product: _Product | GatedProduct, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.product, ctx.dtypes = product, (a.dtype, b.dtype)
        return a * b

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        tensors = ctx.saved_tensors
        da, db = ctx.product.factor_gradients(grad_output, *tensors)
        one, two = ctx.dtypes
        return as_dtype(da, one), as_dtype(db, two), None, *[None] * len(tensors)


_multiply: Callable[..., Tensor] = _torch.applied(_Multiplication)


@_torch.followed
def mul(input: Tensor, other: Any, *, method: Quantiser) -> Tensor:
    """a b, biased: da = dy b~, db = dy a~.

    Keeps the pack of each factor: the one that is kept of it already, as for the output of an
    activation, else a new one. Of two shapes the smaller factor is kept as it is, if it is much
    smaller or a parameter. Where a factor needs no gradient this is torch's product, which keeps
    that factor; one with a vector that is trained is `scale`.
    """
    kind = _kind_of(input, other, method)
    if kind == "scale":
        return scale(input, other, method=method)
    if kind == "scale of other":
        return scale(other, input, method=method)
    if kind == "torch's":
        return _torch_s_product(input, other)
    if torch.compiler.is_dynamo_compiling() and _are_alike(input, other):
        for f, up in ((input, other), (other, input)):
            for name in UNITS:
                gate = _tracer.source_of(f, how(name, method), up)
                if gate is not None:
                    return _unit(f, gate, up, name, method)
    return _of_packs(input, other, method)


_Kind = Literal["scale", "scale of other", "product", "torch's"]


def _kind_of(a: Any, b: Any, method: Quantiser) -> _Kind:
    """What is done for a b."""
    if torch.compiler.is_dynamo_compiling():  # one question: models multiply by many things
        found: _Kind | None = _torch.ask("kind_of_product", None, a, b, method)
        if found is not None:
            return found
    if _is_scale(a, b, method):
        return "scale"
    if _is_scale(b, a, method):
        return "scale of other"
    return "product" if _are_factors(a, b, method) else "torch's"


@_torch.question
def kind_of_product(tracer: Any, a: Any, b: Any, method: Any) -> _Kind | None:
    kept = _torch.value_of(tracer, method)
    one, two = (_tracer.fake_of(x) if issubclass(x.python_type(), Tensor) else None for x in (a, b))
    return None if kept is None else _kind_of(one, two, kept)


@_torch.one_node
def _torch_s_product(input: Tensor, other: Any) -> Tensor:
    """The product, from which it may be computed again what stands for it."""
    return followed(torch.mul, input, other)


@_torch.one_node
def _of_packs(input: Tensor, other: Tensor, method: Quantiser) -> Tensor:
    """The product, which keeps packs of both."""
    one, two = _factor(input, other, method), _factor(other, input, method)
    shared = any(tensor is kept for tensor in one.tensors for kept in two.tensors)
    shapes = tuple(input.shape), tuple(other.shape)
    shape = shapes[0] if _are_alike(input, other) else None
    product: _Product | GatedProduct | None = _gated_product(one, two, shape)
    if product is None:
        product = _gated_product(two, one, shape)
        if product is not None:  # the kernels take f(gate) first
            input, other, one, two = other, input, two, one
    if product is None:
        product = _Product((one.rebuild, two.rebuild), shapes, len(one.tensors))
    tensors = (*one.tensors, *two.tensors)
    y = _multiply(input, other, product, *tensors)
    # The mean of x~ x~ is not that of x~ squared: of factors that share their rounding the product
    # is rounded by itself.
    if not shared:
        grade = one.grade.and_of(two.grade)
        sharing.note_pack(y, Pack(product, tuple(y.shape), tensors, grade))
    return y


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class Scaled:
    """What the pack of rows and a vector stand for: their product, and a shift if there is one."""

    rebuild: Callable[..., Tensor]
    parts: int  # of the pack

    def __call__(self, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        x = self.rebuild(torch.float32, *tensors[: self.parts])
        vector, *shift = tensors[self.parts :]
        assert vector is not None
        y = x * vector
        for each in shift:
            y = y if each is None else y + each
        return y.to(dtype)


class _Scaling(torch.autograd.Function):
    """y = x v; keeps v and the pack of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        vector: Tensor,
        values: Tensor,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        """`values` is the vector without its history."""
        ctx.save_for_backward(values, *tensors)
        ctx.rebuild, ctx.dtype = rebuild, x.dtype
        return x * vector

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        vector, *tensors = ctx.saved_tensors
        dx = dvector = None
        if ctx.needs_input_grad[0]:
            dx = (grad_output * vector).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            dvector = vector_gradient(grad_output, ctx.rebuild(grad_output.dtype, *tensors), vector)
        return dx, dvector, None, None, *[None] * len(tensors)


_scale: Callable[..., Tensor] = _Scaling.apply


def vector_gradient(grad_output: Tensor, x: Tensor, vector: Tensor) -> Tensor:
    """The sum of dy x over all rows, as the vector is."""
    rows = (grad_output * x).reshape(-1, vector.numel())
    wide = torch.promote_types(rows.dtype, vector.dtype)
    return column_sums(rows, wide).to(vector.dtype).view(vector.shape)


@_torch.one_node
def scale(x: Tensor, vector: Tensor, *, method: Quantiser) -> Tensor:
    """x v for rows x [..., n] and a vector v of n elements.

    Keeps v and a pack of x, or nothing of x where it is packed already; readers of the product
    share it. dx is exact, dv is of the packed x, unbiased where the method is.
    """
    kept, values = pack_input(x, method), vector.detach()
    y = _scale(x, vector, values, kept.rebuild, *kept.tensors)
    note_scaled(y, kept, values)
    return y


def note_scaled(y: Tensor, kept: Pack, *vectors: Tensor | None) -> None:
    """Records that y is what `kept` stands for times a vector, and shifted by another if given.

    The graph saves these very tensors.
    """
    tensors = (*kept.tensors, *vectors)
    rebuild = Scaled(kept.rebuild, len(kept.tensors))
    sharing.note_pack(y, Pack(rebuild, tuple(y.shape), tensors, kept.grade))


def _is_scale(x: object, vector: object, method: Quantiser) -> bool:
    """Whether this is a product of rows and a vector that is trained, and smaller than they are."""
    if not (isinstance(x, Tensor) and isinstance(vector, Tensor)):
        return False
    if x.dim() < 2 or vector.dim() > x.dim() or x.numel() <= vector.numel():
        return False
    return (
        vector.shape[-1:] == x.shape[-1:]
        and vector.numel() == x.shape[-1]
        and x.is_floating_point()
        and needs_gradient(vector)
        and worth_packing(x, method)
    )


@_torch.one_node
def _unit(f: Tensor, gate: Tensor, up: Tensor, name: str, method: Quantiser) -> Tensor:
    """f(gate) up of a traced activation as one operator each way: its own result is not computed.

    Not where that would keep another pack of what is packed already.
    """
    if sharing.pack_of(gate) is not None or sharing.pack_of(up) is not None:
        return _of_packs(f, up, method)
    function = CONTINUOUS[name].function
    y = gated(gate, up, name, method, lambda gate, up: function(gate) * up)
    product, applied = sharing.pack_of(y), sharing.pack_of(f)
    if product is not None and applied is not None:  # for whatever else reads the factors
        shape = tuple(y.shape)
        half = len(product.tensors) // 2
        gate_pack, up_pack = product.tensors[:half], product.tensors[half:]
        # That of the gate holds it within what its function tells apart, so it is no pack of it.
        sharing.note_pack(
            up, Pack(Restore(method, shape, y.stride()), shape, up_pack, method.grade)
        )
        rebuild: Any = dataclasses.replace(applied.rebuild, stride=y.stride())  # type: ignore[type-var]
        sharing.note_pack(f, Pack(rebuild, shape, gate_pack, method.grade))
    return y


def _factor(x: Tensor, other: Tensor, method: Quantiser) -> Pack:
    """What is kept of a factor for the gradient of the other."""
    small = x.numel() * _MUCH <= other.numel() or not worth_packing(x, method)
    if small and computed_pack_of(x) is None:
        return exact(x)
    return pack_operand(x, method)


def _are_factors(a: object, b: object, method: Quantiser) -> bool:
    """Whether both are tensors with a gradient, the larger of them worth a pack."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.device == b.device):
        return False
    if not (is_supported(a) and is_supported(b) and needs_gradient(a) and needs_gradient(b)):
        return False
    larger = a if a.numel() >= b.numel() else b
    return worth_packing(larger, method) and not (is_of_parameters(a) and is_of_parameters(b))


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype
