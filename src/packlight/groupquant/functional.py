"""Functions that keep group-quantised tensors: torch.nn.functional's names and arguments, plus
`bits`, `group_size`, `rounding` and `code` as `GroupQuant` has them.

Each computes what torch's function computes. What differs is what is kept for the backward pass: a
pack of `bits + 32 / group_size` bits an element in place of 16 or 32. A tensor that several
functions need is packed once, with the bits of the first that does:

- functions that read one tensor (q, k, v) share its pack;
- `linear` keeps nothing of its own where its input was made by a norm, an activation or a gated
  unit of this module: it rebuilds its input from what they keep.

Gradients of `linear` with respect to input and bias are exact; where the pack is of the input
itself the weight's is unbiased with stochastic rounding and offsets and nearly so of rotated
groups, and it is biased where the input is rebuilt through an activation. Where no gradient is
asked for nothing is packed and the plain torch function runs. A second derivative raises
`DoubleBackwardError`.
"""

from collections.abc import Sequence

from torch import Tensor

from packlight.groupquant.grouping import Code, Rounding
from packlight.groupquant.method import GroupQuant
from packlight.layers import attention
from packlight.layers import functional as layers
from packlight.layers import linear as layers_linear
from packlight.layers import norms as layers_norms
from packlight.layers.prelu import prelu as layers_prelu

_DEFAULT = GroupQuant()

# ---- matrix products and norms -------------------------------------------------------------------


def _method(bits: int, group_size: int, rounding: Rounding, code: Code) -> GroupQuant:
    """The method for functions that are not linear."""
    return GroupQuant(bits, group_size, rounding, code).for_functions()


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """x W^T + b, x [..., in], W [out, in], b [out].

    Keeps `bits + 32 / group_size` bits an element of x, or nothing where x is packed already, and W
    itself. Input and bias gradients exact, weight gradient unbiased with stochastic rounding and
    offsets, nearly so of rotated groups.
    """
    method = GroupQuant(bits, group_size, rounding, code)
    return layers_linear.linear(input, weight, bias, method=method)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """(x - mean) rstd weight + bias over the last dimensions, `normalized_shape`.

    Keeps a pack of x_hat = (x - mean) rstd, from which the next `linear` rebuilds its input, and
    rstd: `bits + 32 / group_size` bits an element and 32 a row. With x~ the packed value,
    dx = rstd (g - mean g - x~ mean(g x~)) for g = dy weight, and dweight = sum dy x~, which is
    unbiased with stochastic rounding and offsets; dbias is exact.
    """
    method = GroupQuant(bits, group_size, rounding, code).for_norms()
    return layers_norms.layer_norm(input, normalized_shape, weight, bias, eps, method=method)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """x rstd weight over the last dimensions, rstd = 1 / sqrt(mean x^2 + eps).

    Keeps what `layer_norm` keeps; dx = rstd (g - x~ mean(g x~)).
    """
    method = GroupQuant(bits, group_size, rounding, code).for_norms()
    return layers_norms.rms_norm(input, normalized_shape, weight, eps, method=method)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    bits: int | None = None,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
    recompute: bool | None = None,
) -> Tensor:
    """softmax(Q K^T scale) V by torch's fused kernels, q [..., heads, length, head_dim].

    Keeps packs of query, key and value, `bits + 32 / group_size` bits an element, in one of two
    forms. The default is 4 bits where groups are rotated and 8 where they are not; 3 can be used,
    2 raise `InputError`.

    `recompute=False`, the form of 8 bits and more than 256 keys, keeps a pack of the output too,
    which serves the linear layer behind, and the kernel's statistic, 32 bits a row. Nothing runs
    again. The softmax is recomputed from decoded query and key with the statistic of exact ones:
    biased.

    `recompute=True`, the form of fewer bits or keys, keeps no more; below 8 bits the pack of the
    query is of what is left without its mean over tokens, which is kept beside it. The backward
    pass decodes the packs, runs the kernel forward again, with the same dropout, and backward: the
    gradient is that of attention of the decoded tensors, biased, since a softmax is not linear in
    them, with about half the error of the other form at 8 bits. With dropout in a compiled region
    or in a captured CUDA graph, where masks cannot be drawn again, the other form runs at 8 bits
    whatever is asked for.

    A mask is kept as it is given, once for all layers that read it; torch keeps a bias made of it
    for each. With `enable_gqa` the heads of key and value are packed once, also where the kernel
    needs them repeated.

    Where torch would not take a fused kernel, where the mask needs a gradient, and where the head
    dimension is no multiple of 8, torch's own function runs and keeps what it keeps.
    """
    given = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if bits is None:
        method = GroupQuant(_DEFAULT.bits, group_size, rounding, code).for_attention()
    else:
        method = _method(bits, group_size, rounding, code)
    return attention.scaled_dot_product_attention(
        query, key, value, *given, method=method, recompute=recompute
    )


