"""The codebooks: optimal against a published bar, enumeration and the conditions of an optimum."""

import functools
import importlib.util
import itertools
import json
import math
import pickle
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from packlight.errors import InputError, MissingDependencyError
from packlight.fewbit.activations import CONTINUOUS
from packlight.fewbit.codebook import Codebook, default_codebook, fit_codebook, solve_default
from packlight.fewbit.codebook.defaults import DEFAULT_RULE
from packlight.fewbit.codebook.search import optimal_intervals

matplotlib.use("Agg")


def plain(name):
    """The function of a name, with default parameters."""
    entry = CONTINUOUS[name]
    return lambda x: entry.function(x, *entry.parameters.values())


@functools.cache
def fitted(name, bits, parity="auto"):
    return fit_codebook(plain(name), bits, parity=parity)


def slope(f):
    """f' as a function of one number or of an array."""

    def derivative(x):
        leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(f(leaf).sum(), leaf)
        return gradient.numpy()

    return derivative


def integrated_error(book, f, weight=lambda x: 1.0, breaks=()):
    """The integral of w (f' - q)^2 by adaptive quadrature, interval by interval."""
    low, high = book.domain
    derivative = slope(f)
    mirrored = [-border for border in book.borders] if book.parity != "none" else []
    inner = [book.center + border for border in (*book.borders, *mirrored)]
    ends = np.unique([low, high, 0.0, *inner, *breaks])
    ends = ends[(ends >= low) & (ends <= high)]

    def loss(x):
        return weight(x) * (derivative(x) - book.derivative(x)).item() ** 2

    return sum(quad(loss, a, b, epsrel=1e-9, limit=200)[0] for a, b in itertools.pairwise(ends))


# ---- Optimality

# Squared L2 error of f' on [-10, 10] under the optimal codebook of 1 to 4 bits, uniform weight.
OPTIMUM = {
    "gelu": (0.14105, 0.04056, 0.01190, 0.00314),
    "silu": (0.21498, 0.04785, 0.01702, 0.00446),
    "tanh": (1.0115, 0.11357, 0.02589, 0.00648),
    "sigmoid": (0.09650, 0.01301, 0.00308, 0.00078),
    "selu": (0.25537, 0.10103, 0.01838, 0.00391),
    "hardswish": (0.49998, 0.25201, 0.05555, 0.01020),
    "mish": (0.16882, 0.03998, 0.01359, 0.00360),
    "softplus": (0.29022, 0.05405, 0.01212, 0.00290),
    "logsigmoid": (0.29022, 0.05405, 0.01212, 0.00290),
    "celu": (0.16216, 0.02511, 0.00517, 0.00118),
    "elu": (0.16216, 0.02511, 0.00517, 0.00118),
    "softsign": (0.45024, 0.09401, 0.02580, 0.00701),
}
HALF_DIGIT = 0.5e-5  # the figures above are rounded


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("name", OPTIMUM)
def test_reaches_the_optimum(name, bits):
    book = fitted(name, bits, "none")
    assert book.error <= 1.001 * OPTIMUM[name][bits - 1] + HALF_DIGIT


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_auto_parity_is_never_worse(name, bits):
    auto = fitted(name, bits)
    assert auto.error <= fitted(name, bits, "none").error * (1 + 1e-5)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.164), (2, 0.0324), (3, 0.0073), (4, 0.00175)])
def test_even_parity_of_tanh_on_a_long_domain(bits, error):
    book = fit_codebook(torch.tanh, bits, domain=(-20, 20), parity="even")
    half_digit = 0.5 * 10.0 ** (math.floor(math.log10(error)) - 2)
    if bits == 3:
        half_digit *= 10  # .0073 is given to two digits
    assert book.error <= 1.001 * error + half_digit


def test_parities_found():
    found = {name: default_codebook(name, 2).parity for name in CONTINUOUS}
    even = {"sigmoid", "softsign", "tanh", "tanhshrink"}
    none = {"celu", "elu", "mish", "relu_squared", "selu"}
    assert {name for name, parity in found.items() if parity == "even"} == even
    assert {name for name, parity in found.items() if parity == "none"} == none
    assert set(found.values()) == {"even", "none", "odd"}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_error_falls_with_bits(name):
    errors = [default_codebook(name, bits).error for bits in range(1, 9)]
    assert all(finer < 0.6 * coarser for coarser, finer in itertools.pairwise(errors))


