"""Codebooks: which borders and levels stand for the derivative of an activation in k bits.

The backward pass of y = f(x) needs f'(x) only. A few-bit layer keeps the index of the interval that
x lies in, and multiplies by that interval's level q(x). A codebook holds borders s_i and levels l_i
chosen to minimise

    E = integral over the domain of w(x) (f'(x) - q(x))^2 dx.

For fixed borders the best level is the weighted mean of f' on its interval, so only the borders
are searched: exactly, by dynamic programming over the nodes of a grid, and from there by Newton's
method to the optimum of the continuous problem, where f'(s_i) = (l_i + l_{i+1}) / 2.

Source: Novikov et al., "Few-bit backward", ICML 2023, arXiv 2202.00441, with the dynamic programme.
Ours: parity, the polish to the continuous optimum, weights measured on data, pinned tails.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, get_args

import numpy as np
import numpy.typing as npt
import torch

from packlight import _torch
from packlight._files import replaced
from packlight.errors import InputError, MissingDependencyError
from packlight.fewbit.activations import CONTINUOUS
from packlight.fewbit.method import check_bits

Parity = Literal["none", "even", "complement"]
Objective = Literal["derivative", "primitive"]
PinTails: TypeAlias = bool | Literal["where_bounded"]

Array: TypeAlias = npt.NDArray[np.float64]
Curve: TypeAlias = Callable[[Array], Array]
Weight: TypeAlias = str | tuple[Any, Any] | Curve | npt.ArrayLike | torch.Tensor


class Rule(TypedDict):
    """How default codebooks weigh inputs and treat tails; the arguments of `fit_codebook`."""

    weight: Weight
    pin_tails: PinTails


DEFAULT_DOMAIN = (-10.0, 10.0)

# The rule of `default_codebook`, by experiment (benchmarks/codebook_choice.py, NOTES.md 4): no rule
# trains better than another by more than the noise, not even at 2 bits; this one has the best mean
# loss on the CPU, is in the middle on the GPU, and its gradient error is a fifth below uniform's at
# 2 bits and level with it at 1 and 3. The shipped file is built with it: after a change run
# `python tools/build_codebooks.py`. Where it pins tails, a side on which f' has no finite limit
# (the right of relu_squared) keeps a free level: no constant is right there, and the mean of the
# domain's end errs least.
DEFAULT_RULE: Rule = {"weight": ("normal", 3.0), "pin_tails": False}

# Borders and levels are rounded to about what float32, in which kernels hold them, can tell apart;
# errors to fewer, so that the last digit never depends on the machine's libm.
DIGITS = 7
ERROR_DIGITS = 6


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Borders and levels that code a derivative in `bits` bits.

    The code of x, and with it q(x) = levels[code], follows from `parity`:

    - `"none"`: code = number of borders < x; 2^bits - 1 borders.
    - `"even"`, for f'(-x) = f'(x): code = number of borders < |x|; 2^bits - 1 borders, all >= 0.
    - `"complement"`, for f'(x) + f'(-x) = 1: code = signbit(x) half + number of borders < |x|, with
      half = 2^(bits-1); half - 1 borders, all > 0, and levels[half + i] == 1 - levels[i].

    `error` is the integral of w (f' - q)^2 over `domain`, NaN where unknown. It is a record of the
    fit: books with the same table are equal whatever their errors. Raises `InputError` for a table
    that breaks these rules.
    """

    bits: int
    borders: tuple[float, ...]
    levels: tuple[float, ...]
    error: float = dataclasses.field(default=math.nan, compare=False)
    parity: Parity = "none"
    domain: tuple[float, float] = DEFAULT_DOMAIN

    def __post_init__(self) -> None:
        check_bits(self.bits)
        _check_choice("parity", self.parity, get_args(Parity))
        low, high = _checked_domain(self.domain)
        object.__setattr__(self, "domain", (low, high))
        object.__setattr__(self, "borders", tuple(float(border) for border in self.borders))
        object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))
        self._check_borders()
        self._check_levels()

    def _check_borders(self) -> None:
        expected = _pieces(self.bits, self.parity) - 1
        if len(self.borders) != expected:
            raise InputError(
                f"{len(self.borders)} borders; a {self.bits}-bit codebook of parity "
                f"{self.parity!r} has {expected}: pass as many, or another `bits`"
            )
        for left, right in itertools.pairwise((-math.inf, *self.borders, math.inf)):
            if not left < right:
                raise InputError(
                    f"border {right} follows {left}; borders are finite and strictly increasing: "
                    "sort them and drop repeated ones"
                )
        least = self.borders[0] if self.borders else math.inf
        if (self.parity == "even" and least < 0) or (self.parity == "complement" and least <= 0):
            raise InputError(
                f"border {least}; a codebook of parity {self.parity!r} compares borders with |x|: "
                "keep the positive ones"
            )

    def _check_levels(self) -> None:
        if len(self.levels) != 2**self.bits:
            raise InputError(
                f"{len(self.levels)} levels; a {self.bits}-bit codebook has {2**self.bits}, one "
                "per code: pass as many, or another `bits`"
            )
        if not all(map(math.isfinite, self.levels)):
            raise InputError(f"levels {self.levels} must be finite: check the function fitted")
        half = len(self.levels) // 2
        if self.parity == "complement" and self.levels[half:] != _complement(self.levels[:half]):
            raise InputError(
                f"levels {self.levels}: parity 'complement' needs levels[{half} + i] == "
                "1 - levels[i]; set the second half so"
            )

    @property
    def short_borders(self) -> tuple[float, ...]:
        """The borders rounded to 16 significant bits, as layers compare with them on every device.

        A kernel keeps a border and a code in one 32-bit word; an error of 2^-17 in a border costs
        nothing, since the fit is flat there.
        """
        bits = np.asarray(self.borders, dtype=np.float32).view(np.int32)
        return tuple(((bits + 0x80) & ~0xFF).view(np.float32).tolist())

    def encode(self, x: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """The codes of x. NaN counts as below every border."""
        x = np.asarray(x, dtype=np.float64)
        magnitude = x if self.parity == "none" else np.abs(x)
        code = np.searchsorted(self.borders, magnitude, side="left")
        code = np.where(np.isnan(x), 0, code)
        if self.parity == "complement":
            code = code + np.signbit(x) * 2 ** (self.bits - 1)
        return code.astype(np.uint8)

    def derivative(self, x: npt.ArrayLike) -> Array:
        """q(x), what the codes of x give in place of f'(x)."""
        return np.asarray(self.levels)[self.encode(x)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Of parity 'complement' the first half of the levels, which tells
        the second; an unknown error is None."""
        stored = 2**self.bits // 2 if self.parity == "complement" else 2**self.bits
        return {
            "bits": self.bits,
            "parity": self.parity,
            "domain": list(self.domain),
            "error": None if math.isnan(self.error) else self.error,
            "borders": list(self.borders),
            "levels": list(self.levels[:stored]),
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Codebook":
        """The inverse of `to_dict`. Raises `InputError` for a missing or unknown field."""
        expected = {field.name for field in dataclasses.fields(Codebook)}
        if set(data) != expected:
            raise InputError(
                f"codebook fields {sorted(data)}; expected {sorted(expected)}: pass what "
                "`Codebook.to_dict` returned"
            )
        levels = tuple(data["levels"])
        if data["parity"] == "complement":
            levels += _complement(levels)
        error = math.nan if data["error"] is None else data["error"]
        return Codebook(**{**data, "levels": levels, "error": error})

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        f: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Any:
        """Draws q over the domain, and f' behind it where f is given; returns the figure.

        With `path` the figure is written there and closed, otherwise it is left open for
        `matplotlib.pyplot.show`. Raises `MissingDependencyError` without matplotlib.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise MissingDependencyError(
                "Codebook.plot needs matplotlib, which is not installed; "
                "run: pip install 'packlight[plot]'"
            ) from error
        x = np.linspace(*self.domain, 2001)
        figure, axes = plt.subplots()
        if f is not None:
            axes.plot(x, _by_autograd(f)(x), color="0.6", label="f'")
        axes.plot(x, self.derivative(x), label=f"{self.bits}-bit codes")
        axes.set_xlabel("x")
        axes.legend()
        if path is not None:
            with replaced(path) as beside:
                figure.savefig(beside)
            plt.close(figure)
        return figure


def fit_codebook(
    f: Callable[[torch.Tensor], torch.Tensor],
    bits: int,
    *,
    domain: tuple[float, float] | None = None,
    weight: Weight = "uniform",
    objective: Objective = "derivative",
    parity: Parity | Literal["auto"] = "auto",
    pin_tails: PinTails = False,
    derivative: Callable[[Any], Any] | None = None,
) -> Codebook:
    """The codebook of 2^bits levels that minimises E = integral of w (f' - q)^2 over the domain.

    f: an elementwise torch function that takes float64. f' comes from autograd, or from
        `derivative`, a function of a NumPy array or of a tensor. A kink of f' is integrated best
        at 0; jumps of f' are found wherever they are.
    domain: by default (-10, 10); with a histogram or samples the least (-m, m) that holds them.
    weight: w(x) as
        - "uniform", w = 1;
        - ("normal", sigma), the density of N(0, sigma^2);
        - a function of a NumPy array, of any scale;
        - (counts, edges) as `numpy.histogram` returns, made a density;
        - a 1-D array or tensor of samples, say of measured pre-activations, made a histogram whose
          bins hold equally many.
    objective: "derivative" minimises E. "primitive" minimises the integral of w (f - h)^2, where h
        is continuous, has slopes q, and ends in the limits of f' where these are finite: the idea
        of ReGELU2 and ReSiLU2 (Yang et al., ICML 2024, arXiv 2406.16282). Its minimum is local, the
        one next to the "derivative" book, and its E is larger.
    parity: see `Codebook`; f' is examined on a domain (-m, m) only. "auto" takes "even" if f' is
        so, which never costs and mostly saves error under any weight; "complement" if f' is so and
        the weight is symmetric, for the smaller table; else "none".
    pin_tails: True fixes the outermost levels at the limits of f' (0 and 1 for GELU), so that
        saturated units get exact gradients; "where_bounded" leaves a side without a limit free.

    Borders and levels are rounded to 7 significant digits; `error` is E after that.

    Raises `InputError` for `bits` outside 1-8; a domain that is empty, inverted or not finite; a
    weight that is negative, not finite or zero everywhere; f' not finite on the domain; a parity or
    a limit that f' lacks; an unknown name.
    """
    check_bits(bits)
    _check_choice("objective", objective, get_args(Objective))
    _check_choice("parity", parity, ("auto", *get_args(Parity)))
    _check_choice("pin_tails", pin_tails, (False, True, "where_bounded"))
    domain = None if domain is None else _checked_domain(domain)
    density, edges = _weight(weight, domain)
    if domain is None:
        domain = (-abs(edges).max(), abs(edges).max()) if len(edges) else DEFAULT_DOMAIN
    low, high = domain = _checked_domain(domain)
    curve = _by_autograd(f) if derivative is None else _on_arrays(derivative)
    slope = _checked_slope(curve)
    parity = _parity(parity, slope, density, domain)
    tails = "where_bounded" if objective == "primitive" and not pin_tails else pin_tails
    first, last = _tail_levels(curve, tails)

    if parity != "none":
        # q and f' share their symmetry, so E is an integral over |x| with the weights of x and -x.
        low, first, edges = 0.0, None, abs(edges)
        density = _fold(density)
    problem = _problem(slope, density, low, high, edges, _pieces(bits, parity), first, last)
    borders, levels = _solve(problem)
    if objective == "primitive":
        start = float(_values(f, np.zeros(1))[0]) if parity == "even" else None
        borders, levels = _match_primitive(problem, functools.partial(_values, f), borders, start)

    kept_borders, kept_levels = _round_distinct(borders), _round(levels)
    error = _error(problem, np.asarray(kept_borders), np.asarray(kept_levels))
    if parity == "complement":
        kept_levels += _complement(kept_levels)
    (error,) = _round([error], ERROR_DIGITS)
    return Codebook(bits, kept_borders, kept_levels, error, parity, domain)


def check_codebook(codebook: object) -> Codebook:
    """`codebook` if it is one, else an `InputError`."""
    if not isinstance(codebook, Codebook):
        raise InputError(
            f"codebook={codebook!r} is not a Codebook; fit_codebook(f, bits) makes one"
        )
    return codebook


def default_codebook(name: str, bits: int, parameters: tuple[float, ...] = ()) -> Codebook:
    """The codebook of a function of `activations.CONTINUOUS` under `DEFAULT_RULE`.

    `parameters` are the function's, in order; empty means its defaults. Default books come from the
    shipped file; others, say of ELU(alpha=0.3), are solved when first asked for (a fraction of a
    second) and kept in memory. Raises `InputError` for an unknown name or number of parameters.
    """
    check_bits(bits)
    if name not in CONTINUOUS:
        raise InputError(
            f"no codebook for {name!r}; functions with one: {', '.join(sorted(CONTINUOUS))}. "
            "For another, call fit_codebook"
        )
    defaults = tuple(CONTINUOUS[name].parameters.values())
    parameters = tuple(float(parameter) for parameter in parameters) or defaults
    if len(parameters) != len(defaults):
        raise InputError(
            f"{name} with parameters {parameters}; it takes {len(defaults)} "
            f"({', '.join(CONTINUOUS[name].parameters) or 'none'}): pass all of them, or none"
        )
    if parameters == defaults:
        return _shipped_codebooks()[name, bits]
    with _torch.with_values():  # a model may be built and traced without data
        return _solved_codebook(name, bits, parameters)


def solve_default(name: str, bits: int, parameters: tuple[float, ...]) -> Codebook:
    """Solves what `default_codebook` looks up."""
    function = CONTINUOUS[name].function
    return fit_codebook(
        lambda x: function(x, *parameters),
        bits,
        weight=DEFAULT_RULE["weight"],
        pin_tails="where_bounded" if DEFAULT_RULE["pin_tails"] else False,
    )


_solved_codebook = functools.lru_cache(maxsize=256)(solve_default)


@functools.cache
def _shipped_codebooks() -> dict[tuple[str, int], Codebook]:
    text = (importlib.resources.files(__package__) / "codebooks.json").read_text("utf-8")
    return {
        (name, book["bits"]): Codebook.from_dict(book)
        for name, books in json.loads(text).items()
        for book in books
    }


# ---- What is asked: arguments, f', weight, parity, tails


def _pieces(bits: int, parity: str) -> int:
    """The number of intervals that are searched: on the line, or on the half line x > 0."""
    return 1 << (bits - 1 if parity == "complement" else bits)


def _complement(levels: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(1 - level for level in levels)


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    # With types, for True == 1.
    if (type(value), value) not in [(type(choice), choice) for choice in choices]:
        raise InputError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")


def _checked_domain(domain: Sequence[float]) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in domain)
    except (TypeError, ValueError):
        raise InputError(f"domain={domain!r}: expected two numbers (low, high)") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"domain={domain!r}: expected two finite numbers, low < high")
    return low, high


def _tensor(x: Array) -> torch.Tensor:
    # A copy, since f may write in place; from_numpy, since torch.tensor follows a default device.
    return torch.from_numpy(np.array(x, dtype=np.float64).reshape(-1))


def _values(f: Callable[[torch.Tensor], torch.Tensor], x: Array) -> Array:
    with torch.no_grad():
        return np.asarray(f(_tensor(x)).numpy(), dtype=np.float64).reshape(np.shape(x))


def _by_autograd(f: Callable[[torch.Tensor], torch.Tensor]) -> Curve:
    def slope(x: Array) -> Array:
        # A layer may be built, and its book solved, under inference_mode or no_grad.
        with torch.inference_mode(False), torch.enable_grad():
            leaf = _tensor(x).requires_grad_()
            value = f(leaf)
            if not value.requires_grad:
                raise InputError(f"autograd finds no derivative of {f!r}: pass `derivative`")
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return np.asarray(gradient.numpy()).reshape(np.shape(x))

    return slope


def _on_arrays(derivative: Callable[[Any], Any]) -> Curve:
    """A NumPy function of a user's derivative, which may be one of tensors."""

    def slope(x: Array) -> Array:
        flat = np.array(x, dtype=np.float64).reshape(-1)
        try:
            value = derivative(flat)
        except (TypeError, AttributeError):
            value = derivative(_tensor(flat))
        # A constant derivative may come back as one number.
        return np.broadcast_to(_array(value), flat.shape).reshape(np.shape(x)).copy()

    return slope


def _checked_slope(slope: Curve) -> Curve:
    def checked(x: Array) -> Array:
        value = slope(x)
        if not np.isfinite(value).all():
            where = x[~np.isfinite(value)][0]
            raise InputError(
                f"the derivative is {value[~np.isfinite(value)][0]} at x = {where:g}; it must be "
                "finite on the whole domain: choose a domain that leaves this point out"
            )
        return value

    return checked


def _array(values: Any) -> Array:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def _weight(weight: Weight, domain: tuple[float, float] | None) -> tuple[Curve, Array]:
    """w as a checked function, and the points at which it jumps."""
    nowhere = np.empty(0)
    if isinstance(weight, str):
        _check_choice("weight", weight, ("uniform",))
        return np.ones_like, nowhere
    if callable(weight):
        return _checked_weight(weight), nowhere
    if isinstance(weight, tuple) and len(weight) == 2:
        if isinstance(weight[0], str):
            return _normal(*weight), nowhere
        return _histogram(_array(weight[0]), _array(weight[1]))
    return _histogram(*_binned(_array(weight), domain))


def _checked_weight(weight: Curve) -> Curve:
    def checked(x: Array) -> Array:
        value = np.broadcast_to(np.asarray(weight(x), dtype=np.float64), np.shape(x))
        if bad := x[~(np.isfinite(value) & (value >= 0))].tolist():
            raise InputError(
                f"weight(x) is negative or not finite at x = {bad[0]:g}; w is a density: clip or "
                "mask it there"
            )
        return value

    return checked


def _normal(name: str, sigma: Any) -> Curve:
    _check_choice("weight", name, ("normal",))
    if not (isinstance(sigma, int | float) and 0 < sigma < math.inf):
        raise InputError(f"weight=('normal', {sigma!r}): expected a positive standard deviation")
    return lambda x: np.exp(-0.5 * (x / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))


def _binned(samples: Array, domain: tuple[float, float] | None) -> tuple[Array, Array]:
    """A histogram whose bins hold equally many samples: fine where they crowd, and outliers cost
    one bin rather than the resolution of all."""
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise InputError(
            f"weight: samples of shape {samples.shape}; expected a 1-D array of finite numbers: "
            "flatten it and drop what is not finite"
        )
    if domain is not None:
        samples = samples[(samples >= domain[0]) & (samples <= domain[1])]
    if len(np.unique(samples)) < 2:
        raise InputError(
            "weight: fewer than two distinct samples inside the domain: pass more, or widen it"
        )
    bins = min(256, math.isqrt(len(samples)))
    counts, edges = np.histogram(
        samples, np.unique(np.quantile(samples, np.linspace(0, 1, bins + 1)))
    )
    return counts.astype(np.float64), edges


def _histogram(counts: Array, edges: Array) -> tuple[Curve, Array]:
    if counts.ndim != 1 or edges.shape != (len(counts) + 1,) or not len(counts):
        raise InputError(
            f"weight: counts of shape {counts.shape} with edges of shape {edges.shape}; expected n "
            "counts and n + 1 edges, as numpy.histogram returns"
        )
    if not (np.isfinite(edges).all() and (np.diff(edges) > 0).all()):
        raise InputError("weight: histogram edges must be finite and increasing: sort them")
    if not (np.isfinite(counts).all() and (counts >= 0).all() and counts.sum() > 0):
        raise InputError(
            "weight: histogram counts must be finite, not negative, and not all zero: recount"
        )
    density = np.concatenate(([0.0], counts / counts.sum() / np.diff(edges), [0.0]))
    return lambda x: density[np.searchsorted(edges, x, side="right")], edges


def _fold(density: Curve) -> Curve:
    return lambda x: density(x) + density(-x)


def _parity(
    parity: Parity | Literal["auto"], slope: Curve, density: Curve, domain: tuple[float, float]
) -> Parity:
    """The parity to use; raises `InputError` where f' lacks the one asked for."""
    if parity == "none":
        return "none"
    if domain[0] != -domain[1]:
        if parity == "auto":
            return "none"
        raise InputError(
            f"domain={domain} with parity {parity!r}, which needs (-m, m): "
            "choose such a domain, or parity 'none'"
        )
    ends = np.linspace(0, domain[1], _SCAN)
    x = (ends[1:] + ends[:-1]) / 2  # Between round numbers, at which f' may jump.
    left, right = slope(-x), slope(x)
    has = {
        "even": _vanishes(right - left, right),
        "complement": _vanishes(right + left - 1, np.ones(1)),
    }
    if parity == "auto":
        if has["even"]:
            return "even"
        symmetric = _vanishes(density(x) - density(-x), density(x))
        return "complement" if has["complement"] and symmetric else "none"
    if not has[parity]:
        identity = {"even": "f'(-x) = f'(x)", "complement": "f'(x) + f'(-x) = 1"}[parity]
        raise InputError(f"parity={parity!r}: {identity} does not hold on {domain}; use 'auto'")
    return parity


def _vanishes(difference: Array, scale: Array) -> bool:
    return bool(abs(difference).max() <= 1e-7 * abs(scale).max())


def _tail_levels(curve: Curve, pin_tails: PinTails) -> tuple[float | None, float | None]:
    """The limits of f' at -infinity and infinity, None for a side that is to stay free."""
    if not pin_tails:
        return None, None
    limits = _limit(curve, -1), _limit(curve, 1)
    if pin_tails is True and None in limits:
        raise InputError(
            "pin_tails=True, but f' has no finite limit at "
            f"{'-infinity' if limits[0] is None else 'infinity'}: use pin_tails='where_bounded', "
            "which leaves that tail free"
        )
    return limits


def _limit(curve: Curve, sign: int) -> float | None:
    with np.errstate(all="ignore"):
        near, far = curve(sign * np.array([1e12, 1e15])).tolist()
    if not abs(near - far) <= 1e-9 * max(1, abs(far)):
        return None
    return float(round(far, 12))  # Softsign's 1e-30 is its 0.


# ---- The search, on an interval


# Cells in which f' is scanned for jumps and for how fast it changes.
_SCAN = 2048

# Gauss-Legendre rule of a cell: exact to the last digits, as cells are short and f' smooth inside.
_POINTS, _POINT_WEIGHTS = np.polynomial.legendre.leggauss(8)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Minimise E on (low, high) with a number of intervals; the outermost levels may be given.

    `grid` are the nodes of the cells of integration, which the dynamic programme takes as candidate
    borders. `jumps` are nodes at which f' jumps; `low` and `high` are among the nodes.
    """

    slope: Curve
    density: Curve
    grid: Array
    jumps: Array
    pieces: int
    first: float | None
    last: float | None

    @property
    def low(self) -> float:
        return float(self.grid[0])

    @property
    def high(self) -> float:
        return float(self.grid[-1])

    def bounds(self, borders: Array) -> Array:
        return np.concatenate(([self.low], borders, [self.high]))


def _problem(
    slope: Curve,
    density: Curve,
    low: float,
    high: float,
    edges: Array,
    pieces: int,
    first: float | None,
    last: float | None,
) -> _Problem:
    # Zero, for that is where the derivatives of activations have their kinks.
    knots = np.unique(np.clip([low, 0.0, high, *edges], low, high))
    scan = np.union1d(np.linspace(low, high, _SCAN + 1), knots)
    jumps = _jumps(slope, scan)
    knots = np.union1d(knots, jumps)
    # Up to 6 bits no finer grid leads to a lower E. Of functions that rise and fall (GELU, Mish) 7
    # and 8 bits may end in a neighbouring optimum, up to 0.2% above the best that 12 cells find.
    nodes = _adaptive_nodes(slope, density, scan, cells=max(512, 6 * pieces))
    # A node next to a knot would only make a cell too short to matter.
    distance = abs(nodes[:, None] - knots[None, :]).min(axis=1)
    grid = np.union1d(nodes[distance > 1e-9 * (high - low)], knots)
    problem = _Problem(slope, density, grid, jumps, pieces, first, last)
    if not _quadrature(problem, grid)[1].sum() > 0:
        raise InputError("weight: zero on the whole domain; widen the domain or change the weight")
    return problem


def _jumps(slope: Curve, nodes: Array) -> Array:
    """Where f' jumps: every cell is halved, toward the half in which f' changes more, until floats
    end; what has not flattened by then is a jump. One at a node is given as that node."""
    left, right = nodes[:-1], nodes[1:]
    at_left, at_right = slope(left), slope(right)
    tolerance = 1e-9 * max(1e-3, float(np.ptp(at_left)))
    for _ in range(48):
        steep = abs(at_right - at_left) > tolerance
        left, right, at_left, at_right = (part[steep] for part in (left, right, at_left, at_right))
        if not len(left):
            break
        middle = (left + right) / 2
        at_middle = slope(middle)
        later = abs(at_right - at_middle) > abs(at_middle - at_left)
        left, at_left = np.where(later, (middle, at_middle), (left, at_left))
        right, at_right = np.where(later, (right, at_right), (middle, at_middle))
    return np.unique(np.where(np.isin(right, nodes), right, left))


def _adaptive_nodes(slope: Curve, density: Curve, scan: Array, cells: int) -> Array:
    """Nodes for a tenth spread evenly, for a tenth like w, and for the rest as the borders of many
    levels are: like (w f''^2)^(1/3)."""
    width = np.diff(scan)
    mass = density((scan[1:] + scan[:-1]) / 2) * width
    change = np.cbrt(mass * np.diff(slope(scan)) ** 2)
    share = sum(
        part * (portion / part.sum())
        for part, portion in ((width, 0.1), (mass, 0.1), (change, 0.8))
        if part.sum() > 0
    )
    reached = np.concatenate(([0.0], np.cumsum(share)))
    return np.interp(np.linspace(0, reached[-1], cells + 1), reached, scan)


def _quadrature(problem: _Problem, edges: Array) -> tuple[Array, Array]:
    """Points x and their shares of the integral of w; one row per cell between edges."""
    half = np.diff(edges)[:, None] / 2
    x = edges[:-1, None] + half * (1 + _POINTS)
    return x, problem.density(x) * half * _POINT_WEIGHTS


def _samples(problem: _Problem, borders: Array) -> tuple[npt.NDArray[np.intp], Array, Array]:
    """For cells that no border cuts: the interval each lies in, shares of the integral of w, f'."""
    edges = np.union1d(problem.grid, borders)
    x, mass = _quadrature(problem, edges)
    return np.searchsorted(borders, x[:, 0]), mass, problem.slope(x)


def _solve(problem: _Problem) -> tuple[Array, Array]:
    """The borders and levels that minimise E."""
    _, mass, slope = _samples(problem, np.empty(0))
    weight, first, second = (
        np.concatenate(([0.0], np.cumsum((mass * slope**power).sum(axis=1)))) for power in range(3)
    )
    cuts, _ = _optimal_intervals(weight, first, second, problem.pieces, problem.first, problem.last)
    borders = _polish(problem, problem.grid[cuts])
    return borders, _best_levels(problem, borders)[0]


def _optimal_intervals(
    weight_prefix: Array,
    first_prefix: Array,
    second_prefix: Array,
    pieces: int,
    first: float | None = None,
    last: float | None = None,
) -> tuple[npt.NDArray[np.intp], float]:
    """The cuts of n cells into intervals of least total cost, and that cost.

    With prefix integrals W of w, A of w f' and Q of w f'^2 at the n + 1 nodes, the nodes i < j
    bound an interval that costs

        c(i, j) = (Q_j - Q_i) - (A_j - A_i)^2 / (W_j - W_i)            under its best level,
        c(i, j) = (Q_j - Q_i) - 2 l (A_j - A_i) + l^2 (W_j - W_i)      under a given level l,

    `first` and `last` being the given levels of the outermost intervals, if any. The least cost of
    cutting the cells before node j into k intervals is

        D_1(j) = c(0, j),    D_k(j) = min over i < j of D_{k-1}(i) + c(i, j),

    and the minimising i, followed back from j = n, are the cuts: O(pieces n^2) time, O(n^2) memory.
    Intervals are not empty, so pieces beyond n are left out.
    """
    cells = len(weight_prefix) - 1
    pieces = min(pieces, cells)

    def given(level: float, i: slice, j: slice) -> Array:
        weight, mean, square = (
            prefix[j] - prefix[i] for prefix in (weight_prefix, first_prefix, second_prefix)
        )
        return square - 2 * level * mean + level**2 * weight

    # Row j, column i, so that the minimum runs along memory.
    weight, mean, square = (
        prefix[:, None] - prefix[None, :] for prefix in (weight_prefix, first_prefix, second_prefix)
    )
    explained = np.divide(mean**2, weight, out=np.zeros_like(weight), where=weight > 0)
    cost = np.where(np.tri(cells + 1, k=-1, dtype=bool), square - explained, np.inf)

    everything = slice(None)
    to_end = cost[-1] if last is None else given(last, everything, slice(-1, None))
    from_start = cost[:, 0] if first is None else given(first, slice(0, 1), everything)
    to_end[-1] = from_start[0] = np.inf
    if pieces == 1:
        only = from_start[-1] if last is None else to_end[0]
        return np.empty(0, dtype=np.intp), float(only)

    best = from_start
    chosen = []
    for _ in range(pieces - 2):
        total = best + cost
        chosen.append(total.argmin(axis=1))
        best = total.min(axis=1)
    total = best + to_end
    cuts = [int(total.argmin())]
    for choice in reversed(chosen):
        cuts.append(int(choice[cuts[-1]]))
    return np.array(cuts[::-1]), float(total.min())


def _best_levels(problem: _Problem, borders: Array) -> tuple[Array, Array, float]:
    """The levels that minimise E for these borders, the weight of each interval, and E."""
    piece, mass, slope = _samples(problem, borders)
    count = len(borders) + 1
    weight = np.bincount(piece, mass.sum(axis=1), count).astype(np.float64)
    total = np.bincount(piece, (mass * slope).sum(axis=1), count).astype(np.float64)
    # Where w is zero E leaves the level open: f' in the middle is never far wrong.
    bounds = problem.bounds(borders)
    levels = problem.slope((bounds[1:] + bounds[:-1]) / 2)
    np.divide(total, weight, out=levels, where=weight > 0)
    if problem.first is not None:
        levels[0] = problem.first
    if problem.last is not None:
        levels[-1] = problem.last
    return levels, weight, float((mass * (slope - levels[piece][:, None]) ** 2).sum())


def _error(problem: _Problem, borders: Array, levels: Array) -> float:
    piece, mass, slope = _samples(problem, borders)
    return float((mass * (slope - levels[piece][:, None]) ** 2).sum())


# ---- The polish


def _polish(problem: _Problem, borders: Array) -> Array:
    """Moves borders from the grid to the optimum nearby.

    With r_i = f'(s_i) - (l_i + l_{i+1}) / 2 and each level at its best,

        dE/ds_i = 2 w(s_i) (l_{i+1} - l_i) r_i,
        dl_i/ds_i = w(s_i) (f'(s_i) - l_i) / W_i,
        dl_{i+1}/ds_i = -w(s_i) (f'(s_i) - l_{i+1}) / W_{i+1},

    W_i the weight of interval i: r = 0 is solved by Newton's method, with a tridiagonal Jacobian. A
    step that would raise E is damped toward Lloyd's method, which holds the levels fixed. Borders
    do not pass a jump of f', and stay on one from which E ascends on both sides.
    """
    if not len(borders):
        return borders
    levels, weight, error = _best_levels(problem, borders)
    damping = 0.0
    for _ in range(100):
        step = _newton_step(problem, borders, levels, weight, damping)
        trial = _bounded(problem, borders, borders + step)
        trial_levels, trial_weight, trial_error = _best_levels(problem, trial)
        # The tolerance is the noise of E; without it the last steps would look like ascents.
        if (np.diff(problem.bounds(trial)) > 0).all() and trial_error <= error * (1 + 1e-11):
            settled = abs(trial - borders).max() <= 1e-10 * (problem.high - problem.low)
            borders, levels, weight, error = trial, trial_levels, trial_weight, trial_error
            damping = damping / 8 if damping > 1e-2 else 0.0
            if settled:
                break
        else:
            damping = max(4 * damping, 1e-2)
            if damping > 1e9:
                break
    return borders


def _newton_step(
    problem: _Problem, borders: Array, levels: Array, weight: Array, damping: float
) -> Array:
    width, spread = problem.high - problem.low, np.ptp(levels)
    change = np.diff(levels)
    middle = (levels[1:] + levels[:-1]) / 2

    near = 1e-7 * width
    sides = problem.slope(borders[:, None] + np.array([-near, near]))
    at_jump = np.isin(borders, problem.jumps)
    ascends = change[:, None] * (sides - middle[:, None]) * [-1, 1] > 0
    # A border that leaves a jump sees f' on the side it goes to.
    side = np.where(ascends[:, 0], sides[:, 1], sides[:, 0])
    slope = np.where(at_jump, side, problem.slope(borders))
    curvature = np.where(at_jump, 0.0, (sides[:, 1] - sides[:, 0]) / (2 * near))
    density = problem.density(borders)

    # The others have no say in E, or nowhere better to go.
    free = (density > 0) & (abs(change) > 1e-12 * spread) & ~(at_jump & ascends.all(axis=1))
    if not free.any():
        return np.zeros_like(borders)

    with np.errstate(divide="ignore", invalid="ignore"):
        from_left = density * (slope - levels[:-1]) / weight[:-1]  # dl_i / ds_i
        from_right = -density * (slope - levels[1:]) / weight[1:]  # dl_{i+1} / ds_i
    if problem.first is not None:
        from_left[0] = 0.0
    if problem.last is not None:
        from_right[-1] = 0.0
    lloyd = np.sign(change) * np.maximum(abs(curvature), 1e-6 * spread / width)
    jacobian = np.diag(curvature + damping * lloyd - (from_left + from_right) / 2)
    jacobian -= np.diag(from_right[:-1] / 2, -1) + np.diag(from_left[1:] / 2, 1)

    jacobian, residual = jacobian[np.ix_(free, free)], (slope - middle)[free]
    step = np.zeros_like(borders)
    try:
        step[free] = -np.linalg.solve(jacobian, residual)
    except np.linalg.LinAlgError:
        # Where f' is linear E can be level in some direction: take the shortest of the steps.
        step[free] = -np.linalg.lstsq(jacobian, residual)[0]
    return step


def _bounded(problem: _Problem, borders: Array, trial: Array) -> Array:
    stops = np.unique(np.concatenate(([problem.low, problem.high], problem.jumps)))
    below = stops[np.maximum(np.searchsorted(stops, borders, "left") - 1, 0)]
    above = stops[np.minimum(np.searchsorted(stops, borders, "right"), len(stops) - 1)]
    return np.clip(trial, below, above)


# ---- The other objective


def _match_primitive(
    problem: _Problem, values: Curve, borders: Array, start: float | None
) -> tuple[Array, Array]:
    """Borders and slopes of the continuous, piecewise linear h nearest to f: least integral of
    w (f - h)^2.

    h(x) = c + sum over i of l_i b_i(x), b_i(x) the length of (low, x) within interval i. For given
    borders c (unless given as `start`) and the free slopes are a linear least-squares problem
    (variable projection), and dh/ds_i = l_i - l_{i+1} for x > s_i gives the gradient in borders.
    """
    # Costs a tenth of importing torch, for an objective that most programs never ask for.
    from scipy.optimize import minimize

    width = problem.high - problem.low

    def place(z: Array) -> Array:
        """Any z to borders in order: the gaps are width * softmax(z)."""
        gaps = np.exp(z - z.max())
        return problem.low + width * np.cumsum(gaps / gaps.sum())[:-1]

    def objective(z: Array) -> tuple[float, Array]:
        _, error, by_border = _primitive_slopes(problem, values, place(z), start)
        gaps = np.exp(z - z.max())
        gaps /= gaps.sum()
        by_gap = width * np.append(np.cumsum(by_border[::-1])[::-1], 0.0)
        # Scaled, since the optimiser's tolerances are for functions of order 1.
        return error / scale, gaps * (by_gap - gaps @ by_gap) / scale

    scale = max(_primitive_slopes(problem, values, borders, start)[1], 1e-300)
    z = np.log(np.diff(problem.bounds(borders)))
    found = minimize(
        objective, z, jac=True, method="L-BFGS-B", options={"ftol": 1e-12, "maxiter": 100}
    )
    borders = place(found.x)
    return borders, _primitive_slopes(problem, values, borders, start)[0]


def _primitive_slopes(
    problem: _Problem, values: Curve, borders: Array, start: float | None
) -> tuple[Array, float, Array]:
    """The best slopes for these borders, the integral of w (f - h)^2, and its gradient in them."""
    bounds = problem.bounds(borders)
    x, mass = (part.reshape(-1) for part in _quadrature(problem, np.union1d(problem.grid, borders)))
    piece = np.searchsorted(borders, x)
    offset = x - bounds[piece]
    target = values(x)

    # h is at_left @ unknowns + l_i offset on interval i, for the unknowns c, l_0, l_1, ...
    count = len(bounds) - 1
    at_left = np.column_stack((np.ones(count), np.tri(count, k=-1) * np.diff(bounds)))
    slopes = np.eye(count, count + 1, 1)
    chords = np.diff(values(bounds)) / np.diff(bounds)
    unknowns = np.append(values(bounds[:1]), chords)
    free = np.ones(count + 1, dtype=bool)
    for place, given in ((0, start), (1, problem.first), (-1, problem.last)):
        if given is not None:
            unknowns[place], free[place] = given, False

    def moment(of: Array) -> Array:
        return np.bincount(piece, mass * of, count).astype(np.float64)

    def misfit() -> Array:
        return (at_left @ unknowns)[piece] + unknowns[1:][piece] * offset - target

    cross = at_left.T @ (moment(offset)[:, None] * slopes)
    normal = at_left.T @ (moment(np.ones_like(x))[:, None] * at_left) + cross + cross.T
    normal += slopes.T @ (moment(offset**2)[:, None] * slopes)
    # Where w is zero slopes are open; the ridge keeps them at the chords of f.
    normal += np.diag(np.full(len(normal), 1e-14 * normal.max()))
    error = misfit()
    downhill = at_left.T @ moment(error) + slopes.T @ moment(error * offset)
    unknowns[free] -= np.linalg.solve(normal[np.ix_(free, free)], downhill[free])

    error = misfit()
    right_of = np.cumsum(moment(2 * error)[::-1])[::-1][1:]
    return unknowns[1:], float(mass @ error**2), -np.diff(unknowns[1:]) * right_of


# ---- Rounding


def _round(values: Sequence[float] | Array, digits: int = DIGITS) -> tuple[float, ...]:
    return tuple(float(f"{value:.{digits}g}") + 0.0 for value in values)  # + 0.0 drops a sign of 0.


def _round_distinct(borders: Array) -> tuple[float, ...]:
    """Rounded borders; as they are where the domain is so short that rounding would merge some."""
    rounded = _round(borders)
    return rounded if len(set(rounded)) == len(rounded) else tuple(borders.tolist())
