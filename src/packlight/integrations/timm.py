"""Layers of timm; `packlight.convert` imports this where the program has imported timm.

| class | becomes, under |
| --- | --- |
| GELU, GELUTanh, QuickGELU | the activation: `FewBit`, `GroupQuant`, `Inverted` |
| BatchNormAct2d | the batch norm, before its dropout and activation: `FixedPoint`, `GroupQuant` |
| LayerNorm | the layer norm: `GroupQuant`, `Inverted` |
| LayerNorm2d | the layer norm over channels: `GroupQuant` |
| RmsNorm | the RMS norm: `GroupQuant`, `Inverted` |
| Mlp | W_2 f(W_1 x) as one function, where its parts are `GroupQuant`'s and no dropout is on |
| Attention | query, key and value stay one tensor, where its calls are covered |

The dropout and the activation of BatchNormAct2d are modules of their own and converted as such.
What timm builds of torch.nn has torch's rules; its attention calls
`F.scaled_dot_product_attention`, which `convert(..., functional=True)` covers, and keeps what torch
keeps without. All other classes of its own are left alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm import layers
from torch import Tensor, nn

from packlight._classes import joined
from packlight.calls import covered_call, is_bare, uncovered
from packlight.groupquant.fixed_point import functional as fixed_point
from packlight.groupquant.fixed_point.method import FixedPoint
from packlight.groupquant.modules import Linear, Quantised
from packlight.integrations._activations import register
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations._parts import function_of_part, parameters_of, takes
from packlight.inverted import norms as inverted
from packlight.inverted.method import Inverted
from packlight.inverted.norm_modules import InvertedNorm
from packlight.layers import channel_norms, norms
from packlight.layers.linear import linear
from packlight.layers.mlp import mlp
from packlight.layers.self_attention import self_attention
from packlight.layers.twin import Twin, start_batch
from packlight.method import Method, NotConverted, Rule, Swap, rule, rule_finder
from packlight.quantiser import Quantiser

register({layers.GELU: "gelu", layers.GELUTanh: "gelu_tanh", layers.QuickGELU: "quick_gelu"})


# --- Batch norm with an activation.


class FixedPointBatchNormAct2d(Twin):
    """act(drop(batch_norm(x))); keeps the codes of `packlight.groupquant.fixed_point`."""

    bits: int
    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        y = fixed_point.batch_norm(x, **start_batch(self), bits=self.bits)
        activated: Tensor = self.act(self.drop(y))
        return activated


class GroupQuantBatchNormAct2d(Quantised):
    """act(drop(batch_norm(x))); keeps a pack of the normalised value."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        y = channel_norms.batch_norm(x, **start_batch(self), method=self.method)
        activated: Tensor = self.act(self.drop(y))
        return activated


# --- Feed-forward layers.


def _mlp(self: Any, x: Any) -> Any:
    """As timm has it. Never run: `is_copy` compares with it."""
    x = self.fc1(x)
    x = self.act(x)
    x = self.drop1(x)
    x = self.norm(x)
    x = self.fc2(x)
    x = self.drop2(x)
    return x  # noqa: RET504  as it is there


class GroupQuantMlp(nn.Module):
    """fc2(act(fc1(x))); keeps packs of x and of what fc1 gives, as its parts do one by one."""

    method: Quantiser
    fc1: nn.Module
    act: nn.Module
    drop1: nn.Module
    norm: nn.Module
    fc2: nn.Module
    drop2: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor | None = None
        if self.training and not torch.compiler.is_compiling():
            y = uncovered(self._at_once, x)
        if y is None:
            y = super().forward(x)
        return y

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The result by one function; None where the parts are to run one by one."""
        first, act, last = self.fc1, self.act, self.fc2
        for dropout in (self.drop1, self.drop2):
            if not isinstance(dropout, nn.Dropout) or dropout.p or not is_bare(dropout):
                return None
        if type(self.norm) is not nn.Identity or not is_bare(self.norm):
            return None
        parameters = parameters_of((first, last), self.method)
        function = function_of_part(act, self.method)
        if parameters is None or function is None or not takes(x, self.method):
            return None
        return mlp(x, parameters, function, self.method)


# --- Attention.


# Of the code below; releases without them have another.
maybe_add_mask: Any = getattr(layers.attention, "maybe_add_mask", None)
resolve_self_attn_mask: Any = getattr(layers.attention, "resolve_self_attn_mask", None)


def _attention(self: Any, x: Any, attn_mask: Any, is_causal: Any) -> Any:
    """As timm has it. Never run: `is_copy` compares with it."""
    B, N, C = x.shape  # noqa: N806, RUF059
    gate = self.gate(x).sigmoid() if self.gate is not None else None
    qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = self.q_norm(q), self.k_norm(k)

    if self.fused_attn:
        x = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.,
            is_causal=is_causal,
        )  # fmt: skip
    else:
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        attn_bias = resolve_self_attn_mask(N, attn, attn_mask, is_causal)
        attn = maybe_add_mask(attn, attn_bias)
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        x = attn @ v

    x = x.transpose(1, 2).reshape(B, N, self.attn_dim)
    x = self.norm(x)
    if gate is not None:
        x = x * gate
    x = self.proj(x)
    x = self.proj_drop(x)
    return x  # noqa: RET504  as it is there


class GroupQuantAttention(nn.Module):
    """Attention; keeps one pack of query, key and value, where its calls are covered."""

    fused_attn: bool
    gate: nn.Module | None
    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    num_heads: int
    head_dim: int

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        y: Tensor | None = None
        if self.training and not torch.compiler.is_compiling():
            call = covered_call(F.scaled_dot_product_attention)
            if call is not None:
                y = uncovered(self._at_once, x, attn_mask, is_causal, call.options.get("method"))
        if y is None:
            plain: Tensor = super().forward(x, attn_mask, is_causal)
            return plain
        y = self.proj_drop(self.proj(self.norm(y)))
        return y

    def _at_once(
        self, x: Tensor, mask: Tensor | None, is_causal: bool, method: Quantiser | None
    ) -> Tensor | None:
        """What the projection reads, by two functions; None where the layer's own code is to run."""
        qkv = self.qkv
        if method is None or self.gate is not None or not self.fused_attn:
            return None
        if not isinstance(qkv, Linear) or x.dim() != 3 or not takes(x, qkv.method):
            return None
        for norm in (self.q_norm, self.k_norm):
            if type(norm) is not nn.Identity or not is_bare(norm):
                return None
        parameters = parameters_of((qkv,), qkv.method)
        if parameters is None or qkv.out_features != 3 * self.num_heads * self.head_dim:
            return None
        whole = linear(x, *parameters[0], method=qkv.method)
        return self_attention(
            whole, self.num_heads, mask, (self.attn_drop.p, is_causal, None), method
        )


