"""Scaled dot-product attention that keeps packs of query, key, value and output.

torch's fused kernels keep all four for their backward pass, with a statistic a row. Here the same
kernels run, forward and backward, and the four are packed in between. The pack of the output
serves the linear layer that reads it too.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from packlight import _torch, _tracer, sharing
from packlight._checks import check_tensor, is_taken, needs_gradient, refuse_second_derivative
from packlight._seeds import Seed
from packlight._torch.hooks import unseen_by_hooks
from packlight._tracer import fake_of
from packlight.pack import Pack
from packlight.packing.layout import dense_stride
from packlight.quantiser import KEEPS, Quantiser, Restore

_aten = torch.ops.aten

# Query, key, value and mask; plain tuples, which every tracer follows.
_Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
# The probability of dropout, whether the mask is causal, and the scale, None for torch's.
_Flags = tuple[float, bool, float | None]
# One of torch's kernels, and how often heads of key and value are to be repeated for it.
_Kernel = tuple[int, int]


class _Attention(torch.autograd.Function):
    """The output, and its pack; keeps packs of all four and what the fused kernel asks for."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kernel: _Kernel,
        flags: _Flags,
        method: Quantiser,
        whole: Tensor | None,
        *seeds: Seed,
    ) -> tuple[Tensor, ...]:
        """`whole` is what query, key and value are parts of, where they are all of it."""
        out, tensors, sizes = _run((query, key, value, mask), kernel, flags)
        inputs = (query, key, value)
        own = (*inputs, out) if whole is None else (whole, out)
        packs = [method.pack(x, seed) for x, seed in zip(own, seeds, strict=True)]
        ctx.mark_non_differentiable(*packs[-1])
        ctx.set_materialize_grads(False)
        ctx.rebuilds = [Restore(method, tuple(x.shape), dense_stride(x)) for x in own]
        ctx.places = None if whole is None else [_place(x, whole) for x in inputs]
        # The mask as it was given: a bias made of it would be four times as large, for each layer.
        ctx.save_for_backward(*[part for pack in packs for part in pack], mask, *tensors)
        ctx.settings = (query.dtype, kernel, flags, sizes, len(packs[-1]))
        return out, *packs[-1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        dtype, kernel, (*flags, scale), sizes, parts = ctx.settings
        backend, repeats = kernel
        saved = ctx.saved_tensors
        *inputs, out = [
            rebuild(dtype, *saved[parts * i : parts * (i + 1)])
            for i, rebuild in enumerate(ctx.rebuilds)
        ]
        if ctx.places is not None:
            inputs = [inputs[0].as_strided(*place) for place in ctx.places]
        query, key, value = inputs
        mask, statistic, *tensors = saved[len(ctx.rebuilds) * parts :]
        bias = _bias(mask, query, key, backend)
        qkv = (query, _repeated(key, repeats), _repeated(value, repeats))
        common = (grad_output, *qkv, out, statistic)
        if grad_output.device.type == "cpu":
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *common, *flags, attn_mask=bias, scale=scale
            )
        elif backend == SDPBackend.FLASH_ATTENTION.value:
            grads = _aten._scaled_dot_product_flash_attention_backward(
                *common, *tensors[:2], *sizes, *flags, *tensors[2:], scale=scale
            )
        elif backend == SDPBackend.CUDNN_ATTENTION.value:
            grads = _aten._scaled_dot_product_cudnn_attention_backward(
                *common, *tensors[2:], bias, *tensors[:2], *sizes, *flags, scale=scale
            )
        else:
            dropout_p, is_causal = flags
            grads = _aten._scaled_dot_product_efficient_attention_backward(
                grad_output, *qkv, bias, out, statistic, *tensors, dropout_p,
                [*ctx.needs_input_grad[:3], False], is_causal, scale=scale,
            )  # fmt: skip
        dq, dk, dv = grads[:3]
        others = len(ctx.needs_input_grad) - 3
        return dq, _summed(dk, repeats), _summed(dv, repeats), *[None] * others


