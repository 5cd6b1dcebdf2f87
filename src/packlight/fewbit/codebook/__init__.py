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

from packlight.fewbit.codebook.belonging import why_of_another
from packlight.fewbit.codebook.defaults import Weighted, default_codebook, solve_default
from packlight.fewbit.codebook.fitting import fit_codebook
from packlight.fewbit.codebook.table import Codebook, check_bits, check_codebook
from packlight.fewbit.codebook.weights import Weight, plain_weight

__all__ = [
    "Codebook",
    "Weight",
    "Weighted",
    "check_bits",
    "check_codebook",
    "default_codebook",
    "fit_codebook",
    "plain_weight",
    "solve_default",
    "why_of_another",
]
