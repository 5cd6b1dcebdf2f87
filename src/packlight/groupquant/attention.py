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
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend

from packlight import sharing
from packlight._checks import check_tensor, needs_gradient, refuse_second_derivative
from packlight.groupquant.method import GroupQuant, Rounding
from packlight.groupquant.packs import KEEPS, Rebuild, new_pack
from packlight.sharing import Pack

_aten = torch.ops.aten
_DEFAULT = GroupQuant(bits=8)


class _Attention(torch.autograd.Function):
    """The output, and its pack; keeps packs of all four and what the fused kernel asks for."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        backend: int,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        method: GroupQuant,
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = (query, key, value)
        # Sizes that the backward pass asks for, and tensors: the statistic first.
        sizes: tuple[int, ...] = ()
        if query.device.type == "cpu":
            out, *tensors = _aten._scaled_dot_product_flash_attention_for_cpu(
                *qkv, dropout_p, is_causal, scale=scale
            )
        elif backend == SDPBackend.FLASH_ATTENTION.value:
            out, *tensors = _aten._scaled_dot_product_flash_attention(
                *qkv, dropout_p, is_causal, False, scale=scale
            )
            tensors, sizes = [*tensors[:3], *tensors[5:7]], tuple(tensors[3:5])
        elif backend == SDPBackend.CUDNN_ATTENTION.value:
            out, *tensors = _aten._scaled_dot_product_cudnn_attention(
                *qkv, None, True, dropout_p, is_causal, False, scale=scale
            )
            tensors, sizes = [*tensors[:3], *tensors[5:7]], tuple(tensors[3:5])
        else:
            out, *tensors = _aten._scaled_dot_product_efficient_attention(
                *qkv, None, True, dropout_p, is_causal, scale=scale
            )
        packed = [new_pack(x, method) for x in (*qkv, out)]
        codes, scales = packed[3][1]
        ctx.mark_non_differentiable(codes, scales)
        ctx.set_materialize_grads(False)
        ctx.rebuilds = [rebuild for rebuild, _ in packed]
        ctx.save_for_backward(*(part for _, pack in packed for part in pack), *tensors)
        ctx.settings = (query.dtype, backend, dropout_p, is_causal, scale, sizes)
        return sharing.notable(out), codes, scales

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        if grad_output is None:
            return (None,) * 8
        dtype, backend, dropout_p, is_causal, scale, sizes = ctx.settings
        saved = ctx.saved_tensors
        kept = [
            rebuild(dtype, saved[2 * i], saved[2 * i + 1]) for i, rebuild in enumerate(ctx.rebuilds)
        ]
        statistic, *tensors = saved[8:]
        common = (grad_output, *kept, statistic)
        flags = (dropout_p, is_causal)
        if grad_output.device.type == "cpu":
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *common, *flags, scale=scale
            )
        elif backend == SDPBackend.FLASH_ATTENTION.value:
            grads = _aten._scaled_dot_product_flash_attention_backward(
                *common, *tensors[:2], *sizes, *flags, *tensors[2:], scale=scale
            )
        elif backend == SDPBackend.CUDNN_ATTENTION.value:
            grads = _aten._scaled_dot_product_cudnn_attention_backward(
                *common, *tensors[2:], None, *tensors[:2], *sizes, *flags, scale=scale
            )
        else:
            dy, q, k, v, out, _ = common
            grads = _aten._scaled_dot_product_efficient_attention_backward(
                dy, q, k, v, None, out, statistic, *tensors, dropout_p,
                [*ctx.needs_input_grad[:3], False], is_causal, scale=scale,
            )  # fmt: skip
        return *grads[:3], *[None] * 5


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
_traced: dict[str, int] = {}


def _choose(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool) -> int:
    enable_gqa = query.shape[-3] != key.shape[-3]
    if not isinstance(query, FakeTensor):
        return torch._fused_sdp_choice(
            query, key, value, None, dropout_p, is_causal, enable_gqa=enable_gqa
        )
    # Of tensors without values that operator says "math", whatever torch takes for them.
    with torch.enable_grad(), saved_tensors_hooks(_unchanged, _unchanged):
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, None, dropout_p, is_causal, enable_gqa=enable_gqa
        )
    assert out.grad_fn is not None
    return _NODES.get(out.grad_fn.name(), SDPBackend.MATH.value)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _ask_tracer(context: Any) -> None:
    query, key, value = (context.get_local(name).as_fake() for name in ("query", "key", "value"))
    dropout_p, is_causal = (
        context.get_local(name).as_python_constant() for name in ("dropout_p", "is_causal")
    )
    _traced["backend"] = _choose(query, key, value, dropout_p, is_causal)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _told_backend() -> int:
    return _traced["backend"]


def _backend(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool) -> int:
    """The number of the kernel that torch would take."""
    if torch.compiler.is_compiling():
        from torch._dynamo.comptime import comptime

        # A float that took two values is a symbol to the compiler; hashed, it is a number again.
        dropout_p = next(iter({dropout_p}))
        comptime(_ask_tracer)
        backend: int = _told_backend()
        return backend
    return _choose(query, key, value, dropout_p, is_causal)


_attend: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Attention.apply


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
    bits: int = _DEFAULT.bits,
    group_size: int = _DEFAULT.group_size,
    rounding: Rounding = _DEFAULT.rounding,
) -> Tensor:
    """softmax(Q K^T scale) V by torch's fused kernels, q [..., heads, length, head_dim].

    Keeps packs of query, key, value and output, `bits + 32 / group_size` bits an element, and the
    kernel's statistic, 32 bits a row. Biased: the backward pass recomputes the softmax from packed
    query and key, with the exact statistic. 8 bits are the default; with 4 the recomputed
    probabilities are off by a tenth.

    Where torch would not take a fused kernel, with an explicit `attn_mask`, and where the head
    dimension is no multiple of 8, torch's own function runs and keeps what it keeps.
    """
    method = GroupQuant(bits, group_size, rounding)
    arguments = (attn_mask, dropout_p, is_causal)
    for tensor in (query, key, value):
        check_tensor(tensor, "scaled_dot_product_attention")

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, *arguments, scale=scale, enable_gqa=enable_gqa
        )

    qkv = (query, key, value)
    kind = query.device.type
    if not any(needs_gradient(x) for x in qkv) or attn_mask is not None or query.dim() != 4:
        return plain()
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        qkv = (query.to(dtype), key.to(dtype), value.to(dtype))
    if query.shape[-1] % 8 or value.shape[-1] != query.shape[-1]:
        return plain()
    if query.shape[-3] != key.shape[-3] and not enable_gqa:
        return plain()  # which raises, as torch does
    backend = _backend(*qkv, dropout_p, is_causal)
    if backend not in _FUSED:
        return plain()
    out, codes, scales = _attend(*qkv, backend, dropout_p, is_causal, scale, method)
    layout = (tuple(out.shape), out.stride(), out.numel(), bits, group_size)
    sharing.note_output(out, Pack(Rebuild(*layout), tuple(out.shape), (codes, scales)))
    return out
