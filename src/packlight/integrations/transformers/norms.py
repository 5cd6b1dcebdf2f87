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

from packlight import sharing
from packlight._checks import check_tensor, needs_gradient, refuse_second_derivative
from packlight._seeds import Seed, operands
from packlight.groupquant.method import GroupQuant, row_group_size
from packlight.groupquant.modules import _Quantised
from packlight.groupquant.norms import own_parameters, rms_norm
from packlight.groupquant.packs import KEEPS, Rebuild, draw
from packlight.groupquant.traced_norms import as_rows, operators
from packlight.integrations._classes import is_copy, joined, once_a_class
from packlight.inverted import norms as inverted
from packlight.inverted.method import Inverted
from packlight.inverted.norm_modules import _InvertedNorm
from packlight.method import Method, Rule, Swap, rule_finder
from packlight.sharing import Pack

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

    Keeps all but y, and rstd.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
        bits: int,
        group_size: int,
        seed: Seed,
    ) -> tuple[Tensor, ...]:
        width = weight.numel()
        rows = x.reshape(-1, width).contiguous()
        if dtype.itemsize > rows.dtype.itemsize:
            rows = rows.to(dtype)
        normalise = operators(width, group_size)[0]
        x_hat, codes, scales, rstd, *_ = normalise(
            rows, width, None, None, eps, False, bits, group_size, *operands(seed)
        )
        copies = [] if torch.compiler.is_compiling() else [weight.clone()]
        ctx.mark_non_differentiable(codes, scales, *copies)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(codes, scales, rstd, *own_parameters(copies, weight))
        ctx.settings = (x.dtype, bits, group_size)
        return weight * x_hat.view(x.shape).to(dtype), codes, scales, *copies

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        if grad_output is None:
            return (None,) * 7
        codes, scales, rstd, weight = ctx.saved_tensors
        dtype, bits, group_size = ctx.settings
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        width = weight.numel()
        dy = as_rows(grad_output, width)
        differentiate = operators(width, group_size)[1]
        dx, dweight, _ = differentiate(
            dy, codes, scales, rstd, weight, False, needs_weight, False, bits, group_size
        )
        return (
            dx.view(grad_output.shape).to(dtype) if needs_x else None,
            dweight.to(weight.dtype) if needs_weight else None,
            *[None] * 5,
        )


_norm_rounded: Callable[..., tuple[Tensor, ...]] = _RoundedNorm.apply


def _fits(x: Tensor, weight: Tensor, method: GroupQuant) -> int | None:
    """The group size for rows of x; None where the plain layer is to run."""
    check_tensor(x, "an RMS norm")
    if x.dtype == torch.float64 or x.shape[-1:] != weight.shape or x.device != weight.device:
        return None  # which computes in float32, or raises
    return row_group_size(weight.numel(), method.group_size)


class GroupQuantRMSNorm(_Quantised):
    """weight * round(x_hat), as Llama and T5 have it; keeps a pack of x_hat and 32 bits a row.

    Gradients are those of `packlight.groupquant.rms_norm`.
    """

    weight: Tensor
    variance_epsilon: float
    rounds_to_weight: bool

    def _rounded_to(self, x: Tensor) -> torch.dtype:
        """The dtype of x_hat when it meets the weight."""
        if not self.rounds_to_weight:
            return x.dtype
        return self.weight.dtype if self.weight.dtype in _SHORT else torch.float32

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, weight, method = hidden_states, self.weight, self.method
        group_size = _fits(x, weight, method) if self.training else None
        if group_size is None or not (needs_gradient(x) or needs_gradient(weight)):
            plain: Tensor = super().forward(x)
            return plain
        dtype = self._rounded_to(x)
        seed = draw(x, method)
        y, codes, scales, *copies = _norm_rounded(
            x, weight, self.variance_epsilon, dtype, method.bits, group_size, seed
        )
        rebuild = Rebuild(tuple(y.shape), y.stride(), weight.numel(), method.bits, group_size)
        kept = (codes, scales, *own_parameters(copies, weight), None)
        sharing.note_pack(y, Pack(rebuild, tuple(y.shape), kept, method.grade))
        return y


# --- Rounded once.


class GroupQuantWideRMSNorm(_Quantised):
    """(offset + weight) * x_hat in float32, rounded once, as Gemma and gpt-oss have it.

    Keeps a pack of x_hat and 32 bits a row; gradients are those of
    `packlight.groupquant.rms_norm`.
    """

    weight: Tensor
    offset: float
    name_of_eps: str

    def forward(self, x: Tensor) -> Tensor:
        fits = self.training and _fits(x, self.weight, self.method) is not None
        if not fits:
            plain: Tensor = super().forward(x)
            return plain
        scale = self.weight.float()
        if self.offset:
            scale = self.offset + scale
        eps = getattr(self, self.name_of_eps)
        wide = rms_norm(x.float(), (self.weight.numel(),), scale, eps, **self.options)
        if x.dtype == torch.float32:
            return wide
        pack = sharing.pack_of(wide)
        y = wide.to(x.dtype)
        if pack is not None:
            sharing.note_pack(y, pack)
        return y


# --- Inverted.


class InvertedRMSNorm(_InvertedNorm):
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
    if method is not GroupQuant or form is None:
        return None
    return _rounded if form in ("llama", "t5") else _wide


def _rounded(method: GroupQuant, module: nn.Module) -> Swap:
    kind = type(module)
    attributes = {"method": method, "rounds_to_weight": _form(kind) == "t5"}
    return Swap(joined(GroupQuantRMSNorm, kind), attributes)


def _wide(method: GroupQuant, module: nn.Module) -> Swap:
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
    return Swap(joined(InvertedRMSNorm, kind), {"offset_limit": None, "_judged": None})
