"""A run that is imagined on a GPU, on tensors without values that say they are on the CPU.

Autograd refuses tensors of a device that is not there, so what is foretold for a GPU runs on fake
tensors of the CPU (`planner/walk.py`). What PyTorch and packlight do otherwise on a GPU, they are
told here.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# How many runs are imagined. A plain number, which the tracer of torch.compile can guard; a pass in
# another thread meanwhile computes the same by other chunks.
_imagining = 0


def device_kind(x: Tensor) -> str:
    """`x.device.type`, without the object of a device that torch makes for it at each question."""
    return "cuda" if x.is_cuda else x.device.type


def kind_of(x: Tensor) -> str:
    """The type of the device on which a tensor lies, or is imagined to lie."""
    return "cuda" if _imagining or x.is_cuda else x.device.type


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    """Calls of torch functions within do what they would on a GPU, as far as memory goes."""
    global _imagining
    _imagining += 1
    try:
        with OnGpu():
            yield
    finally:
        _imagining -= 1


class Listener(Protocol):
    """Is told of copies between the GPU imagined and the memory of its host."""

    def copy(self, tensor: Tensor) -> None:
        """Of one that begins, out or back."""

    def wait(self) -> None:
        """What runs next waits for all of them."""


_told: list[Listener] = []


@contextlib.contextmanager
def told_of_copies(listener: Listener) -> Iterator[None]:
    _told.append(listener)
    try:
        yield
    finally:
        _told.remove(listener)


def copied(x: Tensor) -> None:
    for listener in _told:
        listener.copy(x)


def waited() -> None:
    for listener in _told:
        listener.wait()


def as_imagined() -> contextlib.AbstractContextManager[Any]:
    """For a call of torch's own function where modes are off: it is as on the device imagined."""
    return OnGpu() if _imagining else contextlib.nullcontext()


# What autocast runs in float32 on CUDA and not, or not always, on a CPU: of the list in
# torch.amp's documentation what models call.
_IN_32 = {
    F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, F.mse_loss,
    F.l1_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits, F.softplus,
    F.cosine_similarity, F.kl_div, torch.layer_norm, torch.group_norm, torch.softmax,
    torch.log_softmax, torch.exp, torch.log, torch.pow, torch.rsqrt, torch.reciprocal, torch.norm,
    torch.cumsum, torch.cumprod, torch.prod, Tensor.softmax, Tensor.log_softmax, Tensor.exp,
    Tensor.log, Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.reciprocal, Tensor.norm,
    Tensor.cumsum, Tensor.cumprod, Tensor.prod,
}  # fmt: skip
_SHORT = (torch.float16, torch.bfloat16)


class OnGpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            # With dropout the fused kernels of a GPU keep as much as without; those of the CPU
            # know no dropout, and torch would compute all scores.
            kwargs["dropout_p"] = 0.0
            given = *args[:4], *(0.0 for _ in args[4:5]), *args[5:]
            return _attention(*given, **_once(args, kwargs))
        if func in _IN_32 and torch.is_autocast_enabled("cpu"):
            return _in_32(func, args, kwargs)
        return func(*args, **kwargs)


def _once(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without the keyword that stands among the positional arguments already."""
    return {key: value for key, value in kwargs.items() if key != "dropout_p" or len(args) < 5}


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **other: Any,
) -> Tensor:
    """Values of another width than keys, as in latent attention, have a kernel on a GPU alone:
    the memory-efficient one.
    """
    shapes_fit = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    mask_fits = attn_mask is None or not attn_mask.requires_grad
    if not (query.dim() == 4 and shapes_fit and mask_fits) or key.shape[-1] == value.shape[-1]:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **other
        )
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, query.new_zeros(()), -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
    return out


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Keeps a mask of a byte an element; on a CPU it would be one of the input's dtype."""
    if not training or p == 0.0:
        return input
    dropped: Tensor = torch.native_dropout(input, p, True)[0]
    return input.copy_(dropped) if inplace else dropped


def _in_32(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def widened(value: Any) -> Any:
        is_short = isinstance(value, Tensor) and value.dtype in _SHORT
        return value.float() if is_short else value

    with torch.autocast("cpu", enabled=False):
        wide = {name: widened(value) for name, value in kwargs.items()}
        return func(*map(widened, args), **wide)
