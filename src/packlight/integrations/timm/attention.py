"""Attention of timm, whose query, key and value stay one tensor where its calls are covered."""

from typing import Any

import torch.nn.functional as F
from timm import layers
from torch import Tensor, nn

from packlight._classes import joined
from packlight.calls import covered_call, uncovered
from packlight.groupquant.modules import Linear
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations._parts import are_idle, parameters_of, takes
from packlight.layers.linear import Parameters, linear
from packlight.layers.self_attention import self_attention
from packlight.method import Method, Rule, Swap, rule_finder
from packlight.quantiser import Quantiser

# Of the code below; releases without them have another.
maybe_add_mask: Any = getattr(layers.attention, "maybe_add_mask", None)
resolve_self_attn_mask: Any = getattr(layers.attention, "resolve_self_attn_mask", None)


def _attention(self: Any, x: Any, attn_mask: Any, is_causal: Any) -> Any:
    """As timm has it. Never run: `is_copy` compares with it."""
    B, N, C = x.shape  # noqa: RUF059
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

    may_run_plain_code = True
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
        y = None
        if self.training and (method := method_of_calls()) is not None:
            y = uncovered(self._at_once, x, attn_mask, is_causal, method)
        if y is None:
            plain: Tensor = super().forward(x, attn_mask, is_causal)
            return plain
        projected: Tensor = self.proj_drop(self.proj(self.norm(y)))
        return projected

    def whole(self, method: Quantiser) -> Parameters | None:
        """Weight and bias of query, key and value; None where something is done to the three."""
        parts = self._modules
        qkv = parts["qkv"]
        if not self.fused_attn or self.gate is not None or not isinstance(qkv, Linear):
            return None
        if not are_idle(parts["q_norm"], parts["k_norm"]):
            return None
        found = parameters_of((qkv,), method)
        width = self.num_heads * self.head_dim
        return None if found is None or found[0][0].shape[0] != 3 * width else found[0]

    def _at_once(
        self, x: Tensor, mask: Tensor | None, is_causal: bool, method: Quantiser
    ) -> Tensor | None:
        """What the projection reads, by two functions; None where the parts are to run."""
        of_input = getattr(self._modules["qkv"], "method", None)
        if of_input is None or x.dim() != 3 or not takes(x, of_input):
            return None
        parameters = self.whole(of_input)
        if parameters is None:
            return None
        flags = (self.attn_drop.p, is_causal, None)
        whole = linear(x, *parameters, method=of_input)
        return self_attention(whole, self.num_heads, mask, flags, method)


def method_of_calls() -> Quantiser | None:
    """By what a call of attention keeps in the code that runs; None if it does not."""
    call = covered_call(F.scaled_dot_product_attention)
    return None if call is None else call.options.get("method")


@once_a_class
def _is_known(kind: type[nn.Module]) -> bool:
    return is_copy(vars(kind).get("forward"), _attention)


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    return _whole if issubclass(method, Quantiser) and _is_known(kind) else None


def _whole(method: Quantiser, module: nn.Module) -> Swap:
    return Swap(joined(GroupQuantAttention, type(module)), parts=("qkv",))