@pytest.mark.parametrize("name", ["gelu", "hardswish", "selu", "tanh", "relu_squared", "elu"])
@pytest.mark.parametrize("bits", [1, 3])
def test_error_is_the_integral(name, bits):
    book = fit_codebook(plain(name), bits)
    expected = integrated_error(book, plain(name), breaks=(-3.0, 3.0))
    assert book.error == pytest.approx(expected, rel=6e-6)  # error has 6 digits


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *itertools.product(["gelu", "mish", "tanh", "softsign", "elu", "relu_squared"], [2, 4]),
        ("mish", 8),
        ("softsign", 8),
    ],
)
def test_conditions_of_the_optimum(name, bits):
    """Borders where f' is the mean of the levels beside, levels the means of f' on intervals."""
    book = fitted(name, bits, "none")
    borders, levels = np.array(book.borders), np.array(book.levels)
    rounding = 2e-6 * np.abs(levels).max()
    middle = (levels[1:] + levels[:-1]) / 2
    np.testing.assert_allclose(slope(plain(name))(borders), middle, rtol=0, atol=rounding)

    ends = np.array([-10, *borders, 10])
    rise = np.diff(plain(name)(torch.tensor(ends)).numpy())
    # Of an interval of width h the mean moves by |f'| d / h when an end moves by a rounding d.
    tolerance = rounding + 1e-6 * np.abs(levels) / np.diff(ends)
    assert (np.abs(rise / np.diff(ends) - levels) <= tolerance).all()


def test_a_border_rests_on_a_jump():
    assert 3.0 in fit_codebook(F.hardswish, 3, parity="none").borders
    assert 3.0 in fit_codebook(F.hardswish, 3).borders
    assert 0.0 in fit_codebook(F.selu, 3).borders


def test_a_jump_anywhere_is_found():
    book = fit_codebook(lambda x: F.relu(x - math.e), 1)
    assert book.borders == pytest.approx([math.e], abs=1e-6)
    assert book.levels == (0.0, 1.0)
    assert book.error < 1e-6  # the rounding of the border


def test_more_levels_than_a_step_needs():
    book = fit_codebook(F.relu, 4, parity="none")
    assert book.error < 1e-12
    assert (book.derivative([-5.0, 5.0]) == [0, 1]).all()


def test_a_function_of_both_parities():
    book = fit_codebook(lambda x: x / 2, 3)
    assert set(book.levels) == {0.5}
    assert book.error == 0


def test_a_constant_derivative_given_as_a_number():
    assert fit_codebook(lambda x: 2 * x, 1, derivative=lambda x: 2.0).levels == (2.0, 2.0)


# ---- The dynamic programme


def brute_force(weight, first, second, pieces, low_level, high_level):
    """The least cost over every choice of cuts."""
    cells = len(weight) - 1
    pieces = min(pieces, cells)
    best = math.inf
    for cuts in itertools.combinations(range(1, cells), pieces - 1):
        ends = [0, *cuts, cells]
        cost = 0.0
        for place, (i, j) in enumerate(itertools.pairwise(ends)):
            w, a, q = (prefix[j] - prefix[i] for prefix in (weight, first, second))
            if place == 0 and low_level is not None:
                cost += q - 2 * low_level * a + low_level**2 * w
            elif place == pieces - 1 and high_level is not None:
                cost += q - 2 * high_level * a + high_level**2 * w
            else:
                cost += q - (a**2 / w if w > 0 else 0.0)
        best = min(best, cost)
    return best


values = st.floats(-2, 2).map(lambda value: round(value, 3))
levels = st.none() | values


@given(
    cells=st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0, 3.0]), values), min_size=1, max_size=11
    ),
    pieces=st.integers(1, 14),
    low=levels,
    high=levels,
)
@settings(max_examples=300)
def test_dynamic_programme_equals_enumeration(cells, pieces, low, high):
    mass, value = np.array(cells).T
    if min(pieces, len(cells)) == 1 and low is not None:
        high = None  # One interval cannot have two levels.
    weight, first, second = (np.append(0.0, np.cumsum(mass * value**power)) for power in range(3))
    cuts, cost = optimal_intervals(weight, first, second, pieces, low, high)
    assert cost == pytest.approx(
        brute_force(weight, first, second, pieces, low, high), abs=1e-12, rel=1e-12
    )
    ends = [0, *cuts, len(cells)]
    assert len(cuts) == min(pieces, len(cells)) - 1
    assert all(i < j for i, j in itertools.pairwise(ends))


