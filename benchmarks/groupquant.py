"""Group quantisation against torch's own functions and a device copy: time, bandwidth, ratios.

    python -m benchmarks.run --suite kernels --filter groupquant   results/groupquant.jsonl

Every case is checked before it is timed. Times are medians of side-by-side repetitions by CUDA
events, launches and allocation included. `of_copy` counts the bytes that must move, each input read
once and each output written once, packs included, and divides by the bandwidth of a copy.
"""

import argparse
import importlib.util
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows
from benchmarks.kernels import (
    LAUNCH_BOUND,
    inputs,
    interleaved,
    unlaunched,
    unlaunched_passes,
)
from packlight import groupquant, manual_seed, use_reference
from packlight._seeds import NEAREST
from packlight.groupquant import ops
from packlight.groupquant.grouping import MINMAX, OFFSET, ROTATED, Grouping, Groups

GROUP_SIZE = 128
PLAIN = ("", (), None, None)
WIDTHS = (768, 1024, 2048, 4096, 8192)


# Packs by what their rows are called: how operators know the code, and whether they draw.
PACKS = {
    "stochastic": (MINMAX, True),
    "nearest": (MINMAX, False),
    "offset": (OFFSET, True),
    "rotated": (ROTATED, True),
}
# What the error of a pack of normal values may be, squared, in variances; by bits.
ERRORS = {
    "stochastic": {8: 8e-5, 4: 0.023, 3: 0.11, 2: 0.6},
    "nearest": {8: 4e-5, 4: 0.012, 3: 0.055, 2: 0.32},
    "offset": {8: 4e-5, 4: 0.012, 3: 0.055, 2: 0.3},
    "rotated": {4: 0.0105, 3: 0.039, 2: 0.145, 1: 0.61},
}
# How far kernels may be from the reference, over its norm. One rotated code in 330 at 4 bits and in
# 1000 at 2 is its neighbour, since means are of bfloat16 sums. That is a step over the root of so
# many: .018, .024 and .031 of a pack at 4, 3 and 2 bits; of gradients up to .024, .028 and .037.
DIFFERENCES = {"rotated": {4: 0.03, 3: 0.035, 2: 0.045}}
DIFFERENCE = 0.02  # of other codes
CHECKED = 1 << 22  # elements that are compared with the reference


def pack_bytes(count: int, groups: Groups) -> int:
    grouping = Grouping(1, count, *groups)
    return grouping.code_bytes + 4 * grouping.words


def check_pack(x: Tensor, bits: int, kind: str) -> dict[str, float]:
    """The squared error of a pack in variances of `x`; its kernels do what the reference does, but
    for a difference.
    """
    code, draws = PACKS[kind]
    groups, seed = (bits, GROUP_SIZE, code), (None, 2**62 + 1 if draws else NEAREST)
    few = x[:CHECKED]
    n = few.numel()
    layout = ((n,), (1,), n, groups, torch.float32)
    pack = ops.quantize(few, (1,), groups, *seed)
    y = ops.dequantize(*pack, *layout, *PLAIN)
    with use_reference():
        again = ops.dequantize(*pack, *layout, *PLAIN)
        other = ops.dequantize(*ops.quantize(few, (1,), groups, *seed), *layout, *PLAIN)
    deviation = few.float().std()
    assert (y - again).abs().max() < 4e-3 * deviation  # rotated groups are read in float16
    assert (y - again).norm() < 1e-3 * again.norm()
    error = float((y - few.float()).square().mean() / deviation.square())
    difference = float((y - other).norm() / other.norm())
    assert difference < DIFFERENCES.get(kind, {}).get(bits, DIFFERENCE)
    assert error < ERRORS[kind][bits]
    return {"squared_error": error, "reference_difference": difference}


