"""Unbiased and right-sized: every kind against its closed form, and what rows of zeros cost."""

import pytest
import torch

import packlight
from packlight import sketch
from packlight.errors import InputError
from packlight.sketch import ops, reference
from packlight.sketch.method import KINDS, ROW_KINDS, Blocks, Sketch

every_kind = pytest.mark.parametrize("kind", KINDS)
# Tokens and rows: several blocks of unequal rows, the last of them filled up; one block.
SIZES = [(90, 20), (61, 33)]
DRAWS = 800


def simulated(x, g, kind, rows, draws=DRAWS):
    """Weight gradients of so many draws, [draws, out, in]."""
    total = g.sum(0) if kind in ROW_KINDS else None
    results = []
    for _ in range(draws):
        kept = ops.keep(x, torch.randint(2**63 - 1, (1,)), kind, rows, x.dtype)
        last = (total, kind, rows, x.shape[1], x.dtype)
        results.append(ops.weight_gradient(g, kept, *last))
    return torch.stack(results)


def example(tokens, features=14, outputs=10):
    """Rows of different weight that have something in common with their gradients."""
    packlight.manual_seed(7)
    weight = torch.rand(tokens, 1, dtype=torch.float64) + 0.1
    x = (torch.randn(tokens, features, dtype=torch.float64) + 0.5) * weight
    g = torch.randn(tokens, outputs, dtype=torch.float64) + 0.3 * x[:, :outputs]
    return x, g


@every_kind
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_kind_is_unbiased_and_has_the_variance_of_its_closed_form(kind, size):
    tokens, rows = size
    x, g = example(tokens)
    exact = g.t() @ x
    draws = simulated(x, g, kind, rows)
    standard_error = draws.std(0) / DRAWS**0.5
    assert ((draws.mean(0) - exact) / standard_error).abs().max() < 4
    measured = (draws - exact).square().sum((1, 2)).mean()
    torch.testing.assert_close(measured, sketch.variance(x, g, kind, rows), rtol=0.03, atol=0)


def test_closed_forms_are_those_of_the_papers():
    """METHODS' table, where it says the same: dense kinds, rows, and one block of a transform."""
    x, g = example(64)
    p, b = 16, 64
    n, m = x.square().sum(1), g.square().sum(1)
    s, whole, g2 = (n * m).sum(), n.sum() * m.sum(), (x.t() @ g).square().sum()
    expected = {
        "gaussian": (whole + g2) / p,
        "rademacher": (whole + g2 - 2 * s) / p,
        "rows": (b * s - g2) / p * (b - p) / (b - 1),
        "rows_norm": (n.sqrt().sum() * (n.sqrt() * m).sum() - g2) / p,
    }
    for kind, value in expected.items():
        torch.testing.assert_close(sketch.variance(x, g, kind, p), value)
    x, g, p = x[:32], g[:32], 3  # one block of 32 rows
    assert Blocks.of(32, p).number == 1
    n, m = x.square().sum(1), g.square().sum(1)
    whole, g2 = n.sum() * m.sum(), (x.t() @ g).square().sum()
    one_block = (whole + g2 - 2 * (n * m).sum()) / p * (32 - p) / 31
    torch.testing.assert_close(sketch.variance(x, g, "srht", p), one_block)


def test_the_sign_of_the_gaussian_s_variance():
    """(|X|^2 |G|^2 + |X^T G|^2) / p: 1024 where a minus would say 0."""
    packlight.manual_seed(0)
    x = torch.ones(128, 1)
    errors = simulated(x, x, "gaussian", 32, 4000) - 128
    assert sketch.variance(x, x, "gaussian", 32) == 1024
    assert errors.square().mean().item() == pytest.approx(1024, rel=0.1)


def test_alpha():
    x, g = example(64)
    expected = (x.t() @ g).square().sum() / x.square().sum() / g.square().sum()
    torch.testing.assert_close(sketch.correlation(x, g), expected)
    one, other = torch.randn(40, 1).double(), torch.randn(3).double()
    parallel = one * other  # every token's term is the same but for its size
    torch.testing.assert_close(sketch.correlation(parallel, one), torch.ones_like(expected))
    # Terms of tokens that cancel.
    assert sketch.correlation(torch.ones(4, 2), torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])) == 0