# ---- Weights


def normal(sigma):
    return lambda x: np.exp(-0.5 * (x / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("sigma", [0.01, 0.3, 1.0, 100.0])
def test_normal_weight(sigma):
    book = fit_codebook(F.gelu, 3, weight=("normal", sigma))
    assert book.error <= integrated_error(default_codebook("gelu", 3), F.gelu, normal(sigma))
    breaks = sigma * np.linspace(-8, 8, 65)
    assert book.error == pytest.approx(
        integrated_error(book, F.gelu, normal(sigma), breaks), rel=2e-5
    )
    # Beyond 38 sigma the density is 0 in floats.
    assert np.isfinite(book.levels).all()


def test_callable_weight_of_any_scale():
    one = fit_codebook(F.gelu, 3, weight=("normal", 1.0))
    other = fit_codebook(F.gelu, 3, weight=lambda x: 1e3 * normal(1.0)(x))
    assert other == one
    assert other.error == pytest.approx(1e3 * one.error, rel=1e-5)


def test_weight_that_is_zero_on_a_part():
    book = fit_codebook(F.gelu, 3, weight=lambda x: (x > 2).astype(float), parity="none")
    assert np.isfinite(book.levels).all()
    assert book.error < fit_codebook(F.gelu, 3, domain=(2, 10), parity="none").error * 1.001


def test_histogram_weight():
    samples = np.random.default_rng(0).normal(0.5, 1, 100_000)
    counts, edges = np.histogram(samples, 64)
    book = fit_codebook(F.gelu, 3, weight=(counts, edges))
    reach = np.abs(edges).max()
    assert book.domain == (-reach, reach)
    density = counts / counts.sum() / np.diff(edges)

    def weight(x):
        inside = edges[0] <= x < edges[-1]
        return density[np.searchsorted(edges, x, "right") - 1] if inside else 0.0

    assert book.error == pytest.approx(integrated_error(book, F.gelu, weight, edges), rel=1e-5)
    scaled = (torch.tensor(counts * 7.0), torch.tensor(edges))
    assert fit_codebook(F.gelu, 3, weight=scaled) == book


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, list])
def test_samples_weight(kind):
    samples = np.random.default_rng(0).normal(0.5, 1, 20_000)
    book = fit_codebook(F.gelu, 3, weight=kind(samples))
    assert book.domain == (-np.abs(samples).max(), np.abs(samples).max())
    exact = fit_codebook(F.gelu, 3, weight=lambda x: normal(1.0)(x - 0.5))
    assert book.error == pytest.approx(exact.error, rel=0.05)

    def measured(book):
        return ((slope(F.gelu)(samples) - book.derivative(samples)) ** 2).mean()

    assert measured(book) < 0.6 * measured(default_codebook("gelu", 3))


def test_samples_with_an_outlier_and_a_domain():
    samples = np.append(np.random.default_rng(0).normal(0, 1, 20_000), 1e4)
    wide = fit_codebook(F.gelu, 3, weight=samples)
    assert wide.domain == (-1e4, 1e4)
    narrow = fit_codebook(F.gelu, 3, weight=samples, domain=(-6, 6))
    assert narrow.domain == (-6, 6)
    assert wide.error == pytest.approx(narrow.error, rel=0.05)


def test_bfloat16_samples_under_inference_mode():
    with torch.inference_mode():
        samples = torch.linspace(-3, 3, 1000, dtype=torch.bfloat16)
        assert fit_codebook(F.gelu, 2, weight=samples).domain == (-3, 3)


def test_parity_folds_an_asymmetric_weight():
    def weight(x):
        return normal(1.0)(x - 1)

    even = fit_codebook(torch.tanh, 3, weight=weight)
    assert even.parity == "even"
    assert even.error <= fit_codebook(torch.tanh, 3, weight=weight, parity="none").error
    assert even.error == pytest.approx(integrated_error(even, torch.tanh, weight), rel=1e-5)
    assert fit_codebook(F.gelu, 3, weight=weight).parity == "none"
    folded = fit_codebook(F.gelu, 3, weight=weight, parity="odd")
    assert folded.error == pytest.approx(integrated_error(folded, F.gelu, weight), rel=1e-5)


