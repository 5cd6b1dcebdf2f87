"""torch.nn.functional's names and arguments, and `method`: activations and gated units.

Each computes what torch's function computes and keeps packs of its inputs.
"""

import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import check_tensor
from packlight.errors import InputError
from packlight.layers.activations import activation, gated, gelu_name
from packlight.quantiser import Quantiser


def celu(
    input: Tensor,
    alpha: float = 1.0,
    *,
    method: Quantiser,
) -> Tensor:
    """max(0, x) + min(0, alpha (e^(x / alpha) - 1)). Keeps a pack of x; biased."""
    return activation(input, "celu", method, (alpha,))


def elu(
    input: Tensor,
    alpha: float = 1.0,
    *,
    method: Quantiser,
) -> Tensor:
    """x for x > 0, else alpha (e^x - 1). Keeps a pack of x; biased."""
    return activation(input, "elu", method, (alpha,))


def gelu(
    input: Tensor,
    approximate: str = "none",
    *,
    method: Quantiser,
) -> Tensor:
    """x Phi(x), or its tanh approximation. Keeps a pack of x; biased."""
    name = gelu_name(approximate)
    return activation(input, name, method)


def hardswish(
    input: Tensor,
    *,
    method: Quantiser,
) -> Tensor:
    """x min(max(x + 3, 0), 6) / 6. Keeps a pack of x; biased."""
    return activation(input, "hardswish", method)


def logsigmoid(
    input: Tensor,
    *,
    method: Quantiser,
) -> Tensor:
    """log(1 / (1 + e^-x)). Keeps a pack of x; biased."""
    return activation(input, "logsigmoid", method)


def mish(
    input: Tensor,
    *,
    method: Quantiser,
) -> Tensor:
    """x tanh(log(1 + e^x)). Keeps a pack of x; biased."""
    return activation(input, "mish", method)


def quick_gelu(
    input: Tensor,
    *,
    method: Quantiser,
) -> Tensor:
    """x sigmoid(1.702 x), as in CLIP. Keeps a pack of x; biased."""
    return activation(input, "quick_gelu", method)


def relu_squared(
    input: Tensor,
    *,
    method: Quantiser,
) -> Tensor:
    """max(x, 0)^2, from Primer. Keeps a pack of x; biased."""
    return activation(input, "relu_squared", method)


def selu(
    input: Tensor,
    *,
    method: Quantiser,
) -> Tensor:
    """Self-normalising ELU. Keeps a pack of x; biased."""
    return activation(input, "selu", method)


def sigmoid(
    input: Tensor,
    *,
    method: Quantiser,
) -> Tensor:
    """1 / (1 + e^-x). Keeps a pack of x; biased."""
    return activation(input, "sigmoid", method)


def silu(
    input: Tensor,
    *,
    method: Quantiser,
) -> Tensor:
    """x sigmoid(x), also called swish. Keeps a pack of x; biased."""
    return activation(input, "silu", method)


def softplus(
    input: Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
    *,
    method: Quantiser,
) -> Tensor:
    """log(1 + e^(beta x)) / beta, and x where beta x > threshold. Keeps a pack of x; biased."""
    return activation(input, "softplus", method, (beta, threshold))


def softsign(
    input: Tensor,
    *,
    method: Quantiser,
) -> Tensor:
    """x / (1 + |x|). Keeps a pack of x; biased."""
    return activation(input, "softsign", method)


def tanh(
    input: Tensor,
    *,
    method: Quantiser,
) -> Tensor:
    """Hyperbolic tangent. Keeps a pack of x; biased."""
    return activation(input, "tanh", method)


def tanhshrink(
    input: Tensor,
    *,
    method: Quantiser,
) -> Tensor:
    """x - tanh(x). Keeps a pack of x; biased."""
    return activation(input, "tanhshrink", method)


@_torch.one_node
def swiglu(
    gate: Tensor,
    up: Tensor,
    *,
    method: Quantiser,
) -> Tensor:
    """silu(gate) up, the gated unit of Llama.

    Keeps packs of gate and up, from which a `linear` that reads the product rebuilds it; biased.
    """
    return gated(gate, up, "silu", method, lambda gate, up: F.silu(gate) * up)


@_torch.one_node
def geglu(
    gate: Tensor,
    up: Tensor,
    approximate: str = "none",
    *,
    method: Quantiser,
) -> Tensor:
    """gelu(gate) up, with either form of GELU.

    Keeps packs of gate and up, from which a `linear` that reads the product rebuilds it; biased.
    """
    return gated(
        gate,
        up,
        gelu_name(approximate),
        method,
        lambda gate, up: F.gelu(gate, approximate=approximate) * up,
    )


@_torch.one_node
def reglu(
    gate: Tensor,
    up: Tensor,
    *,
    method: Quantiser,
) -> Tensor:
    """relu(gate) up. The mask is that of the packed gate.

    Keeps packs of gate and up, from which a `linear` that reads the product rebuilds it; biased.
    """
    return gated(gate, up, "relu", method, lambda gate, up: F.relu(gate) * up)


@_torch.one_node
def glu(
    input: Tensor,
    dim: int = -1,
    *,
    method: Quantiser,
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
    return gated(gate, up, "sigmoid", method, lambda gate, up: F.glu(input, dim))
