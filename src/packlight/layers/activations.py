"""Activations and gated units that keep packs of what they read."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch, sharing
from packlight._checks import (
    autocast,
    check_numbers,
    check_tensor,
    needs_gradient,
    refuse_second_derivative,
)
from packlight._seeds import Seed
from packlight.elementwise.derivatives import BACKWARD, FUNCTIONS
from packlight.elementwise.limits import unmarked_limits, within
from packlight.errors import InputError
from packlight.fewbit.activations import CONTINUOUS
from packlight.layers.computed import computed, computed_pack_of
from packlight.pack import Pack
from packlight.packing.layout import compute_dtype, dense_stride, laid_out
from packlight.quantiser import KEEPS, Fused, Quantiser

# ---- what a method without operators of its own does ---------------------------------------------


def within_limits(
    x: Tensor, name: str, method: Quantiser, parameters: tuple[float, ...] = ()
) -> Tensor:
    """`x` as far as f tells it from its limits; what is not finite stays, unless f is flat there.

    So a far value leaves its neighbours in a pack their step.
    """
    return within(x, unmarked_limits(x.dtype, name, parameters, method.grade.bits))


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class Applied:
    """What the pack of the input of an activation stands for, to a reader of the output: f(x)."""

    method: Quantiser
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    name: str
    parameters: tuple[float, ...]

    def __call__(self, dtype: torch.dtype, *kept: Tensor) -> Tensor:
        x = self.method.unpack(torch.float32, self.shape, self.stride, *kept)
        return FUNCTIONS[self.name](x, *self.parameters).to(dtype)


def _forward(
    x: Tensor, name: str, parameters: tuple[float, ...], method: Quantiser, seed: Seed
) -> tuple[Tensor, ...]:
    y = laid_out(FUNCTIONS[name](x, *parameters), dense_stride(x))
    return y, *method.pack(within_limits(x, name, method, parameters), seed)


def _backward(
    grad_output: Tensor,
    kept: tuple[Tensor, ...],
    name: str,
    parameters: tuple[float, ...],
    stride: tuple[int, ...],
    method: Quantiser,
) -> Tensor:
    dtype = compute_dtype(grad_output)
    x = method.unpack(dtype, tuple(grad_output.shape), stride, *kept)
    return BACKWARD[name](grad_output.to(dtype), x, *parameters).to(grad_output.dtype)


def _rebuild(y: Tensor, name: str, parameters: tuple[float, ...], method: Quantiser) -> Applied:
    return Applied(method, tuple(y.shape), y.stride(), name, parameters)


_PLAIN = Fused(_forward, _backward, _rebuild)


def activation_of(method: Quantiser) -> Fused:
    """How the method keeps the input of an activation."""
    return method.fused.get("activation", _PLAIN)


def overwriting_activation_of(method: Quantiser) -> Fused:
    """`activation_of` for values that nothing reads afterwards: results may lie in their memory.

    Of a gradient, dense ones alone.
    """
    if _torch.is_traced():  # a compiler takes memory again by itself
        return activation_of(method)
    return method.fused.get("activation_") or activation_of(method)


# ---- activations ---------------------------------------------------------------------------------


class _Activation(torch.autograd.Function):
    """y = f(x) and the tensors that stand for x; keeps the latter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        name: str,
        parameters: tuple[float, ...],
        method: Quantiser,
        seed: Seed,
    ) -> tuple[Tensor, ...]:
        fused = activation_of(method)
        y, *kept = fused.forward(x, name, parameters, method, seed)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        ctx.f = (name, parameters, y.stride(), method)
        ctx.differentiate = fused.backward
        return y, *kept

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        dx = None
        if grad_output is not None:
            dx = ctx.differentiate(grad_output, ctx.saved_tensors, *ctx.f)
        return dx, None, None, None, None


_activate: Callable[..., tuple[Tensor, ...]] = _torch.applied(_Activation)


@_torch.one_node
def activation(
    x: Tensor, name: str, method: Quantiser, parameters: tuple[float, ...] = ()
) -> Tensor:
    """f(x) by its name in `fewbit/activations.py`. Keeps a pack of x; biased."""
    check_tensor(x, name)
    check_numbers(name, **dict(zip(CONTINUOUS[name].parameters, parameters, strict=True)))
    function = CONTINUOUS[name].function
    if not needs_gradient(x):
        return function(x, *parameters)
    x = autocast(x, name, lambda empty: function(empty, *parameters))
    known = computed_pack_of(x)
    if known is not None:
        return _of_computed(x, name, parameters, known)
    y, *kept = _activate(x, name, parameters, method, method.seed(x))
    rebuild = activation_of(method).rebuild(y, name, parameters, method)
    sharing.note_pack(y, Pack(rebuild, tuple(y.shape), tuple(kept), method.grade))
    if name in UNITS and _torch.is_traced():
        _torch.say(how(name, method))
    return y