@pytest.mark.parametrize("seed", range(30))
def test_rough_functions_and_weights(seed):
    """Jumps, kinks and flats under histograms with empty bins: the search ends in a minimum."""
    random = np.random.default_rng(seed)
    knots, heights = np.sort(random.uniform(-9, 9, 6)), random.normal(size=7)
    derivatives = (
        lambda x: heights[np.searchsorted(knots, x)],
        lambda x: np.interp(x, knots, heights[1:]),
        lambda x: np.interp(x, knots, heights[1:]) + (x > heights[0]),
    )
    counts, edges = random.integers(0, 3, 20), np.sort(random.uniform(-12, 12, 21))
    counts[10] = 1
    derivative = derivatives[seed % 3]
    question = {"derivative": derivative, "weight": (counts, edges), "domain": (-10, 11)}
    book = fit_codebook(None, 3, **question)
    coarse = fit_codebook(None, 2, **question)
    assert np.isfinite(book.levels).all()
    assert book.error <= coarse.error

    x = np.linspace(-10, 11, 42_001)
    x = (x[1:] + x[:-1]) / 2
    weight = np.append(0, np.append(counts / counts.sum() / np.diff(edges), 0))[
        np.searchsorted(edges, x, side="right")
    ]

    def error(borders):
        q = np.array(book.levels)[np.searchsorted(borders, x)]
        return (weight * (derivative(x) - q) ** 2).sum() * 21 / 42_000

    assert book.error == pytest.approx(error(book.borders), rel=1e-2, abs=1e-6)
    for i, sign in itertools.product(range(7), (-1, 1)):
        moved = np.array(book.borders)
        moved[i] += sign * 0.01
        assert error(np.sort(moved)) >= book.error * 0.99 - 1e-6


# ---- Tails and the other objective


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("parity", ["auto", "none"])
@pytest.mark.parametrize(
    ("name", "limits"),
    [("gelu", (0, 1)), ("softsign", (0, 0)), ("mish", (0, 1)), ("tanhshrink", (1, 1))],
)
def test_pinned_tails(name, limits, parity, bits):
    book = fit_codebook(plain(name), bits, parity=parity, pin_tails=True)
    assert tuple(book.derivative([-1e9, 1e9])) == limits
    assert book.error >= fitted(name, bits, parity).error
    assert book.error == pytest.approx(integrated_error(book, plain(name)), rel=1e-5)


def test_pinned_tails_cost_what_the_search_thinks():
    """At 2 bits the pinned optimum leaves two free levels: a search by simplex finds no better."""
    from scipy.optimize import minimize

    x = np.linspace(-10, 10, 20_001)
    exact = slope(F.gelu)(x)

    def error(point):
        borders, inner = np.sort(point[:3]), point[3:]
        q = np.array([0, *inner, 1])[np.searchsorted(borders, x)]
        return ((exact - q) ** 2).sum() * 1e-3

    book = fit_codebook(F.gelu, 2, parity="none", pin_tails=True)
    found = min(
        minimize(error, start, method="Nelder-Mead", options={"maxfev": 2000}).fun
        for start in ([*book.borders, *book.levels[1:3]], [-1, 0, 1, 0.2, 0.8])
    )
    assert book.error <= found * 1.001


def test_unbounded_tail_stays_free():
    with pytest.raises(InputError, match="no finite limit at infinity"):
        fit_codebook(plain("relu_squared"), 3, pin_tails=True)
    book = fit_codebook(plain("relu_squared"), 3, pin_tails="where_bounded")
    assert book.levels[0] == 0
    assert 18 < book.levels[-1] < 20


def primitive_error(book, f):
    """The integral of (f - h)^2 for h of slopes q and the best offset, under uniform weight."""
    x = np.linspace(*book.domain, 200_001)
    q = book.derivative((x[1:] + x[:-1]) / 2)
    h = np.append(0.0, np.cumsum(q * np.diff(x)))
    miss = f(torch.tensor(x)).numpy() - h
    return ((miss - miss.mean()) ** 2).mean() * np.ptp(x)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("parity", ["auto", "none"])
@pytest.mark.parametrize("name", ["gelu", "tanh", "relu_squared"])
def test_primitive_objective(name, parity, bits):
    ours = fit_codebook(plain(name), bits, objective="primitive", parity=parity)
    other = fit_codebook(plain(name), bits, parity=parity, pin_tails="where_bounded")
    assert primitive_error(ours, plain(name)) < primitive_error(other, plain(name))
    assert ours.error > other.error


