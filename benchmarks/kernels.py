"""Few-bit kernels against torch's own and a device copy: time, bandwidth, ratios.

    python -m benchmarks.kernels --out benchmarks/results/kernels.jsonl

Every case is checked against torch before it is timed. Times are medians of side-by-side
repetitions by CUDA events through autograd, launches and allocation included; inputs are random and
larger than the cache. `bytes` is the least that must move: each input read once, each output
written once, codes included. `of_copy` is that bandwidth over the bandwidth of a device-to-device
copy of a tensor of the same size and dtype, measured in the same process.
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
from tests.fewbit.layers import LAYERS, Layer

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


def check(layer: Layer, x: Tensor, dy: Tensor, bits: int) -> None:
    """The forward is torch's to rounding, the gradient the reference's (torch's where exact)."""
    x = x[: 1 << 20].clone().requires_grad_()
    y, plain = layer.apply(x, bits=bits), layer.torch(x)
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}[x.dtype]
    truth = layer.torch(x.double())
    torch.testing.assert_close(y.double(), truth, rtol=tolerance, atol=1e-6)
    dy = dy[: 1 << 20]
    (dx,) = torch.autograd.grad(y, x, dy)
    if layer.bits is not None:
        (expected,) = torch.autograd.grad(plain, x, dy)
    else:
        with use_reference():
            (expected,) = torch.autograd.grad(layer.apply(x, bits=bits), x, dy)
    torch.testing.assert_close(dx, expected, rtol=tolerance, atol=1e-6)


def measure(layer: Layer, x: Tensor, dy: Tensor, bits: int, copy: float) -> dict[str, Any]:
    """One row: forward and backward of the layer and of torch's."""
    x.requires_grad_()
    y, plain = layer.apply(x, bits=bits), layer.torch(x)
    size, count = x.element_size(), x.numel()
    forward = interleaved(
        {"ours": lambda: layer.apply(x, bits=bits), "torch": lambda: layer.torch(x)}, 12
    )
    backward = interleaved(
        {
            "ours": lambda: torch.autograd.grad(y, x, dy, retain_graph=True),
            "torch": lambda: torch.autograd.grad(plain, x, dy, retain_graph=True),
        },
        12,
    )
    moved = 2 * size * count + packed_bytes(count, layer.code_bits(bits))
    return {
        "bytes": moved,
        "forward_ms": forward["ours"],
        "forward_torch_ms": forward["torch"],
        "backward_ms": backward["ours"],
        "backward_torch_ms": backward["torch"],
        "forward_of_copy": moved / forward["ours"] / copy,
        "backward_of_copy": moved / backward["ours"] / copy,
        "forward_ratio": forward["torch"] / forward["ours"],
        "backward_ratio": backward["torch"] / backward["ours"],
        "both_ratio": (forward["torch"] + backward["torch"]) / (forward["ours"] + backward["ours"]),
    }


def measure_dropout(x: Tensor, dy: Tensor, copy: float) -> dict[str, Any]:
    """The row of dropout, at p = 0.1."""
    import torch.nn.functional as F

    import packlight.fewbit as few_bit

    layer = Layer("dropout", None, None, few_bit.dropout, F.dropout, (0.1,), (0.1,), bits=1)
    kept = few_bit.dropout(x, 0.1) != 0
    assert abs(kept.float().mean().item() - 0.9) < 1e-3
    return measure(layer, x, dy, 1, copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=rows.RESULTS / "kernels.jsonl")
    parser.add_argument("--log2-elements", type=int, default=28)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--layers", nargs="+", help="only these, by name")
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--commit", help="where git cannot tell")
    options = parser.parse_args()
    settings = rows.settings("cuda", options.commit)
    count = 1 << options.log2_elements
    for name in options.dtypes:
        dtype = DTYPES[name]
        x = torch.randn(count, device="cuda").mul_(1.5).to(dtype)
        dy = torch.randn(count, device="cuda").to(dtype)
        copy = copy_bandwidth(x)
        print(f"{name}: copy {copy / 1e6:.0f} GB/s")
        selected = [layer for layer in LAYERS if not options.layers or str(layer) in options.layers]
        for layer in selected:
            for bits in [layer.bits] if layer.bits is not None else options.bits:
                check(layer, x.detach(), dy, bits)
                result = measure(layer, x.detach(), dy, bits, copy)
                report(options.out, settings, str(layer), name, bits, count, copy, result)
        if not options.layers or "dropout" in options.layers:
            result = measure_dropout(x.detach(), dy, copy)
            report(options.out, settings, "dropout", name, 1, count, copy, result)


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
