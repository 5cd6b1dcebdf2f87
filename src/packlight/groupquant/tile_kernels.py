"""Tiles of groups in Triton: what loads and stores their elements, and the bytes of their codes.

A tile is NQ bundles. A bundle is 8 / PARTS consecutive groups of a row, so that a thread holds
eight elements for each of SIZE places, whatever the bits: PARTS elements of each group. Element
(q, s, p, i) of a tile lies (s PARTS + p) SIZE + i behind the start of bundle q.

A byte of a plane of w bits has 8 / w elements of a group, PARTS w / 8 parts apart (`Grouping`): all
of them are in one thread.

Where bundles lie is told by two tensors [NQ]: `starts`, elements from the start of the tile, and
`room`, how many elements are left in the row from there on.
"""

import triton
import triton.language as tl

from packlight.elementwise.kernels import PTX

# ---- elements ------------------------------------------------------------------------------------


@triton.jit
def row_tile(left, NQ: tl.constexpr, SIZE: tl.constexpr):
    """`starts` and `room` of NQ bundles of one row, of which so many elements are left."""
    starts = tl.arange(0, NQ) * (8 * SIZE)
    return starts, left - starts


@triton.jit
def rows_tile(width, left, ROWS: tl.constexpr, NQ: tl.constexpr, SIZE: tl.constexpr):
    """`starts` and `room` of ROWS whole rows of NQ bundles each, of which so many are left.

    And row and bundle of the row, of each.
    """
    if ROWS == 1:  # quotients would hide from the compiler that addresses differ by constants
        row, bundle = tl.zeros([NQ], dtype=tl.int32), tl.arange(0, NQ)
    else:
        row, bundle = tl.arange(0, ROWS * NQ) // NQ, tl.arange(0, ROWS * NQ) % NQ
    column = bundle * (8 * SIZE)
    return row * width + column, tl.where(row < left, width - column, 0), row, bundle


@triton.jit
def part(starts, SIZE: tl.constexpr, p: tl.constexpr):
    """[NQ, SIZE] offsets of part p of every place."""
    return starts[:, None] + (p * SIZE + tl.arange(0, SIZE))[None, :]


@triton.jit
def part_there(room, SIZE: tl.constexpr, p: tl.constexpr):
    """Whether these elements are there."""
    return (p * SIZE + tl.arange(0, SIZE))[None, :] < room[:, None]


@triton.jit
def to_float32(x):
    if x.dtype == tl.float32:
        return x
    elif PTX and x.dtype == tl.bfloat16:
        # One instruction each. Triton moves every other one down first, then both up.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=f,=f,r", [x],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.float32)


@triton.jit
def load_raw_tile(x_ptr, starts, room, SIZE: tl.constexpr, FULL: tl.constexpr):
    """The eight [NQ, SIZE] tensors of a tile at `x_ptr`, 0 past the end of rows."""
    tile = ()
    for p in tl.static_range(8):
        tile = tile + (load_part(x_ptr, starts, room, SIZE, p, FULL),)
    return tile


@triton.jit
def load_part(x_ptr, starts, room, SIZE: tl.constexpr, p: tl.constexpr, FULL: tl.constexpr):
    """Part p of `load_raw_tile`."""
    offsets = part(starts, SIZE, p)
    if FULL:
        return tl.load(x_ptr + offsets)
    else:
        return tl.load(x_ptr + offsets, part_there(room, SIZE, p), other=0.0)


@triton.jit
def tile_to_float32(tile):
    values = ()
    for j in tl.static_range(8):
        values = values + (to_float32(tile[j]),)
    return values


@triton.jit
def load_tile(x_ptr, starts, room, SIZE: tl.constexpr, FULL: tl.constexpr):
    """`load_raw_tile` in float32."""
    return tile_to_float32(load_raw_tile(x_ptr, starts, room, SIZE, FULL))