class _OfComputed(torch.autograd.Function):
    """y = f(x); keeps the packs from which x is computed, as scores are that tanh caps."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        name: str,
        parameters: tuple[float, ...],
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.f, ctx.rebuild = (name, parameters), rebuild
        return CONTINUOUS[name].function(x, *parameters)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        (name, parameters), tensors = ctx.f, ctx.saved_tensors
        dtype = compute_dtype(grad_output)
        x = ctx.rebuild(dtype, *tensors)
        dx = BACKWARD[name](grad_output.to(dtype), x, *parameters).to(grad_output.dtype)
        return dx, None, None, None, *[None] * len(tensors)


_apply_to_computed: Callable[..., Tensor] = _OfComputed.apply


def _of_computed(x: Tensor, name: str, parameters: tuple[float, ...], known: Pack) -> Tensor:
    def function(x: Tensor) -> Tensor:
        return CONTINUOUS[name].function(x, *parameters)

    y = _apply_to_computed(x, name, parameters, known.rebuild, *known.tensors)
    if y.stride() == x.stride():
        sharing.note_pack(y, computed(y, function, (x,), (known,)))
    return y


def gelu_name(approximate: str) -> str:
    """Which of the two forms of GELU torch's argument asks for."""
    if approximate not in ("none", "tanh"):
        raise InputError(f'approximate={approximate!r} is neither "none" nor "tanh"')
    return "gelu" if approximate == "none" else "gelu_tanh"


# ---- gated units without operators of their own --------------------------------------------------


@dataclasses.dataclass  # not frozen, as above
class GatedProduct:
    """What the packs of gate and up stand for: f(gate) up, in a memory order."""

    method: Quantiser
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    name: str

    def __call__(self, dtype: torch.dtype, *kept: Tensor) -> Tensor:
        f, up = self._factors(torch.float32, *kept)
        return (f * up).to(dtype)

    def factor_gradients(self, dy: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor]:
        """With respect to f(gate) and to up."""
        f, up = self._factors(compute_dtype(dy), *kept)
        return (dy * up).to(dy.dtype), (dy * f).to(dy.dtype)

    def _factors(self, dtype: torch.dtype, *kept: Tensor) -> tuple[Tensor, Tensor]:
        half = len(kept) // 2
        gate = self.method.unpack(dtype, self.shape, self.stride, *kept[:half])
        up = self.method.unpack(dtype, self.shape, self.stride, *kept[half:])
        return FUNCTIONS[self.name](gate), up


def _forward_gated(
    gate: Tensor, up: Tensor, name: str, method: Quantiser, seed: Seed, seed_of_up: Seed
) -> tuple[Tensor, ...]:
    stride = dense_stride(gate)
    if name == "sigmoid":  # F.glu, which does not round the sigmoid to the tensors' dtype
        product = F.glu(torch.stack([up, gate]), 0)[0]
    else:
        product = FUNCTIONS[name](gate) * up
    gate_pack = method.pack(within_limits(gate, name, method), seed)
    return laid_out(product, stride), *gate_pack, *method.pack(laid_out(up, stride), seed_of_up)


def _backward_gated(
    grad_output: Tensor,
    kept: tuple[Tensor, ...],
    name: str,
    stride: tuple[int, ...],
    method: Quantiser,
) -> tuple[Tensor, Tensor]:
    dtype, shape, half = compute_dtype(grad_output), tuple(grad_output.shape), len(kept) // 2
    gate = method.unpack(dtype, shape, stride, *kept[:half])
    up = method.unpack(dtype, shape, stride, *kept[half:])
    dy = grad_output.to(dtype)
    dgate, dup = BACKWARD[name](dy * up, gate), dy * FUNCTIONS[name](gate)
    return dgate.to(grad_output.dtype), dup.to(grad_output.dtype)


def _rebuild_gated(
    shape: tuple[int, ...], stride: tuple[int, ...], name: str, method: Quantiser
) -> GatedProduct:
    return GatedProduct(method, shape, stride, name)


_PLAIN_GATED = Fused(_forward_gated, _backward_gated, _rebuild_gated)


def unit_of(method: Quantiser) -> Fused:
    """How the method keeps the factors of a gated unit."""
    return method.fused.get("gated", _PLAIN_GATED)


