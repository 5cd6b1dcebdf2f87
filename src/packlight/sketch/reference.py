"""Sketches in plain PyTorch: what is true, on every device.

x is [tokens, features]. Random numbers are Philox words of a seed and of counters: a first counter
that numbers tokens, rows, places or blocks, and a second that says what the word is for. Arithmetic
is in float32, in float64 for float64 tensors.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight._philox import philox
from packlight.packing.layout import compute_dtype
from packlight.sketch.method import ROW_KINDS, TRANSFORMS, Blocks

# Rounds of Philox4x32: 7 are the fewest that pass BigCrush (Salmon et al., SC 2011, table 2).
ROUNDS = 7
# Second counters. Signs take those from 0 on, one for 128 places.
CHOICE, SHIFT, DRAW = 1 << 30, (1 << 30) + 1, (1 << 30) + 2
# A Philox call gives the normal numbers of four rows of a bundle of so many, a quarter of it apart,
# or the signs of all of them.
BUNDLE = 128
# Elements of S that the reference has at a time.
_CHUNK = 1 << 20

# Irreducible polynomials over GF(2) of degree 1, 2, ...: bit n stands for x^n. Low-weight ones of
# Seroussi, HPL-98-135.
_LOW_TERMS = (
    (0,), (1, 0), (1, 0), (1, 0), (2, 0), (1, 0), (1, 0), (4, 3, 1, 0), (1, 0), (3, 0), (2, 0),
    (3, 0), (4, 3, 1, 0), (5, 0), (1, 0), (5, 3, 1, 0), (3, 0), (3, 0), (5, 2, 1, 0), (3, 0),
    (2, 0), (1, 0), (5, 0), (4, 3, 1, 0), (3, 0), (4, 3, 1, 0), (5, 2, 1, 0), (1, 0), (2, 0),
    (1, 0),
)  # fmt: skip
POLYNOMIALS = tuple(
    sum(1 << term for term in terms) | 1 << (degree + 1) for degree, terms in enumerate(_LOW_TERMS)
)


# --- Transforms: srht, dct, dft.


def multiply(a: Tensor, b: Tensor, length: int) -> Tensor:
    """The product in the field of `length` = 2^m elements, numbers standing for polynomials."""
    product = torch.zeros_like(a * b)
    if length == 1:
        return product
    polynomial = POLYNOMIALS[length.bit_length() - 2]
    for bit in range(length.bit_length() - 1):
        product = product ^ torch.where((a >> bit) & 1 == 1, b, 0)
        b = b << 1
        b = torch.where(b & length != 0, b ^ polynomial, b)
    return product


def chosen_rows(seed: Tensor, blocks: Blocks, count: int) -> Tensor:
    """[blocks, count] numbers below the blocks' length, distinct within a block.

    Number s of a block is alpha s + beta in the field of `length` elements, with random alpha != 0
    and beta. Any two of them are then any two different numbers with equal probability, as in
    sampling without replacement, and the variance depends on pairs only. It needs no sorting.
    """
    block = torch.arange(blocks.number, device=seed.device)
    words = philox(seed, block, CHOICE, ROUNDS)
    alpha = (words[0] * (blocks.length - 1) >> 32) + 1 if blocks.length > 1 else words[0] * 0
    beta = words[1] & (blocks.length - 1)
    s = torch.arange(count, device=seed.device)
    return multiply(alpha[:, None], s[None, :], blocks.length) ^ beta[:, None]


def places(seed: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Token numbers and signs, both [blocks, length], of the rows at every place of every block."""
    block = torch.arange(blocks.number, device=seed.device)[:, None]
    place = torch.arange(blocks.length, device=seed.device)
    shift = philox(seed, place, SHIFT, ROUNDS)[0] * blocks.number >> 32
    tokens = place * blocks.number + (block + shift) % blocks.number
    words = torch.stack(philox(seed, block.expand_as(tokens), place >> 7, ROUNDS))
    word = words.gather(0, ((place >> 5) & 3).expand_as(tokens)[None])[0]
    return tokens, 1 - 2 * ((word >> (place & 31)) & 1)


