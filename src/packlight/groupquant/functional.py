"""Functions that keep group-quantised tensors: torch.nn.functional's names and arguments, plus
`bits`, `group_size` and `rounding` as `GroupQuant` has them.

Each computes what torch's function computes. What differs is what is kept for the backward pass: a
pack of `bits + 32 / group_size` bits an element in place of 16 or 32. A tensor that several
functions need is packed once, with the bits of the first that does:

- functions that read one tensor (q, k, v) share its pack;
- `linear` keeps nothing of its own where its input was made by a norm, an activation or a gated
  unit of this module: it rebuilds its input from what they keep.

Gradients of `linear` with respect to input and bias are exact; the weight's is unbiased with
stochastic rounding, where the pack is of the input itself, and biased where the input is rebuilt
through an activation. Where no gradient is asked for nothing is packed and the plain torch function
runs. A second derivative raises `DoubleBackwardError`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _tracer, sharing
from packlight._checks import (
    autocast,
    check_numbers,
    check_tensor,
    needs_gradient,
    refuse_second_derivative,
    saved_with_weight,
)
from packlight._gradients import column_sums, product, recast
from packlight._overwrite import writable
from packlight._seeds import Seed, operands
from packlight.errors import InputError
from packlight.fewbit.activations import CONTINUOUS
from packlight.groupquant import ops
from packlight.groupquant.method import GroupQuant, Rounding
from packlight.groupquant.packs import (
    KEEPS,
    GatedProduct,
    Rebuild,
    draw,
    pack_input,
    worth_packing,
)
from packlight.sharing import Pack

_DEFAULT = GroupQuant()


# --- Linear.


class _Linear(torch.autograd.Function):
    """y = x W^T + b; keeps W and the pack of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        y = writable(F.linear(x, weight, bias))
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *tensors)
        ctx.rebuild = rebuild
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        weight, *tensors = saved_with_weight(ctx)
        if ctx.needs_input_grad[0]:
            weight = recast(weight, grad_output)
        rows = grad_output.reshape(math.prod(grad_output.shape[:-1]), grad_output.shape[-1])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = rows.mm(weight).view(*grad_output.shape[:-1], -1).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            x = ctx.rebuild(grad_output.dtype, *tensors)
            dweight = product(rows.t(), x.reshape(rows.shape[0], -1), ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            wide = torch.promote_types(rows.dtype, ctx.bias_dtype)
            dbias = column_sums(rows, wide).to(ctx.bias_dtype)
        return dx, dweight, dbias, None, *[None] * len(tensors)


_apply_linear: Callable[..., Tensor] = _Linear.apply


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """x W^T + b, x [..., in], W [out, in], b [out].

    Keeps `bits + 32 / group_size` bits an element of x, or nothing where x is packed already, and W
    itself. Input and bias gradients exact, weight gradient unbiased with stochastic rounding.
    """
    return _linear(input, weight, bias, GroupQuant(bits, group_size, rounding))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, method: GroupQuant) -> Tensor:
    check_tensor(x, "linear")
    if not (needs_gradient(weight) and worth_packing(x, method)):
        return F.linear(x, weight, bias)
    kept = pack_input(x, method)
    return _apply_linear(x, weight, bias, kept.rebuild, *kept.tensors)


# --- Activations.


