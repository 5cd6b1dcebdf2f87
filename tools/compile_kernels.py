"""Compiles every kernel for a GPU architecture, without a GPU, and prints what it costs.

    python tools/compile_kernels.py --arch 90

Triton's interpreter accepts programs that its compiler refuses; this finds them on any machine.
Also the instructions an element, the first thing to look at when a kernel is slow.
"""

import argparse
import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from packlight.elementwise.kernels import FORWARD
from packlight.fewbit import dropout_kernels, kernels, pooling_kernels
from packlight.fewbit.activations import CONTINUOUS
from packlight.groupquant import gated_kernels
from packlight.groupquant import kernels as group_kernels
from packlight.groupquant import norm_kernels as group_norm_kernels
from packlight.groupquant import post_norm_kernels as post_norms
from packlight.groupquant import rotated_norm_kernels as rotated_norms
from packlight.groupquant.fixed_point import kernels as fixed_point_kernels
from packlight.groupquant.fixed_point import residual_kernels
from packlight.groupquant.fixed_point.method import bin_width
from packlight.groupquant.grouping import MINMAX, OFFSET, ROTATED, Grouping
from packlight.head import kernels as head_kernels
from packlight.inverted import kernels as inverted_kernels
from packlight.inverted import norm_kernels
from packlight.low_rank import kernels as low_rank_kernels
from packlight.rotary import kernels as rotary
from packlight.sketch import kernels as sketch_kernels
from packlight.sketch.reference import BUNDLE, POLYNOMIALS

POINTERS = ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "narrow_ptr", "exact_ptr")
POINTERS += ("gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr", "logits_ptr")
POINTERS += ("residual_ptr", "dresidual_ptr", "other_ptr")
POINTERS += ("shift_ptr", "q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr", "cos_ptr", "sin_ptr")
LIMITS = ("lowest", "highest", "below", "above", "edge")
FLOATS = ("a", "b", "center", "scale", "offset", "low", "eps", "momentum", *LIMITS)
FLOATS += ("cap", "scaling")
FLOATS += tuple(f"up_{name}" for name in LIMITS)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
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
    encode = {"BITS": 3, "PARITY": 1, "SHIFTED": True, "BINS": True, "FULL": True, "POISON": 5}
    encode = {**forward("silu", "fp16", **encode), "FORWARD": None}
    yield "encode fp16", kernels._forward_kernel, encode, "fp16"
    for full in (False, True):
        constants = {"KEEP_CODES": full, "SEED": 1, "FULL": full, "BLOCK": kernels.BLOCK}
        yield f"dropout bf16, full {full}", dropout_kernels._dropout_kernel, constants, "bf16"
    yield "dropout's mask", dropout_kernels._mask_kernel, {"BLOCK": 512}, "bf16"
    yield from inverted_variants()


def norm_variants() -> Iterator[tuple[str, Any, dict[str, Any], str, int, int]]:
    """As `variants`, with the warps of a program and the elements of its tile."""
    affine = {"HAS_WEIGHT": True, "HAS_BIAS": True, "CENTRED": True, "EXACT": False}
    rms, exact = {**affine, "HAS_BIAS": False, "CENTRED": False}, {**affine, "EXACT": True}
    for label, norm in (("layer", affine), ("rms", rms), ("exact layer", exact)):
        for width in (64, 768, 1024, 2048, 4096, 8192, 16384):
            for dtype in ("bf16", "fp32"):
                block = triton.next_power_of_2(width)
                constants = {**norm, "BLOCK": block, "FULL": block == width}
                for narrow in (False, True):
                    if narrow and (dtype == "fp32" or width != 1024):
                        continue
                    setting = norm_kernels.setting_for(norm_kernels.FORWARD, block)
                    rows, warps = norm_kernels.tile_of(setting, block)
                    tile = {"ROWS": rows, "STAGES": setting.stages}
                    yield (
                        f"{label} norm {dtype} {width}{' and cast' * narrow}",
                        norm_kernels._forward_kernel,
                        {**constants, **tile, "HAS_NARROW": narrow},
                        dtype,
                        warps,
                        rows * block,
                    )
                if block > norm_kernels.BACKWARD_WIDTH:
                    continue
                setting = norm_kernels.setting_for(norm_kernels.BACKWARD, block)
                rows, warps = norm_kernels.tile_of(setting, block)
                tile = {"ROWS": rows, "STAGES": setting.stages}
                needs = {"NEEDS_INPUT": True, "NEEDS_AFFINE": True}
                yield (
                    f"{label} norm backward {dtype} {width}",
                    norm_kernels._backward_kernel,
                    {**constants, **needs, **tile},
                    dtype,
                    warps,
                    rows * block,
                )
        block = norm_kernels.WIDE_BLOCK
        wide = {**norm, "BLOCK": block, "HAS_NARROW": False}
        yield f"{label} norm wide", norm_kernels._wide_forward_kernel, wide, "bf16", 8, block
        backward = norm_kernels._wide_backward_kernel
        yield f"{label} norm wide backward", backward, wide, "bf16", 8, block
        rows, columns = norm_kernels.COLUMN_ROWS, norm_kernels.COLUMNS
        constants = {**norm, "ROWS": rows, "BLOCK": columns}
        yield (
            f"{label} norm columns",
            norm_kernels._columns_kernel,
            constants,
            "bf16",
            4,
            rows * columns,
        )


