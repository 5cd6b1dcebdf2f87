"""A head's loss without its logits, beside torch's with them and Liger-Kernel's: time and memory.

    python -m benchmarks.run --suite kernels --filter head   results/head.jsonl

Forward and backward together, for a head that is trained and for one that is frozen (LoRA). Every
case is checked against torch before it is timed. "torch_fused" is torch's `linear_cross_entropy`,
where torch has it. Times are medians of side-by-side repetitions by CUDA events, launches included.
`*_gib` is what a pass allocates at its peak beyond its inputs, gradients included.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows
from benchmarks.kernels import DTYPES, interleaved
from packlight import GroupQuant, head

# Rows, width, classes, and whether the head is trained: Llama 1.1B's, and an 8B's with LoRA.
SHAPES = ((8192, 2048, 32000, True), (4096, 4096, 128256, True), (4096, 4096, 128256, False))

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of input, weight and target


def plain(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """As transformers computes it: the logits are widened first."""
    return F.cross_entropy(F.linear(x, weight).float(), target)


def losses() -> dict[str, Loss]:
    """By the name that a row has them by."""
    found: dict[str, Loss] = {
        "ours": head.linear_cross_entropy,
        "packed": functools.partial(head.linear_cross_entropy, method=GroupQuant(4)),
        "torch": plain,
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch_fused"] = functools.partial(F.linear_cross_entropy, options=options)
    if importlib.util.find_spec("liger_kernel") and torch.cuda.is_available():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["liger"] = liger_fused_linear_cross_entropy
    return found


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def peak_gib(run: Callable[[], Any], device: str) -> float | None:
    """What a pass allocates at its peak; a CPU does not say."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure(
    count: int, width: int, classes: int, trained: bool, dtype: str, device: str
) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(count, width, device=device).to(DTYPES[dtype]).requires_grad_()
    weight = (torch.randn(classes, width, device=device) / width**0.5).to(x.dtype)
    weight.requires_grad_(trained)
    target = torch.randint(0, classes, (count,), device=device)
    inputs = [x, weight] if trained else [x]

    def both(loss: Loss) -> tuple[Tensor, ...]:
        value = loss(x, weight, target)
        return value.detach(), *torch.autograd.grad(value, inputs)

    expected = both(plain)
    runs, row = dict[str, Callable[[], Any]](), dict[str, Any]()
    for name, loss in losses().items():
        found = both(loss)
        # 16-bit logits and gradients round; a pack of 8 bits rounds the input.
        errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
        assert max(errors) <= 3e-2, (name, errors)
        row[f"{name}_error"] = max(errors[1:])
        runs[name] = functools.partial(both, loss)
        del found
        row[f"{name}_gib"] = peak_gib(runs[name], device)
    del expected
    times = interleaved(runs, 8, device)
    row |= {f"{name}_ms": time for name, time in times.items()}
    for name in times:
        if name != "ours":
            row[f"both_{name}_ratio"] = times[name] / times["ours"]
    row["both_ratio"] = row.pop("both_torch_ratio")
    return row


def cases(options: argparse.Namespace) -> list[rows.Case]:
    found = []
    for count, width, classes, trained in SHAPES:
        if options.device == "cpu":  # to try it
            count, width, classes = 64, 64, 512
        key = {"case": "head", "rows": count, "width": width, "classes": classes}
        key |= {"trained": trained, "dtype": "bf16"}
        run = functools.partial(measure, count, width, classes, trained, "bf16", options.device)
        name = f"head {count} x {width} x {classes}{'' if trained else ' frozen'}"
        found.append(rows.Case(name, "head.jsonl", key, run, 6))
    return found
