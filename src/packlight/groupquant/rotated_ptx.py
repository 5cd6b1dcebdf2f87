"""What the rotated code does of two places at once, as text for NVIDIA's assembler.

A place has eight elements, one of each part of its group. Registers hold the numbers of two places,
float16 or bfloat16, or two integers of 16 bits. Each text is a function of a place alone: which two
are in a register does not matter.
"""

import struct

from packlight.groupquant.rotated_reference import FORMULAS, LIFT, pieces

_PARTS = range(8)

# Constraints of so many outputs or inputs, each a register.
INPUTS = tuple(",".join(["=r"] * count) for count in range(10))


def _half(number: float) -> int:
    """The 16 bits of a number that float16 has."""
    bits: int = struct.unpack("<H", struct.pack("<e", number))[0]
    assert struct.unpack("<e", struct.pack("<H", bits))[0] == number
    return bits


def _rounded(number: float) -> float:
    rounded: float = struct.unpack("<e", struct.pack("<e", number))[0]
    return rounded


def _pair(low: float, high: float | None = None) -> str:
    """A register of two numbers, as PTX writes it."""
    return f"0x{_half(low if high is None else high):04X}{_half(low):04X}"


class _Text:
    """PTX in the making: lines, and constants that stay in registers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, str] = {}

    def constant(self, value: str) -> str:
        return self.constants.setdefault(value, f"k{len(self.constants)}")

    def add(self, line: str) -> None:
        self.lines.append(line + ";")

    def text(self, registers: list[str]) -> str:
        names = ", ".join([*registers, *self.constants.values()])
        moves = "".join(f"mov.b32 {name}, {value};" for value, name in self.constants.items())
        return f"{{.reg .b32 {names}; {moves} {' '.join(self.lines)}}}"


def _across(text: _Text, names: list[str], kind: str, steps: tuple[int, ...]) -> None:
    """Sums and differences of eight registers, in place: these steps of the Hadamard matrix."""
    for step in steps:
        for p in _PARTS:
            if p & step == 0:
                low, high = names[p], names[p + step]
                if kind == "bf16x2":  # whose sums are of later devices than its products
                    one, minus_one = text.constant("0x3F803F80"), text.constant("0xBF80BF80")
                    text.add(f"fma.rn.bf16x2 t, {high}, {minus_one}, {low}")
                    text.add(f"fma.rn.bf16x2 {low}, {high}, {one}, {low}")
                else:
                    text.add(f"sub.rn.{kind} t, {low}, {high}")
                    text.add(f"add.rn.{kind} {low}, {low}, {high}")
                text.add(f"mov.b32 {high}, t")


def _signed_across(text: _Text, signs: str) -> None:
    """a0 to a7, bfloat16, with signs by the bits of halfwords from 15 down, and the first step."""
    names = [f"a{p}" for p in _PARTS]
    for p, name in enumerate(names):
        text.add(f"shl.b32 t, {signs}, {p}")
        text.add(f"lop3.b32 {name}, {name}, t, 0x80008000, 0x78")
    _across(text, names, "bf16x2", (1,))
    for p, name in enumerate(names):
        text.add(f"mov.b32 ${p}, {name}")


def turn() -> str:
    """Of bfloat16 numbers of eight parts and a halfword of signs: signed, and the first step."""
    text = _Text()
    for p in _PARTS:
        text.add(f"mov.b32 a{p}, ${8 + p}")
    _signed_across(text, "$16")
    return text.text([*(f"a{p}" for p in _PARTS), "t"])


def survey() -> str:
    """Of bfloat16 numbers of eight parts: a 256th of the sum, and the greatest magnitude."""
    text = _Text()
    share = text.constant("0x3B803B80")
    text.add(f"fma.rn.bf16x2 a, $2, {share}, {text.constant('0x80008000')}")
    text.add("mov.b32 b, $2")
    text.add("mov.b32 c, $2")
    for p in range(1, 8):
        text.add(f"fma.rn.bf16x2 a, ${2 + p}, {share}, a")
        text.add(f"max.bf16x2 b, b, ${2 + p}")
        text.add(f"min.bf16x2 c, c, ${2 + p}")
    text.add("neg.bf16x2 c, c")
    text.add("max.bf16x2 b, b, c")
    text.add("mov.b32 $0, a")
    text.add("mov.b32 $1, b")
    return text.text(["a", "b", "c"])


def limit() -> str:
    """Of bfloat16 numbers of eight parts and a bound: those above it, and the least before."""
    text = _Text()
    text.add("mov.b32 a, $9")
    for p in _PARTS:
        text.add(f"max.bf16x2 b{p}, ${9 + p}, $17")
        if p > 0:
            text.add(f"min.NaN.bf16x2 a, a, ${9 + p}")
    for p in _PARTS:
        text.add(f"mov.b32 ${p}, b{p}")
    text.add("mov.b32 $8, a")
    return text.text(["a", *(f"b{p}" for p in _PARTS)])


def differ() -> str:
    """Of x of eight parts, a factor, a term and signs: d = x factor + term, signed, the first step.

    All but the signs are bfloat16.
    """
    text = _Text()
    for p in _PARTS:
        text.add(f"fma.rn.bf16x2 a{p}, ${8 + p}, $16, $17")
    _signed_across(text, "$18")
    return text.text([*(f"a{p}" for p in _PARTS), "t"])


def squares() -> str:
    """Of float16 numbers of eight parts: sums of their squares."""
    text = _Text()
    for p in _PARTS:
        name, y = "ab"[p % 2], f"${1 + p}"
        kind, rest = ("mul", "") if p < 2 else ("fma", f", {name}")
        text.add(f"{kind}.rn.f16x2 {name}, {y}, {y}{rest}")
    text.add("add.rn.f16x2 $0, a, b")
    return text.text(["a", "b"])


def restore() -> str:
    """Of turned numbers of eight parts, signs, a scale and a mean: what was packed.

    All but the signs are bfloat16.
    """
    text = _Text()
    for p in _PARTS:
        text.add(f"shl.b32 t, $16, {p}")
        text.add(f"lop3.b32 t, ${8 + p}, t, 0x80008000, 0x78")
        text.add(f"fma.rn.bf16x2 a{p}, t, $17, $18")
    for p in _PARTS:
        text.add(f"mov.b32 ${p}, a{p}")
    return text.text([*(f"a{p}" for p in _PARTS), "t"])


def _bases(bits: int, count: int) -> list[tuple[int, int]]:
    """Numbers to which `count` codes are added by floating point, in low and high halves.

    Between 1024 and 2048 the bits of a float16 number are an integer that is 0x6000 more. Sums of
    2^(bits j) times these integers leave the codes alone, modulo as many bits as they have: what is
    added to 1536 undoes the rest, in the high half also what the low half carries over.
    """
    shifts = [bits * j for j in range(count)]
    found, carry = [], 0
    for _ in range(2):
        total = sum((1536 + 0x6000) << shift for shift in shifts) + carry
        rest = -total % (1 << bits * count)
        digits = [(rest >> shift) % (1 << bits) for shift in shifts]
        carry = (total + rest) >> 16
        found.append([1536 + digit for digit in digits])
    return list(zip(*found, strict=True))


def encode(bits: int) -> str:
    """Of turned numbers of eight parts and what makes y of them over twice the bound: the pieces of
    the codes of y, and the inner product with their levels.
    """
    formula = FORMULAS[bits]
    sizes = pieces(bits)
    text = _Text()
    chains = {1: [8], 2: [8], 3: [5, 3], 4: [4, 4]}[bits]
    first = len(sizes) + 1  # of the inputs
    inner = f"${len(sizes)}"
    top = 2**bits - 1
    constant = text.constant
    half = constant(_pair(0.5))
    by = f"${first + 8}"
    part = 0
    for chain, count in enumerate(chains):
        for j, base in enumerate(_bases(bits, count)):
            y = f"${first + part}"
            text.add(f"fma.rn.sat.f16x2 u, {y}, {by}, {half}")
            if formula.smooth:
                text.add(
                    f"fma.rn.f16x2 q, u, {constant(_pair(-2 * top))}, {constant(_pair(3 * top))}"
                )
                text.add("mul.rn.f16x2 w, u, u")
                text.add(f"fma.rn.f16x2 n{j}, w, q, {constant(_pair(*base))}")
            else:
                text.add(f"fma.rn.f16x2 n{j}, u, {constant(_pair(top))}, {constant(_pair(*base))}")
            text.add(f"sub.rn.f16x2 s, n{j}, {constant(_pair(*base))}")
            middle = top / 2
            if formula.smooth:
                step = constant(_pair(formula.step))
                start = constant(_pair(-formula.step * middle))
                text.add(f"fma.rn.f16x2 s, s, {step}, {start}")
                text.add("mul.rn.f16x2 w, s, s")
                text.add(f"fma.rn.f16x2 w, w, w, {constant(_pair(LIFT))}")
                text.add(f"mul.rn.f16x2 s, s, {y}")
                text.add("mul.rn.f16x2 i, s, w" if part == 0 else "fma.rn.f16x2 i, s, w, i")
            else:
                text.add(f"sub.rn.f16x2 s, s, {constant(_pair(middle))}")
                text.add(f"mul.rn.f16x2 i, s, {y}" if part == 0 else f"fma.rn.f16x2 i, s, {y}, i")
            part += 1
        text.add(f"mov.b32 c{chain}, n{count - 1}")
        for j in reversed(range(count - 1)):
            text.add(f"mad.lo.u32 c{chain}, c{chain}, {1 << bits}, n{j}")
    if bits == 3:  # 15 bits and 9: the lowest of the latter is the highest of the halfword
        text.add("shl.b32 u, c1, 15")
        text.add("lop3.b32 $0, c0, u, 0x7FFF7FFF, 0xE4")
        text.add("shr.u32 $1, c1, 1")
    else:
        for chain in range(len(chains)):
            text.add(f"mov.b32 ${chain}, c{chain}")
    text.add(f"mov.b32 {inner}, i")
    names = [f"n{j}" for j in range(max(chains))] + [f"c{j}" for j in range(len(chains))]
    return text.text([*names, "u", "q", "w", "s", "i"])


def decode(bits: int) -> str:
    """Of the pieces of the codes of eight parts: their levels, turned between the parts."""
    formula = FORMULAS[bits]
    count = len(pieces(bits))
    text = _Text()
    constant = text.constant
    top = 2**bits - 1
    places: list[tuple[str, int]] = []  # register and shift of each code
    if bits == 4:
        for piece in range(2):
            text.add(f"shl.b32 r{piece}, ${8 + piece}, 1")
            text.add(f"shr.u32 q{piece}, ${8 + piece}, 7")
            places += [(f"r{piece}", 1), (f"r{piece}", 5), (f"q{piece}", 1), (f"q{piece}", 5)]
    elif bits == 3:
        text.add("shl.b32 r0, $8, 1")
        text.add("shr.u32 q0, $8, 8")
        text.add("shr.u32 q1, $8, 14")
        text.add("shl.b32 r1, $9, 2")
        text.add("lop3.b32 r1, q1, r1, 0x00020002, 0xE4")
        places = [("r0", 1), ("r0", 4), ("r0", 7), ("q0", 1), ("q0", 4)]
        places += [("r1", 1), ("r1", 4), ("r1", 7)]
    elif bits == 2:
        text.add("shr.u32 r0, $8, 7")
        places = [("$8", 0), *(("$8", 2 * p) for p in range(1, 4))]
        places += [("r0", 2 * p - 7) for p in range(4, 8)]
    else:
        places = [("$8", p) for p in _PARTS]
    # Between 1024 and 2048 the bits of a float16 number are an integer. It has no half, so only a
    # code that is not its lowest bits comes to be less its middle in one step.
    for p, (register, shift) in enumerate(places):
        mask = (top << shift) * 0x10001
        text.add(f"lop3.b32 t, {register}, 0x{mask:08X}, 0x64006400, 0xEA")
        middle = 1024 + top / 2 * 2**shift
        scale = formula.step / 2**shift
        target = "t" if formula.smooth else f"a{p}"
        if shift == 0:
            text.add(f"sub.rn.f16x2 t, t, {constant(_pair(1024.0))}")
            text.add(f"sub.rn.f16x2 {target}, t, {constant(_pair(top / 2))}")
        else:
            factors = constant(_pair(scale)), constant(_pair(-middle * scale))
            text.add(f"fma.rn.f16x2 {target}, t, {factors[0]}, {factors[1]}")
        if formula.smooth:
            text.add("mul.rn.f16x2 w, t, t")
            text.add(f"fma.rn.f16x2 w, w, w, {constant(_pair(LIFT))}")
            text.add(f"mul.rn.f16x2 a{p}, t, w")
    names = [f"a{p}" for p in _PARTS]
    _across(text, names, "f16x2", (1, 2, 4))
    for p in _PARTS:
        text.add(f"mov.b32 ${p}, a{p}")
    assert count <= 2
    return text.text([*names, "r0", "r1", "q0", "q1", "t", "w"])


TURN = turn()
LIMIT = limit()
SURVEY = survey()
DIFFER = differ()
SQUARES = squares()
RESTORE = restore()
ENCODE = tuple(encode(bits) for bits in (1, 2, 3, 4))
DECODE = tuple(decode(bits) for bits in (1, 2, 3, 4))
