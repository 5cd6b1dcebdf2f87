"""Blocks of timm's vision transformers as two functions, where their parts may be."""

from typing import Any

from torch import Tensor, nn

from packlight._classes import joined
from packlight.calls import is_bare, uncovered
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations._parts import are_idle, parameter_of, parameters_of, takes
from packlight.integrations.timm.attention import GroupQuantAttention, method_of_calls
from packlight.integrations.timm.mlp import GroupQuantMlp
from packlight.integrations.timm.norms import GroupQuantLayerNorm
from packlight.layers import pre_norm
from packlight.layers.self_attention import fits, linear_dtype
from packlight.method import Method, Rule, Swap, rule_finder
from packlight.quantiser import Quantiser


def _block(self: Any, x: Any, attn_mask: Any, is_causal: Any) -> Any:
    """As timm has it. Never run: `is_copy` compares with it."""
    x = x + self.drop_path1(
        self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
    )
    x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
    return x  # noqa: RET504  as it is there


class GroupQuantBlock(nn.Module):
    """x + attention(norm(x)) and x + mlp(norm(x)), each by one function; keeps what they keep."""

    may_run_plain_code = True
    drop_path2: nn.Module
    ls2: nn.Module
    mlp: nn.Module
    norm2: nn.Module

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        y = None
        if self.training and (method := method_of_calls()) is not None:
            y = uncovered(self._attention, x, attn_mask, is_causal, method)
        if y is None:
            plain: Tensor = super().forward(x, attn_mask, is_causal)
            return plain
        z: Tensor | None = uncovered(self._mlp, y)
        if z is None:
            z = y + self.drop_path2(self.ls2(self.mlp(self.norm2(y))))
        return z

    def _attention(
        self, x: Tensor, mask: Tensor | None, is_causal: bool, method: Quantiser
    ) -> Tensor | None:
        """The first sum; None where the parts are to run one by one."""
        modules = self._modules
        attn, norm = modules["attn"], _norm_of(modules["norm1"], x)
        if not isinstance(attn, GroupQuantAttention) or norm is None:
            return None
        parts = attn._modules
        of_input, last = getattr(parts["qkv"], "method", None), parts["proj"]
        idle = (parts["norm"], parts["proj_drop"], modules["ls1"], modules["drop_path1"])
        if of_input is None or last is None or not attn.training or not takes(x, of_input):
            return None
        if x.dim() != 3 or not are_idle(*idle) or not is_bare(attn):
            return None
        whole, found = attn.whole(of_input), parameters_of((last,), of_input)
        if whole is None or found is None or not norm.method.grade.serves(of_input.grade):
            return None
        heads, p = attn.num_heads, attn.attn_drop.p
        dtype = linear_dtype(x, whole[0])
        if not fits(x, dtype, heads, whole[0].shape[0] // 3, mask, p, method):
            return None
        flags = (p, is_causal, None)
        projections = (whole, found[0])
        return pre_norm.attention(x, norm, projections, heads, mask, flags, method)

    def _mlp(self, x: Tensor) -> Tensor | None:
        """The second sum; None where the parts are to run one by one."""
        modules = self._modules
        layer, norm = modules["mlp"], _norm_of(modules["norm2"], x)
        if not isinstance(layer, GroupQuantMlp) or norm is None or not layer.training:
            return None
        if not are_idle(modules["ls2"], modules["drop_path2"]) or not is_bare(layer):
            return None
        given = layer.given(x)
        if given is None or not norm.method.grade.serves(layer.method.grade):
            return None
        return pre_norm.mlp(x, norm, *given, layer.method)


def _norm_of(module: nn.Module | None, x: Tensor) -> pre_norm.Norm | None:
    """A layer norm over the last dimension of `x`; None where it is to run by itself."""
    if not isinstance(module, GroupQuantLayerNorm) or not module.training or not is_bare(module):
        return None
    weight, method = parameter_of(module, "weight"), module.method
    if weight is None or weight.shape != x.shape[-1:] or not method.keeps_rows(weight.shape[0]):
        return None
    return pre_norm.Norm(weight, parameter_of(module, "bias"), module.eps, method)


@once_a_class
def _is_known(kind: type[nn.Module]) -> bool:
    return is_copy(vars(kind).get("forward"), _block)


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    return _whole if issubclass(method, Quantiser) and _is_known(kind) else None


def _whole(method: Quantiser, module: nn.Module) -> Swap:
    return Swap(joined(GroupQuantBlock, type(module)), parts=("attn", "norm1"))