class _Activation(torch.autograd.Function):
    """y = f(x), codes and scales of x; keeps the latter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        name: str,
        parameters: tuple[float, ...],
        bits: int,
        group_size: int,
        seed: Seed,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, codes, scales = ops.activation(x, name, parameters, bits, group_size, *operands(seed))
        ctx.mark_non_differentiable(codes, scales)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(codes, scales)
        ctx.f = (name, parameters, y.stride(), bits, group_size)
        return y, codes, scales

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        dx = None
        if grad_output is not None:
            dx = ops.activation_backward(grad_output, *ctx.saved_tensors, *ctx.f)
        return dx, None, None, None, None, None


_activate: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Activation.apply


def _activation(
    x: Tensor, name: str, method: GroupQuant, parameters: tuple[float, ...] = ()
) -> Tensor:
    check_tensor(x, name)
    check_numbers(name, **dict(zip(CONTINUOUS[name].parameters, parameters, strict=True)))
    function = CONTINUOUS[name].function
    if not needs_gradient(x):
        return function(x, *parameters)
    x = autocast(x, name, lambda empty: function(empty, *parameters))
    seed = draw(x, method)
    y, codes, scales = _activate(x, name, parameters, method.bits, method.group_size, seed)
    layout = (tuple(y.shape), y.stride(), y.numel(), method.bits, method.group_size)
    rebuild = Rebuild(*layout, name, parameters)
    sharing.note_pack(y, Pack(rebuild, tuple(y.shape), (codes, scales), method.grade))
    if torch.compiler.is_compiling() and name in UNITS:
        _tracer.note_source(y, x, how(name, method))
    return y


def _gelu_name(approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise InputError(f'approximate={approximate!r} is neither "none" nor "tanh"')
    return "gelu" if approximate == "none" else "gelu_tanh"


def celu(
    input: Tensor,
    alpha: float = 1.0,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """max(0, x) + min(0, alpha (e^(x / alpha) - 1)). Keeps a pack of x; biased."""
    return _activation(input, "celu", GroupQuant(bits, group_size, rounding), (alpha,))


def elu(
    input: Tensor,
    alpha: float = 1.0,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """x for x > 0, else alpha (e^x - 1). Keeps a pack of x; biased."""
    return _activation(input, "elu", GroupQuant(bits, group_size, rounding), (alpha,))


def gelu(
    input: Tensor,
    approximate: str = "none",
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """x Phi(x), or its tanh approximation. Keeps a pack of x; biased."""
    name = _gelu_name(approximate)
    return _activation(input, name, GroupQuant(bits, group_size, rounding))


def hardswish(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """x min(max(x + 3, 0), 6) / 6. Keeps a pack of x; biased."""
    return _activation(input, "hardswish", GroupQuant(bits, group_size, rounding))


def logsigmoid(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """log(1 / (1 + e^-x)). Keeps a pack of x; biased."""
    return _activation(input, "logsigmoid", GroupQuant(bits, group_size, rounding))


def mish(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """x tanh(log(1 + e^x)). Keeps a pack of x; biased."""
    return _activation(input, "mish", GroupQuant(bits, group_size, rounding))


def quick_gelu(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """x sigmoid(1.702 x), as in CLIP. Keeps a pack of x; biased."""
    return _activation(input, "quick_gelu", GroupQuant(bits, group_size, rounding))


def relu_squared(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """max(x, 0)^2, from Primer. Keeps a pack of x; biased."""
    return _activation(input, "relu_squared", GroupQuant(bits, group_size, rounding))


def selu(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """Self-normalising ELU. Keeps a pack of x; biased."""
    return _activation(input, "selu", GroupQuant(bits, group_size, rounding))


def sigmoid(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """1 / (1 + e^-x). Keeps a pack of x; biased."""
    return _activation(input, "sigmoid", GroupQuant(bits, group_size, rounding))


def silu(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """x sigmoid(x), also called swish. Keeps a pack of x; biased."""
    return _activation(input, "silu", GroupQuant(bits, group_size, rounding))


def softplus(
    input: Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """log(1 + e^(beta x)) / beta, and x where beta x > threshold. Keeps a pack of x; biased."""
    return _activation(input, "softplus", GroupQuant(bits, group_size, rounding), (beta, threshold))


def softsign(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """x / (1 + |x|). Keeps a pack of x; biased."""
    return _activation(input, "softsign", GroupQuant(bits, group_size, rounding))


def tanh(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """Hyperbolic tangent. Keeps a pack of x; biased."""
    return _activation(input, "tanh", GroupQuant(bits, group_size, rounding))


def tanhshrink(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """x - tanh(x). Keeps a pack of x; biased."""
    return _activation(input, "tanhshrink", GroupQuant(bits, group_size, rounding))


# --- Gated units.

# Activations of gates that nothing but the product reads. That of a sigmoid is often read twice.
UNITS = ("silu", "gelu", "gelu_tanh")


def how(name: str, method: GroupQuant) -> str:
    """By what a traced activation was computed."""
    return f"{name} {method.bits} {method.group_size} {method.rounding}"


class _Gated(torch.autograd.Function):
    """y = f(gate) up, and the packs of gate and up, which it keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        name: str,
        bits: int,
        group_size: int,
        seed: Seed,
    ) -> tuple[Tensor, ...]:
        y, *packs = ops.gated(gate, up, name, bits, group_size, *operands(seed))
        ctx.mark_non_differentiable(*packs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*packs)
        ctx.f = (name, y.stride(), bits, group_size)
        return y, *packs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        dgate = dup = None
        if grad_output is not None:
            dgate, dup = ops.gated_backward(grad_output, *ctx.saved_tensors, *ctx.f, True)
        return dgate, dup, None, None, None, None


