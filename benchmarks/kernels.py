"""Kernels of the activations against torch's own and a device copy: time, bandwidth, ratios.

    python -m benchmarks.kernels                     few-bit, into benchmarks/results/kernels.jsonl
    python -m benchmarks.kernels --method inverted   into benchmarks/results/inverted.jsonl

Every case is checked against torch before it is timed. Times are medians of side-by-side
repetitions by CUDA events through autograd, launches and allocation included; inputs are random and
larger than the cache. `bytes` and `backward_bytes` are the least that must move: each input read
once, each output written once, codes or bits included. `of_copy` is that bandwidth over the
bandwidth of a device-to-device copy of a tensor of the same size and dtype, measured in the same
process.
"""

import argparse
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows
from packlight import use_reference
from packlight.packing.layout import packed_bytes
from tests.fewbit import layers as fewbit
from tests.inverted import layers as inverted
from tests.layers import Layer

OUTPUTS = {"fewbit": "kernels.jsonl", "inverted": "inverted.jsonl"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each function, their repetitions taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
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


def copy_bandwidth(x: Tensor) -> float:
    """Bytes read and written a millisecond by a copy of `x`."""
    target = torch.empty_like(x)
    milliseconds = interleaved({"copy": lambda: target.copy_(x)}, 30)["copy"]
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
    layer = case.layer
    y, plain = case.apply(x), layer.torch(x)
    forward = interleaved({"ours": lambda: case.apply(x), "torch": lambda: layer.torch(x)}, 12)
    backward = interleaved(
        {
            "ours": lambda: torch.autograd.grad(y, x, dy, retain_graph=True),
            "torch": lambda: torch.autograd.grad(plain, x, dy, retain_graph=True),
        },
        12,
    )
    forward_bytes, backward_bytes = case.bytes(x)
    return {
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


def cases(method: str, names: list[str] | None, widths: list[int]) -> list[Case]:
    """What to measure: every layer of a method, few-bit ones at each width."""
    if method == "inverted":
        found = [Case(layer) for layer in inverted.OURS]
    else:
        found = [
            Case(layer, None if layer.bits is not None else bits)
            for layer in fewbit.LAYERS
            for bits in ([layer.bits] if layer.bits is not None else widths)
        ]
    return [case for case in found if not names or str(case.layer) in names]


def measure_dropout(x: Tensor, dy: Tensor, copy: float) -> dict[str, Any]:
    """The row of dropout, at p = 0.1."""
    import torch.nn.functional as F

    import packlight.fewbit as few_bit

    layer = fewbit.Layer("dropout", None, None, few_bit.dropout, F.dropout, (0.1,), bits=1)
    kept = few_bit.dropout(x, 0.1) != 0
    assert abs(kept.float().mean().item() - 0.9) < 1e-3
    return measure(Case(layer), x, dy, copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", default="fewbit", choices=OUTPUTS)
    parser.add_argument("--out", type=pathlib.Path, help="rows are appended to this file")
    parser.add_argument("--log2-elements", type=int, default=28)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--layers", nargs="+", help="only these, by name")
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4], help="of few-bit")
    parser.add_argument("--commit", help="where git cannot tell")
    options = parser.parse_args()
    path = options.out or rows.RESULTS / OUTPUTS[options.method]
    settings = {"method": options.method, **rows.settings("cuda", options.commit)}
    count = 1 << options.log2_elements
    for name in options.dtypes:
        dtype = DTYPES[name]
        x = torch.randn(count, device="cuda").mul_(1.5).to(dtype)
        dy = torch.randn(count, device="cuda").to(dtype)
        copy = copy_bandwidth(x)
        print(f"{name}: copy {copy / 1e6:.0f} GB/s")
        for case in cases(options.method, options.layers, options.bits):
            case.check(x.detach(), dy)
            result = measure(case, x.detach(), dy, copy)
            report(path, settings, str(case.layer), name, case.bits, count, copy, result)
        wanted = not options.layers or "dropout" in options.layers
        if options.method == "fewbit" and wanted:
            result = measure_dropout(x.detach(), dy, copy)
            report(path, settings, "dropout", name, 1, count, copy, result)


def report(
    path: pathlib.Path,
    settings: dict[str, Any],
    layer: str,
    dtype: str,
    bits: int,
    count: int,
    copy: float,
    result: dict[str, Any],
) -> None:
    row = {"case": layer, "dtype": dtype, "bits": bits, "elements": count, **result}
    rows.append(path, {**row, "copy_GBps": copy / 1e6, **settings})
    print(
        f"{layer:13s} {dtype} {bits} bits: forward {result['forward_of_copy']:.2f} of copy"
        f" {result['forward_ratio']:.2f}x torch, backward {result['backward_of_copy']:.2f} of copy"
        f" {result['backward_ratio']:.2f}x, both {result['both_ratio']:.2f}x",
        flush=True,
    )


if __name__ == "__main__":
    main()