def overwriting_unit_of(method: Quantiser) -> Fused:
    """`unit_of` where nothing reads the gradient of the product, which is dense, afterwards."""
    if _torch.is_traced():
        return unit_of(method)
    return method.fused.get("gated_") or unit_of(method)


# ---- gated units ---------------------------------------------------------------------------------

# Activations of gates that nothing but the product reads. That of a sigmoid is often read twice.
UNITS = ("silu", "gelu", "gelu_tanh")


def how(name: str, method: Quantiser) -> str:
    """By what a traced activation was computed."""
    bits, group_size, unbiased = method.grade
    return f"{name} {type(method).__name__} {bits} {group_size} {unbiased}"


class _Gated(torch.autograd.Function):
    """y = f(gate) up, and the packs of gate and up, which it keeps."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, name: str, method: Quantiser, *seeds: Seed
    ) -> tuple[Tensor, ...]:
        fused = unit_of(method)
        y, *packs = fused.forward(gate, up, name, method, *seeds)
        ctx.mark_non_differentiable(*packs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*packs)
        ctx.f = (name, y.stride(), method)
        ctx.differentiate = fused.backward
        return y, *packs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        dgate = dup = None
        if grad_output is not None:
            dgate, dup = ctx.differentiate(grad_output, ctx.saved_tensors, *ctx.f)
        return dgate, dup, None, None, None, None


_apply_gated: Callable[..., tuple[Tensor, ...]] = _torch.applied(_Gated)


@dataclasses.dataclass  # not frozen, as above
class PackedFactors:
    """f(gate) up of packs that are kept of both factors already."""

    rebuilds: tuple[Callable[..., Tensor], Callable[..., Tensor]]
    name: str
    parts: int  # of the pack of gate

    def __call__(self, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        gate, up = self.factors(torch.float32, *tensors)
        return (FUNCTIONS[self.name](gate) * up).to(dtype)

    def factors(self, dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        gate = self.rebuilds[0](dtype, *tensors[: self.parts])
        return gate, self.rebuilds[1](dtype, *tensors[self.parts :])


class _GatedOfPacks(torch.autograd.Function):
    """y = f(gate) up; keeps the packs that there are of both."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        plain: Callable[..., Tensor],
        factors: PackedFactors,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.factors = factors
        return plain(gate, up)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        tensors, dtype, name = ctx.saved_tensors, compute_dtype(grad_output), ctx.factors.name
        gate, up = ctx.factors.factors(dtype, *tensors)
        dy = grad_output.to(dtype)
        dgate, dup = BACKWARD[name](dy * up, gate), dy * FUNCTIONS[name](gate)
        dgate, dup = dgate.to(grad_output.dtype), dup.to(grad_output.dtype)
        return dgate, dup, None, None, *[None] * len(tensors)


_apply_to_packs: Callable[..., Tensor] = _GatedOfPacks.apply


def _gated_of_packs(
    gate: Tensor, up: Tensor, name: str, method: Quantiser, plain: Callable[..., Tensor]
) -> Tensor | None:
    """The unit where packs as good are kept of both factors already; None elsewhere."""
    one = sharing.pack_of(gate, method.grade)
    two = None if one is None else sharing.pack_of(up, method.grade)
    if one is None or two is None:
        return None
    factors = PackedFactors((one.rebuild, two.rebuild), name, len(one.tensors))
    tensors = (*one.tensors, *two.tensors)
    y = _apply_to_packs(gate, up, plain, factors, *tensors)
    pack = Pack(factors, tuple(y.shape), tensors, one.grade.and_of(two.grade))
    sharing.note_pack(y, pack)
    return y


def gated(
    gate: Tensor, up: Tensor, name: str, method: Quantiser, plain: Callable[..., Tensor]
) -> Tensor:
    """f(gate) up, by its name and by torch's functions. Keeps packs of gate and up; biased.

    Packs that are kept of both already serve, as behind scales that are trained.
    """
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
    of_packs = _gated_of_packs(gate, up, name, method, plain)
    if of_packs is not None:
        return of_packs
    fused = "gated" in method.fused  # one seed serves both
    seeds = (method.seed(gate), None if fused else method.seed(gate))
    y, *packs = _apply_gated(gate, up, name, method, *seeds)
    shape = tuple(y.shape)
    rebuild = unit_of(method).rebuild(shape, y.stride(), name, method)
    sharing.note_pack(y, Pack(rebuild, shape, tuple(packs), method.grade))
    return y