def transform_entries(kind: str, row: Tensor, place: Tensor, length: int) -> Tensor:
    """sqrt(length) times the entries of the orthogonal transform, float64."""
    if kind == "srht":
        bits = row & place
        for shift in (16, 8, 4, 2, 1):
            bits = bits ^ (bits >> shift)
        return 1.0 - 2.0 * (bits & 1).double()
    if kind == "dct":
        phase, alone = (2 * place + 1) * row, row == 0
    else:  # cosines, then sines, of the real Fourier transform
        half = length // 2
        sine = (row > half).long()
        phase, alone = 4 * (row - half * sine) * place - length * sine, (row == 0) | (row == half)
    # A phase of 4 length is a whole turn.
    angle = (phase & (4 * length - 1)).double() * (math.pi / (2 * length))
    return torch.where(alone, 1.0, math.sqrt(2.0)) * angle.cos()


def _apply_transform(x: Tensor, seed: Tensor, kind: str, rows: int, dtype: torch.dtype) -> Tensor:
    blocks = Blocks.of(x.shape[0], rows)
    tokens, signs = places(seed, blocks)
    inside = tokens < x.shape[0]
    tokens = tokens.clamp(max=x.shape[0] - 1)
    place = torch.arange(blocks.length, device=x.device)
    wide = compute_dtype(x)
    parts = []
    step = max(1, _CHUNK // (blocks.length * max(x.shape[1], blocks.base + 1)))
    for first, last in ((0, blocks.extra), (blocks.extra, blocks.number)):
        count = blocks.block_rows(first)
        chosen = chosen_rows(seed, blocks, count)
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            s = transform_entries(kind, chosen[part, :, None], place, blocks.length)
            s = s * (signs[part] / math.sqrt(count))[:, None]
            values = x[tokens[part]].to(wide)
            values = torch.where(inside[part, :, None], values, 0.0)
            parts.append((s.to(wide) @ values).flatten(0, 1).to(dtype))
    return torch.cat(parts)


# --- Dense sketches: gaussian, rademacher.


def dense_entries(kind: str, seed: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """sqrt(rows) S, [tokens, rows] float32, for these numbers of tokens."""
    bundles = -(-rows // BUNDLE)
    count = tokens.shape[0]
    if kind == "rademacher":
        bundle = torch.arange(bundles, device=seed.device)
        words = torch.stack(philox(seed, tokens[:, None].expand(-1, bundles), bundle, ROUNDS), -1)
        bit = torch.arange(32, device=seed.device)
        signs = 1 - 2 * ((words[..., None] >> bit) & 1).float()
        return signs.view(count, bundles * BUNDLE)[:, :rows]
    quarter = torch.arange(bundles * BUNDLE // 4, device=seed.device)
    words = torch.stack(philox(seed, tokens[:, None].expand(-1, len(quarter)), quarter, ROUNDS))
    uniform = ((words >> 8).float() + 0.5) / 2**24
    radius = (-2 * uniform[0::2].log()).sqrt()
    angle = uniform[1::2] * (2 * math.pi)
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)  # [2, 2, tokens, quarter]
    normal = normal.view(4, count, bundles, BUNDLE // 4).permute(1, 2, 0, 3)
    return normal.reshape(count, bundles * BUNDLE)[:, :rows]


def _apply_dense(x: Tensor, seed: Tensor, kind: str, rows: int, dtype: torch.dtype) -> Tensor:
    wide = compute_dtype(x)
    y = x.new_zeros(rows, x.shape[1], dtype=wide)
    step = max(1, _CHUNK // rows)
    for start in range(0, x.shape[0], step):
        values = x[start : start + step].to(wide)
        tokens = torch.arange(start, start + values.shape[0], device=x.device)
        y += dense_entries(kind, seed, tokens, rows).to(wide).t() @ values
    return (y / math.sqrt(rows)).to(dtype)


def apply(x: Tensor, seed: Tensor, kind: str, y: Tensor) -> None:
    """Makes y [rows, features] S^T x, for the S that seed, kind, rows and tokens say."""
    if x.numel():
        function = _apply_transform if kind in TRANSFORMS else _apply_dense
        y.copy_(function(x, seed, kind, y.shape[0], y.dtype))


# --- Row sketches: rows, rows_norm, top_rows.


def row_statistics(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of every row, float32, and a random number from 0 to 2^32 - 1 for it, int64."""
    norms = torch.linalg.vector_norm(x, dim=1, dtype=compute_dtype(x)).float()
    tokens = torch.arange(x.shape[0], device=x.device)
    return norms, philox(seed, tokens, DRAW, ROUNDS)[0]


def select(norms: Tensor, draws: Tensor, kind: str, rows: int) -> tuple[Tensor, Tensor]:
    """Numbers of the rows to keep, int32, and the weight of each in X^T G, float32; both [rows].

    Rows of zeros are not taken where there are others. Where a norm is NaN or infinite, so are all
    weights NaN: a row that is not kept must not hide it.
    """
    if kind == "rows":
        index, weight = _uniform_rows(norms, draws, rows)
    else:
        index, weight = _weighted_rows(norms, draws, rows, winners=kind == "top_rows")
    poison = norms.sum(dtype=torch.float64) * 0
    return index.int(), (weight + poison).float()


def _uniform_rows(norms: Tensor, draws: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Without replacement: the rows with the smallest draws, rows of zeros last."""
    order = (draws + (norms == 0).long() * 2**32).argsort()
    share = (norms != 0).sum().double() / rows
    return order[:rows], share.clamp(min=1.0).expand(rows)


def row_masses(norms: Tensor) -> Tensor:
    """Whole numbers in proportion to the norms, at most 2^31, and 0 for rows of zeros alone.

    Sums of whole numbers are the same in every order, so that a seed gives the same rows each time.
    """
    share = (norms.double() / norms.max()).nan_to_num(0.0)
    return (share * 2**31).ceil().long()


def sure_rows(masses: Tensor, rows: int) -> Tensor:
    """How many of the heaviest rows `top_rows` takes surely, [1], for masses in descending order.

    Of the p rows c < p, at which the mass of all others divided by p - c is smallest. What is drawn
    then has a weight of 1 or more.
    """
    above = F.pad(masses.cumsum(0), (1, 0)).double()
    place = torch.arange(rows, device=masses.device)
    return ((above[-1] - above[:rows]) / (rows - place)).argmin().view(1)


def _weighted_rows(norms: Tensor, draws: Tensor, rows: int, winners: bool) -> tuple[Tensor, Tensor]:
    """With probability proportional to the norm; with `winners` the heaviest rows surely."""
    masses = row_masses(norms)
    if not winners:
        return _drawn_rows(masses, draws[:rows], rows)
    sorted_masses, order = masses.sort(descending=True, stable=True)
    sure = sure_rows(sorted_masses, rows)
    place = torch.arange(norms.shape[0], device=norms.device)
    others = torch.zeros_like(masses).scatter(0, order, sorted_masses * (place >= sure))
    index, weight = _drawn_rows(others, draws[:rows], rows - sure)
    is_sure = place[:rows] < sure
    return torch.where(is_sure, order[:rows], index), torch.where(is_sure, 1.0, weight)


def _drawn_rows(masses: Tensor, draws: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """A row for each of the draws, with probability ~ mass, and its weight if `count` are drawn."""
    below = masses.cumsum(0)  # up to this row, itself included
    total = below[-1]
    points = ((draws.double() + 0.5) / 2**32 * total).long()
    index = torch.searchsorted(below, points, right=True).clamp(max=masses.shape[0] - 1)
    mass = masses[index].double()
    return index, torch.where(mass > 0, total / (count * mass), 0.0)


def gather(x: Tensor, index: Tensor, weight: Tensor | None, y: Tensor) -> None:
    """Makes y [rows, features] the rows of x with these numbers, each times its weight."""
    chosen = x.index_select(0, index)
    if weight is not None:
        chosen = chosen.to(compute_dtype(x)) * weight[:, None]
    y.copy_(chosen)


# --- What is kept: one tensor of bytes.


class Kept(NamedTuple):
    """The sketch and what says which S it is of, as views of the tensor of bytes that is kept.

    One tensor, so that a sketch and its draw cannot come apart: a partitioner of `torch.compile`
    that recomputes a part of what crosses to the backward pass, a draw above all, which depends on
    no input, would pair the sketch of one S with another S.
    """

    sketch: Tensor  # [rows, features]
    seed: Tensor  # [1] int64, empty for the row kinds
    chosen: Tensor  # [rows] int32, empty for the others
    weights: Tensor  # [rows] float32, empty for the others

    @staticmethod
    def views(kept: Tensor, kind: str, rows: int, features: int, dtype: torch.dtype) -> "Kept":
        sketch = kept[: rows * features * dtype.itemsize].view(dtype).view(rows, features)
        drawn = kept[_aligned(rows * features * dtype.itemsize) :]
        if kind in ROW_KINDS:
            halves = drawn.view(2, 4 * rows)
            return Kept(
                sketch, drawn[:0].view(torch.int64), halves[0].view(torch.int32),
                halves[1].view(torch.float32),
            )  # fmt: skip
        none = drawn[:0]
        return Kept(sketch, drawn.view(torch.int64), none.view(torch.int32), none.view(torch.float))


def kept_bytes(kind: str, rows: int, features: int, itemsize: int) -> int:
    return _aligned(rows * features * itemsize) + (8 * rows if kind in ROW_KINDS else 8)


def _aligned(size: int) -> int:
    return (size + 15) // 16 * 16


class Steps(NamedTuple):
    """What a backend brings; `keep` and `weight_gradient` are made of them."""

    apply: Callable[[Tensor, Tensor, str, Tensor], None]
    row_statistics: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    gather: Callable[[Tensor, Tensor, Tensor | None, Tensor], None]


_STEPS = Steps(apply, row_statistics, gather)


def keep(
    x: Tensor, seed: Tensor, kind: str, rows: int, dtype: torch.dtype, steps: Steps = _STEPS
) -> Tensor:
    """`Kept` as [bytes] uint8: `rows` rows that stand for `x` [tokens, features], in `dtype`."""
    features = x.shape[1]
    size = kept_bytes(kind, rows, features, dtype.itemsize)
    kept = x.new_empty(size, dtype=torch.uint8)
    used = rows * features * dtype.itemsize
    if used != _aligned(used):
        kept[used : _aligned(used)] = 0
    views = Kept.views(kept, kind, rows, features, dtype)
    if kind not in ROW_KINDS:
        views.seed.copy_(seed)
        steps.apply(x, seed, kind, views.sketch)
        return kept
    index, weight = select(*steps.row_statistics(x, seed), kind, rows)
    views.chosen.copy_(index)
    views.weights.copy_(weight)
    steps.gather(x, views.chosen, None, views.sketch)
    return kept


def weight_gradient(
    grad_output: Tensor,
    kept: Tensor,
    total: Tensor | None,
    kind: str,
    rows: int,
    features: int,
    dtype: torch.dtype,
    steps: Steps = _STEPS,
) -> Tensor:
    """(S^T G)^T (S^T X), [out, features], for G [tokens, out] and what `keep` kept of X.

    The row kinds take `total`, the sum of G over the tokens, [out]: a row that was not kept must
    not hide a NaN or an infinity.
    """
    views = Kept.views(kept, kind, rows, features, dtype)
    g = grad_output.new_empty(rows, grad_output.shape[1])
    if kind in ROW_KINDS:
        assert total is not None
        steps.gather(grad_output, views.chosen, views.weights + (total * 0).sum(), g)
    else:
        steps.apply(grad_output, views.seed, kind, g)
    return g.t().mm(views.sketch.to(g.dtype))
