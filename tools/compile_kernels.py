"""Compiles every kernel for a GPU architecture, without a GPU, and prints what it costs.

    python tools/compile_kernels.py --arch 90

Triton's interpreter accepts programs that its compiler refuses; this finds them on any machine.
Also the instructions an element, the first thing to look at when a kernel is slow.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from packlight.elementwise.kernels import FORWARD
from packlight.fewbit import dropout_kernels, kernels, pooling_kernels
from packlight.fewbit.activations import CONTINUOUS

POINTERS = ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr")
DIGITS = {"fp32": 24, "fp16": 11, "bf16": 8}


def variants() -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    """(name, kernel, compile-time constants, dtype) of every form worth compiling."""
    for name in FORWARD:
        poison = CONTINUOUS[name].poison if name in CONTINUOUS else 0
        for dtype in DIGITS:
            constants = {"BITS": 3, "PARITY": 2, "BINS": False, "FULL": True, "POISON": poison}
            yield (
                f"{name} {dtype}",
                kernels._forward_kernel,
                forward(name, dtype, **constants),
                dtype,
            )
    for bits in (1, 2, 3, 4, 5, 8):
        for parity in (0, 1, 2):
            for bins in (False, True):
                for full in (False, True):
                    constants = {"BITS": bits, "PARITY": parity, "BINS": bins, "FULL": full}
                    label = f"silu bf16 {bits} bits, parity {parity}, bins {bins}, full {full}"
                    constants = forward("silu", "bf16", POISON=7, **constants)
                    yield label, kernels._forward_kernel, constants, "bf16"
        for full in (False, True):
            constants = {
                "BITS": bits,
                "FLAGGED": True,
                "MASK": not full,
                "FULL": full,
                "BLOCK": 512,
            }
            yield (
                f"backward fp32 {bits} bits, full {full}",
                kernels._backward_kernel,
                constants,
                "fp32",
            )
    encode = {"BITS": 3, "PARITY": 1, "BINS": True, "FULL": True, "POISON": 5}
    encode = {**forward("silu", "fp16", **encode), "FORWARD": None}
    yield "encode fp16", kernels._forward_kernel, encode, "fp16"
    for full in (False, True):
        constants = {"KEEP_CODES": full, "FULL": full, "BLOCK": kernels.BLOCK}
        yield f"dropout bf16, full {full}", dropout_kernels._dropout_kernel, constants, "bf16"
        constants = {"WINDOW": 9, "CHANNELS_LAST": full, "LARGE": full, "BITS": 4, "BLOCK": 256}
        for kernel in (pooling_kernels._forward_kernel, pooling_kernels._backward_kernel):
            yield f"pool {kernel.__name__} {full}", kernel, constants, "bf16"


def forward(name: str, dtype: str, **constants: Any) -> dict[str, Any]:
    """Constants of the activations' forward kernel."""
    return {
        "FORWARD": FORWARD[name],
        "CODE": kernels.CODE.get(name),
        "DIGITS": DIGITS[dtype],
        "BLOCK": kernels.BLOCK,
        **constants,
    }


def compile_kernel(kernel: Any, constants: dict[str, Any], dtype: str, arch: int) -> Any:
    """The compiled kernel for aligned pointers and sizes."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            special = {"codes_ptr": "*u8", "seed_ptr": "*i64", "levels_ptr": "*fp32"}
            special["table_ptr"] = "*i32" if constants.get("BINS") else "*fp32"
            signature[name] = "*" + dtype if name in POINTERS else special[name]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in ("a", "b", "scale", "offset", "low"):
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if name in ("n", "drop_below") else "i32"
            if name in ("n", "groups"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})


def instructions(compiled: Any) -> int | None:
    """Instructions in the machine code, None without Triton's disassembler."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"^\s+/\*[0-9a-f]{4}\*/", text, re.MULTILINE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--match", default="", help="only the variants whose name contains this")
    options = parser.parse_args()
    count = 0
    for name, kernel, constants, dtype in variants():
        if options.match not in name:
            continue
        compiled = compile_kernel(kernel, constants, dtype, options.arch)
        total = instructions(compiled)
        elements = constants["BLOCK"] * 8 / 128
        cost = "" if total is None else f"{total / elements:6.1f} instructions an element"
        print(f"{name:48s} {compiled.metadata.shared:6d} bytes shared {cost}", flush=True)
        count += 1
    print(f"{count} kernels compiled for sm_{options.arch}")


if __name__ == "__main__":
    main()
