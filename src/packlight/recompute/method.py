"""The methods that keep an input and compute the rest again in the backward pass."""

import dataclasses

from packlight.errors import InputError
from packlight.groupquant.method import GroupQuant
from packlight.method import Method
from packlight.quantiser import Quantiser

# By the error of all gradients of a Llama of 8 blocks of width 128 as it starts, on the CPU: inputs
# of blocks at 8 bits 0.005, at 4 bits 0.08; inputs of MLPs at 4 bits 0.05; the default conversion
# 0.085, and the same with the first and the third of these 0.085, with the second and third 0.11.
_FINE, _COARSE = GroupQuant(bits=8), GroupQuant(bits=4)


@dataclasses.dataclass(frozen=True)
class Recompute(Method, abstract=True):
    """Base of the methods whose modules keep nothing but their input."""


def _check_keep(keep: object) -> None:
    if not (keep is None or isinstance(keep, Quantiser)):
        raise InputError(
            f"keep={keep!r} is neither a quantiser, such as GroupQuant(bits=8), nor None, which"
            " keeps the input exactly"
        )


@dataclasses.dataclass(frozen=True)
class Checkpoint(Recompute):
    """Checkpoint blocks: keep a pack of a block's input, and run the block again for its backward.

    `torch.utils.checkpoint` without re-entrance, whose kept inputs are packs. With x~ the input as
    it comes back from its pack, the gradients of a block f are those at x~,

        dx = f'(x~)^T dy,   dw = (df/dw)(x~)^T dy,

    while its output was that at x. Biased; exact where `keep` is None. What is packed: the first
    argument and those that require gradients, of 32 or 16 bits and 4096 bytes at least, once for
    all blocks that read a tensor. Keeps the bits of `keep`, an element of a block's input.

    In a sequence of methods it takes the blocks of a model: modules of one class in a `ModuleList`
    or a `Sequential`, the outermost. By a selector it takes any module, but none within another.
    Blocks with batch norms, whose running statistics would count each batch twice, are left.

    Args:
        keep: how inputs are kept; None keeps them exactly.
    """

    keep: Quantiser | None = _FINE

    def __post_init__(self) -> None:
        _check_keep(self.keep)


@dataclasses.dataclass(frozen=True)
class Tiles(Recompute):
    """Run MLPs in tiles of tokens: keep the input, and compute the rest again, tile by tile.

    For modules f that work on each position by itself, y[i] = f(x[i]), x [..., tokens, width]. The
    forward pass computes y by tiles and keeps x: nothing where a pack of x, as of the norm in
    front, is there. The backward pass goes through the tiles once more, each forward and backward,
    so that what is between x and y is there for one tile at a time. Weight gradients of several
    tiles add up in float32; a parameter's hooks see one gradient. Gradients are those at x~, x as
    it comes back from its pack: biased, and exact where `keep` is None. Keeps the bits of `keep`,
    an element of x, and 0 where x is packed as well already.

    In a sequence of methods it takes the MLPs of a model: the outermost modules of two Linear
    layers or more whose forward takes one tensor and works on each position by itself, which is
    tried on a few. Layers inside stay torch's own. Within a checkpointed block the MLP runs twice,
    as without tiles, and not three times: its input is kept before it runs, and the block's second
    pass stops there.

    Args:
        tokens: positions a tile, over all dimensions but the last.
        keep: how the input is kept; None keeps it exactly.
    """

    tokens: int = 2048
    keep: Quantiser | None = _COARSE

    def __post_init__(self) -> None:
        _check_keep(self.keep)
        if type(self.tokens) is not int or self.tokens < 1:
            raise InputError(f"tokens={self.tokens!r} is not a whole number of at least 1")
