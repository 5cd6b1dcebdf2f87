"""The texts for NVIDIA's assembler do what the reference does: run here by a small interpreter."""

import re

import numpy
import pytest
import torch

from packlight.groupquant.rotated_ptx import (
    DECODE,
    DIFFER,
    ENCODE,
    LIMIT,
    RESTORE,
    SQUARES,
    SURVEY,
    TURN,
)
from packlight.groupquant.rotated_reference import (
    FORMULAS,
    codes,
    from_bytes,
    levels,
    pieces,
    to_bytes,
)

every_bits = pytest.mark.parametrize("bits", [1, 2, 3, 4])


def run(text, inputs, outputs):
    """Registers of 32 bits, uint32 arrays: `outputs` of them for those that are given."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    body = re.sub(r"\.reg \.b32 [^;]*;", "", text.strip("{}"))
    for line in filter(None, (line.strip() for line in body.split(";"))):
        name, rest = line.split(" ", 1)
        target, *sources = (word.strip() for word in rest.split(","))
        numbers = [
            registers[word] if word in registers else numpy.uint32(int(word, 0)) for word in sources
        ]
        registers[target] = operation(name, *numbers)
    return [registers[f"${i}"] for i in range(outputs)]


def operation(name, *numbers):
    kind, *options = name.split(".")
    if options and options[-1] in ("f16x2", "bf16x2"):
        dtype = torch.float16 if options[-1] == "f16x2" else torch.bfloat16
        a, *rest = (
            torch.from_numpy(numpy.broadcast_to(number, numbers[0].shape).copy().view(numpy.int16))
            .view(dtype)
            .double()
            for number in numbers
        )
        value = {
            "neg": lambda: -a,
            "add": lambda: a + rest[0],
            "sub": lambda: a - rest[0],
            "mul": lambda: a * rest[0],
            "fma": lambda: a * rest[0] + rest[1],
            "max": lambda: torch.fmax(a, rest[0]),
            "min": lambda: torch.minimum(a, rest[0]),
        }[kind]()
        value = value.clamp(0, 1) if "sat" in options else value
        return value.to(dtype).view(torch.int16).numpy().view(numpy.uint32)
    if kind == "lop3":
        a, b, c, table = numbers
        masks = [(a, b, c), (a, b, ~c), (a, ~b, c), (a, ~b, ~c)]
        masks += [(~a, b, c), (~a, b, ~c), (~a, ~b, c), (~a, ~b, ~c)]
        found = numpy.uint32(0)
        for bit, (x, y, z) in enumerate(masks):
            if (int(table) >> (7 - bit)) & 1:
                found = found | (x & y & z)
        return found
    a, *b = numbers
    return {
        "mov": lambda: a,
        "and": lambda: a & b[0],
        "or": lambda: a | b[0],
        "shl": lambda: a << b[0],
        "shr": lambda: a >> b[0],
        "mad": lambda: a * b[0] + b[1],
    }[kind]()


def registers_of(x):
    """Rows of numbers of 16 bits as rows of registers."""
    return list(numpy.ascontiguousarray(x.view(torch.int16).numpy()).view(numpy.uint32))


def halves(registers):
    return torch.from_numpy(numpy.stack(registers).view(numpy.uint16).astype(numpy.int32))


def numbers_of(registers, dtype=torch.float16):
    return torch.from_numpy(numpy.stack(registers).view(numpy.int16)).view(dtype)


def turned(x, steps=3):
    """Eight rows times steps of the Hadamard matrix of eight, each rounded as their dtype is."""
    for step in range(steps):
        low, high = x.view(4 >> step, 2, 1 << step, -1).unbind(1)
        x = torch.stack([low + high, low - high], 1)
    return x.view(8, -1)


def drawn(count):
    """Halfwords of signs, and the signs of eight parts."""
    signs = torch.randint(-(2**15), 2**15, (1, count)).short()
    return signs, 1 - 2 * ((signs.int() >> (15 - torch.arange(8)).view(8, 1)) & 1)


def test_parts_are_signed_and_turned():
    z, (halfwords, signs) = torch.randn(8, 64).bfloat16(), drawn(64)
    found = run(TURN, [*registers_of(z), *registers_of(halfwords)], 8)
    assert torch.equal(numbers_of(found, torch.bfloat16), turned(z * signs, 1))


def test_limits_are_kept_and_what_is_not_finite_is_seen():
    x, bound = (torch.randn(8, 64) * 3).bfloat16(), torch.full((1, 64), -1.5).bfloat16()
    x[3, 5], x[2, 6] = torch.nan, -torch.inf
    given = [number for rows in (x, bound) for number in registers_of(rows)]
    *found, least = numbers_of(run(LIMIT, given, 9), torch.bfloat16)
    assert torch.equal(torch.stack(found), torch.fmax(x, bound))
    assert torch.equal(least.isnan(), x.isnan().any(0))
    assert torch.equal(least.nan_to_num(), x.amin(0).nan_to_num())


def test_sums_and_greatest_magnitudes_are_those_of_all_parts():
    x = (torch.randn(8, 64) * 3 + 1).bfloat16()
    total, greatest = numbers_of(run(SURVEY, registers_of(x), 2), torch.bfloat16)
    assert torch.equal(greatest, x.abs().amax(0))
    assert (total.float() * 256 - x.float().sum(0)).abs().max() < 2**-6 * x.float().abs().sum(
        0
    ).max()


def test_differences_are_signed_and_turned():
    x, (halfwords, signs) = (torch.randn(8, 64) * 3 + 1).bfloat16(), drawn(64)
    factor, term = (torch.full((1, 64), number).bfloat16() for number in (0.25, -0.3125))
    given = [number for rows in (x, factor, term, halfwords) for number in registers_of(rows)]
    found = numbers_of(run(DIFFER, given, 8), torch.bfloat16)
    d = (x.float() * 0.25 - 0.3125).bfloat16()
    assert torch.equal(found, turned(d * signs, 1))


def test_squares_are_of_all_parts():
    y = torch.randn(8, 64).half()
    (found,) = numbers_of(run(SQUARES, registers_of(y), 1)).float()
    squares = y.float().square().sum(0)
    assert (found - squares).abs().max() < 2**-9 * squares.max()


def test_signs_scale_and_mean_are_undone_at_once():
    y, (halfwords, signs) = torch.randn(8, 64).bfloat16(), drawn(64)
    scale, mean = (torch.full((1, 64), number).bfloat16() for number in (3e-30, -1e-29))
    given = [number for rows in (y, halfwords, scale, mean) for number in registers_of(rows)]
    found = numbers_of(run(RESTORE, given, 8), torch.bfloat16)
    assert torch.equal(found, (y.double() * signs * scale + mean.double()).bfloat16())


@every_bits
def test_codes_and_their_inner_product_are_those_of_the_reference(bits):
    y = (torch.randn(8, 4096) * 1.5).half()
    y[:, :2] = torch.tensor([30.0, -30.0]).half()
    by = torch.full((1, 4096), 0.5 / FORMULAS[bits].bound).half()
    given = [number for rows in (y, by) for number in registers_of(rows)]
    *found, inner = run(ENCODE[bits - 1], given, len(pieces(bits)) + 1)
    numbers = codes(y, bits)
    found = [halves([piece]).view(-1) for piece in found]
    found = [
        torch.stack([(piece >> shift) & 0xFF for shift in range(0, width, 8)], 1).view(-1)
        for piece, width in zip(found, pieces(bits), strict=True)
    ]
    found = from_bytes(torch.cat(found).to(torch.uint8), bits, 8 * 4096).view(8, -1)
    off = (found.int() - numbers.int()).abs()  # where a number is halfway between two codes
    assert off.max() <= 1
    assert off.float().mean() < 0.002
    numbers = found
    products = (y.float() * levels(numbers, bits).float()).sum(0)
    assert (numbers_of([inner]).float() - products).abs().max() < 0.01 * products.abs().max()


@every_bits
def test_levels_are_those_of_the_reference(bits):
    numbers = torch.randint(0, 2**bits, (8, 512)).to(torch.uint8)
    bytes_ = to_bytes(numbers.view(1, -1), bits)
    assert torch.equal(from_bytes(bytes_, bits, 8 * 512), numbers.view(1, -1))
    given, first = [], 0
    for width in pieces(bits):
        piece = bytes_[first : first + 512 * width // 8].view(-1, width // 8).int()
        piece = sum(piece[:, byte] << (8 * byte) for byte in range(width // 8))
        given += registers_of(piece.short().view(1, -1))
        first += 512 * width // 8
    found = run(DECODE[bits - 1], given, 8)
    assert torch.equal(numbers_of(found), turned(levels(numbers, bits)))