def inverted_variants() -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    """Forward and backward of the inverted activations."""
    for name in inverted_kernels.DERIVATIVES:
        for dtype in DIGITS:
            for full in (True, False):
                label = f"inverted {name} {dtype}, full {full}"
                backward = inverted_kernels.backward_constants(name, DTYPES[dtype])
                yield (
                    f"{label}, backward",
                    inverted_kernels._backward_kernel,
                    {**backward, "FULL": full},
                    dtype,
                )
                if backward["BRANCH"]:
                    constants = inverted_kernels.forward_constants(name, DTYPES[dtype])
                    yield (
                        f"{label}, forward",
                        inverted_kernels._forward_kernel,
                        {**constants, "FULL": full},
                        dtype,
                    )


def pool_variants() -> Iterator[tuple[str, Any, dict[str, Any], str, int, int]]:
    """As `norm_variants`: pooling of a slab of 112 x 112, and its output of half the size."""
    for dtype, channels, side, whole in itertools.product(
        ("bf16", "fp32"), (64, 1), (2, 3, 9), (True, False)
    ):
        window = {"K": (1, side, side), "S": (1, 2, 2), "P": (0, side // 2, side // 2)}
        window["D"] = (1, 1, 1)
        constants: dict[str, Any] = {
            name + axis: value
            for name, values in window.items()
            for axis, value in zip("DHW", values, strict=True)
        }
        constants |= pooling_kernels._spanning(constants)
        constants |= {"ID": 1, "OD": 1, "BITS": (side**2 - 1).bit_length(), "LARGE": not whole}
        constants |= {"WORDS": whole, "WHOLE": whole} | ({"C": 1} if channels == 1 else {})
        for kernel, size in (
            (pooling_kernels._forward_kernel, (1, 56, 56)),
            (pooling_kernels._backward_kernel, (1, 112, 112)),
        ):
            tiling = pooling_kernels._tiling(channels, size, DTYPES[dtype].itemsize)
            elements = math.prod(tiling.constants.values())
            if "forward" in kernel.__name__ and whole:
                elements *= 8
            label = f"pool {dtype} {side}, {channels} channels, {whole}, {kernel.__name__}"
            yield label, kernel, constants | tiling.constants, dtype, tiling.warps, elements


def fixed_point_variants() -> Iterator[tuple[str, Any, dict[str, Any], str, int, int]]:
    """As `norm_variants`: the kernels of fixed-point codes, channels-last and not."""
    kernels = fixed_point_kernels
    forms = {"plain": (False, False), "relu": (True, False), "sum": (False, True)}
    for bits in (4, 8):
        sizes = {"WEIGHT": True, "BIAS": True, "BITS": bits}
        width = {"WIDTH": bin_width(bits, None)}
        for dtype, regular in itertools.product(("fp32", "bf16"), (True, False)):
            # Whole blocks of one channel a word, channels last; or none of it.
            block = {**sizes, "SAME": regular, "FULL": regular, "BLOCK": kernels.BLOCK}
            if regular:
                block["inner"] = 1
            label = f"fixed point {dtype} {bits} bits, regular {regular}"
            elements = 8 * kernels.BLOCK
            for form, (relu, added) in forms.items():
                forward = block | width | {"RELU": relu, "SUM": added}
                name = f"{label}, forward {form}"
                yield name, kernels._forward_kernel, forward, dtype, 4, elements
            for mode in range(3):
                decode = {**block, "MODE": mode}
                yield f"{label}, decode {mode}", kernels._decode_kernel, decode, dtype, 4, elements
        running = {"RUNNING_MEAN": True, "RUNNING_VAR": True, "PARTS": 1024, "BLOCK": 8}
        table, label = sizes | width | running, f"fixed point table {bits} bits"
        yield label, kernels._table_kernel, table, "fp32", 8, kernels.ENDING
    ending = {"PARTS": 1024, "BLOCK": 8}
    yield "fixed point finish", kernels._finish_kernel, ending, "fp32", 8, kernels.ENDING
    for dtype, columns, large in itertools.product(("fp32", "bf16"), (1, 64), (False, True)):
        label = f"fixed point {dtype}, {columns} columns, large {large}"

        def tile(
            warps: int, dtype: str = dtype, columns: int = columns, large: bool = large
        ) -> Any:
            elements = warps * 32 * (16 // DTYPES[dtype].itemsize)
            shape = {"ROWS": elements // columns, "COLUMNS": columns, "LARGE": large}
            return elements, shape | ({"inner": 1} if columns > 1 else {})

        elements, constants = tile(kernels.SUM_WARPS)
        constants["UNROLL"] = kernels.UNROLL
        elements *= kernels.UNROLL
        kernel = kernels._statistics_kernel
        yield f"{label}, statistics", kernel, constants, dtype, kernels.SUM_WARPS, elements
        for bits, same in itertools.product((4, 8), (True, False)):
            for (name, kernel, warps), (form, (relu, added)) in itertools.product(
                (
                    ("sums", kernels._sums_kernel, kernels.SUM_WARPS),
                    ("dx", kernels._dx_kernel, kernels.DX_WARPS),
                ),
                forms.items(),
            ):
                elements, constants = tile(warps)
                constants |= {"RELU": relu, "SUM": added}
                constants |= {"BITS": bits, "SAME": same, "FULL": True}
                elements *= 8 if same else 1
                yield (
                    f"{label}, {bits} bits, {same}, {name} {form}",
                    kernel,
                    constants,
                    dtype,
                    warps,
                    elements,
                )


def residual_variants() -> Iterator[tuple[str, Any, dict[str, Any], str, int, int]]:
    """As `norm_variants`: chains of 1 to 4 links that start with a tensor and are masked
    throughout, or that start with nothing and have every other link masked."""
    block = fixed_point_kernels.BLOCK
    for bits, dtype, regular, start, links in itertools.product(
        (4, 8), ("fp32", "bf16"), (True, False), (True, False), range(1, 5)
    ):
        masks = (0b1111 if start else 0b0101) & ((1 << links) - 1)
        constants = {"START": start, "LINKS": links, "MASKS": masks, "BITS": bits}
        constants |= {"SAME": regular, "FULL": regular, "BLOCK": block}
        if regular:
            constants["inner"] = 1
        label = f"residual {dtype} {bits} bits, regular {regular}, start {start}, {links} links"
        yield label, residual_kernels._residual_kernel, constants, dtype, 4, 8 * block


def group_variants() -> Iterator[tuple[str, Any, dict[str, Any], str, int, int]]:
    """As `norm_variants`: packs of 2^20 elements, and norms that keep one, as they are launched."""
    kernels, norms = group_kernels, group_norm_kernels
    minmax = itertools.product((2, 3, 4, 8), ("bf16", "fp16", "fp32"), (MINMAX,))
    offset = itertools.product((2, 3, 4, 8), ("bf16",), (OFFSET,))
    rotated = itertools.product((1, 2, 3, 4), ("bf16",), (ROTATED,))
    for bits, dtype, code in (*minmax, *offset, *rotated):
        flat, kind = Grouping(1, 1 << 20, bits, 128, code), DTYPES[dtype]
        rows = Grouping(1024, 1024, bits, 128, code)
        label = f"group {dtype} {bits} bits{('', ' offset', ' rotated')[code]}"
        launches = {
            "pack": kernels._quantize_launch(flat, kind, "", (), 1),
            "pack to nearest": kernels._quantize_launch(flat, kind, "", (), 0),
            "pack less a shift": kernels._quantize_launch(flat, kind, "", (), 1, 8, 8),
            "pack a third less a shift": kernels._quantize_launch(flat, kind, "", (), 1, 8, 24),
            "unpack": kernels._dequantize_launch(flat, kind, "", 0.0, 0.0, False, 0),
            "unpack and a shift": kernels._dequantize_launch(rows, kind, "", 0.0, 0.0, False, 8),
            "unpack affine": kernels._dequantize_launch(rows, kind, "", 0.0, 0.0, True, 8),
            "unpack affine, ragged": kernels._dequantize_launch(
                rows._replace(width=1000), kind, "", 0.0, 0.0, True, 8
            ),
        }
        for name in ("gelu", "silu"):
            launches |= {
                name: kernels._quantize_launch(flat, kind, name, (), 1),
                f"{name} rebuilt": kernels._dequantize_launch(flat, kind, name, 0.0, 0.0, False, 0),
                f"{name} backward": kernels._activation_backward_launch(flat, kind, name, 0.0, 0.0),
                f"gated {name}": gated_kernels._gated_launch(flat, kind, name, 1),
                f"gated {name} rebuilt": gated_kernels._gated_backward_launch(
                    flat, kind, name, True, True
                ),
            } | {
                f"gated {name} backward, through {through}": gated_kernels._gated_backward_launch(
                    flat, kind, name, False, through
                )
                for through in (True, False)
            }
        for width in (768, 1024, 4096, 8192):
            grouping = Grouping(4096, width, bits, 128, code)
            forward = norms._forward_launch(grouping, 1e-5, True, True, True, 1, None)
            launches[f"norm {width}"] = forward
            rounded = norms._forward_launch(grouping, 1e-5, False, True, False, 1, kind)
            launches[f"norm {width}, rounded before the weight"] = rounded
            backward, _ = norms._backward_launch(grouping, True, True, True, True, True)
            launches[f"norm {width} backward"] = backward
            if code == ROTATED:
                backward = rotated_norms.backward_launch(grouping, True, True)
                launches[f"norm {width} backward, groups a tile"] = backward
                sums, _ = rotated_norms.sums_launch(grouping, True, True, True)
                launches[f"norm {width} sums"] = sums
            for p in (0.0, 0.1):
                forward = post_norms._forward_launch(
                    grouping, torch.float32, p, 1e-5, True, True, 1, 1
                )
                launches[f"post norm {width}, p {p}"] = forward
                backward, _ = post_norms._backward_launch(grouping, p, True, True, True, True)
                launches[f"post norm {width} backward, p {p}"] = backward
        if code == OFFSET:
            launches["sums over programs"] = norms.sums_launch(1056, 1024, 2)
        for name, launch in launches.items():
            (step,) = launch.steps
            constants = dict(step.constants)
            warps = constants.pop("num_warps")
            size = 8 * constants.get("NQ", 1) * constants.get("SIZE", 64)
            size *= constants.get("ROWS", 1)
            yield f"{label}, {name}", step.kernel, constants, dtype, warps, size


def sketch_variants() -> Iterator[tuple[str, Any, dict[str, Any], str, int, int]]:
    """As `norm_variants`: sketches at the lengths of blocks that shares of 0.1 to 0.5 take."""
    for degree in (4, 7, 10):
        plan = {"LENGTH": 1 << degree, "DEGREE": degree, "POLY": POLYNOMIALS[degree - 1]}
        plan["BLOCK"] = sketch_kernels.PLAN
        yield f"sketch plan {1 << degree}", sketch_kernels._plan_kernel, plan, "bf16", 4, 128
    for dtype in ("bf16", "fp16", "fp32"):
        precision = {"PRECISION": "ieee" if dtype == "fp32" else None}
        for kind, (length, rows) in itertools.product(
            ("srht", "dct", "dft"), ((16, 16), (64, 16), (64, 32), (128, 16))
        ):
            places = min(sketch_kernels.PLACES, length)
            block = {"KIND": kind, "LENGTH": length, "TILES": 1, "ROWS": rows, "PLACES": places}
            block |= {"COLUMNS": sketch_kernels.COLUMNS} | precision
            yield (
                f"sketch {kind} {dtype} {length} places, {rows} rows",
                sketch_kernels._transform_kernel,
                block,
                dtype,
                4,
                length * sketch_kernels.COLUMNS,
            )
        tokens = sketch_kernels.DENSE_TOKENS // (2 if dtype == "fp32" else 1)
        columns = sketch_kernels.DENSE_COLUMNS
        dense = {"BUNDLE": BUNDLE, "TOKENS": tokens, "COLUMNS": columns} | precision
        for kernel in (sketch_kernels._gaussian_kernel, sketch_kernels._rademacher_kernel):
            yield f"sketch {kernel.__name__} {dtype}", kernel, dense, dtype, 8, tokens * columns
        rows, columns = sketch_kernels.STATISTICS_ROWS, sketch_kernels.ROW_COLUMNS
        constants = {"ROWS": rows, "COLUMNS": columns}
        kernel = sketch_kernels._statistics_kernel
        yield f"sketch statistics {dtype}", kernel, constants, dtype, 8, rows * columns
        for weighted in (False, True):
            constants = {"HAS_WEIGHT": weighted, "COLUMNS": columns}
            kernel = sketch_kernels._gather_kernel
            yield f"sketch gather {dtype}, weight {weighted}", kernel, constants, dtype, 4, columns


def head_variants() -> Iterator[tuple[str, Any, dict[str, Any], str, int, int]]:
    """As `norm_variants`: what is computed of a chunk of logits."""
    for dtype, capped in itertools.product(DIGITS, (False, True)):
        constants = {"CAPPED": capped, "BLOCK": head_kernels._BLOCK}
        for kernel in (head_kernels._row_sums_kernel, head_kernels._gradient_kernel):
            label = f"head {kernel.__name__} {dtype}, capped {capped}"
            yield label, kernel, constants, dtype, head_kernels._WARPS, head_kernels._BLOCK


def rotary_variants() -> Iterator[tuple[str, Any, dict[str, Any], str, int, int]]:
    """As `norm_variants`: 32 heads and 8 of 128 numbers each."""
    for dtype, back in itertools.product(DIGITS, (False, True)):
        sizes = {"Q_HEADS": 32, "K_HEADS": 8, "Q_BLOCK": 32, "K_BLOCK": 8, "SIZE": 128, "WIDTH": 64}
        constants = {**sizes, "TRANSPOSED": back}
        yield f"rotary {dtype}, back {back}", rotary._rotary_kernel, constants, dtype, 4, 40 * 128


def low_rank_variants() -> Iterator[tuple[str, Any, dict[str, Any], str, int, int]]:
    """As `norm_variants`: adapters of 16 and 64 of a layer of 4096."""
    wide = (8192, 4096, 4096)
    for dtype, rank, precision in itertools.product(("bf16", "fp16"), (16, 64), ("tf32", "tf32x3")):
        steps, label = (rank, 1), f"low rank {dtype} {rank} {precision}"
        launches = {
            "narrowed": low_rank_kernels._narrowed_launch(wide, rank, steps, precision)[0],
            "outer": low_rank_kernels._outer_launch(wide, rank, precision)[0],
            "added": low_rank_kernels._add_widened_launch(wide, rank, steps, 2.0, False, precision),
        }
        for name, launch in launches.items():
            (step,) = launch.steps
            constants = {**step.constants, "rank_step": 1}
            warps, size = constants.pop("num_warps"), constants["ROWS"] * constants["PLACES"]
            yield f"{label}, {name}", step.kernel, constants, dtype, warps, size


def forward(name: str, dtype: str, **constants: Any) -> dict[str, Any]:
    """Constants of the activations' forward kernel."""
    return {
        "FORWARD": FORWARD[name],
        "CODE": kernels.CODE.get(name),
        "DIGITS": DIGITS[dtype],
        "BLOCK": kernels.BLOCK,
        "SHIFTED": False,
        **constants,
    }


def compile_kernel(
    kernel: Any, constants: dict[str, Any], dtype: str, arch: int, warps: int = 4
) -> Any:
    """The compiled kernel for aligned pointers and sizes."""
    kernel = getattr(kernel, "kernel", None) or kernel  # under @quick
    options = {"num_warps": warps}
    options |= {name: constants[name] for name in ("num_stages", "maxnreg") if name in constants}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            special = {"codes_ptr": "*u8", "seed_ptr": "*i64", "levels_ptr": "*fp32"}
            special |= {"weight_copy_ptr": "*fp32", "bias_copy_ptr": "*fp32"}
            special["bits_ptr"] = special["signs_ptr"] = "*u8"
            special |= dict.fromkeys(("rstd_ptr", "dgamma_ptr", "dbeta_ptr"), "*fp32")
            special |= {"weight_ptr": "*fp32", "bias_ptr": "*fp32", "slots_ptr": "*i32"}
            if constants.get("WEIGHT") is False:  # what a query was packed less
                special["bias_ptr"] = "*" + dtype
            special["parts_ptr"] = special["moments_ptr"] = special["norms_ptr"] = "*fp32"
            special |= dict.fromkeys(("first_ptr", "step_ptr", "lowest_ptr"), "*fp32")
            special |= dict.fromkeys(("index_ptr", "places_ptr", "chosen_ptr"), "*i32")
            special["draws_ptr"] = special["targets_ptr"] = "*i64"
            names = ("logsumexp_ptr", "total_ptr", "on_softmax_ptr", "on_target_ptr", "on_all_ptr")
            special |= dict.fromkeys(names, "*fp32")
            special |= dict.fromkeys(("mask_ptr", "mask1_ptr", "mask2_ptr", "mask3_ptr"), "*u8")
            special |= dict.fromkeys(("codes1_ptr", "codes2_ptr", "codes3_ptr"), "*u8")
            special |= dict.fromkeys(("table1_ptr", "table2_ptr", "table3_ptr"), "*fp32")
            names = ("plan_ptr", "running_mean_ptr", "running_var_ptr")
            special |= dict.fromkeys(names, "*fp32")
            special |= dict.fromkeys(("gate_codes_ptr", "up_codes_ptr"), "*u8")
            special |= dict.fromkeys(("scales_ptr", "gate_scales_ptr", "up_scales_ptr"), "*i32")
            names = ("dweight_ptr", "dbias_ptr", "dweight_sum_ptr", "dbias_sum_ptr")
            special |= dict.fromkeys(names, "*fp32")
            special |= dict.fromkeys(("low_ptr", "factor_ptr"), "*fp32")
            special["table_ptr"] = "*i32" if constants.get("BINS") else "*fp32"
            signature[name] = "*" + dtype if name in POINTERS else special[name]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if name in ("n", "drop_below", "seed", "mask_seed") else "i32"
            if name in (
                "n",
                "groups",
                "width",
                "size",
                "channels",
                "inner",
                "share",
                "C",
                "IW",
                "OW",
                "row_step",
                "rank",
                "step",
                "each",
            ):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def dump(compiled: Any, *options: str) -> str | None:
    """What the disassembler says of the machine code, None where Triton brought none."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cost(compiled: Any, elements: float) -> str:
    """Instructions an element, registers and stack of a thread that handles so many."""
    code, resources = dump(compiled, "--dump-sass"), dump(compiled, "--dump-resource-usage")
    if code is None or resources is None:
        return ""
    total = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", resources)}
    return (
        f"{total / elements:6.1f} instructions an element,"
        f" {used['REG']} registers, {used['STACK']} bytes of stack"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--match", default="", help="only the variants whose name contains this")
    options = parser.parse_args()
    count = 0
    plain = ((*variant, 4, variant[2]["BLOCK"] * 8) for variant in variants())
    for name, kernel, constants, dtype, warps, elements in (
        *plain,
        *pool_variants(),
        *fixed_point_variants(),
        *residual_variants(),
        *group_variants(),
        *norm_variants(),
        *sketch_variants(),
        *head_variants(),
        *rotary_variants(),
        *low_rank_variants(),
    ):
        if options.match not in name:
            continue
        compiled = compile_kernel(kernel, constants, dtype, options.arch, warps)
        shared = f"{compiled.metadata.shared:6d} bytes shared"
        print(f"{name:48s} {shared} {cost(compiled, elements / (32 * warps))}", flush=True)
        count += 1
    print(f"{count} kernels compiled for sm_{options.arch}")


if __name__ == "__main__":
    main()
