"""The method object of inverted layers."""

import dataclasses

from packlight.method import Method


@dataclasses.dataclass(frozen=True)
class Inverted(Method):
    """Keep a layer's output, which the next layer keeps anyway, in place of its input.

    Activations keep the output and, where the function has a minimum, 1 bit an element that says on
    which side of it the input lay; the gradient is dy * f'(f^-1(y, bit)). Norms keep the output and
    their statistics. Exact up to the rounding of the output. Nothing is saved where the consumer
    keeps no input of its own, a residual addition for instance, and the output must be left as it
    is: a consumer that quantises or sketches it keeps another tensor. Source: Novikov and Oseledets
    2024, arXiv 2407.15545.
    """
