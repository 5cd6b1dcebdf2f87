"""What a sub-layer computes behind its first projection, for functions of whole sub-layers.

W_2 f(h), and W_o attention(h): for each a function that computes it, and an object that says how it
is differentiated by the tensors that are kept. Where the norm stands, in front (`pre_norm.py`),
behind (`post_norm.py`) or nowhere (`mlp.py`), is no matter here. All of it runs within Functions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packlight._checks import autocast
from packlight._gradients import as_dtype
from packlight._seeds import Seed, draws_at
from packlight.fewbit.activations import CONTINUOUS
from packlight.layers.activations import overwriting_activation_of
from packlight.layers.attention import mean_of
from packlight.layers.attention_backends import (
    FUSED,
    Flags,
    Kernel,
    gradients,
    kernel_of,
    prepared,
    run,
)
from packlight.layers.linear import affine, linear_gradients
from packlight.layers.self_attention import (
    joined_gradients,
    parts_of,
    query_shift,
    run_again,
    wanting_gradients,
)
from packlight.quantiser import Quantiser, Restore

# Whether gradients of weight and bias of a projection are needed.
Needs = tuple[bool, bool]
# These gradients, None for those that are not needed.
OfProjection = tuple[Tensor | None, Tensor | None]


def dtypes_of(*tensors: Tensor | None) -> Any:
    """Their dtypes, None for None."""
    return tuple([None if each is None else each.dtype for each in tensors])


# ---- feed-forward layers -------------------------------------------------------------------------


class Feed(NamedTuple):
    """How W_2 f(h) is differentiated."""

    rebuild: Callable[..., Tensor]  # f(h) from what is kept of h
    differentiate: Callable[..., Tensor]
    settings: tuple[Any, ...]
    dtypes: tuple[Any, Any, Any, Any]  # of h, f(h), W_2 and its bias

    def gradients(
        self, grad_output: Tensor, weight: Tensor, kept: Sequence[Any], needs: Needs
    ) -> tuple[Tensor, OfProjection]:
        """Gradients of h, and of W_2 and its bias where `needs` says so."""
        dtypes = self.dtypes
        middle: Any
        middle, *last = linear_gradients(
            grad_output, weight, self.rebuild, kept, (True, *needs), dtypes[1:]
        )
        dh = as_dtype(self.differentiate(middle, kept, *self.settings), dtypes[0])
        return dh, (last[0], last[1])


def feed(
    h: Tensor, name: str, method: Quantiser, seed: Seed, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, list[Tensor], Feed]:
    """W_2 f(h), f by its name; what is kept of h, over which f(h) is written; and `Feed`."""
    dtype = h.dtype
    h = autocast(h, name, CONTINUOUS[name].function)
    fused = overwriting_activation_of(method)
    middle, *kept = fused.forward(h, name, (), method, seed)
    del h
    rebuild = fused.rebuild(middle, name, (), method)
    settings = (name, (), middle.stride(), method)
    how = Feed(rebuild, fused.backward, settings, (dtype, *dtypes_of(middle, weight, bias)))
    return affine(middle, weight, bias), kept, how


# ---- attention -----------------------------------------------------------------------------------


class Attended(NamedTuple):
    """How W_o attention(h) is differentiated: attention of what is kept of h runs once more."""

    rebuild: Restore  # h
    heads: int
    kernel: Kernel
    flags: Flags
    draws: tuple[int, int] | None
    dtypes: tuple[Any, Any, Any, Any]  # of h, what W_o reads, W_o and its bias

    def gradients(
        self,
        grad_output: list[Tensor],
        weight: Tensor,
        mask: Tensor | None,
        kept: Sequence[Any],
        needs: Needs,
    ) -> tuple[Tensor, OfProjection]:
        """Gradients of h, and of W_o and its bias where `needs` says so.

        The gradient of the output is taken out of its list, and gone when attention's is made.
        """
        _, heads, kernel, flags, draws, dtypes = self
        *pack, mean = kept
        whole = self.rebuild(dtypes[0], *pack, shift=query_shift(mean))
        given, results = run_again(whole, heads, mask, kernel, flags, draws)
        del whole
        out = results[0].transpose(1, 2).flatten(2)
        dout: Any
        dout, *last = linear_gradients(
            grad_output.pop(), weight, _itself, (out,), (True, *needs), dtypes[1:]
        )
        dout = dout.view(*dout.shape[:2], heads, -1).transpose(1, 2)
        found = gradients(dout, given, results, kernel, flags)
        del dout, out, given, results
        return joined_gradients(found), (last[0], last[1])


def _itself(_: torch.dtype, x: Tensor) -> Tensor:
    return x


def attended(
    h: Tensor,
    heads: int,
    mask: Tensor | None,
    flags: Flags,
    method: Quantiser,
    seed: Seed,
    weight: Tensor,
    bias: Tensor | None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, tuple[Tensor | None, ...], Attended] | None:
    """attention(h), which W_o is to read; what is kept of h [batch, length, 3 width]; `Attended`.

    None where torch would take no fused kernel; with one that is given, it runs.
    """
    parts = parts_of(h, heads)
    if kernel is None:
        with torch.enable_grad():  # torch's choice asks for that too
            kernel = kernel_of((*wanting_gradients(parts), mask), flags[0], flags[1])
        if kernel[0] not in FUSED:
            return None
    draws = draws_at(h) if flags[0] else None
    out = run(prepared((*parts, mask), kernel), kernel, flags)[0].transpose(1, 2).flatten(2)
    rebuild = Restore(method, tuple(h.shape), h.stride())
    dtypes = (h.dtype, *dtypes_of(out, weight, bias))
    mean = mean_of(parts[0], method)
    kept = (*method.pack_less(h, seed, query_shift(mean)), mean)
    return out, kept, Attended(rebuild, heads, kernel, flags, draws, dtypes)