_apply_gated: Callable[..., tuple[Tensor, ...]] = _Gated.apply


def gated(
    gate: Tensor, up: Tensor, name: str, method: GroupQuant, plain: Callable[..., Tensor]
) -> Tensor:
    """f(gate) up, by its name and by torch's functions."""
    check_tensor(gate, name)
    check_tensor(up, name)
    if gate.shape != up.shape or gate.device != up.device:
        raise InputError(
            f"gate is {tuple(gate.shape)} on {gate.device}, up is {tuple(up.shape)} on {up.device};"
            " a gated unit multiplies tensors of one shape on one device"
        )
    wanted = needs_gradient(gate) or needs_gradient(up)
    if not wanted or gate.dtype != up.dtype:
        return plain(gate, up)
    if torch.compiler.is_compiling():
        up = _tracer.apart(up, gate)
    seed = draw(gate, method)
    y, *packs = _apply_gated(gate, up, name, method.bits, method.group_size, seed)
    product = GatedProduct(name, tuple(y.shape), y.stride(), method.bits, method.group_size)
    sharing.note_pack(y, Pack(product, tuple(y.shape), tuple(packs), method.grade))
    return y


def swiglu(
    gate: Tensor,
    up: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """silu(gate) up, the gated unit of Llama.

    Keeps packs of gate and up, from which a `linear` that reads the product rebuilds it; biased.
    """
    method = GroupQuant(bits, group_size, rounding)
    return gated(gate, up, "silu", method, lambda gate, up: F.silu(gate) * up)


def geglu(
    gate: Tensor,
    up: Tensor,
    approximate: str = "none",
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """gelu(gate) up, with either form of GELU.

    Keeps packs of gate and up, from which a `linear` that reads the product rebuilds it; biased.
    """
    method = GroupQuant(bits, group_size, rounding)
    return gated(
        gate,
        up,
        _gelu_name(approximate),
        method,
        lambda gate, up: F.gelu(gate, approximate=approximate) * up,
    )


def reglu(
    gate: Tensor,
    up: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """relu(gate) up. The mask is that of the packed gate.

    Keeps packs of gate and up, from which a `linear` that reads the product rebuilds it; biased.
    """
    method = GroupQuant(bits, group_size, rounding)
    return gated(gate, up, "relu", method, lambda gate, up: F.relu(gate) * up)


def glu(
    input: Tensor,
    dim: int = -1,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """a sigmoid(b) for the halves a and b of `input` along `dim`.

    Keeps packs of gate and up, from which a `linear` that reads the product rebuilds it; biased.
    """
    check_tensor(input, "glu")
    if input.dim() == 0 or input.shape[dim] % 2:
        raise InputError(
            f"glu halves dimension {dim} of shape {tuple(input.shape)}; it is not even"
        )
    up, gate = input.chunk(2, dim)
    method = GroupQuant(bits, group_size, rounding)
    return gated(gate, up, "sigmoid", method, lambda gate, up: F.glu(input, dim))
