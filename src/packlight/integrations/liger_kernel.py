"""Layers of Liger-Kernel; `packlight.convert` imports this where the program has imported it.

| layer | becomes, under `GroupQuant` |
| --- | --- |
| LigerSwiGLUMLP, also those of Qwen3Moe and HunyuanV1 | packs of gate and up, with SiLU |
| LigerGEGLUMLP | the same, with the tanh form of GELU |
| LigerPhi3SwiGLUMLP | the same, with gate and up in one projection |
| LigerRMSNorm with casting modes "llama", without an offset, and "gemma" | a pack of x_hat |
| LigerLayerNorm | a pack of x_hat |

Liger puts its layers into a model in two ways, both of which are known: as classes, before the
model is made, and as forwards on the instances of a model that there is. `revert` brings either
back. Liger is never imported: functions are known by their names, in modules of liger_kernel.

Rotary embeddings, which keep nothing of the size of a tensor, and losses stay Liger's.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from packlight._classes import joined
from packlight.groupquant.modules import Quantised
from packlight.integrations.transformers.gated import (
    GroupQuantFusedGatedMLP,
    GroupQuantGatedMLP,
)
from packlight.integrations.transformers.norms import (
    GroupQuantRMSNorm,
    GroupQuantWideRMSNorm,
)
from packlight.layers import norms
from packlight.layers.casts import to
from packlight.method import Method, NotConverted, Rule, Swap, patch_finder, rule_finder
from packlight.quantiser import Quantiser

# By the class whose forward runs: what the layer becomes, and the activation of its gate.
_GATED: dict[str, tuple[type[nn.Module], str]] = {
    "LigerSwiGLUMLP": (GroupQuantGatedMLP, "silu"),
    "LigerQwen3MoeSwiGLUMLP": (GroupQuantGatedMLP, "silu"),
    "LigerHunyuanV1SwiGLUMLP": (GroupQuantGatedMLP, "silu"),
    "LigerGEGLUMLP": (GroupQuantGatedMLP, "gelu_tanh"),
    "LigerPhi3SwiGLUMLP": (GroupQuantFusedGatedMLP, "silu"),
}


# --- The layers.


class GroupQuantLigerRMSNorm(GroupQuantRMSNorm):
    """weight * round(x_hat) in the dtype of x, as Liger's casting mode "llama"."""

    def _packed(self, x: Tensor, beside: bool) -> tuple[Tensor, list[Tensor]]:
        y, others = super()._packed(x, beside)
        return y if y.dtype == x.dtype else to(y, x.dtype), others


class GroupQuantLigerLayerNorm(Quantised):
    """The layer norm over the last dimension."""

    weight: Tensor
    bias: Tensor | None
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(hidden_states)
            return plain
        given = (tuple(self.weight.shape), self.weight, self.bias, self.variance_epsilon)
        return norms.layer_norm(hidden_states, *given, method=self.method)


# --- The rules.


def _owner(forward: Any) -> str:
    """The class of Liger's that a forward is of; nothing for any other forward."""
    if not (getattr(forward, "__module__", None) or "").startswith("liger_kernel."):
        return ""
    name: str = getattr(forward, "__qualname__", "").removesuffix(".forward")
    return name


def _rule_of(owner: str) -> Callable[[Quantiser, nn.Module], Swap] | None:
    if owner in _GATED:
        return lambda method, module: _gated(method, module, owner)
    return {"LigerRMSNorm": _rms_norm, "LigerLayerNorm": _layer_norm}.get(owner)


def _gated(method: Quantiser, module: nn.Module, owner: str) -> Swap:
    mixin, function = _GATED[owner]
    attributes = {"method": method, "packed_function": function}
    return Swap(joined(mixin, type(module)), attributes)


def _rms_norm(method: Quantiser, module: Any) -> Swap:
    mode, offset = module.casting_mode, module.offset
    if module.weight is None or mode not in ("llama", "gemma") or (mode == "llama" and offset):
        raise NotConverted(
            f"of Liger's RMS norms with casting_mode={mode!r}, offset={offset}"
            f"{'' if module.weight is not None else ' and no weight'} packlight has no rule"
        )
    if mode == "gemma":
        attributes = {"method": method, "offset": offset, "name_of_eps": "variance_epsilon"}
        return Swap(joined(GroupQuantWideRMSNorm, type(module)), attributes)
    attributes = {"method": method, "rounds_to_weight": False}
    return Swap(joined(GroupQuantLigerRMSNorm, type(module)), attributes)


def _layer_norm(method: Quantiser, module: nn.Module) -> Swap:
    return Swap(joined(GroupQuantLigerLayerNorm, type(module)), {"method": method})


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    forward = getattr(kind, "forward", None)  # mixins among the bases have none
    return _rule_of(_owner(forward)) if issubclass(method, Quantiser) else None


@patch_finder
def _find_patch(method: type[Method], forward: Callable[..., Any]) -> Rule | None:
    """The rule of a layer that has a forward of Liger's on its instance, which goes with it."""
    rule = _rule_of(_owner(forward)) if issubclass(method, Quantiser) else None
    if rule is None:
        return None

    def without_it(method: Quantiser, module: nn.Module) -> Swap:
        return rule(method, module)._replace(removed=("forward",))

    return without_it