# --- Norms of rows.


class GroupQuantLayerNorm(Quantised):
    """`F.layer_norm` over the last dimension; keeps a pack of the normalised value."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        return norms.layer_norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps, method=self.method
        )


class GroupQuantLayerNorm2d(Quantised):
    """`F.layer_norm` over the channels of [N, C, H, W]; keeps a pack of the normalised value."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        y = norms.layer_norm(
            x.permute(0, 2, 3, 1),
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            method=self.method,
        )
        return y.permute(0, 3, 1, 2)


class GroupQuantRmsNorm(Quantised):
    """`F.rms_norm` over the last dimension; keeps a pack of the normalised value."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        return norms.rms_norm(x, self.normalized_shape, self.weight, self.eps, method=self.method)


class InvertedLayerNorm(InvertedNorm):
    """`F.layer_norm` over the last dimension; keeps its output and 32 bits a row."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        shape = tuple(self.normalized_shape)
        return inverted.row_norm(x, shape, self.weight, self.bias, self.eps, True, self._verdict)


class InvertedRmsNorm(InvertedNorm):
    """`F.rms_norm` over the last dimension; keeps its output and 32 bits a row."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        shape = tuple(self.normalized_shape)
        return inverted.row_norm(x, shape, self.weight, None, self.eps, False, self._verdict)


# --- The rules.

_GROUP_QUANT: dict[type[nn.Module], type[nn.Module]] = {
    layers.BatchNormAct2d: GroupQuantBatchNormAct2d,
    layers.LayerNorm: GroupQuantLayerNorm,
    layers.LayerNorm2d: GroupQuantLayerNorm2d,
    layers.RmsNorm: GroupQuantRmsNorm,
}
_INVERTED: dict[type[nn.Module], type[nn.Module]] = {
    layers.LayerNorm: InvertedLayerNorm,
    layers.RmsNorm: InvertedRmsNorm,
}


def _check(module: Any) -> None:
    if getattr(module, "_fast_norm", False):
        raise NotConverted("timm's fast norm is on, which computes in another dtype")


@rule(Quantiser, *_GROUP_QUANT)
def _quantised(method: Quantiser, module: Any) -> Swap:
    _check(module)
    kind = type(module)
    return Swap(joined(_GROUP_QUANT[kind], kind), {"method": method})


@rule(Inverted, *_INVERTED)
def _inverted(method: Inverted, module: Any) -> Swap:
    _check(module)
    kind = type(module)
    return Swap(joined(_INVERTED[kind], kind), {"offset_limit": None, "_seen": None})


@once_a_class
def _is_mlp(kind: type[nn.Module]) -> bool:
    return is_copy(vars(kind).get("forward"), _mlp)


@once_a_class
def _is_attention(kind: type[nn.Module]) -> bool:
    return is_copy(vars(kind).get("forward"), _attention)


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    if not issubclass(method, Quantiser):
        return None
    return _parts if _is_mlp(kind) else _whole if _is_attention(kind) else None


def _parts(method: Quantiser, module: nn.Module) -> Swap:
    return Swap(joined(GroupQuantMlp, type(module)), {"method": method})


def _whole(method: Quantiser, module: nn.Module) -> Swap:
    return Swap(joined(GroupQuantAttention, type(module)), {})


@rule(FixedPoint, layers.BatchNormAct2d)
def _fixed_point(method: FixedPoint, module: Any) -> Swap:
    kind = type(module)
    return Swap(joined(FixedPointBatchNormAct2d, kind), {"bits": method.bits})
