"""RMS norms of transformers, known by their code: there are more than a hundred copies.

| the code of | computes, with x_hat = x / sqrt(mean x^2 + eps) in float32 |
| --- | --- |
| LlamaRMSNorm | weight * x_hat, where x_hat is rounded to the dtype of x first |
| T5LayerNorm | weight * x_hat, where x_hat is rounded to the dtype of a 16-bit weight first |
| GemmaRMSNorm | (1 + weight) * x_hat, rounded once |
| GptOssRMSNorm | weight * x_hat, rounded once |

`GroupQuant` keeps a pack of x_hat and 32 bits a row, and repeats these roundings: the reference
gives the bits of the plain layer, in float32, bfloat16 and float16. `Inverted` keeps the output
and 32 bits a row, and takes the first two where x and weight have one dtype; it rounds once, so in
16 bits the output is within 1 unit in the last place of the plain layer's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from packlight import _torch, sharing
from packlight._checks import check_tensor, is_taken, needs_gradient, refuse_second_derivative
from packlight._classes import joined
from packlight._seeds import Seed
from packlight.groupquant.modules import Quantised
from packlight.integrations._copies import is_copy, once_a_class
from packlight.inverted import norms as inverted
from packlight.inverted.method import Inverted
from packlight.inverted.norm_modules import InvertedNorm
from packlight.layers.norms import (
    as_rows,
    norm_rows,
    own_parameters,
    rms_norm,
    rounded_norm_of,
    shaped,
    shaped_as,
)
from packlight.method import Method, Rule, Swap, rule_finder
from packlight.pack import Pack
from packlight.quantiser import KEEPS, Quantiser
from packlight.reading import reading_of

_SHORT = (torch.bfloat16, torch.float16)


# --- The code that is known, as transformers has it. Never run: `is_copy` compares with it.


def _llama(self: Any, hidden_states: Any) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def _t5(self: Any, hidden_states: Any) -> Any:
    variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    if self.weight.dtype in [torch.float16, torch.bfloat16]:
        hidden_states = hidden_states.to(self.weight.dtype)
    return self.weight * hidden_states


def _gemma(self: Any, x: Any) -> Any:
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)


def _gemma_norm(self: Any, x: Any) -> Any:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _gpt_oss(self: Any, hidden_states: Any) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return (self.weight * hidden_states).to(input_dtype)


# --- Rounded before the weight.


class _RoundedNorm(torch.autograd.Function):
    """y = weight * round(x_hat), codes and scales of x_hat, and a copy of the weight.

    Keeps all but y, and rstd. Where the input goes on `beside` the norm, it is the last result: its
    gradients are one kernel's then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
        method: Quantiser,
        seed: Seed,
        beside: bool,
    ) -> tuple[Tensor, ...]:
        rows = norm_rows(x, weight.numel())
        if dtype.itemsize > rows.dtype.itemsize:
            rows = rows.to(dtype)
        keeping = rounded_norm_of(method)
        y, rstd, copies, kept = keeping.forward(rows, weight, eps, dtype, method, seed)
        copies = [] if _torch.is_traced() else copies[:1]
        ctx.mark_non_differentiable(*copies, *kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rstd, *own_parameters(copies, weight), *kept)
        ctx.settings = (x.dtype, method, beside)
        ctx.differentiate = keeping.backward
        return shaped(y, x.shape), *copies, *kept, *([x] if beside else [])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *others: Any) -> Any:
        refuse_second_derivative(KEEPS)
        dtype, method, beside = ctx.settings
        other: Tensor | None = others[-1] if beside else None
        if grad_output is None:
            return other, *[None] * 6
        rstd, weight, *kept = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dy = as_rows(grad_output, weight.numel())
        alike = other is not None and other.dtype == dy.dtype == dtype
        added = as_rows(other, weight.numel()) if alike else None  # type: ignore[arg-type]
        dx, dweight, _ = ctx.differentiate(
            dy, kept, rstd, weight, False, needs_weight, False, method, added
        )
        dx = shaped_as(dx, grad_output).to(dtype)
        if other is not None and not alike:
            dx = dx + other
        return (
            dx if needs_x else None,
            dweight.to(weight.dtype) if needs_weight else None,
            *[None] * 5,
        )


_norm_rounded: Callable[..., tuple[Tensor, ...]] = _torch.applied(_RoundedNorm)


def _fits(x: Tensor, weight: Tensor, method: Quantiser) -> bool:
    """Whether rows of x are packed; else the plain layer runs."""
    check_tensor(x, "an RMS norm")
    if x.dtype == torch.float64 or x.shape[-1:] != weight.shape or x.device != weight.device:
        return False  # which computes in float32, or raises
    return method.keeps_rows(weight.numel())