def measure_pack(x: Tensor, bits: int, kind: str, copy: float) -> dict[str, Any]:
    n = x.numel()
    code, draws = PACKS[kind]
    groups, seed = (bits, GROUP_SIZE, code), (None, 2**62 + 1 if draws else NEAREST)
    errors = check_pack(x, bits, kind)
    layout = ((n,), (1,), n, groups, x.dtype)
    pack = ops.quantize(x, (1,), groups, *seed)
    functions: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]] = {
        "pack": lambda: ops.quantize(x, (1,), groups, *seed),
        "unpack": lambda: ops.dequantize(*pack, *layout, *PLAIN),
    }
    times = interleaved(functions, 12, x.device.type)
    moved = n * x.element_size() + pack_bytes(n, groups)
    row = {f"{name}_of_copy": moved / milliseconds / copy for name, milliseconds in times.items()}
    row |= {f"{name}_ms": milliseconds for name, milliseconds in times.items()}
    row |= errors
    if x.is_cuda and n < LAUNCH_BOUND:
        functions["copy"] = x.clone
        alone = unlaunched(functions, 12)
        copy = 2 * x.nbytes / alone.pop("copy")
        for name, milliseconds in alone.items():
            row |= {f"graph_{name}_ms": milliseconds}
            row |= {f"graph_{name}_of_copy": moved / milliseconds / copy}
    return row


def measure_function(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: list[Tensor],
    liger: Callable[..., Tensor] | None = None,
    limit: float = DIFFERENCE,
) -> dict[str, Any]:
    """Forward and backward of a function, of torch's, and of Liger-Kernel's where it has one."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    difference = check(ours, plain, inputs, limit)
    given = {"ours": (ours, inputs), "torch": (plain, inputs)}
    if liger is not None:
        # Copies, into which its backward pass may write.
        given["liger"] = liger, [x.detach().clone().requires_grad_() for x in inputs]
    outputs = {name: function(*xs) for name, (function, xs) in given.items()}
    if liger is not None:
        torch.testing.assert_close(outputs["liger"], outputs["torch"], rtol=2**-6, atol=2**-6)
    dy = torch.randn_like(outputs["ours"])
    device = dy.device.type
    forward = interleaved(
        {name: partial(function, *xs) for name, (function, xs) in given.items()}, 12, device
    )
    backward = interleaved(
        {
            name: partial(torch.autograd.grad, outputs[name], xs, dy, retain_graph=True)
            for name, (_, xs) in given.items()
        },
        12,
        device,
    )
    row = unlaunched_passes({name: (*what, dy) for name, what in given.items()})
    if liger is not None:
        row |= {"forward_liger_ms": forward["liger"], "backward_liger_ms": backward["liger"]}
        both = forward["liger"] + backward["liger"]
        row["both_liger_ratio"] = both / (forward["ours"] + backward["ours"])
    return row | {
        "reference_difference": difference,
        "forward_ms": forward["ours"],
        "forward_torch_ms": forward["torch"],
        "backward_ms": backward["ours"],
        "backward_torch_ms": backward["torch"],
        "forward_ratio": forward["torch"] / forward["ours"],
        "backward_ratio": backward["torch"] / backward["ours"],
        "both_ratio": (forward["torch"] + backward["torch"]) / (forward["ours"] + backward["ours"]),
    }


def check(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], limit: float
) -> float:
    """The forward is torch's to rounding; kernel and reference give the same gradient, to what is
    returned.
    """
    few = [x[:64] if x.dim() == 2 else x[: 1 << 16] for x in inputs]
    few = [x.detach().requires_grad_() for x in few]
    y, expected = ours(*few), plain(*few)
    tolerance = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-18}[y.dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    dy = torch.randn_like(y)

    def gradients() -> tuple[Tensor, ...]:
        manual_seed(3)
        return torch.autograd.grad(ours(*few), few, dy)

    actual = gradients()
    with use_reference():
        reference = gradients()
    differences = [
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(actual, reference, strict=True)
    ]
    assert max(differences) < limit
    return max(differences)


Function = tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]


def function_of(name: str, x: Tensor, bits: int) -> Function:
    """Ours, torch's own, and inputs, of a function by its name: "gelu", "layer_norm 768".

    A code may come last: "gelu rotated".
    """
    kind, *rest = name.split(" ")
    width = next((word for word in rest if word.isdigit()), "")
    ours = getattr(groupquant, kind)
    if "rotated" in rest:
        ours = partial(ours, code="rotated")
    elif "offset" in rest:
        ours = partial(ours, rounding="offset")
    if kind == "swiglu":
        # Liger takes a row of any width to its registers.
        halves = x.view(-1, min(4096, x.numel() // 2)).chunk(2)
        return partial(ours, bits=bits), lambda g, u: F.silu(g) * u, list(halves)
    plain = torch.tanh if kind == "tanh" else getattr(F, kind)
    if not width:
        return partial(ours, bits=bits), plain, [x]
    size = int(width)
    matrix = x[: x.numel() // size * size].view(-1, size)
    weight, bias = (torch.randn(size, device=x.device).to(x.dtype) for _ in range(2))
    if kind == "layer_norm":
        return (
            lambda x, w, b: ours(x, (size,), weight=w, bias=b, bits=bits),
            lambda x, w, b: plain(x, (size,), weight=w, bias=b),
            [matrix, weight, bias],
        )
    return (
        lambda x, w: ours(x, (size,), weight=w, eps=1e-6, bits=bits),
        lambda x, w: plain(x, (size,), weight=w, eps=1e-6),
        [matrix, weight],
    )


def liger_of(name: str) -> Callable[..., Tensor] | None:
    """Liger-Kernel's function, of the same arguments as ours, where it is installed and has one."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel import ops as theirs

    kind = name.partition(" ")[0]
    if kind == "swiglu":
        return lambda g, u: theirs.LigerSiLUMulFunction.apply(g, u)
    if kind == "layer_norm":
        return lambda x, w, b: theirs.LigerLayerNormFunction.apply(x, w, b, 1e-5)
    if kind == "rms_norm":  # not in place: the gradient is read again
        return lambda x, w: theirs.LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)
    return None