# --- Query, key and value as parts of one tensor.


def _whole(query: Tensor, key: Tensor, value: Tensor, method: Quantiser) -> Tensor | None:
    """The tensor that the three are views of, if they are all of it: one pack serves them.

    As where one projection makes all three. Each would be copied out of it to be packed by itself.
    None where groups of a pack would lie across two of them.
    """
    whole = query._base
    if whole is None or key._base is not whole or value._base is not whole:
        return None
    _, heads, _, size = query.shape
    fits = (
        query.shape == key.shape
        and whole.numel() == 3 * query.numel()
        and whole.is_contiguous()
        and heads * size % method.grade.group_size == 0
    )
    if not fits:
        return None
    for x in (query, key, value):  # heads side by side, in the memory that the tensor has now
        if x.stride()[1::2] != (size, 1) or not _torch.share_storage(x, whole):
            return None
    return whole.detach()


def _place(x: Tensor, whole: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and offset of a view of a contiguous tensor."""
    return tuple(x.shape), x.stride(), int(x.storage_offset() - whole.storage_offset())


# --- What torch calls, and what it does before.


def _run(
    inputs: _Inputs, kernel: _Kernel, flags: _Flags
) -> tuple[Tensor, list[Tensor], tuple[int, ...]]:
    """The output, and what the backward pass asks for: tensors, the statistic first, and sizes."""
    query, key, value, mask = inputs
    backend, repeats = kernel
    dropout_p, is_causal, scale = flags
    qkv = (query, _repeated(key, repeats), _repeated(value, repeats))
    bias = _bias(mask, query, key, backend)
    if query.device.type == "cpu":
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


def _bias(mask: Tensor | None, query: Tensor, key: Tensor, backend: int) -> Tensor | None:
    """A mask as torch's kernels take it: numbers that are added to the scores."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        allowed = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, allowed, -torch.inf)
    if query.device.type == "cpu" or backend != SDPBackend.EFFICIENT_ATTENTION.value:
        return mask
    if mask.stride(-1) != 1 or any(stride % _ALIGNED for stride in mask.stride()[:-1]):
        length = mask.shape[-1]
        mask = F.pad(mask, (0, _ALIGNED - length % _ALIGNED))[..., :length]
    return mask.expand(*query.shape[:3], key.shape[2])


_ALIGNED = 8  # elements between rows of a bias, for the memory-efficient kernel


def _repeated(x: Tensor, repeats: int) -> Tensor:
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=-3)


def _summed(gradient: Tensor, repeats: int) -> Tensor:
    if repeats == 1:
        return gradient
    heads = gradient.shape[-3] // repeats
    return gradient.view(*gradient.shape[:-3], heads, repeats, *gradient.shape[-2:]).sum(-3)


# --- Which of torch's kernels: asked of torch, through the tracer where a region is compiled.

