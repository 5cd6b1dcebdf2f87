"""The methods that keep an input and compute the rest again in the backward pass."""

import dataclasses
from typing import ClassVar

from packlight.errors import InputError
from packlight.groupquant.method import GroupQuant
from packlight.method import Method
from packlight.quantiser import Quantiser

# By the error of all gradients of a Llama of 8 blocks of width 128 as it starts, on the CPU: inputs
# of blocks at 8 bits 0.005, at 4 bits 0.07; inputs of MLPs at 4 bits 0.04; the default conversion
# 0.08, and the same with the first and the third of these 0.08, with the second and third 0.11.
_FINE, _COARSE = GroupQuant(bits=8), GroupQuant(bits=4)


@dataclasses.dataclass(frozen=True)
class Recompute(Method, abstract=True):
    """Base of the methods whose modules keep nothing but their input."""

    covers_calls: ClassVar[bool] = False  # what is within keeps what other methods say


@dataclasses.dataclass(frozen=True)
class OfBlocks(Recompute, abstract=True):
    """Base of the methods of blocks: what they keep is a pack of their input, or the input."""

    @property
    def kept_by(self) -> Quantiser | None:
        """How inputs are kept; None keeps them exactly."""
        raise NotImplementedError

    # Whether what is kept lies in the memory of the host until the backward pass.
    offloads: ClassVar[bool] = False


def _check_keep(keep: object, name: str = "keep") -> None:
    if not (keep is None or isinstance(keep, Quantiser)):
        raise InputError(
            f"{name}={keep!r} is neither a quantiser, such as GroupQuant(bits=8), nor None, which"
            " keeps the input exactly"
        )


@dataclasses.dataclass(frozen=True)
class Checkpoint(OfBlocks):
    """Checkpoint blocks: keep a pack of a block's input, and run the block again for its backward.

    `torch.utils.checkpoint` without re-entrance, whose kept inputs are packs. With x~ the input as
    it comes back from its pack, the gradients of a block f are those at x~,

        dx = f'(x~)^T dy,   dw = (df/dw)(x~)^T dy,

    while its output was that at x. Biased; exact where `keep` is None. What is packed: the first
    argument and those that require gradients, of 32 or 16 bits and 4096 bytes at least, once for
    all blocks that read a tensor. Keeps the bits of `keep`, an element of a block's input.

    In a sequence of methods it takes the blocks of a model: modules of one class in a `ModuleList`
    or a `Sequential`, the outermost; in a `ModuleList` also plain `Sequential`s of the same layers
    each. By a selector it takes any module, but none within another.
    Blocks with batch norms, whose running statistics would count each batch twice, are left.

    Args:
        keep: how inputs are kept; None keeps them exactly.
    """

    keep: Quantiser | None = _FINE

    def __post_init__(self) -> None:
        _check_keep(self.keep)

    @property
    def kept_by(self) -> Quantiser | None:
        return self.keep


@dataclasses.dataclass(frozen=True)
class Offload(OfBlocks):
    """Checkpoint blocks, and have the packs of their inputs lie in the memory of the host.

    Gradients are those of `Checkpoint(keep=packed)`, and so are the blocks that it takes and what
    is packed. A pack is copied on a stream of its own into pinned memory, which the allocator of
    pinned memory uses again, while the block runs; in the backward pass the pack of the block
    before is fetched while a block runs again. Keeps nothing on the device but what is under way.
    Biased as its packs are; exact where `packed` is None, with twice as much to copy in 16 bits.

    A copy is hidden where a block runs longer than its pack takes: at 8 bits and 50 GB/s, 4096
    tokens of width 4096 take 0.35 ms each way. On the CPU packs are copied within its memory.

    Args:
        packed: how inputs are kept; None keeps them exactly.
    """

    packed: Quantiser | None = _FINE
    offloads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_keep(self.packed, "packed")

    @property
    def kept_by(self) -> Quantiser | None:
        return self.packed


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
