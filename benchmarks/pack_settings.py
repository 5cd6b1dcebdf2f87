"""Positions and warps a program for each code of group quantisation: which are the fastest.

    python -m benchmarks.pack_settings --bits 4 3 2 --codes minmax offset rotated

Prints, for each code, bits and setting, the bandwidth of packing and unpacking over that of a copy,
as `benchmarks/groupquant.py` counts it, best first. `groupquant/kernels.py` has the settings.
"""

import argparse
import itertools
from typing import Any

import torch

from benchmarks.groupquant import GROUP_SIZE, PLAIN, check_pack, pack_bytes
from benchmarks.kernels import inputs, interleaved
from packlight.groupquant import kernels
from packlight.groupquant.grouping import MINMAX, OFFSET, ROTATED

CODES = {"minmax": MINMAX, "offset": OFFSET, "rotated": ROTATED}
KINDS = {"minmax": "stochastic", "offset": "offset", "rotated": "rotated"}
BLOCKS = (256, 512, 1024, 2048)
WARPS = (1, 2, 4, 8)


def set_all(setting: kernels.Setting) -> None:
    """Has packing and unpacking launched so."""
    kernels.PACK = kernels.UNPACK = kernels.REBUILD = setting
    kernels.TURNED = kernels.TURNED_READER = setting
    kernels._quantize_launch.cache_clear()
    kernels._dequantize_launch.cache_clear()


def measure(x: torch.Tensor, bits: int, code: str, copy: float) -> dict[str, float]:
    """Packing and unpacking, of copy."""
    n, groups = x.numel(), (bits, GROUP_SIZE, CODES[code])
    seed = (None, 2**62 + 1)
    check_pack(x, bits, KINDS[code])
    pack = kernels.quantize(x, (1,), groups, *seed)
    layout: Any = ((n,), (1,), n, groups, x.dtype)
    functions = {
        "pack": lambda: kernels.quantize(x, (1,), groups, *seed),
        "unpack": lambda: kernels.dequantize(*pack, *layout, *PLAIN),
    }
    moved = n * x.element_size() + pack_bytes(n, groups)
    times = interleaved(functions, 12, x.device.type)
    return {name: moved / milliseconds / copy for name, milliseconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--codes", nargs="+", default=[*CODES], choices=[*CODES])
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--log2-elements", type=int, default=28)
    options = parser.parse_args()
    x, _, copy = inputs(options.dtype, options.log2_elements, "cuda")
    x = x.detach()
    for code, bits in itertools.product(options.codes, options.bits):
        found: dict[str, list[tuple[float, int, int]]] = {"pack": [], "unpack": []}
        for block, warps in itertools.product(BLOCKS, WARPS):
            set_all(kernels.Setting(block, warps))
            for name, share in measure(x, bits, code, copy).items():
                found[name].append((share, block, warps))
        for name, shares in found.items():
            best = sorted(shares, reverse=True)[:4]
            shown = ", ".join(f"{share:.2f} ({block}, {warps})" for share, block, warps in best)
            print(f"{code} {bits} bits, {name} of copy (positions, warps): {shown}", flush=True)


if __name__ == "__main__":
    main()
