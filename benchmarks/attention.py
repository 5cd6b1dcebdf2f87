"""Attention that keeps packs beside torch's own: time, bytes kept and errors, in both forms.

    python -m benchmarks.run --suite kernels --filter attention   results/attention.jsonl

"ours" is the recomputed form at 8 bits, "ours_4" the same at 4, "kept" the other form at 8, and
"torch" plain `F.scaled_dot_product_attention`; tensors lie in memory as projections make them. Each
is checked against torch before it is timed: its output is torch's, and errors of the gradients of
query, key and value (`*_error`, together) are below `LARGEST`. Times are medians of side-by-side
repetitions by CUDA events, forward and backward together, launches included; `graph_*` are calls in
a CUDA graph, without them. `*_kept_mib` is what a pass keeps for its backward pass. A pack of the
output for the linear layer behind is in "kept" only.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows
from benchmarks.kernels import DTYPES, interleaved, unlaunched_passes
from packlight import groupquant
from tests.helpers import kept_bytes, relative_error

# Batch, heads, heads of key and value, length, width, and whether the mask is causal: Llama 1.1B's,
# an 8B's at a longer context, and ViT-B/16's.
SHAPES = (
    (4, 32, 32, 2048, 64, True),
    (1, 32, 8, 4096, 128, True),
    (128, 12, 12, 197, 64, False),
)
# Of the gradients together, for normal values; errors grow as scores lie further apart.
LARGEST = {"torch": 0.0, "ours": 0.03, "ours_4": 0.45, "kept": 0.05}

Attention = Callable[..., Tensor]  # of query, key and value


def functions(grouped: bool, causal: bool) -> dict[str, Attention]:
    """By the name that a row has them by."""
    options: dict[str, Any] = {"is_causal": causal, "enable_gqa": grouped}
    ours = functools.partial(groupquant.scaled_dot_product_attention, **options)
    return {
        "ours": functools.partial(ours, bits=8, recompute=True),
        "ours_4": functools.partial(ours, bits=4, recompute=True),
        "kept": functools.partial(ours, bits=8, recompute=False),
        "torch": functools.partial(F.scaled_dot_product_attention, **options),
    }


def projected(batch: int, heads: int, length: int, width: int, like: Tensor) -> Tensor:
    """[batch, heads, length, width], a token's heads side by side in memory."""
    x = torch.randn(batch, length, heads, width, device=like.device).to(like.dtype)
    return x.transpose(1, 2).requires_grad_()


def measure(
    batch: int, heads: int, groups: int, length: int, width: int, causal: bool, device: str
) -> dict[str, Any]:
    torch.manual_seed(0)
    like = torch.empty(0, device=device, dtype=DTYPES["bf16"])
    tensors = [projected(batch, count, length, width, like) for count in (heads, groups, groups)]
    dy = torch.randn(tensors[0].shape, device=device).to(like)
    found = functions(heads != groups, causal)

    def both(function: Attention) -> tuple[Tensor, ...]:
        y = function(*tensors)
        return y.detach(), *torch.autograd.grad(y, tensors, dy)

    y, *expected = both(found["torch"])
    exact = torch.cat([each.flatten() for each in expected])
    row: dict[str, Any] = {}
    for name, function in found.items():
        output, *grads = both(function)
        assert torch.equal(output, y), name
        error = relative_error(torch.cat([each.flatten() for each in grads]), exact)
        # torch's backward pass adds up in no fixed order: another run of it is as far off.
        assert error <= max(LARGEST[name], 1e-2), (name, error)
        row[f"{name}_error"] = error
        row[f"{name}_kept_mib"] = kept_bytes(functools.partial(function, *tensors)) / 2**20
        del output, grads
    del y, expected, exact
    times = interleaved({name: functools.partial(both, f) for name, f in found.items()}, 12, device)
    row |= {f"{name}_ms": time for name, time in times.items()}
    row["both_ratio"] = times["torch"] / times["ours"]
    return row | unlaunched_passes({name: (f, tensors, dy) for name, f in found.items()})


def cases(options: argparse.Namespace) -> list[rows.Case]:
    found = []
    for shape in SHAPES:
        batch, heads, groups, length, width, causal = shape
        if options.device == "cpu":  # to try it
            batch, length = 1, 64
        key = {"case": "attention", "batch": batch, "heads": heads, "groups": groups}
        key |= {"length": length, "width": width, "causal": causal, "dtype": "bf16"}
        given = (batch, heads, groups, length, width, causal, options.device)
        name = f"attention {batch}x{heads}({groups})x{length}x{width}{' causal' * causal}"
        run = functools.partial(measure, *given)
        found.append(rows.Case(name, "attention.jsonl", key, run, 8))
    return found
