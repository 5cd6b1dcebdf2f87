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
| Block of vision transformers | two functions, where its parts may be and its calls are covered |

The dropout and the activation of BatchNormAct2d are modules of their own and converted as such.
What timm builds of torch.nn has torch's rules; its attention calls
`F.scaled_dot_product_attention`, which `convert` covers; with `functional=False` it keeps what
torch keeps. All other classes of its own are left alone.
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
from packlight.integrations._residual import Block, Known, conv_norm_act, end, known, passes
from packlight.inverted import norms as inverted
from packlight.inverted.method import Inverted
from packlight.inverted.norm_modules import InvertedNorm
from packlight.layers import channel_norms, norms, pre_norm
from packlight.layers.linear import Parameters, linear
from packlight.layers.mlp import mlp
from packlight.layers.self_attention import fits, linear_dtype, self_attention
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

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor | None = None
        if self.training and not torch.compiler.is_compiling():
            y = uncovered(self._at_once, x)
        if y is None:
            y = super().forward(x)
        return y

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The result by one function; None where the parts are to run one by one."""
        given = self.given(x)
        return None if given is None else mlp(x, *given, self.method)

    def given(self, x: Tensor) -> tuple[list[Parameters], str] | None:
        """The projections and the function between; None where the parts are to run one by one."""
        parts = self._modules
        first, act, last = parts["fc1"], parts["act"], parts["fc2"]
        if first is None or act is None or last is None or not takes(x, self.method):
            return None
        if not _are_idle(parts["drop1"], parts["norm"], parts["drop2"]):
            return None
        parameters = parameters_of((first, last), self.method)
        function = function_of_part(act, self.method)
        return None if parameters is None or function is None else (parameters, function)


# --- Attention.


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
        if self.training and (method := _method_of_calls()) is not None:
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
        if not _are_idle(parts["q_norm"], parts["k_norm"]):
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


def _method_of_calls() -> Quantiser | None:
    """By what a call of attention keeps in the code that runs; None if not, or if traced."""
    if torch.compiler.is_compiling():
        return None
    call = covered_call(F.scaled_dot_product_attention)
    return None if call is None else call.options.get("method")


def _are_idle(*modules: nn.Module | None) -> bool:
    """Whether modules hand on what they are given, as those that a setting left out do."""
    for module in modules:
        if type(module) is nn.Identity:
            continue
        if not isinstance(module, nn.Dropout) or (module.p and module.training):
            return False
    return is_bare(*modules)  # type: ignore[arg-type]


# --- Blocks.


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
        if self.training and (method := _method_of_calls()) is not None:
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
        if x.dim() != 3 or not _are_idle(*idle) or not is_bare(attn):
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
        if not _are_idle(modules["ls2"], modules["drop_path2"]) or not is_bare(layer):
            return None
        given = layer.given(x)
        if given is None or not norm.method.grade.serves(layer.method.grade):
            return None
        return pre_norm.mlp(x, norm, *given, layer.method)


def _norm_of(module: nn.Module | None, x: Tensor) -> pre_norm.Norm | None:
    """A layer norm over the last dimension of `x`; None where it is to run by itself."""
    if not isinstance(module, GroupQuantLayerNorm) or not module.training or not is_bare(module):
        return None
    weight, method = module.weight, module.method
    if weight is None or weight.shape != x.shape[-1:] or not method.keeps_rows(weight.shape[0]):
        return None
    return pre_norm.Norm(weight, module.bias, module.eps, method)


# --- Residual blocks.


def _basic(self: Any, x: Any) -> Any:
    """As timm has it. Never run: `is_copy` compares with it."""
    shortcut = x

    x = self.conv1(x)
    x = self.bn1(x)
    x = self.drop_block(x)
    x = self.act1(x)
    x = self.aa(x)

    x = self.conv2(x)
    x = self.bn2(x)

    if self.se is not None:
        x = self.se(x)

    if self.drop_path is not None:
        x = self.drop_path(x)

    if self.downsample is not None:
        shortcut = self.downsample(shortcut)
    x += shortcut
    x = self.act2(x)

    return x  # noqa: RET504  as it is there


def _bottleneck(self: Any, x: Any) -> Any:
    """As timm has it. Never run: `is_copy` compares with it."""
    shortcut = x

    x = self.conv1(x)
    x = self.bn1(x)
    x = self.act1(x)

    x = self.conv2(x)
    x = self.bn2(x)
    x = self.drop_block(x)
    x = self.act2(x)
    x = self.aa(x)

    x = self.conv3(x)
    x = self.bn3(x)

    if self.se is not None:
        x = self.se(x)

    if self.drop_path is not None:
        x = self.drop_path(x)

    if self.downsample is not None:
        shortcut = self.downsample(shortcut)
    x += shortcut
    x = self.act3(x)

    return x  # noqa: RET504  as it is there


class FixedPointBasicBlock(Block):
    """act2(drop_path(se(bn2(conv2(...)))) + downsample(x))."""

    def run(self: Any, x: Tensor, covered: bool) -> Tensor:
        first, parts = known(x), self._modules
        at = self._middle(first, parts["conv1"], parts["bn1"], parts["act1"])
        last, between = (parts["conv2"], parts["bn2"], parts["act2"]), (self.se, self.drop_path)
        return end(at, *last, first, self.downsample, covered, between)

    def _middle(self: Any, at: Known, conv: Any, norm: Any, act: Any) -> Known:
        """aa(act(drop_block(norm(conv(x)))))."""
        drop, aa = self.drop_block, self.aa
        if passes(drop, aa):
            return conv_norm_act(at, conv, norm, act)
        return Known(aa(act(drop(conv_norm_act(at, conv, norm).noted()))))


class FixedPointBottleneck(FixedPointBasicBlock):
    """The same with three convolutions."""

    def run(self: Any, x: Tensor, covered: bool) -> Tensor:
        first, parts = known(x), self._modules
        at = conv_norm_act(first, parts["conv1"], parts["bn1"], parts["act1"])
        at = self._middle(at, parts["conv2"], parts["bn2"], parts["act2"])
        last, between = (parts["conv3"], parts["bn3"], parts["act3"]), (self.se, self.drop_path)
        return end(at, *last, first, self.downsample, covered, between)


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


@once_a_class
def _is_block(kind: type[nn.Module]) -> bool:
    return is_copy(vars(kind).get("forward"), _block)


_RESIDUAL = {_basic: FixedPointBasicBlock, _bottleneck: FixedPointBottleneck}


@once_a_class
def _residual_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    forward = vars(kind).get("forward")
    return next((ours for known, ours in _RESIDUAL.items() if is_copy(forward, known)), None)


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    if issubclass(method, FixedPoint):
        return _residual if _residual_of(kind) is not None else None
    if not issubclass(method, Quantiser):
        return None
    if _is_mlp(kind):
        return _parts
    return _whole if _is_attention(kind) or _is_block(kind) else None


def _residual(method: FixedPoint, module: nn.Module) -> Swap:
    mixin = _residual_of(type(module))
    assert mixin is not None
    return Swap(joined(mixin, type(module)))


def _parts(method: Quantiser, module: nn.Module) -> Swap:
    return Swap(joined(GroupQuantMlp, type(module)), {"method": method})


def _whole(method: Quantiser, module: nn.Module) -> Swap:
    kind = type(module)
    ours = GroupQuantBlock if _is_block(kind) else GroupQuantAttention
    return Swap(joined(ours, kind), {})


@rule(FixedPoint, layers.BatchNormAct2d)
def _fixed_point(method: FixedPoint, module: Any) -> Swap:
    kind = type(module)
    return Swap(joined(FixedPointBatchNormAct2d, kind), {"bits": method.bits})
