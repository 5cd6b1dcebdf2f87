"""Triton kernels of LayerNorm and RMSNorm: one forward and one backward, each in one pass.

A tile is ROWS whole rows of BLOCK >= width columns, in registers. Programs are few and take tile
after tile: gamma and beta are read once a program, and the backward adds up its share of dgamma and
dbeta in registers, writes it once as a row of [programs, width] in float32, and a small sum ends
it. The order of all sums is fixed, so a run repeats bit for bit on the same device.

Rows wider than the registers hold take kernels that go over the columns of a row in blocks, and
dgamma and dbeta a pass of their own.

Traffic: the forward reads x and writes y (and its cast); the backward reads dy and y and writes dx.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick
from packlight.inverted.norm_reference import row_width


class Setting(NamedTuple):
    """How a kernel is cut up. `python -m benchmarks.norms` times many."""

    tile: int  # elements of a tile, where a row is shorter
    per_thread: int  # elements of a tile that a thread holds
    programs: int  # programs a multiprocessor
    stages: int  # tiles on their way at once; above 1 they go through shared memory


# By the largest BLOCK that they serve. Not measured yet.
FORWARD = {
    4096: Setting(tile=2048, per_thread=8, programs=16, stages=1),
    16384: Setting(tile=2048, per_thread=16, programs=16, stages=1),
}
BACKWARD = {
    2048: Setting(tile=1024, per_thread=8, programs=8, stages=1),
    8192: Setting(tile=1024, per_thread=16, programs=2, stages=2),
}
WARPS = 32  # the most a program may have
# The widest rows that stay in registers, where the backward holds seven values a column.
FORWARD_WIDTH = 16384
BACKWARD_WIDTH = 8192
WIDE_PROGRAMS = 8  # a multiprocessor, over the columns of wider rows
WIDE_BLOCK = 4096  # columns at once of a wider row
COLUMNS = 128  # columns of a program that sums over rows
COLUMN_ROWS = 32  # and its rows at once


@triton.jit
def _affine(weight_ptr, bias_ptr, column, inside, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """gamma and beta of these columns, 1 and 0 where there is none."""
    gamma = tl.full(column.shape, 1.0, tl.float32)
    beta = tl.zeros(column.shape, tl.float32)
    if HAS_WEIGHT:
        gamma = tl.load(weight_ptr + column, inside, other=1.0).to(tl.float32)
    if HAS_BIAS:
        beta = tl.load(bias_ptr + column, inside, other=0.0).to(tl.float32)
    return gamma, beta


@triton.jit
def _inverse(gamma, HAS_WEIGHT: tl.constexpr):
    """1 / gamma, NaN where gamma is 0: x_hat is lost there."""
    if HAS_WEIGHT:
        return tl.where(gamma == 0.0, float("nan"), 1.0 / gamma)
    return gamma


@triton.jit
def _normalised(
    shifted, inverse, dy, g, slot, exact_ptr, row, exact_count, mask, EXACT: tl.constexpr
):
    """x_hat and g x_hat of a tile, from y - beta or, for exact channels, from what was kept."""
    x_hat = shifted * inverse
    product = dy * shifted
    if EXACT:
        kept = slot >= 0
        kept_ptr = exact_ptr + row * exact_count + slot
        exact = tl.load(kept_ptr, mask & kept, other=0.0).to(tl.float32)
        x_hat = tl.where(kept, exact, x_hat)
        product = tl.where(kept, g * exact, product)
    return x_hat, product


@quick
@triton.jit
def _forward_kernel(
    x_ptr,  # [rows, width]
    y_ptr,  # [rows, width]
    narrow_ptr,  # [rows, width], the cast of y
    rstd_ptr,  # [rows] fp32
    weight_ptr,  # [width]
    bias_ptr,  # [width]
    slots_ptr,  # [width] int32: which column of exact, -1 for none
    exact_ptr,  # [rows, exact_count]
    rows,
    width,
    exact_count,
    eps,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NARROW: tl.constexpr,
    EXACT: tl.constexpr,
    FULL: tl.constexpr,  # width is BLOCK
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < width
    if FULL:
        inside = tl.full([1, BLOCK], True, tl.int1)
    gamma, beta = _affine(weight_ptr, bias_ptr, column, inside, HAS_WEIGHT, HAS_BIAS)
    if EXACT:
        slot = tl.load(slots_ptr + column, inside, other=-1)
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row = (tl.zeros([ROWS, 1], tl.int64) + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & inside
        offset = row * width + column
        x = tl.load(x_ptr + offset, mask, other=0.0).to(tl.float32)
        if CENTRED:
            mean = tl.sum(x, 1, keep_dims=True) / width
            x = tl.where(inside, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / width + eps)
        x_hat = x * rstd
        y = x_hat * gamma + beta
        tl.store(y_ptr + offset, y, mask)
        if HAS_NARROW:
            tl.store(narrow_ptr + offset, y, mask)
        if EXACT:
            tl.store(exact_ptr + row * exact_count + slot, x_hat, mask & (slot >= 0))
        tl.store(rstd_ptr + row, rstd, row < rows)


@quick
@triton.jit
def _backward_kernel(
    dy_ptr,  # [rows, width]
    y_ptr,  # [rows, width]
    dx_ptr,  # [rows, width]
    rstd_ptr,  # [rows] fp32
    weight_ptr,  # [width]
    bias_ptr,  # [width]
    slots_ptr,  # [width] int32
    exact_ptr,  # [rows, exact_count]
    dgamma_ptr,  # [programs, width] fp32
    dbeta_ptr,  # [programs, width] fp32
    rows,
    width,
    exact_count,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    NEEDS_INPUT: tl.constexpr,
    NEEDS_AFFINE: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < width
    if FULL:
        inside = tl.full([1, BLOCK], True, tl.int1)
    gamma, beta = _affine(weight_ptr, bias_ptr, column, inside, HAS_WEIGHT, HAS_BIAS)
    inverse = _inverse(gamma, HAS_WEIGHT)
    slot = column
    if EXACT:
        slot = tl.load(slots_ptr + column, inside, other=-1)
    dgamma = tl.zeros([ROWS, BLOCK], tl.float32)
    dbeta = tl.zeros([ROWS, BLOCK], tl.float32)
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        row = (tl.zeros([ROWS, 1], tl.int64) + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & inside
        offset = row * width + column
        dy = tl.load(dy_ptr + offset, mask, other=0.0).to(tl.float32)
        shifted = tl.load(y_ptr + offset, mask, other=0.0).to(tl.float32) - beta
        g = dy * gamma
        x_hat, product = _normalised(
            shifted, inverse, dy, g, slot, exact_ptr, row, exact_count, mask, EXACT
        )
        if NEEDS_INPUT:
            rstd = tl.load(rstd_ptr + row, row < rows, other=0.0)
            dx = g - x_hat * (tl.sum(product, 1, keep_dims=True) / width)
            if CENTRED:
                dx -= tl.sum(g, 1, keep_dims=True) / width
            tl.store(dx_ptr + offset, dx * rstd, mask)
        if NEEDS_AFFINE:
            if HAS_WEIGHT:
                dgamma += dy * x_hat
            if HAS_BIAS:
                dbeta += dy
    if NEEDS_AFFINE:
        place = tl.program_id(0).to(tl.int64) * width + column
        if HAS_WEIGHT:
            tl.store(dgamma_ptr + place, tl.sum(dgamma, 0, keep_dims=True), inside)
        if HAS_BIAS:
            tl.store(dbeta_ptr + place, tl.sum(dbeta, 0, keep_dims=True), inside)


# --- Wider rows: a program a row, over its columns in blocks.


@quick
@triton.jit
def _wide_forward_kernel(
    x_ptr,
    y_ptr,
    narrow_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    slots_ptr,
    exact_ptr,
    width,
    exact_count,
    eps,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NARROW: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row * width
    lane = tl.arange(0, BLOCK)
    mean = 0.0
    if CENTRED:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, width, BLOCK):
            column = first + lane
            total += tl.load(x_ptr + start + column, column < width, other=0.0).to(tl.float32)
        mean = tl.sum(total, 0) / width
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + lane
        x = tl.load(x_ptr + start + column, column < width, other=0.0).to(tl.float32) - mean
        total += tl.where(column < width, x * x, 0.0)
    rstd = tl.rsqrt(tl.sum(total, 0) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    for first in range(0, width, BLOCK):
        column = first + lane
        inside = column < width
        gamma, beta = _affine(weight_ptr, bias_ptr, column, inside, HAS_WEIGHT, HAS_BIAS)
        x = tl.load(x_ptr + start + column, inside, other=0.0).to(tl.float32)
        x_hat = (x - mean) * rstd
        y = x_hat * gamma + beta
        tl.store(y_ptr + start + column, y, inside)
        if HAS_NARROW:
            tl.store(narrow_ptr + start + column, y, inside)
        if EXACT:
            slot = tl.load(slots_ptr + column, inside, other=-1)
            tl.store(exact_ptr + row * exact_count + slot, x_hat, inside & (slot >= 0))


@quick
@triton.jit
def _wide_backward_kernel(
    dy_ptr,
    y_ptr,
    dx_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    slots_ptr,
    exact_ptr,
    width,
    exact_count,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row * width
    lane = tl.arange(0, BLOCK)
    rstd = tl.load(rstd_ptr + row)
    sum_g = tl.zeros([BLOCK], tl.float32)
    sum_product = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + lane
        inside = column < width
        gamma, beta = _affine(weight_ptr, bias_ptr, column, inside, HAS_WEIGHT, HAS_BIAS)
        dy = tl.load(dy_ptr + start + column, inside, other=0.0).to(tl.float32)
        shifted = tl.load(y_ptr + start + column, inside, other=0.0).to(tl.float32) - beta
        slot = column
        if EXACT:
            slot = tl.load(slots_ptr + column, inside, other=-1)
        g = dy * gamma
        _, product = _normalised(
            shifted, gamma, dy, g, slot, exact_ptr, row, exact_count, inside, EXACT
        )
        sum_g += g
        sum_product += product
    mean_g = 0.0
    if CENTRED:
        mean_g = tl.sum(sum_g, 0) / width
    mean_product = tl.sum(sum_product, 0) / width
    for first in range(0, width, BLOCK):
        column = first + lane
        inside = column < width
        gamma, beta = _affine(weight_ptr, bias_ptr, column, inside, HAS_WEIGHT, HAS_BIAS)
        dy = tl.load(dy_ptr + start + column, inside, other=0.0).to(tl.float32)
        shifted = tl.load(y_ptr + start + column, inside, other=0.0).to(tl.float32) - beta
        slot = column
        if EXACT:
            slot = tl.load(slots_ptr + column, inside, other=-1)
        g = dy * gamma
        inverse = _inverse(gamma, HAS_WEIGHT)
        x_hat, _ = _normalised(
            shifted, inverse, dy, g, slot, exact_ptr, row, exact_count, inside, EXACT
        )
        tl.store(dx_ptr + start + column, (g - mean_g - x_hat * mean_product) * rstd, inside)


@quick
@triton.jit
def _columns_kernel(
    dy_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    slots_ptr,
    exact_ptr,
    dgamma_ptr,  # [programs, width] fp32
    dbeta_ptr,  # [programs, width] fp32
    rows,
    width,
    exact_count,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dgamma and dbeta of BLOCK columns: sums over every num_programs(1)-th tile of rows."""
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = column < width
    gamma, beta = _affine(weight_ptr, bias_ptr, column, inside, HAS_WEIGHT, HAS_BIAS)
    inverse = _inverse(gamma, HAS_WEIGHT)
    slot = column
    if EXACT:
        slot = tl.load(slots_ptr + column, inside, other=-1)
    dgamma = tl.zeros([ROWS, BLOCK], tl.float32)
    dbeta = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = (tl.zeros([ROWS, 1], tl.int64) + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & inside
        offset = row * width + column
        dy = tl.load(dy_ptr + offset, mask, other=0.0).to(tl.float32)
        shifted = tl.load(y_ptr + offset, mask, other=0.0).to(tl.float32) - beta
        x_hat, _ = _normalised(
            shifted, inverse, dy, dy, slot, exact_ptr, row, exact_count, mask, EXACT
        )
        dgamma += dy * x_hat
        dbeta += dy
    place = tl.program_id(1).to(tl.int64) * width + column
    if HAS_WEIGHT:
        tl.store(dgamma_ptr + place, tl.sum(dgamma, 0, keep_dims=True), inside)
    if HAS_BIAS:
        tl.store(dbeta_ptr + place, tl.sum(dbeta, 0, keep_dims=True), inside)


# --- Launchers, with the signatures of norm_reference.py.


def setting_for(settings: dict[int, Setting], block: int) -> Setting:
    """The setting that serves rows of `block` columns."""
    return settings[min(key for key in settings if key >= block)]


def tile_of(setting: Setting, block: int) -> tuple[int, int]:
    """Rows of a tile, and the warps of a program: a power of two."""
    rows = max(1, setting.tile // block)
    return rows, min(WARPS, max(1, rows * block // (32 * setting.per_thread)))


def _programs(device: torch.device, tiles: int, per_multiprocessor: int) -> int:
    if device.type != "cuda":  # the interpreter
        return min(tiles, 3)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(tiles, per_multiprocessor * multiprocessors)


def _slots(channels: Tensor, width: int) -> Tensor:
    """[width]: the place of each column among `channels`, -1 where it is not there."""
    slots = torch.full((width,), -1, dtype=torch.int32, device=channels.device)
    places = torch.arange(channels.numel(), dtype=torch.int32, device=channels.device)
    return slots.scatter_(0, channels, places)


def _readable(parameter: Tensor | None, instead: Tensor) -> Tensor:
    """A parameter as kernels read it, some tensor where there is none."""
    return instead if parameter is None else parameter.contiguous()


def _forms(weight: bool, bias: bool, exact: bool) -> dict[str, bool]:
    return {"HAS_WEIGHT": weight, "HAS_BIAS": bias, "EXACT": exact}


# What the kernels are cut up by is among the arguments of the functions below, since benchmarks and
# tests vary it.
@functools.lru_cache(LAUNCHES)
def _forward_launch(
    rows: int, width: int, count: int, eps: float, centred: bool, narrow: bool,
    given: tuple[bool, bool, bool], setting: Setting, device: torch.device,
) -> Launch:  # fmt: skip
    block = triton.next_power_of_2(width)
    per_tile, warps = tile_of(setting, block)
    tiles = triton.cdiv(rows, per_tile)
    return _forward_kernel.prepare(
        (_programs(device, tiles, setting.programs),),
        rows,
        width,
        count,
        eps,
        CENTRED=centred,
        HAS_NARROW=narrow,
        **_forms(*given),
        FULL=block == width,
        ROWS=per_tile,
        BLOCK=block,
        STAGES=setting.stages,
        num_warps=warps,
    )


@functools.lru_cache(LAUNCHES)
def _wide_forward_launch(
    rows: int, width: int, count: int, eps: float, centred: bool, narrow: bool,
    given: tuple[bool, bool, bool], block: int,
) -> Launch:  # fmt: skip
    forms = {"CENTRED": centred, "HAS_NARROW": narrow, **_forms(*given)}
    return _wide_forward_kernel.prepare(
        (rows,), width, count, eps, **forms, BLOCK=block, num_warps=8
    )


def row_norm(x, normalized_shape, weight, bias, channels, eps, centred, dtype, cast):
    width = row_width(normalized_shape)
    rows = x.numel() // width
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    narrow = y.new_empty(0) if cast is None else torch.empty_like(y, dtype=cast)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    exact, slots, count = y.new_empty(0), x, 0
    if channels is not None:
        slots, count = _slots(channels, width), channels.numel()
        exact = y.new_empty((rows, count), dtype=cast or dtype)
    given = (weight is not None, bias is not None, channels is not None)
    shape = (rows, width, count, float(eps), centred, cast is not None, given)
    block = triton.next_power_of_2(width)
    if block > FORWARD_WIDTH:
        launch = _wide_forward_launch(*shape, WIDE_BLOCK)
    else:
        launch = _forward_launch(*shape, setting_for(FORWARD, block), x.device)
    launch(x, y, narrow, rstd, _readable(weight, x), _readable(bias, x), slots, exact)
    return y, narrow, rstd, exact


@functools.lru_cache(LAUNCHES)
def _backward_launch(
    rows: int, width: int, count: int, centred: bool, given: tuple[bool, bool, bool],
    needs_input: bool, needs_affine: bool, setting: Setting, device: torch.device,
) -> tuple[Launch, int]:  # fmt: skip
    """The launch, and its programs, each of which writes a partial sum."""
    block = triton.next_power_of_2(width)
    per_tile, warps = tile_of(setting, block)
    programs = _programs(device, triton.cdiv(rows, per_tile), setting.programs)
    launch = _backward_kernel.prepare(
        (programs,),
        rows,
        width,
        count,
        CENTRED=centred,
        **_forms(*given),
        NEEDS_INPUT=needs_input,
        NEEDS_AFFINE=needs_affine,
        FULL=block == width,
        ROWS=per_tile,
        BLOCK=block,
        STAGES=setting.stages,
        num_warps=warps,
    )
    return launch, programs


@functools.lru_cache(LAUNCHES)
def _wide_backward_launch(
    rows: int, width: int, count: int, centred: bool, given: tuple[bool, bool, bool], block: int
) -> Launch:
    forms = {"CENTRED": centred, **_forms(*given)}
    return _wide_backward_kernel.prepare((rows,), width, count, **forms, BLOCK=block, num_warps=8)


@functools.lru_cache(LAUNCHES)
def _columns_launch(
    rows: int, width: int, count: int, given: tuple[bool, bool, bool], tile: tuple[int, int],
    device: torch.device,
) -> tuple[Launch, int]:  # fmt: skip
    """As `_backward_launch`. Programs share the columns among them, then the rows."""
    per_tile, columns = tile
    programs = _programs(device, triton.cdiv(rows, per_tile), WIDE_PROGRAMS)
    programs = max(1, programs * columns // width)
    launch = _columns_kernel.prepare(
        (triton.cdiv(width, columns), programs),
        rows,
        width,
        count,
        **_forms(*given),
        ROWS=per_tile,
        BLOCK=columns,
        num_warps=4,
    )
    return launch, programs


def row_norm_backward(
    grad_output,
    y,
    normalized_shape,
    weight,
    bias,
    channels,
    rstd,
    exact,
    centred,
    dtype,
    needs_input,
    needs_affine,
):
    width = row_width(normalized_shape)
    rows = y.numel() // width
    dy, y = grad_output.contiguous(), y.contiguous()
    gamma, beta = _readable(weight, y), _readable(bias, y)
    slots, count = y, 0
    if channels is None:
        exact = y
    else:
        slots, count = _slots(channels, width), channels.numel()
    dx = torch.empty(y.shape if needs_input else 0, dtype=dtype, device=y.device)
    given = (weight is not None, bias is not None, channels is not None)
    block = triton.next_power_of_2(width)
    wide = block > BACKWARD_WIDTH
    if wide:
        tile = (COLUMN_ROWS, COLUMNS)
        launch, programs = _columns_launch(rows, width, count, given, tile, y.device)
    else:
        setting, needs = setting_for(BACKWARD, block), (needs_input, needs_affine)
        launch, programs = _backward_launch(
            rows, width, count, centred, given, *needs, setting, y.device
        )

    def sums(parameter: Tensor | None) -> Tensor:
        shape = (programs, width) if needs_affine and parameter is not None else 0
        return torch.empty(shape, dtype=torch.float32, device=y.device)

    dgamma, dbeta = sums(weight), sums(bias)
    if not wide:
        launch(dy, y, dx, rstd, gamma, beta, slots, exact, dgamma, dbeta)
    else:
        if needs_input:
            rows_launch = _wide_backward_launch(rows, width, count, centred, given, WIDE_BLOCK)
            rows_launch(dy, y, dx, rstd, gamma, beta, slots, exact)
        if needs_affine:
            launch(dy, y, gamma, beta, slots, exact, dgamma, dbeta)
    return dx, _total(dgamma, weight, y), _total(dbeta, bias, y)


def _total(partial: Tensor, parameter: Tensor | None, y: Tensor) -> Tensor:
    if parameter is None or not partial.numel():
        return y.new_empty(0)
    return partial.sum(0).to(parameter.dtype).view(parameter.shape)
