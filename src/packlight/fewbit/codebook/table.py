"""The codebook itself: borders and levels, and how they code a derivative."""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from packlight._files import replaced
from packlight.errors import InputError, MissingDependencyError
from packlight.fewbit.codebook.curves import Array, by_autograd

Parity = Literal["none", "even", "odd"]

DEFAULT_DOMAIN = (-10.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Borders and levels that code a derivative in `bits` bits.

    The code of x, and with it q(x) = levels[code], follows from t = x - center and `parity`:

    - `"none"`: code = number of borders < t; 2^bits - 1 borders.
    - `"even"`, for f'(center - t) = f'(center + t): code = number of borders < |t|; 2^bits - 1
      borders, all >= 0.
    - `"odd"`, for f'(center + t) + f'(center - t) = 2 m (GELU: center 0, m = 1/2): code =
      signbit(t) half + number of borders < |t|, with half = 2^(bits-1); half - 1 borders, all > 0,
      and levels[i] + levels[half + i] = 2 m for all i.

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
    center: float = 0.0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_choice("parity", self.parity, get_args(Parity))
        low, high = checked_domain(self.domain)
        object.__setattr__(self, "domain", (low, high))
        object.__setattr__(self, "center", float(self.center))
        if not math.isfinite(self.center):
            raise InputError(f"center={self.center} must be finite: where is f' symmetric?")
        object.__setattr__(self, "borders", tuple(float(border) for border in self.borders))
        object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))
        self._check_borders()
        self._check_levels()

    def _check_borders(self) -> None:
        expected = count_pieces(self.bits, self.parity) - 1
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
        if (self.parity == "even" and least < 0) or (self.parity == "odd" and least <= 0):
            raise InputError(
                f"border {least}; a codebook of parity {self.parity!r} compares borders with "
                "|x - center|: keep the positive ones"
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
        sums = [left + right for left, right in zip(self.levels, self.levels[half:], strict=False)]
        if self.parity == "odd" and max(sums) - min(sums) > 1e-6 * max(map(abs, self.levels)):
            raise InputError(
                f"levels {self.levels}: parity 'odd' needs the same levels[i] + levels[{half} + i] "
                "for all i; set the second half so"
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
        x = np.asarray(x, dtype=np.float64) - self.center
        magnitude = x if self.parity == "none" else np.abs(x)
        code = np.searchsorted(self.borders, magnitude, side="left")
        code = np.where(np.isnan(x), 0, code)
        if self.parity == "odd":
            code = code + np.signbit(x) * 2 ** (self.bits - 1)
        return code.astype(np.uint8)

    def derivative(self, x: npt.ArrayLike) -> Array:
        """q(x), what the codes of x give in place of f'(x)."""
        return np.asarray(self.levels)[self.encode(x)]

    def __repr__(self) -> str:
        """As it is called; fields that are as usual are left out, an unknown error among them."""
        fields = dataclasses.fields(self)
        values = {field.name: getattr(self, field.name) for field in fields}
        shown = [
            f"{field.name}={values[field.name]!r}"
            for field in fields
            if not _is_same(values[field.name], field.default)
        ]
        return f"Codebook({', '.join(shown)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; an unknown error is None."""
        error = None if math.isnan(self.error) else self.error
        lists = {name: list(getattr(self, name)) for name in ("domain", "borders", "levels")}
        return {**dataclasses.asdict(self), "error": error, **lists}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Codebook":
        """The inverse of `to_dict`. Raises `InputError` for a missing or unknown field."""
        expected = {field.name for field in dataclasses.fields(Codebook)}
        if set(data) != expected:
            raise InputError(
                f"codebook fields {sorted(data)}; expected {sorted(expected)}: pass what "
                "`Codebook.to_dict` returned"
            )
        error = math.nan if data["error"] is None else data["error"]
        return Codebook(**{**data, "error": error})

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
        x = np.linspace(*self._shown(), 2001)
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        if f is not None:
            axes.plot(x, by_autograd(f)(x), color="0.72", linewidth=4, label="f'")
        axes.plot(x, self.derivative(x), color="#0b62c4", label=f"q, {self.bits}-bit codes")
        axes.set_xlabel("x")
        axes.legend(frameon=False)
        axes.grid(color="0.92", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        if path is not None:
            with replaced(path) as beside:
                figure.savefig(beside)
            plt.close(figure)
        return figure

    def _shown(self) -> tuple[float, float]:
        """The part of the domain around the borders, with as much again to both sides."""
        low, high = self.domain
        if not self.borders:
            return low, high
        left = self.borders[0] if self.parity == "none" else -self.borders[-1]
        margin = max((self.borders[-1] - left) / 2, 1e-2 * (high - low))
        first, last = self.center + left - margin, self.center + self.borders[-1] + margin
        return max(low, first), min(high, last)


def check_codebook(codebook: object) -> Codebook:
    """`codebook` if it is one, else an `InputError`."""
    if not isinstance(codebook, Codebook):
        raise InputError(
            f"codebook={codebook!r} is not a Codebook; fit_codebook(f, bits) makes one"
        )
    return codebook


def check_bits(bits: object) -> int:
    """`bits` if it is a whole number from 1 to 8, else an `InputError`."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
        raise InputError(f"bits={bits!r} is not a whole number from 1 to 8; 3 is a good start")
    return bits


def count_pieces(bits: int, parity: str) -> int:
    """The number of intervals that are searched: on the line, or on one side of the centre."""
    return 1 << (bits - 1 if parity == "odd" else bits)


def _is_same(value: object, default: object) -> bool:
    return value == default or (value != value and default != default)  # NaN


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    # With types, for True == 1.
    if (type(value), value) not in [(type(choice), choice) for choice in choices]:
        raise InputError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")


def checked_domain(domain: Sequence[float]) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in domain)
    except (TypeError, ValueError):
        raise InputError(f"domain={domain!r}: expected two numbers (low, high)") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"domain={domain!r}: expected two finite numbers, low < high")
    return low, high
