"""Inverted LayerNorm and RMSNorm against torch's own and a device copy: time, bandwidth, ratios.

    python -m benchmarks.run --suite kernels --filter norms   results/norms.jsonl
    python -m benchmarks.norms --dtypes bf16 --widths 1024 4096

Every case is checked against torch before it is timed. Times are medians of side-by-side
repetitions by CUDA events through autograd, launches and allocation included; inputs are random and
larger than the cache. `*_of_copy` is the bandwidth over that of a device-to-device copy of a tensor
of the same size and dtype, measured in the same process; the least that must move is x and y in the
forward, dy, y and dx in the backward. `exact` is how many channels are kept exactly, `cast` whether
the case is that of autocast: float32 output from a 16-bit input, and its 16-bit cast, against what
torch does there (a cast of the input, the norm, a cast of the output).

Run by itself, this times the kernels under many settings (`packlight.inverted.norm_kernels`) and
prints the best of each case; rows go to `--out` only if it is given.
"""

import argparse
import contextlib
import functools
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows
from benchmarks.kernels import DTYPES, copy_bandwidth, interleaved, unlaunched_passes
from packlight import inverted
from packlight.inverted import norm_kernels as kernels

WIDTHS = (768, 1024, 2048, 4096, 8192)
KINDS = ("layer_norm", "rms_norm")


class Case:
    """One norm of one width: ours and torch's, as functions of x."""

    def __init__(
        self, kind: str, width: int, dtype: torch.dtype, exact: int, cast: bool, device: str
    ) -> None:
        self.kind, self.width, self.cast = kind, width, cast
        parameters = torch.float32 if cast else dtype
        self.weight = (torch.rand(width, device=device) + 0.5).to(parameters).requires_grad_()
        self.bias = (torch.rand(width, device=device) * 0.2).to(parameters).requires_grad_()
        self.channels = torch.randperm(width, device=device)[:exact]
        with torch.no_grad():
            self.weight[self.channels] = 0.0

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias] if self.kind == "layer_norm" else [self.weight]

    def ours(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """With parameters of the caller's, or its own."""
        shape, exact = (self.width,), {"exact_channels": self.channels}
        norm = getattr(inverted, self.kind)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.cast):
            y: Tensor = norm(x, shape, *(parameters or self.parameters), **exact)
        return y

    def torch(self, x: Tensor, *parameters: Tensor) -> Tensor:
        norm = getattr(F, self.kind)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.cast):
            y: Tensor = norm(x, (self.width,), *(parameters or self.parameters))
        return y


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check(case: Case, x: Tensor, dy: Tensor) -> None:
    """The forward is torch's to rounding, and so are all gradients."""
    x = x[:512].detach().clone().requires_grad_()
    dy = dy[:512]
    y, plain = case.ours(x), case.torch(x)
    assert y.dtype == plain.dtype
    limit = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}[x.dtype]
    assert relative(y, plain) <= limit, relative(y, plain)
    inputs = [x, *case.parameters]
    actual = torch.autograd.grad(y, inputs, dy.to(y.dtype))
    expected = torch.autograd.grad(plain, inputs, dy.to(y.dtype))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) <= limit, relative(a, b)


