"""How far from the truth a sketch's weight gradient lies, beside the noise of the batch itself."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.errors import InputError
from packlight.packing.layout import compute_dtype
from packlight.sketch import reference
from packlight.sketch.method import ROW_KINDS, TRANSFORMS, Blocks, Kind, Sketch

# Elements of the products of all strata that a transform's variance has at a time.
_CHUNK = 1 << 24


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
    variances = Variances(x, grad_output)
    return variances.of(kind)(Sketch(rows, kind, min_rows=1).row_count(variances.tokens))


def sample_variance(x: Tensor, grad_output: Tensor) -> Tensor:
    """The batch's own noise: the variance of G^T X over the choice of the tokens, estimated.

    G^T X is a sum of B terms g_k x_k^T. Were the tokens a sample of independent ones, it would vary
    by B / (B - 1) sum |x_k|^2 |g_k|^2 - |X^T G|^2 / (B - 1), summed over the entries. A sketch with
    a `variance` well below that adds little to what the optimizer sees anyway. Arguments, result
    and errors are those of `variance`.
    """
    return Variances(x, grad_output).of_sample


def correlation(x: Tensor, grad_output: Tensor) -> Tensor:
    """alpha = |X^T G|^2 / (|X|^2 |G|^2), from 0 to 1: the share of the gradient that does not
    cancel between tokens. Arguments, result and errors are those of `variance`.
    """
    return Variances(x, grad_output).correlation


def ratio_bound(x: Tensor, grad_output: Tensor, rows: int) -> Tensor:
    """A bound on variance / `sample_variance` that takes only B, p and alpha (`correlation`):

        variance / sample_variance <= (B - 1) / p (1 + alpha) / alpha

    for `gaussian`, `rademacher` and `srht`. It is that of Bershatsky et al. 2022, and holds where
    B s >= 2 |X^T G|^2, s = sum |x_k|^2 |g_k|^2: where the noise of one token is no less than the
    mean over the tokens. Infinite where that is not so: of x = (1, 2) and g = (1, 1/2) alpha is
    0.64 and the noise of the batch 0, and nothing bounds the ratio. Arguments, result and errors
    are otherwise those of `variance`.
    """
    return Variances(x, grad_output).ratio_bound(rows)


class Variances:
    """The variances for one x and one gradient; what several of them need is computed once.

    Results are float64, 0-dimensional, on the device of x, with no synchronisation.
    """

    def __init__(self, x: Tensor, grad_output: Tensor) -> None:
        self._x, self._g = _rows_of(x, grad_output)
        self.tokens = self._x.shape[0]

    @functools.cached_property
    def _n(self) -> Tensor:
        return _row_squares(self._x)

    @functools.cached_property
    def _m(self) -> Tensor:
        return _row_squares(self._g)

    @functools.cached_property
    def _whole(self) -> Tensor:
        """|X|^2 |G|^2."""
        return self._n.sum() * self._m.sum()

    @functools.cached_property
    def _both(self) -> Tensor:
        """s, the sum of |x_k|^2 |g_k|^2."""
        return (self._n * self._m).sum()

    @functools.cached_property
    def _square(self) -> Tensor:
        """|X^T G|^2."""
        return _squared_product(self._x, self._g)

    @property
    def correlation(self) -> Tensor:
        return self._square / self._whole

    @property
    def of_sample(self) -> Tensor:
        count = self.tokens
        if count < 2:
            return self._both.new_full((), float("nan"))
        return (count * self._both - self._square) / (count - 1)

    def ratio_bound(self, rows: int) -> Tensor:
        alpha = self.correlation
        bound = (self.tokens - 1) / rows * (1 + alpha) / alpha
        return torch.where(self.tokens * self._both >= 2 * self._square, bound, float("inf"))

    def of(self, kind: Kind) -> Callable[[int], Tensor]:
        """The variance of a kind of sketch, as a function of its number of rows."""
        if kind in TRANSFORMS:
            found = self._of_transform(kind)
        elif kind == "top_rows":
            found = self._of_top_rows
        elif kind in ROW_KINDS:
            found = self._of_rows if kind == "rows" else self._of_rows_norm
        else:
            twice = 2 * self._both if kind == "rademacher" else 0
            found = lambda rows: (self._whole + self._square - twice) / rows  # noqa: E731

        def variance(rows: int) -> Tensor:
            return found(rows) if rows < self.tokens else self._both.new_zeros(())

        return variance

    def _of_rows(self, rows: int) -> Tensor:
        count = (self._n != 0).sum().double()
        each = count * self._both - self._square
        return each / rows * ((count - rows) / (count - 1).clamp(min=1.0)).clamp(min=0.0)

    def _of_rows_norm(self, rows: int) -> Tensor:
        norms = self._n.sqrt()
        return (norms.sum() * (norms * self._m).sum() - self._square) / rows

    def _of_top_rows(self, rows: int) -> Tensor:
        norms, order = self._n.sqrt().sort(descending=True)
        sure = reference.sure_rows(reference.row_masses(norms.float()), rows)
        drawn = torch.arange(self.tokens, device=norms.device) >= sure
        norms, m = norms * drawn, self._m[order]
        square = _squared_product(self._x[order] * drawn[:, None], self._g[order])
        return (norms.sum() * (norms * m).sum() - square) / (rows - sure.squeeze(0))

    def _of_transform(self, kind: Kind) -> Callable[[int], Tensor]:
        @functools.cache
        def expected(length: int, number: int) -> Tensor:
            return _expected_of_transform(self._x, self._g, kind, length, number)

        def variance(rows: int) -> Tensor:
            blocks = Blocks.of(self.tokens, rows)
            length = blocks.length
            kept = map(blocks.block_rows, range(blocks.number))
            factors = [(length - q) / ((length - 1) * q) for q in kept]
            return sum(factors) * expected(length, blocks.number)

        return variance


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


def _expected_of_transform(x: Tensor, g: Tensor, kind: Kind, length: int, number: int) -> Tensor:
    """E[V_k], the same for every block k of L places: the variance is the sum of c_k E[V_k] over
    the `number` blocks, with q_k rows kept and c_k = (L - q_k) / ((L - 1) q_k). There

        V_k = L sum_ab W_ab n_a m_b + 2 L sum_{a != b} W_ab <x_a, x_b> <g_a, g_b> - |M_k|^2

    for the transform t, W_ab = sum_i t_ia^2 t_ib^2 (1 / L for a Hadamard transform), and the rows
    at places a and b of block k, M_k = X_k^T G_k. The expectation over the strata's shifts is
    taken: the row at place a is each of the `number` rows of stratum a with equal probability, and
    rows of different strata are independent.
    """
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
    expected: Tensor = of_one_place / number + of_two_places / number**2
    return expected


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
