"""Activation modules of transformers.

| class | function |
| --- | --- |
| GELUActivation | `gelu` |
| GELUTanh, NewGELUActivation, FastGELUActivation, AccurateGELUActivation | `gelu_tanh` |
| QuickGELUActivation | `quick_gelu` |
| SiLUActivation | `silu` |
| MishActivation | `mish` |
| ReLUSquaredActivation | `relu_squared` |

The forward is that of the plain module, bit for bit, where that calls torch's function or is
written as ours. Those that write a GELU out in Python operations (NewGELU, FastGELU, AccurateGELU,
`use_gelu_python`) round after each of them; in their place torch's function runs, which computes
the same formula at once: in float32 both are within 1e-6 of its true value, in 16 bits torch's
function is nearer to it than the plain module.

All others (clipped GELU, Laplace, xIELU, ...) have no rule.
"""

from torch import nn
from transformers import activations

from packlight import _swap
from packlight.integrations._activations import register

FUNCTIONS: dict[type[nn.Module], str] = {
    activations.AccurateGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.MishActivation: "mish",
    activations.NewGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    activations.ReLUSquaredActivation: "relu_squared",
    activations.SiLUActivation: "silu",
}

_OF_TORCH: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}


def function_of(module: nn.Module) -> str | None:
    """What an activation module computes, by the name that it has in packlight; None if unknown."""
    was = _swap.former(module)
    kind = type(module) if was is None else was.kind
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return FUNCTIONS.get(kind) or _OF_TORCH.get(kind)


register(FUNCTIONS)