def checked(name: str, bits: int, dtype: str, log2_elements: int, device: str) -> dict[str, Any]:
    x, _, copy = inputs(dtype, log2_elements, device)
    if name.startswith("pack "):
        result = measure_pack(x, bits, name.removeprefix("pack "), copy)
    else:
        liger = liger_of(name) if device == "cuda" else None
        kind = "rotated" if "rotated" in name else ""
        limit = DIFFERENCES.get(kind, {}).get(bits, DIFFERENCE)
        result = measure_function(*function_of(name, x.detach(), bits), liger, limit)
    return {**result, "copy_GBps": copy / 1e6}


def cases(options: argparse.Namespace) -> list[rows.Case]:
    """Packing, and every function worth timing; norms of all widths at 4 bits."""
    packs = ("pack stochastic", "pack nearest")
    newer = ("pack offset", "pack rotated")
    plain = ("gelu", "silu", "tanh", "mish", "swiglu")
    found = []
    bf16 = "bf16"
    for log2, dtype, bits in itertools.product(options.log2_elements, (bf16, "fp32"), (4, 8, 3, 2)):
        widths = WIDTHS if bits == 4 else (1024,)
        norms = [f"{kind} {width}" for width in widths for kind in ("layer_norm", "rms_norm")]
        names = [*packs] if bits == 3 or (bits != 4 and dtype != bf16) else [*packs, *plain, *norms]
        if dtype == bf16:
            names += newer[:1] if bits == 8 else newer
            if bits != 8:
                fused = ["gelu", "silu", "swiglu", "layer_norm 1024", "rms_norm 4096"]
                if bits == 4:
                    fused += ["layer_norm 768", "layer_norm 4096"]
                names += [f"{name} rotated" for name in fused]
        for name in names:
            key = {"case": name, "dtype": dtype, "bits": bits, "elements": 1 << log2}
            run = partial(checked, name, bits, dtype, log2, options.device)
            title = f"groupquant/{name} {dtype} {bits} bits 2^{log2}"
            found.append(rows.Case(title, "groupquant.jsonl", key, run, 4))
    return found