# ---- activations ---------------------------------------------------------------------------------


def celu(
    input: Tensor,
    alpha: float = 1.0,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """max(0, x) + min(0, alpha (e^(x / alpha) - 1)). Keeps a pack of x; biased."""
    return layers.celu(input, alpha, method=_method(bits, group_size, rounding, code))


def elu(
    input: Tensor,
    alpha: float = 1.0,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """x for x > 0, else alpha (e^x - 1). Keeps a pack of x; biased."""
    return layers.elu(input, alpha, method=_method(bits, group_size, rounding, code))


def gelu(
    input: Tensor,
    approximate: str = "none",
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """x Phi(x), or its tanh approximation. Keeps a pack of x; biased."""
    return layers.gelu(input, approximate, method=_method(bits, group_size, rounding, code))


def hardswish(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """x min(max(x + 3, 0), 6) / 6. Keeps a pack of x; biased."""
    return layers.hardswish(input, method=_method(bits, group_size, rounding, code))


def logsigmoid(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """log(1 / (1 + e^-x)). Keeps a pack of x; biased."""
    return layers.logsigmoid(input, method=_method(bits, group_size, rounding, code))


def mish(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """x tanh(log(1 + e^x)). Keeps a pack of x; biased."""
    return layers.mish(input, method=_method(bits, group_size, rounding, code))


def quick_gelu(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """x sigmoid(1.702 x), as in CLIP. Keeps a pack of x; biased."""
    return layers.quick_gelu(input, method=_method(bits, group_size, rounding, code))


def relu_squared(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """max(x, 0)^2, from Primer. Keeps a pack of x; biased."""
    return layers.relu_squared(input, method=_method(bits, group_size, rounding, code))


def selu(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """Self-normalising ELU. Keeps a pack of x; biased."""
    return layers.selu(input, method=_method(bits, group_size, rounding, code))


def sigmoid(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """1 / (1 + e^-x). Keeps a pack of x; biased."""
    return layers.sigmoid(input, method=_method(bits, group_size, rounding, code))


def silu(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """x sigmoid(x), also called swish. Keeps a pack of x; biased."""
    return layers.silu(input, method=_method(bits, group_size, rounding, code))


def softplus(
    input: Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """log(1 + e^(beta x)) / beta, and x where beta x > threshold. Keeps a pack of x; biased."""
    return layers.softplus(input, beta, threshold, method=_method(bits, group_size, rounding, code))


def softsign(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """x / (1 + |x|). Keeps a pack of x; biased."""
    return layers.softsign(input, method=_method(bits, group_size, rounding, code))


def tanh(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """Hyperbolic tangent. Keeps a pack of x; biased."""
    return layers.tanh(input, method=_method(bits, group_size, rounding, code))


def tanhshrink(
    input: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """x - tanh(x). Keeps a pack of x; biased."""
    return layers.tanhshrink(input, method=_method(bits, group_size, rounding, code))


def prelu(
    input: Tensor,
    weight: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """x for x > 0, else a x, with slopes a [1] or [channels]. Keeps 1 bit and, where the slopes
    train, a pack of x; the gradient of x is exact, that of a unbiased."""
    return layers_prelu(input, weight, method=_method(bits, group_size, rounding, code))


# ---- gated units ---------------------------------------------------------------------------------


def swiglu(
    gate: Tensor,
    up: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """silu(gate) up, the gated unit of Llama.

    Keeps packs of gate and up, from which a `linear` that reads the product rebuilds it; biased.
    """
    return layers.swiglu(gate, up, method=_method(bits, group_size, rounding, code))


def geglu(
    gate: Tensor,
    up: Tensor,
    approximate: str = "none",
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """gelu(gate) up, with either form of GELU.

    Keeps packs of gate and up, from which a `linear` that reads the product rebuilds it; biased.
    """
    return layers.geglu(gate, up, approximate, method=_method(bits, group_size, rounding, code))


def reglu(
    gate: Tensor,
    up: Tensor,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """relu(gate) up. The mask is that of the packed gate.

    Keeps packs of gate and up, from which a `linear` that reads the product rebuilds it; biased.
    """
    return layers.reglu(gate, up, method=_method(bits, group_size, rounding, code))


def glu(
    input: Tensor,
    dim: int = -1,
    *,
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
    code: Code = _DEFAULT.code,
) -> Tensor:
    """a sigmoid(b) for the halves a and b of `input` along `dim`.

    Keeps packs of gate and up, from which a `linear` that reads the product rebuilds it; biased.
    """
    return layers.glu(input, dim, method=_method(bits, group_size, rounding, code))
