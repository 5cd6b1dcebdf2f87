"""Kernels of the activations against torch's own and a device copy: time, bandwidth, ratios.

    python -m benchmarks.run --suite kernels --filter fewbit     results/kernels.jsonl
    python -m benchmarks.run --suite kernels --filter inverted   results/inverted.jsonl

Every case is checked against torch before it is timed. Times are medians of side-by-side
repetitions by CUDA events through autograd, launches and allocation included; inputs are random.
Below 2^26 elements, where launching takes longer than the kernels, a row has times without it too
(`graph_*`): calls captured in a CUDA graph, whose tensors lie in the cache. `bytes` and
`backward_bytes` are the least that must move: each input read once, each output written once, codes
or bits included. `of_copy` is that bandwidth over the bandwidth of a device-to-device copy of a
tensor of the same size and dtype, measured in the same process.
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import packlight.fewbit as few_bit
from benchmarks import rows
from packlight import use_reference
from packlight.packing.layout import packed_bytes
from tests.fewbit import layers as fewbit
from tests.graphs import captured
from tests.inverted import layers as inverted
from tests.layers import Layer

OUTPUTS = {"fewbit": "kernels.jsonl", "inverted": "inverted.jsonl"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
BITS = (1, 2, 3, 4)  # of few-bit layers


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int, device: str = "cuda"
) -> dict[str, float]:
    """Median milliseconds of each function, their repetitions taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    if device == "cpu":  # for trying things out
        for _ in range(repeats):
            for name, function in functions.items():
                started = time.perf_counter()
                function()
                times[name].append(1e3 * (time.perf_counter() - started))
        return {name: statistics.median(values) for name, values in times.items()}
    for _ in range(10):  # clocks rise, kernels compile
        for function in functions.values():
            function()
    events = []
    for _ in range(repeats):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            events.append((name, start, end))
    torch.cuda.synchronize()
    for name, start, end in events:
        times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


LAUNCH_BOUND = 1 << 26  # elements, below which a launch takes longer than a kernel
CAPTURED = 20  # calls in a graph, so that launching the graph does not count


