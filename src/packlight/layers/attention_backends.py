"""torch's fused kernels of attention: which of them torch would take, and their calls.

A call is of the operators below autograd, forward and backward, with what torch does before it.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from packlight import _torch
from packlight._checks import needs_gradient
from packlight._imagined import device_kind
from packlight._torch.hooks import unseen_by_hooks
from packlight._tracer import fake_of

_aten = torch.ops.aten

# Query, key, value and mask; plain tuples, which every tracer follows.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
# The probability of dropout, whether the mask is causal, and the scale, None for torch's.
Flags = tuple[float, bool, float | None]
# One of torch's kernels, and how often heads of key and value are to be repeated for it.
Kernel = tuple[int, int]
# The output, tensors of which the statistic of rows is the first, and sizes.
Results = tuple[Tensor, list[Tensor], tuple[int, ...]]


# --- What torch calls, and what it does before.


def prepared(inputs: Inputs, kernel: Kernel) -> Inputs:
    """Query, key, value and bias as the kernel takes them."""
    query, key, value, mask = inputs
    backend, repeats = kernel
    bias = bias_of(mask, query, key, backend)
    return query, repeated(key, repeats), repeated(value, repeats), bias


def run(given: Inputs, kernel: Kernel, flags: Flags) -> Results:
    """The output, and what the backward pass asks for: tensors, the statistic first, and sizes.

    `given` is `prepared`.
    """
    *qkv, bias = given
    query, backend = given[0], kernel[0]
    dropout_p, is_causal, scale = flags
    if device_kind(query) == "cpu":
        out, *tensors = _aten._scaled_dot_product_flash_attention_for_cpu(
            *qkv, dropout_p, is_causal, attn_mask=bias, scale=scale
        )
        return out, tensors, ()
    if backend == SDPBackend.EFFICIENT_ATTENTION.value:
        out, *tensors = _aten._scaled_dot_product_efficient_attention(
            *qkv, bias, True, dropout_p, is_causal, scale=scale
        )
        return out, tensors, ()
    if backend == SDPBackend.FLASH_ATTENTION.value:
        out, *tensors = _aten._scaled_dot_product_flash_attention(
            *qkv, dropout_p, is_causal, False, scale=scale
        )
    else:
        out, *tensors = _aten._scaled_dot_product_cudnn_attention(
            *qkv, bias, True, dropout_p, is_causal, False, scale=scale
        )
    return out, [*tensors[:3], *tensors[5:7]], tuple(tensors[3:5])


def gradients(
    grad_output: Tensor,
    given: Inputs,
    results: Results,
    kernel: Kernel,
    flags: Flags,
    needs: Sequence[bool] = (True, True, True),
    by_parts: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value, from what `run` gave for them; where `needs` says so, at least.

    With `by_parts` what torch's kernel takes beside them is less, and so is its speed.
    """
    *qkv, bias = given
    out, (statistic, *tensors), sizes = results
    backend, repeats = kernel
    dropout_p, is_causal, scale = flags
    common = (grad_output, *qkv, out, statistic)

    def backward(*common: Tensor) -> Sequence[Tensor]:
        found: Sequence[Tensor]
        if device_kind(grad_output) == "cpu":
            found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *common, dropout_p, is_causal, attn_mask=bias, scale=scale
            )
        elif backend == SDPBackend.FLASH_ATTENTION.value:
            found = _aten._scaled_dot_product_flash_attention_backward(
                *common, *tensors[:2], *sizes, dropout_p, is_causal, *tensors[2:], scale=scale
            )
        elif backend == SDPBackend.CUDNN_ATTENTION.value:
            found = _aten._scaled_dot_product_cudnn_attention_backward(
                *common, *tensors[2:], bias, *tensors[:2], *sizes, dropout_p, is_causal, scale=scale
            )
        else:
            found = _aten._scaled_dot_product_efficient_attention_backward(
                *common[:4], bias, *common[4:], *tensors, dropout_p,
                [*needs, False], is_causal, scale=scale,
            )  # fmt: skip
        return found

    # Dropout is drawn by the place in the batch, and a tracer would write out a call a part.
    by_parts = by_parts and not dropout_p and bias is None and not _torch.is_traced()
    dq, dk, dv = (_in_parts(backward, common) if by_parts else backward(*common))[:3]
    return dq, summed(dk, repeats), summed(dv, repeats)