@pytest.mark.parametrize("f", [F.relu, lambda x: x / 2, F.hardtanh])
def test_primitive_objective_of_what_is_piecewise_linear(f):
    book = fit_codebook(f, 3, objective="primitive")
    assert book.error < 1e-6
    assert primitive_error(book, f) < 1e-6


def test_primitive_objective_is_regelu2():
    book = fit_codebook(F.gelu, 2, objective="primitive")
    assert book.error == pytest.approx(0.157, abs=0.001)
    # ReGELU2's table, arXiv 2406.16282: slopes 0, -0.0492, 1.0487, 1 and borders about +-3.19, 0.
    assert book.levels == pytest.approx((1.0487, 1.0, -0.0487, 0.0), abs=0.002)
    assert book.borders == pytest.approx((3.19,), abs=0.05)


# ---- Codebooks as values


@pytest.mark.parametrize("name", ["gelu", "tanh", "mish"])
def test_travels(name):
    book = default_codebook(name, 3)
    for twin in (
        Codebook.from_dict(json.loads(json.dumps(book.to_dict()))),
        pickle.loads(pickle.dumps(book)),
    ):
        assert twin == book
        assert hash(twin) == hash(book)
        assert twin.error == book.error
    assert book != default_codebook(name, 2)


def test_unknown_error_travels():
    book = Codebook(1, (0.0,), (0.0, 1.0))
    twin = Codebook.from_dict(json.loads(json.dumps(book.to_dict(), allow_nan=False)))
    assert twin == book
    assert math.isnan(twin.error)
    assert Codebook(1, (0.0,), (0.0, 1.0), error=0.5) == book


def test_codes_follow_the_rule():
    x = np.array([-math.inf, -2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0, math.inf, math.nan])
    line = Codebook(2, (-1.0, 0.0, 1.0), (0.0, 0.1, 0.9, 1.0))
    assert line.encode(x).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 0]
    even = Codebook(2, (0.5, 1.0, 1.5), (1.0, 0.5, 0.2, 0.0), parity="even")
    assert even.encode(x).tolist() == [3, 3, 1, 0, 0, 0, 0, 1, 3, 3, 0]
    signed = Codebook(2, (1.0,), (0.75, 1.0, 0.25, 0.0), parity="odd")
    assert signed.encode(x[:-1]).tolist() == [3, 3, 2, 2, 2, 0, 0, 0, 1, 1]
    assert signed.derivative(2.0) == 1
    assert line.encode(x).dtype == np.uint8


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_sides_of_an_odd_book_mirror_each_other(bits):
    book = default_codebook("gelu", bits)
    half = 2 ** (bits - 1)
    sums = [book.levels[half + i] + book.levels[i] for i in range(half)]
    assert sums == pytest.approx([1.0] * half, rel=1e-11)


def test_plot(tmp_path, monkeypatch):
    figure = default_codebook("gelu", 3).plot(tmp_path / "book.png", F.gelu)
    assert (tmp_path / "book.png").stat().st_size > 0
    assert len(figure.axes[0].lines) == 2
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'packlight\[plot\]'"):
        default_codebook("gelu", 3).plot()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": True}, "bits=True"),
        ({"borders": (0.0, 1.0)}, "2 borders"),
        ({"borders": (math.nan,)}, "border nan"),
        ({"borders": (math.inf,)}, "border inf"),
        ({"levels": (0.0,)}, "1 levels"),
        ({"levels": (0.0, math.inf)}, "finite"),
        ({"parity": "complement"}, "parity='complement'"),
        ({"parity": "even", "borders": (-1.0,)}, "border -1.0"),
        ({"domain": (1.0, -1.0)}, "domain"),
        ({"center": math.nan}, "center=nan must be finite"),
    ],
)
def test_bad_tables(fields, message):
    with pytest.raises(InputError, match=message):
        Codebook(**{"bits": 1, "borders": (0.0,), "levels": (0.0, 1.0), **fields})


@pytest.mark.parametrize("borders", [(0.0, 0.0, 1.0), (1.0, 0.0, 2.0)])
def test_unsorted_borders(borders):
    with pytest.raises(InputError, match="strictly increasing"):
        Codebook(2, borders, (0.0, 0.1, 0.9, 1.0))