def measure(case: Case, x: Tensor, dy: Tensor, copy: float, repeats: int) -> dict[str, Any]:
    """Forward and backward of ours and of torch's, side by side."""
    x.requires_grad_()
    inputs = [x, *case.parameters]

    ours = case.ours

    def plain(x: Tensor, *parameters: Tensor) -> Tensor:
        y = case.torch(x, *parameters)
        if case.cast:
            y.to(x.dtype)  # what the next Linear does
        return y

    forward = interleaved(
        {"ours": lambda: ours(x), "torch": lambda: plain(x)}, repeats, x.device.type
    )
    y, y_torch = ours(x), plain(x)
    dy = dy.to(y.dtype)
    backward = interleaved(
        {
            "ours": lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True),
            "torch": lambda: torch.autograd.grad(y_torch, inputs, dy, retain_graph=True),
        },
        repeats,
        x.device.type,
    )
    size = x.numel() * x.element_size()
    output = y.numel() * y.element_size()
    kept = size  # y, or the cast of it
    forward_bytes = size + output + (kept if case.cast else 0)
    backward_bytes = output + kept + size
    alone = unlaunched_passes({"ours": (ours, inputs, dy), "torch": (plain, inputs, dy)}, repeats)
    return alone | {
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


# --- The sweep.

SETTINGS: dict[str, tuple[int, ...]] = {
    "tile": (1024, 2048, 4096, 8192),
    "per_thread": (4, 8, 16, 32),
    "programs": (1, 2, 4, 8, 16, 32),
    "stages": (1, 2, 3),
}


@contextlib.contextmanager
def setting(way: str, chosen: kernels.Setting) -> Iterator[None]:
    """Within this context the kernels of one way, "FORWARD" or "BACKWARD", run with this."""
    before = getattr(kernels, way)
    setattr(kernels, way, dict.fromkeys(before, chosen))
    try:
        yield
    finally:
        setattr(kernels, way, before)


def sweep(case: Case, x: Tensor, dy: Tensor, repeats: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of each setting that compiles, forward and backward apart."""
    x.requires_grad_()
    inputs = [x, *case.parameters]
    y = case.ours(x)
    block = 1 << (case.width - 1).bit_length()
    runs = {
        "FORWARD": lambda: case.ours(x),
        "BACKWARD": lambda: torch.autograd.grad(y, inputs, dy.to(y.dtype), retain_graph=True),
    }
    for way, run in runs.items():
        seen = set()
        for values in itertools.product(*SETTINGS.values()):
            chosen = kernels.Setting(*values)
            tile = kernels.tile_of(chosen, block)
            if (*tile, *values[2:]) in seen:
                continue
            seen.add((*tile, *values[2:]))
            with setting(way, chosen):
                try:
                    time = interleaved({"ours": run}, repeats)["ours"]
                except Exception as error:  # noqa: BLE001 - too much shared memory, say
                    print(f"{way} {chosen}: {type(error).__name__}", flush=True)
                    continue
            yield {"way": way.lower(), "ms": time, "warps": tile[1], **chosen._asdict()}


# --- Running.


@functools.lru_cache(maxsize=1)
def inputs(dtype: str, width: int, count: int, device: str) -> tuple[Tensor, Tensor, float]:
    """An input, a gradient, and the bandwidth of a copy; the cases of a width share them."""
    x, dy = (torch.randn(count, width, device=device).to(DTYPES[dtype]) for _ in range(2))
    return x, dy, copy_bandwidth(x)


def checked(
    kind: str, dtype: str, width: int, count: int, exact: int, cast: bool, device: str
) -> dict[str, Any]:
    x, dy, copy = inputs(dtype, width, count, device)
    case = Case(kind, width, x.dtype, exact, cast, device)
    check(case, x, dy)
    return {**measure(case, x.detach(), dy, copy, 12), "copy_GBps": copy / 1e6}


def cases(options: argparse.Namespace) -> list[rows.Case]:
    """Both norms at all widths, with exact channels, and LayerNorm as under autocast."""
    found = []
    for log2, dtype, width, kind, exact, cast in itertools.product(
        options.log2_elements, ("bf16", "fp32"), WIDTHS, KINDS, (0, 3), (False, True)
    ):
        if cast and (exact or dtype != "bf16" or kind != "layer_norm"):
            continue
        count = (1 << log2) // width
        key = {"case": kind, "dtype": dtype, "width": width, "rows": count, "exact": exact}
        run = functools.partial(checked, kind, dtype, width, count, exact, cast, options.device)
        name = f"norms/{kind} {dtype} {width}" + f" exact {exact}" * bool(exact)
        name += " autocast" * cast + f" 2^{log2}"
        found.append(rows.Case(name, "norms.jsonl", {**key, "cast": cast}, run, 4))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, help="a file for the rows")
    parser.add_argument("--log2-elements", type=int, default=28)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--commit", help="where git cannot tell")
    options = parser.parse_args()
    settings = rows.settings("cuda", options.commit)
    for dtype, width, kind in itertools.product(options.dtypes, options.widths, options.kinds):
        x, dy, _ = inputs(dtype, width, (1 << options.log2_elements) // width, "cuda")
        run_sweep(options, settings, kind, dtype, x, dy)


def run_sweep(
    options: argparse.Namespace,
    settings: dict[str, Any],
    kind: str,
    dtype: str,
    x: Tensor,
    dy: Tensor,
) -> None:
    """Times all settings and prints the five best of each way."""
    case = Case(kind, x.shape[1], x.dtype, 0, False, "cuda")
    results = list(sweep(case, x.detach(), dy, options.repeats))
    for row in results:
        if options.out:
            rows.append(
                options.out,
                {"case": kind, "dtype": dtype, "width": x.shape[1], **row, **settings},
            )
    for way in ("forward", "backward"):
        best = sorted((row for row in results if row["way"] == way), key=lambda row: row["ms"])
        for row in best[:5]:
            chosen = ", ".join(f"{name} {row[name]}" for name in SETTINGS)
            print(f"{kind} {dtype} {x.shape[1]} {way}: {row['ms']:.3f} ms with {chosen}")


if __name__ == "__main__":
    main()