def test_the_bound_on_the_ratio():
    """It holds for the kinds that it is of, wherever it is finite, and is infinite otherwise."""
    packlight.manual_seed(0)
    finite = 0
    for count in (2, 5, 40):
        for trial in range(60):
            spread = torch.randn(count, 1).mul(trial % 4).exp().double()
            x = torch.randn(count, 3).double() * spread + trial % 3
            g = torch.randn(count, 2).double() / spread + trial % 5
            rows = max(1, count // 3)
            bound = sketch.ratio_bound(x, g, rows)
            own = sketch.sample_variance(x, g)
            finite += int(bound.isfinite())
            for kind in ("gaussian", "rademacher", "srht"):
                assert sketch.variance(x, g, kind, rows) <= own * bound * (1 + 1e-9)
    assert finite > 60
    x, g = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.5]])
    assert sketch.correlation(x, g).item() == pytest.approx(0.64)
    assert sketch.sample_variance(x, g) == 0
    assert sketch.ratio_bound(x, g, 1) == float("inf")


def test_blocks_cost_nothing():
    """In blocks the variance is that of one transform over all rows, ordered tokens or not."""
    packlight.manual_seed(0)
    for order in (lambda x: x, lambda x: x[torch.randperm(4096)]):
        scale = order(torch.linspace(0.1, 3, 4096)[:, None])  # the heavy rows lie together
        x, g = torch.randn(4096, 8) * scale, torch.randn(4096, 8) * scale
        p = 410
        n, m = x.square().sum(1), g.square().sum(1)
        whole, g2 = n.sum() * m.sum(), (x.t() @ g).square().sum()
        one = (whole + g2 - 2 * (n * m).sum()) / p * (4096 - p) / 4095
        ratio = sketch.variance(x, g, "srht", p) / one
        assert 0.97 < ratio < 1.03


def test_sample_variance_is_that_of_a_sample():
    """B tokens drawn from many, with replacement: the spread of B times their mean."""
    x, g = example(40)
    terms = torch.einsum("bo,bi->boi", g, x)
    index = torch.randint(40, (4000, 40))
    sums = terms[index].sum(1)
    measured = sums.var(0, correction=1).sum() * 40 / 39  # the population's, of one token
    torch.testing.assert_close(sketch.sample_variance(x, g), measured, rtol=0.05, atol=0)


@every_kind
def test_variance_in_other_dtypes_and_shapes(kind):
    x, g = example(96)
    expected = sketch.variance(x, g, kind, 24)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)):
        shaped = x.to(dtype).view(2, 48, -1), g.to(dtype).view(2, 48, -1)
        actual = sketch.variance(*shaped, kind, 0.25)
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)
    assert sketch.variance(x, g, kind, 96) == 0


def test_bad_arguments_raise():
    x, g = example(40)
    with pytest.raises(InputError, match="differ in more than"):
        sketch.variance(x, g[:-1], "srht", 0.2)
    with pytest.raises(InputError, match="differ in more than"):
        sketch.sample_variance(x, g[:-1])
    with pytest.raises(InputError, match="is none of"):
        sketch.variance(x, g, "fourier", 0.2)
    with pytest.raises(InputError, match="keeps nothing"):
        sketch.variance(x, g, "srht", 0)