class GroupQuantRMSNorm(Quantised):
    """weight * round(x_hat), as Llama and T5 have it; keeps a pack of x_hat and 32 bits a row.

    Gradients are those of `packlight.groupquant.rms_norm`.
    """

    by_rows = True
    weight: Tensor
    variance_epsilon: float
    rounds_to_weight: bool

    def _rounded_to(self, x: Tensor) -> torch.dtype:
        """The dtype of x_hat when it meets the weight."""
        if not self.rounds_to_weight:
            return x.dtype
        return self.weight.dtype if self.weight.dtype in _SHORT else torch.float32

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self._packs(hidden_states):
            plain: Tensor = super().forward(hidden_states)
            return plain
        return self._packed(hidden_states, False)[0]

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The norm of `x`, and `x` as what goes on beside it; None where nothing is packed.

        Of both gradients one comes back by the norm's kernel: no sum, and no tensor for it.
        """
        if not is_taken(x) or not self._packs(x) or not needs_gradient(x):
            return None
        y, (x,) = self._packed(x, True)
        return y, x

    def _packs(self, x: Tensor) -> bool:
        weight = self.weight
        fits = self.training and _fits(x, weight, self.method)
        return fits and (needs_gradient(x) or needs_gradient(weight))

    def _packed(self, x: Tensor, beside: bool) -> tuple[Tensor, list[Tensor]]:
        """The norm of `x`, and what `_RoundedNorm` gives beside it."""
        weight, method = self.weight, self.method
        settings = (self.variance_epsilon, self._rounded_to(x), method, method.seed(x), beside)
        y, *kept = _norm_rounded(x, weight, *settings)
        others = [kept.pop()] if beside else []
        if not _torch.is_traced():
            weight, *kept = kept
        rebuild = rounded_norm_of(method).rebuild(y, weight.numel(), method)
        tensors = (*kept, weight, None)
        pack = Pack(rebuild, tuple(y.shape), tensors, method.grade, reading_of(rebuild))
        sharing.note_pack(y, pack)
        return y, others


# --- Rounded once.


class GroupQuantWideRMSNorm(Quantised):
    """(offset + weight) * x_hat in float32, rounded once, as Gemma and gpt-oss have it.

    Keeps a pack of x_hat and 32 bits a row; gradients are those of
    `packlight.groupquant.rms_norm`.
    """

    by_rows = True
    weight: Tensor
    offset: float
    eps: float
    variance_epsilon: float
    name_of_eps: str  # which of the two there is

    def forward(self, x: Tensor) -> Tensor:
        fits = self.training and _fits(x, self.weight, self.method)
        if not fits:
            plain: Tensor = super().forward(x)
            return plain
        scale = self.weight.float()
        if self.offset:
            scale = self.offset + scale
        eps = self.eps if self.name_of_eps == "eps" else self.variance_epsilon
        wide = rms_norm(x.float(), (self.weight.numel(),), scale, eps, method=self.method)
        if x.dtype == torch.float32:
            return wide
        pack = sharing.pack_of(wide)
        y = wide.to(x.dtype)
        if pack is not None:
            sharing.note_pack(y, pack)
        return y


# --- Inverted.


class InvertedRMSNorm(InvertedNorm):
    """weight * x_hat; keeps its output and 32 bits a row, exact to rounding."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, weight = hidden_states, self.weight
        # In 16 bits torch's norm may return float32 under autocast, and the plain layer does not.
        cast = x.dtype in _SHORT and torch.is_autocast_enabled(x.device.type)
        if not self.training or x.dtype != weight.dtype or x.dtype == torch.float64 or cast:
            plain: Tensor = super().forward(x)
            return plain
        shape = tuple(weight.shape)
        return inverted.row_norm(
            x, shape, weight, None, self.variance_epsilon, False, self._verdict
        )


# --- The rules.


@once_a_class
def _form(kind: type[nn.Module]) -> str | None:
    """Which of the known codes a class has."""
    forward = vars(kind).get("forward")
    for name, known in (("llama", _llama), ("t5", _t5), ("gpt_oss", _gpt_oss)):
        if is_copy(forward, known):
            return name
    if is_copy(forward, _gemma) and is_copy(getattr(kind, "_norm", None), _gemma_norm):
        return "gemma"
    return None


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    form = _form(kind)
    if method is Inverted:
        return _inverted if form in ("llama", "t5") else None
    if not issubclass(method, Quantiser) or form is None:
        return None
    return _rounded if form in ("llama", "t5") else _wide


def _rounded(method: Quantiser, module: nn.Module) -> Swap:
    kind = type(module)
    attributes = {"method": method, "rounds_to_weight": _form(kind) == "t5"}
    return Swap(joined(GroupQuantRMSNorm, kind), attributes)


def _wide(method: Quantiser, module: nn.Module) -> Swap:
    kind = type(module)
    is_gemma = _form(kind) == "gemma"
    attributes = {
        "method": method,
        "offset": 1.0 if is_gemma else 0.0,
        "name_of_eps": "eps" if is_gemma else "variance_epsilon",
    }
    return Swap(joined(GroupQuantWideRMSNorm, kind), attributes)


def _inverted(method: Inverted, module: nn.Module) -> Swap:
    kind = type(module)
    return Swap(joined(InvertedRMSNorm, kind), {"offset_limit": None, "_seen": None})
