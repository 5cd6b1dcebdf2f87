"""Fits the polynomials of the 16-bit GELU kernel: log2 Phi(-t) = P(t) on 0 <= t <= 6.

    python tools/fit_gelu.py

Phi(-t) = 2^P(t), so the absolute error of P, times ln 2, is the relative error of Phi. The minimax
fit is a linear programme: minimise e with |V c - y| <= e at closely spaced points. Odd degrees end
in a negative coefficient, so that P falls to -inf beyond the fitted range.
"""

import numpy as np
from scipy.optimize import linprog
from scipy.special import log_ndtr

END = 6.0


def fit(degree: int) -> tuple[np.ndarray, float]:
    """Coefficients from the constant up, and the relative error of Phi with them in float32."""
    t = np.linspace(0, END, 1500)
    y = log_ndtr(-t) / np.log(2)
    powers = np.vander(t / END, degree + 1, increasing=True)
    ones = np.ones((len(t), 1))
    result = linprog(
        np.r_[np.zeros(degree + 1), 1],
        A_ub=np.block([[powers, -ones], [-powers, -ones]]),
        b_ub=np.r_[y, -y],
        bounds=[(None, None)] * (degree + 1) + [(0, None)],
        method="highs",
    )
    coefficients = (result.x[:-1] / END ** np.arange(degree + 1)).astype(np.float32)
    fitted = np.polyval(coefficients[::-1].astype(np.float64), t)
    return coefficients, float(np.abs(np.exp2(fitted - y) - 1).max())


def main() -> None:
    for degree in (5, 7):
        coefficients, error = fit(degree)
        print(f"degree {degree}, relative error {error:.1e}")
        for i, value in enumerate(coefficients):
            print(f"P{degree}_{i} = tl.constexpr({float(value):.9g})")


if __name__ == "__main__":
    main()
