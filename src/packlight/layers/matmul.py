"""Products of matrices in a model's own code: `torch.matmul`, `bmm`, `baddbmm`, `addmm`, `einsum`.

Each runs torch's function and keeps packs of its factors. A factor that is a parameter, or a view
of one, is kept as it is, which takes no memory, and so is a small one. Of two activations, as
attention has them, packs are those of `Quantiser.for_attention`, since a softmax of the product may
be computed again from them.
"""

import dataclasses
import math
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch, sharing
from packlight._checks import (
    autocasts,
    is_plain,
    needs_gradient,
    refuse_second_derivative,
    saved_with_operands,
)
from packlight._gradients import as_dtype
from packlight._overwrite import writable
from packlight.layers.casts import to
from packlight.layers.computed import (
    computed,
    computed_pack_of,
    exact,
    is_of_exact,
    is_of_parameters,
    is_parameter,
    note_computed,
    pack_operand,
)
from packlight.pack import Pack
from packlight.packing.layout import is_dense
from packlight.quantiser import KEEPS, Quantiser
from packlight.reading import reader

# What a product makes of its factors, and the gradients of both from that of the result.
Gradients = tuple[Tensor | None, Tensor | None]


class Product(NamedTuple):
    """A function that is linear in each of two tensors."""

    forward: Callable[[Tensor, Tensor], Tensor]
    # Of a and of b, by dy, a and b; a tensor that nothing asks for is None.
    gradients: Callable[[Tensor, Tensor | None, Tensor | None], Gradients]