def test_odd_tables():
    with pytest.raises(InputError, match=r"the same levels\[i\] \+ levels\[2 \+ i\]"):
        Codebook(2, (1.0,), (0.75, 1.0, 0.25, 0.1), parity="odd")
    with pytest.raises(InputError, match=r"border 0\.0"):
        Codebook(2, (0.0,), (0.75, 1.0, 0.25, 0.0), parity="odd")


def test_bad_dict():
    with pytest.raises(InputError, match="expected"):
        Codebook.from_dict({"bits": 1})


# ---- Bad questions


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, "2", True, None])
def test_bad_bits(bits):
    with pytest.raises(InputError, match="bits="):
        fit_codebook(F.gelu, bits)
    with pytest.raises(InputError, match="bits="):
        default_codebook("gelu", bits)


@pytest.mark.parametrize(
    "domain", [(1, 1), (1, -1), (-math.inf, 1), (0, math.nan), (1, 2, 3), 5, ("a", "b")]
)
def test_bad_domain(domain):
    with pytest.raises(InputError, match="domain="):
        fit_codebook(F.gelu, 2, domain=domain)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("gaussian", "weight='gaussian'"),
        (("laplace", 1.0), "weight='laplace'"),
        (("normal", 0.0), "standard deviation"),
        (("normal", math.inf), "standard deviation"),
        (("normal", "1"), "standard deviation"),
        (np.zeros_like, "zero on the whole domain"),
        (lambda x: x, "negative or not finite at x = -"),
        (lambda x: np.full_like(x, np.nan), "negative or not finite"),
        (([1, 2], [0, 1]), "n counts and n [+] 1 edges"),
        (([1, 2], [0, 1, 1]), "increasing"),
        (([1, -2], [0, 1, 2]), "counts must be finite"),
        (([0, 0], [0, 1, 2]), "counts must be finite"),
        (np.zeros((3, 3)), "1-D"),
        (np.array([0.0, math.nan]), "1-D array of finite"),
        (np.ones(100), "distinct samples"),
        (np.empty(0), "distinct samples"),
    ],
)
def test_bad_weight(weight, message):
    with pytest.raises(InputError, match=message):
        fit_codebook(F.gelu, 2, weight=weight)


def test_weight_outside_the_domain():
    with pytest.raises(InputError, match="zero on the whole domain"):
        fit_codebook(F.gelu, 2, weight=([1.0], [20.0, 30.0]), domain=(-1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "both"}, "objective='both'"),
        ({"parity": "complement"}, "parity='complement'"),
        ({"parity": "even"}, "does not hold"),
        ({"parity": "odd", "domain": (-1, 2)}, r"whose middle is c = 0\.5; choose a domain around"),
        ({"pin_tails": "left"}, "pin_tails='left'"),
        ({"pin_tails": 1}, "pin_tails=1"),
    ],
)
def test_bad_choice(arguments, message):
    with pytest.raises(InputError, match=message):
        fit_codebook(F.gelu, 2, **arguments)


def test_a_derivative_that_is_not_finite():
    with pytest.raises(InputError, match="derivative is nan at x = -"):
        fit_codebook(torch.sqrt, 2)
    with pytest.raises(InputError, match="derivative is inf at x = 0"):
        fit_codebook(torch.sqrt, 2, domain=(0, 1))


def test_a_function_without_a_derivative():
    with pytest.raises(InputError, match="autograd"):
        fit_codebook(torch.zeros_like, 2)


@pytest.mark.parametrize("derivative", [lambda x: 1 - np.tanh(x) ** 2, lambda x: 1 - x.tanh() ** 2])
def test_a_derivative_of_either_kind(derivative):
    assert fit_codebook(torch.tanh, 3, derivative=derivative) == fit_codebook(torch.tanh, 3)


def test_asymmetric_domain_has_no_parity():
    assert fit_codebook(torch.tanh, 3, domain=(-3, 7)).parity == "none"


def test_a_short_domain_keeps_borders_apart():
    book = fit_codebook(torch.square, 4, domain=(1e6, 1e6 + 0.1))
    assert len(set(book.borders)) == 15


# ---- Defaults


def test_unknown_function():
    with pytest.raises(InputError, match="no codebook for 'relu'"):
        default_codebook("relu", 2)


