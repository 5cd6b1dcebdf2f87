"""Layer norm and RMS norm that keep a pack of the normalised value, which the next layer shares."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch, sharing
from packlight._checks import autocast, check_tensor, refuse_second_derivative
from packlight._gradients import as_dtype
from packlight._seeds import Seed
from packlight.pack import Pack
from packlight.packing.layout import compute_dtype
from packlight.quantiser import KEEPS, Fused, Quantiser, worth_packing
from packlight.reading import reading_of

# ---- what a method without operators of its own does ---------------------------------------------


def normalise(x: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """x_hat [rows, width] and rstd [rows, 1] in the dtype that torch computes in."""
    values = x.to(compute_dtype(x))
    if center:
        values = values - values.mean(-1, keepdim=True)
    rstd = (values.square().mean(-1, keepdim=True) + eps).rsqrt()
    return values * rstd, rstd


def differentiate(
    grad_output: Tensor,
    x_hat: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    center: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = rstd (g - mean g - x~ mean(g x~)), g = dy weight; dweight = sum dy x~, dbias = sum dy.

    `grad_output` is [..., width], of two dimensions or more. Sums that are not needed are empty.
    """
    others = grad_output.shape[:-1]
    dtype = compute_dtype(grad_output)
    x_hat = x_hat.to(dtype).view(grad_output.shape)
    dy = grad_output.to(dtype)
    g = dy if weight is None else dy * weight.to(dtype)
    dx = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
    if center:
        dx = dx - g.mean(-1, keepdim=True)
    dx = (dx * rstd.to(dtype).view(*others, 1)).to(grad_output.dtype)
    nothing = dy.new_empty(0)
    rows = tuple(range(len(others)))
    dweight = (dy * x_hat).sum(rows) if need_weight else nothing
    dbias = dy.sum(rows) if need_bias else nothing
    return dx, dweight, dbias


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class Scaled:
    """What the pack of x_hat stands for, to a reader of the output: x~ weight + bias."""

    method: Quantiser
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    rows: int
    width: int

    def __call__(self, dtype: torch.dtype, *tensors: Any) -> Tensor:
        *kept, weight, bias = tensors
        y = self.method.unpack(torch.float32, (self.rows, self.width), (self.width, 1), *kept)
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
        return y.to(dtype).as_strided(self.shape, self.stride)


def plain_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    method: Quantiser,
    seed: Seed,
) -> tuple[Tensor, Tensor, list[Tensor], tuple[Tensor, ...]]:
    """y and rstd of `x` [..., width], copies of the parameters, and tensors that stand for x_hat.

    The copies are empty where there is no parameter.
    """
    width = (x.shape[-1],)
    y = F.layer_norm(x, width, weight, bias, eps) if center else F.rms_norm(x, width, weight, eps)
    x_hat, rstd = normalise(x, eps, center)
    copies = [x.new_empty(0) if p is None else p.clone() for p in (weight, bias)]
    return y, rstd.view(-1), copies, method.pack(x_hat, seed)


