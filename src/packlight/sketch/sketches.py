"""Making and finding sketches, what they give, and how far from the truth it lies."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import sharing
from packlight._seeds import rounding_tensor
from packlight.errors import InputError
from packlight.pack import Pack
from packlight.packing.layout import compute_dtype
from packlight.sketch import ops, reference
from packlight.sketch.method import ROW_KINDS, TRANSFORMS, Blocks, Kind, Sketch

# Elements of the products of all strata that `variance` has at a time.
_CHUNK = 1 << 24


# --- Sketches.


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class WeightGradient:
    """(S^T G)^T (S^T X), [out, features], from what is kept of X in `dtype`.

    Takes G [tokens, out] and, for the kinds that need it, its sum over the tokens.
    """

    kind: Kind
    rows: int
    features: int
    dtype: torch.dtype

    @property
    def needs_total(self) -> bool:
        return self.kind in ROW_KINDS

    def __call__(self, grad_output: Tensor, total: Tensor | None, kept: Tensor) -> Tensor:
        shape = (self.rows, self.features)
        gradient: Tensor = ops.weight_gradient(
            grad_output, kept, total, self.kind, *shape, self.dtype
        )
        return gradient


def sketch_input(
    x: Tensor, tokens: Tensor, layout: tuple[int, ...], kind: Kind, rows: int, dtype: torch.dtype
) -> Pack:  # fmt: skip
    """The sketch of `x`: the one that is kept of it already, else a new one, noted for the next.

    `tokens` are the rows of `x`, and `layout` tells the ways to see a tensor as rows apart. A pack
    of another method is not used, though it would do: it may be biased, and a sketch is not. Casts
    of one tensor share a sketch where their layers compute in one dtype, as adapters do.
    """
    found = sharing.sketch_of(x)
    if found is not None and found.shape == layout:
        gradient: Any = found.rebuild
        if gradient.dtype == dtype:
            return found
    kept = ops.keep(tokens.detach(), rounding_tensor(x), kind, rows, dtype)
    sketch = Pack(WeightGradient(kind, rows, tokens.shape[1], dtype), layout, (kept,))
    sharing.note_sketch(sharing.source_of(x), sketch)
    return sketch


# --- Variances.


def variance(x: Tensor, grad_output: Tensor, kind: Kind, rows: float | int) -> Tensor:
    """The variance E |dW - G^T X|^2 of the sketched weight gradient dW, summed over its entries.

    `x` [..., in] and `grad_output` [..., out] are what the layer read and what came back, with the
    same leading dimensions, B tokens in all. `rows` is a share of them or a number p. In closed
    form, for these very tensors, over the draws of S; with n_k = |x_k|^2, m_k = |g_k|^2:

    - `gaussian`: (|X|^2 |G|^2 + |X^T G|^2) / p
    - `rademacher`: (|X|^2 |G|^2 + |X^T G|^2 - 2 sum n_k m_k) / p
    - `rows`: (B s - |X^T G|^2) / p (B - p) / (B - 1), s = sum n_k m_k, B without rows of zeros in X
    - `rows_norm`: (sum |x_k| sum |x_k| m_k - |X^T G|^2) / p
    - `top_rows`: the same of the rows that are drawn
    - `srht`, in blocks of L rows with q each: (|X|^2 |G|^2 + |X^T G|^2 - sum_a (|X_a|^2 |G_a|^2 +
      |X_a^T G_a|^2)) / p (L - q) / (L - 1), a over the L strata (`Blocks`), which send one row each
      to every block
    - `dct`, `dft`: as `srht`, with the entries of the transform (`docs/sketch.md`)

    Rounding of S^T X to 16 bits comes on top, and is small. Returns float64, 0-dimensional, on the
    device of `x`, with no synchronisation; 0 where p is not below B. Costs a few times the exact
    weight gradient; 16-bit tensors are multiplied in bfloat16. Raises `InputError` for shapes that
    do not fit, and for what `Sketch` refuses.
    """
    x, g = _rows_of(x, grad_output)
    count = Sketch(rows, kind, min_rows=1).row_count(x.shape[0])
    if count >= x.shape[0]:
        return x.new_zeros((), dtype=torch.float64)
    if kind in TRANSFORMS:
        return _transform_variance(x, g, kind, count)
    if kind in ROW_KINDS:
        return _row_variance(x, g, kind, count)
    squares, both = _squared_product(x, g), (_row_squares(x) * _row_squares(g)).sum()
    whole = _row_squares(x).sum() * _row_squares(g).sum()
    return (whole + squares - (2 * both if kind == "rademacher" else 0)) / count


def sample_variance(x: Tensor, grad_output: Tensor) -> Tensor:
    """The batch's own noise: the variance of G^T X over the choice of the tokens, estimated.

    G^T X is a sum of B terms g_k x_k^T. Were the tokens a sample of independent ones, it would vary
    by B / (B - 1) sum |x_k|^2 |g_k|^2 - |X^T G|^2 / (B - 1), summed over the entries. A sketch with
    a `variance` well below that adds little to what the optimizer sees anyway. Arguments, result
    and errors are those of `variance`.
    """
    x, g = _rows_of(x, grad_output)
    count = x.shape[0]
    if count < 2:
        return x.new_full((), float("nan"), dtype=torch.float64)
    both = (_row_squares(x) * _row_squares(g)).sum()
    return (count * both - _squared_product(x, g)) / (count - 1)


def _rows_of(x: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [tokens, features], in the dtype of the products; tensor cores sum in float32."""
    if x.dim() < 1 or x.shape[:-1] != grad_output.shape[:-1]:
        raise InputError(
            f"x {tuple(x.shape)} and grad_output {tuple(grad_output.shape)} differ in more than"
            " their last dimension; they are what a linear layer read and what came back to it"
        )
    in_16_bits = x.element_size() == 2 or grad_output.element_size() == 2
    dtype = torch.bfloat16 if in_16_bits else x.dtype  # not float16, which products overflow
    x, g = x.detach().to(dtype), grad_output.detach().to(dtype)
    return x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])


