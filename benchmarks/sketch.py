"""Sketched linear layers against torch's own: time of forward and backward, memory, correctness.

    python -m benchmarks.run --suite kernels --filter sketch   results/sketch.jsonl

Every case is checked before it is timed: output, input and bias gradient are torch's, the kernels'
weight gradient is the reference's, and at full size its squared error is the variance that the
closed form says. Times are medians of side-by-side repetitions by CUDA events. `extra` is the most
memory that making the sketch takes beyond what is kept, as a share of the input. Run by itself,
this times tile shapes of the transform: `python -m benchmarks.sketch`.
"""

import argparse
import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows
from benchmarks.kernels import interleaved
from packlight import sketch, use_reference
from packlight.sketch import kernels, ops
from packlight.sketch.method import KINDS, Sketch

# Relative distance between a kernel's gradient and the reference's.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}


class Problem:
    """A linear layer and what flows through it."""

    def __init__(
        self, tokens: int, features: int, outputs: int, dtype: torch.dtype, device: str = "cuda"
    ) -> None:
        options = {"device": device, "dtype": dtype}
        self.x = torch.randn(tokens, features, **options).requires_grad_()
        self.weight = (torch.randn(outputs, features, **options) * 0.02).requires_grad_()
        self.bias = torch.randn(outputs, **options).requires_grad_()
        self.dy = torch.randn(tokens, outputs, **options)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.x, self.weight, self.bias]

    def small(self) -> "Problem":
        """The same in little, at an awkward size."""
        return Problem(1500, 264, 136, self.x.dtype, self.x.device.type)

    def run(self, method: Sketch | None) -> Tensor:
        if method is None:
            return F.linear(*self.inputs)
        return sketch.linear(*self.inputs, rows=method.rows, kind=method.kind)

    def gradients(self, method: Sketch | None) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.run(method), self.inputs, self.dy)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def check(problem: Problem, method: Sketch) -> float:
    """Raises unless the case is right; returns the squared error over the variance."""
    tolerance = TOLERANCE[problem.x.dtype]
    small = problem.small()
    torch.manual_seed(3)
    ours = small.gradients(method)
    with use_reference():
        torch.manual_seed(3)
        reference = small.gradients(method)
    assert relative(ours[1], reference[1]) < tolerance, "kernel and reference differ"
    assert relative(problem.run(method), problem.run(None)) < tolerance
    ours, exact = problem.gradients(method), problem.gradients(None)
    assert relative(ours[0], exact[0]) < tolerance
    assert relative(ours[2], exact[2]) < tolerance
    error = (ours[1].float() - exact[1].float()).norm().double().square()
    ratio = error / sketch.variance(problem.x, problem.dy, method.kind, method.rows)
    assert 0.9 < ratio < 1.1, f"the squared error is {ratio:.3f} of the variance"
    return ratio.item()


def extra_memory(problem: Problem, method: Sketch) -> float:
    """What making a sketch takes for a moment, beyond what it keeps, as a share of x."""
    x = problem.x.detach()
    seed = torch.ones(1, dtype=torch.int64, device=x.device)
    count = method.row_count(x.shape[0])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = ops.keep(x, seed, method.kind, count, x.dtype)
    extra = torch.cuda.max_memory_allocated() - before - kept.numel()
    return extra / (x.numel() * x.element_size())


def measure(problem: Problem, method: Sketch, repeats: int) -> dict[str, Any]:
    ratio = check(problem, method)
    device = problem.x.device.type
    whole = interleaved(
        {
            "ours": lambda: problem.gradients(method),
            "torch": lambda: problem.gradients(None),
        },
        repeats,
        device,
    )
    forward = interleaved(
        {"ours": lambda: problem.run(method), "torch": lambda: problem.run(None)}, repeats, device
    )
    x = problem.x.detach()
    seed = torch.ones(1, dtype=torch.int64, device=x.device)
    count = method.row_count(x.shape[0])
    apart = interleaved(
        {
            "sketch": lambda: ops.keep(x, seed, method.kind, count, x.dtype),
            "copy": lambda: x.clone(),
        },
        repeats,
        device,
    )
    return {
        "both_ms": whole["ours"],
        "both_torch_ms": whole["torch"],
        "both_ratio": whole["torch"] / whole["ours"],
        "forward_ms": forward["ours"],
        "forward_torch_ms": forward["torch"],
        "sketch_ms": apart["sketch"],
        "copy_ms": apart["copy"],
        "extra": extra_memory(problem, method) if device == "cuda" else None,
        "error_of_variance": ratio,
    }


def sweep(problem: Problem, shares: list[float], repeats: int) -> None:
    """Times the transform at other tile shapes."""
    x = problem.x.detach()
    seed = torch.ones(1, dtype=torch.int64, device=x.device)
    for share, columns, places, warps in itertools.product(
        shares, (64, 128, 256), (32, 64, 128), (2, 4, 8)
    ):
        kernels.COLUMNS, kernels.PLACES, kernels.WARPS = columns, places, warps
        kernels._transform_launches.cache_clear()
        count = Sketch(share).row_count(x.shape[0])
        y = x.new_empty(count, x.shape[1])
        time = interleaved({"sketch": lambda y=y: kernels.apply(x, seed, "srht", y)}, repeats)
        print(
            f"srht {share}: {columns} columns, {places} places, {warps} warps:"
            f" {time['sketch']:.3f} ms",
            flush=True,
        )


@functools.lru_cache(maxsize=1)
def problem_of(tokens: int, features: int, device: str) -> Problem:
    torch.manual_seed(0)
    return Problem(tokens, features, features, torch.bfloat16, device)


def checked(kind: str, share: float, tokens: int, features: int, device: str) -> dict[str, Any]:
    return measure(problem_of(tokens, features, device), Sketch(share, kind), 20)


def cases(options: argparse.Namespace) -> list[rows.Case]:
    """Every kind at two shares. The problem's size is its own, whatever the elements of others."""
    tokens, features = (16384, 4096) if options.device == "cuda" else (512, 256)
    size = {"tokens": tokens, "features": features, "outputs": features, "dtype": "bf16"}
    found = []
    for share, kind in itertools.product((0.1, 0.2), KINDS):
        run = functools.partial(checked, kind, share, tokens, features, options.device)
        key = {"kind": kind, "rows": share, **size}
        found.append(rows.Case(f"sketch/{kind} {share}", "sketch.jsonl", key, run, 5))
    return found


if __name__ == "__main__":
    sweep(problem_of(16384, 4096, "cuda"), [0.1, 0.2], 20)
