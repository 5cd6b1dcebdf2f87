"""Building blocks for kernels that read or write packed codes; the layout is in `layout.py`."""

import triton
import triton.language as tl


@triton.jit
def empty_word(BLOCK: tl.constexpr, BITS: tl.constexpr):
    """[BLOCK] words without codes: 8 codes of up to 4 bits fit 32 bits, longer ones need 64."""
    if BITS <= 4:
        return tl.zeros([BLOCK], dtype=tl.int32)
    else:
        return tl.zeros([BLOCK], dtype=tl.int64)


@triton.jit
def load_rows(x_ptr, start, lane, n, groups, FULL: tl.constexpr):
    """The eight elements of every word of a block, 8 tensors [BLOCK]. `x_ptr` points at the block.

    FULL says that every block is whole, so that nothing is masked.
    """
    rows = ()
    for j in tl.static_range(8):
        if FULL:
            rows = rows + (tl.load(x_ptr + j * groups + lane),)
        else:
            inside = (lane < groups - start) & (lane < n - start - j * groups)
            rows = rows + (tl.load(x_ptr + j * groups + lane, inside, other=0.0),)
    return rows


@triton.jit
def store_row(y_ptr, y, j: tl.constexpr, start, lane, n, groups, FULL: tl.constexpr):
    """Stores row j of a block in the dtype of `y_ptr`."""
    y = y.to(y_ptr.dtype.element_ty)
    if FULL:
        tl.store(y_ptr + j * groups + lane, y)
    else:
        inside = (lane < groups - start) & (lane < n - start - j * groups)
        tl.store(y_ptr + j * groups + lane, y, inside)


@triton.jit
def store_word(packed_ptr, word, lane, groups, mask, BITS: tl.constexpr):
    """Stores [BLOCK] words of 8 codes, byte p into plane p. `packed_ptr` points at the block."""
    for p in tl.static_range(BITS):
        byte = ((word >> (8 * p)) & 0xFF).to(tl.uint8)
        tl.store(packed_ptr + p * groups + lane, byte, mask)


@triton.jit
def load_word(packed_ptr, lane, groups, mask, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """The inverse of `store_word`."""
    word = empty_word(BLOCK, BITS)
    for p in tl.static_range(BITS):
        if mask is None:
            byte = tl.load(packed_ptr + p * groups + lane)
        else:
            byte = tl.load(packed_ptr + p * groups + lane, mask, other=0)
        word |= byte.to(word.dtype) << (8 * p)
    return word


@triton.jit
def code_of(word, j: tl.constexpr, BITS: tl.constexpr):
    """Code j of the 8 in each word, as int32."""
    return ((word >> (j * BITS)) & ((1 << BITS) - 1)).to(tl.int32)