def _row_squares(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    return norms.square()


def _squared_product(x: Tensor, g: Tensor) -> Tensor:
    """|X^T G|^2."""
    product: Tensor = torch.linalg.vector_norm(x.t() @ g, dtype=torch.float64)
    return product.square()


def _row_variance(x: Tensor, g: Tensor, kind: Kind, rows: int) -> Tensor:
    n, m = _row_squares(x), _row_squares(g)
    if kind == "rows":
        count = (n != 0).sum().double()
        each = count * (n * m).sum() - _squared_product(x, g)
        return each / rows * ((count - rows) / (count - 1)).clamp(min=0.0)
    norms, order = n.sqrt().sort(descending=True)
    others = norms.new_full((), rows)
    if kind == "top_rows":
        sure = reference.sure_rows(reference.row_masses(norms.float()), rows)
        drawn = torch.arange(norms.shape[0], device=x.device) >= sure
        norms, others = norms * drawn, others - sure.squeeze(0)
        x = x[order] * drawn[:, None]
    else:
        x = x[order]
    return (norms.sum() * (norms * m[order]).sum() - _squared_product(x, g[order])) / others


def _transform_variance(x: Tensor, g: Tensor, kind: Kind, rows: int) -> Tensor:
    """Over the blocks k of L places, with q_k rows kept and c_k = (L - q_k) / ((L - 1) q_k):

        sum_k c_k (L sum_ab W_ab n_a m_b + 2 L sum_{a != b} W_ab <x_a, x_b> <g_a, g_b> - |M_k|^2)

    for the transform t, W_ab = sum_i t_ia^2 t_ib^2 (1 / L for a Hadamard transform), and the rows
    at places a and b of block k, M_k = X_k^T G_k. The expectation over the strata's shifts is
    taken: the row at place a is each of the `number` rows of stratum a with equal probability, and
    rows of different strata are independent.
    """
    blocks = Blocks.of(x.shape[0], rows)
    length, number = blocks.length, blocks.number
    fill = (0, 0, 0, length * number - x.shape[0])
    x, g = (F.pad(values, fill).view(length, number, -1) for values in (x, g))
    place = torch.arange(length, device=x.device)
    squares = reference.transform_entries(kind, place[:, None], place, length).square() / length
    gram = squares.t() @ squares
    own = gram.diagonal()
    n, m = (
        torch.linalg.vector_norm(values, dim=2, dtype=torch.float64).square() for values in (x, g)
    )
    a, b = n.sum(1), m.sum(1)
    products, weighted = _stratum_products(x, g, None if kind == "srht" else squares, own)
    of_one_place = ((length * own - 1) * (n * m).sum(1)).sum()
    of_two_places = length * (a @ gram @ b - (own * a * b).sum() + 2 * weighted) - products
    factors = [(length - q) / ((length - 1) * q) for q in map(blocks.block_rows, range(number))]
    expected: Tensor = of_one_place / number + of_two_places / number**2
    return sum(factors) * expected


def _stratum_products(
    x: Tensor, g: Tensor, squares: Tensor | None, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over places a != b of <M_a, M_b> and of W_ab <M_a, M_b>, M_a = X_a^T G_a.

    x is [places, rows, in], g [places, rows, out], `squares` [places, places] the squared
    transform, None where all of W is one number, and `own` the diagonal of W.
    """
    products = weighted = own.new_zeros(())
    columns = max(1, _CHUNK // (x.shape[0] * g.shape[2]))
    for part in x.split(columns, dim=2):
        m = (part.transpose(1, 2) @ g).flatten(1)  # [places, columns * out]
        wide = compute_dtype(m)
        alone = torch.linalg.vector_norm(m, dim=1, dtype=wide).double().square()
        together = torch.linalg.vector_norm(m.sum(0, dtype=wide)).double().square()
        products = products + together - alone.sum()
        if squares is not None:
            mixed = torch.linalg.vector_norm(squares.to(wide) @ m.to(wide)).double().square()
            weighted = weighted + mixed - (own * alone).sum()
    return products, own[0] * products if squares is None else weighted