@every_kind
def test_padding_costs_nothing(kind):
    """With rows of zeros behind or between, as many rows serve as well as without them."""
    x, g = example(64)
    alone = sketch.variance(x, g, kind, 16)
    padded = torch.zeros(160, x.shape[1], dtype=x.dtype)
    padded[::3][:32], padded[96:128] = x[:32], x[32:]
    padded_g = torch.zeros(160, g.shape[1], dtype=x.dtype)
    padded_g[::3][:32], padded_g[96:128] = g[:32], g[32:]
    for dy in (padded_g, padded_g + (padded_g == 0)):  # gradients of padding or none
        ratio = sketch.variance(padded, dy, kind, 16) / alone
        if kind in ROW_KINDS:
            torch.testing.assert_close(ratio, torch.ones_like(ratio))
        elif dy is padded_g:
            # Sampling without replacement gains less on 160 rows than on 64.
            assert ratio < (1.25 if kind in ("srht", "dct", "dft") else 1.001)
        measured = simulated(padded, dy, kind, 16, 300) - dy.t() @ padded
        measured = measured.square().sum((1, 2)).mean()
        torch.testing.assert_close(measured, ratio * alone, rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_as_many_rows_as_are_not_zero_are_exact(kind):
    x, g = example(40)
    x[::2] = 0
    if kind == "rows_norm":  # draws with replacement: exact for one row only
        x[3:] = 0
    gradient = simulated(x, g, kind, 20, 1)[0]
    torch.testing.assert_close(gradient, g.t() @ x)


def test_nothing_but_zeros():
    x, g = torch.zeros(40, 3), torch.randn(40, 2)
    for kind in KINDS:
        assert torch.equal(simulated(x, g, kind, 8, 1)[0], torch.zeros(2, 3))


# --- The parts of which transforms are made.


def product(a, b):
    """Of polynomials over GF(2)."""
    result = 0
    while b:
        result ^= a if b & 1 else 0
        a, b = a << 1, b >> 1
    return result


def remainder(a, b):
    while a.bit_length() >= b.bit_length():
        a ^= b << (a.bit_length() - b.bit_length())
    return a


def common_divisor(a, b):
    while b:
        a, b = b, remainder(a, b)
    return a


@pytest.mark.parametrize("degree", range(1, len(reference.POLYNOMIALS) + 1))
def test_polynomials_are_irreducible(degree):
    """Rabin's test: x^(2^m) = x, and x^(2^(m / q)) - x has no common divisor for primes q of m."""
    polynomial = reference.POLYNOMIALS[degree - 1]
    assert polynomial.bit_length() == degree + 1
    x = remainder(2, polynomial)

    def power(times):
        value = x
        for _ in range(times):
            value = remainder(product(value, value), polynomial)
        return value

    assert power(degree) == x
    for prime in (p for p in range(2, degree + 1) if degree % p == 0):
        if all(prime % q for q in range(2, prime)):
            assert common_divisor(polynomial, power(degree // prime) ^ x) == 1


@pytest.mark.parametrize("kind", ["srht", "dct", "dft"])
@pytest.mark.parametrize("length", [2, 4, 16, 128])
def test_transforms_are_orthogonal(kind, length):
    place = torch.arange(length)
    t = reference.transform_entries(kind, place[:, None], place, length) / length**0.5
    torch.testing.assert_close(t @ t.t(), torch.eye(length, dtype=torch.float64))


def test_every_pair_of_rows_is_chosen_equally_often():
    blocks = Blocks(16, 4000, 5, 0)
    chosen = reference.chosen_rows(torch.tensor([5]), blocks, 5)
    assert chosen.shape == (4000, 5)
    assert (chosen.sort(1).values.diff(dim=1) > 0).all()
    pairs = torch.zeros(16, 16)
    for a in range(5):
        for b in range(a):
            pairs.index_put_((chosen[:, a], chosen[:, b]), torch.tensor(1.0), accumulate=True)
    pairs = (pairs + pairs.t())[~torch.eye(16, dtype=torch.bool)]
    expected = 4000 * 20 / 240
    assert (pairs - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize("size", [(1000, 200), (77, 20), (16384, 1638), (5, 3), (100000, 16)])
def test_every_token_has_one_place(size):
    tokens, rows = size
    blocks = Blocks.of(tokens, rows)
    found, signs = reference.places(torch.tensor([3]), blocks)
    assert torch.equal(found.flatten().sort().values, torch.arange(found.numel()))
    assert signs.unique().tolist() == [-1, 1]
    assert sum(map(blocks.block_rows, range(blocks.number))) == rows
    assert blocks.length * blocks.number < tokens + blocks.length


def test_shares():
    assert Sketch(0.25).row_count(1000) == 250
    assert Sketch(1.0).row_count(1000) == 1000
