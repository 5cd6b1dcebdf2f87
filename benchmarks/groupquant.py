"""Group quantisation against torch's own functions and a device copy: time, bandwidth, ratios.

    python -m benchmarks.groupquant --out benchmarks/results/groupquant.jsonl

Every case is checked before it is timed. Times are medians of side-by-side repetitions by CUDA
events, launches and allocation included. `of_copy` counts the bytes that must move, each input read
once and each output written once, packs included, and divides by the bandwidth of a copy.
"""

import argparse
import pathlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows
from benchmarks.kernels import DTYPES, copy_bandwidth, interleaved
from packlight import groupquant, use_reference
from packlight.groupquant import ops
from packlight.groupquant.method import Grouping

GROUP_SIZE = 128
PLAIN = ("", (), None, None)
WIDTHS = (768, 1024, 2048, 4096, 8192)


def pack_bytes(count: int, bits: int) -> int:
    grouping = Grouping(1, count, bits, GROUP_SIZE)
    return grouping.code_bytes + 4 * grouping.groups


def measure_pack(x: Tensor, bits: int, rounding: str, copy: float) -> dict[str, Any]:
    n = x.numel()
    seed = torch.ones(1, dtype=torch.int64, device=x.device) if rounding == "stochastic" else None
    layout = ((n,), (1,), n, bits, GROUP_SIZE, x.dtype)
    pack = ops.quantize(x, (1,), bits, GROUP_SIZE, seed)
    y = ops.dequantize(*pack, *layout, *PLAIN)
    step = (pack[1] << 16).view(torch.float32).amax()
    assert (y[: 1 << 20].float() - x[: 1 << 20].float()).abs().max() <= step * 1.02
    del y
    times = interleaved(
        {
            "pack": lambda: ops.quantize(x, (1,), bits, GROUP_SIZE, seed),
            "unpack": lambda: ops.dequantize(*pack, *layout, *PLAIN),
        },
        12,
    )
    moved = n * x.element_size() + pack_bytes(n, bits)
    return {
        f"{name}_of_copy": moved / milliseconds / copy for name, milliseconds in times.items()
    } | {f"{name}_ms": milliseconds for name, milliseconds in times.items()}


def measure_function(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]
) -> dict[str, Any]:
    """Forward and backward of a function and of torch's."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    check(ours, plain, inputs)
    y, expected = ours(*inputs), plain(*inputs)
    dy = torch.randn_like(y)
    forward = interleaved({"ours": lambda: ours(*inputs), "torch": lambda: plain(*inputs)}, 12)
    backward = interleaved(
        {
            "ours": lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True),
            "torch": lambda: torch.autograd.grad(expected, inputs, dy, retain_graph=True),
        },
        12,
    )
    return {
        "forward_ms": forward["ours"],
        "forward_torch_ms": forward["torch"],
        "backward_ms": backward["ours"],
        "backward_torch_ms": backward["torch"],
        "forward_ratio": forward["torch"] / forward["ours"],
        "backward_ratio": backward["torch"] / backward["ours"],
        "both_ratio": (forward["torch"] + backward["torch"]) / (forward["ours"] + backward["ours"]),
    }


def check(ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """The forward is torch's to rounding; kernel and reference give the same gradient."""
    few = [x[:64] if x.dim() == 2 else x[: 1 << 16] for x in inputs]
    few = [x.detach().requires_grad_() for x in few]
    y, expected = ours(*few), plain(*few)
    tolerance = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-18}[y.dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    dy = torch.randn_like(y)

    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return torch.autograd.grad(ours(*few), few, dy)

    actual = gradients()
    with use_reference():
        reference = gradients()
    for a, b in zip(actual, reference, strict=True):
        assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()


def functions(
    x: Tensor, bits: int, widths: tuple[int, ...]
) -> Iterator[tuple[str, Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]]:
    """Name, ours, torch's own, and inputs, of every function worth timing."""
    for name in ("gelu", "silu", "tanh", "mish"):
        plain = getattr(torch if name == "tanh" else F, name)
        yield name, partial(getattr(groupquant, name), bits=bits), plain, [x]
    pair = list(x.chunk(2))
    yield "swiglu", partial(groupquant.swiglu, bits=bits), lambda g, u: F.silu(g) * u, pair
    for width in widths:
        matrix = x[: x.numel() // width * width].view(-1, width)
        weight, bias = (torch.randn(width, device=x.device).to(x.dtype) for _ in range(2))
        shape = {"normalized_shape": (width,)}
        yield (
            f"layer_norm {width}",
            lambda x, w, b, s=shape: groupquant.layer_norm(x, **s, weight=w, bias=b, bits=bits),
            lambda x, w, b, s=shape: F.layer_norm(x, **s, weight=w, bias=b),
            [matrix, weight, bias],
        )
        yield (
            f"rms_norm {width}",
            lambda x, w, s=shape: groupquant.rms_norm(x, **s, weight=w, eps=1e-6, bits=bits),
            lambda x, w, s=shape: F.rms_norm(x, **s, weight=w, eps=1e-6),
            [matrix, weight],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=rows.RESULTS / "groupquant.jsonl")
    parser.add_argument("--log2-elements", type=int, default=28)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 2])
    parser.add_argument("--commit", help="where git cannot tell")
    options = parser.parse_args()
    settings = rows.settings("cuda", options.commit)
    count = 1 << options.log2_elements

    for name in options.dtypes:
        x = torch.randn(count, device="cuda").mul_(1.5).to(DTYPES[name])
        copy = copy_bandwidth(x)

        def report(case: str, bits: int, result: dict[str, Any], name=name, copy=copy) -> None:
            row = {"case": case, "dtype": name, "bits": bits, "elements": count, **result}
            rows.append(options.out, {**row, "copy_GBps": copy / 1e6, **settings})
            figures = {k: f"{v:.2f}" for k, v in result.items() if k.endswith(("copy", "ratio"))}
            print(f"{case:22s} {name} {bits} bits", figures, flush=True)

        for bits in options.bits:
            for rounding in ("stochastic", "nearest"):
                report(f"pack {rounding}", bits, measure_pack(x, bits, rounding, copy))
            if bits != 4 and name == "fp32":
                continue
            for case, ours, plain, inputs in functions(x, bits, WIDTHS if bits == 4 else (1024,)):
                report(case, bits, measure_function(ours, plain, inputs))


if __name__ == "__main__":
    main()