def _in_parts(
    backward: Callable[..., Sequence[Tensor]], common: tuple[Tensor, ...]
) -> Sequence[Tensor]:
    """The gradients of some sequences after those of others, where heads of keys are fewer.

    Kernels have gradients of key and value for each head of the query first, and the query's in
    float32: four times what they return, of all that they are given.
    """
    query, key, value = common[1:4]
    batch, heads, length, _ = query.shape
    each = max(1, PART // (heads * length))
    if heads == key.shape[1] or each >= batch:
        return backward(*common)
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for start in range(0, batch, each):
        parts = backward(*(x[start : start + each] for x in common))
        for grad, part in zip(grads, parts[:3], strict=True):
            grad[start : start + each] = part
    return grads


# Rows of all heads of a query. A quarter of them fills a GPU too, and took 3% of the step of a
# Llama of 1.1B for 0.06 GiB.
PART = 2**18


def bias_of(mask: Tensor | None, query: Tensor, key: Tensor, backend: int) -> Tensor | None:
    """A mask as torch's kernels take it: numbers that are added to the scores."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        allowed = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, allowed, -torch.inf)
    if device_kind(query) == "cpu" or backend != SDPBackend.EFFICIENT_ATTENTION.value:
        return mask
    if mask.stride(-1) != 1 or any(stride % _ALIGNED for stride in mask.stride()[:-1]):
        length = mask.shape[-1]
        mask = F.pad(mask, (0, _ALIGNED - length % _ALIGNED))[..., :length]
    return mask.expand(*query.shape[:3], key.shape[2])


_ALIGNED = 8  # elements between rows of a bias, for the memory-efficient kernel


def repeated(x: Tensor, repeats: int) -> Tensor:
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=-3)


def summed(gradient: Tensor, repeats: int) -> Tensor:
    if repeats == 1:
        return gradient
    heads = gradient.shape[-3] // repeats
    return gradient.view(*gradient.shape[:-3], heads, repeats, *gradient.shape[-2:]).sum(-3)


# --- Which of torch's kernels: asked of torch, through the tracer where a region is compiled.

FUSED = (
    SDPBackend.FLASH_ATTENTION.value,
    SDPBackend.EFFICIENT_ATTENTION.value,
    SDPBackend.CUDNN_ATTENTION.value,
)
_NODES = {
    "ScaledDotProductFlashAttentionForCpuBackward0": SDPBackend.FLASH_ATTENTION.value,
    "ScaledDotProductFlashAttentionBackward0": SDPBackend.FLASH_ATTENTION.value,
    "ScaledDotProductEfficientAttentionBackward0": SDPBackend.EFFICIENT_ATTENTION.value,
    "ScaledDotProductCudnnAttentionBackward0": SDPBackend.CUDNN_ATTENTION.value,
}


NO_KERNEL = (SDPBackend.MATH.value, 1)


def is_replaced() -> bool:
    """Whether something stands in the place of torch's attention.

    As within torch's `context_parallel`, where each rank has some of the tokens and attention goes
    around all ranks. What stands there is to run, and not a kernel on this rank's tokens alone.
    """
    return not isinstance(F.scaled_dot_product_attention, types.BuiltinFunctionType)


def choose(inputs: Inputs, dropout_p: float, is_causal: bool) -> Kernel:
    if is_replaced():
        return NO_KERNEL
    query, key, value, mask = inputs
    heads, groups = query.shape[-3], key.shape[-3]  # the compiler's symbols where they vary
    repeats = 1 if heads == groups else int(heads // groups)
    backend = _choice(inputs, dropout_p, is_causal, repeats > 1)
    takes_groups = backend in FUSED and backend != SDPBackend.EFFICIENT_ATTENTION.value
    if repeats == 1 or takes_groups:
        return backend, 1
    # Of as many heads as the query has, which `_repeated` will make.
    shape = (*query.shape[:-2], *key.shape[-2:])
    key, value = (x[:, :1].expand(shape) for x in (key, value))
    return _choice((query, key, value, mask), dropout_p, is_causal, False), repeats


def _choice(inputs: Inputs, dropout_p: float, is_causal: bool, enable_gqa: bool) -> int:
    query, key, value, mask = inputs
    if not _torch.is_fake(query):
        if not any(needs_gradient(x) for x in (query, key, value)):
            with torch.enable_grad():  # the kernel of the pass with gradients
                query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
                return _choice((query, key, value, mask), dropout_p, is_causal, enable_gqa)
        return _torch.attention_backend(*inputs, dropout_p, is_causal, enable_gqa=enable_gqa)
    # Of tensors without values that operator says "math", whatever torch takes for them.
    if mask is not None:  # torch makes numbers of booleans, and here some that do have values
        mask = query.new_empty(mask.shape)
    fake_mode: Any = query.fake_mode  # type: ignore[attr-defined]
    # Nobody is to count a call that is no more than a question.
    with _torch.unseen_by_modes(), fake_mode, torch.enable_grad(), unseen_by_hooks():
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal, enable_gqa=enable_gqa
        )
    assert out.grad_fn is not None
    return _NODES.get(out.grad_fn.name(), SDPBackend.MATH.value)


@_torch.question
def attention_kernel(tracer: Any, *given: Any) -> Kernel:
    *tensors, dropout_p, is_causal = given
    inputs: Any = [None if x.python_type() is type(None) else fake_of(x) for x in tensors]
    return choose(inputs, dropout_p.as_python_constant(), is_causal.as_python_constant())


def kernel_of(inputs: Inputs, dropout_p: float, is_causal: bool) -> Kernel:
    """The kernel that torch would take."""
    if not torch.compiler.is_dynamo_compiling():
        return choose(inputs, dropout_p, is_causal)
    # A float that took two values is a symbol to the compiler; hashed, it is a number again.
    dropout_p = next(iter({dropout_p}))
    kernel: Kernel = _torch.ask("attention_kernel", NO_KERNEL, *inputs, dropout_p, is_causal)
    return kernel