@pytest.mark.parametrize(("name", "parameters"), [("gelu", (1.0,)), ("softplus", (1.0,))])
def test_wrong_number_of_parameters(name, parameters):
    with pytest.raises(InputError, match="parameters"):
        default_codebook(name, 2, parameters)


def test_parameters():
    assert default_codebook("elu", 3, (1.0,)) is default_codebook("elu", 3)
    assert default_codebook("softplus", 3, (1, 20)) is default_codebook("softplus", 3)
    small = default_codebook("elu", 3, (0.3,))
    assert small is default_codebook("elu", 3, (0.3,))
    assert small == fit_codebook(lambda x: F.elu(x, 0.3), 3, weight=DEFAULT_RULE["weight"])
    assert default_codebook("softplus", 3, (2.0, 20.0)).parity == "odd"


def test_solved_under_inference_mode_and_a_default_device():
    with torch.inference_mode(), torch.device("meta"):
        assert default_codebook("celu", 2, (0.7,)).bits == 2


SHIFTED = {
    "even": lambda x: torch.sigmoid(x - 2.5),
    "odd": lambda x: torch.log(torch.cosh(x + 1.5)),  # f' = tanh, odd about a value that is not 1/2
}


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize(("parity", "center"), [("even", 2.5), ("odd", -1.5)])
def test_parity_about_another_point(parity, center, bits):
    f = SHIFTED[parity]
    book = fit_codebook(f, bits, domain=(center - 10, center + 10))
    assert (book.parity, book.center) == (parity, center)
    at_zero = fit_codebook(lambda t: f(t + center), bits)
    assert (book.borders, book.levels) == (at_zero.borders, at_zero.levels)
    x = np.linspace(-9, 9, 101)
    assert np.array_equal(book.derivative(x + center), at_zero.derivative(x))
    free = fit_codebook(f, bits, domain=book.domain, parity="none")
    assert book.error == pytest.approx(integrated_error(book, f, breaks=(center,)), rel=1e-4)
    assert book.error < (0.5 * free.error if parity == "even" else 1.0001 * free.error)
    assert fit_codebook(f, bits).parity == "none"  # about 0
    primitive = fit_codebook(f, bits, domain=book.domain, objective="primitive")
    assert primitive.error >= book.error


def test_odd_parity_where_it_costs_nothing():
    """cos, whose derivative goes up and down: at 2 bits mirrored intervals are a fifth worse."""
    books = {bits: fit_codebook(torch.cos, bits) for bits in (2, 3)}
    assert {bits: book.parity for bits, book in books.items()} == {2: "none", 3: "odd"}
    assert books[2].error < 0.9 * fit_codebook(torch.cos, 2, parity="odd").error


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_pinned_rule_has_a_book_for_every_function(bits, monkeypatch):
    monkeypatch.setitem(DEFAULT_RULE, "pin_tails", True)
    for name, entry in CONTINUOUS.items():
        book = solve_default(name, bits, tuple(entry.parameters.values()))
        free = default_codebook(name, bits)
        assert book.error >= free.error * (1 - 1e-5)


def build_tool():
    path = Path(__file__).parents[2] / "tools" / "build_codebooks.py"
    spec = importlib.util.spec_from_file_location("build_codebooks", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_every_default_loads():
    for name, bits in itertools.product(CONTINUOUS, range(1, 9)):
        assert default_codebook(name, bits).bits == bits


def test_the_file_is_what_the_tool_builds():
    """Bit for bit; 8 bits of two functions only, for time: the tool's --check does all."""
    tool = build_tool()
    lines = set(tool.FILE.read_text("utf-8").replace("},\n", "}\n").splitlines())
    wanted = [(name, bits) for name in CONTINUOUS for bits in range(1, 6)]
    wanted += [("gelu", 8), ("tanh", 8)]
    assert [key for key in wanted if tool.build(*key) not in lines] == []


def test_the_tool_names_what_differs():
    tool = build_tool()
    stored = tool.FILE.read_text("utf-8")
    assert tool.differences(stored, stored) == []
    error = default_codebook("celu", 1).error
    altered = stored.replace(f'"error": {error},', '"error": 0.2,', 1)
    assert tool.differences(stored, altered) == ["celu, 1 bits: differs"]
    assert len(tool.differences("", stored)) == 8 * len(CONTINUOUS)