def plain_backward(
    grad_output: Tensor,
    kept: tuple[Tensor, ...],
    rstd: Tensor,
    weight: Tensor | None,
    center: bool,
    need_weight: bool,
    need_bias: bool,
    method: Quantiser,
) -> tuple[Tensor, Tensor, Tensor]:
    width = grad_output.shape[-1]
    shape = (grad_output.numel() // width, width)
    x_hat = method.unpack(compute_dtype(grad_output), shape, (width, 1), *kept)
    return differentiate(grad_output, x_hat, rstd, weight, center, need_weight, need_bias)


def plain_rebuild(y: Tensor, width: int, method: Quantiser) -> Scaled:
    return Scaled(method, tuple(y.shape), y.stride(), y.numel() // width, width)


def plain_rounded(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, method: Quantiser, seed: Seed
) -> tuple[Tensor, Tensor, list[Tensor], tuple[Tensor, ...]]:
    """What `plain_forward` gives, of an RMS norm whose x_hat is rounded before it is scaled."""
    forward = row_norm_of(method).forward
    x_hat, rstd, _, kept = forward(x, None, None, eps, False, method, seed)
    return weight * x_hat.to(dtype), rstd, [weight.clone()], kept


_PLAIN = Fused(plain_forward, plain_backward, plain_rebuild)


# Rows of fewer elements have a statistic of more than 4 bits an element.
_NARROWEST = 8


def row_norm_of(method: Quantiser, width: int | None = None) -> Fused:
    """How the method keeps the normalised value of rows of this width.

    Rows that are narrower than a group are packed together, as normalised values are alike.
    """
    narrow = width is not None and not method.keeps_rows(width)
    return _PLAIN if narrow else method.fused.get("norm", _PLAIN)


def rounded_norm_of(method: Quantiser) -> Fused:
    """How the method keeps what an RMS norm rounds before it scales it.

    Its backward pass, which is that of other norms too, takes what is added to the gradient.
    """
    found = method.fused.get("rounded_norm")
    if found is not None:
        return found
    plain = row_norm_of(method)
    return plain._replace(forward=plain_rounded, backward=adding(plain.backward))


def adding(backward: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The backward pass of a norm, with a last argument that is added to dx, unless it is None."""

    def added_to(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        *others, added = given
        dx, dweight, dbias = backward(*others)
        return dx if added is None else dx.add_(added), dweight, dbias

    return added_to


def _keeps(x: Tensor, width: int, method: Quantiser) -> bool:
    """Whether a norm over rows of this width packs them."""
    if method.keeps_rows(width):
        return True
    traced = torch.compiler.is_dynamo_compiling()
    return width >= _NARROWEST and not traced and worth_packing(x, method)


# ---- norms of rows -------------------------------------------------------------------------------


class _Norm(torch.autograd.Function):
    """y, the tensors that stand for x_hat, and copies of the parameters; keeps all but y, and rstd.

    The copies are for readers, which rebuild y in their own backward pass: by then an optimizer may
    have changed the parameters, or FSDP freed them. What a compiled region keeps is the region's
    own, so there are none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        width: int,
        eps: float,
        center: bool,
        method: Quantiser,
        seed: Seed,
    ) -> tuple[Tensor, ...]:
        rows = norm_rows(x, width)
        fused = row_norm_of(method, width)
        y, rstd, copies, kept = fused.forward(rows, weight, bias, eps, center, method, seed)
        if _torch.is_traced():
            copies = []
        ctx.mark_non_differentiable(*copies, *kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rstd, *own_parameters(copies, weight, bias), *kept)
        ctx.settings = (width, center, method)
        ctx.differentiate = fused.backward
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        return shaped(y, x.shape), *copies, *kept

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        if grad_output is None:
            return (None,) * 8
        rstd, weight, _, *kept = ctx.saved_tensors  # the bias is the readers'
        width, center, method = ctx.settings
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx, dweight, dbias = ctx.differentiate(
            as_rows(grad_output, width), kept, rstd, weight, center, need_weight, need_bias, method
        )
        return (
            shaped_as(dx, grad_output) if need_input else None,
            as_dtype(dweight, ctx.dtypes[0]) if need_weight else None,
            as_dtype(dbias, ctx.dtypes[1]) if need_bias else None,
            *[None] * 5,
        )


_apply: Callable[..., tuple[Tensor, ...]] = _torch.applied(_Norm)


def own_parameters(
    copies: Sequence[Tensor], *parameters: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The copies of parameters that a norm makes, None for None; themselves where it makes none."""
    if not copies:
        return parameters
    pairs = zip(copies, parameters, strict=True)
    return tuple([None if parameter is None else copy for copy, parameter in pairs])


def norm_rows(x: Tensor, width: int) -> Tensor:
    """A contiguous input of a norm as [..., width]: in its own shape where it can be.

    The result is then no view. A compiler gets [rows, width].
    """
    if x.shape[-1] == width and not _torch.is_traced():
        return x.contiguous()
    return x.reshape(-1, width).contiguous()


def as_rows(grad_output: Tensor, width: int) -> Tensor:
    """A contiguous gradient [..., width] of two dimensions or more.

    In its own shape where it can be: to that a compiler adds the gradients that pass a norm by, and
    it fuses with the sums along rows what has their shape.
    """
    dy = grad_output.contiguous()
    return dy if dy.dim() > 1 and dy.shape[-1] == width else dy.view(-1, width)


def shaped_as(dx: Tensor, grad_output: Tensor) -> Tensor:
    """`dx.view(grad_output.shape)`, without the call where that is its shape."""
    return dx if dx.shape == grad_output.shape else dx.view(grad_output.shape)


def _flat(parameter: Tensor | None) -> Tensor | None:
    """The parameter itself where it is flat: a view is one more node of the graph."""
    if parameter is None or parameter.dim() == 1:
        return parameter
    return parameter.reshape(-1)


def shaped(y: Tensor, shape: torch.Size) -> Tensor:
    """`y.view(shape)`, but a tensor of its own: views of it are views of what carries the note."""
    if y.shape == shape and not _torch.is_traced():
        return y
    shaped: Tensor = torch.ops.aten._unsafe_view(y, shape)
    return shaped


def _norm(
    x: Tensor,
    name: str,
    plain: Callable[[Tensor], Tensor],
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    method: Quantiser,
) -> Tensor:
    check_tensor(x, name)
    wanted = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )
    width = math.prod(normalized_shape)
    fits = x.shape[x.dim() - len(normalized_shape) :] == normalized_shape
    if not (wanted and fits and _keeps(x, width, method)):
        return plain(x)  # raises for shapes that do not fit
    asked = (name, None if weight is None else weight.dtype)
    x = autocast(x, asked, lambda empty: plain(empty.view(0, *normalized_shape)))
    if eps is None:  # as torch has it: that of the dtype in which it computes
        eps = torch.finfo(compute_dtype(x)).eps
    parameters: tuple[Tensor | None, ...] = (_flat(weight), _flat(bias))
    center = name == "layer_norm"
    y, *kept = _apply(x, *parameters, width, eps, center, method, method.seed(x))
    if not _torch.is_traced():
        parameters = own_parameters(kept[:2], *parameters)
        kept = kept[2:]
    rebuild = row_norm_of(method, width).rebuild(y, width, method)
    tensors = (*kept, *parameters)
    pack = Pack(rebuild, tuple(y.shape), tensors, method.grade, reading_of(rebuild))
    sharing.note_pack(y, pack)
    return y


@_torch.one_node
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    method: Quantiser,
) -> Tensor:
    """(x - mean) rstd weight + bias over the last dimensions, `normalized_shape`.

    Keeps a pack of x_hat = (x - mean) rstd, from which the next `linear` rebuilds its input, and
    rstd, 32 bits a row. With x~ the packed value, dx = rstd (g - mean g - x~ mean(g x~)) for
    g = dy weight, and dweight = sum dy x~, which is unbiased where the method is; dbias is exact.
    """
    shape = tuple(normalized_shape)

    def plain(x: Tensor) -> Tensor:
        return F.layer_norm(x, shape, weight, bias, eps)

    return _norm(input, "layer_norm", plain, shape, weight, bias, eps, method)


@_torch.one_node
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    method: Quantiser,
) -> Tensor:
    """x rstd weight over the last dimensions, rstd = 1 / sqrt(mean x^2 + eps).

    Keeps what `layer_norm` keeps; dx = rstd (g - x~ mean(g x~)).
    """
    shape = tuple(normalized_shape)

    def plain(x: Tensor) -> Tensor:
        return F.rms_norm(x, shape, weight, eps)

    return _norm(input, "rms_norm", plain, shape, weight, None, eps, method)