def unlaunched(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of what the GPU alone takes for each function."""

    def repeated(function: Callable[[], Any]) -> None:
        for _ in range(CAPTURED):
            function()

    graphs = {
        name: captured(functools.partial(repeated, function))[0].replay
        for name, function in functions.items()
    }
    return {name: time / CAPTURED for name, time in interleaved(graphs, repeats).items()}


def unlaunched_passes(
    given: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor], Tensor]], repeats: int = 12
) -> dict[str, float]:
    """Columns `graph_*` of a row: of functions, their inputs and output gradients, by name.

    A backward pass runs on the stream of its forward pass, so it is captured with it.
    """
    x = given["ours"][1][0]
    if x.device.type == "cpu" or x.numel() >= LAUNCH_BOUND:
        return {}

    def both(function: Callable[..., Tensor], xs: Sequence[Tensor], dy: Tensor) -> None:
        # Leaves of the capture's own: a gradient waits for the stream its leaf was first used on.
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in xs]
        torch.autograd.grad(function(*leaves), [x for x in leaves if x.requires_grad], dy)

    forward = {name: functools.partial(f, *xs) for name, (f, xs, _) in given.items()}
    whole = {name: functools.partial(both, *what) for name, what in given.items()}
    row = {}
    for part, functions in (("forward", forward), ("both", whole)):
        for name, milliseconds in unlaunched(functions, repeats).items():
            row[f"graph_{part}{'' if name == 'ours' else '_' + name}_ms"] = milliseconds
        for name in functions:
            if name != "ours":
                ratio = row[f"graph_{part}_{name}_ms"] / row[f"graph_{part}_ms"]
                row[f"graph_{part}{'' if name == 'torch' else '_' + name}_ratio"] = ratio
    return row


def copy_bandwidth(x: Tensor) -> float:
    """Bytes read and written a millisecond by a copy of `x`."""
    target = torch.empty_like(x)
    milliseconds = interleaved({"copy": lambda: target.copy_(x)}, 30, x.device.type)["copy"]
    return 2 * x.element_size() * x.numel() / milliseconds


# Of torch's forward, with the kernels' flushing of tiny results.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}
# Of an inverted derivative, next to a minimum, from outputs whose last digit is off.
INVERTED_TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 5e-4}


class Case:
    """A layer as it is measured: `apply`, what `check` compares with, and what must move."""

    def __init__(self, layer: Layer, bits: int | None = None) -> None:
        self.layer = layer
        self.options = {} if bits is None else {"bits": bits}
        # Bits kept an element besides the output; few-bit ones have a flag byte behind them.
        self.bits = bits or layer.packed_bytes(1 << 20) // (1 << 17)

    def apply(self, x: Tensor) -> Tensor:
        return self.layer.apply(x, **self.options)

    def check(self, x: Tensor, dy: Tensor) -> None:
        """The forward is torch's to rounding, the gradient torch's or, few-bit, the reference's."""
        x = x[: 1 << 20].clone().requires_grad_()
        y, plain = self.apply(x), self.layer.torch(x)
        tolerance = TOLERANCE[x.dtype]
        truth = self.layer.torch(x.double())
        if self.bits:
            torch.testing.assert_close(y.double(), truth, rtol=tolerance, atol=1e-6)
        else:  # torch's own forward, with the roundings that it makes between its operations
            assert torch.equal(y, plain)
        dy = dy[: 1 << 20]
        (dx,) = torch.autograd.grad(y, x, dy)
        if self.layer.keeps_output:
            (slope,) = torch.autograd.grad(truth.sum(), x)
            error = (dx.double() - dy.double() * slope.double()).abs()
            bad = error > INVERTED_TOLERANCE[x.dtype] * dy.double().abs() + 1e-6
            # Next to a kink the rounded output may be that of the other side.
            assert bad.sum() <= (8 if self.layer.step else 0)
            return
        if isinstance(self.layer, fewbit.Layer) and self.layer.bits is None:
            with use_reference():
                (expected,) = torch.autograd.grad(self.apply(x), x, dy)
        else:
            (expected,) = torch.autograd.grad(plain, x, dy)
        torch.testing.assert_close(dx, expected, rtol=tolerance, atol=1e-6)

    def bytes(self, x: Tensor) -> tuple[int, int]:
        """The least that forward and backward move."""
        size, packed = x.element_size() * x.numel(), packed_bytes(x.numel(), self.bits)
        output = size if self.layer.keeps_output else 0
        return 2 * size + packed, 2 * size + output + packed


def measure(case: Case, x: Tensor, dy: Tensor, copy: float) -> dict[str, Any]:
    """One row: forward and backward of the layer and of torch's."""
    x.requires_grad_()
    layer, device = case.layer, x.device.type
    y, plain = case.apply(x), layer.torch(x)
    forward = interleaved(
        {"ours": lambda: case.apply(x), "torch": lambda: layer.torch(x)}, 12, device
    )
    backward = interleaved(
        {
            "ours": lambda: torch.autograd.grad(y, x, dy, retain_graph=True),
            "torch": lambda: torch.autograd.grad(plain, x, dy, retain_graph=True),
        },
        12,
        device,
    )
    forward_bytes, backward_bytes = case.bytes(x)
    alone = unlaunched_passes({"ours": (case.apply, [x], dy), "torch": (layer.torch, [x], dy)})
    return alone | {
        "bytes": forward_bytes,
        "backward_bytes": backward_bytes,
        "forward_ms": forward["ours"],
        "forward_torch_ms": forward["torch"],
        "backward_ms": backward["ours"],
        "backward_torch_ms": backward["torch"],
        "forward_of_copy": forward_bytes / forward["ours"] / copy,
        "backward_of_copy": backward_bytes / backward["ours"] / copy,
        "forward_ratio": forward["torch"] / forward["ours"],
        "backward_ratio": backward["torch"] / backward["ours"],
        "both_ratio": (forward["torch"] + backward["torch"]) / (forward["ours"] + backward["ours"]),
    }


class Dropout(Case):
    """Dropout at p = 0.1, whose mask is its own."""

    def __init__(self) -> None:
        function, plain = few_bit.dropout, F.dropout
        super().__init__(fewbit.Layer("dropout", None, None, function, plain, (0.1,), bits=1))

    def check(self, x: Tensor, dy: Tensor) -> None:
        kept = (self.apply(x) != 0).float().mean().item()
        assert abs(kept - 0.9) < max(1e-3, 3 * x.numel() ** -0.5), kept


@functools.lru_cache(maxsize=1)
def inputs(dtype: str, log2_elements: int, device: str) -> tuple[Tensor, Tensor, float]:
    """An input, a gradient, and the bandwidth of a copy; the cases of a dtype share them."""
    x, dy = (torch.randn(1 << log2_elements, device=device) for _ in range(2))
    x, dy = x.mul_(1.5).to(DTYPES[dtype]), dy.to(DTYPES[dtype])
    return x, dy, copy_bandwidth(x)


def checked(method: str, case: Case, dtype: str, log2_elements: int, device: str) -> dict[str, Any]:
    x, dy, copy = inputs(dtype, log2_elements, device)
    case.check(x.detach(), dy)
    result = measure(case, x.detach(), dy, copy)
    return {**result, "copy_GBps": copy / 1e6, "method": method}


def cases(options: argparse.Namespace) -> list[rows.Case]:
    """Every layer of a method, few-bit ones at each width that is not theirs alone."""
    few = [
        Case(layer, None if layer.bits is not None else bits)
        for layer in fewbit.LAYERS
        for bits in ([layer.bits] if layer.bits is not None else BITS)
    ]
    methods = {"fewbit": [*few, Dropout()], "inverted": [Case(x) for x in inverted.OURS]}
    found = []
    for log2, dtype in itertools.product(options.log2_elements, ("bf16", "fp32")):
        for method, case in ((m, case) for m, all_ in methods.items() for case in all_):
            key = {"case": str(case.layer), "dtype": dtype, "bits": case.bits}
            run = functools.partial(checked, method, case, dtype, log2, options.device)
            name = f"{method}/{case.layer} {dtype} {case.bits} bits 2^{log2}"
            found.append(rows.Case(name, OUTPUTS[method], {**key, "elements": 1 << log2}, run, 4))
    return found