@dataclasses.dataclass
class _Sum:
    """beta base + alpha product(a, b), as torch adds it."""

    function: Callable[..., Tensor]
    beta: float
    alpha: float

    def __call__(self, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.function(base, a, b, beta=self.beta, alpha=self.alpha)


class _Multiply(torch.autograd.Function):
    """y = product(a, b), or beta base + alpha product(a, b); keeps packs of a and b.

    That of a only if b needs a gradient, and the other way round.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        base: Tensor | None,
        product: Product,
        added: _Sum | None,
        kept: tuple[Any, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.settings = (product, added, kept)
        ctx.like = (a.dtype, tuple(a.shape), b.dtype, tuple(b.shape))
        ctx.base = None if base is None else (base.dtype, tuple(base.shape))
        y = product.forward(a, b) if added is None or base is None else added(base, a, b)
        return writable(y, of_linear=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        product, added, (rebuild_a, rebuild_b, parts) = ctx.settings
        a_dtype, a_shape, b_dtype, b_shape = ctx.like
        needs_a, needs_b, needs_base = ctx.needs_input_grad[:3]
        tensors = saved_with_operands(ctx)
        dbase = None
        if needs_base:
            dtype, shape = ctx.base
            dbase = as_dtype((dy * added.beta).sum_to_size(shape), dtype)
        if added is not None and added.alpha != 1:
            dy = dy * added.alpha
        # Another dtype than the factors' is that of an accumulation.
        a = rebuild_a(dy.dtype, *tensors[:parts]) if needs_b else None
        b = rebuild_b(dy.dtype, *tensors[parts:]) if needs_a else None
        da, db = product.gradients(dy, a, b)
        if da is not None:
            da = as_dtype(da.sum_to_size(a_shape), a_dtype)
        if db is not None:
            db = as_dtype(db.sum_to_size(b_shape), b_dtype)
        return da, db, dbase, None, None, None, *[None] * len(tensors)


_apply: Callable[..., Tensor] = _Multiply.apply


def _multiply(
    a: Tensor,
    b: Tensor,
    product: Product,
    method: Quantiser,
    base: Tensor | None = None,
    added: _Sum | None = None,
) -> Tensor | None:
    """The product; None where torch's own function is to run, or to raise."""
    if torch.compiler.is_dynamo_compiling():
        return None
    needs_a, needs_b = needs_gradient(a), needs_gradient(b)
    if not (needs_a or needs_b) or a.device != b.device:
        return None
    kind = a.device.type
    casts = autocasts(kind)
    if casts:
        dtype = torch.get_autocast_dtype(kind)
        a, b = _cast(a, dtype), _cast(b, dtype)
        base = None if base is None else _cast(base, dtype)
    if a.dtype != b.dtype or not a.is_floating_point():
        return None
    weights = is_of_parameters(a), is_of_parameters(b)
    both = not any(weights) and not any(map(_is_weight, (a, b)))
    packs = [
        _kept(x, wanted, method.for_attention() if both else method, not of_parameters)
        for x, wanted, of_parameters in ((a, needs_b, weights[0]), (b, needs_a, weights[1]))
    ]
    if all(pack is None or _is_exact(pack) for pack in packs):
        return None if casts else _of_weights(a, b, base, product, added)
    rebuilds = [None if pack is None else reader(pack.reading, pack.rebuild) for pack in packs]
    tensors = [() if pack is None else pack.tensors for pack in packs]
    kept = (*rebuilds, len(tensors[0]))
    y = _apply(a, b, base, product, added, kept, *tensors[0], *tensors[1])
    one, two = packs
    if both and one is not None and two is not None and _is_large(y, a, b) and is_dense(y):
        if base is None:
            sharing.note_pack(y, computed(y, product.forward, (a, b), (one, two)))
        elif added is not None and not base.requires_grad and base.numel() < y.numel():
            packs_of_all = (exact(base), one, two)
            sharing.note_held(y, computed(y, added, (base, a, b), packs_of_all))
    return y


def _of_weights(
    a: Tensor, b: Tensor, base: Tensor | None, product: Product, added: _Sum | None
) -> Tensor:
    """torch's own product, which keeps its factors as they are.

    Where they are parts of a weight, as W + s B A is that of an adapter, those who read the weight
    keep nothing: they compute it again from what is held already.
    """
    operands: tuple[Tensor, ...] = (a, b)
    function: Callable[..., Tensor] = product.forward
    if base is not None and added is not None:
        operands, function = (base, a, b), added
    y: Tensor = function(*operands)
    held = is_parameter(a) or needs_gradient(b), is_parameter(b) or needs_gradient(a)
    if all(held) and (base is None or is_parameter(base)) and _is_large(y, a, b):
        note_computed(y, function, operands, [exact(x) for x in operands])
    return y


def _is_weight(x: Tensor) -> bool:
    """Whether x is computed from tensors that are kept as they are, as an adapted weight is."""
    pack = computed_pack_of(x)
    return pack is not None and is_of_exact(pack.rebuild)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else to(x, dtype)


def _kept(x: Tensor, wanted: bool, method: Quantiser, is_activation: bool) -> Pack | None:
    """What is kept of a factor; None if the other needs no gradient."""
    if not wanted:
        return None
    return pack_operand(x, method) if is_activation else exact(x)


def _is_exact(pack: Pack) -> bool:
    return len(pack.tensors) == 1 and pack.tensors[0] is not None and pack.grade.bits == 64


def _is_large(y: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether a result is no smaller than its factors, as scores of attention are."""
    return y.numel() >= max(a.numel(), b.numel())


# ---- products ------------------------------------------------------------------------------------


def _matmul_gradients(dy: Tensor, a: Tensor | None, b: Tensor | None) -> Gradients:
    da = None if b is None else torch.matmul(dy, b.mT)
    if a is None:
        return da, None
    if dy.dim() > 2 and b is not None and b.dim() == 2:
        return da, _of_rows(a, dy)
    return da, torch.matmul(a.mT, dy)


def _of_rows(a: Tensor, dy: Tensor) -> Tensor:
    """a^T dy over all rows of both."""
    rows = math.prod(a.shape[:-1])
    return a.reshape(rows, a.shape[-1]).t().mm(dy.reshape(rows, dy.shape[-1]))


_MATMUL = Product(torch.matmul, _matmul_gradients)


def matmul(input: Tensor, other: Tensor, *, method: Quantiser) -> Tensor:
    """`torch.matmul`. Keeps packs of both; each gradient is of the packed other factor, unbiased
    where the method is. With a parameter it is a linear layer: dx is exact.
    """
    if input.dim() > 1 and other.dim() > 1:
        y = _multiply(input, other, _MATMUL, method)
        if y is not None:
            return y
    return torch.matmul(input, other)


_BMM = Product(torch.bmm, _matmul_gradients)


def bmm(input: Tensor, mat2: Tensor, *, method: Quantiser) -> Tensor:
    """`torch.bmm`; see `matmul`."""
    y = _multiply(input, mat2, _BMM, method) if input.dim() == mat2.dim() == 3 else None
    return torch.bmm(input, mat2) if y is None else y


def mm(input: Tensor, mat2: Tensor, *, method: Quantiser) -> Tensor:
    """`torch.mm`; see `matmul`."""
    y = _multiply(input, mat2, _MATMUL, method) if input.dim() == mat2.dim() == 2 else None
    return torch.mm(input, mat2) if y is None else y


def baddbmm(
    input: Tensor,
    batch1: Tensor,
    batch2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    method: Quantiser,
) -> Tensor:
    """`torch.baddbmm`; see `matmul`."""
    added = _Sum(torch.baddbmm, beta, alpha)
    y = None
    if batch1.dim() == batch2.dim() == 3:
        y = _multiply(batch1, batch2, _BMM, method, input, added)
    return added(input, batch1, batch2) if y is None else y


def addmm(
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    method: Quantiser,
) -> Tensor:
    """`torch.addmm`; see `matmul`."""
    added = _Sum(torch.addmm, beta, alpha)
    y = None
    if mat1.dim() == mat2.dim() == 2:
        y = _multiply(mat1, mat2, _MATMUL, method, input, added)
    return added(input, mat1, mat2) if y is None else y


@dataclasses.dataclass
class _Einsum:
    """An equation of two operands, each of whose letters is in the other operand or the result."""

    a: str
    b: str
    y: str

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum(f"{self.a},{self.b}->{self.y}", a, b)

    def gradients(self, dy: Tensor, a: Tensor | None, b: Tensor | None) -> Gradients:
        da = None if b is None else torch.einsum(f"{self.y},{self.b}->{self.a}", dy, b)
        db = None if a is None else torch.einsum(f"{self.y},{self.a}->{self.b}", dy, a)
        return da, db


def _parsed(equation: object, dims: tuple[int, int]) -> _Einsum | None:
    """None for an equation whose gradient is another one's, or that is not of two such operands."""
    if not isinstance(equation, str):
        return None
    inputs, arrow, y = equation.replace(" ", "").partition("->")
    a, comma, b = inputs.partition(",")
    if not (arrow and comma) or "," in b:
        return None
    if "..." in inputs:
        rest = [size - len(own.replace("...", "")) for own, size in zip((a, b), dims, strict=True)]
        if "..." not in a or "..." not in b or "..." not in y or rest[0] != rest[1]:
            return None
        unused = [letter for letter in string.ascii_letters if letter not in equation]
        letters = "".join(unused[: rest[0]])
        a, b, y = (own.replace("...", letters) for own in (a, b, y))
    for own, others in ((a, b + y), (b, a + y), (y, a + b)):
        if len(set(own)) != len(own) or not set(own) <= set(others):
            return None
    return _Einsum(a, b, y) if (len(a), len(b)) == dims else None


def einsum(equation: Any, input: Any, other: Any = None, *, method: Quantiser) -> Tensor:
    """`torch.einsum` of two tensors, also in one list; see `matmul`."""
    operands = tuple(input) if isinstance(input, (tuple, list)) else (input, other)
    if len(operands) != 2 or not all(isinstance(x, Tensor) and is_plain(x) for x in operands):
        return torch.einsum(equation, *(x for x in operands if x is not None))
    a, b = operands
    form = _parsed(equation, (a.dim(), b.dim()))
    if form is None:
        return torch.einsum(equation, a, b)
    y = _multiply(a, b, Product(form.forward, form.gradients), method)
    return torch.einsum(equation, a, b) if y is None else y


# ---- products by groups of rows ------------------------------------------------------------------


@dataclasses.dataclass
class _Grouped:
    """Rows of each group by its own matrix: a [rows, in], b [groups, in, out]."""

    offsets: Tensor

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.grouped_mm(a, b, offs=self.offsets)

    def gradients(self, dy: Tensor, a: Tensor | None, b: Tensor | None) -> Gradients:
        da = None if b is None else self.forward(dy, b.mT)
        return da, None if a is None else self.forward(a.mT, dy)


def grouped_mm(
    input: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    method: Quantiser,
) -> Tensor:
    """`torch.nn.functional.grouped_mm` of rows and a matrix for each group; see `matmul`.

    As for the experts of a mixture. Other forms are torch's own.
    """
    is_of_rows = input.dim() == 2 and mat2.dim() == 3 and offs is not None and bias is None
    y = None
    if is_of_rows and out_dtype in (None, input.dtype) and not autocasts(input.device.type):
        assert offs is not None
        groups = _Grouped(offs)
        y = _multiply(input, mat2, Product(groups.forward, groups.gradients), method)
    if y is not None:
        return y
    return F.grouped_mm(input, mat2, offs=offs, bias=bias, out_dtype=out_dtype)


# By what they become in a model's own code.
PRODUCTS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    torch.bmm: bmm,
    Tensor.bmm: bmm,
    torch.mm: mm,
    Tensor.mm: mm,
    torch.baddbmm: baddbmm,
    Tensor.baddbmm: baddbmm,
    torch.addmm: addmm,
    Tensor.addmm: addmm,
    torch.einsum: einsum,
    **dict.fromkeys(_torch.grouped_mm(), grouped_mm),
}
