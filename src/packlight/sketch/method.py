"""The method object of sketches, and how rows are cut into blocks."""

import dataclasses
from typing import Literal, NamedTuple, get_args

from packlight.errors import InputError
from packlight.method import Method

Kind = Literal["gaussian", "rademacher", "srht", "dct", "dft", "rows", "rows_norm", "top_rows"]

KINDS: tuple[str, ...] = get_args(Kind)
# S is an orthogonal transform of randomly signed rows, of which some rows are taken.
TRANSFORMS = ("srht", "dct", "dft")
# S takes rows of the tensor as they are.
ROW_KINDS = ("rows", "rows_norm", "top_rows")

_MILLION = 1_000_000


@dataclasses.dataclass(frozen=True)
class Sketch(Method):
    """Keep p rows S^T X in place of the B rows of a linear layer's input X, one row a token.

    S [B, p] is random with E[S S^T] = I and is drawn anew at every forward pass, so that the weight
    gradient (S^T G)^T (S^T X) is an **unbiased** estimate of G^T X, for every kind. Gradients of
    input and bias are exact. Keeps p rows of the input's dtype, a share p / B of what torch keeps,
    and a seed of 8 bytes; the row kinds keep 8 bytes a row in its place.

    | kind | rows of S^T X |
    | --- | --- |
    | `gaussian`, `rademacher` | sums of all rows, with normal weights or random signs |
    | `srht` | rows of a Hadamard transform of randomly signed rows, taken without replacement |
    | `dct`, `dft` | the same, of a cosine or a real Fourier transform |
    | `rows` | rows of X, uniformly and without replacement, of those that are not all zero |
    | `rows_norm` | rows of X, with probability proportional to their norm, with replacement |
    | `top_rows` | the heaviest rows surely, the rest as `rows_norm` (winner-take-all) |

    `docs/sketch.md` gives the variances, and `packlight.sketch.variance` computes them. `rows` is
    the default: of its variance it is known beforehand that it is B / p - 1 times that of the batch
    itself, and on real layers the others were above that more often than below. Sources:
    Bershatsky et al. 2022, arXiv 2201.13195; WTA-CRS, NeurIPS 2023, arXiv 2305.15265.

    Args:
        rows: p as a share of the tokens, a float up to 1.0, or as a number, an int.
        kind: one of the table.
        min_rows: a share is never fewer rows than this; with fewer tokens the layer is exact.
        max_rows: a share is never more rows than this.

    Where p is not below the number of tokens the layer keeps its input exactly, as torch does.
    """

    rows: float | int = 0.2
    kind: Kind = "rows"
    min_rows: int = 16
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind={self.kind!r} is none of {', '.join(KINDS)}")
        if isinstance(self.rows, bool) or not isinstance(self.rows, (int, float)):
            raise InputError(
                f"rows={self.rows!r} is neither a share (a float up to 1.0) nor a number of rows"
            )
        if not self.rows > 0:
            raise InputError(f"rows={self.rows!r} keeps nothing; 0.2 is a good start")
        if isinstance(self.rows, float) and self.rows > 1:
            raise InputError(
                f"rows={self.rows!r} is a share above 1; give an int for a number of rows"
            )
        _check_bound("min_rows", self.min_rows)
        if self.max_rows is not None:
            _check_bound("max_rows", self.max_rows)
            if self.max_rows < self.min_rows:
                raise InputError(f"max_rows={self.max_rows} is below min_rows={self.min_rows}")

    def row_count(self, tokens: int) -> int:
        """p for so many tokens; not below `tokens` where the input is to be kept exactly."""
        if tokens < self.min_rows:
            return tokens
        if isinstance(self.rows, int):
            return self.rows
        # In whole numbers, which torch.compile follows where the number of tokens varies.
        share = int(self.rows * _MILLION + 0.5)
        count = max((tokens * share + _MILLION // 2) // _MILLION, self.min_rows)
        return count if self.max_rows is None else min(count, self.max_rows)


def _check_bound(name: str, bound: object) -> None:
    if not isinstance(bound, int) or isinstance(bound, bool) or bound < 1:
        raise InputError(f"{name}={bound!r} is not a number of rows, 1 or more")


class Blocks(NamedTuple):
    """How the transforms cut B rows into `number` blocks of `length` rows each, a power of two.

    Row b lies in stratum a = b // number, which sends one row to every block: the row that stands
    (k + shift_a) mod number behind the stratum's first goes to place a of block k, with a random
    shift for each stratum. So a block is a sample of the whole batch, however tokens are ordered,
    and the variance is that of one transform over all rows. Rows past the B-th are zero.

    Block k gives `block_rows(k)` rows of the p: p / number, rounded up in the first `extra` blocks.
    """

    length: int
    number: int
    base: int
    extra: int

    @staticmethod
    def of(tokens: int, rows: int) -> "Blocks":
        # Eight rows a block or more, so that rounding their number costs nothing. Short blocks
        # where tokens are few, so that the zero rows that fill the last are few; otherwise no
        # shorter than what a tensor core takes at once.
        shortest = 16 if tokens < 1024 else 64
        length = max(shortest, _power_of_two(-(-8 * tokens // rows)))
        length = min(length, _power_of_two(tokens))
        number = -(-tokens // length)
        return Blocks(length, number, *divmod(rows, number))

    def block_rows(self, block: int) -> int:
        return self.base + (block < self.extra)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
