"""Simulates every kind of sketch at a larger size and compares with the closed forms.

    python tools/sketch_variance.py --draws 4000

For each kind: the bias over its standard error (root mean square over the entries, 1 where there is
none, and the largest), the measured variance over the closed form of `packlight.sketch.variance`,
and that over the batch's own noise. Fails where an entry is 5 standard errors off, or a variance
3% from its closed form.
"""

import argparse
import sys
import time

import torch
from torch import Tensor

from packlight import sketch
from packlight.sketch import ops
from packlight.sketch.method import KINDS, ROW_KINDS, Kind, Sketch


def example(tokens: int, features: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Correlated rows of different weight, the heavy ones together, a tenth of them padding."""
    weight = torch.linspace(0.1, 2.0, tokens)[:, None] * (torch.rand(tokens, 1) + 0.5)
    x = (torch.randn(tokens, features) + 0.5) * weight
    x[-tokens // 10 :] = 0
    return x, torch.randn(tokens, outputs) * weight + 0.3 * x[:, :1]


class Moments:
    """Running mean and mean square of the error, entry by entry, in float64."""

    def __init__(self, exact: Tensor) -> None:
        self.exact = exact
        self.sum = torch.zeros_like(exact, dtype=torch.float64)
        self.squares = torch.zeros_like(self.sum)
        self.count = 0

    def add(self, gradient: Tensor) -> None:
        error = (gradient - self.exact).double()
        self.sum += error
        self.squares += error.square()
        self.count += 1

    @property
    def bias(self) -> Tensor:
        """In standard errors."""
        return self.sum / self.squares.sqrt()

    @property
    def variance(self) -> float:
        return (self.squares.sum() / self.count).item()


def simulate(x: Tensor, g: Tensor, kind: Kind, rows: int, draws: int) -> Moments:
    moments = Moments(g.t() @ x)
    total = g.sum(0) if kind in ROW_KINDS else None
    for _ in range(draws):
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
        kept = ops.keep(x, seed, kind, rows, x.dtype)
        moments.add(ops.weight_gradient(g, kept, total, kind, rows, x.shape[1], x.dtype))
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--outputs", type=int, default=24)
    parser.add_argument("--rows", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    x, g = example(options.tokens, options.features, options.outputs)
    x, g = x.to(options.device), g.to(options.device)
    own = sketch.sample_variance(x, g).item()
    failed = False
    for share in options.rows:
        for kind in options.kinds:
            started = time.perf_counter()
            rows = Sketch(share).row_count(options.tokens)
            moments = simulate(x, g, kind, rows, options.draws)
            expected = sketch.variance(x, g, kind, rows).item()
            ratio = moments.variance / expected
            bias, worst = (
                moments.bias.square().mean().sqrt().item(),
                moments.bias.abs().max().item(),
            )
            wrong = abs(ratio - 1) > 0.03 or worst > 5
            failed |= wrong
            print(
                f"{kind:10s} {share}: bias {bias:.2f} standard errors, at most {worst:.2f};"
                f" variance {ratio:.4f} of the closed form, {expected / own:.2f} of the batch's"
                f" own; {time.perf_counter() - started:.0f} s"
                f"{'  WRONG' if wrong else ''}",
                flush=True,
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