@triton.jit
def load_columns(
    p_ptr, bundle, room, PERIOD: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """What `load_tile` gives, of a parameter for bundles [NQ] of a row.

    It is as long as PERIOD groups, and begins again after so many.
    """
    return tile_to_float32(load_raw_columns(p_ptr, bundle, room, PERIOD, PERIOD, SIZE, PARTS, FULL))


@triton.jit
def load_raw_columns(
    p_ptr, bundle, room, PERIOD: tl.constexpr, THERE: tl.constexpr, SIZE: tl.constexpr,
    PARTS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """As `load_columns`, in its dtype, of a parameter of THERE groups; 0 in others of PERIOD."""
    tile = ()
    for j in tl.static_range(8):
        group = (bundle * (8 // PARTS) + j // PARTS).to(tl.uint32) % PERIOD
        within = (j % PARTS) * SIZE + tl.arange(0, SIZE)
        source = p_ptr + group[:, None] * (PARTS * SIZE) + within[None, :]
        if FULL and THERE == PERIOD:
            p = tl.load(source)
        elif FULL:
            p = tl.load(source, (group < THERE)[:, None], other=0.0)
        else:
            there = part_there(room, SIZE, j) & (group < THERE)[:, None]
            p = tl.load(source, there, other=0.0)
        tile = tile + (p,)
    return tile


@triton.jit
def plus(x, y, SIGN: tl.constexpr = 1):
    """x + SIGN y: of bfloat16 numbers one, two an instruction, and of others in float32."""
    if PTX and x.dtype == tl.bfloat16 and y.dtype == tl.bfloat16:
        one: tl.constexpr = "0x3F803F80" if SIGN > 0 else "0xBF80BF80"
        return tl.inline_asm_elementwise(
            f"{{.reg .b32 one; mov.b32 one, {one}; fma.rn.bf16x2 $0, $2, one, $1;}}", "=r,r,r",
            [x, y], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return to_float32(x) + SIGN * to_float32(y)


@triton.jit
def store_tile(y_ptr, y, starts, room, SIZE: tl.constexpr, p: tl.constexpr, FULL: tl.constexpr):
    """Stores part p of a tile in the dtype of `y_ptr`."""
    offsets = part(starts, SIZE, p)
    y = y.to(y_ptr.dtype.element_ty)
    if FULL:
        tl.store(y_ptr + offsets, y)
    else:
        tl.store(y_ptr + offsets, y, part_there(room, SIZE, p))


@triton.jit
def ask_for(x_ptr, COUNT: tl.constexpr):
    """Has so many elements from `x_ptr` on brought near, for a program that comes later."""
    LINE: tl.constexpr = 1024 // x_ptr.dtype.element_ty.primitive_bitwidth  # 128 bytes
    LINES: tl.constexpr = COUNT // LINE
    if PTX:
        for power in tl.static_range(10):  # lengths of tl.arange are powers of two
            if (LINES >> power) & 1:
                first = x_ptr + (LINES >> (power + 1) << (power + 1)) * LINE
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l",
                    [first + tl.arange(0, 1 << power) * LINE],
                    dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip


# A part of a rotated group is 32 bytes where a number has 16 bits: too few for memory to be as fast
# as it can. So whole bundles are loaded and stored, and parts exchanged on the way.


@triton.jit
def parts_of(x, SIZE: tl.constexpr):
    """The eight parts [NQ, SIZE] of whole bundles [NQ, 8 SIZE]."""
    NQ: tl.constexpr = x.shape[0]
    abcd, efgh = tl.split(tl.permute(tl.reshape(x, [NQ, 2, 2, 2, SIZE]), (0, 4, 3, 2, 1)))
    ab, cd = tl.split(abcd)
    ef, gh = tl.split(efgh)
    return tl.split(ab) + tl.split(cd) + tl.split(ef) + tl.split(gh)


@triton.jit
def whole_of(parts, SIZE: tl.constexpr):
    """Whole bundles [NQ, 8 SIZE] of their eight parts."""
    abcd = tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], parts[3]))
    efgh = tl.join(tl.join(parts[4], parts[5]), tl.join(parts[6], parts[7]))
    NQ: tl.constexpr = parts[0].shape[0]
    return tl.reshape(tl.permute(tl.join(abcd, efgh), (0, 4, 3, 2, 1)), [NQ, 8 * SIZE])


@triton.jit
def load_raw_whole(
    x_ptr, starts, room, SIZE: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr
):
    """What `load_raw_tile` gives. WHOLE: by whole bundles, where all are there."""
    if WHOLE and FULL:
        x = tl.load(x_ptr + (starts[:, None] + tl.arange(0, 8 * SIZE)[None, :]))
        return parts_of(x, SIZE)
    else:
        return load_raw_tile(x_ptr, starts, room, SIZE, FULL)


@triton.jit
def store_whole(
    y_ptr, y, starts, room, SIZE: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr
):
    """Stores the eight parts of a tile. WHOLE: by whole bundles, where all are there."""
    if WHOLE and FULL:
        narrow = ()
        for p in tl.static_range(8):
            narrow = narrow + (y[p].to(y_ptr.dtype.element_ty),)
        target = y_ptr + (starts[:, None] + tl.arange(0, 8 * SIZE)[None, :])
        tl.store(target, whole_of(narrow, SIZE))
    else:
        for p in tl.static_range(8):
            store_tile(y_ptr, y[p], starts, room, SIZE, p, FULL)


# ---- codes ---------------------------------------------------------------------------------------


@triton.jit
def store_bytes(
    parts, codes_ptr, group, there, SIZE: tl.constexpr, PARTS: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Stores the codes of groups [NQ], PARTS tensors [NQ, SIZE] of bytes; `there` None for all.

    What is above a code may be anything, as the bytes of the neighbours of a code replace it.
    """
    LOW: tl.constexpr = 2 if BITS == 3 else BITS  # of the first plane
    target = codes_ptr + group[:, None] * (PARTS * SIZE * BITS // 8) + tl.arange(0, SIZE)[None, :]
    if BITS == 8:
        _store(target, parts[0], there)
    else:
        for h in tl.static_range(PARTS * LOW // 8):
            _store(target + h * SIZE, _byte(parts, h, 0, LOW, PARTS), there)
        if BITS > LOW:
            start = PARTS * SIZE * LOW // 8
            _store(target + start, _byte(parts, 0, LOW, 1, PARTS), there)


@triton.jit
def _store(target, byte, there):
    if there is None:
        tl.store(target, byte.to(tl.uint8))
    else:
        tl.store(target, byte.to(tl.uint8), there[:, None])


@triton.jit
def code_bytes(x, BITS: tl.constexpr):
    """Bytes of the codes in the bits from 16 up of float32 numbers, as int32; from 15 at 8 bits.

    After a NaN they are anything.
    """
    if PTX and BITS == 8:
        return tl.inline_asm_elementwise(
            "{.reg .b32 a, b; prmt.b32 a, $1, $2, 0x6521; prmt.b32 b, $3, $4, 0x6521;"
            "shl.b32 a, a, 1; shl.b32 b, b, 1; prmt.b32 $0, a, b, 0x7531;}",
            "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    elif PTX:
        return tl.inline_asm_elementwise(
            "{.reg .b32 a, b; prmt.b32 a, $1, $2, 0x0062; prmt.b32 b, $3, $4, 0x0062;"
            "prmt.b32 $0, a, b, 0x5410;}",
            "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return (x >> (15 if BITS == 8 else 16)) & 0xFF


@triton.jit
def _byte(codes, h: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Byte h of each position in the plane of the WIDTH bits of codes from bit FIRST up."""
    STEP: tl.constexpr = PARTS * WIDTH // 8
    if PTX:
        byte = codes[h]
        if FIRST > 0:
            byte = _insert(byte, byte, 0, -FIRST)
        for r in tl.static_range(1, 8 // WIDTH):
            byte = _insert(byte, codes[r * STEP + h], r * WIDTH, r * WIDTH - FIRST)
        return byte
    else:
        byte = tl.zeros_like(codes[h])
        for r in tl.static_range(8 // WIDTH):
            byte |= ((codes[r * STEP + h] >> FIRST) & ((1 << WIDTH) - 1)) << (r * WIDTH)
        return byte


@triton.jit
def _insert(byte, code, KEPT: tl.constexpr, MOVE: tl.constexpr):
    """The low KEPT bits of the byte, and above them those of the code, moved up by MOVE.

    What comes over from a neighbouring byte is among the bits that the next one replaces.
    """
    KEEP: tl.constexpr = ((1 << KEPT) - 1) * 0x01010101
    SHIFT: tl.constexpr = f"shl.b32 a, $2, {MOVE}" if MOVE >= 0 else f"shr.b32 a, $2, {-MOVE}"
    return tl.inline_asm_elementwise(
        f"{{.reg .b32 a; {SHIFT}; lop3.b32 $0, $1, a, {KEEP}, 0xE4;}}",
        "=r,r,r", [byte, code], dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def load_bytes(
    codes_ptr, group, there, SIZE: tl.constexpr, PARTS: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """The codes of groups [NQ], PARTS tensors [NQ, SIZE] of int32; 0 where groups are not there."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS  # of the first plane
    STEP: tl.constexpr = PARTS * LOW // 8
    source = codes_ptr + group[:, None] * (PARTS * SIZE * BITS // 8) + tl.arange(0, SIZE)[None, :]
    bytes_ = ()
    for h in tl.static_range(STEP + (BITS - LOW)):
        if there is None:
            byte = tl.load(source + h * SIZE)
        else:
            byte = tl.load(source + h * SIZE, there[:, None], other=0)
        bytes_ = bytes_ + (byte.to(tl.int32),)
    codes = ()
    for p in tl.static_range(PARTS):
        code = (bytes_[p % STEP] >> (p // STEP * LOW)) & ((1 << LOW) - 1)
        if BITS > LOW:
            code |= ((bytes_[STEP] >> p) & 1) << LOW
        codes = codes + (code,)
    return codes
