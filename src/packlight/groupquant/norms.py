"""Layer norm and RMS norm that keep a pack of the normalised value, which the next layer shares."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import sharing
from packlight._checks import autocast, check_tensor, refuse_second_derivative
from packlight._seeds import Seed, operands
from packlight.groupquant.method import GroupQuant, Rounding, row_group_size
from packlight.groupquant.packs import KEEPS, Rebuild, draw
from packlight.groupquant.traced_norms import as_rows, operators
from packlight.packing.layout import compute_dtype
from packlight.sharing import Pack

_DEFAULT = GroupQuant()


class _Norm(torch.autograd.Function):
    """y, codes and scales of x_hat, and copies of the parameters; keeps all but y, and rstd.

    The copies are for readers, which rebuild y in their own backward pass: by then an optimizer may
    have changed the parameters, or FSDP freed them.
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
        bits: int,
        group_size: int,
        seed: Seed,
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, width)
        normalise = operators(width, group_size)[0]
        y, codes, scales, rstd, *copies = normalise(
            rows.contiguous(), width, weight, bias, eps, center, bits, group_size, *operands(seed)
        )
        ctx.mark_non_differentiable(codes, scales, *copies)
        ctx.set_materialize_grads(False)
        own = own_parameters(copies, weight, bias)
        ctx.save_for_backward(codes, scales, rstd, *own)
        ctx.settings = (width, center, bits, group_size)
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        return _shaped(y, x.shape), codes, scales, *copies

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        if grad_output is None:
            return (None,) * 9
        codes, scales, rstd, weight, _ = ctx.saved_tensors
        width, center, bits, group_size = ctx.settings
        _, need_weight, need_bias = ctx.needs_input_grad[:3]
        dy = as_rows(grad_output, width)
        differentiate = operators(width, group_size)[1]
        dx, dweight, dbias = differentiate(
            dy, codes, scales, rstd, weight, center, need_weight, need_bias, bits, group_size
        )
        return (
            dx.view(grad_output.shape) if ctx.needs_input_grad[0] else None,
            dweight.to(ctx.dtypes[0]) if need_weight else None,
            dbias.to(ctx.dtypes[1]) if need_bias else None,
            *[None] * 6,
        )


def own_parameters(
    copies: Sequence[Tensor], *parameters: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The copies of parameters that a norm makes, None for None; themselves where it makes none."""
    if not copies:
        return parameters
    pairs = zip(copies, parameters, strict=True)
    return tuple(None if parameter is None else copy for copy, parameter in pairs)


def _flat(parameter: Tensor | None) -> Tensor | None:
    """The parameter itself where it is flat: a view is one more node of the graph."""
    if parameter is None or parameter.dim() == 1:
        return parameter
    return parameter.reshape(-1)


def _shaped(y: Tensor, shape: torch.Size) -> Tensor:
    """`y.view(shape)`, but a tensor of its own: views of it are views of what carries the note."""
    shaped: Tensor = torch.ops.aten._unsafe_view(y, shape)
    return shaped


_apply_norm: Callable[..., tuple[Tensor, ...]] = _Norm.apply


def _norm(
    x: Tensor,
    name: str,
    plain: Callable[[Tensor], Tensor],
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    method: GroupQuant,
) -> Tensor:
    check_tensor(x, name)
    wanted = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )
    width = math.prod(normalized_shape)
    group_size = row_group_size(width, method.group_size)
    fits = x.shape[x.dim() - len(normalized_shape) :] == normalized_shape
    if group_size is None or not fits or not wanted:
        return plain(x)  # raises for shapes that do not fit
    asked = (name, None if weight is None else weight.dtype)
    x = autocast(x, asked, lambda empty: plain(empty.view(0, *normalized_shape)))
    if eps is None:  # as torch has it: that of the dtype in which it computes
        eps = torch.finfo(compute_dtype(x)).eps
    flat_weight, flat_bias = _flat(weight), _flat(bias)
    y, codes, scales, *copies = _apply_norm(
        x,
        flat_weight,
        flat_bias,
        width,
        eps,
        name == "layer_norm",
        method.bits,
        group_size,
        draw(x, method),
    )
    rebuild = Rebuild(tuple(y.shape), y.stride(), width, method.bits, group_size)
    kept = (codes, scales, *own_parameters(copies, flat_weight, flat_bias))
    sharing.note_pack(y, Pack(rebuild, tuple(y.shape), kept, method.grade))
    return y


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """(x - mean) rstd weight + bias over the last dimensions, `normalized_shape`.

    Keeps a pack of x_hat = (x - mean) rstd, from which the next `linear` rebuilds its input, and
    rstd: `bits + 32 / group_size` bits an element and 32 a row. With x~ the packed value,
    dx = rstd (g - mean g - x~ mean(g x~)) for g = dy weight, and dweight = sum dy x~, which is
    unbiased with stochastic rounding; dbias is exact.
    """
    shape = tuple(normalized_shape)

    def plain(x: Tensor) -> Tensor:
        return F.layer_norm(x, shape, weight, bias, eps)

    method = GroupQuant(bits, group_size, rounding)
    return _norm(input, "layer_norm", plain, shape, weight, bias, eps, method)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """x rstd weight over the last dimensions, rstd = 1 / sqrt(mean x^2 + eps).

    Keeps what `layer_norm` keeps; dx = rstd (g - x~ mean(g x~)).
    """
    shape = tuple(normalized_shape)

    def plain(x: Tensor) -> Tensor:
        return F.rms_norm(x, shape, weight, eps)

    method = GroupQuant(bits, group_size, rounding)
    return _norm(input, "rms_norm", plain, shape, weight, None, eps, method)
