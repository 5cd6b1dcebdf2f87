"""Batches of other sizes: what a rank and a micro-batch have of one, and larger ones."""

from typing import Any

from torch import Tensor

from packlight._torch import flatten, unflatten
from packlight.errors import InputError
from packlight.parallel import Parallel, divided

Sizes = tuple[int | None, int | None]


def batch_and_length(inputs: Any, kwargs: Any) -> Sizes:
    """The first two dimensions of the first tensor; the second where that has token numbers."""
    first = next((x for x in flatten((inputs, kwargs))[0] if isinstance(x, Tensor)), None)
    if first is None or first.dim() == 0:
        return None, None
    length = first.shape[1] if first.dim() == 2 and not first.is_floating_point() else None
    return first.shape[0], length


def part_of_a_rank(given: Any, parallel: Parallel, microbatches: int) -> Any:
    """The first micro-batch, and of it the first tokens; raises where they are not divided."""
    batch, length = was = batch_and_length(*given)
    rows = tokens = None
    if microbatches > 1:
        if batch is None:
            raise InputError(
                f"microbatches={microbatches} are parts of a batch, and there is no tensor in this"
                " one, or in what packlight does not look into; pass tensors, or a mapping"
            )
        rows = divided("rows of the batch", batch, "microbatches", microbatches)
    if parallel.context > 1:
        tokens = divided(
            "tokens of a sequence", _counted(length, "context"), "context", parallel.context
        )
    if parallel.tensor > 1 and parallel.sequence:
        count = tokens or _counted(length, "tensor")
        divided("tokens of a rank", count, "tensor", parallel.tensor)
    return resized(given, was, rows, tokens)


def _counted(length: int | None, name: str) -> int:
    if length is None:
        hint = "; Parallel(sequence=False) leaves them whole" if name == "tensor" else ""
        raise InputError(
            f"{name} parallel cuts tokens, and the first tensor of the batch has no numbers of"
            f" tokens [rows, tokens]{hint}"
        )
    return length


def resized(given: Any, was: Sizes, batch: int | None = None, length: int | None = None) -> Any:
    """Inputs with other sizes in their first dimensions, where these are batch and length.

    Of smaller ones the values are those that there were.
    """

    def other(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != was[0]:
            return x
        shape = list(x.shape)
        shape[0] = batch or shape[0]
        if length is not None and x.dim() > 1 and shape[1] == was[1]:
            shape[1] = length
        if all(new <= old for new, old in zip(shape, x.shape, strict=True)):
            return x[tuple(map(slice, shape))]
        return x.new_empty(shape)

    leaves, structure = flatten(given)
    return unflatten([other(leaf) for leaf in leaves], structure)