_FUSED = (
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


_NO_KERNEL = (SDPBackend.MATH.value, 1)


def _choose(inputs: _Inputs, dropout_p: float, is_causal: bool) -> _Kernel:
    query, key, value, mask = inputs
    heads, groups = query.shape[-3], key.shape[-3]  # the compiler's symbols where they vary
    repeats = 1 if heads == groups else int(heads // groups)
    backend = _choice(inputs, dropout_p, is_causal, repeats > 1)
    takes_groups = backend in _FUSED and backend != SDPBackend.EFFICIENT_ATTENTION.value
    if repeats == 1 or takes_groups:
        return backend, 1
    # Of as many heads as the query has, which `_repeated` will make.
    shape = (*query.shape[:-2], *key.shape[-2:])
    key, value = (x[:, :1].expand(shape) for x in (key, value))
    return _choice((query, key, value, mask), dropout_p, is_causal, False), repeats


def _choice(inputs: _Inputs, dropout_p: float, is_causal: bool, enable_gqa: bool) -> int:
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
    with fake_mode, torch.enable_grad(), unseen_by_hooks():
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal, enable_gqa=enable_gqa
        )
    assert out.grad_fn is not None
    return _NODES.get(out.grad_fn.name(), SDPBackend.MATH.value)


@_torch.question
def attention_kernel(tracer: Any, *given: Any) -> _Kernel:
    *tensors, dropout_p, is_causal = given
    inputs: Any = [None if x.python_type() is type(None) else fake_of(x) for x in tensors]
    return _choose(inputs, dropout_p.as_python_constant(), is_causal.as_python_constant())


def _kernel(inputs: _Inputs, dropout_p: float, is_causal: bool) -> _Kernel:
    """The kernel that torch would take."""
    if not torch.compiler.is_dynamo_compiling():
        return _choose(inputs, dropout_p, is_causal)
    # A float that took two values is a symbol to the compiler; hashed, it is a number again.
    dropout_p = next(iter({dropout_p}))
    kernel: _Kernel = _torch.ask("attention_kernel", _NO_KERNEL, *inputs, dropout_p, is_causal)
    return kernel


_attend: Callable[..., tuple[Tensor, ...]] = _torch.applied(_Attention)


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
    method: Quantiser,
) -> Tensor:
    """softmax(Q K^T scale) V by torch's fused kernels, q [..., heads, length, head_dim].

    Keeps packs of query, key, value and output, and the kernel's statistic, 32 bits a row. Biased:
    the backward pass recomputes the softmax from packed query and key, with the exact statistic.
    The method is taken as it is given; `Quantiser.for_scores` is that for scores.

    A mask is kept as it is given, once for all layers that read it; torch keeps a bias made of it
    for each. With `enable_gqa` the heads of key and value are packed once, also where the kernel
    needs them repeated.

    Where torch would not take a fused kernel, where the mask needs a gradient, and where the head
    dimension is no multiple of 8, torch's own function runs and keeps what it keeps.
    """
    for tensor in (query, key, value):
        check_tensor(tensor, "scaled_dot_product_attention")
    flags = (dropout_p, is_causal, scale)
    out = attend((query, key, value, attn_mask), flags, enable_gqa, method)
    if out is not None:
        return out
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def attend(inputs: _Inputs, flags: _Flags, enable_gqa: bool, method: Quantiser) -> Tensor | None:
    """`scaled_dot_product_attention`; None where torch's own function is to run.

    With dropout the kernel of the pass with gradients runs in the pass without them too: each
    kernel draws in its own way.
    """
    query, key, value, mask = inputs
    dropout_p, is_causal, _ = flags
    if not all(is_taken(x) for x in (query, key, value)):
        return None
    if query.dim() != 4 or (mask is not None and mask.requires_grad):
        return None
    if query.shape[-1] % 8 or key.shape[-1] != query.shape[-1]:
        return None
    heads, groups = query.shape[-3], key.shape[-3]
    if heads != groups and (not enable_gqa or heads % groups):
        return None  # torch raises
    # What its kernels do not take, and do not check.
    if key.shape != value.shape or query.shape[0] != key.shape[0]:
        return None
    kind = query.device.type
    wanted = any(needs_gradient(x) for x in (query, key, value))
    if not wanted and not dropout_p:
        return None
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(dtype)
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        return None
    inputs = (query, key, value, mask)
    kernel = _kernel(inputs, dropout_p, is_causal)
    if kernel[0] not in _FUSED:
        return None
    if not wanted:
        return _run(inputs, kernel, flags)[0]
    if torch.compiler.is_dynamo_compiling():
        key, value = _tracer.apart(key, query), _tracer.apart(value, query, key)
    traced = torch.compiler.is_dynamo_compiling()
    whole = None if traced else _whole(query, key, value, method)
    seeds = [method.seed(query) for _ in range(4 if whole is None else 2)]
    out, *kept = _attend(query, key, value, mask, kernel, flags, method, whole, *seeds)
    shape = tuple(out.shape)
    rebuild = Restore(method, shape, out.stride())
    sharing.note_pack(out, Pack(rebuild, shape, tuple(kept), method.grade))
    return out
